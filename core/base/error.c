/* error.c: one line per thread says what failed last. */
#include "core/base/error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LINE_BYTES 1024

static _Thread_local char last_line[LINE_BYTES] = "no error";

/* Drops a UTF-8 character that the cut has split: the line also goes into JSON. */
static void trim_split_character(char *line, size_t length)
{
    size_t start = length;
    while (start > 0 && length - start < 3 && ((unsigned char)line[start - 1] & 0xC0) == 0x80) start--;
    if (start == 0) return;

    const unsigned char lead = (unsigned char)line[start - 1];
    const size_t needs = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 1;
    if (length - start + 1 < needs) line[start - 1] = '\0';
}

sel_status sel_fail(sel_status code, const char *fmt, ...)
{
    const int saved_errno = errno;
    char line[LINE_BYTES]; /* an argument may be sel_error() itself */
    va_list args;

    va_start(args, fmt);
    const int length = vsnprintf(line, sizeof line, fmt, args);
    va_end(args);
    if (length < 0) line[0] = '\0';
    if (length >= LINE_BYTES) trim_split_character(line, LINE_BYTES - 1);

    memcpy(last_line, line, strlen(line) + 1);
    errno = saved_errno;
    return code;
}

const char *sel_error(void)
{
    return last_line;
}

int sel_exit_status(sel_status code)
{
    switch (code) {
#define EXIT_OF(name, value, exit_status, text)                                                                        \
    case name:                                                                                                         \
        return exit_status;
        SEL_STATUSES(EXIT_OF)
#undef EXIT_OF
    }
    return EXIT_FAILURE;
}

_Noreturn void sel_assert_fail(const char *what, const char *file, int line)
{
    fprintf(stderr, "%s:%d: broken contract: %s\n", file, line, what);
    fflush(stderr);
    abort();
}
