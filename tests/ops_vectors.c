/* ops_vectors.c: every operation of the table but attention and the norms, at every level this processor has, against
 * plain sums in double (bounds: tests/vectors.h).
 */
#include "tests/vectors.h"

/* ---- embeddings ---- */

static void test_embed(int64_t D, int threads)
{
    enum { VOCAB = 5, N = 3, ROWS = 11, POS0 = 2 };
    AT("embed D %" PRId64 " threads %d %s", D, threads, sel_cpu_level_name(ops.level));
    int32_t tokens[ROWS];
    for (int r = 0; r < ROWS; r++) tokens[r] = pick(VOCAB);
    const float *tok = noise(VOCAB * D, 1.0f), *pos = noise((POS0 + N) * D, 1.0f);
    float *x = array(ROWS * D);
    ops.embed_forward(x, tokens, tok, pos, ROWS, N, POS0, D, threads);
    for (int64_t i = 0; i < ROWS * D; i++)
        CHECK(x[i] == tok[tokens[i / D] * D + i % D] + pos[(POS0 + i / D % N) * D + i % D], "%s: x[%" PRId64 "]", place,
              i);

    /* integers: exact in any order */
    const float *dx = integers(ROWS * D);
    float *dtok = integers(VOCAB * D), *dpos = integers(N * D);
    float *want_tok = copy(dtok, VOCAB * D), *want_pos = copy(dpos, N * D);
    ops.embed_backward(dtok, dpos, dx, tokens, ROWS, N, D, threads);
    for (int64_t i = 0; i < ROWS * D; i++) {
        want_tok[tokens[i / D] * D + i % D] += dx[i];
        want_pos[i / D % N * D + i % D] += dx[i];
    }
    CHECK(same(dtok, want_tok, VOCAB * D), "%s: dtok", place);
    CHECK(same(dpos, want_pos, N * D), "%s: dpos", place);

    /* fractions: the same bits as with one thread */
    const float *fx = noise(ROWS * D, 1.0f);
    float *many_tok = noise(VOCAB * D, 1.0f), *many_pos = noise(N * D, 1.0f);
    float *one_tok = copy(many_tok, VOCAB * D), *one_pos = copy(many_pos, N * D);
    ops.embed_backward(many_tok, many_pos, fx, tokens, ROWS, N, D, threads);
    ops.embed_backward(one_tok, one_pos, fx, tokens, ROWS, N, D, 1);
    CHECK(same(many_tok, one_tok, VOCAB * D) && same(many_pos, one_pos, N * D), "%s: bits depend on threads", place);
    arrays_end();
}

/* ---- SwiGLU ---- */

/* 1 - s without cancellation */
static double logistic(double g) { return g >= 0.0 ? 1.0 / (1.0 + exp(-g)) : exp(g) / (1.0 + exp(g)); }

