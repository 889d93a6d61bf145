/* linear.c: the front of the linear layers: checks, the number of threads, the choice of library. */
#include "ops/linear_library.h"

#include <inttypes.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include "core/base/clock.h"
#include "core/base/mem.h"

/* Both libraries start as many threads as OpenMP's setting says when they are called.  It is set for the call
   alone, so that nothing else of the process notices; returns the setting to put back. */
static int threads_set(int threads)
{
    const int before = omp_get_max_threads();
    if (before != threads) omp_set_num_threads(threads);
    return before;
}

sel_status sel_linear_open(sel_linear_engine **e, sel_linear_backend backend, sel_dtype dtype, int threads)
{
    const sel_linear_library_calls *calls =
        backend == SEL_LINEAR_ONEDNN ? &sel_linear_onednn_calls : &sel_linear_openblas_calls;
    SEL_ASSERT(threads > 0);
    *e = NULL;
    sel_linear_engine *made = calloc(1, calls->engine_bytes);
    if (!made) return sel_fail(SEL_ENOMEM, "linear layers: no memory for the library's state");
    made->calls = calls;
    made->dtype = dtype;
    made->threads = threads;
    const int before = threads_set(threads);
    const sel_status rc = calls->open(made);
    threads_set(before);
    if (rc != SEL_OK) sel_linear_close(&made);
    *e = made;
    return rc;
}

void sel_linear_close(sel_linear_engine **e)
{
    if (!*e) return;
    SEL_ASSERT((*e)->matrices == 0);
    (*e)->calls->close(*e);
    free(*e);
    *e = NULL;
}

sel_status sel_linear_new(sel_linear **l, sel_linear_engine *e, int64_t out, int64_t in, bool backward)
{
    SEL_ASSERT(out > 0 && in > 0);
    *l = NULL;
    sel_linear *made = calloc(1, e->calls->matrix_bytes);
    if (!made) return sel_fail(SEL_ENOMEM, "linear layer %" PRId64 " x %" PRId64 ": no memory", out, in);
    made->engine = e;
    made->out = out;
    made->in = in;
    made->backward = backward;
    e->matrices++;
    const int before = threads_set(e->threads);
    const sel_status rc = e->calls->make(made);
    threads_set(before);
    if (rc != SEL_OK) sel_linear_free(&made);
    *l = made;
    return rc;
}

void sel_linear_free(sel_linear **l)
{
    if (!*l) return;
    (*l)->engine->matrices--;
    (*l)->engine->calls->drop(*l);
    free(*l);
    *l = NULL;
}

sel_status sel_linear_pack(sel_linear *l, const float *w)
{
    const int before = threads_set(l->engine->threads);
    const sel_status rc = l->engine->calls->pack(l, w);
    threads_set(before);
    l->w = rc == SEL_OK ? w : NULL;
    return rc;
}

sel_status sel_linear_prepare(sel_linear *l, int64_t rows, int64_t x_row, int64_t y_row)
{
    SEL_ASSERT(rows >= 0 && x_row >= l->in && y_row >= l->out);
    if (rows == 0) return SEL_OK;
    const int before = threads_set(l->engine->threads);
    const sel_status rc = l->engine->calls->prepare(l, rows, x_row, y_row);
    threads_set(before);
    return rc;
}

sel_status sel_linear_forward(sel_linear *l, int64_t rows, const void *x, int64_t x_row, float *y, int64_t y_row)
{
    SEL_ASSERT(l->w && rows >= 0 && x_row >= l->in && y_row >= l->out);
    if (rows == 0) return SEL_OK;
    const int before = threads_set(l->engine->threads);
    const sel_status rc = l->engine->calls->forward(l, rows, x, x_row, y, y_row);
    threads_set(before);
    return rc;
}

sel_status sel_linear_backward_input(sel_linear *l, int64_t rows, const void *dy, int64_t dy_row, float *dx,
                                     int64_t dx_row)
{
    SEL_ASSERT(l->w && l->backward && rows >= 0 && dy_row >= l->out && dx_row >= l->in);
    if (rows == 0) return SEL_OK;
    const int before = threads_set(l->engine->threads);
    const sel_status rc = l->engine->calls->backward_input(l, rows, dy, dy_row, dx, dx_row);
    threads_set(before);
    return rc;
}

sel_status sel_linear_backward_weight(sel_linear *l, int64_t rows, const void *dy, int64_t dy_row, const void *x,
                                      int64_t x_row, float *dw, bool add)
{
    SEL_ASSERT(l->backward && rows >= 0 && dy_row >= l->out && x_row >= l->in);
    if (rows == 0) {
        if (!add) memset(dw, 0, (size_t)(l->out * l->in) * sizeof *dw);
        return SEL_OK;
    }
    const int before = threads_set(l->engine->threads);
    const sel_status rc = l->engine->calls->backward_weight(l, rows, dy, dy_row, x, x_row, dw, add);
    threads_set(before);
    return rc;
}

size_t sel_linear_bytes(const sel_linear *l) { return l->bytes; }

int64_t sel_linear_out(const sel_linear *l) { return l->out; }

int64_t sel_linear_in(const sel_linear *l) { return l->in; }

const char *sel_linear_library(const sel_linear_engine *e)
{
    return e->version;
}

sel_status sel_linear_measure_peak(sel_linear_engine *e, double *gflops)
{
    enum { ROWS = 4096, WIDTH = 768, FEWEST = 3 };
    const double seconds = 0.2, work = 2.0 * ROWS * WIDTH * WIDTH;
    const size_t n_x = (size_t)ROWS * WIDTH, n_w = (size_t)WIDTH * WIDTH;
    sel_linear *l = NULL;
    sel_status rc = SEL_ENOMEM;
    float *block = sel_alloc((2 * n_x + n_w) * sizeof(float), "the measurement of the matrix-product peak");
    if (!block) goto out;
    float *x = block, *w = x + n_x, *y = w + n_w;
    for (size_t i = 0; i < n_x + n_w; i++) block[i] = (float)(i % 17) - 8.0f;   /* x, then w */
    if (e->dtype == SEL_BFLOAT16) memset(x, 0x3f, n_x * sizeof(uint16_t));      /* 0x3f3f: 0.746 */

    if ((rc = sel_linear_new(&l, e, WIDTH, WIDTH, false)) != SEL_OK) goto out;
    if ((rc = sel_linear_pack(l, w)) != SEL_OK) goto out;
    if ((rc = sel_linear_forward(l, ROWS, x, WIDTH, y, WIDTH)) != SEL_OK) goto out;   /* makes the primitive */
    double best = 0.0;
    const double start = sel_now();
    for (int run = 0; run < FEWEST || sel_now() - start < seconds; run++) {
        const double begin = sel_now();
        if ((rc = sel_linear_forward(l, ROWS, x, WIDTH, y, WIDTH)) != SEL_OK) goto out;
        const double rate = work / (sel_now() - begin) * 1e-9;
        if (rate > best) best = rate;
    }
    *gflops = best;
out:
    sel_linear_free(&l);
    sel_free(block);
    return rc;
}
