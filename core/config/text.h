/* text.h: small helpers for text that people wrote: UTF-8, quoting, and how far two words are apart. */
#ifndef SEL_CORE_CONFIG_TEXT_H
#define SEL_CORE_CONFIG_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define SEL_SHOWN_MAX 80

/* The next character of valid UTF-8, which moves *p on; -1 where it is not valid
   (then *p moves by one byte).  *p must not be at the end. */
int32_t sel_utf8_next(const char **p);

bool sel_text_is_utf8(const char *text);

/* The text as an error message may show it: one line, printable, cut with "..."; returns out. */
const char *sel_text_show(char out[SEL_SHOWN_MAX], const char *text);

/* Writes valid UTF-8 as a double-quoted YAML scalar that reads back to the same bytes. */
void sel_text_quote(FILE *out, const char *text);

/* Damerau-Levenshtein distance (adjacent letters may swap, each place edited once). */
size_t sel_text_distance(const char *a, const char *b);

#endif