static void test_swiglu(int64_t Fw, int threads)
{
    enum { ROWS = 4 };
    static const float edges[] = { 0.0f,   -0.0f, 1e-30f, -1e-30f, 16.6f,  -16.6f,  17.0f, -20.0f, 50.0f, -50.0f, 87.0f,
                                   -87.0f, 88.5f, -88.5f, 89.0f,   -89.0f, 100.0f,  1e4f,  -1e4f,  1e30f, -1e30f };
    AT("swiglu F %" PRId64 " threads %d %s", Fw, threads, sel_cpu_level_name(ops.level));
    float *gu = noise(ROWS * 2 * Fw, 6.0f), *a = array(ROWS * Fw), *a1 = array(ROWS * Fw), *again = array(ROWS * Fw);
    for (int64_t i = 0; i < Fw; i++) gu[2 * Fw + i] = edges[i % COUNT(edges)];   /* row 1's gates */
    ops.swiglu_forward(a, gu, ROWS, Fw, threads);
    ops.swiglu_forward(a1, gu, ROWS, Fw, 1);
    CHECK(same(a, a1, ROWS * Fw), "%s: bits depend on threads", place);

    const float *da = noise(ROWS * Fw, 1.0f);
    float *dgu = array(ROWS * 2 * Fw), *own = copy(gu, ROWS * 2 * Fw);
    ops.swiglu_backward(dgu, again, da, gu, ROWS, Fw, threads);
    ops.swiglu_backward(own, NULL, da, own, ROWS, Fw, 1);
    CHECK(same(again, a, ROWS * Fw), "%s: a rebuilt differs from forward's", place);
    CHECK(same(own, dgu, ROWS * 2 * Fw), "%s: dgu in gu's place", place);

    uint16_t *half = halves(ROWS * Fw), *half_dgu = halves(ROWS * 2 * Fw);
    ops.swiglu_forward_bf16(half, gu, ROWS, Fw, threads);
    CHECK(rounded(half, a, ROWS * Fw), "%s: bfloat16 forward is not float32 rounded", place);
    memset(half, 0xff, (size_t)(ROWS * Fw) * sizeof *half);
    ops.swiglu_backward_bf16(half_dgu, half, da, gu, ROWS, Fw, threads);
    CHECK(rounded(half, a, ROWS * Fw), "%s: bfloat16 a rebuilt differs from forward's", place);
    CHECK(rounded(half_dgu, dgu, ROWS * 2 * Fw), "%s: bfloat16 backward is not float32 rounded", place);
    memset(half_dgu, 0xff, (size_t)(ROWS * 2 * Fw) * sizeof *half_dgu);
    ops.swiglu_backward_bf16(half_dgu, NULL, da, gu, ROWS, Fw, 1);
    CHECK(rounded(half_dgu, dgu, ROWS * 2 * Fw), "%s: bfloat16 backward without a", place);

    for (int64_t i = 0; i < ROWS * Fw; i++) {
        const int64_t at = i / Fw * 2 * Fw + i % Fw;
        const double g = (double)gu[at], up = (double)gu[at + Fw], d = (double)da[i];
        const double s = logistic(g), rest = logistic(-g), silu = g * s;
        /* s: exp 4 (2 ulp), sum 1, division 1; below -88.7 it is 0, off by 2^-125 */
        const double lost = g < -86.0 ? 0x1p-125 : 0.0;
        NEAR(a[i], silu * up, 9.0 * U * fabs(silu * up) + lost * fabs(g * up), "a", i);
        NEAR(dgu[at + Fw], silu * d, 9.0 * U * fabs(silu * d) + lost * fabs(g * d), "du", i);
        /* s 6; silu 7, 1 - s 11, their product 1; then the sum and two products */
        const double bound = U * fabs(d * up) * (9.0 * s + 22.0 * fabs(silu * rest));
        NEAR(dgu[at], d * up * (s + silu * rest), bound + lost * fabs(d * up) * (1.0 + fabs(g)), "dg", i);
    }
    arrays_end();
}

static void test_swiglu_oracle(void)
{
    AT("swiglu's oracle");
    for (int i = 0; i < 50; i++) {
        const double g = (double)uniform(8.0f), h = 1e-5, s = logistic(g);
        const double numeric = ((g + h) * logistic(g + h) - (g - h) * logistic(g - h)) / (2.0 * h);
        NEAR(s + g * s * logistic(-g), numeric, 1e-8, "dg", i);
    }
    AT("swiglu with NaN %s", sel_cpu_level_name(ops.level));
    float gu[10] = { 0 }, a[5];
    gu[2] = NAN;
    ops.swiglu_forward(a, gu, 1, 5, 1);
    for (int i = 0; i < 5; i++) CHECK(i == 2 ? isnan(a[i]) : a[i] == 0.0f, "%s: a[%d] = %g", place, i, (double)a[i]);
}

/* ---- cross-entropy ---- */

typedef struct { double logp, most, sum, spread; bool best; } row_loss;   /* spread: sum of p |z - max| */

static row_loss loss_of(const float *z, int64_t V, int32_t target)
{
    row_loss o = { .most = -INFINITY };
    int64_t first = 0;
    for (int64_t j = 0; j < V; j++)
        if ((double)z[j] > o.most) {
            o.most = (double)z[j];
            first = j;
        }
    for (int64_t j = 0; j < V; j++) {
        const double far = (double)z[j] - o.most, e = exp(far);
        o.sum += e;
        if (e > 0.0) o.spread += e * fabs(far);
    }
    o.spread /= o.sum;
    o.logp = (double)z[target] - o.most - log(o.sum);
    o.best = first == target;
    return o;
}

