/* ops_norms.c: RMSNorm, alone, with the residual sum and over heads, at every level this processor has, against plain
 * sums in double (bounds: tests/vectors.h).
 */
#include "tests/vectors.h"

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

/* The sum is exact to its one rounding; the norm of it is rmsnorm_forward's (checked against double above), to the
   bit, whatever lies where: the sum in x's place, y in the branch's. */
static void test_residual_norm(const float *x, const float *w, int64_t rows, int64_t D, int threads)
{
    const int64_t n = rows * D;
    const float *branch = noise(n, 1.0f);
    float *sum = array(n), *want = array(n), *y = array(n), *rstd = array(rows), *want_rstd = array(rows);
    float *own = copy(x, n), *over = copy(branch, n);
    uint16_t *half = halves(n);
    ops.residual_norm(y, false, rstd, sum, x, branch, w, rows, D, threads);
    for (int64_t i = 0; i < n; i++) CHECK(sum[i] == x[i] + branch[i], "%s: sum[%" PRId64 "]", place, i);
    ops.rmsnorm_forward(want, want_rstd, sum, w, rows, D, 1);
    CHECK(same(y, want, n) && same(rstd, want_rstd, rows), "%s: norm of the sum", place);
    ops.residual_norm(over, false, NULL, own, own, over, w, rows, D, 1);
    CHECK(same(own, sum, n) && same(over, want, n), "%s: norm of the sum in place", place);
    ops.residual_norm(half, true, rstd, sum, x, branch, w, rows, D, threads);
    CHECK(rounded(half, want, n) && same(rstd, want_rstd, rows), "%s: norm of the sum in bfloat16", place);
}

/* Against the float32 backward with the residual in dx's place, which the caller checks against double. */
static void test_norm_outputs(const float *want, const float *dw_want, const float *residual, const float *dw_before,
                              const float *y, const float *dy, const float *x, const float *rstd, const float *w,
                              int64_t rows, int64_t D, int threads)
{
    const int64_t n = rows * D;
    float *dx = array(n), *dw = copy(dw_before, D), *again = array(n), *scratch = array(threads * D), *bare = array(n);
    uint16_t *dx16 = halves(n), *again16 = halves(n);
    ops.rmsnorm_backward(dx, residual, NULL, again, dw, dy, x, rstd, w, scratch, rows, D, threads);
    CHECK(same(dx, want, n) && same(dw, dw_want, D), "%s: backward with a residual elsewhere", place);
    CHECK(same(again, y, n), "%s: y rebuilt differs from forward's", place);
    ops.rmsnorm_backward(dx, residual, dx16, again16, dw, dy, x, rstd, w, scratch, rows, D, threads);
    CHECK(same(dx, want, n) && rounded(dx16, want, n) && rounded(again16, y, n), "%s: backward in bfloat16", place);
    for (int64_t i = 0; i < n; i++) dx[i] = 0.0f;
    ops.rmsnorm_backward(dx, dx, NULL, NULL, dw, dy, x, rstd, w, scratch, rows, D, threads);
    ops.rmsnorm_backward(bare, NULL, NULL, NULL, dw, dy, x, rstd, w, scratch, rows, D, threads);
    for (int64_t i = 0; i < n; i++) CHECK(bare[i] == dx[i], "%s: backward without a residual [%" PRId64 "]", place, i);
}

/* Each row of y is `wide` values rounded to bfloat16 and `rest` of x, and 0xffff behind them. */
static void check_rounded(const uint16_t *y, int64_t y_row, const float *want, int64_t want_row, const float *x,
                          int64_t x_row, int64_t rows, int64_t wide, int64_t rest, const char *what)
{
    for (int64_t r = 0; r < rows; r++) {
        const uint16_t *const at = y + r * y_row;
        CHECK(rounded(at, want + r * want_row, wide), "%s: %s is not float32 rounded, row %" PRId64, place, what, r);
        CHECK(rounded(at + wide, x + r * x_row + wide, rest), "%s: the rest of %s, row %" PRId64, place, what, r);
        for (int64_t d = wide + rest; d < y_row; d++)
            CHECK(at[d] == 0xffff, "%s: gap of %s, row %" PRId64, place, what, r);
    }
}

