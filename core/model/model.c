/* model.c: making and freeing a model: its packed weights and its one block of memory. */
#include "core/model/model.h"

#include <stdlib.h>
#include <string.h>
#include "core/base/mem.h"
#include "core/model/plan.h"

/* Logits exist for this many floats at a time: the slice stays in the last-level cache. */
enum { LOGIT_FLOATS = 1 << 22 };

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t sel_model_logit_rows(const sel_dims *d, int64_t rows) { return least(rows, most(64, LOGIT_FLOATS / d->V)); }

sel_attention_options sel_attention_options_of(const sel_config *c)
{
    return (sel_attention_options){ .selective = c->attention.kind == SEL_KIND_SELECTIVE,
                                    .relu = c->attention.selection.relu,
                                    .protect_bos = c->attention.selection.protect_bos,
                                    .protect_self = c->attention.selection.protect_self,
                                    .shift = c->attention.selection.shift,
                                    .epsilon = c->attention.memory_loss.epsilon,
                                    .tau = c->attention.memory_loss.tau,
                                    .dead_keys = c->attention.selection.relu ? c->attention.dead_keys
                                                                             : SEL_DEAD_KEYS_OFF };
}

int64_t sel_model_keys_width(const sel_dims *d) { return 2 * kv_width(d) + sel_width(d); }

double sel_model_flops(const sel_dims *d, int64_t tokens, int64_t n)
{
    const double matrices = (double)d->L * ((double)d->D * (double)(qkv_width(d) + q_width(d)) +
                                            3.0 * (double)d->D * (double)d->F) + (double)d->V * (double)d->D;
    return 3.0 * (double)tokens * (2.0 * matrices + (double)d->L * attention_flops(d, 1, n) / (double)n);
}

/* Walks the block of memory: first with base NULL to learn its size, then to hand out places. */
typedef struct {
    char *base;
    size_t used;
} arena;

static void *take(arena *a, int64_t n, size_t each)
{
    void *const at = a->base ? a->base + a->used : NULL;
    a->used += ((size_t)n * each + 63) / 64 * 64;
    return at;
}

static float *floats(arena *a, int64_t n) { return take(a, n, sizeof(float)); }

/* Carries that forward saves for backward, all sequences. */
static int64_t saved_floats(const sel_model *m)
{
    int64_t floats = 0;
    if (!m->opt.sequence) return m->opt.batch * sel_attention_saved_size(m->opt.tokens);
    for (int c = 0; c < m->chunks.chunks; c++) {
        const sel_attention a = sel_shared_call(m, 0, m->opt.batch, c, NULL);
        floats += a.B * sel_attention_carries(a.i1 - a.i0) * a.i1;
    }
    return floats;
}

static void plan_kept(sel_model *m, arena *a, sel_kept *k)
{
    const sel_dims *d = &m->layout->dims;
    const int64_t b = m->opt.batch, n = m->opt.tokens, T = own_rows(m, b, n);
    const bool train = m->opt.use == SEL_USE_TRAIN;

    k->x_in = train ? floats(a, T * d->D) : m->x;
    k->rstd1 = floats(a, T);
    k->qkv = floats(a, T * qkv_width(d));
    k->rstd_q = floats(a, T * d->H);
    k->rstd_k = floats(a, T * d->Hkv);
    k->att = take(a, T * q_width(d), operand_bytes(m));
    k->lse = floats(a, T * d->H);
    k->saved = train && m->opt.attention.selective ? floats(a, saved_floats(m)) : NULL;
    k->m_row = take(a, b, sizeof *k->m_row);
    k->dead_after = floats(a, b);
    k->x_mid = train ? floats(a, T * d->D) : m->x;
    k->rstd2 = floats(a, T);
    k->gu = floats(a, T * 2 * d->F);
}

/* Scratch of an attention call, forward and, in training, backward. */
static size_t call_bytes(const sel_model *m, sel_attention a)
{
    float known_later = 0.0f;
    if (m->opt.use != SEL_USE_TRAIN) a.saved = NULL;
    if (sel_model_leaves_out(m)) a.dead_after = &known_later;
    const size_t forward = sel_attention_workspace(&a, false);
    const size_t backward = m->opt.use == SEL_USE_TRAIN ? sel_attention_workspace(&a, true) : 0;
    return forward > backward ? forward : backward;
}

