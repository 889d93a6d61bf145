/* text.h: two questions about UTF-8 text that readers and the tokenizer must answer alike. */
#ifndef SEL_CORE_DATA_TEXT_H
#define SEL_CORE_DATA_TEXT_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A longer text is encoded in parts of at most so many bytes. */
#define SEL_TEXT_PART ((size_t)65536)

/* Bytes of text before its first byte that is not valid UTF-8; `bytes` when all is. */
size_t sel_text_valid(const char *text, size_t bytes);

/* Bytes of the first part of text: all of it up to SEL_TEXT_PART, else up to a line's end, a space or at least a
   character's end in the second half of the first SEL_TEXT_PART bytes.  No later byte than the one after
   these is looked at, so a reader that holds SEL_TEXT_PART + 1 bytes finds the same parts as one that holds all. */
size_t sel_text_cut(const char *text, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
