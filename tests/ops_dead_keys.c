/* Dead keys (specification, section 3.1): attention that leaves out keys whose F has passed a threshold.
 *
 * Against the reference, which leaves out nothing, with the same bounds as without dead keys; against the same kernel
 * without them, to rounding; and what is left out is counted and weighed with the reference's own F.
 */
#include "tests/attention_case.h"

#define AGREE 5e-7           /* specification: float32 with and without dead keys */
#define EXACT 104.0

static double rounding(int64_t N) { return 17.0 + log((double)N); }

static double relative(const float *x, const float *y, int64_t n)
{
    double difference = 0.0, size = 0.0;
    for (int64_t i = 0; i < n; i++) {
        difference += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
        size += (double)y[i] * (double)y[i];
    }
    return sqrt(difference / size);
}

/* The reference's logit of head h. */
static double logit(const problem *p, int64_t b, int64_t h, int64_t i, int64_t j)
{
    const double *q = p->q + ((b * p->a.N + i) * p->a.H + h) * p->a.dh;
    const double *k = p->k + ((b * p->a.N + j) * p->a.Hkv + h * p->a.Hkv / p->a.H) * p->a.dh;
    double s = 0.0;
    for (int64_t d = 0; d < p->a.dh; d++) s += q[d] * k[d];
    return s / sqrt((double)p->a.dh);
}

/* By the reference's F: how many pairs of a row and a live key there are, give or take those at the threshold, and that
   what the dead ones weigh together is below half a unit in the last place of each row's sum. */
static void weigh(const problem *p, const sel_ops *ops, const outcome *o)
{
    /* rows of a row tile: the AVX-512 kernels, of head widths that are multiples of 16, have less in short sequences */
    const bool words = p->a.dh % 16 == 0 && ops->level >= (bfloat16 ? SEL_CPU_AVX512BF16 : SEL_CPU_AVX512);
    const int64_t N = p->a.N, ROWS = words && N <= 2048 ? 32 : 64;
    for (int64_t b = 0; b < p->a.B; b++) {
        double live = 0.0, doubtful = 0.0, lost = 0.0;
        for (int64_t i = 0; i < N; i++) {
            const int64_t began = i / ROWS * ROWS;
            for (int64_t j = 0; j <= i; j++) {
                /* summed over the rows before the tile: F of its first row, without shift of the row before */
                const double f = j < began ? p->r.F[(b * N + began - !p->a.shift) * N + j] : 0.0;
                const double over = f - (double)o->dead_after[b];
                live += over <= 0.0;
                doubtful += fabs(over) < 1e-3;
                if (over <= 1e-3) continue;
                for (int64_t h = 0; h < p->a.H; h++) {
                    const double weight = exp(logit(p, b, h, i, j) - p->r.F[(b * N + i) * N + j] -
                                              p->r.lse[(b * p->a.H + h) * N + i]);
                    lost = fmax(lost, weight * (double)N);
                }
            }
        }
        CHECK(fabs(o->live[b] - live) <= doubtful * (double)ROWS, "%s, %s: %.0f live pairs, not %.0f",
              sel_cpu_level_name(ops->level), p->name, o->live[b], live);
        CHECK(live < 0.75 * (double)(N * (N + 1) / 2), "%s: hardly a key dies: %.0f live pairs of %.0f", p->name, live,
              (double)(N * (N + 1) / 2));
        CHECK(lost < 0x1p-24, "%s, %s: dead keys weigh up to %.3g", sel_cpu_level_name(ops->level), p->name, lost);
    }
}

static double farthest_off[2];

static void check_against_off(const problem *p, const sel_ops *ops, const outcome *o, int threads, const int64_t *cuts,
                              int n)
{
    /* longer sums, grouped in another way, differ more */
    const double margin = dead_margin, bound = bfloat16 ? AGREE_BF16 : p->a.N > 2048 ? 2.0 * AGREE : AGREE;
    dead_margin = 0.0;
    outcome off = run(p, ops, threads, APART, cuts, n);
    dead_margin = margin;
    const float *const x[] = { o->out, o->dq, o->dk, o->dv, o->dsel_q, o->dsel_k };
    const float *const y[] = { off.out, off.dq, off.dk, off.dv, off.dsel_q, off.dsel_k };
    const int64_t counts[] = { q_count(p), q_count(p), k_count(p), k_count(p), sel_count(p), sel_count(p) };
    for (int c = 0; c < 6 && counts[c]; c++) {
        const double r = relative(x[c], y[c], counts[c]);
        CHECK(r <= bound, "%s, %s: result %d differs by %.3g from that without dead keys",
              sel_cpu_level_name(ops->level), p->name, c, r);
        farthest_off[bfloat16] = fmax(farthest_off[bfloat16], r);
    }
    outcome_free(&off);
}

