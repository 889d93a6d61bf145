/* forward.c: tokens to the residual stream after the last layer; scoring; decoding with a cache. */
#include "core/base/pulse.h"
#include "core/model/plan.h"

#include <math.h>
#include <string.h>

/* What a key's F must exceed the gap of its sequence by (spec, section 3.1). */
static double dead_margin(const sel_model *m, int64_t n)
{
    return m->opt.attention.dead_keys == SEL_DEAD_KEYS_EXACT ? 104.0 : 17.0 + log((double)n);
}

sel_attention sel_model_attention(const sel_model *m, int64_t l, int64_t batch, int64_t n)
{
    const sel_dims *d = &m->layout->dims;
    const sel_attention_options *o = &m->opt.attention;
    const sel_kept *k = &m->kept[l];
    const int64_t row = normed_width(m), qkv_row = qkv_width(d), q = q_width(d), sel = sel_column(d);
    void *const rest = m->opt.bfloat16 ? m->normed : k->qkv;   /* v and, bilinear, sel_q, sel_k: in rows of qkv_row */

    return (sel_attention){
        .B = batch, .heads = d->H, .kv_heads = d->Hkv, .dh = d->dh, .i0 = 0, .i1 = n,
        .selective = o->selective, .relu = o->relu, .protect_bos = o->protect_bos,
        .protect_self = o->protect_self, .shift = o->shift,
        .bfloat16 = m->opt.bfloat16,
        .q = m->normed, .q_seq = n * row, .q_row = row,
        .k = operand_at(m, m->normed, q), .k_seq = n * row, .k_row = row,
        .v = operand_at(m, rest, q + kv_width(d)), .v_seq = n * qkv_row, .v_row = qkv_row,
        .sel_q = d->bilinear ? operand_at(m, rest, sel) : NULL, .sel_q_seq = n * qkv_row, .sel_q_row = qkv_row,
        .sel_k = d->bilinear ? operand_at(m, rest, sel + sel_width(d)) : NULL,
        .sel_k_seq = n * qkv_row, .sel_k_row = qkv_row,
        .out = k->att, .out_seq = n * q, .out_row = q,
        .lse = k->lse, .saved = k->saved,
        .tau = o->epsilon > 0.0 ? o->tau : 0.0, .m_max = m->m_max, .m_row = k->m_row,
        .dead_after = sel_model_leaves_out(m) ? k->dead_after : NULL, .live = m->live,
        .dead_margin = dead_margin(m, n),
        .workspace = m->attention, .threads = m->opt.threads,
    };
}

sel_qkv_rows sel_model_qkv_rows(const sel_model *m, const float *params, int64_t l, int64_t rows)
{
    const sel_dims *d = &m->layout->dims;
    const sel_layer_offsets *o = &m->layout->layers[l];
    const sel_kept *k = &m->kept[l];
    return (sel_qkv_rows){ .rows = rows, .heads = d->H, .kv_heads = d->Hkv, .dh = d->dh,
                           .rest = qkv_width(d) - q_width(d) - kv_width(d), .x = k->qkv, .x_row = qkv_width(d),
                           .w_q = params + o->q_norm, .w_k = params + o->k_norm, .rstd_q = k->rstd_q,
                           .rstd_k = k->rstd_k };
}

void sel_model_norm_qk(const sel_model *m, const float *params, int64_t l, int64_t rows, bool again)
{
    const sel_ops *ops = m->opt.ops;
    const sel_qkv_rows r = sel_model_qkv_rows(m, params, l, rows);
    const int64_t row = normed_width(m);

    if (again) ops->qk_norm_again(m->normed, m->opt.bfloat16, row, &r, pass_threads(m, rows));
    else ops->qk_norm_forward(m->normed, m->opt.bfloat16, row, &r, pass_threads(m, rows));
    sel_profile_lap(m->opt.profile, again ? SEL_PART_QK_NORM_BACKWARD : SEL_PART_QK_NORM, 0.0,
                    (double)(rows * row) * (m->opt.bfloat16 ? 6.0 : 8.0));
}

