/* attention_words_carry.h: attention_carry and attention_carry_backward (attention.h) for AVX-512; included once a
 * kernel file.
 *
 * Sums go down rows, so here keys lie in the lanes: K^T of a column tile stays in the cache, all rows pass by, and what
 * is summed stays in registers.
 *
 * Gradients: dL[i,j] is dcarry[j] or nothing, the gate of S.  A key whose dcarry is 0, as that of every dead one is,
 * has none: keys are gathered into a list of those that have, in order, and a key is known by its place there and its
 * position.  Two tiles of keys and two of rows go together, as in backward.
 */
#ifndef SEL_OPS_ATTENTION_WORDS_CARRY_H
#define SEL_OPS_ATTENTION_WORDS_CARRY_H

#include <omp.h>
#include "core/base/error.h"
#include "ops/attention_words_gradients.h"

/* One sequence and one thread. */
typedef struct {
    const sel_attention *a;
    const sel_attention_grad *g;
    const carry_plan *p;
    selection_source from;
    int64_t b;
    float *scratch, *pack;
    int64_t kept;             /* keys on the list */
    fetch_queue next;
} carry_job;

static carry_job new_carry_job(const sel_attention *a, const sel_attention_grad *g, const carry_plan *p, int64_t b,
                               int thread, int set)
{
    float *const base = a->workspace;
    return (carry_job){ .a = a, .g = g, .p = p, .b = b, .from = attention_selection(a),
                        .scratch = base + p->thread0 + thread * p->thread_size,
                        .pack = base + p->pack0 + set * p->pack_size };
}

static const operand *selecting_row(const carry_job *w, int64_t row)
{
    return operands(w->from.q) + w->b * w->from.q_seq + row * w->from.q_row;
}
static const operand *selecting_key(const carry_job *w, int64_t j)
{
    return operands(w->from.k) + w->b * w->from.k_seq + j * w->from.k_row;
}

/* Q^T of row tile I, [dh / PAIR][TILE] */
static word *transposed_rows(const carry_job *w, int64_t I)
{
    return (word *)(w->pack + w->p->qt) + I * TILE * w->a->dh / PAIR;
}

static int rows_in(const carry_job *w, int64_t I)
{
    const int64_t left = w->p->rows - I * w->p->height;
    return (int)(left < w->p->height ? left : w->p->height);
}

static void transpose_tile(const carry_job *w, int64_t I)
{
    transpose_words(transposed_rows(w, I), selecting_row(w, I * w->p->height), w->from.q_row, rows_in(w, I), w->a->dh);
}

/* The first row tile with a row at or after position j. */
static int64_t tile_seeing(const carry_job *w, int64_t j)
{
    return j > w->a->i0 ? (j - w->a->i0) / w->p->height : 0;
}

/* ---- column sums of S ---- */

/* S of 8 rows, summed, onto sum [2]: 32 keys.  masked: row r sees the lanes up to last + r. */
INLINE void sum_block(carry_job *w, const word *Q, const word *K, const bool masked, int64_t last, __m512 sum[2])
{
    const bool relu = w->a->relu;
    __m512 x[8][2];
    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        for (int v = 0; v < 2; v++) x[r][v] = _mm512_setzero_ps();
    sum_rows(0, 2, w->a->dh / PAIR, Q, 1, TILE, K, TILE, &w->next, x);
    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        for (int v = 0; v < 2; v++) {
            const int64_t n = last + r + 1 - v * V16;
            const __mmask16 seen = (__mmask16)(!masked || n >= V16 ? 0xffff : n <= 0 ? 0 : 0xffff >> (V16 - n));
            if (relu) x[r][v] = _mm512_max_ps(x[r][v], _mm512_setzero_ps());
            if (masked) x[r][v] = _mm512_maskz_mov_ps(seen, x[r][v]);
        }
    #pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {   /* by pairs: a sum over many rows is a sum over few */
        const __m512 low = _mm512_add_ps(_mm512_add_ps(x[0][v], x[1][v]), _mm512_add_ps(x[2][v], x[3][v]));
        const __m512 high = _mm512_add_ps(_mm512_add_ps(x[4][v], x[5][v]), _mm512_add_ps(x[6][v], x[7][v]));
        sum[v] = _mm512_add_ps(sum[v], _mm512_add_ps(low, high));
    }
}

