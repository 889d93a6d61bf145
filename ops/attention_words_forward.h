/* attention_words_forward.h: the forward pass for AVX-512 (attention_words.h); included once a kernel file.
 *
 * Products run near the processor's peak while their operands are in cache, so what matters is that they are: while a
 * tile is worked on the next one's operands are fetched, a few lines every few products (fetch_queue).  bfloat16 packs
 * the keys tile by tile, each as the first row tile that sees it comes to it.
 */
#ifndef SEL_OPS_ATTENTION_WORDS_FORWARD_H
#define SEL_OPS_ATTENTION_WORDS_FORWARD_H

#include <omp.h>
#include "ops/attention_words.h"

/* ---- one tile of one head: knows its operands, not where in a sequence they lie ---- */

/* Memory that comes next, fetched into cache a few lines at a time while products run: CHUNK bytes of one row, or half
   as many of each of two. */
enum { CHUNK = 256, RANGES = 96 };

typedef struct {
    struct {
        const char *at;
        int64_t half;        /* bytes from the first half of a chunk to the second */
        int64_t stride;      /* and to the next chunk */
        int64_t chunks;
    } list[RANGES];          /* the last one goes first */
    int n;
} fetch_queue;

INLINE void fetch_some(fetch_queue *q)
{
    if (!q->n) return;
    const char *const at = q->list[q->n - 1].at, *const half = at + q->list[q->n - 1].half;
    for (int line = 0; line < CHUNK / 2; line += 64) _mm_prefetch(at + line, _MM_HINT_T0);
    for (int line = 0; line < CHUNK / 2; line += 64) _mm_prefetch(half + line, _MM_HINT_T0);
    q->list[q->n - 1].at += q->list[q->n - 1].stride;
    if (--q->list[q->n - 1].chunks == 0) q->n--;
}

/* Asks for `rows` rows of `width` bytes, before all that was asked for earlier.  What has no room is not fetched. */
static void fetch_rows(fetch_queue *q, const void *at, int64_t stride, int64_t rows, int64_t width)
{
    const bool narrow = width <= CHUNK / 2;
    for (int64_t x = 0; rows > 0 && x < width && q->n < RANGES; x += CHUNK, q->n++) {
        q->list[q->n].at = (const char *)at + x;
        q->list[q->n].half = narrow ? stride : CHUNK / 2;
        q->list[q->n].stride = narrow ? 2 * stride : stride;
        q->list[q->n].chunks = narrow ? (rows + 1) / 2 : rows;
    }
}

/* The same of `rows` rows of n operands, so many values apart. */
static void fetch_operands(fetch_queue *q, const operand *at, int64_t row, int64_t rows, int64_t n)
{
    fetch_rows(q, at, row * (int64_t)sizeof *at, rows, n * (int64_t)sizeof *at);
}

/* Rows of one head: Q^T [dh / PAIR][TILE], O^T [dh][TILE], m and l [TILE]. */
typedef struct {
    const word *q;
    float *o, *m, *l;
} head_rows;

/* Keys and values of one head: k [TILE][dh / PAIR], v [TILE_WORDS][dh]; strides in words. */
typedef struct {
    const word *k, *v;
    int64_t k_row, v_row;
} key_tile;

/* 8 keys and 32 queries (v0 = 1: the upper 16 of them) whose P is taken while the next ones' logits are summed.  For
   bfloat16, where products are half as long; float32 takes P at once, which costs it no more. */
typedef struct {
    float x[8 * 32] __attribute__((aligned(64)));   /* their logits less F */
    const float *m;
    word *p;                 /* where P goes */
    __m512 *sums;            /* [2] grow by P's */
    int v0, done;            /* pairs of keys and 16 queries that are done, of PAIRS */
} waiting_block;
enum { PAIRS = 8 };

/* What a thread works with. */
typedef struct {
    int64_t dh;
    float scale;             /* log2(e) / sqrt(dh) */
    word *p;                 /* P [TILE_WORDS][TILE] */
    float *redo;             /* [TILE][TILE] */
    fetch_queue next;
    waiting_block wait;
} tile_room;

