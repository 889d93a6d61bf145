/* attention_words_forward.h: the forward pass for AVX-512 (attention_words.h); included once a kernel file. */
#ifndef SEL_OPS_ATTENTION_WORDS_FORWARD_H
#define SEL_OPS_ATTENTION_WORDS_FORWARD_H

#include <omp.h>
#include "ops/attention_words.h"

typedef struct {
    const sel_attention *a;
    const words_plan *p;
    int64_t b;                /* sequence */
    float *scratch;           /* this thread's */
    float *pack;              /* this sequence's packed operands */
    double m_max;             /* the memory loss's largest M so far, and its row */
    int64_t m_row;
} forward_job;

/* Operands of keys from position col0 on (a multiple of TILE) for query head h: words, the stride of a key (K) or of
   a pair of keys (V). */
INLINE const word *key_words(const forward_job *w, int64_t h, int64_t col0, int64_t *stride)
{
    const sel_attention *a = w->a;
    const int64_t kh = h * a->kv_heads / a->heads;
    if (WORD_BF16 || col0 + TILE > a->i1) {   /* packed, or the copy of the last tile, padded with zeros */
        *stride = a->kv_heads * a->dh / PAIR;
        return (const word *)(w->pack + w->p->k) + (WORD_BF16 ? col0 : 0) * *stride + kh * a->dh / PAIR;
    }
    *stride = a->k_row;
    return (const word *)(a->k + w->b * a->k_seq + col0 * a->k_row + kh * a->dh);
}

/* The same for the keys that S is made of: head 0's, or sel_k. */
INLINE const word *selecting_words(const forward_job *w, int64_t col0, int64_t *stride)
{
    const sel_attention *a = w->a;
    if (!attention_bilinear(a)) return key_words(w, 0, col0, stride);
    if (WORD_BF16 || col0 + TILE > a->i1) {
        *stride = a->dh / PAIR;
        return (const word *)(w->pack + w->p->sel_k) + (WORD_BF16 ? col0 : 0) * *stride;
    }
    *stride = a->sel_k_row;
    return (const word *)(a->sel_k + w->b * a->sel_k_seq + col0 * a->sel_k_row);
}

INLINE const word *value_words(const forward_job *w, int64_t h, int64_t col0, int64_t *stride)
{
    const sel_attention *a = w->a;
    const int64_t kh = h * a->kv_heads / a->heads;
    if (WORD_BF16 || col0 + TILE > a->i1) {
        *stride = a->kv_heads * a->dh;
        return (const word *)(w->pack + w->p->v) + (WORD_BF16 ? col0 / PAIR : 0) * *stride + kh * a->dh;
    }
    *stride = a->v_row;
    return (const word *)(a->v + w->b * a->v_seq + col0 * a->v_row + kh * a->dh);
}

/* The `cols` rows of a column tile as words, zeros up to TILE. */
static void pack_tile_rows(word *K, const float *k, int64_t k_row, int cols, int64_t n)
{
    for (int j = 0; j < TILE; j++) {
        if (j < cols) row_words(K + j * n / PAIR, k + j * k_row, n);
        else memset(K + j * n / PAIR, 0, (size_t)(n / PAIR) * sizeof *K);
    }
}

