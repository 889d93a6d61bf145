/* attention_words_tile.h: one tile of the forward pass for AVX-512: knows its operands, not where in a sequence they
 * lie.  Included once a kernel file, by the passes' own headers.
 */
#ifndef SEL_OPS_ATTENTION_WORDS_TILE_H
#define SEL_OPS_ATTENTION_WORDS_TILE_H

#include "ops/attention_words.h"

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

#endif
