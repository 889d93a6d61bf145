/* A sequence's rows dealt to several calls (specification, section 4): attention_carry and attention_carry_backward.
 *
 * Each against the reference or against what forward and backward make of the same carries; then all together: chunks
 * whose sums are made alone, prefix sums of these, forward and backward of each chunk, suffix sums of its dF, gradients
 * completed and added up, against the reference, which knows no chunks.
 */
#include "tests/attention_case.h"

enum { MOST = 16 };          /* chunks */

/* The sum of S over the rows before `row`, of key j, by the reference. */
static double sum_before(const problem *p, int64_t b, int64_t row, int64_t j)
{
    const int64_t N = p->a.N, of = p->a.shift ? row : row - 1;
    if (of < 0) return 0.0;
    return of < N ? p->r.F[(b * N + of) * N + j] : p->r.carry[b * N + j];
}

/* A call over rows [i0, i1): of the arrays only those that both passes read. */
static sel_attention selection_call(const problem *p, const arrays *in, int threads, int64_t i0, int64_t i1)
{
    sel_attention a = { .B = p->a.B, .heads = p->a.H, .kv_heads = p->a.Hkv, .dh = p->a.dh, .i0 = i0, .i1 = i1,
                        .selective = true, .relu = p->a.relu, .protect_bos = p->a.protect_bos,
                        .protect_self = p->a.protect_self, .shift = p->a.shift, .bfloat16 = bfloat16,
                        .q = tensor_at(&in->q, i0), .q_seq = in->q.seq, .q_row = in->q.row,
                        .k = in->k.x, .k_seq = in->k.seq, .k_row = in->k.row,
                        .carry_seq = p->a.N, .threads = threads };
    if (p->sel_q) {
        a.q = a.k = NULL;
        give_selection(&a, in, i0);
    }
    return a;
}

/* carry_out [B][N] of rows [i0, i1); what lies beyond i1 is NaN and stays so. */
static void carry_of(const problem *p, const sel_ops *ops, const arrays *in, int threads, int64_t i0, int64_t i1,
                     const float *carry_in, float *carry_out)
{
    sel_attention a = selection_call(p, in, threads, i0, i1);
    for (int64_t n = 0; n < p->a.B * p->a.N && carry_in != carry_out; n++) carry_out[n] = NAN;
    a.carry_in = carry_in;
    a.carry_out = carry_out;
    a.workspace = workspace_new(&a, false);
    ops->attention_carry(&a);
    free(a.workspace);
    for (int64_t b = 0; b < p->a.B && carry_in != carry_out; b++)
        for (int64_t j = i1; j < p->a.N; j++)
            CHECK(isnan(carry_out[b * p->a.N + j]), "%s, %s: carry of key %d written, rows end at %d",
                  sel_cpu_level_name(ops->level), p->name, (int)j, (int)i1);
}

static arrays inputs_new(const problem *p, arrangement how)
{
    arrays in = arrays_new(p, how, 0, p->a.N, NAN, RIM, bfloat16);
    tensor_write(&in.q, p->q);
    tensor_write(&in.k, p->k);
    tensor_write(&in.v, p->v);
    tensor_write(&in.sel_q, p->sel_q);
    tensor_write(&in.sel_k, p->sel_k);
    return in;
}

/* The sums over rows [i0, i1) against the reference, alone and on top of a carry (in place, too); the same bits for any
   number of threads. */
