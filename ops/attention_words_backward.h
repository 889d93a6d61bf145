/* attention_words_backward.h: the backward pass for AVX-512 (attention_words.h); included once a kernel file.
 *
 * As in the portable kernel column tiles are outside and row tiles descend inside.  Here two column tiles and two
 * row tiles go together, all heads over the four tiles one after another, so that each operand fetched is used twice.
 */
#ifndef SEL_OPS_ATTENTION_WORDS_BACKWARD_H
#define SEL_OPS_ATTENTION_WORDS_BACKWARD_H

#include <omp.h>
#include "ops/attention_words.h"

#define NO_ROW 1e30f    /* log-sum-exp of lanes that are no rows: P = 0 */

typedef struct {
    const sel_attention *a;
    const sel_attention_grad *g;
    const words_plan *p;
    int64_t b;
    float *scratch, *pack;    /* this thread's scratch, this sequence's packed operands */
} backward_job;

/* Where a tile's operands lie: words and their strides. */
typedef struct {
    const word *k, *v, *k_pairs;      /* keys, values by row; keys by pairs of rows (float32: by row) */
    int64_t k_row, v_row, pair_row;
} key_operands;

static key_operands backward_keys(const backward_job *w, int64_t kh, int64_t col0)
{
    const sel_attention *a = w->a;
    const int64_t n = a->kv_heads * a->dh;
    key_operands o;
#if WORD_BF16
    o.k_row = o.v_row = n / 2;
    o.pair_row = n;
    o.k = (const word *)(w->pack + w->p->k) + col0 * n / 2 + kh * a->dh / 2;
    o.v = (const word *)(w->pack + w->p->v) + col0 * n / 2 + kh * a->dh / 2;
    o.k_pairs = (const word *)(w->pack + w->p->k_pairs) + col0 / 2 * n + kh * a->dh;
#else
    const bool last = col0 + TILE > a->i1;   /* the copy that is padded with zeros */
    o.k_row = last ? n : a->k_row;
    o.v_row = last ? n : a->v_row;
    o.k = (const word *)(last ? w->pack + w->p->k : a->k + w->b * a->k_seq + col0 * a->k_row) + kh * a->dh;
    o.v = (const word *)(last ? w->pack + w->p->v : a->v + w->b * a->v_seq + col0 * a->v_row) + kh * a->dh;
    o.k_pairs = o.k;
    o.pair_row = o.k_row;
#endif
    return o;
}

/* The same for the keys that S is made of: head 0's, or sel_k (without values). */
static key_operands selecting_keys(const backward_job *w, int64_t col0)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    key_operands o = { 0 };
    if (!attention_bilinear(a)) return backward_keys(w, 0, col0);
#if WORD_BF16
    o.k_row = a->dh / 2;
    o.pair_row = a->dh;
    o.k = (const word *)(w->pack + p->sel_k) + col0 * a->dh / 2;
    o.k_pairs = (const word *)(w->pack + p->sel_k_pairs) + col0 / 2 * a->dh;
#else
    const bool last = col0 + TILE > a->i1;
    o.k_row = o.pair_row = last ? a->dh : a->sel_k_row;
    o.k = o.k_pairs =
        (const word *)(last ? w->pack + p->sel_k : a->sel_k + w->b * a->sel_k_seq + col0 * a->sel_k_row);
#endif
    return o;
}

/* Rows of q or dout by pairs of rows (float32: by row), dh values in the lanes. */
INLINE const word *row_pairs(const backward_job *w, const float *rows, int64_t row_stride, int64_t packed, int64_t I,
                             int64_t h, int64_t *stride)
{
    const sel_attention *a = w->a;
#if WORD_BF16
    (void)rows, (void)row_stride;
    *stride = a->dh;
    return (const word *)(w->pack + packed) + (I * a->heads + h) * TILE_WORDS * a->dh;
#else
    (void)packed;
    *stride = row_stride;
    return (const word *)(rows + I * TILE * row_stride + h * a->dh);
#endif
}

/* `rows` rows of n values into words, zeros up to TILE: by row at W, for bfloat16 by pairs of rows at `pairs`; NULL: not
   wanted. */