/* Attention over the cached tokens and n new ones: their k, v and sel_k join the cache, F goes on from the carry. */
static void attend_cached(sel_model *m, int64_t l, int64_t batch, int64_t n)
{
    const sel_dims *d = &m->layout->dims;
    const int64_t kv = kv_width(d), sel = sel_width(d), past = m->cached;
    const size_t bytes = operand_bytes(m);
    sel_attention a = sel_model_attention(m, l, batch, n);

    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < n; i++) {
            const int64_t to = b * d->N + past + i;
            memcpy(operand_at(m, m->k_cache[l], to * kv), sel_attention_at(&a, a.k, b * a.k_seq + i * a.k_row),
                   (size_t)kv * bytes);
            memcpy(operand_at(m, m->v_cache[l], to * kv), sel_attention_at(&a, a.v, b * a.v_seq + i * a.v_row),
                   (size_t)kv * bytes);
            if (d->bilinear)
                memcpy(operand_at(m, m->sel_k_cache[l], to * sel),
                       sel_attention_at(&a, a.sel_k, b * a.sel_k_seq + i * a.sel_k_row), (size_t)sel * bytes);
        }
    a.i0 = past;
    a.i1 = past + n;
    a.k = m->k_cache[l];
    a.v = m->v_cache[l];
    a.k_seq = a.v_seq = d->N * kv;
    a.k_row = a.v_row = kv;
    a.sel_k = m->sel_k_cache[l];
    a.sel_k_seq = d->N * sel;
    a.sel_k_row = sel;
    a.carry_in = a.carry_out = m->carry[l];
    a.carry_seq = d->N;
    a.tau = 0.0;
    m->opt.ops->attention_forward(&a);
}

float sel_model_dead_after(const sel_model *m, float gap, int64_t n)
{
    const float after = gap + (float)dead_margin(m, n), tau = (float)m->opt.attention.tau;
    return after < tau ? tau : after;   /* NaN stays: nothing dies */
}

static double live_share(const sel_attention *a)
{
    double live = 0.0;
    if (!a->dead_after) return 1.0;
    for (int64_t b = 0; b < a->B; b++) live += a->live[b];
    return live / ((double)a->B * (double)a->i1 * (double)(a->i1 + 1) / 2.0);
}

double sel_model_live_keys(const sel_model *m, int64_t l) { return m->live_share[l]; }

/* One layer: x += o_proj(attention(norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))), where each sum is made
   together with the norm that reads it: the layer begins with the branch that the one before left in m->h and leaves
   its own there.  Adds the layer's memory needs, sum over sequences of max M, to *memory. */
static sel_status forward_layer(sel_model *m, const float *params, int64_t l, int64_t batch, int64_t n, double *memory)
{
    const sel_dims *d = &m->layout->dims;
    const sel_ops *ops = m->opt.ops;
    const sel_layer_offsets *o = &m->layout->layers[l];
    const sel_layer_linears *w = &m->linears[l];
    sel_kept *k = &m->kept[l];
    const int64_t T = own_rows(m, batch, n), D = d->D;
    const int threads = pass_threads(m, T);
    const void *h = norm_operand(m);

    if (l > 0) {
        residual_normed(m, params, o->attn_norm, k->rstd1, k->x_in, m->kept[l - 1].x_mid, T);
    } else {
        if (m->opt.bfloat16) ops->rmsnorm_forward_bf16(m->h16, k->rstd1, k->x_in, params + o->attn_norm, T, D, threads);
        else ops->rmsnorm_forward(m->h, k->rstd1, k->x_in, params + o->attn_norm, T, D, threads);
        sel_profile_lap(m->opt.profile, SEL_PART_NORM, 0.0, (double)(T * D) * (m->opt.bfloat16 ? 6.0 : 8.0));
    }
    SEL_TRY(sel_model_product(m, w->qkv, SEL_PART_QKV, T, h, D, k->qkv, qkv_width(d)));
    sel_model_norm_qk(m, params, l, T, false);
    if (m->opt.use == SEL_USE_DECODE) {
        attend_cached(m, l, batch, n);
    } else if (m->opt.sequence) {
        sel_shared_attention(m, l, batch);
    } else {
        const sel_attention a = sel_model_attention(m, l, batch, n);
        ops->attention_forward(&a);
        m->live_share[l] = live_share(&a);
        for (int64_t b = 0; a.selective && a.tau > 0.0 && b < batch; b++) *memory += m->m_max[b];
    }
    sel_profile_lap(m->opt.profile, SEL_PART_ATTENTION, attention_flops(d, batch, n) / m->chunks.ranks,
                    (double)T * (double)operand_bytes(m) * (double)(2 * q_width(d) + 2 * kv_width(d)));
    SEL_TRY(sel_model_product(m, w->o_proj, SEL_PART_O_PROJ, T, k->att, q_width(d), m->h, D));

    h = residual_normed(m, params, o->ffn_norm, k->rstd2, k->x_mid, k->x_in, T);
    SEL_TRY(sel_model_product(m, w->gate_up, SEL_PART_GATE_UP, T, h, D, k->gu, 2 * d->F));
    if (m->opt.bfloat16) ops->swiglu_forward_bf16(m->act, k->gu, T, d->F, threads);
    else ops->swiglu_forward(m->act, k->gu, T, d->F, threads);
    sel_profile_lap(m->opt.profile, SEL_PART_SWIGLU, 0.0, (double)(T * d->F) * (m->opt.bfloat16 ? 10.0 : 12.0));
    return sel_model_product(m, w->down_proj, SEL_PART_DOWN_PROJ, T, m->act, d->F, m->h, D);
}