static void check_sums(const problem *p, arrangement how, int64_t i0, int64_t i1)
{
    const int64_t B = p->a.B, N = p->a.N;
    arrays in = inputs_new(p, how);
    float *const one = room(B * N * 4), *const sums = room(B * N * 4), *const start = room(B * N * 4);
    double *const before = room(B * N * 8), *const after = room(B * N * 8), *const alone = room(B * N * 8);

    for (int64_t b = 0; b < B; b++)
        for (int64_t j = 0; j < N; j++) {
            before[b * N + j] = sum_before(p, b, i0, j);
            after[b * N + j] = j < i1 ? sum_before(p, b, i1, j) : 0.0;
            alone[b * N + j] = after[b * N + j] - before[b * N + j] * (j < i1);
        }
    for (int l = 0; l < levels; l++)
        for (int threads = 1; threads <= 3; threads++) {
            const char *const level = sel_cpu_level_name(tables[l].level);
            char how_many[64];
            snprintf(how_many, sizeof how_many, "rows %d to %d, %d threads", (int)i0, (int)i1, threads);

            carry_of(p, &tables[l], &in, threads, i0, i1, NULL, sums);
            if (threads == 1) memcpy(one, sums, (size_t)(B * N) * 4);
            for (int64_t b = 0; b < B; b++) {
                CHECK(!memcmp(one + b * N, sums + b * N, (size_t)i1 * 4), "%s, %s, %s: other bits than one thread's",
                      level, p->name, how_many);
                for (int64_t j = i1; j < N; j++) sums[b * N + j] = 0.0f;
            }
            check_error(p, &tables[l], how_many, "sums of S", SUM, sums, alone, B * N, norm(after, B * N));

            for (int64_t n = 0; n < B * N; n++) start[n] = n % N < i0 ? (float)before[n] : NAN;   /* of [0, i0) only */
            carry_of(p, &tables[l], &in, threads, i0, i1, start, sums);
            carry_of(p, &tables[l], &in, threads, i0, i1, start, start);
            for (int64_t b = 0; b < B; b++) {
                CHECK(!memcmp(start + b * N, sums + b * N, (size_t)i1 * 4), "%s, %s, %s: in place: other bits", level,
                      p->name, how_many);
                for (int64_t j = i1; j < N; j++) sums[b * N + j] = 0.0f;
            }
            check_error(p, &tables[l], how_many, "carry and sums of S", SUM, sums, after, B * N, norm(after, B * N));
        }
    free(one);
    free(sums);
    free(start);
    free(before);
    free(after);
    free(alone);
    arrays_free(&in);
}

/* ---- backward ---- */

static bool field_same(const field *x, const field *y)
{
    return memcmp(x->x, y->x, (size_t)(x->count * value_size(x->half))) == 0;
}

/* The gradients of one call, as backward left them and then as attention_carry_backward did. */
typedef struct {
    arrays g;
    sel_attention_grad grad;
} gradients;

static gradients gradients_new(const problem *p, arrangement how, const piece *c, const tensor *dout)
{
    gradients x = { .g = arrays_new(p, how, c->a.i0, c->a.i1, RIM, RIM, false) };
    const arrays *const g = &x.g;
    x.grad = (sel_attention_grad){ .dout = tensor_at(dout, c->a.i0),
                                   .dq = g->q.x, .dq_seq = g->q.seq, .dq_row = g->q.row,
                                   .dk = g->k.x, .dk_seq = g->k.seq, .dk_row = g->k.row,
                                   .dv = g->v.x, .dv_seq = g->v.seq, .dv_row = g->v.row,
                                   .dsel_q = g->sel_q.x, .dsel_q_seq = g->sel_q.seq, .dsel_q_row = g->sel_q.row,
                                   .dsel_k = g->sel_k.x, .dsel_k_seq = g->sel_k.seq, .dsel_k_row = g->sel_k.row,
                                   .memory_coef = (float)p->a.memory_coef };
    return x;
}

/* The gradients of a call with dcarry_in [B][N]; dcarry_out [B][N]. */
static void backward_of(const sel_ops *ops, piece *c, gradients *x, int64_t *m_row, const float *dcarry_in,
                        float *dcarry_out)
{
    c->a.m_row = m_row;
    c->a.workspace = workspace_new(&c->a, true);
    x->grad.dcarry_in = dcarry_in;
    x->grad.dcarry_out = dcarry_out;
    ops->attention_backward(&c->a, &x->grad);
    free(c->a.workspace);
}

/* Adds what dcarry_in brings, with nothing at hand but what that takes. */
static void add_later(const problem *p, const sel_ops *ops, const arrays *in, const piece *c, gradients *x,
                      const float *dcarry_in)
{
    sel_attention a = selection_call(p, in, c->a.threads, c->a.i0, c->a.i1);
    sel_attention_grad g = x->grad;
    float untouched = RIM;
    a.dead_after = c->a.dead_after;
    a.saved = a.dead_after ? c->saved : NULL;
    a.tau = c->a.tau;
    a.workspace = workspace_new(&a, true);
    g.dout = NULL;
    g.dv = NULL;
    if (p->sel_q) g.dq = g.dk = NULL;
    g.dcarry_in = dcarry_in;
    g.dcarry_out = &untouched;
    ops->attention_carry_backward(&a, &g);
    CHECK(untouched == RIM, "%s, %s: dcarry_out written", sel_cpu_level_name(ops->level), p->name);
    free(a.workspace);
}

