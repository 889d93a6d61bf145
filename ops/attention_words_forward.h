/* attention_words_forward.h: the forward pass for AVX-512 (attention_words.h); included once a kernel file.
 *
 * Products run near the processor's peak while their operands are in cache, so what matters is that they are: while a
 * tile is worked on the next one's operands are fetched, a few lines every few products (fetch_queue).  bfloat16 packs
 * the keys tile by tile, each as the first row tile that sees it comes to it.
 */
#ifndef SEL_OPS_ATTENTION_WORDS_FORWARD_H
#define SEL_OPS_ATTENTION_WORDS_FORWARD_H

#include <omp.h>
#include "ops/attention_words_tile.h"

typedef struct {
    const sel_attention *a;
    const words_plan *p;
    int64_t b;                /* sequence */
    float *scratch;           /* this thread's */
    float *pack;              /* this sequence's packed operands, as far as this thread met them */
    int64_t packed;           /* column tiles that are there; each row tile packs the keys that are new in it */
    tile_room room;
    double m_max;             /* the memory loss's largest M so far, and its row */
    int64_t m_row;
    double live;              /* pairs of a row and a live key so far */
    bool around;              /* out goes around the caches */
} forward_job;

/* Whether results whose rows begin at x, strides in values of so many bytes, are to go around the caches,
   which do not keep all of them until they are read: a line that is stored in part would be read first. */
static bool goes_around(const sel_attention *a, const void *x, int64_t seq, int64_t row, int64_t bytes)
{
    enum { KEPT = 1 << 22, LINE = 64 };   /* bytes */
    return a->B * (a->i1 - a->i0) * a->heads * a->dh * bytes >= KEPT && (uintptr_t)x % LINE == 0 &&
           seq * bytes % LINE == 0 && row * bytes % LINE == 0 && a->dh * bytes % LINE == 0;
}

INLINE void store_result(float *at, __m512 x, bool around)
{
    if (around) _mm512_stream_ps(at, x);
    else _mm512_storeu_ps(at, x);
}

/* What goes around the caches is there for other threads. */
static void end_results(bool around)
{
    if (around) _mm_sfence();
}

/* bfloat16 packs all keys and values, tile by tile for each kv-head, float32 the last, incomplete tile only. */
static bool in_pack(const forward_job *w, int64_t J) { return WORD_BF16 || (J + 1) * TILE > w->a->i1; }

/* Where in the packs of keys and of values a tile lies, in words. */
static int64_t pack_place(const forward_job *w, int64_t kh, int64_t J)
{
    return (WORD_BF16 ? kh * w->p->columns + J : kh) * TILE * w->a->dh / PAIR;
}

static key_tile keys_of(const forward_job *w, int64_t kh, int64_t J)
{
    const sel_attention *a = w->a;
    const int64_t at = pack_place(w, kh, J);
    if (in_pack(w, J))
        return (key_tile){ .k = (const word *)(w->pack + w->p->k) + at, .k_row = a->dh / PAIR,
                           .v = (const word *)(w->pack + w->p->v) + at, .v_row = a->dh };
    return (key_tile){ .k = (const word *)(operands(a->k) + w->b * a->k_seq + J * TILE * a->k_row + kh * a->dh),
                       .v = (const word *)(operands(a->v) + w->b * a->v_seq + J * TILE * a->v_row + kh * a->dh),
                       .k_row = a->k_row, .v_row = a->v_row };
}

/* The keys that S is made of, without values: head 0's, or sel_k, packed as the others. */
static key_tile selecting_keys(const forward_job *w, int64_t J)
{
    const sel_attention *a = w->a;
    if (!attention_bilinear(a)) return keys_of(w, 0, J);
    if (in_pack(w, J))
        return (key_tile){ .k = (const word *)(w->pack + w->p->sel_k) + (WORD_BF16 ? J : 0) * TILE * a->dh / PAIR,
                           .k_row = a->dh / PAIR };
    return (key_tile){ .k = (const word *)(operands(a->sel_k) + w->b * a->sel_k_seq + J * TILE * a->sel_k_row),
                       .k_row = a->sel_k_row };
}

