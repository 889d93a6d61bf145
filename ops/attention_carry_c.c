/* attention_carry_c.c: what calls that share a sequence's rows tell each other, in portable C (attention.h; spec,
 * section 4): column sums of S, and what later rows' dF adds to earlier rows' gradients.
 *
 * Both go by column tiles, as backward does: a column's sums and dK belong to one thread, rows ascend, and the tiles'
 * logits and S are those of the forward pass.  Only dQ is summed over columns, each thread's for itself, and then in
 * thread order.
 */
#include <math.h>
#include <omp.h>
#include "core/base/error.h"
#include "ops/attention_tile.h"
#include "ops/levels.h"

/* One sequence and one thread. */
typedef struct {
    const sel_attention *a;
    const sel_attention_grad *g;
    const attention_plan *p;
    selection_source from;
    selection_gradients to;
    int64_t b;
    float *scratch, *pack;
} job;

static job new_job(const sel_attention *a, const sel_attention_grad *g, const attention_plan *p, int64_t b, int thread,
                   int set)
{
    float *const base = a->workspace;
    return (job){ .a = a, .g = g, .p = p, .b = b, .from = attention_selection(a),
                  .scratch = base + p->thread0 + thread * p->thread_size,
                  .pack = base + p->pack0 + set * p->pack_size };
}

static const void *query_row(const job *w, int64_t row)
{
    return sel_attention_at(w->a, w->from.q, w->b * w->from.q_seq + row * w->from.q_row);
}
static const void *key_row(const job *w, int64_t j)
{
    return sel_attention_at(w->a, w->from.k, w->b * w->from.k_seq + j * w->from.k_row);
}

/* Keys of column tile J, *stride apart: as they lie, or copied (padded to `padded` values, widened). */
static const float *column_keys(const job *w, int64_t J, float *copy, bool copied, int64_t padded, int64_t *stride)
{
    const int64_t j0 = J * TILE, left = w->a->i1 - j0;
    *stride = copied ? padded : w->from.k_row;
    if (!copied) return key_row(w, j0);
    for (int64_t j = 0; j < TILE && j < left; j++)
        copy_padded(copy + j * padded, key_row(w, j0 + j), w->a->dh, padded, w->a->bfloat16);
    return copy;
}

/* The first row tile that sees column tile J. */
static int64_t first_tile(const sel_attention *a, int64_t J)
{
    return J * TILE > a->i0 ? (J * TILE - a->i0) / TILE : 0;
}

/* ---- column sums of S ---- */

static void carry_column(const job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const int64_t j0 = J * TILE, dh = a->dh, before = a->i0 - j0;
    float *const Qt = w->scratch + w->p->qt, *const X = w->scratch + w->p->tile;
    const int cols = (int)(a->i1 - j0 < TILE ? a->i1 - j0 : TILE);
    int64_t stride;
    const float *const k = column_keys(w, J, w->scratch + w->p->krows, a->bfloat16, dh, &stride);
    float carry[TILE];

    for (int j = 0; j < cols; j++)
        carry[j] = a->carry_in && j < before ? a->carry_in[w->b * a->carry_seq + j0 + j] : 0.0f;
    for (int64_t I = first_tile(a, J); I < w->p->tiles; I++) {
        const tile_place t = place_tile(a, I, J);
        transpose_rows(Qt, query_row(w, I * TILE), w->from.q_row, t.rows, dh, query_scale(a), a->bfloat16);
        logits_tile(a, &t, k, stride, Qt, X);
        select_tile(a, &t, X, X, carry - j0);
    }
    memcpy(a->carry_out + w->b * a->carry_seq + j0, carry, (size_t)cols * sizeof *carry);
}

static void attention_carry(const sel_attention *a)
{
    const attention_plan p = sel_attention_plan(a, false);

    SEL_ASSERT(a->selective && a->window == 0 && a->carry_out);
    #pragma omp parallel for num_threads(a->threads) collapse(2) schedule(dynamic, 1)
    for (int64_t b = 0; b < a->B; b++)
        for (int64_t J = 0; J < p.columns; J++) {
            const job w = new_job(a, NULL, &p, b, omp_get_thread_num(), 0);
            carry_column(&w, J);
        }
}

/* ---- gradients ---- */

/* Q^T (scaled) and, where needed, the rows of row tile I. */
static void pack_tile(const job *w, int64_t I)
{
    const sel_attention *a = w->a;
    const attention_plan *p = w->p;
    const tile_place t = place_tile(a, I, 0);

    transpose_rows(w->pack + p->qt_all + I * a->dh * TILE, query_row(w, I * TILE), w->from.q_row, t.rows, a->dh,
                   query_scale(a), a->bfloat16);
    for (int64_t row = I * TILE; p->copied && row < I * TILE + t.rows; row++)
        copy_padded(w->pack + p->q_rows + row * p->dhp, query_row(w, row), a->dh, p->dhp, a->bfloat16);
}

/* From logits X to dL: what comes through F passes where S took the logit. */
static void pass_gradient(const sel_attention *a, const tile_place *t, float *X, const float *dcarry)
{
    const vf zero = { 0 };
    for (int j = 0; j < t->cols; j++) {
        const int64_t key = t->col0 + j - t->row0;
        const int own = a->protect_self && key >= 0 && key < TILE ? (int)key : -1;
        const bool never = a->protect_bos && t->col0 + j == 0;
        int lo, hi;
        seen_lanes(t, j, &lo, &hi);
        for (int v = 0; v < t->lanes; v += VL) {
            vi passes = lanes_between(v, lo, hi) & ~lanes_between(v, own, own + 1);
            if (a->relu) passes &= vload(X + j * TILE + v) > zero;
            vstore(X + j * TILE + v, never ? zero : vselect(passes, vset1(dcarry[j]), zero));
        }
    }
}

