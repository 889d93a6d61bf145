/* attention_case.h: one attention problem: its inputs, what the reference makes of them, what a kernel makes of them in
 * memory of any arrangement, and how far apart the two may be.  Part of tests/ops_attention.c, which holds the cases.
 */
#ifndef SEL_TESTS_ATTENTION_CASE_H
#define SEL_TESTS_ATTENTION_CASE_H

#include "tests/check.h"
#include "tests/random.h"
#include "tests/switches.h"

#include "ops/ops.h"

#include <string.h>

#define BOUND 2e-6
#define BOUND_BF16 1e-2      /* with out's own rounding: half a unit in the last place is at most 2^-8 of a value,
                                in all 1.6e-3 of the norm; dq and dk have it through delta */
#define AGREE_BF16 5e-3      /* between two kernels: P is rounded with another row maximum taken off, and out where that
                                moved it to another value.  Not without relu, where F of either sign makes dP - delta
                                cancel. */
#define EXP_BF16 1e-4        /* of exp, where bfloat16 follows: 8e-5 and the sum's rounding */
#define ABSENT 1e-6          /* of |dO|, where the reference is zero */
#define KINK 4e-6            /* how near to relu's or the memory loss's kink inputs may come */
#define RIM 12345.678f       /* what surrounds outputs */

static bool bfloat16;        /* operands of every problem that follows: arrays of it, or of float32 */

/* Dead keys in every run that follows: the logarithm that F must pass beyond the measured gap; 0: off. */
static double dead_margin;

static void *room(int64_t bytes)
{
    void *p = malloc((size_t)(bytes > 0 ? bytes : 1));
    if (!p) abort();
    return p;
}

static double norm(const double *x, int64_t n)
{
    double s = 0.0;
    for (int64_t i = 0; i < n; i++) s += x[i] * x[i];
    return sqrt(s);
}

/* A case: its inputs (doubles that floats hold exactly) and what the reference makes of them. */
typedef struct {
    sel_ref_attention a;
    double *q, *k, *v, *dout;
    double *sel_q, *sel_k;       /* NULL: head 0 selects */
    sel_ref_results r;
    double scale, scale_bf16;    /* of the bound, of that of bfloat16 operands */
    char name[160];
} problem;

static int64_t q_count(const problem *p) { return p->a.B * p->a.N * p->a.H * p->a.dh; }
static int64_t k_count(const problem *p) { return p->a.B * p->a.N * p->a.Hkv * p->a.dh; }
static int64_t sel_count(const problem *p) { return p->sel_q ? p->a.B * p->a.N * p->a.dh : 0; }

/* x rounded to what the operands' type holds exactly */
static double operand(double x)
{
    int power;
    frexp(x, &power);
    const double unit = ldexp(1.0, power - (bfloat16 ? 8 : 24));
    return rint(x / unit) * unit;
}

static double *float_normals(int64_t n, double deviation)
{
    double *x = random_normals(n);
    for (int64_t i = 0; i < n; i++) x[i] = operand(deviation * x[i]);
    return x;
}

/* Draws rows of what selects (head 0's q, or sel_q) again until none of their logits is so near to 0 that float might
   see another sign. */
static void avoid_kinks(problem *p)
{
    const sel_ref_attention *a = &p->a;
    for (int64_t row = 0; row < a->B * a->N; row++) {
        double *q = p->sel_q ? p->sel_q + row * a->dh : p->q + row * a->H * a->dh;
        for (int64_t j = 0; j <= row % a->N; j++) {
            const int64_t key = row - row % a->N + j;
            const double *k = p->sel_q ? p->sel_k + key * a->dh : p->k + key * a->Hkv * a->dh;
            double s = 0.0;
            for (int64_t d = 0; d < a->dh; d++) s += q[d] * k[d];
            if (fabs(s) >= KINK * sqrt((double)a->dh)) continue;
            for (int64_t d = 0; d < a->dh; d++) q[d] = operand(random_normal());
            j = -1;
        }
    }
}

static void problem_free(problem *p)
{
    double *const all[] = { p->q,    p->k,    p->v,    p->dout,    p->r.out,   p->r.lse,    p->r.F,        p->sel_q,
                            p->r.dq, p->r.dk, p->r.dv, p->r.carry, p->r.m_max, p->r.dcarry, p->r.dsel_q, p->sel_k,
                            p->r.dsel_k };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    free(p->r.m_row);
}