/* Packs column tile J of the sequence: all of it for bfloat16, only the last, incomplete tile for float32. */
static void pack_keys(const forward_job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const int64_t n = a->kv_heads * a->dh, j0 = J * TILE;
    const float *const k = a->k + w->b * a->k_seq + j0 * a->k_row, *const v = a->v + w->b * a->v_seq + j0 * a->v_row;
    const int cols = (int)(a->i1 - j0 < TILE ? a->i1 - j0 : TILE);
    word *const K = (word *)(w->pack + w->p->k) + (WORD_BF16 ? j0 : 0) * n / PAIR;
    word *const V = (word *)(w->pack + w->p->v) + (WORD_BF16 ? j0 / PAIR : 0) * n;

    if (!WORD_BF16 && cols == TILE) return;
    pack_tile_rows(K, k, a->k_row, cols, n);
    if (attention_bilinear(a))
        pack_tile_rows((word *)(w->pack + w->p->sel_k) + (WORD_BF16 ? j0 : 0) * a->dh / PAIR,
                       a->sel_k + w->b * a->sel_k_seq + j0 * a->sel_k_row, a->sel_k_row, cols, a->dh);
    for (int j = 0; j < TILE; j += PAIR) {
        if (j >= cols) memset(V + j / PAIR * n, 0, (size_t)n * sizeof *V);
#if WORD_BF16
        else pair_rows(V + j / 2 * n, v + j * a->v_row, j + 1 < cols ? v + (j + 1) * a->v_row : NULL, n);
#else
        else row_words(V + j * n, v + j * a->v_row, n);
#endif
    }
}

/* Eight columns of a block: x comes in as logits - F (- m), leaves as words in P; sums [2] grow by their sums. */
INLINE void exponentiate(__m512 x[8][2], word *P, __m512 sums[2])
{
    #pragma GCC unroll 4
    for (int r = 0; r < 8; r += 2) {
        __m512 p[2][2];
        for (int c = 0; c < 2; c++)
            for (int v = 0; v < 2; v++) {
                p[c][v] = exp2_ps(x[r + c][v]);
                sums[v] = _mm512_add_ps(sums[v], p[c][v]);
            }
        store_pair(P + r / PAIR * TILE, p[0], p[1]);
    }
}

/* m of 32 rows: c times the largest of the 8 columns. */
INLINE void first_maximum(__m512 x[8][2], __m512 c, float *m)
{
    for (int v = 0; v < 2; v++) {
        __m512 top = x[0][v];
        for (int r = 1; r < 8; r++) top = _mm512_max_ps(top, x[r][v]);
        _mm512_storeu_ps(m + v * V16, _mm512_mul_ps(c, top));
    }
}

/* Half a tile (32 queries from lane v0) of one head: words of P, its row sums into sums.  raw: head 0's logits
   [j][TILE], else NULL; NF: -F, or NULL where F = 0; start: m is not known yet. */
static void logits_half(const word *K, int64_t stride, int64_t kw, const word *Qt, const float *raw, const float *NF,
                        float scale, float *m, word *P, int v0, int blocks, int64_t off, bool start, __m512 sums[2])
{
    const __m512 c = _mm512_set1_ps(scale);
    for (int jb = 0; jb < blocks; jb++) {
        __m512 x[8][2];
        const int j0 = jb * 8;

        #pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
            for (int v = 0; v < 2; v++) {
                const int at = (j0 + r) * TILE + v0 + v * V16;
                x[r][v] = NF ? _mm512_loadu_ps(NF + at) : _mm512_setzero_ps();
                if (raw) x[r][v] = _mm512_add_ps(x[r][v], _mm512_loadu_ps(raw + at));
            }
        if (!raw) block_sum(8, 2, kw, K + j0 * stride, stride, 1, Qt + v0, TILE, x);
        if (v0 + off < j0 + 7) hide(x, v0, j0, off);
        if (start && jb == 0) first_maximum(x, c, m + v0);
        #pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
            for (int v = 0; v < 2; v++) x[r][v] = _mm512_fmsub_ps(x[r][v], c, _mm512_loadu_ps(m + v0 + v * V16));
        exponentiate(x, P + j0 / PAIR * TILE + v0, sums);
    }
}

/* The same half again with its true maximum, when the lazy one let the sums grow too large: m rises, l and O of the
   head shrink by the same factor. */
