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
#include "ops/attention_words_gradients.h"

typedef struct {
    const sel_attention *a;
    const sel_attention_grad *g;
    const words_plan *p;
    int64_t b;
    float *scratch, *pack;    /* this thread's scratch, this sequence's packed operands */
    gradient_room room;
} backward_job;

/* The four tiles that go together: row tiles [I0, I1), column tiles [J0, J1), a group of row tiles from `group`. */
typedef struct {
    int64_t I0, I1, J0, J1, group;
    bool first_rows;          /* the first that these column tiles meet: dK and dV start here */
    bool first_columns;       /* the first that these row tiles meet in this thread: dQ starts here */
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

/* n values of each of TILE rows of x, `real` of them, the rest zero: words by row, or by pairs of rows. */
static void copy_rows(word *to, const float *x, int64_t x_row, int real, int64_t n)
{
    for (int i = 0; i < TILE; i++)
        if (i < real) row_words(to + i * n / PAIR, x + i * x_row, n);
        else memset(to + i * n / PAIR, 0, (size_t)(n / PAIR) * sizeof *to);
}
static void copy_pairs(word *to, const float *x, int64_t x_row, int real, int64_t n)
{
#if WORD_BF16
    for (int i = 0; i < TILE; i += 2)
        if (i < real) pair_rows(to + i / 2 * n, x + i * x_row, i + 1 < real ? x + (i + 1) * x_row : NULL, n);
        else memset(to + i / 2 * n, 0, (size_t)n * sizeof *to);
#else
    copy_rows(to, x, x_row, real, n);
#endif
}

static word *writable(const backward_job *w, const word *at) { return (word *)w->pack + (at - (const word *)w->pack); }

static void pack_columns(const backward_job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const int cols = (int)(a->i1 - J * TILE < TILE ? a->i1 - J * TILE : TILE);
    for (int64_t kh = 0; kh < a->kv_heads; kh++) {
        const gradient_keys to = keys_at(w, kh, J);
        const float *const k = a->k + w->b * a->k_seq + J * TILE * a->k_row + kh * a->dh;
        copy_rows(writable(w, to.k), k, a->k_row, cols, a->dh);
        if (WORD_BF16) copy_pairs(writable(w, to.pairs), k, a->k_row, cols, a->dh);
        copy_rows(writable(w, to.v), a->v + w->b * a->v_seq + J * TILE * a->v_row + kh * a->dh, a->v_row, cols, a->dh);
    }
}

/* Row tile I: q and dO in both forms, lse (log2), delta = rowsum(dO o out). */
static void pack_rows(const backward_job *w, int64_t I)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t H = a->heads, dh = a->dh, row = I * TILE;
    const int rows = (int)(p->rows - row < TILE ? p->rows - row : TILE);

    for (int64_t h = 0; h < H; h++) {
        const gradient_rows to = rows_at(w, h, I);
        const float *const q = a->q + w->b * a->q_seq + row * a->q_row + h * dh;
        const float *const dout = w->g->dout + w->b * a->out_seq + row * a->out_row + h * dh;
        const float *const out = a->out + w->b * a->out_seq + row * a->out_row + h * dh;
        const float *const lse = a->lse + (w->b * H + h) * p->rows + row;
        float *const lse2 = w->pack + p->lse_all + (I * H + h) * TILE;
        float *const delta = w->pack + p->delta_all + (I * H + h) * TILE;

        transpose_words(writable(w, to.qt), q, a->q_row, rows, dh);
        copy_pairs(writable(w, to.q), q, a->q_row, rows, dh);
        transpose_words(writable(w, to.dot), dout, a->out_row, rows, dh);
        copy_pairs(writable(w, to.dout), dout, a->out_row, rows, dh);
        for (int i = 0; i < TILE; i++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; i < rows && d < dh; d += V16)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(dout + i * a->out_row + d),
                                      _mm512_loadu_ps(out + i * a->out_row + d), sum);
            delta[i] = _mm512_reduce_add_ps(sum);
        }
        for (int i = 0; i < rows; i++) lse2[i] = (float)(LOG2E * (double)lse[i]);
        for (int i = rows; i < TILE; i++) lse2[i] = NO_ROW;
    }
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
    return I < p->tiles && J < p->columns && row0 + rows > col0;
}

