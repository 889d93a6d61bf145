/* norm_c.c: RMSNorm of whole rows and of each head's q and k.
 *
 *     y = x / rms * w,    rms = sqrt(mean of x^2 + 1e-6)
 *
 * With r = 1 / rms and g = dy * w:
 *
 *     dx = r g - x r^3 / D * sum of g x,    dw = sum over rows of dy * x r
 */
#include <math.h>
#include "ops/levels.h"
#include "ops/vec.h"

static const double EPSILON = 1e-6;

/* 1 / rms of one row.  The sum is float32 in lanes; past its range (|x| > 1e18) it is made again in double. */
static inline float inverse_rms(const float *x, int64_t D)
{
    vf a = vset1(0.0f), b = a;
    int64_t d = 0;
    for (; d + 2 * VL <= D; d += 2 * VL) {
        const vf p = vload(x + d), q = vload(x + d + VL);
        a += p * p;
        b += q * q;
    }
    double sum = (double)vsum(a + b);
    for (; d < D; d++) sum += (double)x[d] * (double)x[d];
    if (isinf(sum)) {
        sum = 0.0;
        for (d = 0; d < D; d++) sum += (double)x[d] * (double)x[d];
    }
    return (float)(1.0 / sqrt(sum / (double)D + EPSILON));
}

/* One row to y, float32 or bfloat16; returns 1 / rms. */
static inline float forward_one(bool bfloat16, void *y, const float *x, const float *w, int64_t D)
{
    const float r = inverse_rms(x, D);
    int64_t d = 0;
    for (; d + VL <= D; d += VL) vstore_as(bfloat16, y, d, vload(x + d) * r * vload(w + d), VL);
    if (d < D) vstore_as(bfloat16, y, d, vload_n(x + d, D - d) * r * vload_n(w + d, D - d), D - d);
    return r;
}

/* One vector, or its first n lanes: dx = gradient, or dx += gradient where add; dw += its part.  dx may be dy. */
static inline void backward_vector(float *dx, float *dw, const float *dy, const float *x, const float *w, float r,
                                   float mean, int64_t n, bool add)
{
    const vf g = vload_n(dy, n), y = vload_n(x, n) * r;
    vf gradient = r * (g * vload_n(w, n) - y * mean);
    if (add) gradient += vload_n(dx, n);
    vstore_n(dw, vload_n(dw, n) + g * y, n);
    vstore_n(dx, gradient, n);
}

static inline void backward_one(float *dx, float *dw, const float *dy, const float *x, const float *w, float r,
                                int64_t D, bool add)
{
    vf a = vset1(0.0f), b = a;
    int64_t d = 0;
    for (; d + 2 * VL <= D; d += 2 * VL) {
        a += vload(dy + d) * vload(w + d) * (vload(x + d) * r);
        b += vload(dy + d + VL) * vload(w + d + VL) * (vload(x + d + VL) * r);
    }
    float sum = vsum(a + b);                               /* of g x r */
    for (; d < D; d++) sum += dy[d] * w[d] * (x[d] * r);
    const float mean = sum / (float)D;

    for (d = 0; d + VL <= D; d += VL) backward_vector(dx + d, dw + d, dy + d, x + d, w + d, r, mean, VL, add);
    if (d < D) backward_vector(dx + d, dw + d, dy + d, x + d, w + d, r, mean, D - d, add);
}

static void rmsnorm_forward(float *restrict y, float *restrict rstd, const float *restrict x,
                            const float *restrict w, int64_t rows, int64_t D, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float r = forward_one(false, y + row * D, x + row * D, w, D);
        if (rstd) rstd[row] = r;
    }
}

static void rmsnorm_forward_bf16(uint16_t *restrict y, float *restrict rstd, const float *restrict x,
                                 const float *restrict w, int64_t rows, int64_t D, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float r = forward_one(true, y + row * D, x + row * D, w, D);
        if (rstd) rstd[row] = r;
    }
}

static void headnorm_forward(float *restrict y, int64_t y_row, float *restrict rstd, const float *restrict x,
                             int64_t x_row, const float *restrict w, int64_t rows, int64_t heads, int64_t dh,
                             int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t h = 0; h < heads; h++) {
            const float r = forward_one(false, y + row * y_row + h * dh, x + row * x_row + h * dh, w, dh);
            if (rstd) rstd[row * heads + h] = r;
        }
}

/* dw += the threads' partial sums, in order: the same bits for equal threads. */
static void add_partials(float *restrict dw, const float *restrict scratch, int64_t D, int threads)
{
    for (int t = 0; t < threads; t++)
        for (int64_t d = 0; d < D; d++) dw[d] += scratch[t * D + d];
}

static void rmsnorm_backward(float *restrict dx, float *restrict dw, const float *restrict dy,
                             const float *restrict x, const float *restrict rstd, const float *restrict w,
                             float *restrict scratch, int64_t rows, int64_t D, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        float *part = scratch + t * D;
        memset(part, 0, (size_t)D * sizeof *part);
        for (int64_t row = rows * t / threads; row < rows * (t + 1) / threads; row++)
            backward_one(dx + row * D, part, dy + row * D, x + row * D, w, rstd[row], D, true);
    }
    add_partials(dw, scratch, D, threads);
}

static void headnorm_backward(float *dx, int64_t dx_row, float *restrict dw, const float *dy, int64_t dy_row,
                              const float *restrict x, int64_t x_row, const float *restrict rstd,
                              const float *restrict w, float *restrict scratch, int64_t rows, int64_t heads,
                              int64_t dh, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        float *part = scratch + t * dh;
        memset(part, 0, (size_t)dh * sizeof *part);
        for (int64_t row = rows * t / threads; row < rows * (t + 1) / threads; row++)
            for (int64_t h = 0; h < heads; h++)
                backward_one(dx + row * dx_row + h * dh, part, dy + row * dy_row + h * dh, x + row * x_row + h * dh,
                             w, rstd[row * heads + h], dh, false);
    }
    add_partials(dw, scratch, dh, threads);
}

void SEL_FN(sel_ops_norm_init)(sel_ops *ops)
{
    ops->rmsnorm_forward = rmsnorm_forward;
    ops->rmsnorm_forward_bf16 = rmsnorm_forward_bf16;
    ops->rmsnorm_backward = rmsnorm_backward;
    ops->headnorm_forward = headnorm_forward;
    ops->headnorm_backward = headnorm_backward;
}
