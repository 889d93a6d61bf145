/* attention_forward_c.c: fused selective attention, forward, in portable C (spec, section 3).
 *
 * Row tiles ascend.  In each, head 0 passes over the column tiles first and leaves
 * F of each tile (made of its own logits, or of sel_q and sel_k); then every head
 * subtracts it.  Threads take whole sequences; where there are more threads than
 * sequences, a first pass over the selection alone, split by columns, makes the
 * carries of all groups of row tiles, and the groups become independent.  Both ways
 * add the same numbers in the same order.
 */
#include <math.h>
#include <omp.h>
#include "ops/attention_tile.h"
#include "ops/levels.h"

typedef struct {
    const sel_attention *a;
    const attention_plan *p;
    int64_t b;                /* sequence */
    float *scratch;           /* this thread's */
    double m_max;             /* the memory loss's largest M so far, and its row */
    int64_t m_row;
    double live;              /* pairs of a row and a live key so far */
} job;

static const void *query(const job *w, int64_t h, int64_t row)
{
    const sel_attention *a = w->a;
    return sel_attention_at(a, a->q, w->b * a->q_seq + row * a->q_row + h * a->dh);
}
static const void *key(const job *w, int64_t h, int64_t col)
{
    const sel_attention *a = w->a;
    return sel_attention_at(a, a->k, w->b * a->k_seq + col * a->k_row + h * a->kv_heads / a->heads * a->dh);
}
static const void *value(const job *w, int64_t h, int64_t col)
{
    const sel_attention *a = w->a;
    return sel_attention_at(a, a->v, w->b * a->v_seq + col * a->v_row + h * a->kv_heads / a->heads * a->dh);
}

static void *output(const job *w, int64_t h, int64_t row)
{
    const sel_attention *a = w->a;
    return (void *)sel_attention_at(a, a->out, w->b * a->out_seq + row * a->out_row + h * a->dh);
}

/* Rows of a column tile's keys or values as float32, *stride apart: as they lie, or copied. */
static const float *operand_rows(const job *w, const tile_place *t, const void *rows, float *copy, int64_t *stride)
{
    const int64_t dh = w->a->dh;
    if (!w->a->bfloat16) return rows;
    for (int j = 0; j < t->cols; j++)
        copy_padded(copy + j * dh, sel_attention_at(w->a, rows, j * *stride), dh, dh, true);
    *stride = dh;
    return copy;
}

/* Logits of a tile and head. */
static void head_logits(const job *w, const tile_place *t, int64_t h, const float *Qt, float *X)
{
    int64_t stride = w->a->k_row;
    const float *const K = operand_rows(w, t, key(w, h, t->col0), w->scratch + w->p->krows, &stride);
    logits_tile(w->a, t, K, stride, Qt, X);
}

/* The transposed queries that S is made of; Qt: head 0's. */
static const float *selection_queries(const job *w, const tile_place *t, int64_t row_tile, const float *Qt)
{
    const sel_attention *a = w->a;
    float *const own = w->scratch + w->p->sel_qt;
    if (!attention_bilinear(a)) return Qt;
    transpose_rows(own, sel_attention_at(a, a->sel_q, w->b * a->sel_q_seq + row_tile * TILE * a->sel_q_row),
                   a->sel_q_row, t->rows, a->dh, query_scale(a), a->bfloat16);
    return own;
}

/* Logits of a tile that S is made of; Qt as selection_queries gave it. */
static void selection_logits(const job *w, const tile_place *t, const float *Qt, float *X)
{
    const sel_attention *a = w->a;
    int64_t stride = a->sel_k_row;
    if (!attention_bilinear(a)) {
        head_logits(w, t, 0, Qt, X);
        return;
    }
    const void *const rows = sel_attention_at(a, a->sel_k, w->b * a->sel_k_seq + t->col0 * a->sel_k_row);
    const float *const K = operand_rows(w, t, rows, w->scratch + w->p->krows, &stride);
    logits_tile(a, t, K, stride, Qt, X);
}