/* The memory loss's own part of dF in the arg-max row (G = -dF; NF = -F, raw). */
static void add_memory(const backward_job *w, const gradient_tile *t, const float *NF, float *G)
{
    const int64_t i = w->a->m_row[w->b] - (t->col0 + t->view.off);
    if (i < 0 || i >= t->rows) return;
    for (int j = 0; j < t->cols && j <= i + t->view.off; j++)
        if (-(double)NF[j * TILE + i] < w->a->tau * sqrt((double)w->a->dh)) G[j * TILE + i] += w->g->memory_coef;
}

/* Where head 0's logits and -F of tile (I, J) of a group lie. */
static float *panel(const backward_job *w, int64_t array, const square_of_tiles *u, int64_t I, int64_t J)
{
    return w->scratch + array + ((I - u->group) * SIDE + J % SIDE) * TILE * TILE;
}

/* Head 0's logits and -F of the column tiles in all row tiles [u->group, end), upwards from the saved carry. */
static void rebuild_selection(backward_job *w, const square_of_tiles *u, int64_t end)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t kw = a->dh / PAIR, group = u->group / p->group;
    const float *const saved = a->saved + (w->b * sel_attention_carries(p->rows) + group) * a->i1;
    gradient_tile t;

    for (int64_t J = u->J0; J < u->J1; J++) {
        const word *const k = keys_at(w, 0, J).k;
        float carry[TILE] = { 0 };
        memcpy(carry, saved + J * TILE, (size_t)(a->i1 - J * TILE < TILE ? a->i1 - J * TILE : TILE) * sizeof *carry);
        for (int64_t I = u->group; I < end; I++) {
            if (!make_tile(w, I, J, &t)) continue;
            float *const L0 = panel(w, p->l0, u, I, J);
            for (int v0 = 0; v0 < t.view.lanes; v0 += 32)
                product_32(end_block(&t.view, v0 + V16) * 8, kw, k, kw, 1, rows_at(w, 0, I).qt + v0, TILE, L0 + v0,
                           TILE, true);
            select_words(a, L0, panel(w, p->f, u, I, J), carry, t.rows, t.cols, t.view.lanes, t.col0, t.view.off);
        }
    }
}

static void fetch_block(fetch_queue *q, const void *at, int64_t bytes)
{
    fetch_rows(q, at, CHUNK, bytes / CHUNK, CHUNK);
}

/* Asks for what head h needs in a square, what it needs first last. */
static void fetch_head(backward_job *w, int64_t h, const square_of_tiles *u)
{
    const int64_t kh = h * w->a->kv_heads / w->a->heads, size = TILE * w->a->dh * 4;
    fetch_queue *const q = &w->room.next;

    q->n = 0;
    for (int64_t I = u->I0; I < u->I1 && !u->first_columns; I++) fetch_block(q, rows_at(w, h, I).dq, size);
    for (int64_t J = u->J0; J < u->J1; J++) {
        const gradient_keys keys = keys_at(w, kh, J);
        fetch_block(q, keys.dk, size);
        fetch_block(q, keys.dv, size);
        if (WORD_BF16) fetch_block(q, keys.pairs, size / PAIR);
    }
    for (int64_t I = u->I0; I < u->I1; I++) {
        fetch_block(q, rows_at(w, h, I).q, size / PAIR);
        fetch_block(q, rows_at(w, h, I).dout, size / PAIR);
    }
    for (int64_t J = u->J1; J-- > u->J0;) {
        fetch_block(q, keys_at(w, kh, J).v, size / PAIR);
        fetch_block(q, keys_at(w, kh, J).k, size / PAIR);
    }
    for (int64_t I = u->I0; I < u->I1; I++) {
        fetch_block(q, rows_at(w, h, I).dot, size / PAIR);
        fetch_block(q, rows_at(w, h, I).qt, size / PAIR);
    }
}

