/* exchange.h: parts of buckets summed and spread between hosts, by MPI.  Private to dist/.
 *
 * Each host's member of a rail brings its host's sums of a part.  Every member sends each other one the piece that is
 * theirs, adds what it gets for its own, in a tree over the hosts, and sends the result to all: 2 (hosts - 1) / hosts
 * of the part, which is the least there is, and an order of additions that no MPI library chooses.
 */
#ifndef SEL_DIST_EXCHANGE_H
#define SEL_DIST_EXCHANGE_H

#include <stdbool.h>
#include <stdint.h>
#include "dist/buckets.h"
#include "dist/comm.h"

typedef struct sel_exchange sel_exchange;

typedef enum {
    SEL_EXCHANGE_SUM,          /* own piece = sum; the other pieces of the part are left undefined */
    SEL_EXCHANGE_SUM_SPREAD,   /* all pieces = sum */
    SEL_EXCHANGE_SPREAD        /* each piece = its owner's */
} sel_exchange_kind;

/* [collective, all ranks of the job] Ranks with the same `rail` >= 0 belong together, one a host, `member` being the
   number of the host; rail -1 takes part in none and gets NULL.  bfloat16: sums travel rounded, and all members,
   the owner too, hold the rounded result. */
sel_status sel_exchange_new(sel_exchange **x, sel_comm *c, const sel_buckets *cut, int rail, int member, bool bfloat16,
                            int threads);
void       sel_exchange_free(sel_exchange **x);   /* [collective] */

/* Whether another one may be started: some are in flight at most. */
bool sel_exchange_room(const sel_exchange *x);

/* Starts the exchange of this rail's part of bucket k of array.  All members start the same ones in the same order. */
void sel_exchange_start(sel_exchange *x, sel_exchange_kind kind, float *array, int k);

/* Does what can be done now, without waiting; true if anything has moved. */
bool sel_exchange_advance(sel_exchange *x);

/* Exchanges completed, in the order of their start, since the last call. */
int sel_exchange_completed(sel_exchange *x);

/* Bytes sent since the last call. */
double sel_exchange_sent(sel_exchange *x);

#endif