/* Subtracts F (NULL: nothing) and masks; X in place.  Returns each lane's largest in `top`. */
static void subtract_and_mask(const tile_place *t, float *X, const float *F, vf top[TILE / VL])
{
    for (int v = 0; v < t->lanes; v += VL) top[v / VL] = vset1(MASKED);
    for (int j = 0; j < t->cols; j++) {
        int lo = 0, hi = t->lanes;
        if (t->masked) seen_lanes(t, j, &lo, &hi);
        for (int v = 0; v < t->lanes; v += VL) {
            vf x = vload(X + j * TILE + v);
            if (F) x -= vload(F + j * TILE + v);
            if (t->masked) x = vselect(lanes_between(v, lo, hi), x, vset1(MASKED));
            /* keeps a NaN: comparisons with it are false, so it must be the one returned */
            top[v / VL] = vselect(top[v / VL] > x, top[v / VL], x);
            vstore(X + j * TILE + v, x);
        }
    }
}

/* Online softmax of one tile: X becomes P = exp(X - m), the head's running maximum m, sum l and output O
   (transposed, [dh][TILE]) are brought up to date. */
static void softmax_tile(const job *w, const tile_place *t, float *X, const vf top[TILE / VL], float *m, float *l,
                         float *O, int64_t h)
{
    const int64_t dh = w->a->dh;
    int64_t stride = w->a->v_row;
    const float *const V = operand_rows(w, t, value(w, h, t->col0), w->scratch + w->p->vrows, &stride);

    for (int v = 0; v < t->lanes; v += VL) {
        const vf before = vload(m + v), now = vselect(before > top[v / VL], before, top[v / VL]);
        const vf shrink = vexp(before - now);
        vf sum = vload(l + v) * shrink;
        for (int j = 0; j < t->cols; j++) {
            const vf p = vexp(vload(X + j * TILE + v) - now);
            vstore(X + j * TILE + v, w->a->bfloat16 ? vround_bf16(p) : p);
            sum += p;
        }
        vstore(m + v, now);
        vstore(l + v, sum);
        for (int64_t d = 0; d < dh; d++) vstore(O + d * TILE + v, vload(O + d * TILE + v) * shrink);
    }
    product(dh, t->lanes, t->cols, V, 1, stride, X, TILE, O, TILE, true);
}

/* Adds min(F, tau) of the tile to each row's sum, in float64. */
static void add_forgotten(const tile_place *t, const float *F, double tau, double *rowsum)
{
    for (int j = 0; j < t->cols; j++)
        for (int i = 0; i < t->rows; i++) {
            const double f = (double)F[j * TILE + i];
            rowsum[i] += f < tau ? f : tau;
        }
}

/* A head's output O (softmax_tile's), divided by its rows' sums l and in out's type; out: its first row. */
static void store_rows(const sel_attention *a, const tile_place *t, float *O, const float *l, void *out)
{
    float inverse[TILE];
    for (int i = 0; i < TILE; i++) inverse[i] = i < t->rows ? 1.0f / l[i] : 0.0f;
    for (int64_t d = 0; d < a->dh; d++)
        for (int v = 0; v < t->lanes; v += VL) {
            const vf o = vload(O + d * TILE + v) * vload(inverse + v);
            vstore(O + d * TILE + v, a->bfloat16 ? vround_bf16(o) : o);
        }
    for (int i = 0; i < t->rows; i++)
        for (int64_t d = 0; d < a->dh; d++) set_operand(a->bfloat16, out, i * a->out_row + d, O[d * TILE + i]);
}

/* One row tile, all heads; carry [i1] moves on past its rows.  began [i1], where not NULL: the carries that say which
   keys are dead; a column tile without a live key is left out, F of its keys counts as tau and stays. */
