/* attention_words_backward.h: the backward pass for AVX-512 (attention_words.h); included once a kernel file.
 *
 * As in the portable kernel column tiles are outside and row tiles descend inside.  Here two column tiles and two
 * row tiles go together, all heads over the four tiles one after another, so that each operand fetched is used twice
 * and dV, dK and dQ are sums over two tiles each time that they are loaded and stored.
 *
 * All operands are copied, tile by tile and head by head: rows that lie a token apart share few lines of a cache.
 */
#ifndef SEL_OPS_ATTENTION_WORDS_BACKWARD_H
#define SEL_OPS_ATTENTION_WORDS_BACKWARD_H

#include <omp.h>
#include "ops/attention_words_forward.h"
#include "ops/attention_words_gradients.h"

typedef struct {
    const sel_attention *a;
    const sel_attention_grad *g;
    const words_plan *p;
    int64_t b;
    int thread;
    float *scratch, *pack;    /* this thread's scratch, this sequence's packed operands */
    bool shared;              /* by all threads: operands are packed before and dq is summed after; else head by head */
    bool around;              /* dq, dk and dv go around the caches */
    gradient_room room;
} backward_job;

static bool gradients_go_around(const sel_attention *a, const sel_attention_grad *g)
{
    const int64_t bytes = sizeof *g->dq;
    return goes_around(a, g->dq, g->dq_seq, g->dq_row, bytes) && goes_around(a, g->dk, g->dk_seq, g->dk_row, bytes) &&
           goes_around(a, g->dv, g->dv_seq, g->dv_row, bytes) &&
           (!attention_bilinear(a) || (goes_around(a, g->dsel_q, g->dsel_q_seq, g->dsel_q_row, bytes) &&
                                       goes_around(a, g->dsel_k, g->dsel_k_seq, g->dsel_k_row, bytes)));
}

/* The four tiles that go together: row tiles [I0, I1), column tiles [J0, J1), a group of row tiles from `group`. */
typedef struct {
    int64_t I0, I1, J0, J1, group;
    int64_t lowest, highest;      /* [lowest, highest): row tiles that see these column tiles */
    bool first_rows, last_rows;   /* that these column tiles meet: dK and dV start, end here */
} square_of_tiles;

static gradient_keys keys_at(const backward_job *w, int64_t kh, int64_t J)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t size = TILE * a->dh, at = (J * a->kv_heads + kh) * size / PAIR,
                  sum = (J % SIDE * a->kv_heads + kh) * size;
    return (gradient_keys){ .k = (const word *)(w->pack + p->k) + at, .v = (const word *)(w->pack + p->v) + at,
                            .pairs = (const word *)(w->pack + (WORD_BF16 ? p->k_pairs : p->k)) + at,
                            .dk = w->scratch + p->dk + sum, .dv = w->scratch + p->dv + sum };
}

static gradient_rows rows_at(const backward_job *w, int64_t h, int64_t I)
{
    const words_plan *p = w->p;
    const int64_t slot = I * w->a->heads + h, size = TILE * w->a->dh, at = slot * size / PAIR;
    return (gradient_rows){ .qt = (const word *)(w->pack + p->qt_all) + at,
                            .dot = (const word *)(w->pack + p->dot_all) + at,
                            .q = (const word *)(w->pack + p->q_rows) + at,
                            .dout = (const word *)(w->pack + p->dout_rows) + at,
                            .lse = w->pack + p->lse_all + slot * TILE, .delta = w->pack + p->delta_all + slot * TILE,
                            .dq = w->scratch + p->dq + slot * size };
}

/* Keys and rows that S is made of: head 0's, or sel_k and sel_q. */
static gradient_keys selecting_keys_at(const backward_job *w, int64_t J)
{
    const words_plan *p = w->p;
    const int64_t size = TILE * w->a->dh, at = J * size / PAIR;
    if (!attention_bilinear(w->a)) return keys_at(w, 0, J);
    return (gradient_keys){ .k = (const word *)(w->pack + p->sel_k) + at,
                            .pairs = (const word *)(w->pack + (WORD_BF16 ? p->sel_k_pairs : p->sel_k)) + at,
                            .dk = w->scratch + p->dsel_k + J % SIDE * size };
}
static gradient_rows selecting_rows_at(const backward_job *w, int64_t I)
{
    const words_plan *p = w->p;
    const int64_t size = TILE * w->a->dh, at = I * size / PAIR;
    if (!attention_bilinear(w->a)) return rows_at(w, 0, I);
    return (gradient_rows){.qt = (const word *)(w->pack + p->sel_qt_all) + at,
                           .q = (const word *)(w->pack + p->sel_q_rows) + at,
                           .dq = w->scratch + p->dsel_q + I * size};
}

