/* attention_gap_c.c: how far a logit may exceed what the softmax of its row is sure to contain (spec, section 3.1). */
#include <math.h>
#include <string.h>
#include "ops/attention.h"
#include "ops/levels.h"
#include "ops/vec.h"

static float dot(const float *x, const float *y, int64_t n)
{
    vf s = vset1(0.0f);
    for (int64_t d = 0; d < n; d += VL) s += vload_n(x + d, n - d) * vload_n(y + d, n - d);
    return vsum(s);
}

/* S of a token on itself, at most. */
static float own_selection(const sel_attention *a, int64_t b, int64_t i, float slack)
{
    const bool bilinear = a->selective && a->sel_q;
    const float *const q = bilinear ? a->sel_q + b * a->sel_q_seq + (i - a->i0) * a->sel_q_row
                                    : a->q + b * a->q_seq + (i - a->i0) * a->q_row;
    const float *const k = bilinear ? a->sel_k + b * a->sel_k_seq + i * a->sel_k_row
                                    : a->k + b * a->k_seq + i * a->k_row;
    const float most = sqrtf(dot(q, q, a->dh) * dot(k, k, a->dh));
    const float s = (dot(q, k, a->dh) + 2.0f * slack * most) / (float)sqrt((double)a->dh);
    return s > 0.0f ? s : 0.0f;
}

enum { FOUR = 4 };
typedef float four __attribute__((vector_size(4 * FOUR), aligned(4), may_alias));

/* The sums of four vectors' lanes. */
static inline four sums_of(const vf x[FOUR])
{
    float lane[FOUR][VL];
    four s[FOUR];
    for (int r = 0; r < FOUR; r++) {
        vstore(lane[r], x[r]);
        s[r] = *(const four *)lane[r];
        for (int i = FOUR; i < VL; i += FOUR) s[r] += *(const four *)(lane[r] + i);
    }
    const four a = __builtin_shufflevector(s[0], s[1], 0, 4, 1, 5) + __builtin_shufflevector(s[0], s[1], 2, 6, 3, 7);
    const four b = __builtin_shufflevector(s[2], s[3], 0, 4, 1, 5) + __builtin_shufflevector(s[2], s[3], 2, 6, 3, 7);
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
}

/* NaN if one is. */
static inline float larger(float a, float b) { return b > a || b != b ? b : a; }

enum { MOST_HEADS = 16 };   /* that one thread takes together, as they lie side by side */

/* Four rows from i on, of which the last may stand in for those after it. */
static inline void four_rows(const float *rows[FOUR], const float *x, int64_t stride, int64_t i, int64_t n)
{
    for (int r = 0; r < FOUR; r++) rows[r] = x + (i + r < n ? i + r : n - 1) * stride;
}

/* Asks for four rows, `width` floats of each, some way ahead of row i. */
static inline void fetch_ahead(const float *x, int64_t stride, int64_t i, int64_t n, int64_t width)
{
    enum { AHEAD = 12, LINE = 16 };
    for (int64_t r = i + AHEAD; r < i + AHEAD + FOUR && r < n; r++)
        for (int64_t d = 0; d < width; d += LINE) __builtin_prefetch(x + r * stride + d);
}

/* |k| of the longest of n keys of each of `heads` heads; NaN if one is. */
static void longest_keys(float *longest, const float *k, int64_t k_row, int64_t n, int64_t heads, int64_t dh)
{
    memset(longest, 0, (size_t)heads * sizeof *longest);
    for (int64_t j = 0; j < n; j += FOUR) {
        const float *key[FOUR];
        four_rows(key, k, k_row, j, n);
        fetch_ahead(k, k_row, j, n, heads * dh);
        for (int64_t h = 0; h < heads; h++) {
            vf x[FOUR];
            for (int r = 0; r < FOUR; r++) {
                vf sum = vset1(0.0f);
                for (int64_t d = 0; d < dh; d += VL) {
                    const vf y = vload_n(key[r] + h * dh + d, dh - d);
                    sum += y * y;
                }
                x[r] = sum;
            }
            const four square = sums_of(x);
            for (int r = 0; r < FOUR; r++)
                longest[h] = larger(longest[h], square[r]);
        }
    }
    for (int64_t h = 0; h < heads; h++) longest[h] = sqrtf(longest[h]);
}