static void redo_half(const word *K, int64_t stride, int64_t kw, const word *Qt, const float *NF, float scale, float *m,
                      float *l, float *Ot, int64_t dh, bool fresh, word *P, float *raw, int v0, int blocks, int64_t off,
                      __m512 sums[2])
{
    __m512 top[2] = { _mm512_loadu_ps(m + v0), _mm512_loadu_ps(m + v0 + V16) }, shrink[2];

    product_32(blocks * 8, kw, K, stride, 1, Qt + v0, TILE, raw + v0, TILE, true);
    for (int j = 0; j < blocks * 8; j++)
        for (int v = 0; v < 2; v++) {
            const int at = j * TILE + v0 + v * V16;
            __m512 x = _mm512_loadu_ps(raw + at);
            if (NF) x = _mm512_add_ps(x, _mm512_loadu_ps(NF + at));
            x = _mm512_mask_blend_ps(sees(v0 + v * V16, j, off), _mm512_set1_ps(HIDDEN), x);
            x = _mm512_mul_ps(x, _mm512_set1_ps(scale));
            top[v] = _mm512_max_ps(top[v], x);
            _mm512_storeu_ps(raw + at, x);
        }
    for (int v = 0; v < 2; v++) {
        shrink[v] = exp2_ps(_mm512_sub_ps(_mm512_loadu_ps(m + v0 + v * V16), top[v]));
        _mm512_storeu_ps(l + v0 + v * V16, _mm512_mul_ps(_mm512_loadu_ps(l + v0 + v * V16), shrink[v]));
        _mm512_storeu_ps(m + v0 + v * V16, top[v]);
        sums[v] = _mm512_setzero_ps();
    }
    for (int64_t d = 0; d < dh && !fresh; d++) {
        __m512 o[2];
        for (int v = 0; v < 2; v++) o[v] = _mm512_loadu_ps(Ot + d * TILE + v0 + v * V16);
        unweave(o);
        for (int v = 0; v < 2; v++) o[v] = _mm512_mul_ps(o[v], shrink[v]);
        weave(o);
        for (int v = 0; v < 2; v++) _mm512_storeu_ps(Ot + d * TILE + v0 + v * V16, o[v]);
    }
    for (int jb = 0; jb < blocks; jb++) {
        __m512 x[8][2];
        for (int r = 0; r < 8; r++)
            for (int v = 0; v < 2; v++)
                x[r][v] = _mm512_sub_ps(_mm512_loadu_ps(raw + (jb * 8 + r) * TILE + v0 + v * V16), top[v]);
        exponentiate(x, P + jb * 8 / PAIR * TILE + v0, sums);
    }
}

/* One tile of one head.  off: query lane i sees keys j <= i + off. */
static void attend_tile(const forward_job *w, int64_t h, int64_t col0, int64_t off, int lanes, const float *raw,
                        const float *NF, bool start)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t dh = a->dh, H = a->heads;
    float *const m = w->scratch + p->ml + h * TILE, *const l = m + H * TILE,
                 *const Ot = w->scratch + p->ot + h * dh * TILE;
    const word *const Qt = (const word *)(w->scratch + p->qt) + h * dh / PAIR * TILE;
    word *const P = (word *)(w->scratch + p->p);
    const __m512 bound = _mm512_set1_ps(0x1p30f);
    const float scale = (float)(LOG2E / sqrt((double)dh));
    int64_t k_stride, v_stride;
    const word *const K = key_words(w, h, col0, &k_stride), *const V = value_words(w, h, col0, &v_stride);

    for (int v0 = 0; v0 < lanes; v0 += 32) {
        const int blocks = seen_blocks(v0, off);
        __m512 sums[2] = { _mm512_setzero_ps(), _mm512_setzero_ps() };

        if (!blocks) continue;
        logits_half(K, k_stride, dh / PAIR, Qt, raw, NF, scale, m, P, v0, blocks, off, start, sums);
        if ((_mm512_cmp_ps_mask(sums[0], bound, _CMP_NLT_UQ) | _mm512_cmp_ps_mask(sums[1], bound, _CMP_NLT_UQ)) != 0)
            redo_half(K, k_stride, dh / PAIR, Qt, NF, scale, m, l, Ot, dh, start, P, w->scratch + p->redo, v0, blocks,
                      off, sums);
        for (int v = 0; v < 2; v++) {
            float *const at = l + v0 + v * V16;
            _mm512_storeu_ps(at, start ? sums[v] : _mm512_add_ps(_mm512_loadu_ps(at), sums[v]));
        }
        product_32(dh, blocks * 8 / PAIR, V, 1, v_stride, P + v0, TILE, Ot + v0, TILE, start);
    }
}