/* Packs column tile J of sel_k. */
static void pack_selecting(const forward_job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const int64_t n = a->dh / PAIR;
    word *const K = (word *)(w->pack + w->p->sel_k) + (WORD_BF16 ? J : 0) * TILE * n;
    for (int64_t j = 0; j < TILE; j++)
        if (J * TILE + j < a->i1)
            row_words(K + j * n, operands(a->sel_k) + w->b * a->sel_k_seq + (J * TILE + j) * a->sel_k_row, a->dh);
        else memset(K + j * n, 0, (size_t)n * sizeof *K);
}

/* Packs column tile J of the kv-heads [kh0, kh1), row by row: they lie side by side in memory; with the first of them
   what S is made of. */
static void pack_keys(const forward_job *w, int64_t kh0, int64_t kh1, int64_t J)
{
    const sel_attention *a = w->a;
    const int64_t n = a->dh, j0 = J * TILE;
    const operand *const k = operands(a->k) + w->b * a->k_seq + j0 * a->k_row;
    const operand *const v = operands(a->v) + w->b * a->v_seq + j0 * a->v_row;
    const int cols = (int)(a->i1 - j0 < TILE ? a->i1 - j0 : TILE);

    if (!in_pack(w, J)) return;
    if (kh0 == 0 && attention_bilinear(a)) pack_selecting(w, J);
    for (int j = 0; j < TILE; j += PAIR)
        for (int64_t kh = kh0; kh < kh1; kh++) {
            word *const K = (word *)(w->pack + w->p->k) + pack_place(w, kh, J) + j * n / PAIR;
            word *const V = (word *)(w->pack + w->p->v) + pack_place(w, kh, J) + j / PAIR * n;
            for (int c = 0; c < PAIR; c++) {
                if (j + c < cols) row_words(K + c * n / PAIR, k + (j + c) * a->k_row + kh * n, n);
                else memset(K + c * n / PAIR, 0, (size_t)(n / PAIR) * sizeof *K);
            }
            if (j >= cols) memset(V, 0, (size_t)n * sizeof *V);
#if WORD_BF16
            else pair_rows(V, v + j * a->v_row + kh * n, j + 1 < cols ? v + (j + 1) * a->v_row + kh * n : NULL, n);
#else
            else row_words(V, v + j * a->v_row + kh * n, n);
#endif
        }
}

/* A row tile: rows from position row0 on, which see the column tiles [J0, J1); those from `fresh` on are not packed. */
typedef struct {
    int64_t I, row0, J0, J1, fresh;
    int rows;
} row_tile;

static row_tile row_tile_of(const forward_job *w, int64_t I)
{
    const sel_attention *a = w->a;
    const int64_t row0 = a->i0 + I * TILE, end = row0 + TILE < a->i1 ? row0 + TILE : a->i1;
    const int64_t oldest = a->window && row0 >= a->window ? row0 - a->window + 1 : 0;
    return (row_tile){ .I = I, .row0 = row0, .rows = (int)(end - row0), .J0 = oldest / TILE,
                       .J1 = (end + TILE - 1) / TILE,
                       .fresh = w->packed };
}

/* Column tiles are visited in rising order, with a window in falling order: the first one must have keys that all rows
   see, or m starts too low. */
static int64_t visited(const forward_job *w, const row_tile *t, int64_t n)
{
    return w->a->window ? t->J1 - 1 - n : t->J0 + n;
}

/* Q^T, O^T, m and l are kept of all heads where they are visited more than once, else of one. */
static int64_t slot(const forward_job *w, int64_t h) { return w->p->slots > 1 ? h : 0; }

static head_rows rows_of(const forward_job *w, int64_t h)
{
    const int64_t size = w->a->dh * TILE, at = slot(w, h);
    float *const m = w->scratch + w->p->ml + 2 * at * TILE;
    return (head_rows){ .q = (const word *)(w->scratch + w->p->qt) + at * size / PAIR,
                        .o = w->scratch + w->p->ot + at * size, .m = m, .l = m + TILE };
}

/* Where Q^T of a head lies.  There is room for two: the next head's is made before this head's results are written. */
static word *qt_of(const forward_job *w, int64_t h)
{
    return (word *)(w->scratch + w->p->qt) + (w->p->slots > 1 ? h : h % 2) * w->a->dh * TILE / PAIR;
}