static void pack_tile(word *W, word *pairs, const float *x, int64_t x_row, int rows, int64_t n)
{
    for (int j = 0; W && j < TILE; j++) {
        if (j < rows) row_words(W + j * n / PAIR, x + j * x_row, n);
        else memset(W + j * n / PAIR, 0, (size_t)(n / PAIR) * sizeof *W);
    }
#if WORD_BF16
    for (int j = 0; pairs && j < TILE; j += 2) {
        if (j < rows) pair_rows(pairs + j / 2 * n, x + j * x_row, j + 1 < rows ? x + (j + 1) * x_row : NULL, n);
        else memset(pairs + j / 2 * n, 0, (size_t)n * sizeof *pairs);
    }
#else
    (void)pairs;
#endif
}

static void pack_columns(const backward_job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t n = a->kv_heads * a->dh, j0 = J * TILE, from = WORD_BF16 ? j0 / 2 : 0;
    const int cols = (int)(a->i1 - j0 < TILE ? a->i1 - j0 : TILE);
    word *const pack = (word *)w->pack;

    if (!WORD_BF16 && cols == TILE) return;
    pack_tile(pack + p->k + from * n, pack + p->k_pairs + from * n, a->k + w->b * a->k_seq + j0 * a->k_row, a->k_row,
              cols, n);
    pack_tile(pack + p->v + from * n, NULL, a->v + w->b * a->v_seq + j0 * a->v_row, a->v_row, cols, n);
    if (attention_bilinear(a))
        pack_tile(pack + p->sel_k + from * a->dh, pack + p->sel_k_pairs + from * a->dh,
                  a->sel_k + w->b * a->sel_k_seq + j0 * a->sel_k_row, a->sel_k_row, cols, a->dh);
}

/* Row tile I: Q^T (scaled) and dO^T of all heads, lse (log2), delta = rowsum(dO o out). */
static void pack_rows(const backward_job *w, int64_t I)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t H = a->heads, dh = a->dh, row = I * TILE;
    const int rows = (int)(p->rows - row < TILE ? p->rows - row : TILE);

    for (int64_t h = 0; h < H; h++) {
        const int64_t slot = I * H + h;
        const float *const q = a->q + w->b * a->q_seq + row * a->q_row + h * dh;
        const float *const dout = w->g->dout + w->b * a->out_seq + row * a->out_row + h * dh;
        const float *const out = a->out + w->b * a->out_seq + row * a->out_row + h * dh;
        float *const lse = w->pack + p->lse_all + slot * TILE, *const delta = w->pack + p->delta_all + slot * TILE;

        transpose_words((word *)(w->pack + p->qt_all) + slot * dh / PAIR * TILE, q, a->q_row, rows, dh);
        transpose_words((word *)(w->pack + p->dot_all) + slot * dh / PAIR * TILE, dout, a->out_row, rows, dh);
        for (int i = 0; i < TILE; i++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; i < rows && d < dh; d += V16)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(dout + i * a->out_row + d),
                                      _mm512_loadu_ps(out + i * a->out_row + d), sum);
            delta[i] = _mm512_reduce_add_ps(sum);
            lse[i] = i < rows ? (float)(LOG2E * (double)a->lse[(w->b * H + h) * p->rows + row + i]) : NO_ROW;
        }
        pack_tile(NULL, (word *)(w->pack + p->q_rows) + slot * TILE_WORDS * dh, q, a->q_row, rows, dh);
        pack_tile(NULL, (word *)(w->pack + p->dout_rows) + slot * TILE_WORDS * dh, dout, a->out_row, rows, dh);
    }
    if (!attention_bilinear(a)) return;
    const float *const own = a->sel_q + w->b * a->sel_q_seq + row * a->sel_q_row;
    transpose_words((word *)(w->pack + p->sel_qt_all) + I * dh / PAIR * TILE, own, a->sel_q_row, rows, dh);
    pack_tile(NULL, (word *)(w->pack + p->sel_q_rows) + I * TILE_WORDS * dh, own, a->sel_q_row, rows, dh);
}

/* One tile of the (query, key) plane. */
typedef struct {
    int64_t I, col0, off;     /* query lane i sees keys j <= i + off */
    int rows, cols, lanes;
} tile;