/* Into the first cache: n values of row i of x, where there is one. */
INLINE void fetch_row(const operand *x, int64_t x_row, int64_t i, int64_t rows, int64_t n)
{
    if (i < rows)
        for (int64_t d = 0; d < n; d += V16 * PAIR) _mm_prefetch((const char *)(x + i * x_row + d), _MM_HINT_T0);
}

/* n values of each of `most` rows of x, `real` of them, the rest zero: words by row, or by pairs of rows. */
static void copy_rows(word *to, const operand *x, int64_t x_row, int real, int most, int64_t n)
{
    for (int i = 0; i < most; i++)
        if (i < real) row_words(to + i * n / PAIR, x + i * x_row, n);
        else memset(to + i * n / PAIR, 0, (size_t)(n / PAIR) * sizeof *to);
}
static void copy_pairs(word *to, const operand *x, int64_t x_row, int real, int most, int64_t n)
{
#if WORD_BF16
    for (int i = 0; i < most; i += 2)
        if (i < real) pair_rows(to + i / 2 * n, x + i * x_row, i + 1 < real ? x + (i + 1) * x_row : NULL, n);
        else memset(to + i / 2 * n, 0, (size_t)n * sizeof *to);
#else
    copy_rows(to, x, x_row, real, most, n);
#endif
}

enum { NEAR = 8 };   /* rows fetched ahead of those that are copied */

static word *writable(const backward_job *w, const word *at) { return (word *)w->pack + (at - (const word *)w->pack); }

static int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

/* Where tile J of a key head's rows, tile I of a query head's lie in one of the caller's arrays. */
static int64_t key_place(const backward_job *w, int64_t seq, int64_t row, int64_t kh, int64_t J)
{
    return w->b * seq + J * TILE * row + kh * w->a->dh;
}
static int64_t row_place(const backward_job *w, int64_t seq, int64_t row, int64_t h, int64_t I)
{
    return w->b * seq + I * w->p->height * row + h * w->a->dh;
}

/* Column tile J of a kv-head; with the first sel_k, too. */
static void pack_columns(const backward_job *w, int64_t kh, int64_t J)
{
    const sel_attention *a = w->a;
    const int cols = (int)least(a->i1 - J * TILE, TILE);
    const gradient_keys to = keys_at(w, kh, J);
    const operand *const k = operands(a->k) + key_place(w, a->k_seq, a->k_row, kh, J);
    const operand *const v = operands(a->v) + key_place(w, a->v_seq, a->v_row, kh, J);
    for (int j = 0; j < TILE; j += NEAR) {
        const int64_t at = j * a->dh / PAIR;
        for (int i = j + NEAR; i < j + 2 * NEAR; i++) {
            fetch_row(k, a->k_row, i, cols, a->dh);
            fetch_row(v, a->v_row, i, cols, a->dh);
        }
        copy_rows(writable(w, to.k) + at, k + j * a->k_row, a->k_row, cols - j, NEAR, a->dh);
        if (WORD_BF16) copy_pairs(writable(w, to.pairs) + at, k + j * a->k_row, a->k_row, cols - j, NEAR, a->dh);
        copy_rows(writable(w, to.v) + at, v + j * a->v_row, a->v_row, cols - j, NEAR, a->dh);
    }
    if (kh == 0 && attention_bilinear(a)) {
        const gradient_keys sel = selecting_keys_at(w, J);
        const operand *const sel_k = operands(a->sel_k) + key_place(w, a->sel_k_seq, a->sel_k_row, 0, J);
        copy_rows(writable(w, sel.k), sel_k, a->sel_k_row, cols, TILE, a->dh);
        if (WORD_BF16) copy_pairs(writable(w, sel.pairs), sel_k, a->sel_k_row, cols, TILE, a->dh);
    }
}

/* Row tile I of a head to the place `at`: q and dO in both forms, lse (log2), delta = rowsum(dO o out); with head 0
   sel_q, too. */
