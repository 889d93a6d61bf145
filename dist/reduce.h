/* reduce.h: gradients summed over the ranks while backward still runs.
 *
 * Two levels.  The gradient arrays of a host's ranks lie in one window of shared memory:
 * each rank adds up its part of all of them by loads and stores.  Each part then goes
 * between the hosts by MPI (exchange.h), moved along by the calls below.  The array goes
 * in buckets, from its end to its beginning, as backward finishes it.  Sums are float32,
 * in one fixed tree over the ranks: the same ranks give the same bits, whatever the
 * buckets, the MPI library or the timing.
 *
 * Where a host lends no shared memory every rank counts as a host of its own and all
 * goes by MPI; sel_reducer_note() says why.
 *
 * zero: stage 1 of ZeRO.  Sums are left with their owners, a piece of each bucket a rank;
 * parameters lie in the window too, and are gathered when the owners have updated them.
 *
 * [collective]: on all ranks of the job, in the same order.
 */
#ifndef SEL_DIST_REDUCE_H
#define SEL_DIST_REDUCE_H

#include <stdbool.h>
#include <stdint.h>
#include "dist/buckets.h"
#include "dist/comm.h"

typedef struct sel_reducer sel_reducer;

typedef struct {
    int64_t n;               /* floats of the arrays */
    bool zero;
    bool bfloat16;   /* gradients travel between hosts as bfloat16: a sum is off by at most 2^-9 of the hosts' terms,
                        each taken absolutely, and 2^-9 of the result; off the wire all is float32 */
    bool fixed_tree; /* the tree over ranks must be the whole binary one, wherever the ranks are: their number is a
                        power of two, and hosts that do not fit into the tree count as so many single ranks */
    bool no_window;          /* as if no host lent shared memory */
    bool no_overlap;         /* nothing moves before sel_reducer_finish, sel_reducer_gather: shows what overlap hides */
    int threads;             /* that add up */
    int64_t bucket_floats;   /* 0: chosen */
} sel_reducer_options;

/* [collective] The outcome is the same on all ranks. */
sel_status sel_reducer_new(sel_reducer **r, sel_comm *c, const sel_reducer_options *o);
void       sel_reducer_free(sel_reducer **r);   /* [collective] NULL is fine */

/* This rank's gradients [n] and, with zero, parameters [n] (else NULL), zeroed, owned by the reducer. */
float *sel_reducer_grads(const sel_reducer *r);
float *sel_reducer_params(const sel_reducer *r);

/* Why all goes by MPI, one line; "" where it does not. */
const char *sel_reducer_note(const sel_reducer *r);

/* grads[begin .. n) is final: begin falls from call to call.  May add up what others have finished too. */
void sel_reducer_ready(sel_reducer *r, int64_t begin);

/* Moves along what is under way; cheap.  To be called now and then by whoever computes. */
void sel_reducer_poll(sel_reducer *r);

/* [collective] Returns when all of grads is summed and this rank may write to it again: on all ranks, or, with zero, in
   the pieces that this rank owns (the others are undefined). */
void sel_reducer_finish(sel_reducer *r);

/* Pieces of the array that this rank owns, with zero: piece i < sel_reducer_pieces() is [*begin, *end), multiples of
   SEL_BLOCK (but for n itself), from the array's end to its beginning; may be empty.  Without zero: all of it, one
   piece. */
int  sel_reducer_pieces(const sel_reducer *r);
void sel_reducer_piece(const sel_reducer *r, int i, int64_t *begin, int64_t *end);

/* Pieces i of all ranks together are one stretch of at most so many floats. */
int64_t sel_reducer_stretch(const sel_reducer *r);

/* Pieces up to i have their new parameters: they start on their way. */
void sel_reducer_updated(sel_reducer *r, int i);

/* [collective] Returns when all of params has come from its owners.  Without zero it does nothing. */
void sel_reducer_gather(sel_reducer *r);

/* What this rank moved since the last call. */
typedef struct {
    double wire_bytes;      /* sent to other hosts */
    double wire_least;      /* the least that an all-reduce between hosts can send, this rank's share */
    double host_bytes;      /* loaded from and stored to other ranks' memory of this host */
    double wait_seconds;    /* spent in sel_reducer_finish and sel_reducer_gather: nothing was computed meanwhile */
    double busy_seconds;    /* it was under way: 1 - wait / busy was hidden behind computing */
} sel_wire;
void sel_reducer_wire(sel_reducer *r, sel_wire *w);

#endif