/* Rows that do not exist are zeros, and so is what they add. */
static void sum_column(carry_job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const int64_t j0 = J * TILE, cols = a->i1 - j0 < TILE ? a->i1 - j0 : TILE;
    const float inverse = (float)(1.0 / sqrt((double)a->dh));
    word *const Kt = (word *)(w->scratch + w->p->kt);
    __m512 sums[TILE / 32][2];
    float sum[TILE];

    transpose_words(Kt, selecting_key(w, j0), w->from.k_row, (int)cols, a->dh);
    for (int h = 0; h < TILE / 32; h++) sums[h][0] = sums[h][1] = _mm512_setzero_ps();
    for (int64_t I = tile_seeing(w, j0); I < w->p->tiles; I++) {
        const word *const Qt = transposed_rows(w, I);
        const int end = (rows_in(w, I) + 7) / 8;
        for (int h = 0; h < TILE / 32; h++)
            for (int block = 0; block < end; block++) {
                const int64_t last = a->i0 + I * w->p->height + block * 8 - (j0 + h * 32) - a->protect_self;
                if (last + 7 < 0) continue;
                if (last < 31) sum_block(w, Qt + block * 8, Kt + h * 32, true, last, sums[h]);
                else sum_block(w, Qt + block * 8, Kt + h * 32, false, last, sums[h]);
            }
    }
    for (int h = 0; h < TILE / 32; h++)
        for (int v = 0; v < 2; v++) _mm512_storeu_ps(sum + h * 32 + v * V16, sums[h][v]);
    if (J == 0 && a->protect_bos) sum[0] = 0.0f;
    for (int64_t j = 0; j < cols; j++) {
        const int64_t at = w->b * a->carry_seq + j0 + j;
        a->carry_out[at] = (a->carry_in && j0 + j < a->i0 ? a->carry_in[at] : 0.0f) + inverse * sum[j];
    }
}

static void carry_words(const sel_attention *a)
{
    const carry_plan p = sel_attention_carry_plan(a, false);
    const int64_t whole = attention_whole(a);

    SEL_ASSERT(a->selective && a->window == 0 && a->carry_out);
    #pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int64_t b = 0; b < whole; b++) {
        carry_job w = new_carry_job(a, NULL, &p, b, omp_get_thread_num(), omp_get_thread_num());
        for (int64_t I = 0; I < p.tiles; I++) transpose_tile(&w, I);
        for (int64_t J = 0; J < p.columns; J++) sum_column(&w, J);
    }
    for (int64_t b = whole; b < a->B; b++) {
        #pragma omp parallel num_threads(a->threads)
        {
            carry_job w = new_carry_job(a, NULL, &p, b, omp_get_thread_num(), 0);
            #pragma omp for schedule(static)
            for (int64_t I = 0; I < p.tiles; I++) transpose_tile(&w, I);
            #pragma omp for schedule(dynamic, 1)
            for (int64_t J = 0; J < p.columns; J++) sum_column(&w, J);
        }
    }
}

/* ---- gradients ---- */

static int32_t *kept_keys(const carry_job *w) { return (int32_t *)(void *)(w->pack + w->p->list); }

/* dL of one tile, as words: z by pairs of queries [TILE keys][TILE_WORDS], zk by pairs of keys [TILE_WORDS][TILE]
   (float32: z).  8 keys from 8 n on are seen by the queries from first[n] on, 8 queries see the keys up to seen[n]. */
typedef struct {
    word *z, *zk;
    int rows, first[TILE / 8], seen[TILE / 8];
} gate_tile;

/* Lists the keys that have a gradient, with what comes through F to them; returns how many. */
static int64_t list_keys(const carry_job *w)
{
    const sel_attention *a = w->a;
    const float *const later = w->g->dcarry_in + w->b * a->carry_seq;
    float *const dcarry = w->pack + w->p->dcarry;
    int64_t n = 0;
    for (int64_t j = a->protect_bos ? 1 : 0; j < a->i1; j++) {
        kept_keys(w)[n] = (int32_t)j;
        dcarry[n] = later[j];
        n += later[j] != 0.0f;
    }
    return n;
}

