/* rounds.h: cases that are measured in turn, round by round.  Only core/bench includes it. */
#ifndef SEL_CORE_BENCH_ROUNDS_H
#define SEL_CORE_BENCH_ROUNDS_H

#include "core/base/profile.h"
#include "core/bench/bench.h"

typedef struct {
    sel_status (*run)(void *ctx);
    void *ctx;
    double flops, bytes, tokens;   /* of one run; 0: no such figure */
    sel_profile *profile;          /* the run's laps go here; NULL: it has no parts */
    sel_bench_result row;          /* its names and sizes */
} sel_bench_case;

/* What a round measures first: the peak's matrix product, a copy of memory. */
enum { SEL_YARD_PEAK = 1, SEL_YARD_COPY = 2 };

/* Bytes that the yardsticks hold. */
size_t sel_bench_yard_bytes(const sel_bench *b, int yards);

/* Runs every case once a round beside the yardsticks and appends a row of medians for each, and for each of its parts.
 */
sel_status sel_bench_rounds(const sel_bench *b, const sel_bench_case *cases, int n, int yards, sel_bench_results *out);

/* n numbers, roughly unit normal; NULL when there is no memory. */
float *sel_bench_array(int64_t n, uint64_t stream);

/* The same as an operand of the engine's type; x [n], which it takes over, as such an operand (x NULL: NULL). */
void *sel_bench_operand(const sel_bench *b, int64_t n, uint64_t stream);
void *sel_bench_as_operand(const sel_bench *b, float *x, int64_t n);

#endif