static float *tensor_copy(const tensor *t)
{
    float *const x = room(t->B * t->N * t->width * 4);
    tensor_read(t, x, t->N, 0, false);
    return x;
}

/* Between two arrays [..][width] of which the first `own` of each row may differ: their distance there, relative to
   `size`; -1 where they differ elsewhere. */
static double apart(const tensor *x, const float *y, int64_t own)
{
    double difference = 0.0, size = 0.0;
    for (int64_t b = 0; b < x->B; b++)
        for (int64_t i = 0; i < x->N; i++)
            for (int64_t d = 0; d < x->width; d++) {
                const double u = (double)load_value(x->x, x->half, b * x->seq + i * x->row + d);
                const double v = (double)y[(b * x->N + i) * x->width + d];
                if (d >= own && u != v) return -1.0;
                difference += (u - v) * (u - v);
                size += v * v;
            }
    return size > 0.0 ? sqrt(difference / size) : sqrt(difference);
}

static double farthest[2];   /* of backward in two steps from backward in one: float32, bfloat16 */

static void check_apart(const problem *p, const sel_ops *ops, const piece *c, const char *what, const tensor *x,
                        const float *y, int64_t own)
{
    /* dL is rounded to bfloat16 once or in two parts: each at most half its spacing, 2^-9, off */
    const double r = apart(x, y, own), bound = bfloat16 ? 0x1p-8 : 1e-6;
    CHECK(r >= 0.0 && r <= bound, "%s, %s, rows %d to %d, %d threads: %s: %s %.3g",
          sel_cpu_level_name(ops->level), p->name, (int)c->a.i0, (int)c->a.i1, c->a.threads, what,
          r < 0.0 ? "written where it may not" : "differs from backward's by", r);
    farthest[bfloat16] = fmax(farthest[bfloat16], r);
}

static int memory_rows;      /* arg-max rows of the memory loss in calls that do not start a sequence */

/* Backward with dcarry_in is backward without it and then attention_carry_backward; backward's dcarry_out without it
   the column sums of dF over the call's rows, by the reference. */
