/* norm_c.c: RMSNorm of whole rows, alone or with the residual sum before it, and of each head's q and k.
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

/* y = x r w of one row, float32 or bfloat16. */
static inline void scale_one(bool bfloat16, void *y, const float *x, const float *w, float r, int64_t D)
{
    int64_t d = 0;
    for (; d + VL <= D; d += VL) vstore_as(bfloat16, y, d, vload(x + d) * r * vload(w + d), VL);
    if (d < D) vstore_as(bfloat16, y, d, vload_n(x + d, D - d) * r * vload_n(w + d, D - d), D - d);
}

/* One row to y, float32 or bfloat16; returns 1 / rms. */
static inline float forward_one(bool bfloat16, void *y, const float *x, const float *w, int64_t D)
{
    const float r = inverse_rms(x, D);
    scale_one(bfloat16, y, x, w, r, D);
    return r;
}

/* Element `at` of an array that is bfloat16 or float32. */
static inline void *element(bool bfloat16, void *y, int64_t at)
{
    return bfloat16 ? (void *)((uint16_t *)y + at) : (void *)((float *)y + at);
}

/* One vector, or its first n lanes, at d of a row: dx = gradient (+ residual); dw += its part.  dx may be dy or the
   residual. */
static inline void backward_vector(bool bfloat16, void *dx, const float *residual, float *dw, const float *dy,
                                   const float *x, const float *w, float r, float mean, int64_t d, int64_t n)
{
    const vf g = vload_n(dy + d, n), y = vload_n(x + d, n) * r;
    vf gradient = r * (g * vload_n(w + d, n) - y * mean);
    if (residual) gradient += vload_n(residual + d, n);
    vstore_n(dw + d, vload_n(dw + d, n) + g * y, n);
    vstore_as(bfloat16, dx, d, gradient, n);
}

static inline void backward_one(bool bfloat16, void *dx, const float *residual, float *dw, const float *dy,
                                const float *x, const float *w, float r, int64_t D)
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

    for (d = 0; d + VL <= D; d += VL) backward_vector(bfloat16, dx, residual, dw, dy, x, w, r, mean, d, VL);
    if (d < D) backward_vector(bfloat16, dx, residual, dw, dy, x, w, r, mean, d, D - d);
}

static inline void round_one(uint16_t *restrict y, const float *restrict x, int64_t n)
{
    int64_t i = 0;
    for (; i + VL <= n; i += VL) vstore_bf16(y + i, vload(x + i), VL);
    if (i < n) vstore_bf16(y + i, vload_n(x + i, n - i), n - i);
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

/* The sum is made in one trip of its own: the row, and the norm's two, stay in the first cache. */
static inline void residual_norm_rows(bool bfloat16, void *y, float *rstd, float *sum, const float *x,
                                      const float *branch, const float *w, int64_t rows, int64_t D, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float *to = sum + row * D;
        const float *a = x + row * D, *b = branch + row * D;
        int64_t d = 0;
        for (; d + VL <= D; d += VL) vstore(to + d, vload(a + d) + vload(b + d));
        for (; d < D; d++) to[d] = a[d] + b[d];
        const float r = forward_one(bfloat16, element(bfloat16, y, row * D), to, w, D);
        if (rstd) rstd[row] = r;
    }
}

static void residual_norm(void *y, bool bfloat16, float *rstd, float *sum, const float *x, const float *branch,
                          const float *w, int64_t rows, int64_t D, int threads)
{
    if (bfloat16) residual_norm_rows(true, y, rstd, sum, x, branch, w, rows, D, threads);
    else residual_norm_rows(false, y, rstd, sum, x, branch, w, rows, D, threads);
}

/* Asks for n floats of the next row: the processor does not look so far ahead by itself. */
static inline void ask_for(const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(x + i);
}

/* Heads of a row to y from rstd, which forward makes of all of them first: many roots and quotients are under way at
   once. */
static inline void norm_heads(bool bfloat16, bool again, void *y, float *rstd, const float *x, const float *w,
                              int64_t heads, int64_t dh)
{
    for (int64_t h = 0; !again && h < heads; h++) rstd[h] = inverse_rms(x + h * dh, dh);
    for (int64_t h = 0; h < heads; h++) scale_one(bfloat16, element(bfloat16, y, h * dh), x + h * dh, w, rstd[h], dh);
}

static inline void qk_norm_row(bool bfloat16, bool again, void *y, const sel_qkv_rows *r, int64_t row)
{
    const int64_t k = r->heads * r->dh, rest = k + r->kv_heads * r->dh;
    const float *const x = r->x + row * r->x_row;
    if (row + 1 < r->rows) ask_for(x + r->x_row, bfloat16 ? rest + r->rest : rest);
    norm_heads(bfloat16, again, y, r->rstd_q + row * r->heads, x, r->w_q, r->heads, r->dh);
    norm_heads(bfloat16, again, element(bfloat16, y, k), r->rstd_k + row * r->kv_heads, x + k, r->w_k, r->kv_heads,
               r->dh);
    if (bfloat16) round_one((uint16_t *)y + rest, x + rest, r->rest);
}

