/* safetensors.h: the safetensors file format, written by many ranks at once.
 *
 * 8 bytes little-endian header length, a JSON header, then one flat run of bytes.  Every
 * rank makes the same header, so every rank knows where every byte goes.
 */
#ifndef SEL_CORE_CHECKPOINT_SAFETENSORS_H
#define SEL_CORE_CHECKPOINT_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>
#include "core/base/error.h"

typedef struct {
    char name[96];
    int rank;
    int64_t shape[2];
    int64_t begin, end;     /* bytes, from the end of the header */
} sel_st_entry;

typedef struct {
    sel_st_entry *entries;
    int n;
    int64_t header_bytes;   /* 8 + JSON: where the data starts; a multiple of 64 */
    int64_t data_bytes;
} sel_st_index;

/* Assigns begin and end in order (float32) and makes the header text, *header [*bytes] (freed by the
   caller with free), the 8 length bytes included, padded by spaces. */
sel_status sel_st_make(sel_st_index *ix, char **header, size_t *bytes);

/* Reads and checks the header of a file: SEL_EFILE for anything that does not add up (lengths, overlaps, gaps,
   dtype other than F32).  Free with sel_st_free. */
sel_status sel_st_read(sel_st_index *ix, const char *path);
void       sel_st_free(sel_st_index *ix);

#endif