static void loss_check(const float *z, const float *gradient, int64_t V, int32_t target, double logp, uint8_t best,
                       float scale, int64_t row)
{
    if (target < 0) {
        bool zero = logp == 0.0 && best == 0;
        for (int64_t j = 0; j < V; j++) zero &= gradient[j] == 0.0f;
        CHECK(zero, "%s: padding row %" PRId64, place, row);
        return;
    }
    const row_loss o = loss_of(z, V, target);
    /* the sum: blocks of at most 1,024 (4,096 here with 64 blocks), exp 4, and z - max rounded before exp */
    const double k = DEPTH(V < 1024 ? V : 4096) + 4.0 + 1.0 + o.spread;
    if (isinf(o.logp)) CHECK(logp == o.logp, "%s: logp[%" PRId64 "] = %g", place, row, logp);
    else NEAR(logp, o.logp, k * U + 0x1p-50 * fabs(o.logp), "logp", row);
    CHECK(best == o.best, "%s: best[%" PRId64 "] = %d", place, row, best);
    if (scale == 0.0f) {
        CHECK(same(z, gradient, V), "%s: row %" PRId64 " written with scale 0", place, row);
        return;
    }
    for (int64_t j = 0; j < V; j++) {
        const double far = (double)z[j] - o.most, p = exp(far) / o.sum, size = fabs((double)scale);
        const double own = p > 0.0 ? p * (k + 4.0 + fabs(far) + 4.0) : 0.0;
        const double bound = size * (U * (own + (j == target ? 1.0 : 0.0)) + 0x1p-124);
        NEAR(gradient[j], (double)scale * (p - (j == target)), bound, "gradient", j);
    }
}

/* Rows of ordinary logits and of ranges that break naive code. */
static void loss_rows(float *z, int32_t *target, int64_t rows, int64_t V)
{
    for (int64_t r = 0; r < rows; r++) {
        float *row = z + r * V;
        const int32_t t = pick(V);
        target[r] = t;
        switch (r) {
        case 1: for (int64_t j = 0; j < V; j++) row[j] += 1e4f; break;
        case 2: for (int64_t j = 0; j < V; j++) row[j] -= 1e4f; break;
        case 3: for (int64_t j = 0; j < V; j++) row[j] = 2.5f; break;             /* the first is best */
        case 4: target[r] = -1; break;
        case 5: for (int64_t j = 0; j < V; j++) row[j] = j % 3 ? row[j] : -INFINITY; break;
        case 6: for (int64_t j = 0; j + 1 < V; j++) row[j] = -INFINITY; break;    /* whole blocks of -inf */
        case 7: for (int64_t j = 0; j < V; j++) row[j] = j % 2 ? 3e38f : -3e38f; break;
        case 8: row[t] = 9.0f; break;                                            /* the target is best */
        case 9: row[t] = 9.0f; row[V - 1] = 9.0f; row[0] = 9.0f; break;           /* equals */
        case 10: for (int64_t j = 0; j < V; j++) row[j] = 0.5f * (float)j; break;  /* each block has a new base */
        case 11: for (int64_t j = 0; j < V; j++) row[j] = -0.5f * (float)j; break;
        case 12: target[r] = -5; row[t] = NAN; break;
        default: break;
        }
        if (r == 5 && t % 3 == 0 && V > 1) target[r] = t + 1 < V ? t + 1 : t - 1;
        if (r == 5 && V == 1) row[0] = 1.0f;
        if (r == 6) row[V - 1] = -1e4f;
    }
}