/* Packs tile c of the list: K by row and by pairs of keys, zeros where the list ends. */
static void pack_listed(const carry_job *w, int64_t c)
{
    const int64_t dh = w->a->dh, n = w->kept - c * TILE;
    const int32_t *const keys = kept_keys(w) + c * TILE;
    word *const k = (word *)(w->pack + w->p->k) + c * TILE * dh / PAIR;
    for (int64_t j = 0; j < TILE; j++)
        if (j < n) row_words(k + j * dh / PAIR, selecting_key(w, keys[j]), dh);
        else memset(k + j * dh / PAIR, 0, (size_t)(dh / PAIR) * sizeof *k);
#if WORD_BF16
    word *const pairs = (word *)(w->pack + w->p->k_pairs) + c * TILE_WORDS * dh;
    for (int64_t j = 0; j < TILE; j += 2)
        if (j < n)
            pair_rows(pairs + j / 2 * dh, selecting_key(w, keys[j]), j + 1 < n ? selecting_key(w, keys[j + 1]) : NULL,
                      dh);
        else memset(pairs + j / 2 * dh, 0, (size_t)dh * sizeof *pairs);
#endif
}

/* Packs row tile I: Q^T, and Q by pairs of rows. */
static void pack_selecting_rows(const carry_job *w, int64_t I)
{
    const int64_t dh = w->a->dh, row0 = I * w->p->height;
    word *const to = (word *)(w->pack + w->p->q_rows) + I * TILE_WORDS * dh;
    const int n = rows_in(w, I);
    transpose_tile(w, I);
    for (int i = 0; i < TILE; i += PAIR)
        if (i >= n) memset(to + i / PAIR * dh, 0, (size_t)dh * sizeof *to);
#if WORD_BF16
        else
            pair_rows(to + i / 2 * dh, selecting_row(w, row0 + i), i + 1 < n ? selecting_row(w, row0 + i + 1) : NULL,
                      dh);
#else
        else row_words(to + i * dh, selecting_row(w, row0 + i), dh);
#endif
}

/* dcarry of tile c of the list as the rows of tile I get it: none of dead keys (as forward listed them there), none
   beyond the list.  Returns whether there is any. */
static bool gather_dcarry(const carry_job *w, int64_t I, int64_t c, float *dcarry)
{
    const sel_attention *a = w->a;
    const int32_t *const keys = kept_keys(w) + c * TILE;
    const int64_t n = w->kept - c * TILE;
    bool any = false;

    for (int64_t j = 0; j < TILE; j++) dcarry[j] = j < n ? w->pack[w->p->dcarry + c * TILE + j] : 0.0f;
    if (!a->dead_after) return true;
    const float limit = a->dead_after[w->b] * (float)sqrt((double)a->dh);   /* raw, as the saved carries are */
    const float *const began = a->saved + (w->b * w->p->groups + I / w->p->group) * a->i1;
    for (int64_t j = 0; j < TILE && j < n; j++) {
        if (began[keys[j]] > limit) dcarry[j] = 0.0f;
        else any = true;
    }
    return any;
}

