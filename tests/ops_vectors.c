/* ops_vectors.c: every operation of the table but attention, at every level this processor has, against plain sums
 * in double.
 *
 * u = 2^-24 is the rounding of one float32 operation.  Each bound is k u times the sum of the absolute terms; k
 * counts the roundings on the way, as the comment beside it says.  A float32 sum of n values in 2 VL lanes of at
 * least 4 has at most n / 8 + 6 roundings on any path: DEPTH(n).
 */
#include "tests/check.h"
#include "tests/random.h"

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>
#include "ops/ops.h"
#define SEL_LEVEL c
#include "ops/vec.h"

#define U 0x1p-24
#define DEPTH(n) ((double)(n) / 8.0 + 6.0)

static const int64_t SIZES[] = { 1, 2, 15, 16, 17, 31, 33, 127, 257 };
#define COUNT(a) ((int)(sizeof(a) / sizeof *(a)))

static sel_ops ops;
static char place[160];   /* what is being tested, for messages */

#define AT(...) snprintf(place, sizeof place, __VA_ARGS__)

/* ---- data ---- */

/* 0 .. n - 1 */
static int32_t pick(int64_t n) { return (int32_t)(random_uniform() * (double)n); }

static float uniform(float size) { return size * (float)(2.0 * random_uniform() - 1.0); }

/* Arrays start 4 bytes past a multiple of 16 and have a rim of 17 floats on both sides. */
enum { RIM = 17, MOST_ARRAYS = 64 };
static const float RIM_VALUE = 7.25f;   /* any write changes it */
static struct { float *at; int64_t n; } arrays[MOST_ARRAYS];
static int n_arrays;

static float *array(int64_t n)
{
    float *block = malloc((size_t)(n + 2 * RIM) * sizeof *block);
    if (!block || n_arrays == MOST_ARRAYS) abort();
    for (int64_t i = 0; i < n + 2 * RIM; i++) block[i] = RIM_VALUE;
    arrays[n_arrays].at = block;
    arrays[n_arrays++].n = n;
    return block + RIM;
}

static float *noise(int64_t n, float size)
{
    float *x = array(n);
    for (int64_t i = 0; i < n; i++) x[i] = uniform(size);
    return x;
}

static float *integers(int64_t n)
{
    float *x = array(n);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(pick(17) - 8);
    return x;
}

static float *copy(const float *x, int64_t n)
{
    float *y = array(n);
    memcpy(y, x, (size_t)n * sizeof *y);
    return y;
}

/* bfloat16 values; the last one touches the rim. */
static uint16_t *halves(int64_t n)
{
    return (uint16_t *)(void *)array((n + 1) / 2) + n % 2;
}

/* Checks the rims of all arrays and frees them. */
static void arrays_end(void)
{
    for (int a = 0; a < n_arrays; a++) {
        for (int64_t i = 0; i < RIM; i++)
            CHECK(arrays[a].at[i] == RIM_VALUE && arrays[a].at[RIM + arrays[a].n + i] == RIM_VALUE,
                  "%s: array %d of %" PRId64 ": rim written", place, a, arrays[a].n);
        free(arrays[a].at);
    }
    n_arrays = 0;
}

static bool same(const float *a, const float *b, int64_t n) { return memcmp(a, b, (size_t)n * sizeof *a) == 0; }

#define NEAR(got, want, bound, what, i)                                                                     \
    CHECK(fabs((double)(got) - (want)) <= (bound), "%s: %s[%" PRId64 "] = %.9g, not %.9g (bound %.3g)", place, \
          what, (int64_t)(i), (double)(got), (double)(want), (double)(bound))

/* x rounded to 8 significant bits, 2^-133 at the finest; past the largest finite value infinity. */
static double to_8_bits(double x)
{
    int power;
    if (!isfinite(x) || x == 0.0) return x;
    frexp(x, &power);
    const double unit = ldexp(1.0, (power > -125 ? power : -125) - 8), y = rint(x / unit) * unit;
    return fabs(y) < 0x1p128 ? y : x * INFINITY;
}