static void test_loss(int64_t V, int64_t rows, int threads)
{
    AT("cross_entropy V %" PRId64 " threads %d %s", V, threads, sel_cpu_level_name(ops.level));
    int32_t target[16];
    double logp[16], logp1[16];
    uint8_t best[16], best1[16];
    float *z = noise(rows * V, 4.0f);
    loss_rows(z, target, rows, V);
    static const float scales[] = { 0.0f, 1.0f, 0.37f, -0x1p-20f };
    for (int s = 0; s < COUNT(scales); s++) {
        float *many = copy(z, rows * V), *one = copy(z, rows * V);
        ops.cross_entropy(many, NULL, logp, best, target, scales[s], rows, V, threads);
        ops.cross_entropy(one, NULL, logp1, best1, target, scales[s], rows, V, 1);
        CHECK(same(many, one, rows * V) && memcmp(logp, logp1, (size_t)rows * sizeof *logp) == 0,
              "%s: bits depend on threads", place);
        if (scales[s] != 0.0f) {
            float *spoilt = copy(z, rows * V);
            uint16_t *half = halves(rows * V);
            ops.cross_entropy(spoilt, half, logp1, best1, target, scales[s], rows, V, threads);
            CHECK(rounded(half, many, rows * V), "%s: bfloat16 gradient is not float32 rounded", place);
            CHECK(memcmp(logp, logp1, (size_t)rows * sizeof *logp) == 0, "%s: logp beside a bfloat16 gradient", place);
        }
        for (int64_t r = 0; r < rows; r++)
            if (target[r] >= 0 || scales[s] != 0.0f)
                loss_check(z + r * V, many + r * V, V, target[r], logp[r], best[r], scales[s], r);
    }
    arrays_end();
}

static void test_loss_oracle(void)
{
    enum { V = 5 };
    AT("cross-entropy's oracle");
    float z[V] = { 0.5f, -1.0f, 2.0f, 0.25f, -0.5f };
    const row_loss o = loss_of(z, V, 1);
    for (int j = 0; j < V; j++) {
        const float h = 0x1p-10f, z0 = z[j];
        z[j] = z0 + h;
        const double up = loss_of(z, V, 1).logp;
        z[j] = z0 - h;
        const double numeric = (up - loss_of(z, V, 1).logp) / (2.0 * (double)h);
        z[j] = z0;
        NEAR((j == 1) - exp((double)z0 - o.most) / o.sum, numeric, 1e-6, "dlogp", j);
    }
    AT("cross_entropy with NaN, infinity %s", sel_cpu_level_name(ops.level));
    static const float bad[] = { NAN, INFINITY };
    for (int b = 0; b < COUNT(bad); b++) {
        float row[40] = { 0 };
        double logp;
        uint8_t best;
        const int32_t target = 3;
        row[35] = bad[b];
        ops.cross_entropy(row, NULL, &logp, &best, &target, 1.0f, 1, 40, 1);
        CHECK(b == 0 ? isnan(logp) : !isfinite(logp), "%s: logp %g", place, logp);
        for (int j = 0; j < 40; j++) CHECK(b == 0 ? isnan(row[j]) : j != 35 || isnan(row[j]), "%s: %d", place, j);
    }
    float none[40];
    for (int j = 0; j < 40; j++) none[j] = -INFINITY;
    double logp;
    uint8_t best;
    const int32_t target = 0;
    ops.cross_entropy(none, NULL, &logp, &best, &target, 1.0f, 1, 40, 1);
    CHECK(isnan(logp), "%s: a row of -inf has logp %g", place, logp);
}

/* ---- flat arrays ---- */

/* The rows of q/k norm that are only rounded: one of n values, no heads. */
static void round_values(uint16_t *y, const float *x, int64_t n, int threads)
{
    const sel_qkv_rows row = { .x = x, .x_row = n, .rows = 1, .dh = 16, .rest = n };
    ops.qk_norm_forward(y, true, n, &row, threads);
}

/* Every upper half of a float with the lower halves where rounding turns: ties to even and odd, one beside them,
   carries into the exponent and to infinity, denormals, infinities, NaN of any payload. */