/* Logits of a tile, plain, [j][TILE], from keys K (rows `stride` words apart). */
static void raw_logits(const forward_job *w, const word *K, int64_t stride, int64_t off, int lanes, const word *Qt,
                       float *raw)
{
    const int64_t kw = w->a->dh / PAIR;
    for (int v0 = 0; v0 < lanes; v0 += 32)
        product_32(seen_blocks(v0, off) * 8, kw, K, stride, 1, Qt + v0, TILE, raw + v0, TILE, true);
}

/* Adds min(F, tau) / tau to each row's sum, in float64; NF = -F, and tau, in raw units. */
static void add_forgotten(const float *NF, int rows, int cols, int64_t off, double tau, double *rowsum)
{
    for (int j = 0; j < cols; j++)
        for (int i = j > off ? (int)(j - off) : 0; i < rows; i++) {
            const double f = -(double)NF[j * TILE + i];
            rowsum[i] += f < tau ? f / tau : 1.0;
        }
}

/* out and lse of row tile I, from O (transposed, lanes as store_pair left them), l and m. */
static void finish_rows(const forward_job *w, int64_t I, int rows)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t H = a->heads, dh = a->dh, row = I * TILE;
    float turned[16][16], line[16][TILE];

    for (int64_t h = 0; h < H; h++) {
        const float *const m = w->scratch + p->ml + h * TILE, *const l = m + H * TILE;
        float *const Ot = w->scratch + p->ot + h * dh * TILE;
        float *const out = a->out + w->b * a->out_seq + row * a->out_row + h * dh;
        float *const lse = a->lse + (w->b * H + h) * p->rows + row;

        for (int64_t d0 = 0; d0 < dh; d0 += 16) {
            for (int d = 0; d < 16; d++)
                for (int v0 = 0; v0 < TILE; v0 += 32) {
                    __m512 o[2] = {_mm512_loadu_ps(Ot + (d0 + d) * TILE + v0),
                                   _mm512_loadu_ps(Ot + (d0 + d) * TILE + v0 + V16)};
                    unweave(o);
                    for (int v = 0; v < 2; v++)
                        _mm512_storeu_ps(line[d] + v0 + v * V16,
                                         _mm512_div_ps(o[v], _mm512_loadu_ps(l + v0 + v * V16)));
                }
            for (int i0 = 0; i0 < rows; i0 += 16) {
                transpose_16((word *)&turned[0][0], 16, (const word *)&line[0][i0], TILE, 16);
                for (int i = 0; i < 16 && i0 + i < rows; i++)
                    _mm512_storeu_ps(out + (i0 + i) * a->out_row + d0, _mm512_loadu_ps(turned[i]));
            }
        }
        for (int i = 0; i < rows; i++) lse[i] = (float)(LN2 * ((double)m[i] + log2((double)l[i])));
    }
}