/* Runs the reference on q, k, v, dout, sel_q and sel_k. */
static void problem_solve(problem *p)
{
    sel_ref_attention *const a = &p->a;
    const int64_t nq = q_count(p) * 8, nk = k_count(p) * 8, ns = sel_count(p) * 8, columns = a->B * a->N * 8;
    a->sel_q = p->sel_q;
    a->sel_k = p->sel_k;
    p->r = (sel_ref_results){ .out = room(nq), .lse = room(columns * a->H), .F = room(columns * a->N),
                              .carry = room(columns), .m_max = room(a->B * 8), .m_row = room(a->B * 8),
                              .dout = p->dout, .dq = room(nq), .dk = room(nk), .dv = room(nk),
                              .dcarry = room(columns), .dsel_q = room(ns), .dsel_k = room(ns) };
    memset(p->r.dcarry, 0, (size_t)columns);
    sel_ref_attend(a, p->q, p->k, p->v, &p->r);
    p->scale = 1.0;
    /* Without relu F grows in both directions, and section 3 lets the bound grow with it: here by 2 only.  Where F < 0
       makes a row all but one key's, dP - delta cancels and leaves mostly out's rounding, which is in delta. */
    p->scale_bf16 = a->relu ? 1.0 : 2.0;
    for (int64_t i = 0; !a->relu && i < a->B * a->N * a->N; i++) p->scale = fmax(p->scale, fabs(p->r.F[i]));
}

/* Whether rounding could move the memory loss's row, or an F of that row across tau. */
static bool near_memory_kink(const problem *p)
{
    const sel_ref_attention *a = &p->a;
    for (int64_t b = 0; a->selective && a->tau > 0.0 && b < a->B; b++)
        for (int64_t i = 0; i < a->N; i++) {
            double M = (double)(i + 1);
            for (int64_t j = 0; j <= i; j++) {
                const double f = p->r.F[(b * a->N + i) * a->N + j];
                if (i == p->r.m_row[b] && fabs(f - a->tau) < 10.0 * KINK * p->scale) return true;
                M -= fmin(f, a->tau) / a->tau;
            }
            if (i != p->r.m_row[b] && fabs(M - p->r.m_max[b]) < 1e-5 * (double)a->N * p->scale) return true;
        }
    return false;
}

typedef enum { HEAD0, BILINEAR } selection_source;

static problem problem_new(const sel_ref_attention *a, int s, selection_source source, double deviation, uint64_t seed)
{
    problem p = { .a = *a };
    const bool bilinear = source == BILINEAR && switches[s].selective;
    switches_set(&p.a, s);
    if (!p.a.selective || a->window) p.a.tau = 0.0;   /* equation 2 counts tokens that no window hides */
    p.a.memory_coef = p.a.tau > 0.0 ? 0.25 : 0.0;
    snprintf(p.name, sizeof p.name, "%s%s%s, B %d H %d/%d N %d dh %d window %d tau %g", bfloat16 ? "bfloat16 " : "",
             switches[s].name, bilinear ? ", bilinear" : "", (int)a->B, (int)a->H, (int)a->Hkv, (int)a->N, (int)a->dh,
             (int)a->window, p.a.tau);
    for (random_seed(seed);; problem_free(&p)) {
        p.q = float_normals(q_count(&p), deviation);
        p.k = float_normals(k_count(&p), 1.0);
        p.v = float_normals(k_count(&p), 1.0);
        p.dout = float_normals(q_count(&p), 1.0);
        p.sel_q = bilinear ? float_normals(a->B * a->N * a->dh, deviation) : NULL;
        p.sel_k = bilinear ? float_normals(a->B * a->N * a->dh, 1.0) : NULL;
        if (p.a.selective && p.a.relu) avoid_kinks(&p);
        problem_solve(&p);
        if (!near_memory_kink(&p)) return p;
    }
}

/* Arrays of bfloat16 (half) or float32. */
static int64_t value_size(bool half) { return half ? 2 : 4; }