static bool make_tile(const backward_job *w, int64_t I, int64_t J, tile *t)
{
    const sel_attention *a = w->a;
    const int64_t row0 = a->i0 + I * TILE;
    t->I = I;
    t->col0 = J * TILE;
    t->off = row0 - t->col0;
    t->rows = (int)(a->i1 - row0 < TILE ? a->i1 - row0 : TILE);
    t->cols = (int)(a->i1 - t->col0 < TILE ? a->i1 - t->col0 : TILE);
    t->lanes = t->rows > 32 ? 64 : 32;
    return J < w->p->columns && t->off + t->rows > 0;
}

/* Words of two rows of 32 queries in both forms: `by_query` (pairs along the queries, row after row TILE_WORDS apart)
   and by_key (store_pair).  float32 has one form. */
INLINE void store_both(word *by_query, word *by_key, const __m512 x[2], const __m512 y[2])
{
#if WORD_BF16
    const __m512i a = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]), b = (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]);
    _mm512_storeu_si512(by_query, a);
    _mm512_storeu_si512(by_query + TILE_WORDS, b);
    if (!by_key) return;
    _mm512_storeu_si512(by_key, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(by_key + V16, _mm512_unpackhi_epi16(a, b));
#else
    (void)by_key;
    for (int v = 0; v < 2; v++) {
        _mm512_storeu_ps((float *)by_query + v * V16, x[v]);
        _mm512_storeu_ps((float *)by_query + TILE_WORDS + v * V16, y[v]);
    }
#endif
}

/* P and dZ of one tile of one head.  L0: head 0's logits where they are known; Z0: where head 0's dZ goes, as floats,
   to be changed before it becomes words (both NULL for the other heads).  G += dZ where not NULL. */
static void tile_gradients(const backward_job *w, const tile *t, int64_t h, const key_operands *o, const float *L0,
                           const float *NF, float *G, float *Z0)
{
    const words_plan *p = w->p;
    const int64_t kw = w->a->dh / PAIR, slot = t->I * w->a->heads + h;
    const word *const Qt = (const word *)(w->pack + p->qt_all) + slot * kw * TILE;
    const word *const dOt = (const word *)(w->pack + p->dot_all) + slot * kw * TILE;
    const float *const lse = w->pack + p->lse_all + slot * TILE, *const delta = w->pack + p->delta_all + slot * TILE;
    word *const P = (word *)(w->scratch + p->pi), *const Zi = (word *)(w->scratch + p->zi);
    word *const Zk = (word *)(w->scratch + p->zk);
    const __m512 c = _mm512_set1_ps((float)(LOG2E / sqrt((double)w->a->dh)));

    for (int v0 = 0; v0 < t->lanes; v0 += 32) {
        const int blocks = seen_blocks(v0, t->off);
        for (int jb = 0; jb < blocks; jb++) {
            const int j0 = jb * 8;
            const __m512 lse0[2] = { _mm512_loadu_ps(lse + v0), _mm512_loadu_ps(lse + v0 + V16) };
            __m512 x[8][2], y[8][2];

            #pragma GCC unroll 8
            for (int r = 0; r < 8; r++)
                for (int v = 0; v < 2; v++)
                    x[r][v] = NF ? _mm512_loadu_ps(NF + (j0 + r) * TILE + v0 + v * V16) : _mm512_setzero_ps();
            if (L0) {
                for (int r = 0; r < 8; r++)
                    for (int v = 0; v < 2; v++)
                        x[r][v] = _mm512_add_ps(x[r][v], _mm512_loadu_ps(L0 + (j0 + r) * TILE + v0 + v * V16));
            } else {
                block_sum(8, 2, kw, o->k + j0 * o->k_row, o->k_row, 1, Qt + v0, TILE, x);
            }
            if (v0 + t->off < j0 + 7) hide(x, v0, j0, t->off);
            #pragma GCC unroll 8
            for (int r = 0; r < 8; r++)
                for (int v = 0; v < 2; v++) x[r][v] = _mm512_fmsub_ps(x[r][v], c, lse0[v]);
            #pragma GCC unroll 8
            for (int r = 0; r < 8; r++)
                for (int v = 0; v < 2; v++) x[r][v] = exp2_ps(x[r][v]);
            #pragma GCC unroll 4
            for (int r = 0; r < 8; r += 2) store_both(P + (j0 + r) * TILE_WORDS + v0 / PAIR, NULL, x[r], x[r + 1]);

            #pragma GCC unroll 8
            for (int r = 0; r < 8; r++)
                for (int v = 0; v < 2; v++)
                    y[r][v] = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_loadu_ps(delta + v0 + v * V16));
            block_sum(8, 2, kw, o->v + j0 * o->v_row, o->v_row, 1, dOt + v0, TILE, y);
            #pragma GCC unroll 8
            for (int r = 0; r < 8; r++)
                for (int v = 0; v < 2; v++) {
                    const int at = (j0 + r) * TILE + v0 + v * V16;
                    y[r][v] = _mm512_mul_ps(y[r][v], x[r][v]);
                    if (G) _mm512_storeu_ps(G + at, _mm512_add_ps(_mm512_loadu_ps(G + at), y[r][v]));
                    if (Z0) _mm512_storeu_ps(Z0 + at, y[r][v]);
                }
            #pragma GCC unroll 4
            for (int r = 0; r < 8 && !Z0; r += 2)
                store_both(Zi + (j0 + r) * TILE_WORDS + v0 / PAIR, Zk + (j0 + r) / PAIR * TILE + v0, y[r], y[r + 1]);
        }
    }
}