static void pack_rows_at(const backward_job *w, int64_t h, int64_t I, int64_t at)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t H = a->heads, dh = a->dh;
    const int rows = (int)least(p->rows - I * p->height, p->height), lanes = rows > 32 ? TILE : 32;
    const gradient_rows to = rows_at(w, h, at);
    const operand *const q = operands(a->q) + row_place(w, a->q_seq, a->q_row, h, I);
    const operand *const dout = operands(w->g->dout) + row_place(w, a->out_seq, a->out_row, h, I);
    const operand *const out = operands(a->out) + row_place(w, a->out_seq, a->out_row, h, I);
    const float *const lse = a->lse + (w->b * H + h) * p->rows + I * p->height;
    float *const lse2 = w->pack + p->lse_all + (at * H + h) * TILE;
    float *const delta = w->pack + p->delta_all + (at * H + h) * TILE;

    for (int i0 = 0; i0 < lanes; i0 += V16) {
        const int64_t at16 = i0 * dh / PAIR;
        for (int i = i0; i < i0 + V16; i++) {
            fetch_row(q, a->q_row, i + V16, rows, dh);
            fetch_row(dout, a->out_row, i, rows, dh);
            fetch_row(out, a->out_row, i, rows, dh);
        }
        transpose_lanes(writable(w, to.qt), q, a->q_row, i0, rows, dh);
        copy_pairs(writable(w, to.q) + at16, q + i0 * a->q_row, a->q_row, rows - i0, V16, dh);
        transpose_lanes(writable(w, to.dot), dout, a->out_row, i0, rows, dh);
        copy_pairs(writable(w, to.dout) + at16, dout + i0 * a->out_row, a->out_row, rows - i0, V16, dh);
        for (int i = i0; i < i0 + V16; i++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; i < rows && d < dh; d += V16 * PAIR) {
                const bool half = dh - d < V16 * PAIR;
                sum = dot(sum, words_16(dout + i * a->out_row + d, half), words_16(out + i * a->out_row + d, half));
            }
            delta[i] = _mm512_reduce_add_ps(sum);
        }
    }
    for (int i = 0; i < rows; i++) lse2[i] = (float)(LOG2E * (double)lse[i]);
    for (int i = rows; i < lanes; i++) lse2[i] = NO_ROW;
    if (h == 0 && attention_bilinear(a)) {
        const gradient_rows sel = selecting_rows_at(w, at);
        const operand *const sel_q = operands(a->sel_q) + row_place(w, a->sel_q_seq, a->sel_q_row, 0, I);
        transpose_words(writable(w, sel.qt), sel_q, a->sel_q_row, rows, dh);
        copy_pairs(writable(w, sel.q), sel_q, a->sel_q_row, rows, lanes, dh);
    }
}
static void pack_rows(const backward_job *w, int64_t h, int64_t I) { pack_rows_at(w, h, I, I); }

/* The real rows of column tile J, times scale. */
static void store_columns(const backward_job *w, float *to, int64_t row, const float *from, double scale, int64_t J)
{
    const int64_t dh = w->a->dh;
    const __m512 s = _mm512_set1_ps((float)scale);
    const int64_t cols = least(w->a->i1 - J * TILE, TILE);
    for (int64_t j = 0; j < cols; j++) {
        for (int64_t d = 0; d < dh && j + NEAR < cols && !w->around; d += V16)
            _mm_prefetch((const char *)(to + (j + NEAR) * row + d), _MM_HINT_T0);
        for (int64_t d = 0; d < dh; d += V16)
            store_result(to + j * row + d, _mm512_mul_ps(_mm512_loadu_ps(from + j * dh + d), s), w->around);
    }
}

/* dK (times 1 / sqrt(dh)) and dV of a column tile; dsel_k. */
static void store_keys(const backward_job *w, int64_t kh, int64_t J)
{
    const sel_attention_grad *g = w->g;
    const gradient_keys from = keys_at(w, kh, J);
    store_columns(w, g->dk + key_place(w, g->dk_seq, g->dk_row, kh, J), g->dk_row, from.dk,
                  1.0 / sqrt((double)w->a->dh), J);
    store_columns(w, g->dv + key_place(w, g->dv_seq, g->dv_row, kh, J), g->dv_row, from.dv, 1.0, J);
}
static void store_dsel_k(const backward_job *w, int64_t J)
{
    const sel_attention_grad *g = w->g;
    store_columns(w, g->dsel_k + key_place(w, g->dsel_k_seq, g->dsel_k_row, 0, J), g->dsel_k_row,
                  selecting_keys_at(w, J).dk, 1.0 / sqrt((double)w->a->dh), J);
}

/* Whose are the columns from J on, a pair of tiles?  Dealt 0 .. T-1, T-1 .. 0: early ones are long, late ones short. */
static int owner(const backward_job *w, int64_t J)
{
    const int64_t threads = w->a->threads, k = J / SIDE % (2 * threads);
    return (int)(k < threads ? k : 2 * threads - 1 - k);
}

/* Column tiles [seen_from, seen_to) hold the keys that row tile I sees. */
static int64_t seen_from(const backward_job *w, int64_t I)
{
    const int64_t row0 = w->a->i0 + I * TILE;
    return w->a->window && row0 >= w->a->window ? (row0 - w->a->window + 1) / TILE : 0;
}
static int64_t seen_to(const backward_job *w, int64_t I)
{
    return (least(w->a->i0 + (I + 1) * TILE, w->a->i1) + TILE - 1) / TILE;
}

