/* text.c: UTF-8, quoting, distances. */
#include "core/config/text.h"

#include <string.h>

#define WORD_MAX 64 /* sel_text_distance looks at this much of b; keys are shorter */

int32_t sel_utf8_next(const char **p)
{
    static const int32_t least[] = {0, 0x80, 0x800, 0x10000}; /* shorter forms exist below these */
    const unsigned char *s = (const unsigned char *)*p;
    (*p)++;
    if (s[0] < 0x80) return s[0];

    const int more = s[0] >= 0xF8 ? 0 : s[0] >= 0xF0 ? 3 : s[0] >= 0xE0 ? 2 : s[0] >= 0xC0 ? 1 : 0;
    if (more == 0) return -1;
    int32_t c = s[0] & (0x3F >> more);
    for (int i = 1; i <= more; i++) {
        if ((s[i] & 0xC0) != 0x80) return -1; /* the final NUL too */
        c = c << 6 | (s[i] & 0x3F);
    }
    if (c < least[more] || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF)) return -1;
    *p += more;
    return c;
}

bool sel_text_is_utf8(const char *text)
{
    while (*text)
        if (sel_utf8_next(&text) < 0) return false;
    return true;
}

/* Control characters, the line breaks of Unicode, byte order marks and non-characters:
   a terminal or a YAML reader would not show them or would change them. */
static bool is_plain(int32_t c)
{
    return c >= 0x20 && c != 0x7F && !(c >= 0x80 && c < 0xA0) && c != 0x2028 && c != 0x2029 && c != 0xFEFF &&
           (c & 0xFFFE) != 0xFFFE;
}

const char *sel_text_show(char out[SEL_SHOWN_MAX], const char *text)
{
    size_t n = 0;
    while (*text) {
        const char *start = text;
        const int32_t c = sel_utf8_next(&text);
        const size_t bytes = is_plain(c) ? (size_t)(text - start) : 1;
        if (n + bytes > SEL_SHOWN_MAX - 4) {
            memcpy(out + n, "...", 3);
            n += 3;
            break;
        }
        if (is_plain(c))
            memcpy(out + n, start, bytes);
        else
            out[n] = '?';
        n += bytes;
    }
    out[n] = '\0';
    return out;
}

void sel_text_quote(FILE *out, const char *text)
{
    fputc('"', out);
    while (*text) {
        const char *start = text;
        const int32_t c = sel_utf8_next(&text);
        if (c == '"' || c == '\\')
            fprintf(out, "\\%c", (char)c);
        else if (is_plain(c))
            fwrite(start, 1, (size_t)(text - start), out);
        else
            fprintf(out, "\\U%08X", (unsigned)c);
    }
    fputc('"', out);
}

static size_t least_of(size_t a, size_t b)
{
    return a < b ? a : b;
}

size_t sel_text_distance(const char *a, const char *b)
{
    /* Rows i-2, i-1 and i of the table: d[i][j] = edits from a[0..i) to b[0..j). */
    size_t rows[3][WORD_MAX + 1];
    size_t *before = rows[0], *last = rows[1], *row = rows[2];
    const size_t n = strlen(a), m = least_of(strlen(b), WORD_MAX);

    for (size_t j = 0; j <= m; j++) last[j] = before[j] = j;
    for (size_t i = 1; i <= n; i++) {
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            const size_t change = last[j - 1] + (a[i - 1] != b[j - 1]);
            row[j] = least_of(change, least_of(last[j], row[j - 1]) + 1);
            const bool swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
            if (swapped) row[j] = least_of(row[j], before[j - 2] + 1);
        }
        size_t *spare = before;
        before = last;
        last = row;
        row = spare;
    }
    return last[m];
}