/* To nearest even; of NaN those whose upper half is one. */
static uint16_t to_bfloat16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_bfloat16(uint16_t x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static float load_value(const void *x, bool half, int64_t i)
{
    return half ? from_bfloat16(((const uint16_t *)x)[i]) : ((const float *)x)[i];
}

static void store_value(void *x, bool half, int64_t i, float value)
{
    if (half) ((uint16_t *)x)[i] = to_bfloat16(value);
    else ((float *)x)[i] = value;
}

/* Memory that holds tensors; what belongs to none of them must stay as it was filled. */
typedef struct {
    void *x;
    unsigned char *owned;
    int64_t count;
    bool half;
} field;

/* A tensor [B][N][width] in a field. */
typedef struct {
    void *x;
    int64_t B, N, width, seq, row;
    bool half;
} tensor;

static field field_new(int64_t count, float fill, bool half)
{
    field f = { room(count * value_size(half)), room(count), count, half };
    memset(f.owned, 0, (size_t)count);
    for (int64_t i = 0; i < count; i++) store_value(f.x, half, i, fill);
    return f;
}

static void field_free(field *f)
{
    free(f->x);
    free(f->owned);
}

static tensor field_place(field *f, int64_t at, int64_t B, int64_t N, int64_t width, int64_t seq, int64_t row)
{
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0; i < N; i++) memset(f->owned + at + b * seq + i * row, 1, (size_t)width);
    return (tensor){ (char *)f->x + at * value_size(f->half), B, N, width, seq, row, f->half };
}

/* Token i of the first sequence. */
static void *tensor_at(const tensor *t, int64_t i) { return (char *)t->x + i * t->row * value_size(t->half); }

static int64_t field_damage(const field *f)
{
    int64_t n = 0;
    const float rim = f->half ? from_bfloat16(to_bfloat16(RIM)) : RIM;
    for (int64_t i = 0; i < f->count; i++) n += !f->owned[i] && load_value(f->x, f->half, i) != rim;
    return n;
}

static void tensor_write(const tensor *t, const double *x)
{
    for (int64_t b = 0; b < t->B; b++)
        for (int64_t i = 0; i < t->N; i++)
            for (int64_t d = 0; d < t->width; d++)
                store_value(t->x, t->half, b * t->seq + i * t->row + d, (float)x[(b * t->N + i) * t->width + d]);
}

/* How q, k, v, out, sel_q, sel_k and the gradients lie in memory. */
typedef enum { APART, PACKED } arrangement;

enum { FIELDS = 6 };

typedef struct {
    field fields[FIELDS];
    tensor q, k, v, o, sel_q, sel_k;   /* the last two of width 0 where head 0 selects */
} arrays;

/* Rows [i0, i1) of q, sel_q and out, keys [0, i1) of k, v and sel_k, or the gradients of these; half: of bfloat16.
   Each in a block of its own size, or all but out interleaved by token with gaps between tokens and sequences, at an
   odd address. */
static arrays arrays_new(const problem *p, arrangement how, int64_t i0, int64_t i1, float fill, float fill_out,
                         bool half)
{
    const int64_t B = p->a.B, n = i1 - i0, Q = p->a.H * p->a.dh, K = p->a.Hkv * p->a.dh, W = p->sel_q ? p->a.dh : 0;
    arrays t;
    if (how == APART) {
        t.fields[0] = field_new(B * n * Q, fill, half);
        t.fields[1] = field_new(B * i1 * K, fill, half);
        t.fields[2] = field_new(B * i1 * K, fill, half);
        t.fields[3] = field_new(B * n * Q, fill_out, half);
        t.fields[4] = field_new(B * n * W, fill, half);
        t.fields[5] = field_new(B * i1 * W, fill, half);
        t.q = field_place(&t.fields[0], 0, B, n, Q, n * Q, Q);
        t.k = field_place(&t.fields[1], 0, B, i1, K, i1 * K, K);
        t.v = field_place(&t.fields[2], 0, B, i1, K, i1 * K, K);
        t.o = field_place(&t.fields[3], 0, B, n, Q, n * Q, Q);
        t.sel_q = field_place(&t.fields[4], 0, B, n, W, n * W, W);
        t.sel_k = field_place(&t.fields[5], 0, B, i1, W, i1 * W, W);
        return t;
    }
    const int64_t row = Q + 2 * K + 2 * W + 3, seq = i1 * row + 7, o_row = Q + 5, o_seq = n * o_row + 2;
    t.fields[0] = field_new(1 + B * seq, fill, half);
    t.fields[1] = field_new(0, fill, half);
    t.fields[2] = field_new(0, fill, half);
    t.fields[3] = field_new(3 + B * o_seq, fill_out, half);
    t.fields[4] = field_new(0, fill, half);
    t.fields[5] = field_new(0, fill, half);
    t.q = field_place(&t.fields[0], 1 + i0 * row, B, n, Q, seq, row);
    t.k = field_place(&t.fields[0], 1 + Q, B, i1, K, seq, row);
    t.v = field_place(&t.fields[0], 1 + Q + K, B, i1, K, seq, row);
    t.o = field_place(&t.fields[3], 3, B, n, Q, o_seq, o_row);
    t.sel_q = field_place(&t.fields[0], 1 + Q + 2 * K + i0 * row, B, n, W, seq, row);
    t.sel_k = field_place(&t.fields[0], 1 + Q + 2 * K + W, B, i1, W, seq, row);
    return t;
}

