/* attention_words_gradients.h: one tile of the backward pass for AVX-512: knows its operands, not where in a sequence
 * they lie.  Included by attention_words_backward.h.
 *
 * Two things besides the arithmetic cost time, and both are spread over the products: what comes next is fetched into
 * cache a few lines a step (fetch_queue), and the exponentials of a block of logits are taken while its dP is summed.
 * The sums dV, dK and dQ run over two tiles before they are stored.
 */
#ifndef SEL_OPS_ATTENTION_WORDS_GRADIENTS_H
#define SEL_OPS_ATTENTION_WORDS_GRADIENTS_H

#include "ops/attention_words_tile.h"

/* TILE keys of one head, and where their gradients gather. */
typedef struct {
    const word *k, *v;        /* [TILE][dh / PAIR] */
    const word *pairs;        /* k by pairs of keys, [TILE_WORDS][dh]; float32: k */
    float *dk, *dv;           /* [TILE][dh] */
} gradient_keys;   /* what only selects has no v and dv, its rows no dO, lse and delta */

/* TILE queries of one head. */
typedef struct {
    const word *qt, *dot;     /* Q^T, dO^T [dh / PAIR][TILE] */
    const word *q, *dout;     /* by pairs of rows (float32: by row), [TILE_WORDS][dh] */
    const float *lse, *delta; /* [TILE]; lse in log2; NO_ROW where there is no row */
    float *dq;                /* dQ^T [dh][TILE] */
} gradient_rows;

/* Where they meet: P and dZ as words. */
typedef struct {
    tile_view view;
    int64_t col0;             /* position of the first key: position 0 may be protected */
    int rows, cols;           /* real ones */
    word *p, *z;              /* [TILE keys][TILE_WORDS]: pairs of queries */
    word *zk;                 /* [TILE_WORDS][TILE]: pairs of keys; float32: z */
} gradient_tile;

#define NO_ROW 1e30f    /* log-sum-exp of lanes that are no rows: P = 0 */

static gradient_tile new_gradient_tile(int64_t off, int64_t col0, int rows, int cols, word *p, word *z, word *zk)
{
    return (gradient_tile){ .view = view_of(off, 0, rows), .col0 = col0, .rows = rows, .cols = cols, .p = p, .z = z,
                            .zk = WORD_BF16 ? zk : z };
}

/* Blocks of 8 keys that 32 lanes see: [first, both) by all of them, [both, end) by the upper 16. */
typedef struct {
    int first, both, end;
} key_blocks;

INLINE key_blocks seen_blocks(const tile_view *view, int lane)
{
    const int first = first_block(view, lane), low = end_block(view, lane), high = end_block(view, lane + V16);
    const int both = low > first ? low : first;
    return (key_blocks){ .first = first, .both = both, .end = high > both ? high : both };
}

/* What a thread works with. */
typedef struct {
    int64_t dh;
    float scale;              /* log2(e) / sqrt(dh) */
    fetch_queue next;
} gradient_room;

/* acc[r][v] += sum over k in [0, K) of A[r am + k ak] * B[k ldb + 16 v ..] for v0 <= v < v1. */
INLINE void sum_rows(const int v0, const int v1, int64_t K, const word *A, int64_t am, int64_t ak, const word *B,
                     int64_t ldb, fetch_queue *next, __m512 acc[8][2])
{
    enum { STEP = 8 / PAIR };
    int64_t k = 0;
    for (; k + STEP <= K; k += STEP) {
        fetch_some(next);
        #pragma GCC unroll 8
        for (int s = 0; s < STEP; s++) {
            __m512i b[2];
            for (int v = v0; v < v1; v++) b[v] = _mm512_loadu_si512(B + (k + s) * ldb + v * V16);
            #pragma GCC unroll 8
            for (int r = 0; r < 8; r++) {
                const __m512i x = _mm512_set1_epi32((int)A[r * am + (k + s) * ak]);
                for (int v = v0; v < v1; v++) acc[r][v] = dot(acc[r][v], x, b[v]);
            }
        }
        #pragma GCC unroll 8
        for (int r = 0; r < 8; r++)
            for (int v = v0; v < v1; v++) HERE(acc[r][v]);
    }
    for (; k < K; k++)
        #pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            const __m512i x = _mm512_set1_epi32((int)A[r * am + k * ak]);
            for (int v = v0; v < v1; v++) acc[r][v] = dot(acc[r][v], x, _mm512_loadu_si512(B + k * ldb + v * V16));
        }
}

