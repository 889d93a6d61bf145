/* host.h: memory that the ranks of a host share.
 *
 * Ranks of a host are neighbours in the world (comm.h), host_rank 0 .. host_size - 1.
 * A window is one piece of memory a rank; every rank of the host, or of a group's on it,
 * reads and writes all of them by loads and stores.  The order of such accesses is the caller's matter: atomics,
 * or the counters below.
 */
#ifndef SEL_DIST_HOST_H
#define SEL_DIST_HOST_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include "dist/comm.h"

typedef struct sel_host_window sel_host_window;

/* [collective, all ranks of c] A window with `bytes` bytes of this rank (which may differ), zeroed, at multiples of 64
   bytes, on memory near the rank that owns it, for those ranks of `group` that are on one host.  group: c, or what
   sel_comm_split made of c; then all groups make theirs at once, and the host must have room for all of them.
   SEL_ENOMEM on all ranks of c, with the line of a rank that could not (SEL_EIO, where the host lends no shared memory
   at all): *w is NULL then.  `what` names it in messages. */
sel_status sel_host_window_new(sel_host_window **w, sel_comm *c, sel_comm *group, size_t bytes, const char *what);

/* [collective, all ranks of the group] NULL is fine; sets *w to NULL. */
void sel_host_window_free(sel_host_window **w);

/* The part of that rank of the group on this host. */
void *sel_host_window_part(const sel_host_window *w, int host_rank);

/* [collective, ranks of the host] Returns when all of them have called it; what they stored before is seen. */
void sel_host_barrier(sel_comm *c);

/* A number in a window that one rank raises and others of its host wait for.  Wraps around. */
typedef struct {
    _Atomic uint32_t value, sleepers;
    char pad[56];      /* one cache line each */
} sel_host_count;

/* Raises it: what this rank stored before is seen by whoever sees the value. */
void sel_host_post(sel_host_count *count, uint32_t value);

/* Whether it has come as far as `value`. */
static inline int sel_host_reached(const sel_host_count *count, uint32_t value)
{
    return (int32_t)(atomic_load_explicit(&count->value, memory_order_acquire) - value) >= 0;
}

/* A wait in progress: rounds of sel_host_pause() until what is waited for has come.  Zero to start. */
typedef struct {
    int rounds, dead;       /* dead: looks in a row that found a dead rank */
    double looked;          /* seconds of the clock */
} sel_host_waiter;

/* One round, which gets longer from a processor's pause to a sleep of milliseconds; a post to `count`, where not NULL,
   ends the sleep.  `busy`: something else (MPI) needs looking after too, so sleeps stay short.  A rank of this host
   that has died while others wait for it ends the job after some seconds, in which the launcher may do so first, with a
   line that names it. */
void sel_host_pause(sel_comm *c, sel_host_waiter *w, sel_host_count *count, uint32_t value, int busy);

#endif
