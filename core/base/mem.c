/* mem.c: aligned, zeroed blocks.  64 bytes in front of each block say how to free it.
 *
 * Large blocks are fresh mappings: zero without being touched, so that the thread
 * that first writes a page decides on which memory node it lies.
 */
#include "core/base/mem.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ALIGNMENT ((size_t)64)
#define HUGE_PAGE ((size_t)2 << 20)
#define LARGE ((size_t)4 << 20)
#define TAG 0x53656c656374726bULL

typedef struct {
    uint64_t tag;  /* TAG: this is a block of sel_alloc that is in use */
    void *base;    /* what the system gave */
    size_t mapped; /* bytes of the mapping; 0: base came from posix_memalign */
} header;

_Static_assert(sizeof(header) <= ALIGNMENT, "the header fits in front of the block");

static header *header_of(void *block)
{
    return (header *)(void *)((char *)block - ALIGNMENT);
}

static void *alloc_small(size_t bytes)
{
    void *base = NULL;
    if (posix_memalign(&base, ALIGNMENT, ALIGNMENT + bytes) != 0) return NULL;
    memset(base, 0, ALIGNMENT + bytes);

    void *block = (char *)base + ALIGNMENT;
    *header_of(block) = (header){.tag = TAG, .base = base, .mapped = 0};
    return block;
}

static void *alloc_large(size_t bytes)
{
    /* Room to start on a huge page with the header in front, wherever the mapping begins. */
    const size_t mapped = bytes + HUGE_PAGE + ALIGNMENT;
    char *base = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return NULL;

    const uintptr_t at = (uintptr_t)base;
    const uintptr_t start = (at + ALIGNMENT + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void *block = base + (start - at);
    /* Advice only: without huge pages the block is as good, and slower. */
    (void)madvise(block, bytes, MADV_HUGEPAGE);
    *header_of(block) = (header){.tag = TAG, .base = base, .mapped = mapped};
    return block;
}

void *sel_alloc(size_t bytes, const char *what)
{
    void *block = NULL;
    if (bytes <= PTRDIFF_MAX - HUGE_PAGE - ALIGNMENT) block = bytes < LARGE ? alloc_small(bytes) : alloc_large(bytes);
    if (!block)
        sel_fail(SEL_ENOMEM, "out of memory: %s needs %zu bytes (%.1f MiB)", what, bytes, (double)bytes / 0x1p20);
    return block;
}

void sel_free(void *block)
{
    if (!block) return;
    header *h = header_of(block);
    SEL_ASSERT(h->tag == TAG);
    h->tag = 0;
    if (h->mapped)
        munmap(h->base, h->mapped);
    else
        free(h->base);
}