/* One row tile, all heads; carry [i1] moves on past its rows. */
static void forward_tile(forward_job *w, int64_t I, float *carry)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t H = a->heads, dh = a->dh, row0 = a->i0 + I * TILE, end = (row0 + TILE - 1) / TILE + 1;
    const int rows = (int)(a->i1 - row0 < TILE ? a->i1 - row0 : TILE), lanes = rows > 32 ? 64 : 32;
    const int64_t last = end < p->columns ? end : p->columns;
    word *const Qt = (word *)(w->scratch + p->qt);
    float *const raw = w->scratch + p->raw, *const F = w->scratch + p->f;
    double rowsum[TILE] = { 0 };
    const bool memory = a->selective && a->tau > 0.0, bilinear = attention_bilinear(a);
    word *const own = bilinear ? (word *)(w->scratch + p->sel_qt) : Qt;   /* queries that S is made of */
    int64_t stride;

    if (bilinear)
        transpose_words(own, a->sel_q + w->b * a->sel_q_seq + I * TILE * a->sel_q_row, a->sel_q_row, rows, dh);
    for (int64_t h = 0; h < H; h++)
        transpose_words(Qt + h * dh / PAIR * TILE, a->q + w->b * a->q_seq + I * TILE * a->q_row + h * dh, a->q_row,
                        rows, dh);
    for (int64_t block = 0; block < last; block += SUPER)
        for (int64_t h = 0; h < H; h++)
            for (int64_t J = block; J < last && J < block + SUPER; J++) {
                float *const NF = F + (J - block) * TILE * TILE;
                const int64_t col0 = J * TILE, off = row0 - col0;
                const int cols = (int)(a->i1 - col0 < TILE ? a->i1 - col0 : TILE);

                if (h == 0) {
                    const word *K = selecting_words(w, col0, &stride);
                    raw_logits(w, K, stride, off, lanes, own, raw);
                    if (a->selective) {
                        select_words(a, raw, NF, carry + col0, rows, cols, lanes, col0, off);
                        if (memory) add_forgotten(NF, rows, cols, off, a->tau * sqrt((double)dh), rowsum);
                    }
                    if (bilinear) {
                        K = key_words(w, 0, col0, &stride);
                        raw_logits(w, K, stride, off, lanes, Qt, raw);
                    }
                }
                attend_tile(w, h, col0, off, lanes, h == 0 ? raw : NULL, a->selective ? NF : NULL, J == 0);
            }
    finish_rows(w, I, rows);
    for (int i = 0; memory && i < rows; i++) {
        const double needed = (double)(row0 + i + 1) - rowsum[i];
        if (needed > w->m_max || (needed == w->m_max && row0 + i < w->m_row)) {
            w->m_max = needed;
            w->m_row = row0 + i;
        }
    }
}

static float *group_carry(const forward_job *w, int64_t group)
{
    const sel_attention *a = w->a;
    return a->saved ? a->saved + (w->b * sel_attention_carries(w->p->rows) + group) * a->i1
                    : (float *)a->workspace + w->p->carries + group * a->i1;
}

/* Columns [j0, j1) of the carry before the call's first row, in raw units. */
static void start_carry(const forward_job *w, float *carry, int64_t j0, int64_t j1)
{
    const sel_attention *a = w->a;
    const float root = (float)sqrt((double)a->dh);
    for (int64_t j = j0; j < j1; j++)
        carry[j] = a->carry_in && j < a->i0 ? root * a->carry_in[w->b * a->carry_seq + j] : 0.0f;
}
static void end_carry(const forward_job *w, const float *carry, int64_t j0, int64_t j1)
{
    const sel_attention *a = w->a;
    const float root = (float)sqrt((double)a->dh);
    for (int64_t j = j0; a->carry_out && j < j1; j++) a->carry_out[w->b * a->carry_seq + j] = carry[j] / root;
}

static void store_memory(const forward_job *w)
{
    if (!w->a->selective || w->a->tau <= 0.0) return;
    w->a->m_max[w->b] = w->m_max;
    w->a->m_row[w->b] = w->m_row;
}

static forward_job new_forward_job(const sel_attention *a, const words_plan *p, int64_t b, int thread, int set)
{
    float *const base = a->workspace;
    return (forward_job){ .a = a, .p = p, .b = b, .scratch = base + p->thread0 + thread * p->thread_size,
                          .pack = base + p->pack0 + set * p->pack_size, .m_max = -INFINITY, .m_row = INT64_MAX };
}

/* A whole sequence by one thread. */
static void forward_sequence(forward_job *w)
{
    float *const carry = w->scratch + w->p->carry;

    for (int64_t J = 0; J < w->p->columns; J++) pack_keys(w, J);
    if (w->a->selective) start_carry(w, carry, 0, w->a->i1);
    for (int64_t I = 0; I < w->p->tiles; I++) {
        if (w->a->selective && w->a->saved && I % w->p->group == 0)
            memcpy(group_carry(w, I / w->p->group), carry, (size_t)w->a->i1 * sizeof *carry);
        forward_tile(w, I, carry);
    }
    if (w->a->selective) end_carry(w, carry, 0, w->a->i1);
    store_memory(w);
}