static void forward_tile(job *w, int64_t row_tile, float *carry, const float *began)
{
    const sel_attention *a = w->a;
    const attention_plan *p = w->p;
    const int64_t H = a->heads, dh = a->dh;
    float *const Qt = w->scratch + p->qt, *const Ot = w->scratch + p->ot, *const X = w->scratch + p->tile;
    float *const m = w->scratch + p->ml, *const l = m + H * TILE, *const F = w->scratch + p->f;
    double *const rowsum = (double *)(void *)(w->scratch + p->rowsum);
    const bool memory = a->selective && a->tau > 0.0;
    tile_place t = place_tile(a, row_tile, 0);
    int64_t first, end;

    seen_columns(a, row_tile, &first, &end);
    for (int64_t h = 0; h < H; h++)
        transpose_rows(Qt + h * dh * TILE, query(w, h, row_tile * TILE), a->q_row, t.rows, dh, query_scale(a),
                       a->bfloat16);
    for (int64_t k = 0; k < H * dh * TILE; k++) Ot[k] = 0.0f;
    for (int64_t k = 0; k < H * TILE; k++) {
        m[k] = LEAST;
        l[k] = 0.0f;
    }
    if (memory)
        for (int i = 0; i < TILE; i++) rowsum[i] = 0.0;
    const float *const own = a->selective ? selection_queries(w, &t, row_tile, Qt) : NULL;

    for (int64_t block = first; block < end; block += SUPER)
        for (int64_t h = 0; h < H; h++)
            for (int64_t J = block; J < end && J < block + SUPER; J++) {
                float *const f = F + (J - block) * TILE * TILE;
                vf top[TILE / VL];
                t = place_tile(a, row_tile, J);
                if (began && all_dead(a, w->b, began, J)) {
                    if (h == 0 && memory)
                        for (int i = 0; i < t.rows; i++) rowsum[i] += a->tau * t.cols;
                    continue;
                }
                if (a->selective && h == 0) {
                    selection_logits(w, &t, own, X);
                    select_tile(a, &t, X, f, carry);
                    if (memory) add_forgotten(&t, f, a->tau, rowsum);
                }
                if (own != Qt || h > 0) head_logits(w, &t, h, Qt + h * dh * TILE, X);
                subtract_and_mask(&t, X, a->selective ? f : NULL, top);
                softmax_tile(w, &t, X, top, m + h * TILE, l + h * TILE, Ot + h * dh * TILE, h);
            }

    for (int64_t h = 0; h < H; h++) {
        const int64_t row = row_tile * TILE;
        float *const lse = a->lse + (w->b * H + h) * p->rows + row;
        store_rows(a, &t, Ot + h * dh * TILE, l + h * TILE, output(w, h, row));
        for (int i = 0; i < t.rows; i++) lse[i] = m[h * TILE + i] + logf(l[h * TILE + i]);
    }
    if (began) w->live += live_pairs(a, w->b, began, t.row0, t.rows);
    if (memory)
        for (int i = 0; i < t.rows; i++) {
            const double needed = (double)(t.row0 + i + 1) - rowsum[i] / a->tau;
            if (needed > w->m_max || (needed == w->m_max && t.row0 + i < w->m_row)) {
                w->m_max = needed;
                w->m_row = t.row0 + i;
            }
        }
}

/* carry [i1] of sequence b before the call's first row. */
static void start_carry(const sel_attention *a, int64_t b, float *carry)
{
    for (int64_t j = 0; j < a->i1; j++) carry[j] = a->carry_in && j < a->i0 ? a->carry_in[b * a->carry_seq + j] : 0.0f;
}

static float *saved_carry(const sel_attention *a, const attention_plan *p, int64_t b, int64_t group)
{
    return a->saved ? a->saved + (b * p->groups + group) * a->i1
                    : (float *)a->workspace + p->carries + group * a->i1;
}

/* A whole sequence by one thread. */
static void forward_sequence(job *w)
{
    const sel_attention *a = w->a;
    float *const carry = a->selective ? w->scratch + w->p->carry : NULL;

    if (a->selective) start_carry(a, w->b, carry);
    for (int64_t I = 0; I < w->p->tiles; I++) {
        if (a->selective && a->saved && I % w->p->group == 0)
            memcpy(saved_carry(a, w->p, w->b, I / w->p->group), carry, (size_t)a->i1 * sizeof *carry);
        if (a->dead_after && I % w->p->group == 0)
            memcpy(w->scratch + w->p->began, carry, (size_t)a->i1 * sizeof *carry);
        forward_tile(w, I, carry, a->dead_after ? w->scratch + w->p->began : NULL);
    }
    if (a->selective && a->carry_out)
        memcpy(a->carry_out + w->b * a->carry_seq, carry, (size_t)a->i1 * sizeof *carry);
}