static void arrays_free(arrays *t)
{
    for (int i = 0; i < FIELDS; i++) field_free(&t->fields[i]);
}

static int64_t arrays_damage(const arrays *t)
{
    int64_t n = 0;
    for (int i = 0; i < FIELDS; i++) n += field_damage(&t->fields[i]);
    return n;
}

/* What the product made: contiguous, as the reference's. */
typedef struct {
    float *out, *lse, *dq, *dk, *dv, *dsel_q, *dsel_k, *carry, *dcarry, *dead_after;
    double *live;        /* pairs of a row and a live key, of all calls */
    double *m_max;
    int64_t *m_row;
    int64_t damage;
} outcome;

static outcome outcome_new(const problem *p)
{
    const int64_t nq = q_count(p) * 4, nk = k_count(p) * 4, ns = sel_count(p) * 4, columns = p->a.B * p->a.N * 4;
    outcome o = { room(nq), room(columns * p->a.H), room(nq), room(nk), room(nk), room(ns), room(ns), room(columns),
                  room(columns), room(p->a.B * 4), room(p->a.B * 8), room(p->a.B * 8), room(p->a.B * 8), 0 };
    memset(o.dk, 0, (size_t)nk);
    memset(o.dv, 0, (size_t)nk);
    memset(o.dsel_k, 0, (size_t)ns);
    memset(o.carry, 0xff, (size_t)columns);       /* NaN: only what a call has written may be read */
    memset(o.dcarry, 0xff, (size_t)columns);
    for (int64_t b = 0; b < p->a.B; b++) {
        o.m_max[b] = -INFINITY;
        o.m_row[b] = 0;
        o.live[b] = 0.0;
    }
    return o;
}

static void outcome_free(outcome *o)
{
    float *const all[] = { o->out,    o->lse,   o->dq,     o->dk,        o->dv,
                           o->dsel_q, o->dsel_k, o->carry, o->dcarry, o->dead_after };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    free(o->live);
    free(o->m_max);
    free(o->m_row);
}

/* A tensor into (or, add, onto) rows i0, i0 + 1, ... of a contiguous array [B][N][width]. */
static void tensor_read(const tensor *t, float *x, int64_t N, int64_t i0, bool add)
{
    for (int64_t b = 0; b < t->B; b++)
        for (int64_t i = 0; i < t->N; i++)
            for (int64_t d = 0; d < t->width; d++) {
                float *const to = x + (b * N + i0 + i) * t->width + d;
                *to = load_value(t->x, t->half, b * t->seq + i * t->row + d) + (add ? *to : 0.0f);
            }
}

/* The rows that make S where they are not head 0's, rows from i0 on. */
static void give_selection(sel_attention *a, const arrays *in, int64_t i0)
{
    a->sel_q = tensor_at(&in->sel_q, i0);
    a->sel_q_seq = in->sel_q.seq;
    a->sel_q_row = in->sel_q.row;
    a->sel_k = in->sel_k.x;
    a->sel_k_seq = in->sel_k.seq;
    a->sel_k_row = in->sel_k.row;
}

/* Scratch of just the size asked for, full of NaN. */
static void *workspace_new(const sel_attention *a, bool backward)
{
    const size_t bytes = sel_attention_workspace(a, backward);
    void *w = NULL;
    if (posix_memalign(&w, 64, bytes ? bytes : 64)) abort();
    memset(w, 0xff, bytes);
    return w;
}

/* One call over rows [i0, i1) and what its backward needs of it. */
typedef struct {
    sel_attention a;
    float *lse, *saved, *carry_in;
} piece;

