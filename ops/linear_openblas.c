/* linear_openblas.c: linear layers by OpenBLAS's sgemm, which reads the weights in place. */
#include "ops/linear_library.h"

#include <cblas.h>
#include <limits.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static sel_status blas_open(sel_linear_engine *e)
{
    if (e->dtype != SEL_FLOAT32)
        return sel_fail(SEL_EUSER,
                        "OpenBLAS multiplies float32 only: compute.linear_backend: onednn, or train.precision: "
                        "float32");
    const char *config = openblas_get_config();   /* "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH ..." */
    const char *second = strchr(config, ' ');
    const size_t words = second ? (size_t)(second - config) + 1 + strcspn(second + 1, " ") : strlen(config);
    snprintf(e->version, sizeof e->version, "%.*s", (int)words, config);
    openblas_set_num_threads(e->threads);
    return SEL_OK;
}

static void blas_close(sel_linear_engine *e) { (void)e; }

static sel_status blas_make(sel_linear *l)
{
    if (l->out > INT_MAX || l->in > INT_MAX)
        return sel_fail(SEL_EUSER, "OpenBLAS: a matrix of %" PRId64 " x %" PRId64 " is past its 32-bit sizes", l->out,
                        l->in);
    return SEL_OK;
}

static void blas_drop(sel_linear *l) { (void)l; }

static sel_status blas_pack(sel_linear *l, const float *w)
{
    (void)l;
    (void)w;
    return SEL_OK;   /* linear.c keeps w */
}

static sel_status check_sizes(const sel_linear *l, int64_t rows, int64_t x_row, int64_t y_row)
{
    if (rows <= INT_MAX && x_row <= INT_MAX && y_row <= INT_MAX) return SEL_OK;
    return sel_fail(SEL_EUSER,
                    "OpenBLAS: %" PRId64 " rows (strides %" PRId64 ", %" PRId64 ") of a layer %" PRId64 " x %" PRId64
                    " are past its 32-bit sizes",
                    rows, x_row, y_row, l->out, l->in);
}

static sel_status blas_prepare(sel_linear *l, int64_t rows, int64_t x_row, int64_t y_row, sel_dtype dx)
{
    (void)dx;
    return check_sizes(l, rows, x_row, y_row);
}

/* c [m][n] = op(a) op(b) + beta c, row-major.  The number of threads is one setting for the whole process: it is
   set again where another engine has changed it. */
static void gemm(const sel_linear *l, CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int64_t m, int64_t n, int64_t k,
                 const float *a, int64_t lda, const float *b, int64_t ldb, float beta, float *c, int64_t ldc)
{
    if (openblas_get_num_threads() != l->engine->threads) openblas_set_num_threads(l->engine->threads);
    cblas_sgemm(CblasRowMajor, ta, tb, (blasint)m, (blasint)n, (blasint)k, 1.0f, a, (blasint)lda, b, (blasint)ldb,
                beta, c, (blasint)ldc);
}

static sel_status blas_forward(sel_linear *l, int64_t rows, const void *x, int64_t x_row, float *y, int64_t y_row)
{
    SEL_TRY(check_sizes(l, rows, x_row, y_row));
    gemm(l, CblasNoTrans, CblasTrans, rows, l->out, l->in, x, x_row, l->w, l->in, 0.0f, y, y_row);
    return SEL_OK;
}

static sel_status blas_backward_input(sel_linear *l, int64_t rows, const void *dy, int64_t dy_row, void *dx,
                                      sel_dtype type, int64_t dx_row)
{
    (void)type;
    SEL_TRY(check_sizes(l, rows, dx_row, dy_row));
    gemm(l, CblasNoTrans, CblasNoTrans, rows, l->in, l->out, dy, dy_row, l->w, l->in, 0.0f, dx, dx_row);
    return SEL_OK;
}

static sel_status blas_backward_weight(sel_linear *l, int64_t rows, const void *dy, int64_t dy_row, const void *x,
                                       int64_t x_row, float *dw, bool add)
{
    SEL_TRY(check_sizes(l, rows, x_row, dy_row));
    gemm(l, CblasTrans, CblasNoTrans, l->out, l->in, rows, dy, dy_row, x, x_row, add ? 1.0f : 0.0f, dw, l->in);
    return SEL_OK;
}

const sel_linear_library_calls sel_linear_openblas_calls = {
    .engine_bytes = sizeof(sel_linear_engine),
    .matrix_bytes = sizeof(sel_linear),
    .open = blas_open,
    .close = blas_close,
    .make = blas_make,
    .drop = blas_drop,
    .pack = blas_pack,
    .prepare = blas_prepare,
    .forward = blas_forward,
    .backward_input = blas_backward_input,
    .backward_weight = blas_backward_weight,
};