static void check_later(const problem *p, arrangement how, int threads, int64_t i0, int64_t i1)
{
    const int64_t B = p->a.B, N = p->a.N, H = p->a.H;
    arrays in = inputs_new(p, how), d = arrays_new(p, how, 0, N, NAN, NAN, bfloat16);
    float *const later = room(B * N * 4), *const both = room(B * N * 4), *const own = room(B * N * 4);
    problem rows = *p;
    tensor_write(&d.o, p->dout);

    for (int64_t n = 0; n < B * N; n++) later[n] = n % N < i1 ? (float)random_normal() : NAN;
    /* dF of a row is made of its own dO: without the others' the reference's sum is over these rows. */
    rows.dout = room(q_count(p) * 8);
    for (int64_t n = 0; n < q_count(p); n++) {
        const int64_t row = n / (H * p->a.dh) % N;
        rows.dout[n] = row >= i0 && row < i1 ? p->dout[n] : 0.0;
    }
    problem_solve(&rows);
    for (int64_t b = 0; p->a.tau > 0.0 && b < B; b++)
        memory_rows += i0 > 0 && p->r.m_row[b] >= i0 && p->r.m_row[b] < i1;
    if (p->a.tau > 0.0)
        for (int64_t b = 0; b < B; b++)   /* a memory row outside adds to the reference's sum, not to the call's */
            for (int64_t j = 0; j <= p->r.m_row[b]; j++)
                if ((p->r.m_row[b] < i0 || p->r.m_row[b] >= i1) &&
                    p->r.F[(b * N + p->r.m_row[b]) * N + j] < p->a.tau)
                    rows.r.dcarry[b * N + j] += p->a.memory_coef;

    for (int l = 0; l < levels; l++) {
        const sel_ops *const ops = &tables[l];
        outcome o = outcome_new(p);
        for (int64_t n = 0; n < B * N; n++) o.carry[n] = (float)sum_before(p, n / N, i0, n % N);
        if (dead_margin > 0.0) find_dead_after(p, ops, &in, threads, o.dead_after);
        piece c = piece_forward(p, ops, &in, threads, i0, i1, &o);
        gradients one = gradients_new(p, how, &c, &d.o), two = gradients_new(p, how, &c, &d.o);
        memset(own, 0, (size_t)(B * N) * 4);
        backward_of(ops, &c, &one, p->r.m_row, later, both);
        backward_of(ops, &c, &two, p->r.m_row, NULL, own);
        check_error(p, ops, "dcarry_out of the own rows", "dcarry", PRODUCT, own, rows.r.dcarry, B * N,
                    norm(rows.r.dcarry, B * N));

        gradients again = gradients_new(p, how, &c, &d.o);
        backward_of(ops, &c, &again, p->r.m_row, NULL, own);
        float *const q = tensor_copy(&one.g.q), *const k = tensor_copy(&one.g.k), *const v = tensor_copy(&two.g.v);
        float *const sel_q = tensor_copy(&one.g.sel_q), *const sel_k = tensor_copy(&one.g.sel_k);
        add_later(p, ops, &in, &c, &two, later);
        add_later(p, ops, &in, &c, &again, later);
        check_apart(p, ops, &c, "dv", &two.g.v, v, 0);
        check_apart(p, ops, &c, "dq", &two.g.q, q, p->sel_q ? 0 : p->a.dh);
        check_apart(p, ops, &c, "dk", &two.g.k, k, p->sel_q ? 0 : p->a.dh);
        check_apart(p, ops, &c, "dsel_q", &two.g.sel_q, sel_q, p->a.dh);
        check_apart(p, ops, &c, "dsel_k", &two.g.sel_k, sel_k, p->a.dh);
        for (int f = 0; f < FIELDS; f++)
            CHECK(field_same(&two.g.fields[f], &again.g.fields[f]),
                  "%s, %s: two runs on %d threads differ", sel_cpu_level_name(ops->level), p->name, threads);
        CHECK(arrays_damage(&two.g) == 0, "%s, %s: values written outside the gradients",
              sel_cpu_level_name(ops->level), p->name);
        free(q);
        free(k);
        free(v);
        free(sel_q);
        free(sel_k);
        arrays_free(&one.g);
        arrays_free(&two.g);
        arrays_free(&again.g);
        piece_free(&c);
        outcome_free(&o);
    }
    rows.q = rows.k = rows.v = rows.sel_q = rows.sel_k = NULL;   /* p's */
    problem_free(&rows);
    free(later);
    free(both);
    free(own);
    arrays_free(&in);
    arrays_free(&d);
}

/* dF is rounded to bfloat16 operands: dcarry_in between its values gives the bits of the rounded ones. */
static void check_rounding(selection_source source)
{
    static const int64_t widths[] = { 64, 16, 40 };
    for (int c = 0; c < 3; c++) {
        const sel_ref_attention a = { .B = 1, .H = 2, .Hkv = 1, .N = 150, .dh = widths[c] };
        problem p = problem_new(&a, 1, source, 1.0, 50 + (uint64_t)c);
        const int64_t N = a.N, i0 = 70;
        arrays in = inputs_new(&p, APART);
        float *const later[2] = { room(N * 4), room(N * 4) };
        for (int64_t j = 0; j < N; j++) {
            later[0][j] = (float)operand(random_normal());
            later[1][j] = later[0][j] * (1.0f + 0x1p-10f * (float)(random_uniform() - 0.5));
        }
        for (int l = 0; l < levels; l++) {
            gradients g[2];
            for (int i = 0; i < 2; i++) {
                piece call = { .a = selection_call(&p, &in, 2, i0, N) };
                g[i] = gradients_new(&p, APART, &call, &in.o);
                add_later(&p, &tables[l], &in, &call, &g[i], later[i]);
            }
            for (int f = 0; f < FIELDS; f++)
                CHECK(field_same(&g[0].g.fields[f], &g[1].g.fields[f]),
                      "%s, %s: attention_carry_backward: dcarry_in is not rounded",
                      sel_cpu_level_name(tables[l].level), p.name);
            arrays_free(&g[0].g);
            arrays_free(&g[1].g);
        }
        arrays_free(&in);
        free(later[0]);
        free(later[1]);
        problem_free(&p);
    }
}

/* ---- all together ---- */