/* One head over a square of tiles. */
static void backward_head(backward_job *w, int64_t h, const square_of_tiles *u, float dcarry[SIDE][TILE])
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t kh = h * a->kv_heads / a->heads;
    const bool first = a->selective && h == 0;
    /* Heads go round as 1, 2 .. heads - 1, 0: this one is the first of its keys' where the one before has others. */
    const int64_t before = h == 1 || a->heads == 1 ? -1 : (h ? h - 1 : a->heads - 1) * a->kv_heads / a->heads;
    const bool opens = u->first_rows && (h ? kh != before : a->heads == a->kv_heads);
    gradient_tile tiles[SIDE][SIDE];
    gradient_keys keys[SIDE];
    gradient_rows rows[SIDE];
    bool seen[SIDE][SIDE] = { { false } };

    for (int64_t c = 0; c < u->J1 - u->J0; c++) keys[c] = keys_at(w, kh, u->J0 + c);
    for (int64_t r = 0; r < u->I1 - u->I0; r++) rows[r] = rows_at(w, h, u->I0 + r);
    for (int64_t c = 0; c < u->J1 - u->J0; c++)
        for (int64_t r = u->I1 - u->I0; r-- > 0;) {
            const int64_t I = u->I0 + r, J = u->J0 + c;
            gradient_tile *const t = &tiles[r][c];
            if (!(seen[r][c] = make_tile(w, I, J, t))) continue;
            float *const L0 = panel(w, p->l0, u, I, J), *const NF = panel(w, p->f, u, I, J);
            float *const G = w->scratch + p->g + (r * SIDE + c) * TILE * TILE, *const Z0 = w->scratch + p->raw;
            tile_gradients(&w->room, t, &keys[c], &rows[r], first ? L0 : NULL, a->selective ? NF : NULL,
                           a->selective ? G : NULL, first ? Z0 : NULL);
            if (first) {
                if (a->tau > 0.0 && w->g->memory_coef != 0.0f) add_memory(w, t, NF, G);
                selection_words(a, t, L0, G, Z0, dcarry[c]);
            }
        }
    for (int c = 0; c < SIDE; c++) {
        const gradient_tile *t[SIDE];
        const gradient_rows *of[SIDE];
        int n = 0;
        for (int r = SIDE; r-- > 0;)
            if (seen[r][c]) {
                t[n] = &tiles[r][c];
                of[n++] = &rows[r];
            }
        if (n) key_gradients(&w->room, n, t, of, &keys[c], opens);
    }
    for (int r = 0; r < SIDE; r++) {
        const gradient_tile *t[SIDE];
        const gradient_keys *of[SIDE];
        int n = 0;
        for (int c = 0; c < SIDE; c++)
            if (seen[r][c]) {
                t[n] = &tiles[r][c];
                of[n++] = &keys[c];
            }
        if (n) query_gradients(&w->room, n, t, of, rows[r].dq, u->first_columns);
    }
}

/* dK (times 1 / sqrt(dh)) and dV of a pair of column tiles. */
static void store_keys(const backward_job *w, int64_t J0)
{
    const sel_attention *a = w->a;
    const int64_t dh = a->dh;
    const __m512 scale = _mm512_set1_ps((float)(1.0 / sqrt((double)dh)));

    for (int64_t j = J0 * TILE; j < a->i1 && j < (J0 + SIDE) * TILE; j++)
        for (int64_t kh = 0; kh < a->kv_heads; kh++) {
            const gradient_keys from = keys_at(w, kh, j / TILE);
            float *const dk = w->g->dk + w->b * w->g->dk_seq + j * w->g->dk_row + kh * dh;
            float *const dv = w->g->dv + w->b * w->g->dv_seq + j * w->g->dv_row + kh * dh;
            for (int64_t d = 0; d < dh; d += V16) {
                _mm512_storeu_ps(dk + d, _mm512_mul_ps(_mm512_loadu_ps(from.dk + j % TILE * dh + d), scale));
                _mm512_storeu_ps(dv + d, _mm512_loadu_ps(from.dv + j % TILE * dh + d));
            }
        }
}

/* A pair of column tiles: their dK and dV, their part of every row's dQ; first: this thread's first pair. */
static void backward_columns(backward_job *w, int64_t J0, bool first)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t J1 = J0 + SIDE < p->columns ? J0 + SIDE : p->columns;
    float dcarry[SIDE][TILE] = { { 0 } };

    for (int64_t j = J0 * TILE; a->selective && w->g->dcarry_in && j < a->i1 && j < J1 * TILE; j++)
        dcarry[j / TILE - J0][j % TILE] = w->g->dcarry_in[w->b * a->carry_seq + j];

    for (int64_t group = p->groups - 1; group >= 0; group--) {
        const int64_t G0 = group * p->group, G1 = G0 + p->group < p->tiles ? G0 + p->group : p->tiles;
        square_of_tiles u = { .J0 = J0, .J1 = J1, .group = G0, .first_columns = first };
        if (a->i0 + G1 * TILE <= J0 * TILE) continue;      /* all rows lie before these keys */
        if (a->selective) rebuild_selection(w, &u, G1);
        for (u.I1 = G1; u.I1 > G0; u.I1 = u.I0) {
            u.I0 = (u.I1 - 1) / SIDE * SIDE > G0 ? (u.I1 - 1) / SIDE * SIDE : G0;
            u.first_rows = u.I1 == p->tiles;
            square_of_tiles below = u;
            below.I1 = u.I0;
            below.I0 = u.I0 > SIDE ? u.I0 - SIDE : 0;
            if (a->selective) memset(w->scratch + p->g, 0, SIDE * SIDE * TILE * TILE * sizeof(float));
            /* Head 0 last: its dF needs the other heads'. */
            for (int64_t n = 1; n <= a->heads; n++) {
                fetch_head(w, (n + 1) % a->heads, n < a->heads ? &u : &below);
                backward_head(w, n % a->heads, &u, dcarry);
            }
        }
    }
    store_keys(w, J0);
    for (int64_t j = J0 * TILE; a->selective && w->g->dcarry_out && j < a->i1 && j < J1 * TILE; j++)
        w->g->dcarry_out[w->b * a->carry_seq + j] = dcarry[j / TILE - J0][j % TILE];
}