/* The carries of one column tile at the start of every group of row tiles, from the selection's logits alone. */
static void carry_column(const forward_job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t j0 = J * TILE, j1 = j0 + TILE < a->i1 ? j0 + TILE : a->i1;
    float *const carry = w->scratch + p->carry, *const raw = w->scratch + p->raw, *const F = w->scratch + p->f;
    word *const Qt = (word *)(w->scratch + p->qt);
    const bool bilinear = attention_bilinear(a);
    const float *const q = bilinear ? a->sel_q + w->b * a->sel_q_seq : a->q + w->b * a->q_seq;
    const int64_t q_row = bilinear ? a->sel_q_row : a->q_row;
    int64_t stride;
    const word *const K = selecting_words(w, j0, &stride);

    start_carry(w, carry, j0, j1);
    for (int64_t I = 0; I < p->tiles; I++) {
        const int64_t row0 = a->i0 + I * TILE, off = row0 - j0;
        const int rows = (int)(a->i1 - row0 < TILE ? a->i1 - row0 : TILE), lanes = rows > 32 ? 64 : 32;
        if (I % p->group == 0) memcpy(group_carry(w, I / p->group) + j0, carry + j0, (size_t)(j1 - j0) * sizeof *carry);
        if (off + rows - 1 < 0) continue;
        transpose_words(Qt, q + I * TILE * q_row, q_row, rows, a->dh);
        raw_logits(w, K, stride, off, lanes, Qt, raw);
        select_words(a, raw, F, carry + j0, rows, (int)(j1 - j0), lanes, j0, off);
    }
    end_carry(w, carry, j0, j1);
}

/* One sequence by all threads: carries of all groups first, then the groups are independent. */
static void forward_shared(const sel_attention *a, const words_plan *p, int64_t b)
{
    forward_job best = new_forward_job(a, p, b, 0, 0);
    #pragma omp parallel num_threads(a->threads)
    {
        forward_job w = new_forward_job(a, p, b, omp_get_thread_num(), 0);
        float *const carry = w.scratch + p->carry;

        #pragma omp for schedule(static)
        for (int64_t J = 0; J < p->columns; J++) pack_keys(&w, J);
        if (a->selective) {
            #pragma omp for schedule(dynamic, 1)
            for (int64_t J = 0; J < p->columns; J++) carry_column(&w, J);
        }
        #pragma omp for schedule(dynamic, 1)
        for (int64_t k = 0; k < p->groups; k++) {   /* later groups see more keys: the dearest first */
            const int64_t g = p->groups - 1 - k;
            if (a->selective) memcpy(carry, group_carry(&w, g), (size_t)a->i1 * sizeof *carry);
            for (int64_t I = g * p->group; I < p->tiles && I < (g + 1) * p->group; I++) forward_tile(&w, I, carry);
        }
        #pragma omp critical(attention_memory)
        if (w.m_max > best.m_max || (w.m_max == best.m_max && w.m_row < best.m_row)) {
            best.m_max = w.m_max;
            best.m_row = w.m_row;
        }
    }
    store_memory(&best);
}

static void forward_words(const sel_attention *a)
{
    const words_plan p = sel_attention_words_plan(a, false);
    const int64_t whole = attention_whole(a);

    #pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int64_t b = 0; b < whole; b++) {
        forward_job w = new_forward_job(a, &p, b, omp_get_thread_num(), omp_get_thread_num());
        forward_sequence(&w);
    }
    for (int64_t b = whole; b < a->B; b++) {
        if (p.groups > 1) {
            forward_shared(a, &p, b);
        } else {
            forward_job w = new_forward_job(a, &p, b, 0, 0);
            forward_sequence(&w);
        }
    }
}

#endif
