/* attention_backward_c.c: fused selective attention, backward, in portable C (spec, sections 2, 3, 5).
 *
 * Column tiles outside, row tiles descending inside: all that selection needs is local to
 * a column (the carry of F going up, dcarry, the sum of dF over later rows, coming down),
 * dK and dV of a column finish at once, and only dQ is summed over columns.
 *
 *     P = exp(L - F - lse)     dZ = P (dP - delta)     dF = - sum over heads of dZ (+ memory loss)
 *     dS[i] = dcarry + sum of dF over later rows of the tile        dL[0] = dZ[0] + dS where S passed L on
 *
 * Where sel_q and sel_k make S, dS is the gradient of their logits and dL[0] = dZ[0].
 *
 * Threads take whole sequences; where there are more threads than sequences they share
 * one, each with columns of its own and a private dQ, summed in thread order.
 */
#include <math.h>
#include <omp.h>
#include "ops/attention_tile.h"
#include "ops/levels.h"

#define UNSEEN 1e30f    /* log-sum-exp of lanes that are no rows: P = exp(L - UNSEEN) = 0 */

typedef struct {
    const sel_attention *a;
    const sel_attention_grad *g;
    const attention_plan *p;
    int64_t b;
    float *scratch, *pack;     /* this thread's scratch, this sequence's packed arrays */
} job;

static int64_t kv_head(const sel_attention *a, int64_t h) { return h * a->kv_heads / a->heads; }

/* Rows of q or dout with their dh values in the lanes: as they lie, or copied (padded, widened). */
static const float *query_rows(const job *w, int64_t h, int64_t row, int64_t *stride)
{
    const sel_attention *a = w->a;
    *stride = w->p->copied ? a->heads * w->p->dhp : a->q_row;
    if (w->p->copied) return w->pack + w->p->q_rows + (row * a->heads + h) * w->p->dhp;
    return sel_attention_at(a, a->q, w->b * a->q_seq + row * a->q_row + h * a->dh);
}
static const float *dout_rows(const job *w, int64_t h, int64_t row, int64_t *stride)
{
    const sel_attention *a = w->a;
    *stride = w->p->copied ? a->heads * w->p->dhp : a->out_row;
    if (w->p->copied) return w->pack + w->p->dout_rows + (row * a->heads + h) * w->p->dhp;
    return sel_attention_at(a, w->g->dout, w->b * a->out_seq + row * a->out_row + h * a->dh);
}

static const float *selection_rows(const job *w, int64_t row, int64_t *stride)
{
    const sel_attention *a = w->a;
    *stride = w->p->copied ? w->p->dhp : a->sel_q_row;
    if (w->p->copied) return w->pack + w->p->sel_q_rows + row * w->p->dhp;
    return sel_attention_at(a, a->sel_q, w->b * a->sel_q_seq + row * a->sel_q_row);
}

/* Rows of column tile J of k, v or sel_k (`heads` heads; x: the sequence's first), *row apart, heads *head apart: as
   they lie, or copied (padded, widened). */
static const float *column_rows(const job *w, int64_t J, const void *x, int64_t x_row, int64_t heads, float *copy,
                                int64_t *row, int64_t *head)
{
    const sel_attention *a = w->a;
    const int64_t dh = a->dh, dhp = w->p->dhp, left = a->i1 - J * TILE;
    *row = w->p->copied ? dhp : x_row;
    *head = w->p->copied ? TILE * dhp : dh;
    if (!w->p->copied) return sel_attention_at(a, x, J * TILE * x_row);
    for (int64_t kh = 0; kh < heads; kh++)
        for (int64_t j = 0; j < TILE && j < left; j++)
            copy_padded(copy + (kh * TILE + j) * dhp, sel_attention_at(a, x, (J * TILE + j) * x_row + kh * dh), dh, dhp,
                        a->bfloat16);
    return copy;
}