static void check_case(const sel_ref_attention *a, int s, selection_source source, double margin, int threads,
                       const int64_t *cuts, int n, uint64_t seed)
{
    problem p = problem_new(a, s, source, 1.0, seed);
    for (int l = 0; l < levels; l++) {
        dead_margin = margin;
        outcome o = run(&p, &tables[l], threads, n > 1 ? PACKED : APART, cuts, n);
        check_outcome(&p, &tables[l], "dead keys", &o);
        if (n == 1) weigh(&p, &tables[l], &o);
        check_against_off(&p, &tables[l], &o, threads, cuts, n);
        outcome_free(&o);
        dead_margin = 0.0;
    }
    problem_free(&p);
}

static void check_cases(bool quick)
{
    static const int sets[] = { 1, 3, 4, 5, 6 };    /* those with relu */
    static const int64_t shapes[][4] = {{1, 3, 1, 64}, {2, 4, 2, 32}, {3, 2, 2, 16}, {1, 1, 1, 64}, {2, 3, 3, 40}};
    for (int c = 0; c < 10; c++) {
        if (quick && c % 3) continue;
        const int64_t N = c % 2 ? 513 : 400, *const shape = shapes[c % 5];
        const sel_ref_attention a = { .B = shape[0], .H = shape[1], .Hkv = shape[2], .dh = shape[3], .N = N,
                                      .tau = c % 3 ? 1.0 : 0.0 };
        const int64_t whole[] = { 0, N }, cuts[] = { 0, 131, 320, N };
        for (selection_source source = HEAD0; source <= BILINEAR; source++) {
            check_case(&a, sets[c / 2], source, rounding(N), 1 + c % 3, whole, 1, 100 + (uint64_t)c);
            check_case(&a, sets[c / 2], source, rounding(N), 1 + c % 3, cuts, 3, 200 + (uint64_t)c);
        }
    }
    const sel_ref_attention a = { .B = 1, .H = 3, .Hkv = 3, .dh = 64, .N = 700, .tau = 1.0 };
    check_case(&a, 1, HEAD0, EXACT, 2, (const int64_t[]){ 0, 700 }, 1, 300);
}

static bool same(const float *x, const float *y, int64_t n) { return memcmp(x, y, (size_t)n * 4) == 0; }

/* Forward is the same to the bit on any number of threads, backward on the same number. */
static void check_threads(selection_source source)
{
    const sel_ref_attention a = { .B = 1, .H = 3, .Hkv = 1, .dh = 64, .N = 513, .tau = 1.0 };
    problem p = problem_new(&a, 1, source, 1.0, 400);
    const int64_t whole[] = { 0, a.N };
    dead_margin = rounding(a.N);
    for (int l = 0; l < levels; l++) {
        outcome one = run(&p, &tables[l], 1, APART, whole, 1);
        for (int t = 1; t <= 3; t++) {
            outcome x = run(&p, &tables[l], t, APART, whole, 1), y = run(&p, &tables[l], t, APART, whole, 1);
            const char *const level = sel_cpu_level_name(tables[l].level);
            CHECK(same(one.out, x.out, q_count(&p)) && same(one.lse, x.lse, a.H * a.N) && one.live[0] == x.live[0] &&
                      one.m_max[0] == x.m_max[0] && one.m_row[0] == x.m_row[0],
                  "%s: forward on %d threads has other bits", level, t);
            CHECK(same(x.out, y.out, q_count(&p)) && same(x.dq, y.dq, q_count(&p)) && same(x.dk, y.dk, k_count(&p)) &&
                      same(x.dv, y.dv, k_count(&p)) && same(x.dsel_q, y.dsel_q, sel_count(&p)) &&
                      same(x.dsel_k, y.dsel_k, sel_count(&p)),
                  "%s: two runs on %d threads differ", level, t);
            outcome_free(&x);
            outcome_free(&y);
        }
        outcome_free(&one);
    }
    dead_margin = 0.0;
    problem_free(&p);
}

