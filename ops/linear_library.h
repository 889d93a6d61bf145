/* linear_library.h: what a library behind linear.h provides.
 *
 * linear.c checks arguments, sets the number of threads and hands over; each library has a file of its own
 * whose engine and matrix structs begin with the two below.
 */
#ifndef SEL_OPS_LINEAR_LIBRARY_H
#define SEL_OPS_LINEAR_LIBRARY_H

#include <stddef.h>
#include "ops/linear.h"

typedef struct {
    size_t engine_bytes, matrix_bytes;   /* sizes of its structs, handed over zeroed but for the base */

    sel_status (*open)(sel_linear_engine *e);
    void (*close)(sel_linear_engine *e);   /* also what a failed open left behind */

    sel_status (*make)(sel_linear *l);
    void (*drop)(sel_linear *l);           /* also what a failed make left behind */
    sel_status (*pack)(sel_linear *l, const float *w);
    sel_status (*prepare)(sel_linear *l, int64_t rows, int64_t x_row, int64_t y_row, sel_dtype dx);

    /* As in linear.h, with rows > 0, sizes that were checked, and bfloat16 dx of a bfloat16 engine only. */
    sel_status (*forward)(sel_linear *l, int64_t rows, const void *x, int64_t x_row, float *y, int64_t y_row);
    sel_status (*backward_input)(sel_linear *l, int64_t rows, const void *dy, int64_t dy_row, void *dx,
                                 sel_dtype type, int64_t dx_row);
    sel_status (*backward_weight)(sel_linear *l, int64_t rows, const void *dy, int64_t dy_row, const void *x,
                                  int64_t x_row, float *dw, bool add);
} sel_linear_library_calls;

struct sel_linear_engine {
    const sel_linear_library_calls *calls;
    sel_dtype dtype;
    int threads;
    int matrices;        /* alive */
    sel_linear_choice *choices;   /* [n_choices] */
    int n_choices;
    char version[64];    /* "oneDNN 2.6.3", written by open */
};

struct sel_linear {
    sel_linear_engine *engine;
    int64_t out, in;
    bool backward;
    const float *w;      /* of the latest pack; NULL before the first */
    size_t bytes;        /* of its packed copies, counted by make */
    char by[SEL_LINEAR_PASSES];   /* who makes each product (linear.h), set before make */
};

extern const sel_linear_library_calls sel_linear_onednn_calls, sel_linear_openblas_calls;

#endif