/* Has this thread a part of row tile I's dQ from column tiles before J? */
static bool has_part(const backward_job *w, int64_t I, int64_t J)
{
    const int64_t pair = seen_from(w, I) / SIDE, threads = w->a->threads, round = 2 * threads;
    if (!w->shared) return pair * SIDE < J;
    const int64_t up = (w->thread - pair % round + round) % round;   /* pairs until it is this thread's turn */
    const int64_t down = (round - 1 - w->thread - pair % round + round) % round;
    return (pair + least(up, down)) * SIDE < J;
}

/* Threads, from the first on, that have a part of row tile I's dQ: with a window all, if only of zeros. */
static int sharers(const backward_job *w, int64_t I)
{
    const int64_t pairs = (seen_to(w, I) + SIDE - 1) / SIDE;
    return w->a->window == 0 && pairs < w->a->threads ? (int)pairs : w->a->threads;
}

/* Row tile I of dq: the sums of the first `summed` threads, in thread order, turned back to rows. */
static void store_rows(const backward_job *w, float *dq, int64_t row, const float *sum, int64_t I, int summed)
{
    const sel_attention *a = w->a;
    const int64_t dh = a->dh, height = w->p->height;
    const __m512 scale = _mm512_set1_ps((float)(1.0 / sqrt((double)dh)));
    const int rows = (int)least(w->p->rows - I * height, height);

    for (int i0 = 0; i0 < rows; i0 += V16)
        for (int64_t d = 0; d < dh; d += V16) {
            __m512i x[16];
            #pragma GCC unroll 16
            for (int k = 0; k < 16; k++) {
                const float *at = sum + (d + k) * TILE + i0;
                __m512 y = _mm512_loadu_ps(at);
                for (int n = 1; n < summed; n++) y = _mm512_add_ps(y, _mm512_loadu_ps(at += w->p->thread_size));
                x[k] = _mm512_castps_si512(_mm512_mul_ps(y, scale));
            }
            transpose_registers(x);
            #pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                if (i0 + i < rows) store_result(dq + (i0 + i) * row + d, _mm512_castsi512_ps(x[i]), w->around);
        }
}

static void store_dq(const backward_job *w, int64_t h, int64_t I, int summed)
{
    const sel_attention_grad *g = w->g;
    store_rows(w, g->dq + row_place(w, g->dq_seq, g->dq_row, h, I), g->dq_row, rows_at(w, h, I).dq, I, summed);
}
static void store_dsel_q(const backward_job *w, int64_t I, int summed)
{
    const sel_attention_grad *g = w->g;
    store_rows(w, g->dsel_q + row_place(w, g->dsel_q_seq, g->dsel_q_row, 0, I), g->dsel_q_row,
               selecting_rows_at(w, I).dq, I, summed);
}

/* Tile (I, J), a corner of its square; false where no row of I sees a key of J. */
static bool make_tile(const backward_job *w, int64_t I, int64_t J, gradient_tile *t)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t row0 = a->i0 + I * TILE, col0 = J * TILE, at = (I % SIDE * SIDE + J % SIDE) * TILE * TILE;
    const int rows = (int)(a->i1 - row0 < TILE ? a->i1 - row0 : TILE);
    *t = new_gradient_tile(row0 - col0, col0, rows, (int)(a->i1 - col0 < TILE ? a->i1 - col0 : TILE),
                           (word *)(w->scratch + p->pi) + at, (word *)(w->scratch + p->zi) + at,
                           (word *)(w->scratch + p->zk) + at);
    t->view = view_of(row0 - col0, a->window, rows);
    return I < p->tiles && J >= seen_from(w, I) && J < seen_to(w, I);
}

/* The memory loss's own part of dF in the arg-max row, of rows from position row0 on (G = -dF; NF = -F, raw). */
static void add_memory(const backward_job *w, const gradient_tile *t, int64_t row0, const float *NF, float *G)
{
    const int64_t i = w->a->m_row[w->b] - row0;
    if (i < 0 || i >= t->rows) return;
    for (int j = 0; j < t->cols && j <= i + t->view.off; j++)
        if (-(double)NF[j * TILE + i] < w->a->tau * sqrt((double)w->a->dh)) G[j * TILE + i] += w->g->memory_coef;
}

/* Where the selecting logits and -F of tile (I, J) of a group lie. */
static float *panel(const backward_job *w, int64_t array, const square_of_tiles *u, int64_t I, int64_t J)
{
    return w->scratch + array + ((I - u->group) * SIDE + J % SIDE) * TILE * TILE;
}