static piece piece_forward(const problem *p, const sel_ops *ops, const arrays *in, int threads, int64_t i0,
                           int64_t i1, outcome *o)
{
    const int64_t B = p->a.B, N = p->a.N, H = p->a.H, n = i1 - i0;
    piece c = { .lse = room(B * H * n * 4),
                .saved = room(B * sel_attention_carries(n) * i1 * 4),
                .carry_in = room(B * N * 4) };
    double *m_max = room(B * 8), *live = room(B * 8);
    float *const found = room(B * 4);
    int64_t *m_row = room(B * 8);
    memcpy(c.carry_in, o->carry, (size_t)(B * N) * 4);
    c.a = (sel_attention){ .B = B, .heads = H, .kv_heads = p->a.Hkv, .dh = p->a.dh, .i0 = i0, .i1 = i1,
                           .window = p->a.window, .selective = p->a.selective, .relu = p->a.relu,
                           .protect_bos = p->a.protect_bos, .protect_self = p->a.protect_self, .shift = p->a.shift,
                           .bfloat16 = bfloat16, .q = tensor_at(&in->q, i0), .q_seq = in->q.seq, .q_row = in->q.row,
                           .k = in->k.x, .k_seq = in->k.seq, .k_row = in->k.row,
                           .v = in->v.x, .v_seq = in->v.seq, .v_row = in->v.row,
                           .out = tensor_at(&in->o, i0), .out_seq = in->o.seq, .out_row = in->o.row,
                           .lse = c.lse, .carry_in = i0 ? c.carry_in : NULL, .carry_out = o->carry, .carry_seq = N,
                           .saved = c.saved, .tau = p->a.tau, .m_max = m_max, .m_row = m_row, .threads = threads };
    if (dead_margin > 0.0) {
        c.a.dead_after = o->dead_after;
        c.a.live = live;
        if (n == N) {   /* the whole of it: forward finds the thresholds that find_dead_after did */
            c.a.dead_margin = dead_margin;
            for (int64_t b = 0; b < B; b++) {
                found[b] = o->dead_after[b];
                o->dead_after[b] = NAN;
            }
        }
    }
    if (p->sel_q) give_selection(&c.a, in, i0);
    if (i0 % 2) c.a.carry_in = o->carry;      /* in place */
    c.a.workspace = workspace_new(&c.a, false);
    ops->attention_forward(&c.a);
    free(c.a.workspace);
    c.a.carry_in = i0 ? c.carry_in : NULL;

    for (int64_t b = 0; b < B; b++) {
        for (int64_t h = 0; h < H; h++)
            memcpy(o->lse + (b * H + h) * N + i0, c.lse + (b * H + h) * n, (size_t)n * 4);
        if (p->a.tau > 0.0 && m_max[b] > o->m_max[b]) {
            o->m_max[b] = m_max[b];
            o->m_row[b] = m_row[b];
        }
        if (dead_margin > 0.0) o->live[b] += live[b];
        CHECK(c.a.dead_margin == 0.0 || o->dead_after[b] == found[b], "%s, %s: forward's threshold %.9g is not %.9g",
              sel_cpu_level_name(ops->level), p->name, (double)o->dead_after[b], (double)found[b]);
    }
    free(found);
    free(live);
    free(m_max);
    free(m_row);
    return c;
}

static void piece_free(piece *c)
{
    free(c->lse);
    free(c->saved);
    free(c->carry_in);
}

