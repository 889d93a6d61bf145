/* backward.c: the gradient of one micro-batch, by hand, from the last layer to the first. */
#include "core/base/pulse.h"
#include "core/model/plan.h"

#include <string.h>

/* A moment between two operations, for whoever has something to move along. */
static void tick(const sel_model *m)
{
    if (m->opt.tick) m->opt.tick(m->opt.tick_ctx);
}

/* The gradient of a norm of x into m->dx (and m->dx16), and its output again, as an operand. */
static const void *norm_backward(sel_model *m, const float *params, float *grads, int64_t offset, const float *x,
                                 const float *rstd, int64_t T)
{
    const int64_t D = m->layout->dims.D;
    void *const h = norm_operand(m);
    m->opt.ops->rmsnorm_backward(m->dx, m->dx, m->dx16, h, grads + offset, m->dh, x, rstd, params + offset, m->partial,
                                 T, D, m->opt.threads);
    sel_profile_lap(m->opt.profile, SEL_PART_NORM_BACKWARD, 0.0, (double)(T * D) * 20.0);
    return h;
}

/* Attention's dq, dk, dv through the q/k norm: the operand of the qkv products. */
static const void *qkv_gradient(sel_model *m, const float *params, float *grads, int64_t l, int64_t T)
{
    const sel_dims *d = &m->layout->dims;
    const sel_layer_offsets *o = &m->layout->layers[l];
    const sel_qkv_rows r = sel_model_qkv_rows(m, params, l, T);
    const int64_t row = r.x_row, qk = q_width(d) + kv_width(d);
    const bool rounded = m->opt.bfloat16;
    void *const dqkv = rounded ? (void *)m->dqkv16 : (void *)m->dqkv;

    m->opt.ops->qk_norm_backward(dqkv, rounded, row, grads + o->q_norm, grads + o->k_norm, m->dqkv, row, &r, m->partial,
                                 m->opt.threads);
    sel_profile_lap(m->opt.profile, SEL_PART_QK_NORM_BACKWARD, 0.0,
                    (double)T * (rounded ? 10.0 * (double)qk + 6.0 * (double)r.rest : 12.0 * (double)qk));
    return dqkv;
}

/* Attention's gradients into m->dqkv. */
static void attention_backward(const sel_model *m, int64_t l, int64_t batch, int64_t n, double memory_scale)
{
    const sel_dims *d = &m->layout->dims;
    const int64_t q = q_width(d), row = qkv_width(d);
    const sel_attention a = sel_model_attention(m, l, batch, n);
    const sel_attention_grad g = {
        .dout = m->datt,
        .dq = m->dqkv, .dq_seq = n * row, .dq_row = row,
        .dk = m->dqkv + q, .dk_seq = n * row, .dk_row = row,
        .dv = m->dqkv + q + kv_width(d), .dv_seq = n * row, .dv_row = row,
        .dsel_q = m->dqkv + sel_column(d), .dsel_q_seq = n * row, .dsel_q_row = row,
        .dsel_k = m->dqkv + sel_column(d) + sel_width(d), .dsel_k_seq = n * row, .dsel_k_row = row,
        .memory_coef = memory_coefficient(m, n, memory_scale),
    };
    m->opt.ops->attention_backward(&a, &g);
}

