/* reduce.h: gradients summed over the data axis while backward still runs.
 *
 * Backward calls ready() when a stretch of the gradient array is final, finish() at
 * the end; afterwards every rank of the data axis holds the sum, equal to the bit.
 * Today finish() does it all, with MPI's own all-reduce; ready() only takes note.
 */
#ifndef SEL_DIST_REDUCE_H
#define SEL_DIST_REDUCE_H

#include <stdint.h>
#include "dist/comm.h"
#include "dist/mesh.h"

typedef struct sel_reducer sel_reducer;

/* For the array grads[0 .. n), owned by the caller and alive as long as the reducer. */
sel_status sel_reducer_new(sel_reducer **r, sel_comm *c, const sel_mesh *m, float *grads, int64_t n);
void       sel_reducer_free(sel_reducer **r);

/* [collective, same stretches in the same order on all ranks] grads[begin .. end) is final. */
void sel_reducer_ready(sel_reducer *r, int64_t begin, int64_t end);

/* [collective] Returns when all of grads is summed. */
void sel_reducer_finish(sel_reducer *r);

/* Bytes that this rank sent since the last call, and seconds it waited. */
void sel_reducer_wire(sel_reducer *r, double *bytes, double *seconds);

#endif
