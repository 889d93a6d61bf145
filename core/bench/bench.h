/* bench.h: how fast the kernels are, beside what the machine can do in the same minute.
 *
 * The machine may be shared and its speed may drift, so a figure alone says little: every
 * round runs the matrix product that stands for the peak and then each case once, and the
 * medians over the rounds are compared.
 */
#ifndef SEL_CORE_BENCH_BENCH_H
#define SEL_CORE_BENCH_BENCH_H

#include <stdbool.h>
#include <stdint.h>
#include "core/base/error.h"
#include "core/config/config.h"
#include "dist/comm.h"
#include "core/model/choice.h"
#include "ops/linear.h"
#include "ops/ops.h"

/* One figure (spec, section 16).  Fields that do not apply are 0 or NULL. */
typedef struct {
    const char *name, *kind, *dtype, *pass;
    int64_t B, H, N, dh;
    int threads, runs;
    double seconds_median;
    double gflops, share_of_peak;               /* products: of the peak in the same rounds */
    double gbytes_per_second, share_of_copy;    /* memory-bound parts: of the copy bandwidth in the same rounds */
    double tokens_per_second;                   /* steps */
    double seconds_share;                       /* parts of a step: of the step's seconds; dead keys: of all keys' */
    double live_share;                          /* dead keys: pairs computed, of all */
    int64_t bytes;                              /* between ranks: of the array that they sum or copy */
} sel_bench_result;

typedef struct {
    sel_bench_result *rows;   /* [n], owned */
    int n, capacity;
} sel_bench_rows;

/* Bytes that a training step should need, by their use. */
typedef struct {
    const char *dtype;
    int64_t B, N;
    size_t program;           /* resident before the first array */
    size_t parameters, gradients, moments, packed, kept, scratch, yardsticks;
    size_t resident;          /* measured: the process's peak when the step had run */
} sel_bench_memory;

static inline size_t sel_bench_budget(const sel_bench_memory *m)
{
    return m->program + m->parameters + m->gradients + m->moments + m->packed + m->kept + m->scratch + m->yardsticks;
}

enum { SEL_BENCH_BUDGETS = 64 };

typedef struct {
    sel_bench_rows results;
    sel_bench_rows parts;     /* of the steps among the results, in their order */
    sel_bench_memory memory[SEL_BENCH_BUDGETS];   /* of the first steps; a later one's peak hides under an earlier's */
    int n_memory;
    char choice[SEL_CHOICE_MAX];   /* what the latest probe found; "": none */
    double peak_gflops[2];    /* medians by sel_dtype, on the latest call's threads */
    double copy_gbytes;       /* GB/s of a copy of memory, the same; 0: not measured */
} sel_bench_results;

typedef struct {
    const sel_ops *ops;
    sel_linear_engine *engine;   /* on `threads` threads, of type `dtype`: the peak is of it too */
    sel_dtype dtype;
    int threads, runs;           /* rounds */
    bool probe;                  /* gemm, step: first find the fastest maker of each product */
} sel_bench;

void sel_bench_free(sel_bench_results *r);

/* Appends a row.  Median of n numbers, which it sorts. */
sel_status sel_bench_append(sel_bench_rows *out, const sel_bench_result *row);
double     sel_bench_median(double *x, int n);

/* The shapes of the linear layers of a model and the peak's own: 4096 x 768 x 768. */
sel_status sel_bench_gemm(const sel_bench *b, sel_bench_results *out);

/* Attention, selective and standard, forward and backward, at context N: `batch` sequences.  FLOPs: forward
   4 dh N (N + 1) / 2 a head, backward 2.5 times that; "carry", what shards add to both: dh N (N + 1), 3 times that. */
sel_status sel_bench_attention(const sel_bench *b, int64_t heads, int64_t dh, int64_t N, int64_t batch,
                               sel_bench_results *out);

/* Selective attention where 1/2, 1/4, 1/8, 1/16 of the pairs of a row and a key are alive, beside all keys; FLOPs as if
   all were. */
sel_status sel_bench_dead_keys(const sel_bench *b, int64_t heads, int64_t dh, int64_t N, int64_t batch,
                               sel_bench_results *out);

/* The memory-bound operations on `rows` rows of width D, beside a copy of memory. */
sel_status sel_bench_ops(const sel_bench *b, int64_t rows, int64_t D, sel_bench_results *out);

/* Whole training steps of a configuration's model (random tokens, one micro-batch, one rank), selective and standard in
   turn: gradient, norm, AdamW, packing.  FLOPs: model FLOPs. */
sel_status sel_bench_step(const sel_bench *b, const sel_config *c, int64_t vocab, sel_bench_results *out);

/* What the ranks can move, on an array of `bytes` bytes each: copies by all of them at once, all-reduce in the host,
   between hosts and over both, reduce-scatter and all-gather (as dist.zero does), and MPI's own; the smallest
   all-reduce of each ("latency"), 4 bytes.  Seconds: of the slowest rank, median of the rounds.  [collective] */
sel_status sel_bench_mesh(sel_comm *c, int64_t bytes, int runs, int threads, sel_bench_results *out);

#endif