static size_t attention_bytes(const sel_model *m)
{
    /* A call with fewer sequences than threads needs other scratch than a full one. */
    size_t bytes = 0;
    for (int64_t b = 1; b <= m->opt.batch; b++) {
        for (int c = 0; c < m->chunks.chunks; c++) {
            sel_attention a = m->opt.sequence ? sel_shared_call(m, 0, b, c, NULL)
                                              : sel_model_attention(m, 0, b, m->opt.tokens);
            if (m->opt.use == SEL_USE_DECODE) {
                a.i0 = m->layout->dims.N - m->opt.tokens;
                a.i1 = m->layout->dims.N;
            }
            const size_t here = call_bytes(m, a);
            if (here > bytes) bytes = here;
        }
    }
    return bytes;
}

static void plan_attention_half(sel_model *m, arena *a)
{
    const sel_dims *d = &m->layout->dims;
    const int64_t T = own_rows(m, m->opt.batch, m->opt.tokens);
    m->normed = take(a, T * normed_width(m), operand_bytes(m));
    if (m->opt.use != SEL_USE_TRAIN) return;
    m->dqkv = floats(a, T * qkv_width(d));
    m->datt = take(a, T * q_width(d), operand_bytes(m));
    if (m->opt.bfloat16) m->dqkv16 = take(a, T * qkv_width(d), sizeof *m->dqkv16);
}

static void plan_feed_forward_half(sel_model *m, arena *a)
{
    const int64_t n = own_rows(m, m->opt.batch, m->opt.tokens) * m->layout->dims.F;
    m->act = take(a, n, operand_bytes(m));
    if (m->opt.use != SEL_USE_TRAIN) return;
    m->da = floats(a, n);
    m->dgu = take(a, 2 * n, operand_bytes(m));
}

static void plan_memory(sel_model *m, arena *a)
{
    const sel_dims *d = &m->layout->dims;
    const int64_t b = m->opt.batch, T = own_rows(m, b, m->opt.tokens);
    const bool train = m->opt.use == SEL_USE_TRAIN;

    m->x = floats(a, T * d->D);
    m->rstd_final = floats(a, T);
    const size_t kept_begin = a->used;
    if (train) {
        for (int64_t l = 0; l < d->L; l++) plan_kept(m, a, &m->kept[l]);
    } else {
        plan_kept(m, a, &m->kept[0]);
        for (int64_t l = 1; l < d->L; l++) m->kept[l] = m->kept[0];
    }
    m->kept_bytes = train ? a->used - kept_begin : 0;
    m->h = floats(a, T * d->D);
    m->logit_rows = m->opt.use == SEL_USE_DECODE ? b : sel_model_logit_rows(d, T);
    m->logp = take(a, m->logit_rows, sizeof *m->logp);
    m->best = take(a, m->logit_rows, sizeof *m->best);
    m->inputs = take(a, T, sizeof *m->inputs);
    m->targets = take(a, T, sizeof *m->targets);
    m->m_max = take(a, b, sizeof *m->m_max);
    m->live = take(a, b, sizeof *m->live);
    m->live_share = take(a, d->L, sizeof *m->live_share);
    if (m->opt.sequence) {
        m->sums = floats(a, b * sel_sequence_row(m->opt.sequence));
        m->found = take(a, d->L * b, sizeof *m->found);
        m->all_found = take(a, m->chunks.ranks * d->L * b, sizeof *m->all_found);
    }
    m->attention = take(a, (int64_t)attention_bytes(m), 1);
    if (m->opt.bfloat16) m->h16 = take(a, T * d->D, sizeof *m->h16);
    if (train) {
        m->dx = floats(a, T * d->D);
        m->dh = floats(a, T * d->D);
        m->partial = floats(a, m->opt.threads * most(d->D, 2 * d->dh));
        if (m->opt.bfloat16) m->dx16 = take(a, T * d->D, sizeof *m->dx16);
    }

    /* Attention half, feed-forward half, output matrix: one at a time, in the same place. */
    const size_t begin = a->used;
    plan_attention_half(m, a);
    const size_t attention_end = a->used;
    a->used = begin;
    plan_feed_forward_half(m, a);
    const size_t feed_forward_end = a->used;
    a->used = begin;
    m->logits = floats(a, m->logit_rows * d->V);
    if (train && m->opt.bfloat16) m->logits16 = take(a, m->logit_rows * d->V, sizeof *m->logits16);
    if (attention_end > a->used) a->used = attention_end;
    if (feed_forward_end > a->used) a->used = feed_forward_end;

    for (int64_t l = 0; m->opt.use == SEL_USE_DECODE && l < d->L; l++) {
        m->k_cache[l] = take(a, b * d->N * kv_width(d), operand_bytes(m));
        m->v_cache[l] = take(a, b * d->N * kv_width(d), operand_bytes(m));
        if (d->bilinear) m->sel_k_cache[l] = take(a, b * d->N * sel_width(d), operand_bytes(m));
        m->carry[l] = floats(a, b * d->N);
    }
}