/* The selecting logits and -F of the column tiles in all row tiles [u->group, end), upwards from the saved carry. */
static void rebuild_selection(backward_job *w, const square_of_tiles *u, int64_t end)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t kw = a->dh / PAIR, group = u->group / p->group;
    const float *const saved = a->saved + (w->b * sel_attention_carries(p->rows) + group) * a->i1;
    gradient_tile t;

    for (int64_t J = u->J0; J < u->J1; J++) {
        const word *const k = selecting_keys_at(w, J).k;
        float carry[TILE] = { 0 };
        memcpy(carry, saved + J * TILE, (size_t)(a->i1 - J * TILE < TILE ? a->i1 - J * TILE : TILE) * sizeof *carry);
        for (int64_t I = u->group; I < end; I++) {
            if (!make_tile(w, I, J, &t)) continue;
            float *const L0 = panel(w, p->l0, u, I, J);
            for (int lane = 0; lane < t.view.lanes; lane += 32) {
                const key_blocks seen = seen_blocks(&t.view, lane);
                product_32((seen.end - seen.first) * 8, kw, k + seen.first * 8 * kw, kw, 1,
                           selecting_rows_at(w, I).qt + lane, TILE, L0 + seen.first * 8 * TILE + lane, TILE, true);
            }
            select_words(a, L0, panel(w, p->f, u, I, J), carry, t.rows, t.cols, t.view.lanes, t.col0,
                         a->i0 + I * TILE - t.col0);
        }
    }
}

static void fetch_block(fetch_queue *q, const void *at, int64_t bytes)
{
    fetch_rows(q, at, CHUNK, bytes / CHUNK, CHUNK);
}

/* What is packed of head h when a square is met, and where it is packed to: what is needed first last. */
static void fetch_unpacked(backward_job *w, int64_t h, const square_of_tiles *u)
{
    const sel_attention *a = w->a;
    const int64_t kh = h * a->kv_heads / a->heads, dh = a->dh;
    fetch_queue *const q = &w->room.next;

    for (int64_t J = u->J0; J < u->J1 && u->first_rows && !w->shared; J++) {
        const int64_t cols = least(a->i1 - J * TILE, TILE);
        fetch_operands(q, operands(a->v) + key_place(w, a->v_seq, a->v_row, kh, J), a->v_row, cols, dh);
        fetch_operands(q, operands(a->k) + key_place(w, a->k_seq, a->k_row, kh, J), a->k_row, cols, dh);
    }
    for (int64_t I = u->I0; I < u->I1; I++) {
        const int64_t rows = least(w->p->rows - I * TILE, TILE);
        if (w->shared || has_part(w, I, u->J0)) continue;
        fetch_operands(q, operands(a->out) + row_place(w, a->out_seq, a->out_row, h, I), a->out_row, rows, dh);
        fetch_operands(q, operands(w->g->dout) + row_place(w, a->out_seq, a->out_row, h, I), a->out_row, rows, dh);
        fetch_operands(q, operands(a->q) + row_place(w, a->q_seq, a->q_row, h, I), a->q_row, rows, dh);
        fetch_rows(q, a->lse + (w->b * a->heads + h) * w->p->rows + I * TILE, 0, 1, rows * 4);
    }
}

/* Asks for what head h needs in a square, what it needs first last. */
static void fetch_head(backward_job *w, int64_t h, const square_of_tiles *u)
{
    const sel_attention *a = w->a;
    const sel_attention_grad *g = w->g;
    const int64_t kh = h * a->kv_heads / a->heads, width = a->dh * 4, size = TILE * width;
    fetch_queue *const q = &w->room.next;

    for (int64_t J = u->J0; J < u->J1 && u->last_rows && !w->around; J++) {
        const int64_t cols = least(a->i1 - J * TILE, TILE);
        fetch_rows(q, g->dk + key_place(w, g->dk_seq, g->dk_row, kh, J), g->dk_row * 4, cols, width);
        fetch_rows(q, g->dv + key_place(w, g->dv_seq, g->dv_row, kh, J), g->dv_row * 4, cols, width);
    }
    for (int64_t I = u->I0; I < u->I1; I++) {
        const int64_t rows = least(w->p->rows - I * TILE, TILE);
        if (!w->shared && !w->around && seen_to(w, I) <= u->J1)
            fetch_rows(q, g->dq + row_place(w, g->dq_seq, g->dq_row, h, I), g->dq_row * 4, rows, width);
        fetch_block(q, rows_at(w, h, I).dq, size);
    }
    for (int64_t J = u->J0; J < u->J1; J++) {
        const gradient_keys keys = keys_at(w, kh, J);
        fetch_block(q, keys.dk, size);
        fetch_block(q, keys.dv, size);
        if (WORD_BF16) fetch_block(q, keys.pairs, size / PAIR);
        fetch_block(q, keys.v, size / PAIR);
        fetch_block(q, keys.k, size / PAIR);
    }
    for (int64_t I = u->I0; I < u->I1; I++) {
        const gradient_rows r = rows_at(w, h, I);
        fetch_block(q, r.q, size / PAIR);
        fetch_block(q, r.dout, size / PAIR);
        fetch_block(q, r.dot, size / PAIR);
        fetch_block(q, r.qt, size / PAIR);
    }
    fetch_unpacked(w, h, u);
}