sel_status sel_model_forward(sel_model *m, const float *params, int64_t batch, int64_t n, double *memory)
{
    const sel_dims *d = &m->layout->dims;
    const sel_chunks *const c = &m->chunks;
    const int64_t rows = own_rows(m, batch, n), each = rows / c->chunks;
    double needed = 0.0;

    for (int k = 0; k < c->chunks; k++) {
        const int64_t first = m->opt.sequence ? sel_chunk_place(c, c->rank, k) * c->each : m->cached;
        m->opt.ops->embed_forward(m->kept[0].x_in + k * each * d->D, m->inputs + k * each,
                                  params + m->layout->tok_embed, params + m->layout->pos_embed, each, each / batch,
                                  first, d->D, pass_threads(m, rows));
    }
    sel_profile_lap(m->opt.profile, SEL_PART_EMBED, 0.0, (double)(rows * d->D) * 12.0);
    for (int64_t l = 0; l < d->L; l++) {
        SEL_TRY(forward_layer(m, params, l, batch, n, &needed));
        sel_pulse_tick();
    }
    if (m->opt.sequence) sel_shared_findings(m, batch, &needed);
    *memory = needed / (double)(d->L * n);
    return SEL_OK;
}

sel_status sel_model_score(sel_model *m, const float *params, const int32_t *tokens, int64_t batch, int64_t n,
                           double *logp, uint8_t *best, sel_batch_stats *stats)
{
    SEL_ASSERT(m->opt.use != SEL_USE_DECODE);
    memset(stats, 0, sizeof *stats);
    SEL_TRY(sel_model_take_tokens(m, tokens, batch, n));
    SEL_TRY(sel_model_forward(m, params, batch, n, &stats->memory));
    return sel_model_head(m, params, NULL, false, own_rows(m, batch, n), 0.0, logp, best, stats);
}

sel_status sel_model_extend(sel_model *m, const float *params, const int32_t *tokens, int64_t batch, int64_t n,
                            float *logits)
{
    const sel_dims *d = &m->layout->dims;
    double unused;

    SEL_ASSERT(m->opt.use == SEL_USE_DECODE && batch <= m->opt.batch && n <= m->opt.tokens);
    if (n > d->N - m->cached)
        return sel_fail(SEL_EUSER, "%lld tokens do not fit after %lld: the model's context is %lld", (long long)n,
                        (long long)m->cached, (long long)d->N);
    for (int64_t i = 0; i < batch * n; i++) {
        if (tokens[i] < 0 || tokens[i] >= d->V)
            return sel_fail(SEL_EFILE, "token id %d lies outside the vocabulary of %lld", tokens[i], (long long)d->V);
        m->inputs[i] = tokens[i];
    }
    SEL_TRY(sel_model_forward(m, params, batch, n, &unused));
    m->cached += n;

    /* Only the last token's logits are wanted.  Row b of the norms lies before the branch's rows of later sequences. */
    float *const x = m->kept[d->L - 1].x_mid;
    for (int64_t b = 0; b < batch; b++) {
        const int64_t last = (b * n + n - 1) * d->D;
        void *const h = m->opt.bfloat16 ? (void *)(m->h16 + b * d->D) : (void *)(m->h + b * d->D);
        m->opt.ops->residual_norm(h, m->opt.bfloat16, NULL, x + last, x + last, m->h + last,
                                  params + m->layout->final_norm, 1, d->D, 1);
    }
    return sel_linear_forward(m->lm_head, batch, norm_operand(m), d->D, logits, d->V);
}