/* Gate of 8 keys from j0 on and the 32 queries from `lane` on. */
INLINE void gate_block(carry_job *w, gate_tile *t, const word *K, const word *Qt, const float *dcarry,
                       const int32_t *keys, int64_t row0, bool whole, int lane, int j0)
{
    const int64_t kw = w->a->dh / PAIR;
    const bool relu = w->a->relu;
    __mmask16 on[8][2];
    __m512 x[8][2];

    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        for (int v = 0; v < 2; v++) x[r][v] = _mm512_setzero_ps();
    sum_rows(0, 2, kw, K + j0 * kw, kw, 1, Qt + lane, TILE, &w->next, x);
    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        for (int v = 0; v < 2; v++) {
            on[r][v] = relu ? _mm512_cmp_ps_mask(x[r][v], _mm512_setzero_ps(), _CMP_GT_OQ) : (__mmask16)0xffff;
            if (!whole) on[r][v] &= sees(lane + v * V16, keys[j0 + r] + w->a->protect_self, row0);
        }
#if WORD_BF16
    #pragma GCC unroll 4
    for (int r = 0; r < 8; r += 2) {
        const __m512i low = _mm512_castps_si512(_mm512_set1_ps(dcarry[j0 + r]));       /* bfloat16's bits, high */
        const __m512i high = _mm512_castps_si512(_mm512_set1_ps(dcarry[j0 + r + 1]));
        const __m512i both_low = _mm512_or_si512(low, _mm512_srli_epi32(low, 16));
        const __m512i both_high = _mm512_or_si512(high, _mm512_srli_epi32(high, 16));
        word *const z = t->z + (j0 + r) * TILE_WORDS + lane / 2, *const zk = t->zk + (j0 + r) / 2 * TILE + lane;
        const __mmask32 on_low = _mm512_kunpackw(on[r][1], on[r][0]);
        const __mmask32 on_high = _mm512_kunpackw(on[r + 1][1], on[r + 1][0]);
        _mm512_storeu_si512(z, _mm512_maskz_mov_epi16(on_low, both_low));
        _mm512_storeu_si512(z + TILE_WORDS, _mm512_maskz_mov_epi16(on_high, both_high));
        for (int v = 0; v < 2; v++)
            _mm512_storeu_si512(zk + v * V16, _mm512_or_si512(_mm512_maskz_srli_epi32(on[r][v], low, 16),
                                                              _mm512_maskz_mov_epi32(on[r + 1][v], high)));
    }
#else
    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        for (int v = 0; v < 2; v++)
            _mm512_storeu_ps((float *)t->z + (j0 + r) * TILE + lane + v * V16,
                             _mm512_maskz_mov_ps(on[r][v], _mm512_set1_ps(dcarry[j0 + r])));
#endif
}

/* dL of tile c of the list in row tile I; `at`: its place among those that go together.  False: there is none. */
APART bool make_gate(carry_job *w, int64_t I, int64_t c, int at, gate_tile *t)
{
    const sel_attention *a = w->a;
    const int64_t row0 = a->i0 + I * w->p->height, left = w->kept - c * TILE, size = TILE * TILE_WORDS;
    const int32_t *const keys = kept_keys(w) + c * TILE;
    const int cols = (int)(left < TILE ? left : TILE), self = a->protect_self;
    const word *const K = (const word *)(w->pack + w->p->k) + c * TILE * a->dh / PAIR;
    float dcarry[TILE];
    int seen = 0;

    t->rows = rows_in(w, I);
    t->z = (word *)(w->scratch + w->p->z) + at * size;
    t->zk = WORD_BF16 ? (word *)(w->scratch + w->p->zk) + at * size : t->z;
    if (keys[0] + self > row0 + t->rows - 1 || !gather_dcarry(w, I, c, dcarry)) return false;
    for (int n = 0; n < TILE / 8; n++) {
        const int64_t last = row0 + (8 * n + 7 < t->rows ? 8 * n + 7 : t->rows - 1);
        const int64_t first = 8 * n < cols ? keys[8 * n] + self - row0 : TILE;
        while (seen < cols && keys[seen] + self <= last) seen++;
        t->seen[n] = seen;
        t->first[n] = (int)(first < 0 ? 0 : first < t->rows ? first : TILE);
    }
    const bool whole = keys[cols - 1] + self <= row0;
    for (int lane = 0; lane < t->rows; lane += 32)
        for (int j0 = 0; j0 < t->seen[lane / 8 + 3]; j0 += 8)
            gate_block(w, t, K, transposed_rows(w, I), dcarry, keys, row0, whole, lane, j0);
    return true;
}

/* A part of a sum of products over the words [from, to) of A [8][..] and B [..][dh]. */
typedef struct {
    const word *A, *B;
    int from, to;
} carry_part;

