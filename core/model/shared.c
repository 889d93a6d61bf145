/* shared.c: attention over sequences whose tokens are dealt to several ranks (spec, section 4).
 *
 *     keys of all ranks -> column sums of S over own rows -> those before each chunk are its carry -> forward
 *     keys again -> backward with nothing after -> column sums of dF -> those after each chunk go to head 0 ->
 *     gradients of keys to their owners
 *
 * Rows of this rank lie chunk by chunk, [chunk][batch][each]: to all but attention they are rows like any others.  Keys
 * are not kept for backward: they are made again from what is, which every rank has of its own tokens alone.
 */
#include <math.h>
#include <string.h>
#include "core/model/plan.h"

static int place_of(const sel_model *m, int k) { return sel_chunk_place(&m->chunks, m->chunks.rank, k); }

sel_attention sel_shared_call(const sel_model *m, int64_t l, int64_t batch, int k, const void *keys)
{
    const sel_dims *d = &m->layout->dims;
    const sel_chunks *const c = &m->chunks;
    const int64_t each = c->each, row = k * batch * each, width = sel_model_keys_width(d), place = place_of(m, k);
    const int64_t kv = kv_width(d);
    sel_attention a = sel_model_attention(m, l, batch, each);

    a.i0 = place * each;
    a.i1 = a.i0 + each;
    a.q = sel_attention_at(&a, a.q, row * a.q_row);
    a.out = operand_at(m, a.out, row * a.out_row);
    a.lse += row * d->H;
    a.k = keys;
    a.v = keys ? sel_attention_at(&a, keys, kv) : NULL;
    a.k_seq = a.v_seq = c->tokens * width;
    a.k_row = a.v_row = width;
    if (d->bilinear) {
        a.sel_q = sel_attention_at(&a, a.sel_q, row * a.sel_q_row);
        a.sel_k = keys ? sel_attention_at(&a, keys, 2 * kv) : a.sel_q;   /* sizes only: all that counts is whether */
        a.sel_k_seq = a.k_seq;
        a.sel_k_row = width;
    }
    if (a.saved)
        for (int before = 0; before < k; before++)
            a.saved += batch * sel_attention_carries(each) * (place_of(m, before) + 1) * each;
    a.carry_seq = sel_sequence_row(m->opt.sequence);
    a.dead_margin = 0.0;   /* the gap is that of all ranks' rows: share_carries */
    return a;
}

/* [collective] This rank's normed k, v and sel_k to the others; the keys of all. */
static const void *share_keys(const sel_model *m, int64_t l, int64_t batch)
{
    const sel_dims *d = &m->layout->dims;
    const sel_chunks *const c = &m->chunks;
    const int64_t kv = kv_width(d), sel = sel_width(d), width = sel_model_keys_width(d), each = c->each;
    const sel_attention own = sel_model_attention(m, l, batch, each);
    const size_t bytes = operand_bytes(m);
    void *const keys = sel_sequence_begin(m->opt.sequence);

    for (int k = 0; k < c->chunks; k++) {
        const int64_t first = k * batch * each, place = place_of(m, k) * each;
#pragma omp parallel for num_threads(m->opt.threads) schedule(static)
        for (int64_t r = 0; r < batch * each; r++) {
            char *const to = operand_at(m, keys, (r / each * c->tokens + place + r % each) * width);
            memcpy(to, sel_attention_at(&own, own.k, (first + r) * own.k_row), (size_t)kv * bytes);
            memcpy(operand_at(m, to, kv), sel_attention_at(&own, own.v, (first + r) * own.v_row), (size_t)kv * bytes);
            if (sel == 0) continue;
            memcpy(operand_at(m, to, 2 * kv), sel_attention_at(&own, own.sel_k, (first + r) * own.sel_k_row),
                   (size_t)sel * bytes);
        }
    }
    sel_sequence_share(m->opt.sequence, batch);
    sel_profile_lap(m->opt.profile, SEL_PART_SHARE, 0.0,
                    2.0 * (double)bytes * (double)(c->chunks * batch * each * width));
    return keys;
}

