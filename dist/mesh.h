/* mesh.h: the ranks as a grid data x sequence: who owns which samples.
 *
 * Pure arithmetic, testable for any number of ranks in one process.  Ranks of one
 * sequence group are neighbours: rank = data_rank * sequence + sequence_rank.
 */
#ifndef SEL_DIST_MESH_H
#define SEL_DIST_MESH_H

#include <stdint.h>
#include "core/base/error.h"

typedef struct {
    int data, sequence;             /* sizes of the two axes */
    int data_rank, sequence_rank;   /* this rank's place */
} sel_mesh;

/* Lays `size` ranks out; data 0 means size / sequence.  SEL_EUSER, with the sizes that
   would work, when data * sequence != size.  A sequence axis beyond 1 is refused. */
sel_status sel_mesh_init(sel_mesh *m, int rank, int size, int64_t data, int64_t sequence);

/* Samples of the global batch that a data rank owns: [*first, *first + *count), all counts
   equal.  SEL_EUSER, naming batch sizes that would work, when it cannot be divided. */
sel_status sel_mesh_samples(const sel_mesh *m, int64_t batch, int64_t *first, int64_t *count);

/* Bytes [*begin, *end) of a file of `bytes` bytes that rank of size writes: contiguous, in rank order, equal to
   one byte. */
void sel_mesh_share(int64_t bytes, int rank, int size, int64_t *begin, int64_t *end);

#endif