/* Row r of a block: P from its logits x [8][32] (less F), which it replaces, and as words at P. */
INLINE void exponentiate_row(const int v0, float *x, int r, __m512 c, const __m512 lse[2], word *P)
{
    __m512 p[2] = { _mm512_setzero_ps(), _mm512_setzero_ps() };
    for (int v = v0; v < 2; v++) {
        float *const at = x + r * 32 + v * V16;
        p[v] = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(at), c, lse[v]));
        _mm512_store_ps(at, p[v]);
    }
#if WORD_BF16
    _mm512_storeu_si512(P + r * TILE_WORDS, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
#else
    for (int v = v0; v < 2; v++) _mm512_storeu_ps((float *)P + r * TILE_WORDS + v * V16, p[v]);
#endif
}

/* Rows r, r + 1 of a block of dZ as words, by pairs of queries at z and by pairs of keys at zk. */
INLINE void store_gradients(const int v0, __m512 x[2], __m512 y[2], word *z, word *zk)
{
#if WORD_BF16
    static const uint16_t low[32] = { 0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47 };
    const __m512i first = _mm512_loadu_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    if (v0) x[0] = y[0] = _mm512_setzero_ps();
    const __m512i a = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]), b = (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]);
    _mm512_storeu_si512(z, a);
    _mm512_storeu_si512(z + TILE_WORDS, b);
    if (!v0) _mm512_storeu_si512(zk, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(zk + V16, _mm512_permutex2var_epi16(a, second, b));
#else
    (void)zk;
    for (int v = v0; v < 2; v++) {
        _mm512_storeu_ps((float *)z + v * V16, x[v]);
        _mm512_storeu_ps((float *)z + TILE_WORDS + v * V16, y[v]);
    }
#endif
}