static float bf16_value(uint16_t y)
{
    const uint32_t bits = (uint32_t)y << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Whether each y is x rounded, signs of zeros included. */
static bool rounded(const uint16_t *y, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const float got = bf16_value(y[i]), want = (float)to_8_bits((double)x[i]);
        if (isnan(want) ? !isnan(got) : got != want || signbit(got) != signbit(want)) return false;
    }
    return true;
}

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

/* ---- norms ---- */

static double norm_inverse(const double *x, int64_t D)
{
    double sum = 0.0;
    for (int64_t d = 0; d < D; d++) sum += x[d] * x[d];
    return 1.0 / sqrt(sum / (double)D + 1e-6);
}

/* Gradient of sum of dy y, and the sums of its absolute terms. */
static void norm_gradient(const double *dy, const double *x, const double *w, int64_t D, double *dx, double *dx_size,
                          double *dw)
{
    const double r = norm_inverse(x, D);
    double sum = 0.0, size = 0.0;
    for (int64_t d = 0; d < D; d++) {
        sum += dy[d] * w[d] * x[d] * r;
        size += fabs(dy[d] * w[d] * x[d] * r);
    }
    for (int64_t d = 0; d < D; d++) {
        dx[d] = r * (dy[d] * w[d] - x[d] * r * sum / (double)D);
        dx_size[d] = r * (fabs(dy[d] * w[d]) + fabs(x[d] * r) * size / (double)D);
        dw[d] = dy[d] * x[d] * r;
    }
}

static double norm_value(const double *dy, const double *x, const double *w, int64_t D)
{
    double sum = 0.0;
    for (int64_t d = 0; d < D; d++) sum += dy[d] * x[d] * norm_inverse(x, D) * w[d];
    return sum;
}

/* The oracle's gradient against central differences. */
static void test_norm_oracle(void)
{
    enum { D = 7 };
    double dy[D], x[D], w[D], dx[D], size[D], dw[D];
    AT("norm's oracle");
    for (int d = 0; d < D; d++) {
        dy[d] = (double)uniform(1.0f);
        x[d] = (double)uniform(2.0f);
        w[d] = (double)uniform(1.0f);
    }
    norm_gradient(dy, x, w, D, dx, size, dw);
    for (int d = 0; d < D; d++) {
        const double h = 1e-5, x0 = x[d], w0 = w[d];
        x[d] = x0 + h;
        const double up = norm_value(dy, x, w, D);
        x[d] = x0 - h;
        NEAR(dx[d], (up - norm_value(dy, x, w, D)) / (2.0 * h), 1e-8, "dx", d);
        x[d] = x0;
        w[d] = w0 + h;
        const double wide = norm_value(dy, x, w, D);
        w[d] = w0 - h;
        NEAR(dw[d], (wide - norm_value(dy, x, w, D)) / (2.0 * h), 1e-8, "dw", d);
        w[d] = w0;
    }
}

typedef struct { double *dy, *x, *w, *dx, *size, *dw; } norm_row;

static norm_row norm_row_new(int64_t D)
{
    double *at = malloc((size_t)(6 * D) * sizeof *at);
    if (!at) abort();
    return (norm_row){ at, at + D, at + 2 * D, at + 3 * D, at + 4 * D, at + 5 * D };
}

/* heads = 0: rmsnorm, whose backward adds to dx; otherwise headnorm with rows x_row, y_row, ... apart.  D is the
   norm's width in both. */