static void piece_backward(const problem *p, const sel_ops *ops, piece *c, const tensor *dout, arrangement how,
                           outcome *o)
{
    const int64_t B = p->a.B, N = p->a.N;
    arrays g = arrays_new(p, how, c->a.i0, c->a.i1, RIM, RIM, false);
    float *before = room(B * N * 4);
    memcpy(before, o->dcarry, (size_t)(B * N) * 4);
    const bool last = c->a.i1 == N, in_place = c->a.i0 % 2;
    const sel_attention_grad grad = { .dout = tensor_at(dout, c->a.i0),
                                      .dq = g.q.x, .dq_seq = g.q.seq, .dq_row = g.q.row,
                                      .dk = g.k.x, .dk_seq = g.k.seq, .dk_row = g.k.row,
                                      .dv = g.v.x, .dv_seq = g.v.seq, .dv_row = g.v.row,
                                      .dsel_q = g.sel_q.x, .dsel_q_seq = g.sel_q.seq, .dsel_q_row = g.sel_q.row,
                                      .dsel_k = g.sel_k.x, .dsel_k_seq = g.sel_k.seq, .dsel_k_row = g.sel_k.row,
                                      .dcarry_in = last ? NULL : in_place ? o->dcarry : before,
                                      .dcarry_out = o->dcarry,
                                      .memory_coef = (float)p->a.memory_coef };
    c->a.m_row = o->m_row;                    /* of the whole sequence: may lie outside this call's rows */
    c->a.workspace = workspace_new(&c->a, true);
    ops->attention_backward(&c->a, &grad);
    free(c->a.workspace);

    tensor_read(&g.q, o->dq, N, c->a.i0, false);
    tensor_read(&g.k, o->dk, N, 0, true);
    tensor_read(&g.v, o->dv, N, 0, true);
    tensor_read(&g.sel_q, o->dsel_q, N, c->a.i0, false);
    tensor_read(&g.sel_k, o->dsel_k, N, 0, true);
    o->damage += arrays_damage(&g);
    arrays_free(&g);
    free(before);
}

/* attention_gap of rows [i0, N) of each sequence. */
static void measure_gap(const problem *p, const sel_ops *ops, const arrays *in, int threads, int64_t i0, float *gap)
{
    sel_attention a = { .B = p->a.B, .heads = p->a.H, .kv_heads = p->a.Hkv, .dh = p->a.dh, .i0 = i0, .i1 = p->a.N,
                        .selective = true, .relu = true, .protect_bos = p->a.protect_bos,
                        .protect_self = p->a.protect_self, .shift = p->a.shift, .bfloat16 = bfloat16,
                        .q = tensor_at(&in->q, i0), .q_seq = in->q.seq, .q_row = in->q.row,
                        .k = in->k.x, .k_seq = in->k.seq, .k_row = in->k.row, .threads = threads };
    if (p->sel_q) give_selection(&a, in, i0);
    ops->attention_gap(&a, gap);
}

/* The thresholds of a problem's sequences: one gap for all of its pieces. */
static void find_dead_after(const problem *p, const sel_ops *ops, const arrays *in, int threads, float *dead_after)
{
    measure_gap(p, ops, in, threads, 0, dead_after);
    for (int64_t b = 0; b < p->a.B; b++) dead_after[b] = fmaxf((float)p->a.tau, dead_after[b] + (float)dead_margin);
}

/* The product on a problem, rows cut at cuts[0] = 0 < cuts[1] < ... < cuts[n] = N. */
static outcome run(const problem *p, const sel_ops *ops, int threads, arrangement how, const int64_t *cuts, int n)
{
    arrays in = arrays_new(p, how, 0, p->a.N, NAN, RIM, bfloat16);
    arrays d = arrays_new(p, how, 0, p->a.N, NAN, NAN, bfloat16);
    outcome o = outcome_new(p);
    piece *pieces = room(n * (int64_t)sizeof *pieces);
    tensor_write(&in.q, p->q);
    tensor_write(&in.k, p->k);
    tensor_write(&in.v, p->v);
    tensor_write(&d.o, p->dout);
    tensor_write(&in.sel_q, p->sel_q);
    tensor_write(&in.sel_k, p->sel_k);

    if (dead_margin > 0.0) find_dead_after(p, ops, &in, threads, o.dead_after);
    for (int c = 0; c < n; c++) pieces[c] = piece_forward(p, ops, &in, threads, cuts[c], cuts[c + 1], &o);
    tensor_read(&in.o, o.out, p->a.N, 0, false);
    o.damage += field_damage(&in.fields[3]);
    for (int c = n - 1; c >= 0; c--) {
        piece_backward(p, ops, &pieces[c], &d.o, how, &o);
        piece_free(&pieces[c]);
    }
    free(pieces);
    arrays_free(&in);
    arrays_free(&d);
    return o;
}

static double distance(const float *x, const double *y, int64_t n)
{
    double s = 0.0;
    for (int64_t i = 0; i < n; i++) s += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
    return sqrt(s);
}

static double worst[2];   /* of all errors over their bounds, for the summary: float32, bfloat16 */

/* What the rounding of P or dZ to bfloat16 does not reach has float32's bound; in lse there is exp's error alone. */
typedef enum { PRODUCT, SUM, LOGARITHM } quantity;

