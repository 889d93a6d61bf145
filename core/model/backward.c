/* backward.c: the gradient of one micro-batch, by hand, from the last layer to the first. */
#include "core/base/pulse.h"
#include "core/model/plan.h"

#include <string.h>

/* A moment between two operations, for whoever has something to move along. */
static void tick(const sel_model *m)
{
    if (m->opt.tick) m->opt.tick(m->opt.tick_ctx);
}

/* m->dx holds the gradient of the layer's output and leaves as that of its input. */
static sel_status backward_layer(sel_model *m, const float *params, float *grads, int64_t l, int64_t batch, int64_t n,
                                 double memory_scale)
{
    const sel_dims *d = &m->layout->dims;
    const sel_ops *ops = m->opt.ops;
    const sel_layer_offsets *o = &m->layout->layers[l];
    const sel_layer_linears *w = &m->linears[l];
    const sel_kept *k = &m->kept[l];
    const int64_t T = batch * n, D = d->D, q = q_width(d), kv = kv_width(d), qk_row = q + kv, qkv_row = qkv_width(d);
    const int threads = m->opt.threads;

    /* feed-forward half: gate, up and the norm's output are rebuilt or kept; silu(gate) * up comes with its gradient */
    const void *dx = operand(m, m->dx16, m->dx, T * D);
    SEL_TRY(sel_linear_backward_input(w->down_proj, T, dx, D, m->da, d->F));
    if (m->opt.bfloat16) ops->swiglu_backward_bf16(m->dgu, m->act, m->da, k->gu, T, d->F, threads);
    else ops->swiglu_backward(m->dgu, m->act, m->da, k->gu, T, d->F, threads);
    SEL_TRY(sel_linear_backward_weight(w->down_proj, T, dx, D, m->act, d->F, grads + o->down_proj));
    tick(m);
    SEL_TRY(sel_linear_backward_input(w->gate_up, T, m->dgu, 2 * d->F, m->dh, D));
    tick(m);
    const void *h = normed(m, params, o->ffn_norm, NULL, k->x_mid, T);
    SEL_TRY(sel_linear_backward_weight(w->gate_up, T, m->dgu, 2 * d->F, h, D, grads + o->gate_up));
    ops->rmsnorm_backward(m->dx, grads + o->ffn_norm, m->dh, k->x_mid, k->rstd2, params + o->ffn_norm, m->partial, T, D,
                          threads);

    tick(m);

    /* attention half */
    dx = operand(m, m->dx16, m->dx, T * D);
    SEL_TRY(sel_linear_backward_input(w->o_proj, T, dx, D, m->datt, q));
    SEL_TRY(sel_linear_backward_weight(w->o_proj, T, dx, D, operand(m, m->att16, k->att, T * q), q, grads + o->o_proj));
    sel_model_norm_qk(m, params, l, T, NULL, NULL);
    const sel_attention a = sel_model_attention(m, l, batch, n);
    const sel_attention_grad g = {
        .dout = m->datt,
        .dq = m->dqkv, .dq_seq = n * qkv_row, .dq_row = qkv_row,
        .dk = m->dqkv + q, .dk_seq = n * qkv_row, .dk_row = qkv_row,
        .dv = m->dqkv + qk_row, .dv_seq = n * qkv_row, .dv_row = qkv_row,
        .dsel_q = m->dqkv + sel_column(d), .dsel_q_seq = n * qkv_row, .dsel_q_row = qkv_row,
        .dsel_k = m->dqkv + sel_column(d) + sel_width(d), .dsel_k_seq = n * qkv_row, .dsel_k_row = qkv_row,
        .memory_coef = (float)(memory_scale / ((double)(d->L * n) * m->opt.attention.tau)),
    };
    tick(m);
    ops->attention_backward(&a, &g);
    tick(m);
    ops->headnorm_backward(m->dqkv, qkv_row, grads + o->q_norm, m->dqkv, qkv_row, k->qkv, qkv_row, k->rstd_q,
                           params + o->q_norm, m->partial, T, d->H, d->dh, threads);
    ops->headnorm_backward(m->dqkv + q, qkv_row, grads + o->k_norm, m->dqkv + q, qkv_row, k->qkv + q, qkv_row,
                           k->rstd_k, params + o->k_norm, m->partial, T, d->Hkv, d->dh, threads);
    const void *const dqkv = operand(m, m->dqkv16, m->dqkv, T * qkv_row);
    SEL_TRY(sel_linear_backward_input(w->qkv, T, dqkv, qkv_row, m->dh, D));
    tick(m);
    h = normed(m, params, o->attn_norm, NULL, k->x_in, T);
    SEL_TRY(sel_linear_backward_weight(w->qkv, T, dqkv, qkv_row, h, D, grads + o->qkv));
    ops->rmsnorm_backward(m->dx, grads + o->attn_norm, m->dh, k->x_in, k->rstd1, params + o->attn_norm, m->partial, T,
                          D, threads);
    return SEL_OK;
}

sel_status sel_model_train(sel_model *m, const float *params, float *grads, const int32_t *tokens, int64_t batch,
                           int64_t n, double loss_scale, double memory_scale,
                           void (*ready)(void *ctx, int64_t begin, int64_t end), void *ctx, sel_batch_stats *stats)
{
    const sel_layout *o = m->layout;
    const sel_dims *d = &o->dims;

    SEL_ASSERT(m->opt.use == SEL_USE_TRAIN);
    memset(stats, 0, sizeof *stats);
    SEL_TRY(sel_model_take_tokens(m, tokens, batch, n));
    SEL_TRY(sel_model_forward(m, params, batch, n, &stats->memory));
    sel_pulse_phase("backward", -1);
    SEL_TRY(sel_model_head(m, params, grads, batch * n, loss_scale, NULL, NULL, stats));
    if (ready) ready(ctx, o->final_norm, o->total);
    for (int64_t l = d->L - 1; l >= 0; l--) {
        SEL_TRY(backward_layer(m, params, grads, l, batch, n, memory_scale));
        sel_pulse_tick();
        if (ready) ready(ctx, o->layers[l].begin, l + 1 < d->L ? o->layers[l + 1].begin : o->final_norm);
    }
    m->opt.ops->embed_backward(grads + o->tok_embed, grads + o->pos_embed, m->dx, m->inputs, batch * n, n, d->D,
                               m->opt.threads);
    if (ready) ready(ctx, 0, o->layers[0].begin);
    return SEL_OK;
}