/* P of two keys (a row of pairs, for bfloat16), 16 queries. */
INLINE void store_pair(word *P, __m512 a, __m512 b)
{
#if WORD_BF16
    _mm512_storeu_si512(P, weave_halves((__m512i)_mm512_cvtne2ps_pbh(b, a)));
#else
    _mm512_storeu_ps((float *)P, a);
    _mm512_storeu_ps((float *)P + TILE, b);
#endif
}

/* acc[r][v] += sum over words k in [0, K) of A[r am + k ak] * B[k TILE + 16 v ..] for v0 <= v < 2; K a multiple of
   8 / PAIR. */
INLINE void sum_words(const int v0, int64_t K, const word *A, int64_t am, int64_t ak, const word *B, fetch_queue *next,
                      __m512 acc[8][2])
{
    for (int64_t k = 0; k < K; k += 8 / PAIR) {
        fetch_some(next);
        #pragma GCC unroll 8
        for (int s = 0; s < 8 / PAIR; s++) {
            __m512i b[2];
            for (int v = v0; v < 2; v++) b[v] = _mm512_loadu_si512(B + (k + s) * TILE + v * V16);
            #pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                const __m512i x = _mm512_set1_epi32((int)A[r * am + (k + s) * ak]);
                for (int v = v0; v < 2; v++) acc[r][v] = dot(acc[r][v], x, b[v]);
            }
        }
    }
}

INLINE void hide_unseen(const int v0, __m512 x[8][2], const tile_view *view, int lane, int j0)
{
    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        #pragma GCC unroll 2
        for (int v = v0; v < 2; v++)
            x[r][v] = _mm512_mask_blend_ps(in_view(view, lane + v * V16, j0 + r), _mm512_set1_ps(HIDDEN), x[r][v]);
}

/* P of a pair of keys from their logits less F. */
INLINE void exponentiate_pair(__m512 x0, __m512 x1, __m512 c, __m512 m, __m512 *sum, word *P)
{
    const __m512 p0 = exp2_ps(_mm512_fmsub_ps(x0, c, m)), p1 = exp2_ps(_mm512_fmsub_ps(x1, c, m));
    *sum = _mm512_add_ps(*sum, _mm512_add_ps(p0, p1));
    store_pair(P, p0, p1);
}

/* P of the next n pairs of keys of the waiting block. */
INLINE void exponentiate(waiting_block *b, float scale, int n)
{
    for (int end = b->done + n < PAIRS ? b->done + n : PAIRS; b->done < end; b->done++) {
        const int r = b->done / 2 * 2, v = b->done % 2;
        const float *const x = b->x + r * 32 + v * V16;
        if (v < b->v0) continue;
        exponentiate_pair(_mm512_load_ps(x), _mm512_load_ps(x + 32), _mm512_set1_ps(scale),
                          _mm512_loadu_ps(b->m + v * V16), &b->sums[v], b->p + r / PAIR * TILE + v * V16);
    }
}

/* 8 keys from j0 on for the lanes from `lane` on, 32 or with v0 = 1 the upper 16 of them: P at once, or their logits
   while P of those that wait is taken; then these wait.  sums [2] grow by P's sums. */
