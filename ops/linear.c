/* linear.c: the front of the linear layers: checks, the number of threads, the choice of library. */
#include "ops/linear_library.h"

#include <inttypes.h>
#include <math.h>
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
    free((*e)->choices);
    free(*e);
    *e = NULL;
}

/* The choice for a shape, or NULL. */
static sel_linear_choice *choice_find(const sel_linear_engine *e, int64_t out, int64_t in)
{
    for (int i = 0; i < e->n_choices; i++)
        if (e->choices[i].out == out && e->choices[i].in == in) return &e->choices[i];
    return NULL;
}

/* Without a choice.  oneDNN's matmul falls behind where the gradient has more columns than rows (down_proj), in
   bfloat16 where it has not many fewer (o_proj, qkv). */
static void usual_makers(char by[SEL_LINEAR_PASSES], sel_dtype dtype, int64_t out, int64_t in)
{
    memset(by, SEL_BY_MATMUL, SEL_LINEAR_PASSES);
    if (in > out || (dtype == SEL_BFLOAT16 && 4 * in >= out)) by[SEL_LINEAR_WEIGHT] = SEL_BY_INNER;
}

sel_status sel_linear_choose(sel_linear_engine *e, const sel_linear_choice *c)
{
    for (int p = 0; p < SEL_LINEAR_PASSES; p++) {
        const char by = c->by[p];
        const bool fits = e->calls == &sel_linear_onednn_calls &&
                          (by == SEL_BY_MATMUL || (by == SEL_BY_INNER && p == SEL_LINEAR_WEIGHT) ||
                           (by == SEL_BY_BLAS && e->dtype == SEL_FLOAT32));
        if (!fits)
            return sel_fail(
                SEL_EUSER,
                "linear layer %" PRId64 " x %" PRId64 ": \"%.3s\" names what cannot make its %s "
                "products: m (oneDNN's matmul), i (its inner product, the third letter only) or b (OpenBLAS, "
                "float32 only)",
                c->out, c->in, c->by, e->dtype == SEL_FLOAT32 ? "float32" : "bfloat16");
    }
    sel_linear_choice *place = choice_find(e, c->out, c->in);
    if (!place) {
        sel_linear_choice *const more = realloc(e->choices, (size_t)(e->n_choices + 1) * sizeof *more);
        if (!more) return sel_fail(SEL_ENOMEM, "linear layers: no memory for a choice");
        e->choices = more;
        place = &more[e->n_choices++];
    }
    *place = *c;
    return SEL_OK;
}