/* Head 0's dZ (floats [j][TILE]) plus what comes through F: dF = -G, summed over later rows, passes where S took the
   logit.  Leaves it as words; dcarry [cols] moves on. */
static void selection_words(const backward_job *w, const tile *t, const float *L0, const float *G, float *Z0,
                            float *dcarry)
{
    const sel_attention *a = w->a;
    const __m512 zero = _mm512_setzero_ps();
    word *const Zi = (word *)(w->scratch + w->p->zi), *const Zk = (word *)(w->scratch + w->p->zk);

    for (int j = 0; j < t->cols; j++) {
        float base = dcarry[j];
        for (int v = t->lanes - V16; v >= 0; v -= V16) {
            const int at = j * TILE + v;
            const __m512 sum = scan_down(_mm512_sub_ps(zero, _mm512_loadu_ps(G + at)));
            const __m512 after =
                _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_setzero_si512(), _mm512_castps_si512(sum), 1));
            const __m512 ds = _mm512_add_ps(a->shift ? after : sum, _mm512_set1_ps(base));
            __mmask16 passes = selects(a, v, j, t->col0, t->off, t->rows);
            if (a->relu) passes &= _mm512_cmp_ps_mask(_mm512_loadu_ps(L0 + at), zero, _CMP_GT_OQ);
            const __m512 z = _mm512_loadu_ps(Z0 + at);
            _mm512_storeu_ps(Z0 + at, _mm512_mask_add_ps(z, passes, z, ds));
            base += _mm512_cvtss_f32(sum);
        }
        dcarry[j] = base;
    }
    for (int v0 = 0; v0 < t->lanes; v0 += 32)
        for (int j = 0; j < seen_blocks(v0, t->off) * 8; j += 2) {
            const __m512 x[2] = { _mm512_loadu_ps(Z0 + j * TILE + v0), _mm512_loadu_ps(Z0 + j * TILE + v0 + V16) };
            const __m512 y[2] = {_mm512_loadu_ps(Z0 + (j + 1) * TILE + v0),
                                 _mm512_loadu_ps(Z0 + (j + 1) * TILE + v0 + V16)};
            store_both(Zi + j * TILE_WORDS + v0 / PAIR, Zk + j / PAIR * TILE + v0, x, y);
        }
}