/* P and dZ of 8 keys from j0 on, for the lanes from `lane` on: 32, or with v0 = 1 the upper 16 of them. */
INLINE void gradient_block(const int v0, const int64_t kw, gradient_room *m, const gradient_tile *t,
                           const gradient_keys *keys, const gradient_rows *rows, const float *L0, const float *NF,
                           float *G, bool fresh, float *Z0, int lane, int j0)
{
    const int64_t steps = 8 / PAIR, each = (8 * steps + kw - 1) / kw;
    const __m512 c = _mm512_set1_ps(m->scale);
    float x[8 * 32] __attribute__((aligned(64)));
    __m512 acc[8][2];
    int done = 0;

    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        for (int v = v0; v < 2; v++) {
            const int at = (j0 + r) * TILE + lane + v * V16;
            acc[r][v] = NF ? _mm512_loadu_ps(NF + at) : _mm512_setzero_ps();
            if (L0) acc[r][v] = _mm512_add_ps(acc[r][v], _mm512_loadu_ps(L0 + at));
        }
    if (!L0) sum_rows(v0, 2, kw, keys->k + j0 * kw, kw, 1, rows->qt + lane, TILE, &m->next, acc);
    if (lane + v0 * V16 + t->view.off < j0 + 7 || lane + 31 + t->view.low > j0)
        hide_unseen(v0, acc, &t->view, lane, j0);
    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        for (int v = v0; v < 2; v++) {
            _mm512_store_ps(x + r * 32 + v * V16, acc[r][v]);
            acc[r][v] = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_loadu_ps(rows->delta + lane + v * V16));
        }
    const word *A = keys->v + j0 * kw, *B = rows->dot + lane;
    const __m512 lse[2] = { _mm512_loadu_ps(rows->lse + lane), _mm512_loadu_ps(rows->lse + lane + V16) };
    word *const P = t->p + j0 * TILE_WORDS + lane / PAIR;
    for (int64_t k = 0; k < kw; k += steps, A += steps, B += steps * TILE) {
        __asm__("" : "+r"(A), "+r"(B));   /* two pointers move, not one for each word of a step */
        for (int64_t n = 0; n < each && done < 8; n++, done++) {   /* before products, which do not wait for them */
            const int at = (j0 + done) * TILE + lane;
            exponentiate_row(v0, x, done, c, lse, P);
            if (!NF) continue;
            for (int v = v0; v < 2; v++) {   /* into the first cache: this block's G, -F of the next */
                _mm_prefetch((const char *)(G + at + v * V16), _MM_HINT_T0);
                _mm_prefetch((const char *)(NF + at + 8 * TILE + v * V16), _MM_HINT_T0);
            }
        }
        sum_rows(v0, 2, steps, A, kw, 1, B, TILE, &m->next, acc);
    }
    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        for (int v = v0; v < 2; v++) {
            const int at = (j0 + r) * TILE + lane + v * V16;
            acc[r][v] = _mm512_mul_ps(acc[r][v], _mm512_load_ps(x + r * 32 + v * V16));
            if (G) _mm512_storeu_ps(G + at, fresh ? acc[r][v] : _mm512_add_ps(_mm512_loadu_ps(G + at), acc[r][v]));
            if (Z0) _mm512_storeu_ps(Z0 + at, acc[r][v]);
        }
    #pragma GCC unroll 4
    for (int r = 0; r < 8 && !Z0; r += 2)
        store_gradients(v0, acc[r], acc[r + 1], t->z + (j0 + r) * TILE_WORDS + lane / PAIR,
                        t->zk + (j0 + r) / PAIR * TILE + lane);
}

/* tile_gradients for rows of kw words: constant where inlined, since then one address does for a block's rows. */
INLINE void tile_gradients_of(const int64_t kw, gradient_room *m, const gradient_tile *t, const gradient_keys *keys,
                              const gradient_rows *rows, const float *L0, const float *NF, float *G, bool fresh,
                              float *Z0)
{
    for (int lane = 0; lane < t->view.lanes; lane += 32) {
        const key_blocks seen = seen_blocks(&t->view, lane);
        for (int jb = seen.first; jb < seen.both; jb++)
            gradient_block(0, kw, m, t, keys, rows, L0, NF, G, fresh, Z0, lane, jb * 8);
        for (int jb = seen.both; jb < seen.end; jb++)
            gradient_block(1, kw, m, t, keys, rows, L0, NF, G, fresh, Z0, lane, jb * 8);
    }
}

/* P and dZ of one tile of one head.  L0: its logits where they are known, NF: -F, G: += dZ, or = dZ where fresh (all
   [j][TILE], NULL where there is none); Z0: where dZ of the head that selects goes, as floats, to be changed before it
   becomes words, else NULL. */
APART void tile_gradients(gradient_room *m, const gradient_tile *t, const gradient_keys *keys,
                           const gradient_rows *rows, const float *L0, const float *NF, float *G, bool fresh,
                           float *Z0)
{
    if (m->dh == 64) tile_gradients_of(64 / PAIR, m, t, keys, rows, L0, NF, G, fresh, Z0);
    else tile_gradients_of(m->dh / PAIR, m, t, keys, rows, L0, NF, G, fresh, Z0);
}

/* What selection_words has of a tile. */
typedef struct {
    const sel_attention *a;
    const gradient_tile *t;
    const float *L0, *G, *Z0;
    bool plain;               /* of these keys S takes all logits, but for relu */
} selected_tile;