/* Packs row tile I: Q^T (scaled) and dO^T of all heads, lse, delta = rowsum(dO o out). */
static void pack_tile(const job *w, int64_t I)
{
    const sel_attention *a = w->a;
    const attention_plan *p = w->p;
    const int64_t H = a->heads, dh = a->dh, row = I * TILE;
    const tile_place t = place_tile(a, I, 0);

    for (int64_t h = 0; h < H; h++) {
        const int64_t slot = I * H + h;
        const int64_t at = w->b * a->out_seq + row * a->out_row + h * dh;
        const void *const q = sel_attention_at(a, a->q, w->b * a->q_seq + row * a->q_row + h * dh);
        const void *const dout = sel_attention_at(a, w->g->dout, at), *const out = sel_attention_at(a, a->out, at);
        float *const lse = w->pack + p->lse_all + slot * TILE, *const delta = w->pack + p->delta_all + slot * TILE;

        transpose_rows(w->pack + p->qt_all + slot * dh * TILE, q, a->q_row, t.rows, dh, query_scale(a),
                       a->bfloat16);
        transpose_rows(w->pack + p->dot_all + slot * dh * TILE, dout, a->out_row, t.rows, dh, 1.0f, a->bfloat16);
        for (int i = 0; i < TILE; i++) {
            float sum = 0.0f;
            if (i < t.rows)
                for (int64_t d = i * a->out_row; d < i * a->out_row + dh; d++)
                    sum += operand(a->bfloat16, dout, d) * operand(a->bfloat16, out, d);
            delta[i] = sum;
            lse[i] = i < t.rows ? a->lse[(w->b * H + h) * p->rows + row + i] : UNSEEN;
        }
        for (int i = 0; p->copied && i < t.rows; i++) {
            const int64_t to = ((row + i) * H + h) * p->dhp;
            copy_padded(w->pack + p->q_rows + to, sel_attention_at(a, q, i * a->q_row), dh, p->dhp, a->bfloat16);
            copy_padded(w->pack + p->dout_rows + to, sel_attention_at(a, dout, i * a->out_row), dh, p->dhp,
                        a->bfloat16);
        }
    }
    if (!attention_bilinear(a)) return;
    const void *const own = sel_attention_at(a, a->sel_q, w->b * a->sel_q_seq + row * a->sel_q_row);
    transpose_rows(w->pack + p->sel_qt_all + I * dh * TILE, own, a->sel_q_row, t.rows, dh, query_scale(a), a->bfloat16);
    for (int i = 0; p->copied && i < t.rows; i++)
        copy_padded(w->pack + p->sel_q_rows + (row + i) * p->dhp, sel_attention_at(a, own, i * a->sel_q_row), dh,
                    p->dhp, a->bfloat16);
}

/* From logits X (not changed) to P and, dP in Z coming in, dZ = P (dP - delta); G += dZ where not NULL. */
static void softmax_gradient(const tile_place *t, const float *X, const float *F, float *P, float *Z, float *G,
                             const float *lse, const float *delta)
{
    for (int j = 0; j < t->cols; j++) {
        int lo = 0, hi = t->lanes;
        if (t->masked) seen_lanes(t, j, &lo, &hi);
        for (int v = 0; v < t->lanes; v += VL) {
            const int64_t at = j * TILE + v;
            vf x = vload(X + at);
            if (F) x -= vload(F + at);
            vf prob = vexp(x - vload(lse + v));
            if (t->masked) prob = vselect(lanes_between(v, lo, hi), prob, vset1(0.0f));
            const vf dz = prob * (vload(Z + at) - vload(delta + v));
            vstore(P + at, prob);
            vstore(Z + at, dz);
            if (G) vstore(G + at, vload(G + at) + dz);
        }
    }
}

/* The memory loss's own part of dF in the arg-max row (G = -dF). */
static void add_memory_gradient(const job *w, const tile_place *t, const float *F, float *G)
{
    const int64_t i = w->a->m_row[w->b] - t->row0;
    if (i < 0 || i >= t->rows) return;
    for (int j = 0; j < t->cols; j++) {
        int lo, hi;
        seen_lanes(t, j, &lo, &hi);
        if (i >= lo && i < hi && (double)F[j * TILE + i] < w->a->tau) G[j * TILE + i] += w->g->memory_coef;
    }
}

/* Z, the gradient of the logits L0 that S is made of but for S (head 0: its dZ; a source of its own: 0), gets S's: dF =
   -G is summed over later rows (reverse scan) and passes where S took the logit. */