static const operand *q_of(const forward_job *w, const row_tile *t, int64_t h)
{
    return operands(w->a->q) + w->b * w->a->q_seq + (t->row0 - w->a->i0) * w->a->q_row + h * w->a->dh;
}
static operand *out_of(const forward_job *w, const row_tile *t, int64_t h)
{
    return (operand *)w->a->out + w->b * w->a->out_seq + (t->row0 - w->a->i0) * w->a->out_row + h * w->a->dh;
}

/* Q^T of the rows that S is made of: head 0's, or sel_q. */
static void transpose_selecting(const forward_job *w, const row_tile *t, word *Qt)
{
    const sel_attention *a = w->a;
    if (attention_bilinear(a))
        transpose_words(Qt, operands(a->sel_q) + w->b * a->sel_q_seq + (t->row0 - a->i0) * a->sel_q_row, a->sel_q_row,
                        t->rows, a->dh);
    else transpose_words(Qt, q_of(w, t, 0), a->q_row, t->rows, a->dh);
}

static void fetch_keys(forward_job *w, const row_tile *t, int64_t h, int64_t n)
{
    const sel_attention *a = w->a;
    const int64_t J = visited(w, t, n), kh = h * a->kv_heads / a->heads, bytes = a->dh * (int64_t)sizeof(operand);
    fetch_queue *const q = &w->room.next;
    if (WORD_BF16 && J < t->fresh) {
        const key_tile keys = keys_of(w, kh, J);
        fetch_rows(q, keys.v, CHUNK, TILE * bytes / CHUNK, CHUNK);
        fetch_rows(q, keys.k, CHUNK, TILE * bytes / CHUNK, CHUNK);
    } else {
        const int64_t rows = a->i1 - J * TILE < TILE ? a->i1 - J * TILE : TILE;
        if (WORD_BF16) {   /* and where they will be packed */
            const key_tile to = keys_of(w, kh, J);
            fetch_rows(q, to.v, CHUNK, TILE * bytes / CHUNK, CHUNK);
            fetch_rows(q, to.k, CHUNK, TILE * bytes / CHUNK, CHUNK);
        }
        fetch_operands(q, operands(a->v) + w->b * a->v_seq + J * TILE * a->v_row + kh * a->dh, a->v_row, rows, a->dh);
        fetch_operands(q, operands(a->k) + w->b * a->k_seq + J * TILE * a->k_row + kh * a->dh, a->k_row, rows, a->dh);
    }
}

/* Asks for what comes after tile n of head h in the super-block [n0, n1) of a row tile: the keys of the next tile, and
   in good time the next head's rows. */
static void fetch_next(forward_job *w, const row_tile *t, int64_t h, int64_t n, int64_t n0, int64_t n1)
{
    const sel_attention *a = w->a;
    const int64_t bytes = a->dh * 4, count = t->J1 - t->J0;
    const bool same_tile = h + 1 < a->heads || n1 < count, more = same_tile || t->I + 1 < w->p->tiles;
    row_tile after = same_tile ? *t : row_tile_of(w, t->I + 1);
    const int64_t next_h = h + 1 < a->heads ? h + 1 : 0, next_n = h + 1 < a->heads ? n0 : n1 < count ? n1 : 0;
    fetch_queue *const q = &w->room.next;

    if (!same_tile && t->J1 > after.fresh) after.fresh = t->J1;
    if (n == n0) q->n = 0;
    if (n == n0 && more) {
        const head_rows r = rows_of(w, next_h);
        if (next_n == 0) {
            fetch_operands(q, q_of(w, &after, next_h), a->q_row, after.rows, a->dh);
        } else {
            fetch_rows(q, r.o, CHUNK, TILE * bytes / CHUNK, CHUNK);
            fetch_rows(q, r.q, CHUNK, TILE * bytes / PAIR / CHUNK, CHUNK);
        }
    }
    if (n + 1 < n1) fetch_keys(w, t, h, n + 1);
    else if (more) fetch_keys(w, &after, next_h, next_n);
}

/* log2(x) of positive floats, to float's rounding: x = 2^e f with f in [3/4, 3/2), and with s = (f - 1) / (f + 1)
   log2(f) = 2 / ln 2 (s + s^3 / 3 + s^5 / 5 + ...), |s| <= 1/5. */
