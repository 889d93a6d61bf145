/* mesh.h: the ranks as a grid data x sequence: who owns which samples, and which tokens of them.
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
   would work, when data * sequence != size. */
sel_status sel_mesh_init(sel_mesh *m, int rank, int size, int64_t data, int64_t sequence);

/* Samples of the global batch that a data rank owns: [*first, *first + *count), all counts
   equal.  SEL_EUSER, naming batch sizes that would work, when it cannot be divided. */
sel_status sel_mesh_samples(const sel_mesh *m, int64_t batch, int64_t *first, int64_t *count);

/* Which tokens of each sequence the ranks of a sequence group own (spec, section 4): the sequence is cut into chunks of
   equal length, of which each rank has one, or, zigzag, an early one and a late one, so that all have the same number
   of (query, key) pairs. */
enum { SEL_MOST_CHUNKS = 2 };   /* of a rank */
typedef struct {
    int64_t tokens, each;       /* of a sequence, of a chunk */
    int ranks, rank, chunks;    /* of the group; this one; chunks of a rank */
} sel_chunks;
typedef enum { SEL_CUT_AUTO, SEL_CUT_ZIGZAG, SEL_CUT_CONTIGUOUS } sel_cut;

/* auto: zigzag where 2 * sequence divides the tokens, else contiguous.  SEL_EUSER, with numbers that would work, where
   the tokens cannot be cut so. */
sel_status sel_mesh_chunks(const sel_mesh *m, int64_t tokens, sel_cut cut, sel_chunks *c);

/* Place, in order of position, of the k-th chunk of a rank; whose chunk `place` is, and its number k there. */
int sel_chunk_place(const sel_chunks *c, int rank, int k);
int sel_chunk_owner(const sel_chunks *c, int place, int *k);

/* Bytes [*begin, *end) of a file of `bytes` bytes that rank of size writes: contiguous, in rank order, equal to
   one byte. */
void sel_mesh_share(int64_t bytes, int rank, int size, int64_t *begin, int64_t *end);

#endif
