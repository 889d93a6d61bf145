/* watchdog.h: notices that the job does not get on, says where, and ends it (spec, section 14).
 *
 * A thread a rank.  The ranks of a host see each other's marks (core/base/pulse.h) in their window; the first rank of a
 * host speaks with host 0 by datagrams (dist/beacon.h).  The threads never call MPI but to end the job: what they watch
 * may be MPI that is stuck.
 *
 *     no progress   the rank that is furthest behind has left no mark for `seconds`: it is named, with phase, step,
 *                   collective, and the state of its process; the ranks of its host write where their main threads are
 *     silence       a thread, or a host, has given no sign of life for min(seconds, 15 s): stopped, dead, cut off.  A
 *                   host that is cut off from host 0 ends itself likewise
 *     death         a rank's process is gone: it is named at once; ending the job is left to the launcher for 5 s
 *
 * Time is counted in the thread's own rounds, so a job that is suspended and goes on later is none the worse for it.
 */
#ifndef SEL_DIST_WATCHDOG_H
#define SEL_DIST_WATCHDOG_H

#include "dist/comm.h"

enum { SEL_WATCHDOG_STATUS = 75 };   /* the exit status of a job that it ends */

typedef struct sel_watchdog sel_watchdog;

/* [collective] From here on.  seconds 0: none, *w is NULL.  One at a time. */
sel_status sel_watchdog_open(sel_watchdog **w, sel_comm *c, double seconds);

/* [collective] NULL is fine; sets *w to NULL. */
void sel_watchdog_close(sel_watchdog **w);

#endif