INLINE __m512 log2_ps(__m512 x, __m512 *e)
{
    const __m512 one = _mm512_set1_ps(1.0f), f = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    const __m512 s = _mm512_div_ps(_mm512_sub_ps(f, one), _mm512_add_ps(f, one)), s2 = _mm512_mul_ps(s, s);
    __m512 p = _mm512_set1_ps((float)(2.0 / 11.0 / LN2));
    p = _mm512_fmadd_ps(p, s2, _mm512_set1_ps((float)(2.0 / 9.0 / LN2)));
    p = _mm512_fmadd_ps(p, s2, _mm512_set1_ps((float)(2.0 / 7.0 / LN2)));
    p = _mm512_fmadd_ps(p, s2, _mm512_set1_ps((float)(2.0 / 5.0 / LN2)));
    p = _mm512_fmadd_ps(p, s2, _mm512_set1_ps((float)(2.0 / 3.0 / LN2)));
    p = _mm512_fmadd_ps(p, s2, _mm512_set1_ps((float)(2.0 / LN2)));
    *e = _mm512_getexp_ps(_mm512_div_ps(x, f));   /* exact: a power of two */
    return _mm512_mul_ps(p, s);
}

/* 16 words of 16 queries, a vector each, of the columns from o on of O^T, times `scale`; half: 8, and zeros. */
INLINE void output_words(__m512i x[16], const float *o, __m512 scale, bool half)
{
    #pragma GCC unroll 16
    for (int k = 0; k < 16; k++) {
        const float *const at = o + k * PAIR * TILE;
        if (WORD_BF16 && half && k >= 8) {
            x[k] = _mm512_setzero_si512();
            continue;
        }
        const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(at), scale);
#if WORD_BF16
        const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(at + TILE), scale);
        x[k] = weave_halves((__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
        x[k] = _mm512_castps_si512(low);
#endif
    }
}

INLINE void store_words(operand *to, __m512i x, bool half, bool around)
{
    if (half) _mm256_storeu_si256((__m256i *)(void *)to, _mm512_castsi512_si256(x));
    else if (around) _mm512_stream_si512((void *)to, x);
    else _mm512_storeu_si512(to, x);
}

/* out and lse of one head of a row tile.  Without dead keys whole tiles always go around the caches: rows that have to
   be read first, and then wait for a place among operands, cost more than the products of a quarter tile. */
static void finish_rows(const forward_job *w, const row_tile *t, int64_t h)
{
    const sel_attention *a = w->a;
    const head_rows r = rows_of(w, h);
    operand *const out = out_of(w, t, h);
    float *const lse = a->lse + (w->b * a->heads + h) * w->p->rows + t->row0 - a->i0;
    const bool around = w->around || (!a->dead_after && t->rows == TILE &&
                                      ((uintptr_t)out | (uintptr_t)a->out_row * sizeof *out) % 64 == 0);

    for (int i0 = 0; i0 < t->rows; i0 += V16) {
        const int n = t->rows - i0 < V16 ? t->rows - i0 : V16;
        const __m512 l = _mm512_loadu_ps(r.l + i0), inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), l);
        __m512 e;
        const __m512 f = log2_ps(l, &e);
        for (int half = 0; half < 2; half++) {   /* in float64: m + e + f in float would be rounded at the size of m */
            const __m256 m4 = _mm256_loadu_ps(r.m + i0 + 8 * half);
            const __m256 e4 = half ? _mm512_extractf32x8_ps(e, 1) : _mm512_castps512_ps256(e);
            const __m256 f4 = half ? _mm512_extractf32x8_ps(f, 1) : _mm512_castps512_ps256(f);
            const __m512d log2_l = _mm512_add_pd(_mm512_cvtps_pd(e4), _mm512_cvtps_pd(f4));
            const __m512d sum = _mm512_add_pd(_mm512_cvtps_pd(m4), log2_l);
            const int count = n - 8 * half;
            const __mmask8 real = (__mmask8)(count >= 8 ? 0xff : count <= 0 ? 0 : 0xff >> (8 - count));
            _mm256_mask_storeu_ps(lse + i0 + 8 * half, real, _mm512_cvtpd_ps(_mm512_mul_pd(sum, _mm512_set1_pd(LN2))));
        }
        for (int64_t d = 0; d < a->dh; d += V16 * PAIR) {
            const bool half = a->dh - d < V16 * PAIR;
            operand *const to = out + i0 * a->out_row + d;
            __m512i x[16];
            output_words(x, r.o + d * TILE + i0, inverse, half);
            transpose_registers(x);
            if (around && n == V16 && !half) {
                #pragma GCC unroll 16
                for (int i = 0; i < 16; i++) _mm512_stream_si512((void *)(to + i * a->out_row), x[i]);
            } else {
                #pragma GCC unroll 16
                for (int i = 0; i < 16; i++)
                    if (i < n) store_words(to + i * a->out_row, x[i], half, around);
            }
        }
    }
    if (!a->dead_after && h == a->heads - 1) end_results(t->rows == TILE);   /* some heads streamed, if not this */
}