/* [collective] Column sums of S over the rows of each chunk, and the gap of dead keys, from all to all. */
static void share_carries(const sel_model *m, int64_t l, int64_t batch, const void *keys)
{
    sel_sequence *const q = m->opt.sequence;
    float *const dead_after = m->kept[l].dead_after;

    for (int k = 0; k < m->chunks.chunks; k++) {
        sel_attention a = sel_shared_call(m, l, batch, k, keys);
        a.carry_out = sel_sequence_sums(q, k);
        m->opt.ops->attention_carry(&a);
        if (!a.dead_after) continue;
        m->opt.ops->attention_gap(&a, dead_after);
        for (int64_t b = 0; b < batch; b++) a.carry_out[b * a.carry_seq + m->chunks.tokens] = dead_after[b];
    }
    sel_profile_lap(m->opt.profile, SEL_PART_ATTENTION, 0.0, 0.0);
    sel_sequence_share_sums(q, batch);
    sel_profile_lap(m->opt.profile, SEL_PART_SHARE, 0.0, 0.0);
    for (int64_t b = 0; sel_model_leaves_out(m) && b < batch; b++)
        dead_after[b] = sel_model_dead_after(m, sel_sequence_extra(q, b), m->chunks.tokens);
}

void sel_shared_attention(sel_model *m, int64_t l, int64_t batch)
{
    const void *const keys = share_keys(m, l, batch);
    sel_finding *const found = m->found + l * batch;

    if (m->opt.attention.selective) share_carries(m, l, batch, keys);
    for (int64_t b = 0; b < batch; b++) found[b] = (sel_finding){ .m_max = -INFINITY, .m_row = INT64_MAX };
    for (int k = 0; k < m->chunks.chunks; k++) {
        sel_attention a = sel_shared_call(m, l, batch, k, keys);
        if (a.selective && a.i0 > 0) {
            sel_sequence_add(m->opt.sequence, batch, 0, place_of(m, k), a.i0, m->sums);
            a.carry_in = m->sums;
        }
        m->opt.ops->attention_forward(&a);
        for (int64_t b = 0; b < batch; b++) {
            if (a.dead_after) found[b].live += a.live[b];
            if (!a.selective || a.tau <= 0.0 || !(a.m_max[b] > found[b].m_max)) continue;
            found[b].m_max = a.m_max[b];   /* of equal ones the first: chunks ascend */
            found[b].m_row = a.m_row[b];
        }
    }
    sel_sequence_end(m->opt.sequence);
}

/* Of two maxima the larger one, among equals the first in position. */
static bool comes_first(const sel_finding *a, const sel_finding *b)
{
    return a->m_max > b->m_max || (a->m_max == b->m_max && a->m_row < b->m_row);
}

void sel_shared_findings(sel_model *m, int64_t batch, double *memory)
{
    const int64_t L = m->layout->dims.L, n = L * batch, N = m->chunks.tokens;
    const bool memory_loss = m->opt.attention.selective && m->opt.attention.epsilon > 0.0;

    for (int64_t l = 0; l < L; l++) m->live_share[l] = 1.0;
    if (!memory_loss && !sel_model_leaves_out(m)) return;
    sel_sequence_gather(m->opt.sequence, m->found, (size_t)n * sizeof *m->found, m->all_found);
    for (int64_t l = 0; l < L; l++) {
        double live = 0.0;
        for (int64_t b = 0; b < batch; b++) {
            const sel_finding *const here = m->all_found + l * batch + b;
            int best = 0;
            for (int r = 0; r < m->chunks.ranks; r++) {
                if (comes_first(here + r * n, here + best * n)) best = r;
                live += here[r * n].live;
            }
            if (!memory_loss) continue;
            m->kept[l].m_row[b] = here[best * n].m_row;
            if (best == m->chunks.rank) *memory += here[best * n].m_max;
        }
        if (sel_model_leaves_out(m)) m->live_share[l] = live / ((double)batch * (double)N * (double)(N + 1) / 2.0);
    }
    sel_profile_lap(m->opt.profile, SEL_PART_SHARE, 0.0, 0.0);
}