static void test_norm(int64_t D, int heads, int threads, float size)
{
    enum { ROWS = 7 };
    const int n = heads ? heads : 1;
    const int64_t wide = n * D, x_row = wide + (heads ? 3 : 0), y_row = wide + (heads ? 5 : 0);
    AT("%s D %" PRId64 " x %d threads %d size %g %s", heads ? "headnorm" : "rmsnorm", D, n, threads, (double)size,
       sel_cpu_level_name(ops.level));
    float *x = noise(ROWS * x_row, size), *y = noise(ROWS * y_row, 1.0f), *y1 = copy(y, ROWS * y_row);
    const float *y_before = copy(y, ROWS * y_row), *w = noise(D, 2.0f);
    for (int64_t d = 0; d < wide; d++) x[2 * x_row + d] = 0.0f;   /* a row of zeros */
    float *rstd = array(ROWS * n), *rstd1 = array(ROWS * n);
    if (heads) {
        ops.headnorm_forward(y, y_row, rstd, x, x_row, w, ROWS, heads, D, threads);
        ops.headnorm_forward(y1, y_row, NULL, x, x_row, w, ROWS, heads, D, 1);
        ops.headnorm_forward(y1, y_row, rstd1, x, x_row, w, ROWS, heads, D, 1);
    } else {
        ops.rmsnorm_forward(y, rstd, x, w, ROWS, D, threads);
        ops.rmsnorm_forward(y1, NULL, x, w, ROWS, D, 1);
        ops.rmsnorm_forward(y1, rstd1, x, w, ROWS, D, 1);
    }
    CHECK(same(y, y1, ROWS * y_row) && same(rstd, rstd1, ROWS * n), "%s: bits depend on threads", place);

    if (!heads) {
        uint16_t *half = halves(ROWS * D);
        float *rstd2 = array(ROWS);
        ops.rmsnorm_forward_bf16(half, NULL, x, w, ROWS, D, 1);
        CHECK(rounded(half, y, ROWS * D), "%s: bfloat16 without rstd", place);
        memset(half, 0xff, (size_t)(ROWS * D) * sizeof *half);
        ops.rmsnorm_forward_bf16(half, rstd2, x, w, ROWS, D, threads);
        CHECK(rounded(half, y, ROWS * D) && same(rstd2, rstd, ROWS), "%s: bfloat16 is not float32 rounded", place);
    }

    const float *dy = noise(ROWS * y_row, 1.0f);
    float *dx = noise(ROWS * x_row, 0.1f), *dw = noise(D, 1.0f), *scratch = array(threads * D);
    const float *dx_before = copy(dx, ROWS * x_row), *dw_before = copy(dw, D);
    float *dx1 = copy(dx, ROWS * x_row), *dw1 = copy(dw, D), *own = copy(dy, ROWS * y_row), *dw2 = copy(dw, D);
    if (heads) {
        ops.headnorm_backward(dx, x_row, dw, dy, y_row, x, x_row, rstd, w, scratch, ROWS, heads, D, threads);
        ops.headnorm_backward(dx1, x_row, dw1, dy, y_row, x, x_row, rstd, w, scratch, ROWS, heads, D, threads);
        ops.headnorm_backward(own, y_row, dw2, own, y_row, x, x_row, rstd, w, scratch, ROWS, heads, D, threads);
        for (int64_t r = 0; r < ROWS; r++)
            CHECK(same(own + r * y_row, dx + r * x_row, wide), "%s: dx in dy's place, row %" PRId64, place, r);
        CHECK(same(dw2, dw, D), "%s: dw with dx in dy's place", place);
    } else {
        ops.rmsnorm_backward(dx, dw, dy, x, rstd, w, scratch, ROWS, D, threads);
        ops.rmsnorm_backward(dx1, dw1, dy, x, rstd, w, scratch, ROWS, D, threads);
    }
    CHECK(same(dx, dx1, ROWS * x_row) && same(dw, dw1, D), "%s: two runs differ", place);

    const norm_row o = norm_row_new(D);
    double *sum_dw = calloc((size_t)(2 * D), sizeof *sum_dw), *size_dw = sum_dw + D;
    for (int64_t r = 0; r < ROWS; r++) {
        for (int64_t h = 0; h < n; h++) {
            const int64_t xi = r * x_row + h * D, yi = r * y_row + h * D;
            for (int64_t d = 0; d < D; d++) {
                o.dy[d] = (double)dy[yi + d];
                o.x[d] = (double)x[xi + d];
                o.w[d] = (double)w[d];
            }
            const double inverse = norm_inverse(o.x, D);
            norm_gradient(o.dy, o.x, o.w, D, o.dx, o.size, o.dw);
            /* half the sum's relative error, then the rounding of r itself */
            const double k = (DEPTH(D) + 1.0) / 2.0 + 1.0;
            NEAR(rstd[r * n + h], inverse, k * U * inverse, "rstd", r * n + h);
            for (int64_t d = 0; d < D; d++) {
                const double want = o.x[d] * inverse * o.w[d];
                NEAR(y[yi + d], want, (k + 2.0) * U * fabs(want), "y", yi + d);
                /* r's error three times, the sum's, six products */
                const double before = heads ? 0.0 : (double)dx_before[xi + d];
                const double bound = U * ((3.0 * k + DEPTH(D) + 8.0) * o.size[d] + 2.0 * fabs(before));
                NEAR(dx[xi + d], before + o.dx[d], bound, "dx", xi + d);
                sum_dw[d] += o.dw[d];
                size_dw[d] += fabs(o.dw[d]);
            }
        }
        for (int64_t d = wide; d < x_row; d++)
            CHECK(dx[r * x_row + d] == dx_before[r * x_row + d], "%s: gap of dx, row %" PRId64, place, r);
        for (int64_t d = wide; d < y_row; d++)
            CHECK(y[r * y_row + d] == y_before[r * y_row + d], "%s: gap of y, row %" PRId64, place, r);
    }
    for (int64_t d = 0; d < D; d++) {
        const double before = (double)dw_before[d], k = ROWS * n + threads + DEPTH(D) + 4.0;
        NEAR(dw[d], before + sum_dw[d], k * U * (size_dw[d] + fabs(before)), "dw", d);
    }
    free(sum_dw);
    free(o.dy);
    arrays_end();
}