/* C [TILE keys][dh] += sum over queries of A[j,i] rows[i]: dV from P and dO, dK from dZ and Q. */
static void sum_over_queries(const tile *t, int64_t dh, const word *A, const word *rows, int64_t stride, float *C)
{
    const int64_t most = (t->rows + PAIR - 1) / PAIR;
    for (int64_t d = 0; d < dh; d += 32)
        for (int j0 = 0; j0 < t->cols; j0 += 8) {
            const int64_t first = j0 > t->off ? (j0 - t->off) / PAIR : 0;   /* earlier queries do not see these keys */
            if (first >= most) break;
            const word *const from = A + j0 * TILE_WORDS + first;
            if (d + 32 <= dh)
                product_block(8, 2, most - first, from, TILE_WORDS, 1, rows + first * stride + d, stride,
                              C + j0 * dh + d, dh, false);
            else
                product_block(8, 1, most - first, from, TILE_WORDS, 1, rows + first * stride + d, stride,
                              C + j0 * dh + d, dh, false);
        }
}

/* The gradient of logits, as words, to the queries' and the keys' that they are made of: C = dK [TILE][dh], dQ
   [dh][TILE]. */
static void logit_products(const backward_job *w, const tile *t, const key_operands *o, const word *rows,
                           int64_t stride, float *dK, float *dQ)
{
    const int64_t dh = w->a->dh;
    const word *const Z = (const word *)(w->scratch + w->p->zi);
    sum_over_queries(t, dh, Z, rows, stride, dK);
    const word *const Zk = WORD_BF16 ? (const word *)(w->scratch + w->p->zk) : Z;
    for (int v0 = 0; v0 < t->lanes; v0 += 32)
        product_32(dh, seen_blocks(v0, t->off) * 8 / PAIR, o->k_pairs, 1, o->pair_row, Zk + v0, TILE, dQ + v0, TILE,
                   false);
}

/* The three products of a tile and head, P and dZ being words. */
static void tile_products(const backward_job *w, const tile *t, int64_t h, const key_operands *o, float *dK, float *dV)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t dh = a->dh;
    float *const dQ = w->scratch + p->dq + (t->I * a->heads + h) * dh * TILE;
    int64_t stride;

    const word *rows = row_pairs(w, w->g->dout + w->b * a->out_seq, a->out_row, p->dout_rows, t->I, h, &stride);
    sum_over_queries(t, dh, (const word *)(w->scratch + p->pi), rows, stride, dV);
    rows = row_pairs(w, a->q + w->b * a->q_seq, a->q_row, p->q_rows, t->I, h, &stride);
    logit_products(w, t, o, rows, stride, dK, dQ);
}

/* The memory loss's own part of dF in the arg-max row (G = -dF; NF = -F, raw). */
static void add_memory(const backward_job *w, const tile *t, const float *NF, float *G)
{
    const int64_t i = w->a->m_row[w->b] - (w->a->i0 + t->I * TILE);
    if (i < 0 || i >= t->rows) return;
    for (int j = 0; j < t->cols && j <= i + t->off; j++)
        if (-(double)NF[j * TILE + i] < w->a->tau * sqrt((double)w->a->dh)) G[j * TILE + i] += w->g->memory_coef;
}

/* The selection's logits and -F of column tile c of the pair in all row tiles of a group, upwards from the saved
   carry. */
static void rebuild_selection(const backward_job *w, int64_t group, int64_t J, int c)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t square = TILE * TILE, kw = a->dh / PAIR, I0 = group * p->group;
    const key_operands o = selecting_keys(w, J * TILE);
    const bool bilinear = attention_bilinear(a);
    const word *const Qt = (const word *)(w->pack + (bilinear ? p->sel_qt_all : p->qt_all));
    const int64_t Qt_tile = (bilinear ? 1 : a->heads) * kw * TILE;
    const float *const saved = a->saved + (w->b * sel_attention_carries(p->rows) + group) * a->i1 + J * TILE;
    float carry[TILE] = { 0 };
    tile t;

    memcpy(carry, saved, (size_t)(a->i1 - J * TILE < TILE ? a->i1 - J * TILE : TILE) * sizeof *carry);
    for (int64_t I = I0; I < I0 + p->group && I < p->tiles; I++) {
        if (!make_tile(w, I, J, &t)) continue;
        float *const L0 = w->scratch + p->l0 + ((I - I0) * SIDE + c) * square;
        float *const NF = w->scratch + p->f + ((I - I0) * SIDE + c) * square;
        for (int v0 = 0; v0 < t.lanes; v0 += 32)
            product_32(seen_blocks(v0, t.off) * 8, kw, o.k, o.k_row, 1, Qt + I * Qt_tile + v0, TILE, L0 + v0, TILE,
                       true);
        select_words(a, L0, NF, carry, t.rows, t.cols, t.lanes, t.col0, t.off);
    }
}