/* Above 4,096 rows several row tiles share a carry, so a list. */
static void check_long(int64_t N, selection_source source)
{
    problem p = { .a = { .B = 1, .H = 2, .Hkv = 1, .N = N, .dh = 16, .selective = true, .relu = true,
                         .protect_bos = true, .protect_self = true, .shift = true } };
    random_seed(500);
    p.q = float_normals(q_count(&p), 0.25);
    p.k = float_normals(k_count(&p), 1.0);
    p.v = float_normals(k_count(&p), 1.0);
    p.dout = float_normals(q_count(&p), 1.0);
    if (source == BILINEAR) {
        p.sel_q = float_normals(N * p.a.dh, 0.25);
        p.sel_k = float_normals(N * p.a.dh, 1.0);
    }
    avoid_kinks(&p);
    snprintf(p.name, sizeof p.name, "%s%s N %d", bfloat16 ? "bfloat16" : "float32",
             source == BILINEAR ? ", bilinear" : "", (int)N);
    for (int l = 0; l < levels; l++) {
        const int64_t whole[] = { 0, N }, cuts[] = { 0, N / 3, N };
        dead_margin = rounding(N);
        for (int threads = 1; threads <= 2; threads++) {
            outcome o = run(&p, &tables[l], threads, APART, threads == 1 ? whole : cuts, threads);
            CHECK(o.live[0] < 0.5 * (double)(N * (N + 1) / 2), "%s: hardly a key dies", p.name);
            check_against_off(&p, &tables[l], &o, threads, threads == 1 ? whole : cuts, threads);
            outcome_free(&o);
        }
        dead_margin = 0.0;
    }
    free(p.q);
    free(p.k);
    free(p.v);
    free(p.dout);
    free(p.sel_q);
    free(p.sel_k);
}

static double dot(const double *x, const double *y, int64_t n)
{
    double s = 0.0;
    for (int64_t d = 0; d < n; d++) s += x[d] * y[d];
    return s;
}

/* The gap of rows from i0 on of sequence b, by its definition: |q| max |k| / sqrt(dh) less what the row's softmax is
   sure to contain; *logit: the largest that it allows for. */
static double gap_of(const problem *p, int64_t b, int64_t i0, double *logit_bound)
{
    const sel_ref_attention *const a = &p->a;
    const double root = sqrt((double)a->dh);
    double gap = 0.0;
    *logit_bound = 0.0;
    for (int64_t h = 0; h < a->H; h++) {
        double longest = 0.0;
        for (int64_t j = 0; j < a->N; j++) {
            const double *const k = p->k + ((b * a->N + j) * a->Hkv + h * a->Hkv / a->H) * a->dh;
            longest = fmax(longest, sqrt(dot(k, k, a->dh)));
        }
        for (int64_t i = i0; i < a->N; i++) {
            const double *const q = p->q + ((b * a->N + i) * a->H + h) * a->dh;
            const double most = sqrt(dot(q, q, a->dh)) * longest / root;
            double sure = logit(p, b, h, i, i), own = logit(p, b, 0, i, i);
            const int64_t row = (b * a->N + i) * a->dh;
            if (p->sel_q) own = dot(p->sel_q + row, p->sel_k + row, a->dh) / root;
            if (!a->shift && !a->protect_self) sure -= fmax(own, 0.0);
            if (a->protect_bos) sure = fmax(sure, logit(p, b, h, i, 0));
            gap = fmax(gap, most - sure);
            *logit_bound = fmax(*logit_bound, fmax(most, fabs(own)));
        }
    }
    return gap;
}

/* The measured gap is never below the true one, and hardly above it: what a kernel's sums may round. */
static void check_gap(void)
{
    static const int sets[] = { 1, 3, 4, 5, 6 };    /* those with relu */
    static const int64_t widths[] = { 64, 16, 48, 40, 5, 80, 128, 32 };
    for (int c = 0; c < 40; c++) {
        const sel_ref_attention a = { .B = 1 + c % 3, .H = 2 * (1 + c % 4), .Hkv = 1 + c % 2, .dh = widths[c % 8],
                                      .N = c % 4 ? 61 + c : 1 + c / 8 };
        problem p = problem_new(&a, sets[c % 5], c / 5 % 2 ? BILINEAR : HEAD0, 1.0, 700 + (uint64_t)c);
        const int64_t i0 = c % 3 == 1 ? a.N / 3 : 0;
        arrays in = arrays_new(&p, c % 2 ? PACKED : APART, 0, a.N, NAN, RIM, bfloat16);
        tensor_write(&in.q, p.q);
        tensor_write(&in.k, p.k);
        tensor_write(&in.sel_q, p.sel_q);
        tensor_write(&in.sel_k, p.sel_k);
        for (int l = 0; l < levels; l++) {
            float gap[3];
            measure_gap(&p, &tables[l], &in, 1 + c % 3, i0, gap);
            for (int64_t b = 0; b < a.B; b++) {
                double bound;
                const double least = gap_of(&p, b, i0, &bound), over = (double)gap[b] - least;
                CHECK(over >= 0.0 && over <= 0x1p-15 * bound, "%s, %s, rows from %d: gap %.9g, at least %.9g",
                      sel_cpu_level_name(tables[l].level), p.name, (int)i0, (double)gap[b], least);
            }
        }
        arrays_free(&in);
        problem_free(&p);
    }
}

static void *line_room(size_t bytes)
{
    void *p;
    if (posix_memalign(&p, 64, bytes)) abort();
    return p;
}