static void test_norm_nan(void)
{
    enum { D = 37 };
    AT("rmsnorm with NaN %s", sel_cpu_level_name(ops.level));
    float *x = noise(2 * D, 1.0f), *y = array(2 * D);
    const float *w = noise(D, 1.0f);
    x[3] = NAN;
    ops.rmsnorm_forward(y, NULL, x, w, 2, D, 1);
    for (int d = 0; d < D; d++) CHECK(isnan(y[d]) && isfinite(y[D + d]), "%s: y[%d]", place, d);
    ops.rmsnorm_forward(NULL, NULL, NULL, w, 0, D, 2);
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
        ops.cross_entropy(many, logp, best, target, scales[s], rows, V, threads);
        ops.cross_entropy(one, logp1, best1, target, scales[s], rows, V, 1);
        CHECK(same(many, one, rows * V) && memcmp(logp, logp1, (size_t)rows * sizeof *logp) == 0,
              "%s: bits depend on threads", place);
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
        ops.cross_entropy(row, &logp, &best, &target, 1.0f, 1, 40, 1);
        CHECK(b == 0 ? isnan(logp) : !isfinite(logp), "%s: logp %g", place, logp);
        for (int j = 0; j < 40; j++) CHECK(b == 0 ? isnan(row[j]) : j != 35 || isnan(row[j]), "%s: %d", place, j);
    }
    float none[40];
    for (int j = 0; j < 40; j++) none[j] = -INFINITY;
    double logp;
    uint8_t best;
    const int32_t target = 0;
    ops.cross_entropy(none, &logp, &best, &target, 1.0f, 1, 40, 1);
    CHECK(isnan(logp), "%s: a row of -inf has logp %g", place, logp);
}

/* ---- flat arrays ---- */

