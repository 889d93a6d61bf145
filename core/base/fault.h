/* fault.h: faults on purpose, for tests: SELECTRA_FAULT=rank:phase:step:kind[,...]
 *
 * Phases: data, forward, backward, reduce, optimizer, validate, save; where ranks share sequences, the first exchange
 * in the step of keys, sums (of S over columns) or gradients (of keys), which has what this rank brings.
 * Kinds: kill (SIGKILL to itself), stop (SIGSTOP), sleep (30 s), term (SIGTERM
 * to itself), nan (the caller spoils a number, each time it is there), enospc (the caller's next write
 * fails as on a full disk).
 */
#ifndef SEL_CORE_BASE_FAULT_H
#define SEL_CORE_BASE_FAULT_H

#include <stdbool.h>
#include <stdint.h>
#include "core/base/error.h"

/* Reads SELECTRA_FAULT for this rank, once; SEL_EUSER names what it cannot read. */
sel_status sel_fault_init(int rank);

/* Says where the rank is (core/base/pulse.h too).  Acts out kill, stop, sleep and term itself; for nan and
   enospc returns true where `kind` is that word and the fault is due now. */
bool sel_fault(const char *phase, int64_t step, const char *kind);

/* The same for what lies within that phase, at its step: kill, stop, sleep and term only.  Says nothing of where the
   rank is. */
void sel_fault_within(const char *phase);

#endif