/* One column tile: its dK, its part of every row's dQ. */
static void backward_column(const job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const attention_plan *p = w->p;
    const int64_t dh = a->dh, dhp = p->dhp, j0 = J * TILE;
    const int cols = (int)(a->i1 - j0 < TILE ? a->i1 - j0 : TILE);
    const float scale = (float)(1.0 / sqrt((double)dh));
    float *const Z = w->scratch + p->dz, *const dK = w->scratch + p->dk, *const dQ = w->scratch + p->dq;
    int64_t k_row;
    const float *const k = column_keys(w, J, w->scratch + p->kcopy, p->copied, dhp, &k_row);
    float dcarry[TILE];

    memset(dK, 0, (size_t)(TILE * dhp) * sizeof *dK);
    memcpy(dcarry, w->g->dcarry_in + w->b * a->carry_seq + j0, (size_t)cols * sizeof *dcarry);
    if (a->bfloat16) round_values(dcarry, cols);
    for (int64_t I = first_tile(a, J); I < p->tiles; I++) {
        const tile_place t = place_tile(a, I, J);
        const float *const rows = p->copied ? w->pack + p->q_rows + I * TILE * dhp : query_row(w, I * TILE);

        if (a->dead_after && all_dead(a, w->b, a->saved + (w->b * p->groups + I / p->group) * a->i1, J)) break;
        logits_tile(a, &t, k, k_row, w->pack + p->qt_all + I * dh * TILE, Z);
        pass_gradient(a, &t, Z, dcarry);
        product(t.cols, dhp, t.rows, Z, TILE, 1, rows, p->copied ? dhp : w->from.q_row, dK, dhp, true);
        product(t.rows, dhp, t.cols, Z, 1, TILE, k, k_row, dQ + I * TILE * dhp, dhp, true);
    }
    for (int j = 0; j < cols; j++) {
        float *const dk = w->to.dk + w->b * w->to.dk_seq + (j0 + j) * w->to.dk_row;
        for (int64_t d = 0; d < dh; d++) dk[d] += scale * dK[j * dhp + d];
    }
}

/* Adds the threads' dQ of row tile I, in thread order; w: the first thread's. */
static void add_dq(const job *w, int64_t I, int threads)
{
    const sel_attention *a = w->a;
    const attention_plan *p = w->p;
    const tile_place t = place_tile(a, I, 0);
    const float scale = (float)(1.0 / sqrt((double)a->dh));

    for (int64_t row = I * TILE; row < I * TILE + t.rows; row++) {
        float *const dq = w->to.dq + w->b * w->to.dq_seq + row * w->to.dq_row;
        const float *const sum = w->scratch + p->dq + row * p->dhp;
        for (int64_t d = 0; d < a->dh; d++) {
            float all = sum[d];
            for (int n = 1; n < threads; n++) all += sum[n * p->thread_size + d];
            dq[d] += scale * all;
        }
    }
}

static void clear_dq(const job *w)
{
    memset(w->scratch + w->p->dq, 0, (size_t)(w->p->tiles * TILE * w->p->dhp) * sizeof(float));
}

/* Column J's thread: dealt 0 .. T-1, T-1 .. 0, so that early (long) and late (short) columns even out. */
static bool mine(int64_t J, int thread, int threads)
{
    const int64_t k = J % (2 * threads);
    return k == thread || k == 2 * threads - 1 - thread;
}

static void attention_carry_backward(const sel_attention *a, const sel_attention_grad *g)
{
    const attention_plan p = sel_attention_plan(a, true);
    const int64_t whole = attention_whole(a);

    SEL_ASSERT(a->selective && a->window == 0 && (!a->dead_after || a->saved));
    if (!g->dcarry_in) return;
    #pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int64_t b = 0; b < whole; b++) {
        const int thread = omp_get_thread_num();
        job w = new_job(a, g, &p, b, thread, thread);
        w.to = attention_selection_gradients(a, g);
        clear_dq(&w);
        for (int64_t I = 0; I < p.tiles; I++) pack_tile(&w, I);
        for (int64_t J = 0; J < p.columns; J++) backward_column(&w, J);
        for (int64_t I = 0; I < p.tiles; I++) add_dq(&w, I, 1);
    }
    for (int64_t b = whole; b < a->B; b++) {
        #pragma omp parallel num_threads(a->threads)
        {
            const int thread = omp_get_thread_num();
            job w = new_job(a, g, &p, b, thread, 0), first = new_job(a, g, &p, b, 0, 0);
            w.to = first.to = attention_selection_gradients(a, g);
            clear_dq(&w);
            #pragma omp for schedule(static)
            for (int64_t I = 0; I < p.tiles; I++) pack_tile(&w, I);
            for (int64_t J = 0; J < p.columns; J++)
                if (mine(J, thread, a->threads)) backward_column(&w, J);
            #pragma omp barrier
            #pragma omp for schedule(static)
            for (int64_t I = 0; I < p.tiles; I++) add_dq(&first, I, a->threads);
        }
    }
}

void SEL_FN(sel_ops_attention_carry_init)(sel_ops *ops)
{
    ops->attention_carry = attention_carry;
    ops->attention_carry_backward = attention_carry_backward;
}