static void test_rounding(void)
{
    static const uint32_t low[] = { 0, 1, 0x7fff, 0x8000, 0x8001, 0xffff };
    const int64_t n = 65536 * COUNT(low);
    AT("rounding to bfloat16 %s", sel_cpu_level_name(ops.level));
    float *x = array(n);
    uint16_t *y = halves(n);
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)(i / COUNT(low)) << 16 | low[i % COUNT(low)];
        memcpy(x + i, &bits, sizeof bits);
    }
    round_values(y, x, n, 2);
    for (int64_t i = 0; i < n; i++) {
        CHECK(rounded(y + i, x + i, 1), "%s: %a became %a", place, (double)x[i], (double)bf16_value(y[i]));
        CHECK(!isnan(x[i]) || (y[i] & 0x40), "%s: a signalling NaN: %04x", place, y[i]);
    }
    for (int i = 0; i < COUNT(SIZES); i++)
        for (int threads = 1; threads <= 3; threads++) {
            const float *from = noise(SIZES[i], 1.0f);
            uint16_t *to = halves(SIZES[i]);
            round_values(to, from, SIZES[i], threads);
            CHECK(rounded(to, from, SIZES[i]), "%s: %" PRId64 " values", place, SIZES[i]);
        }
    arrays_end();
}

static void adamw_call(float *w, float *m, float *v, const float *g, int64_t n, double beta1, double beta2, int step,
                       int threads)
{
    ops.adamw(w, m, v, g, n, 0.7, 5e-3, beta1, beta2, 1e-8, 1e-4, 1.0 - pow(beta1, step), 1.0 - pow(beta2, step),
              threads);
}

static void test_adamw(int64_t n, int threads, double beta1, double beta2)
{
    AT("adamw n %" PRId64 " threads %d beta %g %g %s", n, threads, beta1, beta2, sel_cpu_level_name(ops.level));
    float *w = noise(n, 1.0f), *m = array(n), *v = array(n), *g = noise(n, 1e-2f);
    memset(m, 0, (size_t)n * sizeof *m);
    memset(v, 0, (size_t)n * sizeof *v);
    float *w1 = copy(w, n), *m1 = copy(m, n), *v1 = copy(v, n);
    for (int step = 1; step <= 4; step++) {
        const float *old_w = copy(w, n), *old_m = copy(m, n), *old_v = copy(v, n);
        for (int64_t i = 0; i < n; i++) g[i] = i % 7 == 3 ? 0.0f : uniform(step == 3 ? 1e-9f : 1e-2f);
        adamw_call(w, m, v, g, n, beta1, beta2, step, threads);
        /* in two calls that part in the middle of a vector, on one thread: the same bits */
        const int64_t part = n / 3;
        adamw_call(w1, m1, v1, g, part, beta1, beta2, step, 1);
        adamw_call(w1 + part, m1 + part, v1 + part, g + part, n - part, beta1, beta2, step, 1);
        CHECK(same(w, w1, n) && same(m, m1, n) && same(v, v1, n), "%s: bits depend on threads or place", place);

        const double c1 = 1.0 - pow(beta1, step), c2 = 1.0 - pow(beta2, step), lr = 5e-3;
        for (int64_t i = 0; i < n; i++) {
            const double x = 0.7 * (double)g[i], keep_m = beta1 * (double)old_m[i], keep_v = beta2 * (double)old_v[i];
            const double want_m = keep_m + (1.0 - beta1) * x, want_v = keep_v + (1.0 - beta2) * x * x;
            /* g's scale 2, 1 - beta 1, product 1, sum 1 */
            const double size_m = fabs(keep_m) + fabs((1.0 - beta1) * x);
            NEAR(m[i], want_m, 5.0 * U * size_m, "m", i);
            NEAR(v[i], want_v, 8.0 * U * want_v + 0x1p-140, "v", i);
            /* m 5; sqrt of v 4 + 1, its scale 2, eps 2; lr, product, division 3; decay 2; the two sums 2 */
            const double root = sqrt(want_v / c2) + 1e-8, w0 = (double)old_w[i];
            const double push = lr * want_m / c1 / root, decay = lr * 1e-4 * w0, new_w = w0 - push - decay;
            const double bound = U * (20.0 * lr * size_m / c1 / root + 4.0 * fabs(decay) + fabs(new_w));
            NEAR(w[i], new_w, bound, "w", i);
        }
    }
    arrays_end();
}