/* The carries of one column tile at the start of every group, from the selection's logits alone. */
static void carry_column(job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const attention_plan *p = w->p;
    float *const Qt = w->scratch + p->qt, *const X = w->scratch + p->tile, *const F = w->scratch + p->f;
    float *const carry = w->scratch + p->carry;

    const int64_t j0 = J * TILE, n = a->i1 - j0 < TILE ? a->i1 - j0 : TILE;
    for (int64_t j = j0; j < j0 + n; j++)
        carry[j] = a->carry_in && j < a->i0 ? a->carry_in[w->b * a->carry_seq + j] : 0.0f;
    for (int64_t I = 0; I < p->tiles; I++) {
        int64_t first, end;
        if (I % p->group == 0)
            memcpy(saved_carry(a, p, w->b, I / p->group) + j0, carry + j0, (size_t)n * sizeof *carry);
        seen_columns(a, I, &first, &end);
        if (J < first || J >= end) continue;
        if (a->dead_after && all_dead(a, w->b, saved_carry(a, p, w->b, I / p->group), J)) continue;
        const tile_place t = place_tile(a, I, J);
        if (!attention_bilinear(a))
            transpose_rows(Qt, query(w, 0, I * TILE), a->q_row, t.rows, a->dh, query_scale(a), a->bfloat16);
        selection_logits(w, &t, selection_queries(w, &t, I, Qt), X);
        select_tile(a, &t, X, F, carry);
    }
    if (a->carry_out)
        memcpy(a->carry_out + w->b * a->carry_seq + j0, carry + j0, (size_t)n * sizeof *carry);
}

/* Of two rows that need most tokens the first in position wins; live pairs add up. */
static void keep_larger(job *best, const job *w)
{
    best->live += w->live;      /* whole numbers below 2^53: exact in any order */
    if (w->m_max > best->m_max || (w->m_max == best->m_max && w->m_row < best->m_row)) {
        best->m_max = w->m_max;
        best->m_row = w->m_row;
    }
}

static void store_results(const job *w)
{
    if (w->a->live) w->a->live[w->b] = w->live;
    if (w->a->tau <= 0.0 || !w->a->selective) return;
    w->a->m_max[w->b] = w->m_max;
    w->a->m_row[w->b] = w->m_row;
}

static job new_job(const sel_attention *a, const attention_plan *p, int64_t b, int thread)
{
    return (job){ .a = a, .p = p, .b = b, .m_max = -INFINITY, .m_row = INT64_MAX,
                  .scratch = (float *)a->workspace + p->thread0 + thread * p->thread_size };
}

/* One sequence by all threads. */
static void forward_shared(const sel_attention *a, const attention_plan *p, int64_t b)
{
    job best = new_job(a, p, b, 0);
    if (a->selective) {
        #pragma omp parallel for num_threads(a->threads) schedule(dynamic, 1)
        for (int64_t J = 0; J < p->columns; J++) {
            job w = new_job(a, p, b, omp_get_thread_num());
            carry_column(&w, J);
        }
    }
    /* Later groups see more keys: the dearest first. */
    #pragma omp parallel for num_threads(a->threads) schedule(dynamic, 1)
    for (int64_t k = 0; k < p->groups; k++) {
        const int64_t g = p->groups - 1 - k;
        job w = new_job(a, p, b, omp_get_thread_num());
        float *const carry = a->selective ? w.scratch + p->carry : NULL;
        if (a->selective) memcpy(carry, saved_carry(a, p, b, g), (size_t)a->i1 * sizeof *carry);
        for (int64_t I = g * p->group; I < p->tiles && I < (g + 1) * p->group; I++)
            forward_tile(&w, I, carry, a->dead_after ? saved_carry(a, p, b, g) : NULL);
        #pragma omp critical(attention_memory)
        keep_larger(&best, &w);
    }
    store_results(&best);
}

static void attention_forward(const sel_attention *a)
{
    const attention_plan p = sel_attention_plan(a, false);
    const int64_t whole = attention_whole(a);
    if (!p.rows) return;

    for (int64_t b = 0; b < a->B; b++) SEL_FN(sel_attention_find_dead)(a, b, a->threads);
    #pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int64_t b = 0; b < whole; b++) {
        job w = new_job(a, &p, b, omp_get_thread_num());
        forward_sequence(&w);
        store_results(&w);
    }
    for (int64_t b = whole; b < a->B; b++) {
        if (p.groups > 1) {
            forward_shared(a, &p, b);
        } else {
            job w = new_job(a, &p, b, 0);
            forward_sequence(&w);
            store_results(&w);
        }
    }
}

void SEL_FN(sel_ops_attention_forward_init)(sel_ops *ops) { ops->attention_forward = attention_forward; }