/* qk_norm's results in bfloat16 against its float32 ones y, dx and dw, which the caller checks against double. */
static void test_qk_norm_bf16(const sel_qkv_rows *q, const float *y, int64_t y_row, const float *dy, const float *dx,
                              const float *dw_before, const float *dw, int threads)
{
    const int64_t wide = (q->heads + q->kv_heads) * q->dh, n_y = q->rows * y_row, n_x = q->rows * q->x_row;
    uint16_t *half = halves(n_y), *half1 = halves(n_y), *half_dx = halves(n_x);
    float *dw1 = copy(dw_before, 2 * q->dh), *scratch = array(threads * 2 * q->dh);
    memset(half, 0xff, (size_t)n_y * sizeof *half);
    memset(half1, 0xff, (size_t)n_y * sizeof *half1);
    memset(half_dx, 0xff, (size_t)n_x * sizeof *half_dx);
    ops.qk_norm_forward(half, true, y_row, q, threads);
    ops.qk_norm_again(half1, true, y_row, q, threads);
    check_rounded(half, y_row, y, y_row, q->x, q->x_row, q->rows, wide, q->rest, "y");
    check_rounded(half1, y_row, y, y_row, q->x, q->x_row, q->rows, wide, q->rest, "y rebuilt");
    ops.qk_norm_backward(half_dx, true, q->x_row, dw1, dw1 + q->dh, dy, y_row, q, scratch, threads);
    check_rounded(half_dx, q->x_row, dx, q->x_row, dy, y_row, q->rows, wide, q->rest, "dx");
    CHECK(same(dw1, dw, 2 * q->dh), "%s: dw with bfloat16 dx", place);
}

/* heads = 0: rmsnorm, whose backward adds to dx; otherwise qk_norm, its last head k's, with rows x_row, y_row, ...
   apart.  D is the norm's width in both. */