/* C [8][dh] += the sum of n parts; am, ak constant where inlined. */
INLINE void add_products(carry_job *w, int64_t am, int64_t ak, int n, const carry_part *part, float *C)
{
    const int64_t dh = w->a->dh;
    for (int64_t d = 0; d < dh; d += 32) {
        const int nv = d + V16 < dh ? 2 : 1;
        __m512 x[8][2];
        #pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
            for (int v = 0; v < 2; v++)
                x[r][v] = v < nv ? _mm512_loadu_ps(C + r * dh + d + v * V16) : _mm512_setzero_ps();
        for (int i = 0; i < n; i++) {
            const word *const A = part[i].A + part[i].from * ak, *const B = part[i].B + part[i].from * dh + d;
            if (part[i].to <= part[i].from) continue;
            if (nv == 2) sum_rows(0, 2, part[i].to - part[i].from, A, am, ak, B, dh, &w->next, x);
            else sum_rows(0, 1, part[i].to - part[i].from, A, am, ak, B, dh, &w->next, x);
        }
        #pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
            for (int v = 0; v < 2; v++)
                if (v < nv) _mm512_storeu_ps(C + r * dh + d + v * V16, x[r][v]);
    }
}

/* dK of a tile of keys from n row tiles. */
APART void add_keys(carry_job *w, int n, const gate_tile *const *t, const word *const *rows, float *dk)
{
    for (int j0 = 0; j0 < TILE; j0 += 8) {
        carry_part part[SIDE] = { { .A = NULL } };
        for (int i = 0; i < n; i++)
            part[i] = (carry_part){ .A = t[i]->z + j0 * TILE_WORDS, .B = rows[i], .from = t[i]->first[j0 / 8] / PAIR,
                                    .to = (t[i]->rows + PAIR - 1) / PAIR };
        add_products(w, TILE_WORDS, 1, n, part, dk + j0 * w->a->dh);
    }
}

/* dQ of a row tile from n tiles of keys. */
APART void add_rows(carry_job *w, int n, const gate_tile *const *t, const word *const *pairs, float *dq)
{
    for (int i0 = 0; i0 < t[0]->rows; i0 += 8) {
        carry_part part[SIDE] = { { .A = NULL } };
        for (int i = 0; i < n; i++)
            part[i] = (carry_part){ .A = t[i]->zk + i0, .B = pairs[i], .to = (t[i]->seen[i0 / 8] + PAIR - 1) / PAIR };
        add_products(w, 1, TILE, n, part, dq + i0 * w->a->dh);
    }
}

/* to [dh] += scale * the sum of n rows, `step` apart */
static void add_scaled(float *to, const float *from, int64_t step, int n, int64_t dh)
{
    const __m512 scale = _mm512_set1_ps((float)(1.0 / sqrt((double)dh)));
    for (int64_t d = 0; d < dh; d += V16) {
        __m512 sum = _mm512_loadu_ps(from + d);
        for (int i = 1; i < n; i++) sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + i * step + d));
        _mm512_storeu_ps(to + d, _mm512_fmadd_ps(scale, sum, _mm512_loadu_ps(to + d)));
    }
}

/* The tiles c0, c0 + 1 of the list: their dK, their part of every row's dQ. */
static void carry_columns(carry_job *w, int64_t c0)
{
    const sel_attention *a = w->a;
    const carry_plan *p = w->p;
    const selection_gradients to = attention_selection_gradients(a, w->g);
    const int64_t dh = a->dh, count = w->kept - c0 * TILE < TILE ? 1 : SIDE, size = TILE * dh;
    const word *const k_pairs = (const word *)(w->pack + (WORD_BF16 ? p->k_pairs : p->k));
    const word *const q_rows = (const word *)(w->pack + p->q_rows);
    float *const dK = w->scratch + p->dk, *const dQ = w->scratch + p->dq;

    memset(dK, 0, (size_t)(SIDE * size) * sizeof *dK);
    for (int64_t I0 = tile_seeing(w, kept_keys(w)[c0 * TILE]); I0 < p->tiles; I0 += SIDE) {
        gate_tile tiles[SIDE][SIDE];
        bool seen[SIDE][SIDE] = { { false } };
        for (int r = 0; r < SIDE && I0 + r < p->tiles; r++)
            for (int c = 0; c < count; c++)
                seen[r][c] = (c0 + c) * TILE < w->kept && make_gate(w, I0 + r, c0 + c, r * SIDE + c, &tiles[r][c]);
        for (int c = 0; c < count; c++) {
            const gate_tile *t[SIDE];
            const word *rows[SIDE];
            int n = 0;
            for (int r = 0; r < SIDE; r++)
                if (seen[r][c]) {
                    t[n] = &tiles[r][c];
                    rows[n++] = q_rows + (I0 + r) * size / PAIR;
                }
            if (n) add_keys(w, n, t, rows, dK + c * size);
        }
        for (int r = 0; r < SIDE; r++) {
            const gate_tile *t[SIDE];
            const word *pairs[SIDE];
            int n = 0;
            for (int c = 0; c < count; c++)
                if (seen[r][c]) {
                    t[n] = &tiles[r][c];
                    pairs[n++] = k_pairs + (c0 + c) * size / PAIR;
                }
            if (n) add_rows(w, n, t, pairs, dQ + (I0 + r) * size);
        }
    }
    for (int64_t n = c0 * TILE; n < w->kept && n < (c0 + SIDE) * TILE; n++)
        add_scaled(to.dk + w->b * to.dk_seq + kept_keys(w)[n] * to.dk_row, dK + (n - c0 * TILE) * dh, 0, 1, dh);
}

