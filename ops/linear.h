/* linear.h: the linear layers' matrix products, y = x W^T, through a library.
 *
 * A sel_linear is one weight matrix [out][in] made ready for the library: packed once
 * after each optimizer step, used by every micro-batch.  Products of one shape
 * share their primitives.  All arrays row-major; rows of x and y may be
 * further apart than their width (strides in elements).
 */
#ifndef SEL_OPS_LINEAR_H
#define SEL_OPS_LINEAR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "core/base/error.h"

typedef struct sel_linear_engine sel_linear_engine;   /* the library and its primitives */
typedef struct sel_linear sel_linear;                 /* one matrix */

typedef enum { SEL_LINEAR_ONEDNN, SEL_LINEAR_OPENBLAS } sel_linear_backend;

/* The type of the products' operands: x and dy below are arrays of it, W is packed to it.  Sums are float32 always, and
   so are results, but where dx is asked for as the next product's operand. */
typedef enum { SEL_FLOAT32, SEL_BFLOAT16 } sel_dtype;

/* Opens the library with that many threads; closed after all its matrices are freed.  SEL_EUSER for a type that the
   library (OpenBLAS: bfloat16) or the processor cannot multiply. */
sel_status sel_linear_open(sel_linear_engine **e, sel_linear_backend backend, sel_dtype dtype, int threads);
void       sel_linear_close(sel_linear_engine **e);

/* Who makes a product of a matrix, a letter for each of its passes. */
enum { SEL_LINEAR_FORWARD, SEL_LINEAR_INPUT, SEL_LINEAR_WEIGHT, SEL_LINEAR_PASSES };
enum {
    SEL_BY_MATMUL = 'm',   /* oneDNN's matrix product */
    SEL_BY_INNER = 'i',    /* oneDNN's inner product; weight gradients only */
    SEL_BY_BLAS = 'b'      /* OpenBLAS's; float32 only */
};

typedef struct {
    int64_t out, in;
    char by[SEL_LINEAR_PASSES];
} sel_linear_choice;

/* For a oneDNN engine, before any matrix of that shape is made: who makes its products from now on.  Where nothing
   was chosen: oneDNN's matmul, or, for the weight gradient of a matrix with more columns than rows (in
   bfloat16: at least a quarter as many), its inner product.  SEL_EUSER for a letter that does not fit the pass or the
   type. */
sel_status sel_linear_choose(sel_linear_engine *e, const sel_linear_choice *c);

/* Measures all that may make the products of a matrix [c->out][c->in] with `rows` rows and writes the fastest into
   c->by: another than matmul only where it is 3% faster.  Leaves the engine as it was.  A fraction of a second for each
   10^10 FLOPs of a product. */
sel_status sel_linear_probe(sel_linear_engine *e, int64_t rows, sel_linear_choice *c);

/* Room for a matrix [out][in]; backward false leaves out what only gradients need. */
sel_status sel_linear_new(sel_linear **l, sel_linear_engine *e, int64_t out, int64_t in, bool backward);
void       sel_linear_free(sel_linear **l);

/* Packs w [out][in].  A library that reads w in place keeps the pointer: w must
   live, unchanged, until the next pack. */
sel_status sel_linear_pack(sel_linear *l, const float *w);

/* Makes the primitives of `rows` rows now, so that no step makes them; dx: the type that backward_input will be asked
   for. */
sel_status sel_linear_prepare(sel_linear *l, int64_t rows, int64_t x_row, int64_t y_row, sel_dtype dx);

/* y [rows][out] = x [rows][in] W^T */
sel_status sel_linear_forward(sel_linear *l, int64_t rows, const void *x, int64_t x_row, float *y, int64_t y_row);

/* dx [rows][in] = dy [rows][out] W, an array of `type`: float32, or, where the engine's operands are too, bfloat16:
   the float32 sum rounded once, to nearest even (where rows have gaps oneDNN 2.6 is slow).  SEL_EUSER: bfloat16 of a
   float32 engine. */
sel_status sel_linear_backward_input(sel_linear *l, int64_t rows, const void *dy, int64_t dy_row, void *dx,
                                     sel_dtype type, int64_t dx_row);

/* dw [out][in] = dy^T x, or, where add, dw += dy^T x */
sel_status sel_linear_backward_weight(sel_linear *l, int64_t rows, const void *dy, int64_t dy_row, const void *x,
                                      int64_t x_row, float *dw, bool add);

/* Bytes of its packed copies. */
size_t sel_linear_bytes(const sel_linear *l);

/* The matrix's sizes. */
int64_t sel_linear_out(const sel_linear *l);
int64_t sel_linear_in(const sel_linear *l);

/* Name and version of the library, "oneDNN 2.6.3". */
const char *sel_linear_library(const sel_linear_engine *e);

/* GFLOP/s of a product 4096 x 768 x 768 on the engine's threads, measured now:
   the peak that shares (mfu) refer to.  Best of a few, about 0.2 s. */
sel_status sel_linear_measure_peak(sel_linear_engine *e, double *gflops);

#endif