/* One head over the tiles of rows [I0, I1) (descending) and the pair of column tiles from J0. */
static void backward_head(const backward_job *w, int64_t h, int64_t I0, int64_t I1, int64_t group0, int64_t J0,
                          float dcarry[SIDE][TILE])
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t square = TILE * TILE, kv = a->kv_heads, kh = h * kv / a->heads, dh = a->dh;
    const bool first = a->selective && h == 0 && !attention_bilinear(a);   /* the selection's logits are its own */
    tile t;

    for (int c = 0; c < SIDE && J0 + c < p->columns; c++) {
        const key_operands o = backward_keys(w, kh, (J0 + c) * TILE);
        float *const dK = w->scratch + p->dk + (c * kv + kh) * TILE * dh, *const dV = w->scratch + p->dv +
                                                                                      (c * kv + kh) * TILE * dh;
        for (int64_t I = I1 - 1; I >= I0; I--) {
            if (!make_tile(w, I, J0 + c, &t)) continue;
            const float *const L0 = w->scratch + p->l0 + ((I - group0) * SIDE + c) * square;
            const float *const NF = w->scratch + p->f + ((I - group0) * SIDE + c) * square;
            float *const G = w->scratch + p->g + ((I - I0) * SIDE + c) * square, *const Z0 = w->scratch + p->raw;

            tile_gradients(w, &t, h, &o, first ? L0 : NULL, a->selective ? NF : NULL, a->selective ? G : NULL,
                           first ? Z0 : NULL);
            if (first) {
                if (a->tau > 0.0 && w->g->memory_coef != 0.0f) add_memory(w, &t, NF, G);
                selection_words(w, &t, L0, G, Z0, dcarry[c]);
            }
            tile_products(w, &t, h, &o, dK, dV);
        }
    }
}

/* What comes through F, to sel_q and sel_k, over the same tiles; after all heads. */
static void backward_selection(const backward_job *w, int64_t I0, int64_t I1, int64_t group0, int64_t J0,
                               float dcarry[SIDE][TILE])
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t square = TILE * TILE, dh = a->dh;
    float *const Z = w->scratch + p->raw;
    tile t;

    for (int c = 0; c < SIDE && J0 + c < p->columns; c++) {
        const key_operands o = selecting_keys(w, (J0 + c) * TILE);
        for (int64_t I = I1 - 1; I >= I0; I--) {
            if (!make_tile(w, I, J0 + c, &t)) continue;
            const float *const L = w->scratch + p->l0 + ((I - group0) * SIDE + c) * square;
            const float *const NF = w->scratch + p->f + ((I - group0) * SIDE + c) * square;
            float *const G = w->scratch + p->g + ((I - I0) * SIDE + c) * square;
            const word *const rows = WORD_BF16
                                         ? (const word *)(w->pack + p->sel_q_rows) + I * TILE_WORDS * dh
                                         : (const word *)(a->sel_q + w->b * a->sel_q_seq + I * TILE * a->sel_q_row);

            if (a->tau > 0.0 && w->g->memory_coef != 0.0f) add_memory(w, &t, NF, G);
            memset(Z, 0, (size_t)square * sizeof *Z);
            selection_words(w, &t, L, G, Z, dcarry[c]);
            logit_products(w, &t, &o, rows, WORD_BF16 ? dh : a->sel_q_row, w->scratch + p->dsel_k + c * TILE * dh,
                           w->scratch + p->dsel_q + I * TILE * dh);
        }
    }
}