static sel_status make_linears(sel_model *m)
{
    const sel_dims *d = &m->layout->dims;
    const bool backward = m->opt.use == SEL_USE_TRAIN;
    sel_linear_engine *const e = m->opt.engine;

    for (int64_t l = 0; l < d->L; l++) {
        sel_layer_linears *n = &m->linears[l];
        SEL_TRY(sel_linear_new(&n->qkv, e, qkv_width(d), d->D, backward));
        SEL_TRY(sel_linear_new(&n->o_proj, e, d->D, q_width(d), backward));
        SEL_TRY(sel_linear_new(&n->gate_up, e, 2 * d->F, d->D, backward));
        SEL_TRY(sel_linear_new(&n->down_proj, e, d->D, d->F, backward));
    }
    SEL_TRY(sel_linear_new(&m->lm_head, e, d->V, d->D, backward));

    /* The full micro-batch's primitives are made now; other sizes (a last, shorter call) at their first use. */
    const int64_t T = own_rows(m, m->opt.batch, m->opt.tokens);
    SEL_TRY(sel_linear_prepare(m->linears[0].qkv, T, d->D, qkv_width(d), SEL_FLOAT32));
    SEL_TRY(sel_linear_prepare(m->linears[0].o_proj, T, q_width(d), d->D, operand_type(m)));
    SEL_TRY(sel_linear_prepare(m->linears[0].gate_up, T, d->D, 2 * d->F, SEL_FLOAT32));
    SEL_TRY(sel_linear_prepare(m->linears[0].down_proj, T, d->F, d->D, SEL_FLOAT32));
    return sel_linear_prepare(m->lm_head, m->logit_rows, d->D, d->V, SEL_FLOAT32);
}

sel_status sel_model_new(sel_model **out, const sel_layout *layout, const sel_model_options *o)
{
    const size_t L = (size_t)layout->dims.L;
    sel_status rc = SEL_ENOMEM;
    sel_model *m = calloc(1, sizeof *m);

    *out = NULL;
    SEL_ASSERT(o->tokens <= layout->dims.N && o->batch > 0 && o->threads > 0 &&
               (o->attention.selective || !layout->dims.bilinear));
    SEL_ASSERT(!o->sequence || (o->use != SEL_USE_DECODE && sel_sequence_chunks(o->sequence)->tokens == o->tokens));
    if (m) {
        m->layout = layout;
        m->opt = *o;
        m->chunks = o->sequence ? *sel_sequence_chunks(o->sequence)
                                : (sel_chunks){ .tokens = o->tokens, .each = o->tokens, .ranks = 1, .chunks = 1 };
        m->linears = calloc(L, sizeof *m->linears);
        m->kept = calloc(L, sizeof *m->kept);
        m->k_cache = calloc(L, sizeof *m->k_cache);
        m->v_cache = calloc(L, sizeof *m->v_cache);
        m->sel_k_cache = calloc(L, sizeof *m->sel_k_cache);
        m->carry = calloc(L, sizeof *m->carry);
    }
    if (!m || !m->linears || !m->kept || !m->k_cache || !m->v_cache || !m->sel_k_cache || !m->carry) {
        rc = sel_fail(SEL_ENOMEM, "no memory for the tables of a model of %zu layers", L);
        goto fail;
    }

    arena size = { 0 }, place;
    plan_memory(m, &size);
    m->bytes = size.used;
    m->memory = sel_alloc(size.used, "activations");
    if (!m->memory) goto fail;
    place = (arena){ .base = m->memory };
    plan_memory(m, &place);

    if ((rc = make_linears(m)) != SEL_OK) goto fail;
    *out = m;
    return SEL_OK;
fail:
    sel_model_free(&m);
    return rc;
}

