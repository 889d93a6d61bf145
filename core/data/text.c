/* UTF-8: validity (RFC 3629: no overlong forms, no surrogates, nothing past U+10FFFF) and cutting long texts. */
#include "core/data/text.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

static bool is_tail(unsigned char c) { return (c & 0xc0) == 0x80; }

/* Bytes of the character at s, 0 if none is valid there. */
static size_t character(const unsigned char *s, size_t bytes)
{
    const unsigned char c = s[0];

    if (c < 0x80) return 1;
    if (c < 0xc2 || c > 0xf4) return 0;
    if (bytes < 2) return 0;
    if (c < 0xe0) return is_tail(s[1]) ? 2 : 0;

    /* The second byte's range excludes overlong forms, surrogates and what lies past U+10FFFF. */
    const unsigned char low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
    const unsigned char high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
    if (s[1] < low || s[1] > high) return 0;
    if (bytes < 3 || !is_tail(s[2])) return 0;
    if (c < 0xf0) return 3;
    return bytes >= 4 && is_tail(s[3]) ? 4 : 0;
}

size_t sel_text_valid(const char *text, size_t bytes)
{
    const unsigned char *s = (const unsigned char *)text;
    size_t i = 0;

    while (i < bytes) {
        uint64_t eight;
        while (bytes - i >= sizeof eight) {
            memcpy(&eight, s + i, sizeof eight);
            if (eight & 0x8080808080808080u) break;
            i += sizeof eight;
        }
        if (i == bytes) break;
        const size_t n = character(s + i, bytes - i);
        if (n == 0) break;
        i += n;
    }
    return i;
}

size_t sel_text_cut(const char *text, size_t bytes)
{
    if (bytes <= SEL_TEXT_PART) return bytes;

    const size_t half = SEL_TEXT_PART / 2;
    const char *line = memrchr(text + half, '\n', SEL_TEXT_PART - half);
    if (line) return (size_t)(line + 1 - text);

    /* Before a run of spaces: pieces begin with the space, and a run may be one piece. */
    for (size_t i = SEL_TEXT_PART; i > half; i--)
        if (text[i] == ' ' && text[i - 1] != ' ') return i;

    size_t i = SEL_TEXT_PART;
    while (i > SEL_TEXT_PART - 3 && is_tail((unsigned char)text[i])) i--;
    return i;
}