/* A pair of column tiles: their dK and dV, their part of every row's dQ. */
static void backward_columns(const backward_job *w, int64_t J0)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t kv = a->kv_heads, dh = a->dh, square = TILE * TILE;
    const bool bilinear = attention_bilinear(a);
    float dcarry[SIDE][TILE] = { { 0 } };

    memset(w->scratch + p->dk, 0, (size_t)(SIDE * TILE * kv * dh) * sizeof(float));
    memset(w->scratch + p->dv, 0, (size_t)(SIDE * TILE * kv * dh) * sizeof(float));
    if (bilinear) memset(w->scratch + p->dsel_k, 0, (size_t)(SIDE * TILE * dh) * sizeof(float));
    for (int c = 0; c < SIDE; c++)
        for (int64_t j = (J0 + c) * TILE; a->selective && w->g->dcarry_in && j < a->i1 && j < (J0 + c + 1) * TILE; j++)
            dcarry[c][j % TILE] = w->g->dcarry_in[w->b * a->carry_seq + j];

    for (int64_t group = p->groups - 1; group >= 0; group--) {
        const int64_t G0 = group * p->group, G1 = G0 + p->group < p->tiles ? G0 + p->group : p->tiles;
        if (a->i0 + G1 * TILE <= J0 * TILE) continue;      /* all rows lie before these keys */
        for (int c = 0; a->selective && c < SIDE && J0 + c < p->columns; c++) rebuild_selection(w, group, J0 + c, c);
        for (int64_t I1 = G1; I1 > G0; I1 -= SIDE) {
            const int64_t I0 = I1 - SIDE > G0 ? I1 - SIDE : G0;
            if (a->selective) memset(w->scratch + p->g, 0, (size_t)(SIDE * SIDE * square) * sizeof(float));
            /* Head 0 last: its dF needs the other heads'. */
            for (int64_t n = 1; n <= a->heads; n++) backward_head(w, n % a->heads, I0, I1, G0, J0, dcarry);
            if (bilinear) backward_selection(w, I0, I1, G0, J0, dcarry);
        }
    }

    const float scale = (float)(1.0 / sqrt((double)dh));
    for (int64_t j = J0 * TILE; j < a->i1 && j < (J0 + SIDE) * TILE; j++)
        for (int64_t kh = 0; kh < kv; kh++) {
            const int64_t at = (((j / TILE - J0) * kv + kh) * TILE + j % TILE) * dh;
            float *const dk = w->g->dk + w->b * w->g->dk_seq + j * w->g->dk_row + kh * dh;
            float *const dv = w->g->dv + w->b * w->g->dv_seq + j * w->g->dv_row + kh * dh;
            for (int64_t d = 0; d < dh; d += V16) {
                _mm512_storeu_ps(dk + d,
                                 _mm512_mul_ps(_mm512_loadu_ps(w->scratch + p->dk + at + d), _mm512_set1_ps(scale)));
                _mm512_storeu_ps(dv + d, _mm512_loadu_ps(w->scratch + p->dv + at + d));
            }
        }
    for (int64_t j = J0 * TILE; bilinear && j < a->i1 && j < (J0 + SIDE) * TILE; j++) {
        const float *const from = w->scratch + p->dsel_k + (j - J0 * TILE) * dh;
        float *const to = w->g->dsel_k + w->b * w->g->dsel_k_seq + j * w->g->dsel_k_row;
        for (int64_t d = 0; d < dh; d += V16)
            _mm512_storeu_ps(to + d, _mm512_mul_ps(_mm512_loadu_ps(from + d), _mm512_set1_ps(scale)));
    }
    for (int64_t j = J0 * TILE; a->selective && w->g->dcarry_out && j < a->i1 && j < (J0 + SIDE) * TILE; j++)
        w->g->dcarry_out[w->b * a->carry_seq + j] = dcarry[j / TILE - J0][j % TILE];
}