static void test_squares(int64_t n)
{
    AT("sum_squares n %" PRId64 " %s", n, sel_cpu_level_name(ops.level));
    const float *x = noise(n, 3.0f), *z = integers(n);
    double sum = 0.0, exact = 0.0;
    for (int64_t i = 0; i < n; i++) {
        sum += (double)x[i] * (double)x[i];
        exact += (double)z[i] * (double)z[i];
    }
    const double one = ops.sum_squares(x, n, 1);
    NEAR(one, sum, (double)(n + 1) * 0x1p-52 * sum, "sum", 0);
    CHECK(ops.sum_squares(z, n, 2) == exact, "%s: integers", place);
    for (int threads = 2; threads <= 3; threads++)
        CHECK(ops.sum_squares(x, n, threads) == one, "%s: bits depend on threads", place);
    arrays_end();
}

/* More blocks than one batch of partial sums holds. */
static void test_squares_long(void)
{
    const int64_t n = 1025 * 4096 + 3;
    float *x = calloc((size_t)n, sizeof *x);
    if (!x) abort();
    x[0] = 3.0f;
    x[1024 * 4096] = 4.0f;
    x[n - 1] = 12.0f;
    const double sum = ops.sum_squares(x, n, 2);
    CHECK(sum == 169.0, "sum_squares of 1,026 blocks: %g", sum);
    free(x);
}

/* ---- vec.h, cpu.h ---- */

static void test_vec(void)
{
    double worst = 0.0;
    float at = 0.0f;
    for (float x = -87.3f; x <= 88.7f; x += 1e-4f) {
        const double want = exp((double)x), got = (double)vexp(vset1(x))[0];
        int power;
        frexp(want, &power);
        const double ulps = fabs(got - want) / ldexp(1.0, power - 24);
        if (ulps > worst) {
            worst = ulps;
            at = x;
        }
    }
    CHECK(worst <= 2.0, "vexp(%.9g) is %.3g ulp off", (double)at, worst);
    CHECK(vexp(vset1(0.0f))[0] == 1.0f, "vexp(0)");
    CHECK(vexp(vset1(-87.4f))[0] == 0.0f && vexp(vset1(-1e30f))[0] == 0.0f && vexp(vset1(-INFINITY))[0] == 0.0f,
          "vexp below -87.3");
    CHECK(isinf(vexp(vset1(88.8f))[0]) && isinf(vexp(vset1(1e30f))[0]) && isinf(vexp(vset1(INFINITY))[0]),
          "vexp above 88.7");
    CHECK(isnan(vexp(vset1(NAN))[0]), "vexp(NaN)");

    float from[VL], to[VL + 1];
    for (int n = 0; n <= VL; n++) {
        for (int i = 0; i < VL; i++) from[i] = (float)((i + 1) * (i + 1));
        for (int i = 0; i <= VL; i++) to[i] = RIM_VALUE;
        const vf x = vload_n(from, n);
        vstore_n(to, vsqrt(x), n);
        float sum = 0.0f;
        for (int i = 0; i < n; i++) sum += from[i];
        CHECK(vsum(x) == sum, "vsum of %d values", n);
        for (int i = 0; i <= VL; i++) CHECK(to[i] == (i < n ? (float)(i + 1) : RIM_VALUE), "lane %d of %d", i, n);
    }
}