/* dq of row tile I: the sums of the threads that have one, in thread order, turned back to rows.  A thread has none
   where its first pair of column tiles lies after the rows. */
static void store_dq(const backward_job *w, int64_t I, int threads)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t dh = a->dh, end = a->i0 + I * TILE + TILE < a->i1 ? a->i0 + I * TILE + TILE : a->i1;
    const __m512 scale = _mm512_set1_ps((float)(1.0 / sqrt((double)dh)));
    const int rows = (int)(end - a->i0 - I * TILE);
    int summed = 1;

    while (summed < threads && summed * SIDE * TILE < end) summed++;
    for (int64_t h = 0; h < a->heads; h++) {
        const float *const sum = rows_at(w, h, I).dq;
        float *const dq = w->g->dq + w->b * w->g->dq_seq + I * TILE * w->g->dq_row + h * dh;
        for (int i0 = 0; i0 < rows; i0 += V16)
            for (int64_t d = 0; d < dh; d += V16) {
                __m512i x[16];
                #pragma GCC unroll 16
                for (int k = 0; k < 16; k++) {
                    const float *at = sum + (d + k) * TILE + i0;
                    __m512 y = _mm512_loadu_ps(at);
                    for (int n = 1; n < summed; n++) y = _mm512_add_ps(y, _mm512_loadu_ps(at += p->thread_size));
                    x[k] = _mm512_castps_si512(_mm512_mul_ps(y, scale));
                }
                transpose_registers(x);
                #pragma GCC unroll 16
                for (int i = 0; i < 16; i++)
                    if (i0 + i < rows) _mm512_storeu_si512(dq + (i0 + i) * w->g->dq_row + d, x[i]);
            }
    }
}

static backward_job new_backward_job(const sel_attention *a, const sel_attention_grad *g, const words_plan *p,
                                     int64_t b, int thread, int set)
{
    float *const base = a->workspace;
    return (backward_job){ .a = a, .g = g, .p = p, .b = b, .scratch = base + p->thread0 + thread * p->thread_size,
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
        for (int64_t J = 0; J < p.columns; J++) pack_columns(&w, J);
        for (int64_t I = 0; I < p.tiles; I++) pack_rows(&w, I);
        for (int64_t J = 0; J < p.columns; J += SIDE) backward_columns(&w, J, J == 0);
        for (int64_t I = 0; I < p.tiles; I++) store_dq(&w, I, 1);
    }
    for (int64_t b = whole; b < a->B; b++) {
        #pragma omp parallel num_threads(a->threads)
        {
            const int thread = omp_get_thread_num(), threads = a->threads;
            const backward_job zero = new_backward_job(a, g, &p, b, 0, 0);
            backward_job w = new_backward_job(a, g, &p, b, thread, 0);
            #pragma omp for schedule(static)
            for (int64_t J = 0; J < p.columns; J++) pack_columns(&w, J);
            #pragma omp for schedule(static)
            for (int64_t I = 0; I < p.tiles; I++) pack_rows(&w, I);
            /* Pairs of columns dealt 0 .. T-1, T-1 .. 0: early ones are long, late ones short. */
            for (int64_t J = 0; J < p.columns; J += SIDE) {
                const int64_t k = J / SIDE % (2 * threads);
                if (k == thread || k == 2 * threads - 1 - thread) backward_columns(&w, J, J / SIDE == thread);
            }
            #pragma omp barrier
            #pragma omp for schedule(static)
            for (int64_t I = 0; I < p.tiles; I++) store_dq(&zero, I, threads);
        }
    }
}

#endif