/* m->dx holds the gradient of the layer's output and leaves as that of its input (m->dx16: rounded). */
static sel_status backward_layer(sel_model *m, const float *params, float *grads, bool add, int64_t l, int64_t batch,
                                 int64_t n, double memory_scale)
{
    const sel_dims *d = &m->layout->dims;
    const sel_ops *ops = m->opt.ops;
    const sel_layer_offsets *o = &m->layout->layers[l];
    const sel_layer_linears *w = &m->linears[l];
    const sel_kept *k = &m->kept[l];
    const int64_t T = own_rows(m, batch, n), D = d->D, q = q_width(d), kv = kv_width(d), qkv_row = qkv_width(d);
    const void *const dx = m->opt.bfloat16 ? (const void *)m->dx16 : m->dx;

    /* feed-forward half: silu(gate) * up and the norm's output come again with their gradients */
    SEL_TRY(sel_model_product_input(m, w->down_proj, SEL_PART_DOWN_PROJ, T, dx, D, m->da, SEL_FLOAT32, d->F));
    if (m->opt.bfloat16) ops->swiglu_backward_bf16(m->dgu, m->act, m->da, k->gu, T, d->F, m->opt.threads);
    else ops->swiglu_backward(m->dgu, m->act, m->da, k->gu, T, d->F, m->opt.threads);
    sel_profile_lap(m->opt.profile, SEL_PART_SWIGLU_BACKWARD, 0.0,
                    (double)(T * d->F) * (m->opt.bfloat16 ? 18.0 : 24.0));
    SEL_TRY(sel_model_product_weight(m, w->down_proj, SEL_PART_DOWN_PROJ, T, dx, D, m->act, d->F, grads + o->down_proj,
                                     add));
    tick(m);
    SEL_TRY(sel_model_product_input(m, w->gate_up, SEL_PART_GATE_UP, T, m->dgu, 2 * d->F, m->dh, SEL_FLOAT32, D));
    tick(m);
    const void *h = norm_backward(m, params, grads, o->ffn_norm, k->x_mid, k->rstd2, T);
    SEL_TRY(sel_model_product_weight(m, w->gate_up, SEL_PART_GATE_UP, T, m->dgu, 2 * d->F, h, D, grads + o->gate_up,
                                     add));

    tick(m);

    /* attention half */
    SEL_TRY(sel_model_product_input(m, w->o_proj, SEL_PART_O_PROJ, T, dx, D, m->datt, operand_type(m), q));
    SEL_TRY(sel_model_product_weight(m, w->o_proj, SEL_PART_O_PROJ, T, dx, D, k->att, q, grads + o->o_proj, add));
    sel_model_norm_qk(m, params, l, T, true);
    tick(m);
    if (m->opt.sequence) sel_shared_attention_backward(m, l, batch, memory_scale);
    else attention_backward(m, l, batch, n, memory_scale);
    sel_profile_lap(m->opt.profile, SEL_PART_ATTENTION_BACKWARD, 2.5 * attention_flops(d, batch, n) / m->chunks.ranks,
                    (double)T * ((double)operand_bytes(m) * (double)(3 * q + 2 * kv) + 4.0 * (double)(q + 2 * kv)));
    tick(m);
    const void *const dqkv = qkv_gradient(m, params, grads, l, T);
    SEL_TRY(sel_model_product_input(m, w->qkv, SEL_PART_QKV, T, dqkv, qkv_row, m->dh, SEL_FLOAT32, D));
    tick(m);
    h = norm_backward(m, params, grads, o->attn_norm, k->x_in, k->rstd1, T);
    return sel_model_product_weight(m, w->qkv, SEL_PART_QKV, T, dqkv, qkv_row, h, D, grads + o->qkv, add);
}

/* The linear layers' products write their gradients; all others, whose backward adds, start from zero. */
static void clear_sums(const sel_model *m, float *grads)
{
    const sel_layout *o = m->layout;
    double bytes = 0.0;
    for (int i = 0; i < o->n_tensors; i++) {
        const sel_tensor *t = &o->tensors[i];
        if (t->decay) continue;   /* decayed are exactly the linear layers' matrices (spec, section 8) */
        memset(grads + t->offset, 0, (size_t)t->count * sizeof *grads);
        bytes += (double)t->count * sizeof *grads;
    }
    sel_profile_lap(m->opt.profile, SEL_PART_ZERO, 0.0, bytes);
}

static void embed_backward(const sel_model *m, float *grads, int64_t batch, int64_t n)
{
    const sel_layout *o = m->layout;
    const sel_chunks *const c = &m->chunks;
    const int64_t D = o->dims.D, rows = own_rows(m, batch, n), each = rows / c->chunks;

    for (int k = 0; k < c->chunks; k++) {
        const int64_t first = sel_chunk_place(c, c->rank, k) * (m->opt.sequence ? c->each : 0);
        m->opt.ops->embed_backward(grads + o->tok_embed, grads + o->pos_embed + first * D, m->dx + k * each * D,
                                   m->inputs + k * each, each, each / batch, D, m->opt.threads);
    }
    sel_profile_lap(m->opt.profile, SEL_PART_EMBED_BACKWARD, 0.0, (double)(rows * D) * 20.0);
}

sel_status sel_model_train(sel_model *m, const float *params, float *grads, bool add, const int32_t *tokens,
                           int64_t batch, int64_t n, double loss_scale, double memory_scale,
                           void (*ready)(void *ctx, int64_t begin, int64_t end), void *ctx, sel_batch_stats *stats)
{
    const sel_layout *o = m->layout;
    const sel_dims *d = &o->dims;

    SEL_ASSERT(m->opt.use == SEL_USE_TRAIN && batch > 0 && n > 0);
    memset(stats, 0, sizeof *stats);
    sel_profile_start(m->opt.profile);
    SEL_TRY(sel_model_take_tokens(m, tokens, batch, n));
    if (!add) clear_sums(m, grads);
    SEL_TRY(sel_model_forward(m, params, batch, n, &stats->memory));
    sel_pulse_phase("backward", -1);
    SEL_TRY(sel_model_head(m, params, grads, add, own_rows(m, batch, n), loss_scale, NULL, NULL, stats));
    if (ready) ready(ctx, o->final_norm, o->total);
    for (int64_t l = d->L - 1; l >= 0; l--) {
        SEL_TRY(backward_layer(m, params, grads, add, l, batch, n, memory_scale));
        sel_pulse_tick();
        if (ready) {
            ready(ctx, o->layers[l].begin, l + 1 < d->L ? o->layers[l + 1].begin : o->final_norm);
            sel_profile_lap(m->opt.profile, SEL_PART_REDUCE, 0.0, 0.0);
        }
    }
    embed_backward(m, grads, batch, n);
    if (ready) ready(ctx, 0, o->layers[0].begin);
    return SEL_OK;
}
