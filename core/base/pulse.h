/* pulse.h: where this rank is, written down for whoever watches over it.
 *
 * The main thread marks what it does; a watchdog thread, or that of another rank of the host, reads it
 * (dist/watchdog.h).  A mark costs some tens of nanoseconds, so loops leave one in each round that may take long.
 */
#ifndef SEL_CORE_BASE_PULSE_H
#define SEL_CORE_BASE_PULSE_H

#include <stdatomic.h>
#include <stdint.h>

#define SEL_PULSE_NAME 24   /* bytes of a name, its end included; longer ones are cut */

/* All zero: nothing has been marked yet.  Fields are the writer's; others read by sel_pulse_read. */
typedef struct {
    _Atomic uint64_t marks;      /* grows with every sign of progress */
    _Atomic uint64_t position;   /* collectives of the whole job begun plus those ended: odd within one */
    _Atomic int64_t step;
    _Atomic uint64_t when;       /* of the last mark: nanoseconds of the host's monotonic clock */
    _Atomic uint64_t phase[SEL_PULSE_NAME / 8], collective[SEL_PULSE_NAME / 8], exchange[SEL_PULSE_NAME / 8]; /* text */
} sel_pulse;

/* What a reader sees. */
typedef struct {
    uint64_t marks, position;
    int64_t step;
    uint64_t when;
    char phase[SEL_PULSE_NAME], collective[SEL_PULSE_NAME];   /* collective: the last one that was entered */
    char exchange[SEL_PULSE_NAME];   /* of some of the ranks, in which this one waits; "": in none */
} sel_pulse_view;

/* From here on the marks go there, in memory that others see too, with what has been marked so far.  NULL: back into
   this process's own. */
void sel_pulse_move(sel_pulse *to);

/* The rank is now in this phase ("forward") of a step; a negative step leaves it as it is. */
void sel_pulse_phase(const char *phase, int64_t step);

/* It is getting on with it.  Any thread may say so. */
void sel_pulse_tick(void);

/* A collective of the whole job begins (its name), and has ended.  Not to be nested. */
void sel_pulse_enter(const char *collective);
void sel_pulse_leave(void);

/* It has brought its own to an exchange of some of the ranks only (its name) and waits for the others; NULL: no more.
   Ranks of different groups may come to this unequally often, so it is not counted with the collectives. */
void sel_pulse_exchange(const char *what);

void sel_pulse_read(const sel_pulse *p, sel_pulse_view *view);

#endif