void sel_model_free(sel_model **model)
{
    sel_model *m = *model;
    if (!m) return;
    for (int64_t l = 0; m->linears && l < m->layout->dims.L; l++) {
        sel_linear_free(&m->linears[l].qkv);
        sel_linear_free(&m->linears[l].o_proj);
        sel_linear_free(&m->linears[l].gate_up);
        sel_linear_free(&m->linears[l].down_proj);
    }
    sel_linear_free(&m->lm_head);
    sel_free(m->memory);
    free(m->linears);
    free(m->kept);
    free(m->k_cache);
    free(m->v_cache);
    free(m->sel_k_cache);
    free(m->carry);
    free(m);
    *model = NULL;
}

void sel_model_memory(const sel_model *m, size_t *packed, size_t *kept, size_t *scratch)
{
    *packed = sel_linear_bytes(m->lm_head);
    for (int64_t l = 0; l < m->layout->dims.L; l++)
        *packed += sel_linear_bytes(m->linears[l].qkv) + sel_linear_bytes(m->linears[l].o_proj) +
                   sel_linear_bytes(m->linears[l].gate_up) + sel_linear_bytes(m->linears[l].down_proj);
    *kept = m->kept_bytes;
    *scratch = m->bytes - m->kept_bytes;
}

void sel_model_set_selective(sel_model *m, bool selective, sel_profile *profile)
{
    SEL_ASSERT(!selective || m->opt.use != SEL_USE_TRAIN || m->kept[0].saved);
    m->opt.attention.selective = selective;
    m->opt.profile = profile;
}

sel_status sel_model_pack(sel_model *m, const float *params)
{
    const sel_layout *o = m->layout;
    sel_profile_start(m->opt.profile);
    for (int64_t l = 0; l < o->dims.L; l++) {
        SEL_TRY(sel_linear_pack(m->linears[l].qkv, params + o->layers[l].qkv));
        SEL_TRY(sel_linear_pack(m->linears[l].o_proj, params + o->layers[l].o_proj));
        SEL_TRY(sel_linear_pack(m->linears[l].gate_up, params + o->layers[l].gate_up));
        SEL_TRY(sel_linear_pack(m->linears[l].down_proj, params + o->layers[l].down_proj));
    }
    SEL_TRY(sel_linear_pack(m->lm_head, params + o->lm_head));
    size_t packed, kept, scratch;
    sel_model_memory(m, &packed, &kept, &scratch);
    sel_profile_lap(m->opt.profile, SEL_PART_PACK, 0.0, (double)packed + 4.0 * (double)o->parameters);
    return SEL_OK;
}

sel_status sel_model_take_tokens(sel_model *m, const int32_t *tokens, int64_t batch, int64_t n)
{
    const int64_t V = m->layout->dims.V;
    const sel_chunks *const c = &m->chunks;
    int64_t row = 0;
    SEL_ASSERT(batch <= m->opt.batch && n <= m->opt.tokens && (!m->opt.sequence || n == c->tokens));
    for (int k = 0; k < c->chunks; k++) {
        const int64_t each = m->opt.sequence ? c->each : n, first = sel_chunk_place(c, c->rank, k) * each;
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = first; i < first + each; i++, row++) {
                const int32_t in = tokens[b * (n + 1) + i], target = tokens[b * (n + 1) + i + 1];
                const bool padding = in < 0 && i > 0 && target < 0;
                if ((in < 0 && !padding) || in >= V || target >= V)
                    return sel_fail(SEL_EFILE, "token id %d lies outside the vocabulary of %lld",
                                    in < 0 || in >= V ? in : target, (long long)V);
                m->inputs[row] = padding ? 0 : in;
                m->targets[row] = target;
            }
    }
    return SEL_OK;
}

int64_t sel_model_cached(const sel_model *m) { return m->cached; }

void sel_model_restart(sel_model *m)
{
    const sel_dims *d = &m->layout->dims;
    m->cached = 0;
    for (int64_t l = 0; l < d->L; l++) memset(m->carry[l], 0, (size_t)(m->opt.batch * d->N) * sizeof(float));
}
