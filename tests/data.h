/* data.h: what the tests of core/data share: files, made-up text, models. */
#ifndef SEL_TESTS_DATA_H
#define SEL_TESTS_DATA_H

#include <stdbool.h>
#include <stdint.h>
#include <zlib.h>

#include "core/base/rng.h"
#include "core/data/tokenizer.h"
#include "tests/folder.h"

static inline bool says(const char *part) { return strstr(sel_error(), part) != NULL; }

/* The call fails so, and its line holds part. */
#define CHECK_FAILS(call, status, part)                                                              \
    do {                                                                                             \
        const sel_status fails_rc_ = (call);                                                         \
        CHECK(fails_rc_ == (status), "returned %d: %s", (int)fails_rc_, sel_error());                \
        CHECK(says(part), "expected \"%s\" in: %s", (part), sel_error());                            \
    } while (0)

static inline void put_gz(const char *path, const char *text)
{
    gzFile f = gzopen(path, "wb");
    CHECK(f && gzwrite(f, text, (unsigned)strlen(text)) == (int)strlen(text), "%s", path);
    gzclose(f);
}

static inline uint32_t random_below(uint64_t i, uint32_t n)
{
    uint32_t r[4];
    sel_philox(r, 7, 11, i);
    return r[0] % n;
}

/* Words of a made-up language, so that a tokenizer finds pieces; *bytes of text, NUL-terminated. */
static inline char *make_text(uint64_t seed, size_t bytes)
{
    static const char *const parts[] = {"ka", "lo", "mi", "ter", "san", "be", "ru", "th", "ing", "pol", "en", "du"};
    char *text = malloc(bytes + 1);
    size_t n = 0;
    for (uint64_t i = seed << 32; n < bytes; i++) {
        const uint32_t what = random_below(i, 40);
        const char *s = what < 12 ? " " : what == 12 ? ".\n" : what == 13 ? ", " : parts[what % 12];
        for (; *s && n < bytes; s++) text[n++] = *s;
    }
    text[n] = '\0';
    return text;
}

typedef struct { const char *text; size_t bytes; int left; sel_status fail; } texts;

static inline int next_text(void *ctx, const char **text, size_t *bytes)
{
    texts *t = ctx;
    if (t->left-- <= 0) return t->fail;
    *text = t->text;
    *bytes = t->bytes;
    return 1;
}

static inline sel_status train(const char *kind, int64_t vocab, const char *text, const char *output)
{
    texts t = {text, strlen(text), 1, SEL_OK};
    const sel_tokenizer_options o = {.vocab = vocab, .kind = kind, .sample_bytes = 1 << 20, .seed = 1, .threads = 2};
    return sel_tokenizer_train(&o, next_text, &t, output);
}

/* A .model written by hand, field by field (protocol buffer), as another tool may give it. */
typedef struct { char bytes[4 << 20]; size_t n; } message;

static inline void put_field(message *m, int number, const char *block, size_t n)
{
    m->bytes[m->n++] = (char)(number << 3 | 2);
    for (size_t v = n;; v >>= 7) {
        m->bytes[m->n++] = (char)((v & 0x7f) | (v > 0x7f ? 0x80 : 0));
        if (v <= 0x7f) break;
    }
    memcpy(m->bytes + m->n, block, n);
    m->n += n;
}

static inline void put_piece(message *m, const char *piece, int type)
{
    char block[80];
    const float score = -1.0f;
    const int n = snprintf(block, sizeof block, "\x0a%c%s", (int)strlen(piece), piece);
    size_t end = (size_t)n;
    block[end++] = 0x15;
    memcpy(block + end, &score, 4);
    end += 4;
    block[end++] = 0x18;
    block[end++] = (char)type;
    put_field(m, 1, block, end);
}

#endif
