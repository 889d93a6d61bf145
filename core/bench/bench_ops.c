/* bench_ops.c: the memory-bound operations of a step, in bytes that they must move. */
#include <string.h>
#include "core/base/mem.h"
#include "core/bench/rounds.h"

enum { VOCAB = 8192, HEAD = 64, SLICE = 512 };

typedef struct {
    const sel_ops *ops;
    int threads;
    int64_t rows, D, F;
    float *x, *y, *w, *rstd, *gu, *scratch, *logits;   /* x, y [rows][D]; gu [rows][2 F] */
    float *p, *m, *v, *g;                              /* AdamW's, [rows D] each */
    double *logp;
    uint8_t *best;
    int32_t *target;
} data;

static sel_status rmsnorm_forward(void *ctx)
{
    data *d = ctx;
    d->ops->rmsnorm_forward(d->y, d->rstd, d->x, d->w, d->rows, d->D, d->threads);
    return SEL_OK;
}
static sel_status rmsnorm_backward(void *ctx)
{
    data *d = ctx;
    d->ops->rmsnorm_backward(d->y, d->y, NULL, NULL, d->w + d->D, d->x, d->p, d->rstd, d->w, d->scratch, d->rows, d->D,
                             d->threads);
    return SEL_OK;
}
static sel_status qk_norm_forward(void *ctx)
{
    data *d = ctx;
    const sel_qkv_rows r = { .rows = d->rows, .heads = d->D / HEAD, .dh = HEAD, .x = d->x, .x_row = d->D, .w_q = d->w,
                             .rstd_q = d->rstd };
    d->ops->qk_norm_forward(d->y, false, d->D, &r, d->threads);
    return SEL_OK;
}
static sel_status swiglu_forward(void *ctx)
{
    data *d = ctx;
    d->ops->swiglu_forward(d->y, d->gu, d->rows, d->F, d->threads);
    return SEL_OK;
}
static sel_status residual_norm(void *ctx)
{
    data *d = ctx;
    d->ops->residual_norm(d->p, false, d->rstd, d->y, d->y, d->x, d->w, d->rows, d->D, d->threads);
    return SEL_OK;
}
static sel_status cross_entropy(void *ctx)
{
    data *d = ctx;
    d->ops->cross_entropy(d->logits, NULL, d->logp, d->best, d->target, 1e-9f, SLICE, VOCAB, d->threads);
    return SEL_OK;
}
static sel_status adamw(void *ctx)
{
    data *d = ctx;
    d->ops->adamw(d->p, d->m, d->v, d->g, d->rows * d->D, 1.0, 1e-6, 0.9, 0.999, 1e-8, 1e-4, 0.1, 0.001, d->threads);
    return SEL_OK;
}
static sel_status sum_squares(void *ctx)
{
    data *d = ctx;
    return d->ops->sum_squares(d->x, d->rows * d->D, d->threads) >= 0.0 ? SEL_OK
                                                                        : sel_fail(SEL_ENUM, "a sum of squares");
}

sel_status sel_bench_ops(const sel_bench *b, int64_t rows, int64_t D, sel_bench_results *out)
{
    const int64_t n = rows * D, F = D;
    data d = { .ops = b->ops, .threads = b->threads, .rows = rows, .D = D, .F = F };
    float **const arrays[] = { &d.x, &d.y, &d.w, &d.rstd, &d.gu, &d.scratch, &d.logits, &d.p, &d.m, &d.v, &d.g };
    const int64_t sizes[] = { n, n, 2 * D, n, 2 * rows * F, b->threads * D, SLICE * VOCAB, n, n, n, n };
    enum { ARRAYS = sizeof sizes / sizeof sizes[0] };
    sel_status rc = SEL_OK;

    for (int i = 0; i < ARRAYS; i++)
        if (!(*arrays[i] = sel_bench_array(sizes[i], (uint64_t)i))) rc = SEL_ENOMEM;
    d.logp = sel_alloc(SLICE * sizeof *d.logp, "a benchmark's array");
    d.best = sel_alloc(SLICE, "a benchmark's array");
    d.target = sel_alloc(SLICE * sizeof *d.target, "a benchmark's array");
    if (!d.logp || !d.best || !d.target) rc = SEL_ENOMEM;
    for (int64_t i = 0; rc == SEL_OK && i < n; i++) d.v[i] *= d.v[i];   /* second moments */

    /* Bytes: every array read or written once. */
    const double row = 4.0 * (double)D * (double)rows;
    const struct { const char *name, *pass; sel_status (*run)(void *); double bytes;
    } list[] = {
        {"rmsnorm", "forward", rmsnorm_forward, 2.0 * row},
        {"rmsnorm", "backward", rmsnorm_backward, 4.0 * row},
        {"qk_norm", "forward", qk_norm_forward, 2.0 * row},
        {"swiglu", "forward", swiglu_forward, 3.0 * row},
        {"residual_norm", "forward", residual_norm, 4.0 * row},
        {"sum_squares", "step", sum_squares, row},
        {"cross_entropy", "step", cross_entropy, 8.0 * SLICE * VOCAB},
        {"adamw", "step", adamw, 7.0 * row},
    };
    enum { CASES = sizeof list / sizeof list[0] };
    sel_bench_case cases[CASES];
    for (int i = 0; i < CASES; i++)
        cases[i] = (sel_bench_case){ .run = list[i].run, .ctx = &d, .bytes = list[i].bytes,
                                     .row = { .name = list[i].name, .pass = list[i].pass, .N = rows } };
    if (rc == SEL_OK) rc = sel_bench_rounds(b, cases, CASES, SEL_YARD_COPY, out);
    for (int i = 0; i < ARRAYS; i++) sel_free(*arrays[i]);
    sel_free(d.logp);
    sel_free(d.best);
    sel_free(d.target);
    return rc;
}