/* Where the gradients of a chunk go: its queries' to their rows, its keys' to the ranks. */
static sel_attention_grad gradients_of(const sel_model *m, int64_t batch, int k, double memory_scale)
{
    const sel_dims *d = &m->layout->dims;
    const int64_t each = m->chunks.each, row = k * batch * each, qkv_row = qkv_width(d), kv = kv_width(d);
    const int64_t width = sel_model_keys_width(d), seq = sel_sequence_gradients_seq(m->opt.sequence, k);
    float *const keys = sel_sequence_gradients(m->opt.sequence, k), *const queries = m->dqkv + row * qkv_row;

    return (sel_attention_grad){
        .dout = operand_at(m, m->datt, row * q_width(d)),
        .dq = queries, .dq_seq = each * qkv_row, .dq_row = qkv_row,
        .dk = keys, .dk_seq = seq, .dk_row = width,
        .dv = keys + kv, .dv_seq = seq, .dv_row = width,
        .dsel_q = queries + sel_column(d), .dsel_q_seq = each * qkv_row, .dsel_q_row = qkv_row,
        .dsel_k = keys + 2 * kv, .dsel_k_seq = seq, .dsel_k_row = width,
        .memory_coef = memory_coefficient(m, m->chunks.tokens, memory_scale),
    };
}

/* This rank's own keys' gradients, all of them, to their places beside the queries'. */
static void take_own(const sel_model *m, int64_t batch)
{
    const sel_dims *d = &m->layout->dims;
    const int64_t each = m->chunks.each, qkv_row = qkv_width(d), width = sel_model_keys_width(d);
    const int64_t kv = kv_width(d), sel = sel_width(d);

    for (int k = 0; k < m->chunks.chunks; k++) {
        const float *const own = sel_sequence_own_gradients(m->opt.sequence, k);
        const int64_t seq = sel_sequence_gradients_seq(m->opt.sequence, k);
        float *const rows = m->dqkv + k * batch * each * qkv_row;
#pragma omp parallel for num_threads(m->opt.threads) schedule(static)
        for (int64_t r = 0; r < batch * each; r++) {
            const float *const from = own + r / each * seq + r % each * width;
            memcpy(rows + r * qkv_row + q_width(d), from, (size_t)(2 * kv) * sizeof *from);
            memcpy(rows + r * qkv_row + sel_column(d) + sel, from + 2 * kv, (size_t)sel * sizeof *from);
        }
    }
}

void sel_shared_attention_backward(sel_model *m, int64_t l, int64_t batch, double memory_scale)
{
    sel_sequence *const q = m->opt.sequence;
    const int places = m->chunks.ranks * m->chunks.chunks;
    const void *const keys = share_keys(m, l, batch);

    for (int k = 0; k < m->chunks.chunks; k++) {
        const sel_attention a = sel_shared_call(m, l, batch, k, keys);
        sel_attention_grad g = gradients_of(m, batch, k, memory_scale);
        g.dcarry_out = a.selective ? sel_sequence_sums(q, k) : NULL;
        m->opt.ops->attention_backward(&a, &g);
    }
    if (m->opt.attention.selective) {
        sel_profile_lap(m->opt.profile, SEL_PART_ATTENTION_BACKWARD, 0.0, 0.0);
        sel_sequence_share_sums(q, batch);
        sel_profile_lap(m->opt.profile, SEL_PART_SHARE, 0.0, 0.0);
        for (int k = 0; k < m->chunks.chunks; k++) {
            const int place = place_of(m, k);
            const sel_attention a = sel_shared_call(m, l, batch, k, keys);
            sel_attention_grad g = gradients_of(m, batch, k, memory_scale);
            if (place + 1 == places) continue;
            sel_sequence_add(q, batch, place + 1, places, a.i1, m->sums);
            g.dcarry_in = m->sums;
            m->opt.ops->attention_carry_backward(&a, &g);
        }
    }
    sel_profile_lap(m->opt.profile, SEL_PART_ATTENTION_BACKWARD, 0.0, 0.0);
    sel_sequence_sum_gradients(q, batch);
    take_own(m, batch);
    sel_profile_lap(m->opt.profile, SEL_PART_SHARE, 0.0,
                    8.0 * (double)(m->chunks.chunks * batch * m->chunks.each * sel_model_keys_width(&m->layout->dims)));
}