static void selection_gradient(const sel_attention *a, const tile_place *t, const float *L0, const float *G, float *Z,
                               float *dcarry)
{
    const vf zero = { 0 };
    for (int j = 0; j < t->cols; j++) {
        int lo, hi;
        seen_lanes(t, j, &lo, &hi);
        const int64_t key = t->col0 + j - t->row0;
        const int own = a->protect_self && key >= 0 && key < TILE ? (int)key : -1;
        const bool never = a->protect_bos && t->col0 + j == 0;
        float base = dcarry[j];
        for (int v = t->lanes - VL; v >= 0; v -= VL) {
            const int64_t at = j * TILE + v;
            const vf sum = scan_down(-vload(G + at));
            const vf ds = (a->shift ? (vf)SHUFFLE(sum, zero, 1) : sum) + base;
            vi passes = lanes_between(v, lo, hi) & ~lanes_between(v, own, own + 1);
            if (a->relu) passes &= vload(L0 + at) > zero;
            if (!never) vstore(Z + at, vload(Z + at) + vselect(passes, ds, zero));
            base += sum[0];
        }
        dcarry[j] = base;
    }
}

static void round_tile(const tile_place *t, float *X)
{
    for (int j = 0; j < t->cols; j++) round_values(X + j * TILE, t->lanes);
}

