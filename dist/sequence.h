/* sequence.h: what the ranks that share sequences tell each other (spec, section 4).
 *
 * Each rank has chunks of every sequence of a micro-batch (mesh.h).  For attention it needs the keys and values of all
 * earlier tokens; the sums over columns of the chunks before or after its own; and it makes gradients for keys that
 * are others'.  Where a group lies in one host all this is in one window of shared memory, the keys once for all of
 * them, and nothing is copied: counters say when it is complete.  Elsewhere, or where a host lends no shared memory,
 * the same arrays are each rank's own and messages fill them, each number sent only to ranks that read it.  Both ways
 * add the same numbers in the same order, by position: the same bits.
 *
 * [collective]: on all ranks of the group, in the same order; the sequence group is what a single rank would be.
 */
#ifndef SEL_DIST_SEQUENCE_H
#define SEL_DIST_SEQUENCE_H

#include <stdbool.h>
#include "dist/comm.h"
#include "dist/mesh.h"
#include "dist/reduce.h"

typedef struct sel_sequence sel_sequence;

typedef struct {
    sel_chunks chunks;
    int group;               /* number of this rank's group */
    int64_t batch;           /* sequences at once, at most */
    int64_t width;           /* numbers of a token's row of keys (and values, ...) */
    bool no_window;          /* as if no host lent shared memory */
    bool bfloat16;           /* keys are arrays of bfloat16 (uint16_t), else float32; all else is float32 either way */
    int threads;
} sel_sequence_options;

/* [collective, all ranks of c] The outcome is the same on all ranks. */
sel_status sel_sequence_new(sel_sequence **q, sel_comm *c, const sel_sequence_options *o);
void       sel_sequence_free(sel_sequence **q);   /* [collective, all ranks of c] NULL is fine */

const sel_chunks *sel_sequence_chunks(const sel_sequence *q);

/* Why all goes by MPI, one line; "" where it does not. */
const char *sel_sequence_note(const sel_sequence *q);

/* Bytes that it takes a rank, on the average of the group. */
size_t sel_sequence_bytes(const sel_sequence *q);

/* ---- keys [batch][tokens][width], by position, of their type

   begin: the keys of before are read no more by anyone; *keys is where this rank stores its own rows, and finds the
   others'.  share [collective]: all have stored the rows of the first `batch` sequences, and those up to this rank's
   last are there.  end: this rank reads them no more. */
void  *sel_sequence_begin(sel_sequence *q);
void   sel_sequence_share(sel_sequence *q, int64_t batch);
void   sel_sequence_end(sel_sequence *q);

/* ---- sums over columns: a row of sel_sequence_row(q) floats a sequence: one a key, then the extra one

   Where this rank stores those of its chunk k: [batch][row].  share [collective]: all have.  add: y[b][j], j < n, rows
   `row` apart, = the sum over the chunks at places [first, last), in that order.  extra: the largest of all chunks'
   extra ones, NaN if one is. */
int64_t sel_sequence_row(const sel_sequence *q);
float  *sel_sequence_sums(const sel_sequence *q, int k);
void    sel_sequence_share_sums(sel_sequence *q, int64_t batch);
void    sel_sequence_add(sel_sequence *q, int64_t batch, int first, int last, int64_t n, float *y);
float   sel_sequence_extra(const sel_sequence *q, int64_t b);

/* ---- gradients of the keys, by the rows of one chunk each

   Where this rank stores what its chunk k gives: [batch][the chunk's end][width], a row for each key up to the chunk's
   last.  To be written between sel_sequence_share and sum_gradients.  sum_gradients [collective] ends the use of the
   keys; *rows [batch][each][width] of chunk k, sequences sel_sequence_gradients_seq floats apart, are then the whole
   gradient of this rank's own, until the next sel_sequence_share. */
float  *sel_sequence_gradients(const sel_sequence *q, int k);
int64_t sel_sequence_gradients_seq(const sel_sequence *q, int k);
void    sel_sequence_sum_gradients(sel_sequence *q, int64_t batch);
const float *sel_sequence_own_gradients(const sel_sequence *q, int k);

/* [collective] all [ranks][bytes] gets what each rank brings; small things. */
void sel_sequence_gather(sel_sequence *q, const void *mine, size_t bytes, void *all);

/* What this rank moved since the last call.  Nothing of it is hidden: busy is wait. */
void sel_sequence_wire(sel_sequence *q, sel_wire *w);

#endif