/* The largest gap of heads [h0, h1) of sequence b: |q| max |k| / sqrt(dh) bounds every logit of a row; its own token's
   and BOS's are there with F = 0 (the own token's F is its own S where neither shift nor protect_self is on).  This
   must cost little beside attention that skips most of its keys: memory is read in order, sums are taken by fours. */
static float heads_gap(const sel_attention *a, int64_t b, int64_t h0, int64_t h1)
{
    const int64_t dh = a->dh, group = a->heads / a->kv_heads, kh0 = h0 / group, rows = a->i1 - a->i0;
    const float *const q = a->q + b * a->q_seq, *const k = a->k + b * a->k_seq + kh0 * dh;
    const float root = (float)sqrt((double)dh), slack = a->bfloat16 ? 0x1p-6f : 0x1p-18f;   /* of rounded operands */
    float gap = 0.0f, longest[MOST_HEADS];

    longest_keys(longest, k, a->k_row, a->i1, (h1 - 1) / group + 1 - kh0, dh);
    for (int64_t i = 0; i < rows; i += FOUR) {
        const float *query[FOUR], *key[FOUR];
        four_rows(query, q, a->q_row, i, rows);
        fetch_ahead(q + h0 * dh, a->q_row, i, rows, (h1 - h0) * dh);
        four_rows(key, k + a->i0 * a->k_row, a->k_row, i, rows);
        for (int64_t h = h0; h < h1; h++) {
            const int64_t kh = h / group - kh0;
            vf square[FOUR], own[FOUR], bos[FOUR];
            for (int r = 0; r < FOUR; r++) {
                vf on_q = vset1(0.0f), on_k = on_q, on_0 = on_q;
                for (int64_t d = 0; d < dh; d += VL) {
                    const vf x = vload_n(query[r] + h * dh + d, dh - d);
                    on_q += x * x;
                    on_k += x * vload_n(key[r] + kh * dh + d, dh - d);
                    on_0 += x * vload_n(k + kh * dh + d, dh - d);
                }
                square[r] = on_q;
                own[r] = on_k;
                bos[r] = on_0;
            }
            const float most = longest[kh] * (1.0f + 2.0f * slack) / root;
            const four squares = sums_of(square), on_self = sums_of(own) / root, on_bos = sums_of(bos) / root;
            for (int r = 0; r < FOUR; r++) {
                float sure = on_self[r];
                if (!a->shift && !a->protect_self)
                    sure -= own_selection(a, b, a->i0 + (i + r < rows ? i + r : rows - 1), slack);
                if (a->protect_bos && on_bos[r] > sure) sure = on_bos[r];
                const float here = sqrtf(squares[r]) * most - sure;
                gap = larger(gap, here);
            }
        }
    }
    return gap;
}

static void attention_gap(const sel_attention *a, float *gap)
{
    const int64_t share = (a->heads * a->B + a->threads - 1) / a->threads;
    const int64_t each = share < MOST_HEADS ? share < a->heads ? share : a->heads : MOST_HEADS,
                  parts = (a->heads + each - 1) / each;
    memset(gap, 0, (size_t)a->B * sizeof *gap);
    #pragma omp parallel for num_threads(a->threads) schedule(static)
    for (int64_t s = 0; s < a->B * parts; s++) {
        const int64_t b = s / parts, h0 = s % parts * each, h1 = h0 + each < a->heads ? h0 + each : a->heads;
        const float here = heads_gap(a, b, h0, h1);
        #pragma omp critical(attention_gap)
        gap[b] = larger(gap[b], here);   /* the largest: the same in any order */
    }
}

void SEL_FN(sel_attention_find_dead)(const sel_attention *a, int64_t b, int threads)
{
    sel_attention one = *a;
    float gap;

    if (!a->dead_after || a->dead_margin <= 0.0) return;
    one.B = 1;
    one.threads = threads;
    one.q += b * a->q_seq;
    one.k += b * a->k_seq;
    if (a->sel_q) {
        one.sel_q += b * a->sel_q_seq;
        one.sel_k += b * a->sel_k_seq;
    }
    attention_gap(&one, &gap);
    gap += (float)a->dead_margin;
    a->dead_after[b] = gap < (float)a->tau ? (float)a->tau : gap;   /* NaN stays: nothing dies */
}

void SEL_FN(sel_ops_attention_gap_init)(sel_ops *ops) { ops->attention_gap = attention_gap; }