INLINE void logits_block(const int v0, tile_room *t, const key_tile *keys, const head_rows *rows,
                         const tile_view *view, const float *raw, const float *NF, int lane, int j0, bool start,
                         __m512 sums[2])
{
    enum { STEP = 8 / PAIR };
    const int64_t K = t->dh / PAIR;
    const int each = (int)((PAIRS * STEP + K - 1) / K);
    const bool now = raw || !WORD_BF16;   /* P at once */
    waiting_block *const wait = &t->wait;
    __m512 x[8][2];

    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        #pragma GCC unroll 2
        for (int v = v0; v < 2; v++) {
            const int at = (j0 + r) * TILE + lane + v * V16;
            x[r][v] = NF ? _mm512_loadu_ps(NF + at) : _mm512_setzero_ps();
            if (raw) x[r][v] = _mm512_add_ps(x[r][v], _mm512_loadu_ps(raw + at));
        }
    const word *A = keys->k + j0 * keys->k_row, *B = rows->q + lane;
    if (!raw && now) sum_words(v0, K, A, keys->k_row, 1, B, &t->next, x);
    for (int64_t k = 0; !now && k < K; k += STEP, A += STEP, B += STEP * TILE) {
        sum_words(v0, STEP, A, keys->k_row, 1, B, &t->next, x);
        #pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
            for (int v = v0; v < 2; v++) HERE(x[r][v]);
        exponentiate(wait, t->scale, each);
    }
    if (lane + v0 * V16 + view->off < j0 + 7 || lane + 31 + view->low > j0) hide_unseen(v0, x, view, lane, j0);
    if (start)
        #pragma GCC unroll 2
        for (int v = v0; v < 2; v++) {
            __m512 top = x[0][v];
            #pragma GCC unroll 8
            for (int r = 1; r < 8; r++) top = _mm512_max_ps(top, x[r][v]);
            _mm512_storeu_ps(rows->m + lane + v * V16, _mm512_mul_ps(_mm512_set1_ps(t->scale), top));
        }
    if (now) {
        word *const P = t->p + j0 / PAIR * TILE + lane;
        #pragma GCC unroll 4
        for (int r = 0; r < 8; r += 2)
            #pragma GCC unroll 2
            for (int v = v0; v < 2; v++)
                exponentiate_pair(x[r][v], x[r + 1][v], _mm512_set1_ps(t->scale),
                                  _mm512_loadu_ps(rows->m + lane + v * V16), &sums[v], P + r / PAIR * TILE + v * V16);
        return;
    }
    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        #pragma GCC unroll 2
        for (int v = v0; v < 2; v++) _mm512_store_ps(wait->x + r * 32 + v * V16, x[r][v]);
    wait->m = rows->m + lane;
    wait->p = t->p + j0 / PAIR * TILE + lane;
    wait->sums = sums;
    wait->v0 = v0;
    wait->done = 0;
}