/* One column tile: its dK and dV, its part of every row's dQ. */
static void backward_column(const job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const attention_plan *p = w->p;
    const int64_t H = a->heads, dh = a->dh, dhp = p->dhp, j0 = J * TILE, square = TILE * TILE;
    const int cols = (int)(a->i1 - j0 < TILE ? a->i1 - j0 : TILE);
    float *const P = w->scratch + p->p, *const Z = w->scratch + p->dz, *const G = w->scratch + p->g;
    float *const panel = w->scratch + p->l0, *const Fs = w->scratch + p->f;
    float *const dK = w->scratch + p->dk, *const dV = w->scratch + p->dv, *const dQ = w->scratch + p->dq;
    float *const dSelK = w->scratch + p->dsel_k, *const dSelQ = w->scratch + p->dsel_q;
    int64_t k_row, v_row, k_head, v_head;
    const float *const k = column_rows(w, J, sel_attention_at(a, a->k, w->b * a->k_seq), a->k_row, a->kv_heads,
                                       w->scratch + p->kcopy, &k_row, &k_head);
    const float *const v = column_rows(w, J, sel_attention_at(a, a->v, w->b * a->v_seq), a->v_row, a->kv_heads,
                                       w->scratch + p->vcopy, &v_row, &v_head);
    const bool bilinear = attention_bilinear(a);
    const float *own = k;                              /* keys and queries that S is made of */
    const float *own_qt = w->pack + p->qt_all;
    int64_t own_row = k_row, own_head = 0, own_tile = H * dh * TILE;
    const bool memory = a->selective && a->tau > 0.0 && w->g->memory_coef != 0.0f;
    float dcarry[TILE] = { 0 }, carry_here[TILE];

    memset(dK, 0, (size_t)(a->kv_heads * TILE * dhp) * sizeof *dK);
    memset(dV, 0, (size_t)(a->kv_heads * TILE * dhp) * sizeof *dV);
    if (bilinear) {
        own = column_rows(w, J, sel_attention_at(a, a->sel_k, w->b * a->sel_k_seq), a->sel_k_row, 1,
                          w->scratch + p->sel_kcopy, &own_row, &own_head);
        own_qt = w->pack + p->sel_qt_all;
        own_tile = dh * TILE;
        memset(dSelK, 0, (size_t)(TILE * dhp) * sizeof *dSelK);
    }
    if (a->selective && w->g->dcarry_in) memcpy(dcarry, w->g->dcarry_in + w->b * a->carry_seq + j0, (size_t)cols * 4);

    for (int64_t group = p->groups - 1; group >= 0; group--) {
        const int64_t I0 = group * p->group, I1 = I0 + p->group < p->tiles ? I0 + p->group : p->tiles;
        int64_t first, end;

        if (a->dead_after && all_dead(a, w->b, a->saved + (w->b * p->groups + group) * a->i1, J)) continue;
        /* Up the group: the selection's logits and F of its tiles, from the saved carry. */
        if (a->selective) {
            memcpy(carry_here, a->saved + (w->b * p->groups + group) * a->i1 + j0, (size_t)cols * 4);
            for (int64_t I = I0; I < I1; I++) {
                seen_columns(a, I, &first, &end);
                if (J < first || J >= end) continue;
                const tile_place t = place_tile(a, I, J);
                float *const L0 = panel + (I - I0) * square, *const F = Fs + (I - I0) * square;
                logits_tile(a, &t, own, own_row, own_qt + I * own_tile, L0);
                select_tile(a, &t, L0, F, carry_here - j0);
            }
        }

        /* Down the group: head 0 last, when the other heads' dF is known. */
        for (int64_t I = I1 - 1; I >= I0; I--) {
            seen_columns(a, I, &first, &end);
            if (J < first || J >= end) continue;
            const tile_place t = place_tile(a, I, J);
            const float *const L0 = panel + (I - I0) * square, *const F = a->selective ? Fs + (I - I0) * square : NULL;

            if (a->selective) {
                memset(G, 0, (size_t)square * sizeof *G);
                if (memory) add_memory_gradient(w, &t, F, G);
            }
            for (int64_t n = 0; n < H; n++) {
                const int64_t h = (n + 1) % H, kh = kv_head(a, h), slot = I * H + h;
                const bool selects = a->selective && !bilinear && h == 0;
                int64_t stride;

                if (!selects)
                    logits_tile(a, &t, k + kh * k_head, k_row, w->pack + p->qt_all + slot * dh * TILE, P);
                product(t.cols, t.lanes, dh, v + kh * v_head, v_row, 1, w->pack + p->dot_all + slot * dh * TILE, TILE,
                        Z, TILE, false);
                softmax_gradient(&t, selects ? L0 : P, F, P, Z, a->selective ? G : NULL,
                                 w->pack + p->lse_all + slot * TILE, w->pack + p->delta_all + slot * TILE);
                if (selects) selection_gradient(a, &t, L0, G, Z, dcarry);
                if (a->bfloat16) {      /* as operands only: dZ, G and dF were made of the unrounded values */
                    round_tile(&t, P);
                    round_tile(&t, Z);
                }

                const float *rows = dout_rows(w, h, I * TILE, &stride);
                product(t.cols, dhp, t.rows, P, TILE, 1, rows, stride, dV + kh * TILE * dhp, dhp, true);
                rows = query_rows(w, h, I * TILE, &stride);
                product(t.cols, dhp, t.rows, Z, TILE, 1, rows, stride, dK + kh * TILE * dhp, dhp, true);
                product(t.rows, dhp, t.cols, Z, 1, TILE, k + kh * k_head, k_row, dQ + (I * TILE * H + h) * dhp,
                        H * dhp, true);
            }
            if (bilinear) {
                int64_t stride;
                memset(Z, 0, (size_t)square * sizeof *Z);
                selection_gradient(a, &t, L0, G, Z, dcarry);
                if (a->bfloat16) round_tile(&t, Z);
                const float *const rows = selection_rows(w, I * TILE, &stride);
                product(t.cols, dhp, t.rows, Z, TILE, 1, rows, stride, dSelK, dhp, true);
                product(t.rows, dhp, t.cols, Z, 1, TILE, own, own_row, dSelQ + I * TILE * dhp, dhp, true);
            }
        }
    }

    const float scale = (float)(1.0 / sqrt((double)dh));
    for (int64_t kh = 0; kh < a->kv_heads; kh++)
        for (int j = 0; j < cols; j++) {
            float *const dk = w->g->dk + w->b * w->g->dk_seq + (j0 + j) * w->g->dk_row + kh * dh;
            float *const dv = w->g->dv + w->b * w->g->dv_seq + (j0 + j) * w->g->dv_row + kh * dh;
            for (int64_t d = 0; d < dh; d++) {
                dk[d] = scale * dK[(kh * TILE + j) * dhp + d];
                dv[d] = dV[(kh * TILE + j) * dhp + d];
            }
        }
    for (int j = 0; bilinear && j < cols; j++) {
        float *const dk = w->g->dsel_k + w->b * w->g->dsel_k_seq + (j0 + j) * w->g->dsel_k_row;
        for (int64_t d = 0; d < dh; d++) dk[d] = scale * dSelK[j * dhp + d];
    }
    if (a->selective && w->g->dcarry_out)
        memcpy(w->g->dcarry_out + w->b * a->carry_seq + j0, dcarry, (size_t)cols * 4);
}