/* Who makes a product of the matrix.  OpenBLAS's calls need of a matrix no more than what all have. */
static const sel_linear_library_calls *calls_of(const sel_linear *l, int pass)
{
    return l->by[pass] == SEL_BY_BLAS ? &sel_linear_openblas_calls : l->engine->calls;
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
    const sel_linear_choice *const chosen = choice_find(e, out, in);
    if (chosen) memcpy(made->by, chosen->by, sizeof made->by);
    else usual_makers(made->by, e->dtype, out, in);
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

/* Only what multiplies bfloat16 rounds its result to it. */
static sel_status check_result(const sel_linear *l, sel_dtype dx)
{
    if (dx == SEL_FLOAT32 || l->engine->dtype == SEL_BFLOAT16) return SEL_OK;
    return sel_fail(SEL_EUSER, "linear layer %" PRId64 " x %" PRId64 ": its operands are float32, and so is the "
                    "gradient of its input", l->out, l->in);
}

sel_status sel_linear_prepare(sel_linear *l, int64_t rows, int64_t x_row, int64_t y_row, sel_dtype dx)
{
    SEL_ASSERT(rows >= 0 && x_row >= l->in && y_row >= l->out);
    SEL_TRY(check_result(l, dx));
    if (rows == 0) return SEL_OK;
    const int before = threads_set(l->engine->threads);
    const sel_status rc = l->engine->calls->prepare(l, rows, x_row, y_row, dx);
    threads_set(before);
    return rc;
}

sel_status sel_linear_forward(sel_linear *l, int64_t rows, const void *x, int64_t x_row, float *y, int64_t y_row)
{
    SEL_ASSERT(l->w && rows >= 0 && x_row >= l->in && y_row >= l->out);
    if (rows == 0) return SEL_OK;
    const int before = threads_set(l->engine->threads);
    const sel_status rc = calls_of(l, SEL_LINEAR_FORWARD)->forward(l, rows, x, x_row, y, y_row);
    threads_set(before);
    return rc;
}

sel_status sel_linear_backward_input(sel_linear *l, int64_t rows, const void *dy, int64_t dy_row, void *dx,
                                     sel_dtype type, int64_t dx_row)
{
    SEL_ASSERT(l->w && l->backward && rows >= 0 && dy_row >= l->out && dx_row >= l->in);
    SEL_TRY(check_result(l, type));
    if (rows == 0) return SEL_OK;
    const int before = threads_set(l->engine->threads);
    const sel_status rc = calls_of(l, SEL_LINEAR_INPUT)->backward_input(l, rows, dy, dy_row, dx, type, dx_row);
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
    const sel_status rc = calls_of(l, SEL_LINEAR_WEIGHT)->backward_weight(l, rows, dy, dy_row, x, x_row, dw, add);
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

/* Best seconds of a few runs of one product; gives up early on what is far slower than `limit`. */
static sel_status time_product(sel_linear *l, int pass, int64_t rows, const void *x, const void *dy, float *to,
                               double limit, double *best)
{
    enum { RUNS = 4 };
    *best = HUGE_VAL;
    for (int run = -1; run < RUNS && (run < 1 || *best < 1.3 * limit); run++) {   /* run -1 makes the primitive */
        const double begin = sel_now();
        if (pass == SEL_LINEAR_FORWARD) SEL_TRY(sel_linear_forward(l, rows, x, l->in, to, l->out));
        else if (pass == SEL_LINEAR_INPUT)
            SEL_TRY(sel_linear_backward_input(l, rows, dy, l->out, to, SEL_FLOAT32, l->in));
        else SEL_TRY(sel_linear_backward_weight(l, rows, dy, l->out, x, l->in, to, true));
        const double seconds = sel_now() - begin;
        if (run >= 0 && seconds < *best) *best = seconds;
    }
    return SEL_OK;
}

/* The fastest for each pass: a matrix is made with each letter in turn.  OpenBLAS is asked for float32 only. */
static sel_status probe_letters(sel_linear_engine *e, int64_t rows, sel_linear_choice *c, const float *w, const void *x,
                                const void *dy, float *to)
{
    static const char letters[] = { SEL_BY_MATMUL, SEL_BY_INNER, SEL_BY_BLAS };
    const double gain = 0.97;
    double best[SEL_LINEAR_PASSES] = { HUGE_VAL, HUGE_VAL, HUGE_VAL };

    memset(c->by, SEL_BY_MATMUL, sizeof c->by);
    for (size_t k = 0; k < sizeof letters && !(letters[k] == SEL_BY_BLAS && e->dtype != SEL_FLOAT32); k++) {
        sel_linear_choice tried = { .out = c->out, .in = c->in };
        sel_linear *l;
        memset(tried.by, letters[k] == SEL_BY_INNER ? SEL_BY_MATMUL : letters[k], sizeof tried.by);
        tried.by[SEL_LINEAR_WEIGHT] = letters[k];
        SEL_TRY(sel_linear_choose(e, &tried));
        SEL_TRY(sel_linear_new(&l, e, c->out, c->in, true));
        sel_status rc = sel_linear_pack(l, w);
        const int first = letters[k] == SEL_BY_INNER ? SEL_LINEAR_WEIGHT : SEL_LINEAR_FORWARD;
        for (int p = first; rc == SEL_OK && p < SEL_LINEAR_PASSES; p++) {
            double seconds;
            rc = time_product(l, p, rows, x, dy, to, best[p], &seconds);
            if (rc != SEL_OK || seconds >= gain * best[p]) continue;
            best[p] = seconds;
            c->by[p] = letters[k];
        }
        sel_linear_free(&l);
        SEL_TRY(rc);
    }
    return SEL_OK;
}

sel_status sel_linear_probe(sel_linear_engine *e, int64_t rows, sel_linear_choice *c)
{
    const size_t n_x = (size_t)(rows * c->in), n_y = (size_t)(rows * c->out), n_w = (size_t)(c->out * c->in);
    const size_t n_to = n_x > n_y ? n_x : n_y;
    float *const block = sel_alloc((n_x + n_y + n_w + (n_to > n_w ? n_to : n_w)) * sizeof(float),
                                   "the probe of a linear layer");
    if (!block) return SEL_ENOMEM;
    for (size_t i = 0; i < n_x + n_y + n_w; i++) block[i] = (float)(i % 17) - 8.0f;
    if (e->dtype == SEL_BFLOAT16) memset(block, 0x3f, (n_x + n_y) * sizeof(float));   /* 0x3f3f: 0.746 */

    const sel_linear_choice *const before = choice_find(e, c->out, c->in);
    sel_linear_choice restored = { .out = c->out, .in = c->in };
    if (before) restored = *before;
    else usual_makers(restored.by, e->dtype, c->out, c->in);
    const sel_status rc = probe_letters(e, rows, c, block + n_x + n_y, block, block + n_x, block + n_x + n_y + n_w);
    sel_free(block);
    SEL_TRY(rc);
    return sel_linear_choose(e, &restored);
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