/* What one head works with in a square: tiles by row tile and column tile, where they are seen. */
typedef struct {
    gradient_tile tiles[SIDE][SIDE];
    bool seen[SIDE][SIDE];
    gradient_keys keys[SIDE];
    gradient_rows rows[SIDE];
} head_square;

/* dV and dK of column c of the square; fresh: they start here, even where no row sees the column. */
static void sum_columns(backward_job *w, const head_square *s, int c, bool fresh)
{
    const gradient_tile *t[SIDE];
    const gradient_rows *of[SIDE];
    int n = 0;
    for (int r = SIDE; r-- > 0;)
        if (s->seen[r][c]) {
            t[n] = &s->tiles[r][c];
            of[n++] = &s->rows[r];
        }
    if (n) {
        key_gradients(&w->room, n, t, of, &s->keys[c], fresh);
    } else if (fresh) {
        const size_t size = (size_t)(TILE * w->a->dh) * sizeof(float);
        memset(s->keys[c].dk, 0, size);
        if (s->keys[c].dv) memset(s->keys[c].dv, 0, size);
    }
}

/* dQ of row r of a square; false where there is none, or more to come. */
static bool sum_rows_of(backward_job *w, const square_of_tiles *u, const head_square *s, int r)
{
    const int64_t I = u->I0 + r;
    const gradient_tile *t[SIDE];
    const gradient_keys *of[SIDE];
    int n = 0;
    for (int c = 0; c < SIDE; c++)
        if (s->seen[r][c]) {
            t[n] = &s->tiles[r][c];
            of[n++] = &s->keys[c];
        }
    if (n) query_gradients(&w->room, n, t, of, s->rows[r].dq, !has_part(w, I, u->J0));
    return n > 0 && seen_to(w, I) <= u->J1;
}

/* What comes through F in tile (r, c) of a square: dZ at Z0 becomes words. */
static void select_gradients(const backward_job *w, const square_of_tiles *u, const gradient_tile *t, int64_t r,
                             int64_t c, float *Z0, float *dcarry)
{
    const sel_attention *a = w->a;
    const int64_t I = u->I0 + r, J = u->J0 + c;
    float *const G = w->scratch + w->p->g + (r * SIDE + c) * TILE * TILE;
    if (a->tau > 0.0 && w->g->memory_coef != 0.0f)
        add_memory(w, t, a->i0 + I * TILE, panel(w, w->p->f, u, I, J), G);
    selection_words(a, t, panel(w, w->p->l0, u, I, J), G, Z0, dcarry);
}

/* One head over a square of tiles. */
static void backward_head(backward_job *w, int64_t h, const square_of_tiles *u, float dcarry[SIDE][TILE])
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t kh = h * a->kv_heads / a->heads;
    const bool selecting = a->selective && h == 0 && !attention_bilinear(a);
    /* Heads go round as 1, 2 .. heads - 1, 0: this one is the first of its keys' where the one before has others. */
    const int64_t before = h == 1 || a->heads == 1 ? -1 : (h ? h - 1 : a->heads - 1) * a->kv_heads / a->heads;
    const bool opens = u->first_rows && (h ? kh != before : a->heads == a->kv_heads);
    const bool closes = u->last_rows && (!h || (kh && (h + 1) * a->kv_heads / a->heads != kh));
    head_square s = { .seen = { { false } } };

    for (int64_t c = 0; c < u->J1 - u->J0; c++) {
        s.keys[c] = keys_at(w, kh, u->J0 + c);
        if (opens && kh && !w->shared) pack_columns(w, kh, u->J0 + c);
    }
    for (int64_t r = 0; r < u->I1 - u->I0; r++) {
        s.rows[r] = rows_at(w, h, u->I0 + r);
        if (h && !w->shared && !has_part(w, u->I0 + r, u->J0)) pack_rows(w, h, u->I0 + r);
    }
    for (int64_t c = 0; c < u->J1 - u->J0; c++)
        for (int64_t r = u->I1 - u->I0; r-- > 0;) {
            const int64_t I = u->I0 + r, J = u->J0 + c;
            gradient_tile *const t = &s.tiles[r][c];
            float *const Z0 = w->scratch + p->raw;
            if (!(s.seen[r][c] = make_tile(w, I, J, t))) continue;
            tile_gradients(&w->room, t, &s.keys[c], &s.rows[r], selecting ? panel(w, p->l0, u, I, J) : NULL,
                           a->selective ? panel(w, p->f, u, I, J) : NULL,
                           a->selective ? w->scratch + p->g + (r * SIDE + c) * TILE * TILE : NULL,
                           h == 1 || a->heads == 1, selecting ? Z0 : NULL);
            if (selecting) select_gradients(w, u, t, r, c, Z0, dcarry[c]);
        }
    for (int c = 0; c < u->J1 - u->J0; c++) {
        sum_columns(w, &s, c, opens);
        if (closes) store_keys(w, kh, u->J0 + c);
    }
    for (int r = 0; r < u->I1 - u->I0; r++)
        if (sum_rows_of(w, u, &s, r) && !w->shared) store_dq(w, h, u->I0 + r, 1);
}