static void test_cpu(void)
{
    static const char *const words[] = { "c", "avx2", "avx512", "avx512bf16" };
    const sel_cpu_level most = sel_cpu_detect();
    sel_cpu_level got;
    unsetenv("SELECTRA_CPU");
    CHECK_OK(sel_cpu_choose("auto", &got));
    CHECK(got == most, "auto gives %s", sel_cpu_level_name(got));
    for (int i = 0; i < COUNT(words); i++) {
        const sel_cpu_level want = i < (int)most ? (sel_cpu_level)i : most;
        CHECK(strcmp(sel_cpu_level_name((sel_cpu_level)i), words[i]) == 0, "name of level %d", i);
        CHECK_OK(sel_cpu_choose(words[i], &got));
        CHECK(got == want, "%s gives %s", words[i], sel_cpu_level_name(got));
        setenv("SELECTRA_CPU", words[i], 1);
        CHECK_OK(sel_cpu_choose("auto", &got));
        CHECK(got == want, "SELECTRA_CPU=%s gives %s", words[i], sel_cpu_level_name(got));
        CHECK_OK(sel_cpu_choose("c", &got));
        CHECK(got == SEL_CPU_C, "c under SELECTRA_CPU=%s gives %s", words[i], sel_cpu_level_name(got));
        unsetenv("SELECTRA_CPU");
    }
    CHECK(sel_cpu_choose("sse9", &got) == SEL_EUSER && strstr(sel_error(), "sse9"), "\"%s\"", sel_error());
    setenv("SELECTRA_CPU", "fast", 1);
    CHECK(sel_cpu_choose("auto", &got) == SEL_EUSER && strstr(sel_error(), "SELECTRA_CPU"), "\"%s\"", sel_error());
    unsetenv("SELECTRA_CPU");
    CHECK(*sel_cpu_name() != '\0', "no processor name");
}

/* What the levels share to the bit: the norm of the gradients and AdamW, whose results go into weights. */
static void test_levels_agree(void)
{
    enum { N = 70001 };
    AT("levels agree");
    const float *x = noise(N, 1.0f), *start = noise(N, 1.0f);
    float *first_w = NULL;
    double first_sum = 0.0;
    for (int level = 0; level <= (int)sel_cpu_detect(); level++) {
        sel_ops_init(&ops, (sel_cpu_level)level);
        CHECK((int)ops.level == level, "the table says level %d, not %d", (int)ops.level, level);
        const double sum = ops.sum_squares(x, N, 2);
        float *w = copy(start, N), *m = copy(x, N), *v = copy(x, N);
        for (int64_t i = 0; i < N; i++) v[i] = fabsf(v[i]);
        adamw_call(w, m, v, x, N, 0.9, 0.999, 5, 2);
        if (level == 0) {
            first_sum = sum;
            first_w = w;
        }
        CHECK(sum == first_sum, "sum_squares at %s differs from c", sel_cpu_level_name(ops.level));
        CHECK(same(w, first_w, N), "adamw at %s differs from c", sel_cpu_level_name(ops.level));
    }
    arrays_end();
}

static void test_level(void)
{
    for (int threads = 1; threads <= 3; threads++) {
        for (int i = 0; i < COUNT(SIZES); i++) {
            test_embed(SIZES[i], threads);
            test_swiglu(SIZES[i], threads);
            test_loss(SIZES[i], 15, threads);
            test_adamw(SIZES[i], threads, 0.9, 0.999);
        }
        test_loss(1024, 15, threads);
        test_loss(2500, 15, threads);
        test_adamw(9001, threads, 0.9, 0.999);
        test_adamw(33, threads, 0.0, 0.0);
    }
    test_rounding();
    test_loss(70001, 12, 2);
    test_swiglu_oracle();
    test_loss_oracle();
    ops.embed_forward(NULL, NULL, NULL, NULL, 0, 0, 0, 8, 2);
    ops.swiglu_forward(NULL, NULL, 0, 8, 2);
    ops.swiglu_forward_bf16(NULL, NULL, 0, 8, 2);
    ops.swiglu_backward_bf16(NULL, NULL, NULL, NULL, 0, 8, 2);
    ops.cross_entropy(NULL, NULL, NULL, NULL, NULL, 1.0f, 0, 8, 2);
    static const int64_t long_sizes[] = { 0, 1, 2, 15, 16, 17, 65535, 65536, 65537, 200001 };
    for (int i = 0; i < COUNT(long_sizes); i++) test_squares(long_sizes[i]);
    test_squares_long();
}

int main(void)
{
    test_vec();
    test_cpu();
    test_levels_agree();
    for (int level = 0; level <= (int)sel_cpu_detect(); level++) {
        sel_ops_init(&ops, (sel_cpu_level)level);
        test_level();
    }
    return check_verdict();
}
