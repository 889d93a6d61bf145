/* attention_gap_c.c: how far a logit may exceed what the softmax of its row is sure to contain (spec, section 3.1). */
#include <math.h>
#include <string.h>
#include "ops/attention.h"
#include "ops/levels.h"
#include "ops/vec.h"

/* A kernel sums the same products, which are no less exact of bfloat16 operands, in another order: of a logit this much
   of |q| |k| / sqrt(dh) may differ. */
#define SLACK 0x1p-18f

/* x . y of arrays of the call's operands. */
static float dot(const sel_attention *a, const void *x, const void *y)
{
    vf s = vset1(0.0f);
    for (int64_t d = 0; d < a->dh; d += VL)
        s += vload_as(a->bfloat16, x, d, a->dh - d) * vload_as(a->bfloat16, y, d, a->dh - d);
    return vsum(s);
}

/* S of a token on itself, at most. */
static float own_selection(const sel_attention *a, int64_t b, int64_t i)
{
    const bool bilinear = a->selective && a->sel_q;
    const int64_t row = i - a->i0;
    const void *const q = bilinear ? sel_attention_at(a, a->sel_q, b * a->sel_q_seq + row * a->sel_q_row)
                                   : sel_attention_at(a, a->q, b * a->q_seq + row * a->q_row);
    const void *const k = bilinear ? sel_attention_at(a, a->sel_k, b * a->sel_k_seq + i * a->sel_k_row)
                                   : sel_attention_at(a, a->k, b * a->k_seq + i * a->k_row);
    const float most = sqrtf(dot(a, q, q) * dot(a, k, k));
    const float s = (dot(a, q, k) + 2.0f * SLACK * most) / (float)sqrt((double)a->dh);
    return s > 0.0f ? s : 0.0f;
}

#define INLINE static inline __attribute__((always_inline))

enum { FOUR = 4 };
typedef float four __attribute__((vector_size(4 * FOUR), aligned(4), may_alias));
typedef int32_t four_masks __attribute__((vector_size(4 * FOUR)));

/* Of each group of four lanes those that i, j, k and l number: below VL of a, from VL on of b. */
#if VL == 16
#define BY_FOURS(a, b, i, j, k, l)                                                                                   \
    __builtin_shufflevector(a, b, i, j, k, l, (i) + 4, (j) + 4, (k) + 4, (l) + 4, (i) + 8, (j) + 8, (k) + 8, (l) + 8, \
                            (i) + 12, (j) + 12, (k) + 12, (l) + 12)
#elif VL == 8
#define BY_FOURS(a, b, i, j, k, l) \
    __builtin_shufflevector(a, b, i, j, k, l, (i) + 4, (j) + 4, (k) + 4, (l) + 4)
#else
#define BY_FOURS(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif

/* The sums of four vectors' lanes. */
static inline four sums_of(const vf x[FOUR])
{
    const vf a = BY_FOURS(x[0], x[1], 0, VL, 1, VL + 1) + BY_FOURS(x[0], x[1], 2, VL + 2, 3, VL + 3);
    const vf b = BY_FOURS(x[2], x[3], 0, VL, 1, VL + 1) + BY_FOURS(x[2], x[3], 2, VL + 2, 3, VL + 3);
    const vf c = BY_FOURS(a, b, 0, 1, VL, VL + 1) + BY_FOURS(a, b, 2, 3, VL + 2, VL + 3);
#if VL == 16
    const vf d = c + __builtin_shufflevector(c, c, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    return __builtin_shufflevector(d, d, 0, 1, 2, 3) + __builtin_shufflevector(d, d, 4, 5, 6, 7);
#elif VL == 8
    return __builtin_shufflevector(c, c, 0, 1, 2, 3) + __builtin_shufflevector(c, c, 4, 5, 6, 7);
#else
    return c;
#endif
}

/* NaN if one is. */
static inline float larger(float a, float b) { return b > a || b != b ? b : a; }
static inline four larger_four(four a, four b)
{
    const four_masks take = (b > a) | (b != b);
    return (four)(((four_masks)b & take) | ((four_masks)a & ~take));
}
static inline float largest_of(four x) { return larger(larger(x[0], x[1]), larger(x[2], x[3])); }

static inline four root_of(four x)
{
    return (four){ sqrtf(x[0]), sqrtf(x[1]), sqrtf(x[2]), sqrtf(x[3]) };
}

enum { MOST_HEADS = 16 };   /* that one thread takes together, as they lie side by side */

/* How the rows lie, constant where it is inlined. */
typedef struct {
    bool whole;        /* their width is a multiple of VL */
    bool bfloat16;
} row_kind;

INLINE const char *element(const row_kind kind, const char *x, int64_t i)
{
    return x + i * (kind.bfloat16 ? (int64_t)sizeof(uint16_t) : (int64_t)sizeof(float));
}

/* Of the values of a row from d on: VL, or of 2 VL of bfloat16 the even or the odd ones, which take less to widen. */
typedef enum { ALL, EVEN, ODD } values_part;

INLINE vf values_of(const row_kind kind, const values_part part, const char *x, int64_t d, int64_t n)
{
    typedef uint32_t vu_u __attribute__((vector_size(4 * VL), aligned(2), may_alias));
    if (part == ALL) return vload_as(kind.bfloat16, x, d, kind.whole ? VL : n - d);
    const vu pairs = *(const vu_u *)element(kind, x, d);
    return part == EVEN ? (vf)(pairs << 16) : (vf)(pairs & 0xffff0000u);
}

/* Four rows from i on, of which the last may stand in for those after it. */
INLINE void four_rows(const row_kind kind, const char *rows[FOUR], const char *x, int64_t stride, int64_t i, int64_t n)
{
    for (int r = 0; r < FOUR; r++) rows[r] = element(kind, x, (i + r < n ? i + r : n - 1) * stride);
}

/* Asks for four rows, `width` values of each, some way ahead of row i. */
INLINE void fetch_ahead(const row_kind kind, const char *x, int64_t stride, int64_t i, int64_t n, int64_t width)
{
    enum { AHEAD = 12, LINE = 64 };
    for (int64_t r = i + AHEAD; r < i + AHEAD + FOUR && r < n; r++) {
        const char *const row = element(kind, x, r * stride), *const end = element(kind, row, width);
        for (const char *line = row; line < end; line += LINE) __builtin_prefetch(line);
    }
}

INLINE void add_squares(const row_kind kind, const values_part part, vf sum[FOUR], const char *const x[FOUR],
                        int64_t d, int64_t n)
{
    #pragma GCC unroll 4
    for (int r = 0; r < FOUR; r++) {
        const vf y = values_of(kind, part, x[r], d, n);
        sum[r] += y * y;
    }
}

/* |x|^2 of four rows. */
INLINE four squares_of(const row_kind kind, const char *const x[FOUR], int64_t n)
{
    vf sum[FOUR] = { { 0 } };
    int64_t d = 0;
    for (; kind.bfloat16 && d + 2 * VL <= n; d += 2 * VL) {
        add_squares(kind, EVEN, sum, x, d, n);
        add_squares(kind, ODD, sum, x, d, n);
    }
    for (; d < n; d += VL) add_squares(kind, ALL, sum, x, d, n);
    return sums_of(sum);
}

/* What four queries have to do with their own keys and with BOS's: of each query lanes of sums, then these. */
typedef struct {
    vf square[FOUR], own[FOUR], bos[FOUR];
} query_lanes;
typedef struct {
    four square, own, bos;
} four_queries;

INLINE void add_queries(const row_kind kind, const values_part part, query_lanes *sum, const char *const query[FOUR],
                        const char *const key[FOUR], const char *first, int64_t d, int64_t n)
{
    const vf z = values_of(kind, part, first, d, n);
    #pragma GCC unroll 4
    for (int r = 0; r < FOUR; r++) {
        const vf x = values_of(kind, part, query[r], d, n);
        sum->square[r] += x * x;
        sum->own[r] += x * values_of(kind, part, key[r], d, n);
        sum->bos[r] += x * z;
    }
}

INLINE four_queries meet(const row_kind kind, const char *const query[FOUR], const char *const key[FOUR],
                         const char *first, int64_t n)
{
    query_lanes sum = { 0 };
    int64_t d = 0;
    for (; kind.bfloat16 && d + 2 * VL <= n; d += 2 * VL) {
        add_queries(kind, EVEN, &sum, query, key, first, d, n);
        add_queries(kind, ODD, &sum, query, key, first, d, n);
    }
    for (; d < n; d += VL) add_queries(kind, ALL, &sum, query, key, first, d, n);
    return (four_queries){ .square = sums_of(sum.square), .own = sums_of(sum.own), .bos = sums_of(sum.bos) };
}

/* |k| of the longest of n keys of each of `heads` heads; NaN if one is. */
INLINE void longest_keys(const row_kind kind, float *longest, const char *k, int64_t k_row, int64_t n, int64_t heads,
                         int64_t dh)
{
    four squares[MOST_HEADS];

    memset(squares, 0, (size_t)heads * sizeof *squares);
    for (int64_t j = 0; j < n; j += FOUR) {
        const char *key[FOUR];
        four_rows(kind, key, k, k_row, j, n);
        fetch_ahead(kind, k, k_row, j, n, heads * dh);
        for (int64_t h = 0; h < heads; h++) {
            squares[h] = larger_four(squares[h], squares_of(kind, key, dh));
            for (int r = 0; r < FOUR; r++) key[r] = element(kind, key[r], dh);
        }
    }
    for (int64_t h = 0; h < heads; h++) longest[h] = sqrtf(largest_of(squares[h]));
}

/* The largest gap of heads [h0, h1) of sequence b: |q| max |k| / sqrt(dh) bounds every logit of a row; its own token's
   and BOS's are there with F = 0 (the own token's F is its own S where neither shift nor protect_self is on).  This
   must cost little beside attention that skips most of its keys: memory is read in order, sums are taken by fours. */
INLINE float heads_gap(const row_kind kind, const sel_attention *a, int64_t b, int64_t h0, int64_t h1)
{
    const int64_t dh = a->dh, group = a->heads / a->kv_heads, kh0 = h0 / group, rows = a->i1 - a->i0;
    const char *const q = sel_attention_at(a, a->q, b * a->q_seq + h0 * dh);
    const char *const k = sel_attention_at(a, a->k, b * a->k_seq + kh0 * dh);
    const float root = (float)sqrt((double)dh);
    float longest[MOST_HEADS];
    four gap = { 0 };

    longest_keys(kind, longest, k, a->k_row, a->i1, (h1 - 1) / group + 1 - kh0, dh);
    for (int64_t i = 0; i < rows; i += FOUR) {
        const char *query[FOUR], *own[FOUR];
        four_rows(kind, query, q, a->q_row, i, rows);
        fetch_ahead(kind, q, a->q_row, i, rows, (h1 - h0) * dh);
        four_rows(kind, own, element(kind, k, a->i0 * a->k_row), a->k_row, i, rows);
        for (int64_t h = h0; h < h1; h++) {
            const int64_t at = (h / group - kh0) * dh;
            const char *const key[FOUR] = { element(kind, own[0], at), element(kind, own[1], at),
                                            element(kind, own[2], at), element(kind, own[3], at) };
            const four_queries x = meet(kind, query, key, element(kind, k, at), dh);
            const float most = longest[h / group - kh0] * (1.0f + 2.0f * SLACK) / root;
            const four on_bos = x.bos / root;
            four sure = x.own / root;

            for (int r = 0; r < FOUR && !a->shift && !a->protect_self; r++)
                sure[r] -= own_selection(a, b, a->i0 + (i + r < rows ? i + r : rows - 1));
            const four_masks take = on_bos > sure;
            if (a->protect_bos) sure = (four)(((four_masks)on_bos & take) | ((four_masks)sure & ~take));
            gap = larger_four(gap, root_of(x.square) * most - sure);
            for (int r = 0; r < FOUR; r++) query[r] = element(kind, query[r], dh);
        }
    }
    return largest_of(gap);
}

/* The same, compiled for each kind of rows. */
static float gap_of(const sel_attention *a, int64_t b, int64_t h0, int64_t h1)
{
    const bool whole = a->dh % VL == 0;
    if (a->bfloat16)
        return whole ? heads_gap((row_kind){ true, true }, a, b, h0, h1)
                     : heads_gap((row_kind){ false, true }, a, b, h0, h1);
    return whole ? heads_gap((row_kind){ true, false }, a, b, h0, h1)
                 : heads_gap((row_kind){ false, false }, a, b, h0, h1);
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
        const float here = gap_of(a, b, h0, h1);
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
    one.q = sel_attention_at(a, a->q, b * a->q_seq);
    one.k = sel_attention_at(a, a->k, b * a->k_seq);
    if (a->sel_q) {
        one.sel_q = sel_attention_at(a, a->sel_q, b * a->sel_q_seq);
        one.sel_k = sel_attention_at(a, a->sel_k, b * a->sel_k_seq);
    }
    attention_gap(&one, &gap);
    gap += (float)a->dead_margin;
    a->dead_after[b] = gap < (float)a->tau ? (float)a->tau : gap;   /* NaN stays: nothing dies */
}

void SEL_FN(sel_ops_attention_gap_init)(sel_ops *ops) { ops->attention_gap = attention_gap; }