/* n normal values that begin on a cache line; half: bfloat16. */
static void *line_values(int64_t n, double scale, bool half)
{
    double *const from = float_normals(n, scale);
    void *const to = line_room((size_t)(n * value_size(half)));
    for (int64_t i = 0; i < n; i++) store_value(to, half, i, (float)from[i]);
    free(from);
    return to;
}

/* Large results on whole cache lines go around the caches, and are the same as elsewhere, to the bit; without dead keys
   forward's always. */
static void check_around(int threads, int kv_heads, bool dead)
{
    enum { MOST = 4, H = 8, N = 1024, DH = 64, ROW = H * DH, SEQ = N * ROW, ASIDE = 4 };
    const int64_t B = bfloat16 ? MOST : 2, ALL = B * SEQ;   /* 4 MiB of the smallest result: less stays in cache */
    random_seed(600);
    void *const q = line_values(ALL, 0.5, bfloat16), *const k = line_values(ALL, 1.0, bfloat16);
    void *const v = line_values(ALL, 1.0, bfloat16), *const dout = line_values(ALL, 1.0, bfloat16);
    float *const lse = room(4 * B * H * N), *const saved = room(4 * B * sel_attention_saved_size(N));
    char *x[2][4];   /* out, of the operands' type, and gradients */

    for (int l = 0; l < levels; l++) {
        if (tables[l].level < SEL_CPU_AVX512) continue;   /* the portable kernels have one way */
        for (int side = 0; side < 2; side++) {
            float dead_after[MOST];
            double live[MOST];
            for (int i = 0; i < 4; i++) {
                const bool half = i == 0 && bfloat16;
                x[side][i] = (char *)line_values(ALL + ASIDE, 1.0, half) + side * ASIDE * value_size(half);
                memset(x[side][i], 0, (size_t)(ALL * value_size(half)));   /* with few kv-heads not all is written */
            }
            sel_attention a = { .B = B, .heads = H, .kv_heads = kv_heads, .dh = DH, .i1 = N, .selective = true,
                                .relu = true, .protect_bos = true, .protect_self = true, .shift = true,
                                .bfloat16 = bfloat16, .q = q, .q_seq = SEQ, .q_row = ROW,
                                .k = k, .k_seq = SEQ, .k_row = ROW, .v = v, .v_seq = SEQ, .v_row = ROW,
                                .out = x[side][0], .out_seq = SEQ, .out_row = ROW,
                                .lse = lse, .saved = saved, .threads = threads,
                                .dead_after = dead ? dead_after : NULL, .dead_margin = dead ? rounding(N) : 0.0,
                                .live = dead ? live : NULL };
            const sel_attention_grad g = { .dout = dout, .dq = (void *)x[side][1], .dq_seq = SEQ, .dq_row = ROW,
                                           .dk = (void *)x[side][2], .dk_seq = SEQ, .dk_row = ROW,
                                           .dv = (void *)x[side][3], .dv_seq = SEQ, .dv_row = ROW };
            const size_t forward = sel_attention_workspace(&a, false), backward = sel_attention_workspace(&a, true);
            a.workspace = line_room(forward > backward ? forward : backward);
            tables[l].attention_forward(&a);
            tables[l].attention_backward(&a, &g);
            CHECK(!dead || live[0] < 0.5 * N * (N + 1) / 2.0, "%.0f pairs live", live[0]);
            free(a.workspace);
        }
        for (int i = 0; i < 4; i++) {
            const int64_t size = value_size(i == 0 && bfloat16);
            CHECK(!memcmp(x[0][i], x[1][i], (size_t)(ALL * size)),
                  "%s, %d threads: result %d has other bits around the caches", sel_cpu_level_name(tables[l].level),
                  threads, i);
            free(x[0][i]);
            free(x[1][i] - ASIDE * size);
        }
    }
    free(q);
    free(k);
    free(v);
    free(dout);
    free(lse);
    free(saved);
}

int main(void)
{
    const bool quick = getenv("SEL_TEST_QUICK") != NULL;
    for (int level = SEL_CPU_C; level <= (int)sel_cpu_detect(); level++)
        sel_ops_init(&tables[levels++], (sel_cpu_level)level);
    for (int type = 0; type < 2; type++) {
        bfloat16 = type == 1;
        check_gap();
        check_cases(quick);
        for (selection_source source = HEAD0; source <= BILINEAR; source++) {
            check_threads(source);
            if (!quick) check_long(4200, source);
        }
        for (int threads = 1; threads <= 3 && !quick; threads++)
            for (int dead = 0; dead < 2; dead++) check_around(threads, threads == 2 ? 2 : 8, dead);
    }
    printf("dead keys: at most %.2f of the bound (float32), %.2f (bfloat16); from those without at most %.2g, %.2g\n",
           worst[0], worst[1], farthest_off[0], farthest_off[1]);
    return check_verdict();
}
