/* mem.h: memory for arrays of numbers: 64-byte aligned, zeroed, huge pages asked for. */
#ifndef SEL_CORE_BASE_MEM_H
#define SEL_CORE_BASE_MEM_H

#include <stddef.h>
#include "core/base/error.h"

/* Zeroed memory at a multiple of 64 bytes; large blocks start on 2 MiB pages
   where the system grants them.  bytes = 0 gives a block that may be freed.
   NULL (and sel_error naming `what` and the size) when there is none. */
void *sel_alloc(size_t bytes, const char *what);

/* Frees a block of sel_alloc; NULL is fine. */
void sel_free(void *block);

#endif
