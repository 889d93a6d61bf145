/* keep.h: checkpoints come and go without a moment in which none is whole.  Private to this room. */
#ifndef SEL_CORE_CHECKPOINT_KEEP_H
#define SEL_CORE_CHECKPOINT_KEEP_H

#include <stdint.h>
#include "core/base/error.h"
#include "dist/comm.h"

/* Removes what killed jobs left behind: DIR/.tmp-*. */
sel_status sel_keep_remove_stale(const char *dir);

/* [collective] Reads a complete step folder back, every rank a share, and compares sizes and checksums with the
   manifest.  SEL_EFILE names the damaged file. */
sel_status sel_keep_verify(sel_comm *c, const char *folder);

/* Renames the complete folder TMP to FINAL.  A FINAL that exists is replaced at once and then stands at TMP.
   When it fails, FINAL is as it was. */
sel_status sel_keep_place(const char *dir, const char *tmp, const char *final);

/* After place: makes it last, moves DIR/latest to the step, removes what was replaced. */
sel_status sel_keep_settle(const char *dir, const char *tmp, int64_t step);

/* [collective] Deletes all but the newest `keep` intact ones up to `step`, which is intact and one of them;
   keep 0 deletes none.  Damaged ones do not count; they go when they are older than the oldest that is kept. */
sel_status sel_keep_newest(sel_comm *c, const char *dir, int64_t step, int64_t keep);

#endif