static void store_tile_rows(const carry_job *w, int64_t I, int threads)
{
    const selection_gradients to = attention_selection_gradients(w->a, w->g);
    float *const dq = to.dq + w->b * to.dq_seq + I * w->p->height * to.dq_row;
    for (int row = 0; row < rows_in(w, I); row++)
        add_scaled(dq + row * to.dq_row, w->scratch + w->p->dq + (I * TILE + row) * w->a->dh, w->p->thread_size,
                   threads, w->a->dh);
}

static void round_dcarry(const carry_job *w, int64_t c)
{
#if WORD_BF16
    float *const at = w->pack + w->p->dcarry + c * TILE;
    for (int64_t j = 0; j < TILE; j += V16) {
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(at + j));
        _mm512_storeu_si512(at + j, _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
#else
    (void)w, (void)c;
#endif
}

static void clear_rows_of(const carry_job *w)
{
    memset(w->scratch + w->p->dq, 0, (size_t)(w->p->tiles * TILE * w->a->dh) * sizeof(float));
}

static void carry_backward_words(const sel_attention *a, const sel_attention_grad *g)
{
    const carry_plan p = sel_attention_carry_plan(a, true);
    const int64_t whole = attention_whole(a);

    SEL_ASSERT(a->selective && a->window == 0 && (!a->dead_after || a->saved));
    if (!g->dcarry_in) return;
    #pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int64_t b = 0; b < whole; b++) {
        carry_job w = new_carry_job(a, g, &p, b, omp_get_thread_num(), omp_get_thread_num());
        w.kept = list_keys(&w);
        clear_rows_of(&w);
        for (int64_t I = 0; I < p.tiles; I++) pack_selecting_rows(&w, I);
        for (int64_t c = 0; c * TILE < w.kept; c++) {
            pack_listed(&w, c);
            round_dcarry(&w, c);
        }
        for (int64_t c = 0; c * TILE < w.kept; c += SIDE) carry_columns(&w, c);
        for (int64_t I = 0; I < p.tiles; I++) store_tile_rows(&w, I, 1);
    }
    for (int64_t b = whole; b < a->B; b++) {
        const carry_job first = new_carry_job(a, g, &p, b, 0, 0);
        const int64_t kept = list_keys(&first);
        #pragma omp parallel num_threads(a->threads)
        {
            const int thread = omp_get_thread_num(), threads = a->threads;
            carry_job w = new_carry_job(a, g, &p, b, thread, 0);
            w.kept = kept;
            clear_rows_of(&w);
            #pragma omp for schedule(static) nowait
            for (int64_t I = 0; I < p.tiles; I++) pack_selecting_rows(&w, I);
            #pragma omp for schedule(static)
            for (int64_t c = 0; c < (kept + TILE - 1) / TILE; c++) {
                pack_listed(&w, c);
                round_dcarry(&w, c);
            }
            /* Pairs of tiles dealt 0 .. T-1, T-1 .. 0: early ones are seen by more rows. */
            for (int64_t c = 0; c * TILE < kept; c += SIDE) {
                const int64_t k = c / SIDE % (2 * threads);
                if (k == thread || k == 2 * threads - 1 - thread) carry_columns(&w, c);
            }
            #pragma omp barrier
            #pragma omp for schedule(static)
            for (int64_t I = 0; I < p.tiles; I++) store_tile_rows(&first, I, threads);
        }
    }
}

#endif