/* dZ of key j and lanes v .. v + 15; base: dF of later rows, grows by that of these. */
INLINE __m512 selected_gradients(const selected_tile *s, int j, int v, __m512 *base)
{
    const __m512 zero = _mm512_setzero_ps(), z = _mm512_loadu_ps(s->Z0 + j * TILE + v);
    if (j >= s->t->cols) return z;
    const __m512 sum = scan_down(_mm512_sub_ps(zero, _mm512_loadu_ps(s->G + j * TILE + v)));
    const __m512 after =
        _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_setzero_si512(), _mm512_castps_si512(sum), 1));
    const __m512 ds = _mm512_add_ps(s->a->shift ? after : sum, *base);
    __mmask16 passes = 0xffff;
    if (!s->plain) passes = selects(s->a, &s->t->view, v, j, s->t->col0, s->t->rows);
    if (s->a->relu) passes &= _mm512_cmp_ps_mask(_mm512_loadu_ps(s->L0 + j * TILE + v), zero, _CMP_GT_OQ);
    *base = _mm512_add_ps(*base, _mm512_broadcastss_ps(_mm512_castps512_ps128(sum)));
    return _mm512_mask_add_ps(z, passes, z, ds);
}

/* dZ (floats [j][TILE]: head 0's, or zeros) plus what comes through F: dF = -G, summed over later rows, passes where S
   took the logit L0.  As words; dcarry [cols] moves on. */
APART void selection_words(const sel_attention *a, const gradient_tile *t, const float *L0, const float *G,
                            const float *Z0, float *dcarry)
{
    const tile_view *const view = &t->view;
    const bool whole = view->off >= TILE && view->low <= -TILE && t->rows == view->lanes;
    selected_tile s = { .a = a, .t = t, .L0 = L0, .G = G, .Z0 = Z0 };

    for (int j = 0; j < TILE; j += 2) {
        __m512 base[2];
        s.plain = whole && (t->col0 + j > 0 || !a->protect_bos);
        for (int r = 0; r < 2; r++) base[r] = _mm512_set1_ps(j + r < t->cols ? dcarry[j + r] : 0.0f);
        for (int lane = view->lanes - 32; lane >= 0; lane -= 32) {
            const key_blocks seen = seen_blocks(view, lane);
            word *const z = t->z + j * TILE_WORDS + lane / PAIR, *const zk = t->zk + j / PAIR * TILE + lane;
            __m512 x[2], y[2];
            if (j < seen.first * 8 || j >= seen.end * 8) continue;
            x[1] = selected_gradients(&s, j, lane + V16, &base[0]);
            y[1] = selected_gradients(&s, j + 1, lane + V16, &base[1]);
            if (j < seen.both * 8) {
                x[0] = selected_gradients(&s, j, lane, &base[0]);
                y[0] = selected_gradients(&s, j + 1, lane, &base[1]);
                store_gradients(0, x, y, z, zk);
            } else {
                store_gradients(1, x, y, z, zk);
            }
        }
        for (int r = 0; r < 2 && j + r < t->cols; r++) dcarry[j + r] = _mm512_cvtss_f32(base[r]);
    }
}

/* One tile's part of a sum over queries: A by pairs of queries (P or dZ), B the queries' rows. */
typedef struct {
    const word *A, *B;
    const gradient_tile *tile;
} query_sum;