/* dq [dh]: the threads' sums [sum + n thread_size], in thread order. */
static void add_threads(const job *w, const float *sum, int threads, float *dq)
{
    const float scale = (float)(1.0 / sqrt((double)w->a->dh));
    for (int64_t d = 0; d < w->a->dh; d++) dq[d] = sum[d];
    for (int n = 1; n < threads; n++) {
        sum += w->p->thread_size;
        for (int64_t d = 0; d < w->a->dh; d++) dq[d] += sum[d];
    }
    for (int64_t d = 0; d < w->a->dh; d++) dq[d] *= scale;
}

/* dq and dsel_q of row tile I; w: the first thread's. */
static void store_dq(const job *w, int64_t I, int threads)
{
    const sel_attention *a = w->a;
    const sel_attention_grad *g = w->g;
    const attention_plan *p = w->p;
    const tile_place t = place_tile(a, I, 0);

    for (int64_t row = I * TILE; row < I * TILE + t.rows; row++) {
        for (int64_t h = 0; h < a->heads; h++)
            add_threads(w, w->scratch + p->dq + (row * a->heads + h) * p->dhp, threads,
                        g->dq + w->b * g->dq_seq + row * g->dq_row + h * a->dh);
        if (attention_bilinear(a))
            add_threads(w, w->scratch + p->dsel_q + row * p->dhp, threads,
                        g->dsel_q + w->b * g->dsel_q_seq + row * g->dsel_q_row);
    }
}

static job new_job(const sel_attention *a, const sel_attention_grad *g, const attention_plan *p, int64_t b, int thread,
                   int set)
{
    float *const base = a->workspace;
    return (job){ .a = a, .g = g, .p = p, .b = b, .scratch = base + p->thread0 + thread * p->thread_size,
                  .pack = base + p->pack0 + set * p->pack_size };
}

static void clear_dq(const job *w)
{
    const size_t rows = (size_t)(w->p->tiles * TILE * w->p->dhp) * sizeof(float);
    memset(w->scratch + w->p->dq, 0, rows * (size_t)w->a->heads);
    if (attention_bilinear(w->a)) memset(w->scratch + w->p->dsel_q, 0, rows);
}

/* Column J's thread: dealt 0 .. T-1, T-1 .. 0, so that early (long) and late (short) columns even out. */
static bool mine(int64_t J, int thread, int threads)
{
    const int64_t k = J % (2 * threads);
    return k == thread || k == 2 * threads - 1 - thread;
}

static void attention_backward(const sel_attention *a, const sel_attention_grad *g)
{
    const attention_plan p = sel_attention_plan(a, true);
    const int64_t whole = attention_whole(a);
    if (!p.rows) return;

    #pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int64_t b = 0; b < whole; b++) {
        const int thread = omp_get_thread_num();
        const job w = new_job(a, g, &p, b, thread, thread);
        clear_dq(&w);
        for (int64_t I = 0; I < p.tiles; I++) pack_tile(&w, I);
        for (int64_t J = 0; J < p.columns; J++) backward_column(&w, J);
        for (int64_t I = 0; I < p.tiles; I++) store_dq(&w, I, 1);
    }
    for (int64_t b = whole; b < a->B; b++) {
        #pragma omp parallel num_threads(a->threads)
        {
            const int thread = omp_get_thread_num();
            const job w = new_job(a, g, &p, b, thread, 0);
            clear_dq(&w);
            #pragma omp for schedule(static)
            for (int64_t I = 0; I < p.tiles; I++) pack_tile(&w, I);
            for (int64_t J = 0; J < p.columns; J++)
                if (mine(J, thread, a->threads)) backward_column(&w, J);
            const job first = new_job(a, g, &p, b, 0, 0);
            #pragma omp barrier
            #pragma omp for schedule(static)
            for (int64_t I = 0; I < p.tiles; I++) store_dq(&first, I, a->threads);
        }
    }
}

void SEL_FN(sel_ops_attention_backward_init)(sel_ops *ops) { ops->attention_backward = attention_backward; }