static void qk_norm_forward(void *y, bool bfloat16, int64_t y_row, const sel_qkv_rows *r, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < r->rows; row++)
        if (bfloat16) qk_norm_row(true, false, (uint16_t *)y + row * y_row, r, row);
        else qk_norm_row(false, false, (float *)y + row * y_row, r, row);
}

static void qk_norm_again(void *y, bool bfloat16, int64_t y_row, const sel_qkv_rows *r, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < r->rows; row++)
        if (bfloat16) qk_norm_row(true, true, (uint16_t *)y + row * y_row, r, row);
        else qk_norm_row(false, true, (float *)y + row * y_row, r, row);
}

/* dw += the threads' partial sums, `apart` floats apart, in order: the same bits for equal threads. */
static void add_partials(float *restrict dw, const float *restrict scratch, int64_t D, int64_t apart, int threads)
{
    for (int t = 0; t < threads; t++)
        for (int64_t d = 0; d < D; d++) dw[d] += scratch[t * apart + d];
}

static void rmsnorm_backward(float *dx, const float *residual, uint16_t *restrict dx16, void *restrict y,
                             float *restrict dw, const float *restrict dy, const float *restrict x,
                             const float *restrict rstd, const float *restrict w, float *restrict scratch,
                             int64_t rows, int64_t D, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        float *part = scratch + t * D;
        memset(part, 0, (size_t)D * sizeof *part);
        for (int64_t row = rows * t / threads; row < rows * (t + 1) / threads; row++) {
            const float *at = x + row * D;
            backward_one(false, dx + row * D, residual ? residual + row * D : NULL, part, dy + row * D, at, w,
                         rstd[row], D);
            if (dx16) round_one(dx16 + row * D, dx + row * D, D);
            if (y && dx16) scale_one(true, (uint16_t *)y + row * D, at, w, rstd[row], D);
            else if (y) scale_one(false, (float *)y + row * D, at, w, rstd[row], D);
        }
    }
    add_partials(dw, scratch, D, D, threads);
}

/* Row `row` to dx from dy; dw_q, dw_k [dh] += . */
static inline void qk_norm_backward_row(bool bfloat16, void *dx, const float *dy, int64_t dy_row, float *dw_q,
                                        float *dw_k, const sel_qkv_rows *r, int64_t row)
{
    const int64_t dh = r->dh, k = r->heads * dh, rest = k + r->kv_heads * dh;
    const float *const x = r->x + row * r->x_row, *const rstd_q = r->rstd_q + row * r->heads,
                *const rstd_k = r->rstd_k + row * r->kv_heads;
    if (row + 1 < r->rows) {
        ask_for(dy + dy_row, bfloat16 ? rest + r->rest : rest);
        ask_for(x + r->x_row, rest);
    }
    for (int64_t h = 0; h < r->heads; h++)
        backward_one(bfloat16, element(bfloat16, dx, h * dh), NULL, dw_q, dy + h * dh, x + h * dh, r->w_q, rstd_q[h],
                     dh);
    for (int64_t h = 0; h < r->kv_heads; h++)
        backward_one(bfloat16, element(bfloat16, dx, k + h * dh), NULL, dw_k, dy + k + h * dh, x + k + h * dh, r->w_k,
                     rstd_k[h], dh);
    if (bfloat16) round_one((uint16_t *)dx + rest, dy + rest, r->rest);
}

static void qk_norm_backward(void *dx, bool bfloat16, int64_t dx_row, float *dw_q, float *dw_k, const float *dy,
                             int64_t dy_row, const sel_qkv_rows *r, float *scratch, int threads)
{
    const int64_t rows = r->rows, dh = r->dh;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        float *const part_q = scratch + 2 * t * dh, *const part_k = part_q + dh;
        memset(part_q, 0, (size_t)(2 * dh) * sizeof *part_q);
        for (int64_t row = rows * t / threads; row < rows * (t + 1) / threads; row++) {
            const float *const from = dy + row * dy_row;
            if (bfloat16)
                qk_norm_backward_row(true, (uint16_t *)dx + row * dx_row, from, dy_row, part_q, part_k, r, row);
            else qk_norm_backward_row(false, (float *)dx + row * dx_row, from, dy_row, part_q, part_k, r, row);
        }
    }
    add_partials(dw_q, scratch, dh, 2 * dh, threads);
    add_partials(dw_k, scratch + dh, dh, 2 * dh, threads);
}

void SEL_FN(sel_ops_norm_init)(sel_ops *ops)
{
    ops->rmsnorm_forward = rmsnorm_forward;
    ops->rmsnorm_forward_bf16 = rmsnorm_forward_bf16;
    ops->residual_norm = residual_norm;
    ops->rmsnorm_backward = rmsnorm_backward;
    ops->qk_norm_forward = qk_norm_forward;
    ops->qk_norm_again = qk_norm_again;
    ops->qk_norm_backward = qk_norm_backward;
}