/* O^T [dh][32] (+)= V^T P over the words [w0, w1) of P, for the upper 16 lanes over [w0, w2). */
INLINE void values_half(tile_room *t, const key_tile *keys, float *O, int lane, int w0, int w1, int w2, bool fresh)
{
    const word *const V = keys->v + w0 * keys->v_row, *const V1 = keys->v + w1 * keys->v_row;
    for (int64_t d = 0; d < t->dh; d += 8) {
        __m512 o[8][2];
        #pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
            for (int v = 0; v < 2; v++)
                o[r][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(O + (d + r) * TILE + lane + v * V16);
        sum_words(0, w1 - w0, V + d, 1, keys->v_row, t->p + w0 * TILE + lane, &t->next, o);
        if (w2 > w1) sum_words(1, w2 - w1, V1 + d, 1, keys->v_row, t->p + w1 * TILE + lane, &t->next, o);
        #pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
            for (int v = 0; v < 2; v++) _mm512_storeu_ps(O + (d + r) * TILE + lane + v * V16, o[r][v]);
    }
}

/* P of 32 lanes again, blocks [first, end), with their true maximum, when the lazy one let the sums grow too large: m
   rises, l and O of the head shrink by the same factor. */
static void redo_half(tile_room *t, const key_tile *keys, const head_rows *rows, const tile_view *view,
                      const float *NF, int lane, int first, int end, bool fresh, __m512 sums[2])
{
    float *const raw = t->redo;
    __m512 top[2], shrink[2];

    for (int v = 0; v < 2; v++) top[v] = _mm512_loadu_ps(rows->m + lane + v * V16);
    product_32((end - first) * 8, t->dh / PAIR, keys->k + first * 8 * keys->k_row, keys->k_row, 1, rows->q + lane, TILE,
               raw + first * 8 * TILE + lane, TILE, true);
    for (int j = first * 8; j < end * 8; j++)
        for (int v = 0; v < 2; v++) {
            const int at = j * TILE + lane + v * V16;
            __m512 x = _mm512_loadu_ps(raw + at);
            if (NF) x = _mm512_add_ps(x, _mm512_loadu_ps(NF + at));
            x = _mm512_mask_blend_ps(in_view(view, lane + v * V16, j), _mm512_set1_ps(HIDDEN), x);
            x = _mm512_mul_ps(x, _mm512_set1_ps(t->scale));
            top[v] = _mm512_max_ps(top[v], x);
            _mm512_storeu_ps(raw + at, x);
        }
    for (int v = 0; v < 2; v++) {
        float *const m = rows->m + lane + v * V16, *const l = rows->l + lane + v * V16;
        shrink[v] = exp2_ps(_mm512_sub_ps(_mm512_loadu_ps(m), top[v]));
        _mm512_storeu_ps(l, _mm512_mul_ps(_mm512_loadu_ps(l), shrink[v]));
        _mm512_storeu_ps(m, top[v]);
        sums[v] = _mm512_setzero_ps();
    }
    for (int64_t d = 0; d < t->dh && !fresh; d++)
        for (int v = 0; v < 2; v++) {
            float *const o = rows->o + d * TILE + lane + v * V16;
            _mm512_storeu_ps(o, _mm512_mul_ps(_mm512_loadu_ps(o), shrink[v]));
        }
    for (int j = first * 8; j < end * 8; j += 2)
        for (int v = 0; v < 2; v++) {
            const float *const at = raw + j * TILE + lane + v * V16;
            const __m512 x = exp2_ps(_mm512_sub_ps(_mm512_loadu_ps(at), top[v]));
            const __m512 y = exp2_ps(_mm512_sub_ps(_mm512_loadu_ps(at + TILE), top[v]));
            sums[v] = _mm512_add_ps(sums[v], _mm512_add_ps(x, y));
            store_pair(t->p + j / PAIR * TILE + lane + v * V16, x, y);
        }
}

/* Softmax and output of one tile of one head.  raw: its logits [j][TILE] where they are known, else NULL; NF: -F in the
   same layout, or NULL where F = 0; start: the rows' first tile. */
APART void attend_tile(tile_room *t, const key_tile *keys, const head_rows *rows, const tile_view *view,
                       const float *raw, const float *NF, bool start)
{
    const __m512 bound = _mm512_set1_ps(0x1p30f);

    for (int lane = 0; lane < view->lanes; lane += 32) {
        /* blocks: [first, both) by all lanes, [both, end) by the upper 16 */
        const int first = first_block(view, lane), low = end_block(view, lane), both = low > first ? low : first;
        const int high = end_block(view, lane + V16), end = high > both ? high : both;
        __m512 sums[2] = { _mm512_setzero_ps(), _mm512_setzero_ps() };
        bool grown;

        if (end == first && !start) continue;
        if (start)   /* lanes that see nothing here */
            for (int v = 0; v < 2; v++)
                _mm512_storeu_ps(rows->m + lane + v * V16, _mm512_set1_ps(HIDDEN * t->scale));
        for (int jb = first; jb < both; jb++)
            logits_block(0, t, keys, rows, view, raw, NF, lane, jb * 8, start && jb == first, sums);
        for (int jb = both; jb < end; jb++)
            logits_block(1, t, keys, rows, view, raw, NF, lane, jb * 8, start && jb == first, sums);
        exponentiate(&t->wait, t->scale, PAIRS);
        grown = (_mm512_cmp_ps_mask(sums[0], bound, _CMP_NLT_UQ) |
                 _mm512_cmp_ps_mask(sums[1], bound, _CMP_NLT_UQ)) != 0;
        if (grown) redo_half(t, keys, rows, view, NF, lane, first, end, start, sums);
        for (int v = 0; v < 2; v++) {
            float *const l = rows->l + lane + v * V16;
            _mm512_storeu_ps(l, start ? sums[v] : _mm512_add_ps(_mm512_loadu_ps(l), sums[v]));
        }
        values_half(t, keys, rows->o, lane, first * 8 / PAIR, (grown ? end : both) * 8 / PAIR, end * 8 / PAIR, start);
    }
}

/* ---- a call: sequences, row tiles, threads ---- */

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
    if (!a->dead_after && h == a->heads - 1) end_results(t->rows == TILE);   /* some heads lie on lines, maybe not this */
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