INLINE void query_sum_block(const int nv, int64_t dh, int n, const query_sum *part, int j0, int64_t d, float *C,
                            bool fresh, fetch_queue *next)
{
    __m512 acc[8][2];
    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        for (int v = 0; v < nv; v++)
            acc[r][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(C + (j0 + r) * dh + d + v * V16);
    for (int i = 0; i < n; i++) {
        /* earlier and later queries do not see the keys */
        const tile_view *const view = &part[i].tile->view;
        const int rows = part[i].tile->rows, last = j0 + 7 - view->low;
        const int64_t first = j0 > view->off ? (j0 - view->off) / PAIR : 0;
        const int64_t end = ((last < rows ? last + 1 : rows) + PAIR - 1) / PAIR;
        if (first < end)
            sum_rows(0, nv, end - first, part[i].A + j0 * TILE_WORDS + first, TILE_WORDS, 1,
                     part[i].B + first * dh + d, dh, next, acc);
    }
    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        for (int v = 0; v < nv; v++) _mm512_storeu_ps(C + (j0 + r) * dh + d + v * V16, acc[r][v]);
}

INLINE void sum_over_queries_of(const int64_t dh, gradient_room *m, int n, const query_sum *part, int cols, float *C,
                                bool fresh)
{
    for (int64_t d = 0; d < dh; d += 32)
        for (int j0 = 0; j0 < cols; j0 += 8)
            if (d + 32 <= dh) query_sum_block(2, dh, n, part, j0, d, C, fresh, &m->next);
            else query_sum_block(1, dh, n, part, j0, d, C, fresh, &m->next);
}

/* C [cols][dh] (+)= the sum over the queries of n tiles: dV from P and dO, dK from dZ and Q. */
APART void sum_over_queries(gradient_room *m, int n, const query_sum *part, int cols, float *C, bool fresh)
{
    if (m->dh == 64) sum_over_queries_of(64, m, n, part, cols, C, fresh);
    else sum_over_queries_of(m->dh, m, n, part, cols, C, fresh);
}

/* dV, where there are values, and dK of a column tile from n tiles of queries. */
static void key_gradients(gradient_room *m, int n, const gradient_tile *const *t, const gradient_rows *const *rows,
                          const gradient_keys *keys, bool fresh)
{
    query_sum part[SIDE] = { { .A = NULL } };
    for (int i = 0; i < n; i++)
        part[i] = (query_sum){ .A = t[i]->p, .B = rows[i]->dout, .tile = t[i] };
    if (keys->dv) sum_over_queries(m, n, part, t[0]->cols, keys->dv, fresh);
    for (int i = 0; i < n; i++) {
        part[i].A = t[i]->z;
        part[i].B = rows[i]->q;
    }
    sum_over_queries(m, n, part, t[0]->cols, keys->dk, fresh);
}

INLINE void query_gradients_of(const int64_t dh, gradient_room *m, int n, const gradient_tile *const *t,
                               const gradient_keys *const *keys, float *dq, bool fresh)
{
    for (int lane = 0; lane < t[0]->view.lanes; lane += 32)
        for (int64_t d = 0; d < dh; d += 8) {
            float *const C = dq + d * TILE + lane;
            __m512 acc[8][2];
            #pragma GCC unroll 8
            for (int r = 0; r < 8; r++)
                for (int v = 0; v < 2; v++)
                    acc[r][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(C + r * TILE + v * V16);
            for (int i = 0; i < n; i++) {
                const key_blocks seen = seen_blocks(&t[i]->view, lane);
                const int64_t first = seen.first * 8 / PAIR, both = seen.both * 8 / PAIR, end = seen.end * 8 / PAIR;
                const word *const K = keys[i]->pairs + d, *const Z = t[i]->zk + lane;
                sum_rows(0, 2, both - first, K + first * dh, 1, dh, Z + first * TILE, TILE, &m->next, acc);
                if (end > both)
                    sum_rows(1, 2, end - both, K + both * dh, 1, dh, Z + both * TILE, TILE, &m->next, acc);
            }
            #pragma GCC unroll 8
            for (int r = 0; r < 8; r++)
                for (int v = 0; v < 2; v++) _mm512_storeu_ps(C + r * TILE + v * V16, acc[r][v]);
        }
}

/* dQ^T of a row tile from n tiles of keys. */
APART void query_gradients(gradient_room *m, int n, const gradient_tile *const *t, const gradient_keys *const *keys,
                            float *dq, bool fresh)
{
    if (m->dh == 64) query_gradients_of(64, m, n, t, keys, dq, fresh);
    else query_gradients_of(m->dh, m, n, t, keys, dq, fresh);
}

#endif