/* dq and dsel_q of row tile I: the threads' sums, in thread order, turned back to rows. */
static void store_dq(const backward_job *w, int64_t I, int threads)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t dh = a->dh, H = a->heads;
    const __m512 scale = _mm512_set1_ps((float)(1.0 / sqrt((double)dh)));
    const int rows = (int)(p->rows - I * TILE < TILE ? p->rows - I * TILE : TILE);
    float line[16][TILE], turned[16][16];

    for (int64_t h = 0; h < H + attention_bilinear(a); h++) {
        const float *const sum = w->scratch + (h < H ? p->dq + (I * H + h) * dh * TILE : p->dsel_q + I * dh * TILE);
        const int64_t row = h < H ? w->g->dq_row : w->g->dsel_q_row;
        float *const dq = (h < H ? w->g->dq + w->b * w->g->dq_seq + h * dh : w->g->dsel_q + w->b * w->g->dsel_q_seq) +
                          I * TILE * row;
        for (int64_t d0 = 0; d0 < dh; d0 += 16) {
            for (int d = 0; d < 16; d++)
                for (int v0 = 0; v0 < TILE; v0 += 32) {
                    __m512 x[2];
                    for (int v = 0; v < 2; v++) {
                        const float *at = sum + (d0 + d) * TILE + v0 + v * V16;
                        x[v] = _mm512_loadu_ps(at);
                        for (int n = 1; n < threads; n++)
                            x[v] = _mm512_add_ps(x[v], _mm512_loadu_ps(at += p->thread_size));
                        x[v] = _mm512_mul_ps(x[v], scale);
                    }
                    unweave(x);
                    for (int v = 0; v < 2; v++) _mm512_storeu_ps(line[d] + v0 + v * V16, x[v]);
                }
            for (int i0 = 0; i0 < rows; i0 += 16) {
                transpose_16((word *)&turned[0][0], 16, (const word *)&line[0][i0], TILE, 16);
                for (int i = 0; i < 16 && i0 + i < rows; i++)
                    _mm512_storeu_ps(dq + (i0 + i) * row + d0, _mm512_loadu_ps(turned[i]));
            }
        }
    }
}

static backward_job new_backward_job(const sel_attention *a, const sel_attention_grad *g, const words_plan *p,
                                     int64_t b, int thread, int set)
{
    float *const base = a->workspace;
    return (backward_job){ .a = a, .g = g, .p = p, .b = b, .scratch = base + p->thread0 + thread * p->thread_size,
                           .pack = base + p->pack0 + set * p->pack_size };
}

static void clear_dq(const backward_job *w)
{
    const size_t rows = (size_t)(w->p->tiles * TILE * w->a->dh) * sizeof(float);
    memset(w->scratch + w->p->dq, 0, rows * (size_t)w->a->heads);
    if (attention_bilinear(w->a)) memset(w->scratch + w->p->dsel_q, 0, rows);
}

static void backward_words(const sel_attention *a, const sel_attention_grad *g)
{
    const words_plan p = sel_attention_words_plan(a, true);
    const int64_t whole = attention_whole(a);

    #pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int64_t b = 0; b < whole; b++) {
        const backward_job w = new_backward_job(a, g, &p, b, omp_get_thread_num(), omp_get_thread_num());
        clear_dq(&w);
        for (int64_t J = 0; J < p.columns; J++) pack_columns(&w, J);
        for (int64_t I = 0; I < p.tiles; I++) pack_rows(&w, I);
        for (int64_t J = 0; J < p.columns; J += SIDE) backward_columns(&w, J);
        for (int64_t I = 0; I < p.tiles; I++) store_dq(&w, I, 1);
    }
    for (int64_t b = whole; b < a->B; b++) {
        #pragma omp parallel num_threads(a->threads)
        {
            const int thread = omp_get_thread_num(), threads = a->threads;
            const backward_job w = new_backward_job(a, g, &p, b, thread, 0), zero = new_backward_job(a, g, &p, b, 0, 0);
            clear_dq(&w);
            #pragma omp for schedule(static)
            for (int64_t J = 0; J < p.columns; J++) pack_columns(&w, J);
            #pragma omp for schedule(static)
            for (int64_t I = 0; I < p.tiles; I++) pack_rows(&w, I);
            /* Pairs of columns dealt 0 .. T-1, T-1 .. 0: early ones are long, late ones short. */
            for (int64_t J = 0; J < p.columns; J += SIDE) {
                const int64_t k = J / SIDE % (2 * threads);
                if (k == thread || k == 2 * threads - 1 - thread) backward_columns(&w, J);
            }
            #pragma omp barrier
            #pragma omp for schedule(static)
            for (int64_t I = 0; I < p.tiles; I++) store_dq(&zero, I, threads);
        }
    }
}

#endif