static void test_norm(int64_t D, int heads, int threads, float size)
{
    enum { ROWS = 7, REST = 19 };
    const int n = heads ? heads : 1, n_q = n - 1;
    const int64_t wide = n * D, x_row = wide + (heads ? REST + 3 : 0), y_row = wide + (heads ? REST + 5 : 0);
    AT("%s D %" PRId64 " x %d threads %d size %g %s", heads ? "qk_norm" : "rmsnorm", D, n, threads, (double)size,
       sel_cpu_level_name(ops.level));
    float *x = noise(ROWS * x_row, size), *y = noise(ROWS * y_row, 1.0f), *y1 = copy(y, ROWS * y_row);
    const float *y_before = copy(y, ROWS * y_row), *w = noise(2 * D, 2.0f);
    for (int64_t d = 0; d < wide; d++) x[2 * x_row + d] = 0.0f;   /* a row of zeros */
    float *rstd = array(ROWS * n), *rstd1 = array(ROWS * n);
    const sel_qkv_rows q = { .rows = ROWS, .heads = n_q, .kv_heads = 1, .dh = D, .rest = REST, .x = x, .x_row = x_row,
                             .w_q = w, .w_k = w + D, .rstd_q = rstd, .rstd_k = rstd + ROWS * n_q };
    if (heads) {
        sel_qkv_rows q1 = q;
        q1.rstd_q = rstd1;
        q1.rstd_k = rstd1 + ROWS * n_q;
        ops.qk_norm_forward(y, false, y_row, &q, threads);
        ops.qk_norm_forward(y1, false, y_row, &q1, 1);
        float *y2 = copy(y_before, ROWS * y_row);
        ops.qk_norm_again(y2, false, y_row, &q, threads);
        CHECK(same(y2, y, ROWS * y_row), "%s: y rebuilt differs from forward's", place);
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
        test_residual_norm(x, w, ROWS, D, threads);
    }

    const float *dy = noise(ROWS * y_row, 1.0f);
    float *dx = noise(ROWS * x_row, 0.1f), *dw = noise(2 * D, 1.0f), *scratch = array(threads * 2 * D);
    const float *dx_before = copy(dx, ROWS * x_row), *dw_before = copy(dw, 2 * D);
    float *dx1 = copy(dx, ROWS * x_row), *dw1 = copy(dw, 2 * D), *own = copy(dy, ROWS * y_row), *dw2 = copy(dw, 2 * D);
    if (heads) {
        ops.qk_norm_backward(dx, false, x_row, dw, dw + D, dy, y_row, &q, scratch, threads);
        ops.qk_norm_backward(dx1, false, x_row, dw1, dw1 + D, dy, y_row, &q, scratch, threads);
        ops.qk_norm_backward(own, false, y_row, dw2, dw2 + D, own, y_row, &q, scratch, threads);
        for (int64_t r = 0; r < ROWS; r++)
            CHECK(same(own + r * y_row, dx + r * x_row, wide) &&
                      same(own + r * y_row + wide, dy + r * y_row + wide, y_row - wide),
                  "%s: dx in dy's place, row %" PRId64, place, r);
        CHECK(same(dw2, dw, 2 * D), "%s: dw with dx in dy's place", place);
        test_qk_norm_bf16(&q, y, y_row, dy, dx, dw_before, dw, threads);
    } else {
        ops.rmsnorm_backward(dx, dx, NULL, NULL, dw, dy, x, rstd, w, scratch, ROWS, D, threads);
        ops.rmsnorm_backward(dx1, dx1, NULL, NULL, dw1, dy, x, rstd, w, scratch, ROWS, D, threads);
        test_norm_outputs(dx, dw, dx_before, dw_before, y, dy, x, rstd, w, ROWS, D, threads);
    }
    CHECK(same(dx, dx1, ROWS * x_row) && same(dw, dw1, 2 * D), "%s: two runs differ", place);

    const norm_row o = norm_row_new(D);
    double *sum_dw = calloc((size_t)(4 * D), sizeof *sum_dw), *size_dw = sum_dw + 2 * D;
    for (int64_t r = 0; r < ROWS; r++) {
        for (int64_t h = 0; h < n; h++) {
            const int64_t xi = r * x_row + h * D, yi = r * y_row + h * D, k_head = heads && h == n_q ? 1 : 0;
            const int64_t ri = k_head ? ROWS * n_q + r : r * (heads ? n_q : 1) + h;
            for (int64_t d = 0; d < D; d++) {
                o.dy[d] = (double)dy[yi + d];
                o.x[d] = (double)x[xi + d];
                o.w[d] = (double)w[k_head * D + d];
            }
            const double inverse = norm_inverse(o.x, D);
            norm_gradient(o.dy, o.x, o.w, D, o.dx, o.size, o.dw);
            /* half the sum's relative error, then the rounding of r itself */
            const double k = (DEPTH(D) + 1.0) / 2.0 + 1.0;
            NEAR(rstd[ri], inverse, k * U * inverse, "rstd", ri);
            for (int64_t d = 0; d < D; d++) {
                const double want = o.x[d] * inverse * o.w[d];
                NEAR(y[yi + d], want, (k + 2.0) * U * fabs(want), "y", yi + d);
                /* r's error three times, the sum's, six products */
                const double before = heads ? 0.0 : (double)dx_before[xi + d];
                const double bound = U * ((3.0 * k + DEPTH(D) + 8.0) * o.size[d] + 2.0 * fabs(before));
                NEAR(dx[xi + d], before + o.dx[d], bound, "dx", xi + d);
                sum_dw[k_head * D + d] += o.dw[d];
                size_dw[k_head * D + d] += fabs(o.dw[d]);
            }
        }
        for (int64_t d = wide; d < x_row; d++)
            CHECK(dx[r * x_row + d] == dx_before[r * x_row + d], "%s: gap of dx, row %" PRId64, place, r);
        for (int64_t d = wide; d < y_row; d++)
            CHECK(y[r * y_row + d] == y_before[r * y_row + d], "%s: gap of y, row %" PRId64, place, r);
    }
    for (int64_t d = 0; d < 2 * D; d++) {
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

static void test_level(void)
{
    for (int threads = 1; threads <= 3; threads++) {
        for (int i = 0; i < COUNT(SIZES); i++) {
            test_norm(SIZES[i], 0, threads, 2.0f);
            test_norm(SIZES[i], 3, threads, 2.0f);
        }
        test_norm(64, 3, threads, 1e-4f);
        test_norm(127, 0, threads, 1e20f);
    }
    test_norm_nan();
    ops.rmsnorm_forward_bf16(NULL, NULL, NULL, NULL, 0, 8, 2);
    ops.residual_norm(NULL, true, NULL, NULL, NULL, NULL, NULL, 0, 8, 2);
    ops.qk_norm_forward(NULL, true, 8, &(sel_qkv_rows){ .heads = 1, .dh = 8 }, 2);
}

int main(void)
{
    test_norm_oracle();
    for (int level = 0; level <= (int)sel_cpu_detect(); level++) {
        sel_ops_init(&ops, (sel_cpu_level)level);
        test_level();
    }
    return check_verdict();
}