/* The product on a problem in n chunks that wait for no other's carry. */
static outcome run_chunks(const problem *p, const sel_ops *ops, int threads, arrangement how, int n)
{
    const int64_t B = p->a.B, N = p->a.N, columns = B * N;
    arrays in = inputs_new(p, how), d = arrays_new(p, how, 0, N, NAN, NAN, bfloat16);
    outcome o = outcome_new(p);
    piece pieces[MOST];
    gradients grads[MOST];
    float *sums[MOST], *const carry = room(columns * 4);
    int64_t cuts[MOST + 1];

    tensor_write(&d.o, p->dout);
    if (dead_margin > 0.0) find_dead_after(p, ops, &in, threads, o.dead_after);
    for (int c = 0; c <= n; c++) cuts[c] = N * c / n;
    for (int c = 0; c < n; c++) {
        sums[c] = room(columns * 4);
        carry_of(p, ops, &in, threads, cuts[c], cuts[c + 1], NULL, sums[c]);
    }
    memset(carry, 0, (size_t)columns * 4);
    for (int c = 0; c < n; c++) {
        memcpy(o.carry, carry, (size_t)columns * 4);
        pieces[c] = piece_forward(p, ops, &in, threads, cuts[c], cuts[c + 1], &o);
        for (int64_t i = 0; i < columns; i++) carry[i] += i % N < cuts[c + 1] ? sums[c][i] : 0.0f;
    }
    tensor_read(&in.o, o.out, N, 0, false);
    for (int c = 0; c < n; c++) {
        grads[c] = gradients_new(p, how, &pieces[c], &d.o);
        backward_of(ops, &pieces[c], &grads[c], o.m_row, NULL, sums[c]);
    }
    memset(carry, 0, (size_t)columns * 4);
    for (int c = n; c-- > 0;) {
        const arrays *const g = &grads[c].g;
        add_later(p, ops, &in, &pieces[c], &grads[c], c == n - 1 ? NULL : carry);
        for (int64_t i = 0; i < columns; i++) carry[i] += i % N < cuts[c + 1] ? sums[c][i] : 0.0f;
        tensor_read(&g->q, o.dq, N, cuts[c], false);
        tensor_read(&g->k, o.dk, N, 0, true);
        tensor_read(&g->v, o.dv, N, 0, true);
        tensor_read(&g->sel_q, o.dsel_q, N, cuts[c], false);
        tensor_read(&g->sel_k, o.dsel_k, N, 0, true);
        o.damage += arrays_damage(g);
        piece_free(&pieces[c]);
        arrays_free(&grads[c].g);
        free(sums[c]);
    }
    memcpy(o.dcarry, carry, (size_t)columns * 4);
    free(carry);
    arrays_free(&in);
    arrays_free(&d);
    return o;
}

static double rounding(int64_t N) { return 17.0 + log((double)N); }

static const int chunks[] = { 0, 1, 2, 3, 5, 16 };

/* Any number of chunks against the reference; the errors must not grow with it: at most half as large again as those of
   one plain call ("chunks 0"). */
static void check_chunks(const sel_ref_attention *a, int s, selection_source source, bool dead, uint64_t seed,
                         bool table)
{
    problem p = problem_new(a, s, source, 1.0, seed);
    for (int l = 0; l < levels; l++) {
        double first[4] = { 0.0 };
        if (table) printf("%s, %s%s\n%8s %10s %10s %10s %10s\n", sel_cpu_level_name(tables[l].level), p.name,
                          dead ? ", dead keys" : "", "chunks", "out", "dq", "dk", "dv");
        for (int c = 0; c < 6; c++) {
            char text[64];
            snprintf(text, sizeof text, "%d chunks%s", chunks[c], dead ? ", dead keys" : "");
            dead_margin = dead ? rounding(a->N) : 0.0;
            const int threads = 1 + c % 3;
            const arrangement how = c % 2 ? PACKED : APART;
            outcome o = chunks[c] ? run_chunks(&p, &tables[l], threads, how, chunks[c])
                                  : run(&p, &tables[l], threads, how, (const int64_t[]){ 0, a->N }, 1);
            check_outcome(&p, &tables[l], text, &o);
            dead_margin = 0.0;
            const double errors[] = { distance(o.out, p.r.out, q_count(&p)) / norm(p.r.out, q_count(&p)),
                                      distance(o.dq, p.r.dq, q_count(&p)) / norm(p.r.dq, q_count(&p)),
                                      distance(o.dk, p.r.dk, k_count(&p)) / norm(p.r.dk, k_count(&p)),
                                      distance(o.dv, p.r.dv, k_count(&p)) / norm(p.r.dv, k_count(&p)) };
            if (table)
                printf("%8d %10.2e %10.2e %10.2e %10.2e\n", chunks[c], errors[0], errors[1], errors[2], errors[3]);
            for (int e = 0; e < 4; e++) {
                if (c == 0) first[e] = errors[e];
                CHECK(errors[e] <= 1.5 * first[e], "%s, %s, %s: result %d: error %.3g, of one call %.3g",
                      sel_cpu_level_name(tables[l].level), p.name, text, e, errors[e], first[e]);
            }
            outcome_free(&o);
        }
    }
    problem_free(&p);
}