/* Logits of a tile, plain, [j][TILE], where they are seen. */
static void raw_logits(const tile_room *t, const key_tile *keys, const word *Qt, const tile_view *view, float *raw)
{
    for (int lane = 0; lane < view->lanes; lane += 32) {
        const int first = first_block(view, lane), end = end_block(view, lane + V16);
        product_32((end - first) * 8, t->dh / PAIR, keys->k + first * 8 * keys->k_row, keys->k_row, 1, Qt + lane, TILE,
                   raw + first * 8 * TILE + lane, TILE, true);
    }
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

/* One row tile, all heads; carry [i1] moves on past its rows. */
static void forward_tile(forward_job *w, int64_t I, float *carry)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const row_tile t = row_tile_of(w, I);
    const int64_t group = a->heads / a->kv_heads, count = t.J1 - t.J0;
    float *const raw = w->scratch + p->raw, *const F = w->scratch + p->f;
    double rowsum[TILE] = { 0 };
    const bool memory = a->selective && a->tau > 0.0, bilinear = attention_bilinear(a);
    word *const sel_qt = (word *)(w->scratch + p->sel_qt);

    if (bilinear) transpose_selecting(w, &t, sel_qt);
    transpose_words(qt_of(w, 0), q_of(w, &t, 0), a->q_row, t.rows, a->dh);
    for (int64_t n0 = 0; n0 < count; n0 += SUPER) {
        const int64_t n1 = n0 + SUPER < count ? n0 + SUPER : count;
        for (int64_t h = 0; h < a->heads; h++) {
            head_rows rows = rows_of(w, h);
            rows.q = qt_of(w, h);
            for (int64_t n = n0; n < n1; n++) {
                const int64_t J = visited(w, &t, n), col0 = J * TILE, off = t.row0 - col0;
                const tile_view view = view_of(off, a->window, t.rows);
                const key_tile keys = keys_of(w, h / group, J);
                const int cols = (int)(a->i1 - col0 < TILE ? a->i1 - col0 : TILE);
                float *const NF = F + (n - n0) * TILE * TILE;

                if (J >= t.fresh && h % group == 0) pack_keys(w, h / group, h / group + 1, J);
                fetch_next(w, &t, h, n, n0, n1);
                if (h == 0) {
                    const key_tile own = selecting_keys(w, J);
                    raw_logits(&w->room, &own, bilinear ? sel_qt : rows.q, &view, raw);
                    if (a->selective) {
                        select_words(a, raw, NF, carry + col0, t.rows, cols, view.lanes, col0, off);
                        if (memory) add_forgotten(NF, t.rows, cols, off, a->tau * sqrt((double)a->dh), rowsum);
                    }
                    if (bilinear) raw_logits(&w->room, &keys, rows.q, &view, raw);
                }
                attend_tile(&w->room, &keys, &rows, &view, h == 0 ? raw : NULL, a->selective ? NF : NULL, n == 0);
            }
            if (n0 == 0 && h + 1 < a->heads)
                transpose_words(qt_of(w, h + 1), q_of(w, &t, h + 1), a->q_row, t.rows, a->dh);
            if (n1 == count) finish_rows(w, &t, h);
        }
    }
    if (t.J1 > w->packed) w->packed = t.J1;
    for (int i = 0; memory && i < t.rows; i++) {
        const double needed = (double)(t.row0 + i + 1) - rowsum[i];
        if (needed > w->m_max || (needed == w->m_max && t.row0 + i < w->m_row)) {
            w->m_max = needed;
            w->m_row = t.row0 + i;
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
static void end_carry(const forward_job *w, const float *carry)
{
    const sel_attention *a = w->a;
    const float root = (float)sqrt((double)a->dh);
    for (int64_t j = 0; a->carry_out && j < a->i1; j++) a->carry_out[w->b * a->carry_seq + j] = carry[j] / root;
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
    float *const scratch = base + p->thread0 + thread * p->thread_size;
    return (forward_job){ .a = a, .p = p, .b = b, .scratch = scratch, .pack = base + p->pack0 + set * p->pack_size,
                          .room = { .dh = a->dh, .scale = (float)(LOG2E / sqrt((double)a->dh)),
                                    .p = (word *)(scratch + p->p), .redo = scratch + p->redo, .wait.done = PAIRS },
                          .m_max = -INFINITY, .m_row = INT64_MAX };
}

/* A whole sequence by one thread. */
static void forward_sequence(forward_job *w)
{
    float *const carry = w->scratch + w->p->carry;

    if (w->a->selective) start_carry(w, carry, 0, w->a->i1);
    for (int64_t I = 0; I < w->p->tiles; I++) {
        if (w->a->selective && w->a->saved && I % w->p->group == 0)
            memcpy(group_carry(w, I / w->p->group), carry, (size_t)w->a->i1 * sizeof *carry);
        forward_tile(w, I, carry);
    }
    if (w->a->selective) end_carry(w, carry);
    store_memory(w);
}

/* The carries of one column tile at the start of every group of row tiles, from the selection alone.  What the last
   group of rows adds no other group needs. */
static void carry_column(const forward_job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t j0 = J * TILE, j1 = j0 + TILE < a->i1 ? j0 + TILE : a->i1;
    float *const carry = w->scratch + p->carry, *const raw = w->scratch + p->raw, *const F = w->scratch + p->f;
    word *const Qt = (word *)(w->scratch + p->qt);
    const key_tile keys = selecting_keys(w, J);

    start_carry(w, carry, j0, j1);
    for (int64_t I = 0; I <= (p->groups - 1) * p->group; I++) {
        const row_tile t = row_tile_of(w, I);
        const int64_t off = t.row0 - j0;
        const tile_view view = view_of(off, a->window, t.rows);
        float *const kept = group_carry(w, I / p->group) + j0;

        if (I % p->group == 0) memcpy(kept, carry + j0, (size_t)(j1 - j0) * sizeof *carry);
        if (J < t.J0 || J >= t.J1 || I == (p->groups - 1) * p->group) continue;
        transpose_selecting(w, &t, Qt);
        raw_logits(&w->room, &keys, Qt, &view, raw);
        select_words(a, raw, F, carry + j0, t.rows, (int)(j1 - j0), view.lanes, j0, off);
    }
}

/* One sequence by all threads: carries of all groups first, then the groups are independent.  A few threads pack the
   keys each for itself: beside products that takes less time than all together take before them, waiting for memory.
   Of many each would pack most keys for a few rows. */
static void forward_shared(const sel_attention *a, const words_plan *p, int64_t b)
{
    const bool apart = a->threads <= MOST_PACKS;
    forward_job best = new_forward_job(a, p, b, 0, 0);
    #pragma omp parallel num_threads(a->threads)
    {
        forward_job w = new_forward_job(a, p, b, omp_get_thread_num(), apart ? omp_get_thread_num() : 0);
        float *const carry = w.scratch + p->carry;

        #pragma omp for schedule(dynamic, 1)
        for (int64_t J = 0; J < p->columns; J++) {
            if (!apart) pack_keys(&w, 0, a->kv_heads, J);
            else if (a->selective) pack_keys(&w, 0, 1, J);
            if (a->selective) carry_column(&w, J);
        }
        if (!apart) w.packed = p->columns;
        #pragma omp for schedule(dynamic, 1)
        for (int64_t k = 0; k < p->groups; k++) {   /* later groups see more keys: the dearest first */
            const int64_t g = p->groups - 1 - k;
            if (apart && a->window) w.packed = 0;   /* those before the last group's windows are not there */
            if (a->selective) memcpy(carry, group_carry(&w, g), (size_t)a->i1 * sizeof *carry);
            for (int64_t I = g * p->group; I < p->tiles && I < (g + 1) * p->group; I++) forward_tile(&w, I, carry);
            if (a->selective && g == p->groups - 1) end_carry(&w, carry);
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