/* A selection with rows of its own, after all heads: what comes through F, to dsel_q and dsel_k alone. */
static void backward_selection(backward_job *w, const square_of_tiles *u, float dcarry[SIDE][TILE])
{
    float *const Z0 = w->scratch + w->p->raw;
    head_square s = { .seen = { { false } } };

    for (int64_t c = 0; c < u->J1 - u->J0; c++) s.keys[c] = selecting_keys_at(w, u->J0 + c);
    for (int64_t r = 0; r < u->I1 - u->I0; r++) s.rows[r] = selecting_rows_at(w, u->I0 + r);
    for (int64_t c = 0; c < u->J1 - u->J0; c++)
        for (int64_t r = u->I1 - u->I0; r-- > 0;) {
            if (!(s.seen[r][c] = make_tile(w, u->I0 + r, u->J0 + c, &s.tiles[r][c]))) continue;
            memset(Z0, 0, TILE * TILE * sizeof *Z0);
            select_gradients(w, u, &s.tiles[r][c], r, c, Z0, dcarry[c]);
        }
    for (int c = 0; c < u->J1 - u->J0; c++) {
        sum_columns(w, &s, c, u->first_rows);
        if (u->last_rows) store_dsel_k(w, u->J0 + c);
    }
    for (int r = 0; r < u->I1 - u->I0; r++)
        if (sum_rows_of(w, u, &s, r) && !w->shared) store_dsel_q(w, u->I0 + r, 1);
}

/* This thread's part of row tile I's dQ: zeros. */
static void no_part(const backward_job *w, int64_t I)
{
    const int64_t size = TILE * w->a->dh;
    memset(rows_at(w, 0, I).dq, 0, (size_t)(w->a->heads * size) * sizeof(float));
    if (attention_bilinear(w->a)) memset(selecting_rows_at(w, I).dq, 0, (size_t)size * sizeof(float));
}

/* A pair of column tiles that no row sees: their dK and dV are zero. */
static void store_unseen(const backward_job *w, int64_t J0, int64_t J1)
{
    const sel_attention *a = w->a;
    const size_t size = (size_t)(SIDE * a->kv_heads * TILE * a->dh) * sizeof(float);

    memset(w->scratch + w->p->dk, 0, size);
    memset(w->scratch + w->p->dv, 0, size);
    if (attention_bilinear(a)) memset(w->scratch + w->p->dsel_k, 0, size / (size_t)a->kv_heads);
    for (int64_t J = J0; J < J1; J++) {
        for (int64_t kh = 0; kh < a->kv_heads; kh++) store_keys(w, kh, J);
        if (attention_bilinear(a)) store_dsel_k(w, J);
    }
}

/* Moves u to the rows below it; false where there are none. */
static bool next_rows(const backward_job *w, square_of_tiles *u)
{
    u->I1 = u->I0;
    if (u->I1 <= u->lowest) return false;
    u->group = (u->I1 - 1) / w->p->group * w->p->group;
    u->I0 = (u->I1 - 1) / SIDE * SIDE > u->group ? (u->I1 - 1) / SIDE * SIDE : u->group;
    u->first_rows = u->I1 == u->highest;
    u->last_rows = u->I0 <= u->lowest;
    return true;
}

/* Puts u on the highest square of a pair of column tiles; false where no row sees them. */
static bool enter_columns(const backward_job *w, int64_t J0, square_of_tiles *u)
{
    *u = (square_of_tiles){ .J0 = J0, .J1 = least(J0 + SIDE, w->p->columns), .highest = w->p->tiles };
    while (u->lowest < u->highest && seen_to(w, u->lowest) <= u->J0) u->lowest++;
    while (u->highest > u->lowest && seen_from(w, u->highest - 1) >= u->J1) u->highest--;
    u->I0 = u->highest;
    return next_rows(w, u);
}

/* Asks for what the first head of the next square needs, and for what is packed there of head 0: below u, or where
   this thread's next pair of columns begins. */