static void test_add(int64_t n, int threads)
{
    AT("add n %" PRId64 " threads %d %s", n, threads, sel_cpu_level_name(ops.level));
    const float *x = noise(n, 1.0f);
    float *y = noise(n, 3.0f);
    const float *before = copy(y, n);
    ops.add(y, x, n, threads);
    for (int64_t i = 0; i < n; i++) CHECK(y[i] == before[i] + x[i], "%s: y[%" PRId64 "]", place, i);
    arrays_end();
}

/* Every upper half of a float with the lower halves where rounding turns: ties to even and odd, one beside them,
   carries into the exponent and to infinity, denormals, infinities, NaN of any payload. */
static void test_to_bfloat16(void)
{
    static const uint32_t low[] = { 0, 1, 0x7fff, 0x8000, 0x8001, 0xffff };
    const int64_t n = 65536 * COUNT(low);
    AT("to_bfloat16 %s", sel_cpu_level_name(ops.level));
    float *x = array(n);
    uint16_t *y = halves(n);
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)(i / COUNT(low)) << 16 | low[i % COUNT(low)];
        memcpy(x + i, &bits, sizeof bits);
    }
    ops.to_bfloat16(y, x, n, 2);
    for (int64_t i = 0; i < n; i++) {
        CHECK(rounded(y + i, x + i, 1), "%s: %a became %a", place, (double)x[i], (double)bf16_value(y[i]));
        CHECK(!isnan(x[i]) || (y[i] & 0x40), "%s: a signalling NaN: %04x", place, y[i]);
    }
    for (int i = 0; i < COUNT(SIZES); i++)
        for (int threads = 1; threads <= 3; threads++) {
            const float *from = noise(SIZES[i], 1.0f);
            uint16_t *to = halves(SIZES[i]);
            ops.to_bfloat16(to, from, SIZES[i], threads);
            CHECK(rounded(to, from, SIZES[i]), "%s: %" PRId64 " values", place, SIZES[i]);
        }
    ops.to_bfloat16(NULL, NULL, 0, 2);
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
            test_norm(SIZES[i], 0, threads, 2.0f);
            test_norm(SIZES[i], 3, threads, 2.0f);
            test_swiglu(SIZES[i], threads);
            test_loss(SIZES[i], 15, threads);
            test_add(SIZES[i], threads);
            test_adamw(SIZES[i], threads, 0.9, 0.999);
        }
        test_norm(64, 3, threads, 1e-4f);
        test_norm(127, 0, threads, 1e20f);
        test_loss(1024, 15, threads);
        test_loss(2500, 15, threads);
        test_add(70001, threads);
        test_adamw(9001, threads, 0.9, 0.999);
        test_adamw(33, threads, 0.0, 0.0);
    }
    test_to_bfloat16();
    test_loss(70001, 12, 2);
    test_norm_nan();
    test_swiglu_oracle();
    test_loss_oracle();
    test_add(0, 2);
    ops.embed_forward(NULL, NULL, NULL, NULL, 0, 0, 0, 8, 2);
    ops.swiglu_forward(NULL, NULL, 0, 8, 2);
    ops.rmsnorm_forward_bf16(NULL, NULL, NULL, NULL, 0, 8, 2);
    ops.swiglu_forward_bf16(NULL, NULL, 0, 8, 2);
    ops.swiglu_backward_bf16(NULL, NULL, NULL, NULL, 0, 8, 2);
    ops.cross_entropy(NULL, NULL, NULL, NULL, 1.0f, 0, 8, 2);
    static const int64_t long_sizes[] = { 0, 1, 2, 15, 16, 17, 65535, 65536, 65537, 200001 };
    for (int i = 0; i < COUNT(long_sizes); i++) test_squares(long_sizes[i]);
    test_squares_long();
}

int main(void)
{
    test_vec();
    test_cpu();
    test_norm_oracle();
    test_levels_agree();
    for (int level = 0; level <= (int)sel_cpu_detect(); level++) {
        sel_ops_init(&ops, (sel_cpu_level)level);
        test_level();
    }
    return check_verdict();
}