static double allowed(const problem *p, quantity kind, double size, double output, int64_t n)
{
    const bool absent = p->a.N == 1 || size < 1e-9 * output;
    double limit = fmax(BOUND * p->scale * size, absent ? ABSENT * output : 0.0);
    if (bfloat16 && kind == PRODUCT)
        limit += BOUND_BF16 * p->scale_bf16 * size + (absent ? EXP_BF16 * output : 0.0);
    if (bfloat16 && kind == LOGARITHM) limit += EXP_BF16 * sqrt((double)n);
    return limit;
}

/* size: what errors are relative to, mostly y's norm. */
static void check_error(const problem *p, const sel_ops *ops, const char *how, const char *what, quantity kind,
                        const float *x, const double *y, int64_t n, double size)
{
    const double output = norm(p->dout, q_count(p)), error = distance(x, y, n);
    const bool absent = p->a.N == 1 || size < 1e-9 * output;
    const double limit = allowed(p, kind, size, output, n);
    CHECK(error <= limit, "%s, %s, %s: %s: error %.3g of %s %.3g", sel_cpu_level_name(ops->level), p->name, how, what,
          error / (absent ? output : size), absent ? "|dO|" : "norm", absent ? output : size);
    if (!absent && limit > 0.0) worst[bfloat16] = fmax(worst[bfloat16], error / limit);
}

static void check_near(const problem *p, const sel_ops *ops, const char *how, const char *what, quantity kind,
                       const float *x, const double *y, int64_t n)
{
    check_error(p, ops, how, what, kind, x, y, n, norm(y, n));
}

static void check_outcome(const problem *p, const sel_ops *ops, const char *how, const outcome *o)
{
    const sel_ref_attention *a = &p->a;
    check_near(p, ops, how, "out", PRODUCT, o->out, p->r.out, q_count(p));
    check_near(p, ops, how, "lse", LOGARITHM, o->lse, p->r.lse, a->B * a->N * a->H);
    check_near(p, ops, how, "dq", PRODUCT, o->dq, p->r.dq, q_count(p));
    check_near(p, ops, how, "dk", PRODUCT, o->dk, p->r.dk, k_count(p));
    check_near(p, ops, how, "dv", PRODUCT, o->dv, p->r.dv, k_count(p));
    CHECK(o->damage == 0, "%s, %s, %s: %lld values written outside the outputs", sel_cpu_level_name(ops->level),
          p->name, how, (long long)o->damage);
    if (!a->selective) return;
    if (dead_margin == 0.0) check_near(p, ops, how, "carry", SUM, o->carry, p->r.carry, a->B * a->N); /* else frozen */
    check_near(p, ops, how, "dcarry", PRODUCT, o->dcarry, p->r.dcarry, a->B * a->N);
    if (p->sel_q) {
        /* dF is a sum over heads that cancels where rows are few: no smaller than a head's dq or dk. */
        const double dsel_q = norm(p->r.dsel_q, sel_count(p)), dsel_k = norm(p->r.dsel_k, sel_count(p));
        const double dq = norm(p->r.dq, q_count(p)) / sqrt((double)a->H);
        const double dk = norm(p->r.dk, k_count(p)) / sqrt((double)a->Hkv);
        check_error(p, ops, how, "dsel_q", PRODUCT, o->dsel_q, p->r.dsel_q, sel_count(p), fmax(dsel_q, dq));
        check_error(p, ops, how, "dsel_k", PRODUCT, o->dsel_k, p->r.dsel_k, sel_count(p), fmax(dsel_k, dk));
    }
    for (int64_t b = 0; a->tau > 0.0 && b < a->B; b++) {
        CHECK(o->m_row[b] == p->r.m_row[b], "%s, %s, %s: sequence %d: memory row %lld, not %lld",
              sel_cpu_level_name(ops->level), p->name, how, (int)b, (long long)o->m_row[b], (long long)p->r.m_row[b]);
        CHECK(fabs(o->m_max[b] - p->r.m_max[b]) <= BOUND * (double)a->N * p->scale, "%s, %s, %s: memory %.9g, not %.9g",
              sel_cpu_level_name(ops->level), p->name, how, o->m_max[b], p->r.m_max[b]);
    }
}

static sel_ops tables[4];
static int levels;
#endif