static void fetch_square(backward_job *w, const square_of_tiles *u)
{
    square_of_tiles next = *u;
    if (!next_rows(w, &next)) {
        int64_t J = u->J0 + SIDE;
        while (w->shared && J < w->p->columns && owner(w, J) != w->thread) J += SIDE;
        if (J >= w->p->columns || !enter_columns(w, J, &next)) return;
    }
    fetch_head(w, w->a->heads > 1, &next);
    if (w->a->heads > 1) fetch_unpacked(w, 0, &next);
}

/* A pair of column tiles: their dK and dV, their part of every row's dQ. */
static void backward_columns(backward_job *w, int64_t J0)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    float dcarry[SIDE][TILE] = { { 0 } };
    square_of_tiles u;
    bool more = enter_columns(w, J0, &u);

    for (int64_t j = J0 * TILE; a->selective && w->g->dcarry_in && j < a->i1 && j < u.J1 * TILE; j++)
        dcarry[j / TILE - J0][j % TILE] = w->g->dcarry_in[w->b * a->carry_seq + j];
    if (!more) store_unseen(w, J0, u.J1);
    for (; more; more = next_rows(w, &u)) {
        const int64_t end = least(u.group + p->group, u.highest);
        if (u.I1 == end) {   /* a new group of row tiles */
            for (int64_t J = J0; J < u.J1 && u.first_rows && !w->shared; J++) pack_columns(w, 0, J);
            for (int64_t I = u.group; I < end && !w->shared; I++)   /* head 0 comes last, but its logits come first */
                if (!has_part(w, I, J0)) pack_rows(w, 0, I);
            if (a->selective) rebuild_selection(w, &u, end);
        }
        /* Head 0 last: its dF needs the other heads'. */
        for (int64_t n = 1; n <= a->heads; n++) {
            w->room.next.n = 0;
            if (n < a->heads) fetch_head(w, (n + 1) % a->heads, &u);
            else fetch_square(w, &u);
            backward_head(w, n % a->heads, &u, dcarry);
        }
        if (attention_bilinear(a)) backward_selection(w, &u, dcarry);
    }
    for (int64_t j = J0 * TILE; a->selective && w->g->dcarry_out && j < a->i1 && j < u.J1 * TILE; j++)
        w->g->dcarry_out[w->b * a->carry_seq + j] = dcarry[j / TILE - J0][j % TILE];
}

static backward_job new_backward_job(const sel_attention *a, const sel_attention_grad *g, const words_plan *p,
                                     int64_t b, int thread, int set)
{
    float *const base = a->workspace;
    return (backward_job){ .a = a, .g = g, .p = p, .b = b, .thread = thread,
                           .scratch = base + p->thread0 + thread * p->thread_size,
                           .pack = base + p->pack0 + set * p->pack_size,
                           .room = { .dh = a->dh, .scale = (float)(LOG2E / sqrt((double)a->dh)) } };
}

static void backward_words(const sel_attention *a, const sel_attention_grad *g)
{
    const words_plan p = sel_attention_words_plan(a, true);
    const int64_t whole = attention_whole(a);

    #pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int64_t b = 0; b < whole; b++) {
        backward_job w = new_backward_job(a, g, &p, b, omp_get_thread_num(), omp_get_thread_num());
        w.around = WORD_BF16 && gradients_go_around(a, g);   /* 2% faster; float32 gains nothing */
        for (int64_t J = 0; J < p.columns; J += SIDE) backward_columns(&w, J);
        end_results(w.around);
    }
    for (int64_t b = whole; b < a->B; b++) {
        #pragma omp parallel num_threads(a->threads)
        {
            const int thread = omp_get_thread_num();
            const backward_job zero = new_backward_job(a, g, &p, b, 0, 0);
            backward_job w = new_backward_job(a, g, &p, b, thread, 0);
            w.shared = true;
            #pragma omp for collapse(2) schedule(static) nowait
            for (int64_t J = 0; J < p.columns; J++)
                for (int64_t kh = 0; kh < a->kv_heads; kh++) pack_columns(&w, kh, J);
            #pragma omp for collapse(2) schedule(static)
            for (int64_t I = 0; I < p.tiles; I++)
                for (int64_t h = 0; h < a->heads; h++) pack_rows(&w, h, I);
            for (int64_t J = 0; J < p.columns; J += SIDE)
                if (owner(&w, J) == thread) backward_columns(&w, J);
            for (int64_t I = 0; I < p.tiles && a->window; I++)
                if (!has_part(&w, I, seen_to(&w, I))) no_part(&w, I);
            #pragma omp barrier
            #pragma omp for collapse(2) schedule(static)
            for (int64_t I = 0; I < p.tiles; I++)
                for (int64_t h = 0; h < a->heads; h++) {
                    store_dq(&zero, h, I, sharers(&zero, I));
                    if (h == 0 && attention_bilinear(a)) store_dsel_q(&zero, I, sharers(&zero, I));
                }
        }
    }
}

#endif