/* Every set of switches with every way to cut; the other sizes go round. */
static void check_grid(selection_source source, int thin)
{
    static const int64_t shapes[][2] = { { 3, 3 }, { 1, 1 }, { 4, 2 }, { 3, 1 }, { 6, 2 } };
    static const int64_t widths[] = { 64, 16, 48, 32, 64, 40, 5 };
    static const int64_t rows[][3] = { { 1, 0, 1 },      { 65, 0, 65 },    { 200, 0, 200 },  { 200, 64, 200 },
                                       { 200, 37, 130 }, { 321, 120, 311 }, { 200, 199, 200 }, { 130, 3, 67 } };
    int c = 0;
    for (int s = 1; s < SWITCHES; s++)
        for (int r = 0; r < 8; r++, c++) {
            if (c % thin) continue;
            const sel_ref_attention a = { .B = 1 + c % 4, .H = shapes[c % 5][0], .Hkv = shapes[c % 5][1],
                                          .N = rows[r][0], .dh = widths[c % 7], .tau = c / 2 % 2 ? 1.0 : 0.0 };
            problem p = problem_new(&a, s, source, 1.0, (uint64_t)c);
            check_sums(&p, c % 2 ? PACKED : APART, rows[r][1], rows[r][2]);
            check_later(&p, c % 2 ? PACKED : APART, 1 + c % 3, rows[r][1], rows[r][2]);
            dead_margin = p.a.relu ? rounding(a.N) : 0.0;
            if (dead_margin > 0.0 && r == 5) check_later(&p, c % 2 ? PACKED : APART, 1 + c % 3, rows[r][1], rows[r][2]);
            dead_margin = 0.0;
            problem_free(&p);
        }
}

int main(void)
{
    const bool quick = getenv("SEL_TEST_QUICK") != NULL;
    for (int level = SEL_CPU_C; level <= (int)sel_cpu_detect(); level++)
        sel_ops_init(&tables[levels++], (sel_cpu_level)level);
    for (int type = 0; type < 2; type++) {
        bfloat16 = type == 1;
        for (selection_source source = HEAD0; source <= BILINEAR; source++) {
            check_grid(source, quick ? 5 : 1);
            if (bfloat16) check_rounding(source);
            for (int s = 1; s < SWITCHES; s += quick ? 3 : 1) {
                const sel_ref_attention a = { .B = 1 + s % 3, .H = 3, .Hkv = s % 2 ? 3 : 1, .N = 200,
                                              .dh = s % 3 ? 32 : 24, .tau = s % 2 ? 0.7 : 0.0 };
                check_chunks(&a, s, source, false, 100 + (uint64_t)s, false);
            }
        }
        const sel_ref_attention dead = { .B = 1, .H = 2, .Hkv = 1, .N = 700, .dh = 64, .tau = 1.0 };
        const sel_ref_attention a = { .B = 1, .H = 2, .Hkv = 2, .N = quick ? 700 : 2048, .dh = 64, .tau = 1.0 };
        check_chunks(&dead, 1, HEAD0, true, 200, true);
        check_chunks(&dead, 1, BILINEAR, true, 201, false);
        check_chunks(&a, 1, HEAD0, false, 202, true);
    }
    CHECK(memory_rows > 0, "no arg-max row in a call after the first");
    printf("largest error %.2f of its bound, bfloat16 %.2f; backward in two steps from one %.2g, bfloat16 %.2g\n",
           worst[0], worst[1], farthest[0], farthest[1]);
    return check_verdict();
}
