/* core_data.c: tokenizer, documents, packing, corpora, sampling. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>

#include "core/base/file.h"
#include "core/base/rng.h"
#include "core/data/corpus.h"
#include "core/data/documents.h"
#include "core/data/pack.h"
#include "core/data/text.h"
#include "core/data/tokenizer.h"
#include "tests/check.h"

static char folder[64] = "/tmp/selectra-data-XXXXXX";

/* Paths in the test's folder, a few alive at a time. */
static const char *in_folder(const char *name)
{
    static char paths[16][SEL_PATH_MAX];
    static int next;
    char *path = paths[next++ % 16];

    snprintf(path, SEL_PATH_MAX, "%s/%s", folder, name);
    return path;
}

static bool says(const char *part) { return strstr(sel_error(), part) != NULL; }

/* The call fails so, and its line holds part. */
#define CHECK_FAILS(call, status, part)                                                              \
    do {                                                                                             \
        const sel_status fails_rc_ = (call);                                                         \
        CHECK(fails_rc_ == (status), "returned %d: %s", (int)fails_rc_, sel_error());                \
        CHECK(says(part), "expected \"%s\" in: %s", (part), sel_error());                            \
    } while (0)

static void put(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, bytes, f) == bytes, "%s", path);
    if (f) fclose(f);
}

static void put_text(const char *path, const char *text) { put(path, text, strlen(text)); }

static void put_gz(const char *path, const char *text)
{
    gzFile f = gzopen(path, "wb");
    CHECK(f && gzwrite(f, text, (unsigned)strlen(text)) == (int)strlen(text), "%s", path);
    gzclose(f);
}

static uint32_t random_below(uint64_t i, uint32_t n)
{
    uint32_t r[4];
    sel_philox(r, 7, 11, i);
    return r[0] % n;
}

/* Words of a made-up language, so that a tokenizer finds pieces; *bytes of text, NUL-terminated. */
static char *make_text(uint64_t seed, size_t bytes)
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

/* --- text ------------------------------------------------------------------------------------------------- */

static void test_text(void)
{
    static const struct { const char *text; size_t valid; } cases[] = {
        {"", 0}, {"plain text of more than eight", 29}, {"\xc3\xa9", 2}, {"\xe2\x82\xac!", 4}, {"\xf0\x9f\x98\x80", 4},
        {"a\xc0\x80", 1}, {"a\xed\xa0\x80", 1}, {"a\xf4\x90\x80\x80", 1}, {"ab\xe2\x82", 2}, {"\x80", 0},
        {"\xe0\x80\x80", 0}, {"\xf0\x80\x80\x80", 0}, {"\xf8\x88\x80\x80\x80", 0}, {"12345678\xff", 8}, {"\xf4\x8f\xbf\xbf", 4},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const size_t valid = sel_text_valid(cases[i].text, strlen(cases[i].text));
        CHECK(valid == cases[i].valid, "case %zu: %zu, not %zu", i, valid, cases[i].valid);
    }

    const size_t n = 3 * SEL_TEXT_PART;
    char *text = malloc(n);
    memset(text, 'x', n);
    CHECK(sel_text_cut(text, SEL_TEXT_PART) == SEL_TEXT_PART, "a whole part");
    CHECK(sel_text_cut(text, n) == SEL_TEXT_PART, "nowhere to cut");
    text[50000] = text[50001] = ' ';
    CHECK(sel_text_cut(text, n) == 50000, "before the spaces");
    text[40000] = '\n';
    CHECK(sel_text_cut(text, n) == 40001, "after the line");
    for (size_t i = 0; i + 2 < n; i += 3) memcpy(text + i, "\xe2\x82\xac", 3);
    CHECK(sel_text_cut(text, n) == SEL_TEXT_PART - 1, "between characters");
    for (size_t i = 0; i < n; i += 997) text[i] = i % 2 ? ' ' : '\n';
    for (size_t bytes = SEL_TEXT_PART + 1; bytes < n; bytes = bytes * 5 / 4)
        CHECK(sel_text_cut(text, bytes) == sel_text_cut(text, n), "the cut depends on %zu bytes", bytes);
    free(text);
}

/* --- tokenizer -------------------------------------------------------------------------------------------- */

typedef struct { const char *text; size_t bytes; int left; sel_status fail; } texts;

static int next_text(void *ctx, const char **text, size_t *bytes)
{
    texts *t = ctx;
    if (t->left-- <= 0) return t->fail;
    *text = t->text;
    *bytes = t->bytes;
    return 1;
}

static sel_status train(const char *kind, int64_t vocab, const char *text, const char *output)
{
    texts t = {text, strlen(text), 1, SEL_OK};
    const sel_tokenizer_options o = {.vocab = vocab, .kind = kind, .sample_bytes = 1 << 20, .seed = 1, .threads = 2};
    return sel_tokenizer_train(&o, next_text, &t, output);
}

/* decode(encode(x)) = x; returns the number of ids. */
static size_t check_round_trip(const sel_tokenizer *t, const char *text, size_t bytes, const char *what)
{
    int32_t *ids = NULL;
    size_t n = 0, capacity = 0, back_bytes = 0;
    char *back = NULL;

    CHECK_OK(sel_tokenizer_encode(t, text, bytes, &ids, &n, &capacity));
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 3 || ids[i] >= sel_tokenizer_size(t)) {
            CHECK(false, "%s: id %d among the ids", what, ids[i]);
            break;
        }
    CHECK_OK(sel_tokenizer_decode(t, ids, n, &back, &back_bytes));
    CHECK(back && back_bytes == bytes && memcmp(back, text, bytes) == 0 && back[bytes] == '\0', "%s: %zu bytes came back "
          "as %zu: \"%.60s\" as \"%.60s\"", what, bytes, back_bytes, text, back ? back : "");
    free(back);
    free(ids);
    return n;
}

/* A character of any kind, UTF-8 into out; its length. */
static size_t random_character(uint64_t i, char *out)
{
    static const uint32_t likely[] = {' ', ' ', '\n', '\t', '\r', 0, 0x2581, 0x2585, 0x2047, 0xfffd, 0xfeff, 0xa0, 0x3000};
    const uint32_t kind = random_below(2 * i, 8), r = random_below(2 * i + 1, 1u << 30);
    uint32_t c = kind < 3 ? likely[r % (sizeof likely / sizeof *likely)] : kind < 5 ? 'a' + r % 26 : kind < 6 ? r % 0x800
                 : kind < 7 ? r % 0x10000 : r % 0x110000;
    if (c >= 0xd800 && c < 0xe000) c = 0x1f600;

    if (c < 0x80) return out[0] = (char)c, 1;
    if (c < 0x800) return out[0] = (char)(0xc0 | c >> 6), out[1] = (char)(0x80 | (c & 63)), 2;
    if (c < 0x10000) {
        out[0] = (char)(0xe0 | c >> 12), out[1] = (char)(0x80 | (c >> 6 & 63)), out[2] = (char)(0x80 | (c & 63));
        return 3;
    }
    out[0] = (char)(0xf0 | c >> 18), out[1] = (char)(0x80 | (c >> 12 & 63));
    out[2] = (char)(0x80 | (c >> 6 & 63)), out[3] = (char)(0x80 | (c & 63));
    return 4;
}

static void check_round_trips(const sel_tokenizer *t)
{
    static const char *const hard[] = {
        "", " ", "   ", "\n", "\n\n\n", "\t\t", "a", " a", "a ", "  a  b  ", "line\nline\r\n", "<s>", "</s>", "<unk>", "<0x41>",
        "x<s>y</s> <unk><0x0A>", "\xe2\x96\x81", " \xe2\x96\x81 \xe2\x96\x81\xe2\x96\x81", "a\xe2\x96\x81""b",
        "\xe2\x96\x85 \xe2\x81\x87", "\xf0\x9f\x98\x80\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x92\xbb",
        "\xe6\x97\xa5\xe6\x9c\xac\xe8\xaa\x9e", "\xef\xbb\xbf""bom", "\xe2\x96", "\xff\xfe bytes \xed\xa0\x80", "kalomi teren, san",
    };
    for (size_t i = 0; i < sizeof hard / sizeof *hard; i++) check_round_trip(t, hard[i], strlen(hard[i]), "hard text");
    check_round_trip(t, "a\0b\0\0", 5, "NUL bytes");

    char text[512];
    for (uint64_t k = 0; k < 400; k++) {
        size_t n = 0;
        for (uint64_t i = 0; i < 1 + k % 100; i++) n += random_character(k * 1000 + i, text + n);
        check_round_trip(t, text, n, "random text");
    }
    for (uint64_t k = 0; k < 100; k++) {   /* not UTF-8 */
        for (uint64_t i = 0; i < 40; i++) text[i] = (char)random_below(k * 50 + i, 256);
        check_round_trip(t, text, 40, "random bytes");
    }

    /* A long text is the sum of its parts. */
    char *lengthy = make_text(3, 200000);
    check_round_trip(t, lengthy, 200000, "long text");
    int32_t *all = NULL, *part = NULL;
    size_t n_all, n_part, capacity = 0, part_capacity = 0, sum = 0, parts = 0;
    CHECK_OK(sel_tokenizer_encode(t, lengthy, 200000, &all, &n_all, &capacity));
    for (size_t at = 0, cut; at < 200000; at += cut, parts++) {
        cut = sel_text_cut(lengthy + at, 200000 - at);
        CHECK_OK(sel_tokenizer_encode_part(t, lengthy + at, cut, at == 0, &part, &n_part, &part_capacity));
        CHECK(sum + n_part <= n_all && memcmp(all + sum, part, n_part * sizeof *part) == 0, "part at %zu differs", at);
        sum += n_part;
    }
    CHECK(sum == n_all && parts > 3, "%zu ids in %zu parts, %zu in the whole", sum, parts, n_all);
    free(all);
    free(part);
    memset(lengthy, 'q', 200000);
    check_round_trip(t, lengthy, 200000, "long text without a place to cut");
    free(lengthy);
}

static void test_trained(const char *kind)
{
    char *text = make_text(1, 60000);
    const char *path = in_folder("trained.model");
    sel_tokenizer *t = NULL;

    CHECK_OK(train(kind, 400, text, path));
    CHECK_OK(sel_tokenizer_open(&t, path));
    if (!t) return;
    CHECK(sel_tokenizer_size(t) == 400 && sel_tokenizer_bos(t) == 1 && sel_tokenizer_eos(t) == 2, "%s: %lld pieces, %d, %d",
          kind, (long long)sel_tokenizer_size(t), sel_tokenizer_bos(t), sel_tokenizer_eos(t));
    check_round_trips(t);
    CHECK(check_round_trip(t, "\n\n\n", 3, "newlines") == 3, "a newline costs more than one token");
    const size_t n = check_round_trip(t, text, 60000, "its own text");
    CHECK(n < 60000 / 2, "%s: %zu tokens for 60000 bytes", kind, n);

    const int32_t outside[] = {5, 400};
    char *back;
    size_t bytes;
    CHECK_FAILS(sel_tokenizer_decode(t, outside, 2, &back, &bytes), SEL_EUSER, "token id 400");
    CHECK_FAILS(sel_tokenizer_decode(t, (const int32_t[]){-1}, 1, &back, &bytes), SEL_EUSER, "token id -1");
    const int32_t marks[] = {1, 300, 2};
    CHECK_OK(sel_tokenizer_decode(t, marks, 3, &back, &bytes));
    CHECK(bytes > 0 && !strstr(back, "<s>") && !strstr(back, "</s>"), "BOS and EOS gave text: %s", back);
    free(back);

    uint32_t crc;
    int64_t size;
    size_t held;
    sel_tokenizer_bytes(t, &held);
    CHECK_OK(sel_file_crc32(path, &crc, &size));
    CHECK(crc == sel_tokenizer_crc32(t) && size == (int64_t)held, "crc %08x of %zu bytes", sel_tokenizer_crc32(t), held);
    sel_tokenizer_close(&t);
    CHECK(t == NULL, "closed");
    free(text);
}

static void test_training_errors(void)
{
    char *text = make_text(2, 3000), most[8];
    const char *path = in_folder("refused.model");

    CHECK_FAILS(train("unigram", 50000, text, path), SEL_EUSER, "50000 pieces is too large for this sample: at most ");
    const char *number = strstr(sel_error(), "at most ");
    snprintf(most, sizeof most, "%s", number ? number + strlen("at most ") : "0");
    CHECK(!sel_path_exists(path), "a refused training left %s", path);
    CHECK_OK(train("unigram", strtol(most, NULL, 10), text, path));   /* the number named is right */
    CHECK_OK(train("unigram", 260, text, path));                    /* the least */
    sel_tokenizer *t = NULL;
    CHECK_OK(sel_tokenizer_open(&t, path));
    if (t) check_round_trip(t, "kalo mi", 7, "bytes and the space alone");
    sel_tokenizer_close(&t);

    CHECK_FAILS(train("unigram", 259, text, path), SEL_EUSER, "expected 260");
    CHECK_FAILS(train("words", 300, text, path), SEL_EUSER, "words");
    CHECK_FAILS(train("unigram", 300, "", path), SEL_EUSER, "no text");
    CHECK_FAILS(train("unigram", 300, "a\xff", path), SEL_EFILE, "UTF-8");
    CHECK_FAILS(train("unigram", 300, text, "/nowhere/x.model"), SEL_EUSER, "/nowhere");
    texts broken = {text, 3000, 2, SEL_EFILE};
    const sel_tokenizer_options o = {.vocab = 300, .kind = "bpe", .sample_bytes = 9999, .threads = 1};
    CHECK(sel_tokenizer_train(&o, next_text, &broken, path) == SEL_EFILE, "a failing source");
    free(text);

    /* Text that names the specials, an alphabet larger than the vocabulary, no white space at all. */
    char strange[30000];
    size_t n = 0;
    for (uint32_t i = 0; n < sizeof strange - 40; i++) {
        const uint32_t c = 0x4e00 + random_below(i, 900);
        n += (size_t)sprintf(strange + n, "%c%c%c<0x41><s></s>", (int)(0xe0 | c >> 12), (int)(0x80 | (c >> 6 & 63)),
                             (int)(0x80 | (c & 63)));
    }
    CHECK_OK(train("unigram", 330, strange, path));
    CHECK_OK(sel_tokenizer_open(&t, path));
    if (t) check_round_trips(t);
    sel_tokenizer_close(&t);
}

/* A .model written by hand, field by field (protocol buffer), as another tool may give it. */
typedef struct { char bytes[4 << 20]; size_t n; } message;

static void put_field(message *m, int number, const char *block, size_t n)
{
    m->bytes[m->n++] = (char)(number << 3 | 2);
    for (size_t v = n;; v >>= 7) {
        m->bytes[m->n++] = (char)((v & 0x7f) | (v > 0x7f ? 0x80 : 0));
        if (v <= 0x7f) break;
    }
    memcpy(m->bytes + m->n, block, n);
    m->n += n;
}

static void put_piece(message *m, const char *piece, int type)
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

static void test_given_model(void)
{
    static message m;
    const char *path = in_folder("given.model");
    const char *const pieces[] = {"\xe2\x96\x81", "a", "b", "\xe2\x96\x81""ab"};
    sel_tokenizer *t = NULL;
    int32_t *ids = NULL;
    size_t n, capacity = 0, bytes;
    char *text;

    m.n = 0;
    put_piece(&m, "<unk>", 2);
    put_piece(&m, "<s>", 3);
    put_piece(&m, "</s>", 3);
    for (size_t i = 0; i < 4; i++) put_piece(&m, pieces[i], 1);
    const size_t pieces_end = m.n;
    put_field(&m, 2, "\x18\x01", 2);                        /* trainer_spec: unigram */
    put_field(&m, 3, "\x0a\x08identity\x18\x01\x20\x00", 14);   /* normalizer_spec: dummy prefix, nothing squeezed */
    put(path, m.bytes, m.n);
    CHECK_OK(sel_tokenizer_open(&t, path));
    if (!t) return;

    CHECK_OK(sel_tokenizer_encode(t, "ab zb", 5, &ids, &n, &capacity));
    const int32_t expected[] = {6, 3, 0, 5};   /* "_ab", "_", unknown, "b" */
    CHECK(n == 4 && memcmp(ids, expected, sizeof expected) == 0, "%zu ids, first %d", n, n ? ids[0] : -1);
    CHECK_OK(sel_tokenizer_decode(t, ids, n, &text, &bytes));
    CHECK(strcmp(text, "ab  \xe2\x81\x87 b") == 0, "\"%s\"", text);
    free(text);
    CHECK_FAILS(sel_tokenizer_encode(t, "a\xff", 2, &ids, &n, &capacity), SEL_EFILE, "not valid UTF-8");
    const char *const kept[] = {"ab", " ab", "  ab ", "b a  ab", " "};
    for (size_t i = 0; i < 5; i++) check_round_trip(t, kept[i], strlen(kept[i]), "dummy prefix");
    char *lengthy = malloc(150000);
    for (size_t i = 0; i < 150000; i++) lengthy[i] = "ab ba"[i % 5];
    check_round_trip(t, lengthy, 150000, "dummy prefix once, in a long text");
    free(lengthy);
    sel_tokenizer_close(&t);

    /* Cut off in the middle, between two pieces, and no model at all. */
    put(path, m.bytes, m.n - 5);
    CHECK_FAILS(sel_tokenizer_open(&t, path), SEL_EFILE, "given.model");
    put(path, m.bytes, pieces_end);
    CHECK_FAILS(sel_tokenizer_open(&t, path), SEL_EFILE, "cut off");
    put_text(path, "this is no model");
    CHECK_FAILS(sel_tokenizer_open(&t, path), SEL_EFILE, "not a SentencePiece model");
    put_text(path, "");
    CHECK_FAILS(sel_tokenizer_open(&t, path), SEL_EFILE, "not a SentencePiece model");
    CHECK_FAILS(sel_tokenizer_open(&t, in_folder("missing.model")), SEL_EUSER, "missing.model");
    free(ids);
}

/* --- documents -------------------------------------------------------------------------------------------- */

/* All documents of some inputs, each followed by '|', or the error. */
static sel_status join(const char *const *paths, int n, const sel_documents_options *o, char *out)
{
    sel_documents *d = NULL;
    const char *text;
    size_t bytes, at = 0;
    sel_status rc = sel_documents_open(&d, paths, n, o);

    while (rc == SEL_OK && (rc = sel_documents_next(d, &text, &bytes)) == SEL_OK && text) {
        memcpy(out + at, text, bytes);
        at += bytes;
        out[at++] = '|';
    }
    out[at] = '\0';
    sel_documents_close(&d);
    return rc;
}

static void test_documents(void)
{
    static char out[1 << 20];
    const sel_documents_options files = {0}, lines = {.lines = true}, field = {.field = "body"};
    const char *const all[] = {in_folder("a.txt"), in_folder("b.txt.gz"), in_folder("c.jsonl"), in_folder("d.json.gz"),
                               in_folder("empty.txt"), in_folder("plain")};

    put_text(all[0], "one\ntwo\n");
    put_gz(all[1], "three\r\n\r\nfour");
    put_text(all[2], "{\"text\": \"five\\u0000\\n\", \"n\": 123456789012345678901234567890}\n\n  \n{\"text\":\"\"}\n{\"text\":\"six\"}");
    put_gz(all[3], "\xef\xbb\xbf{\"url\":\"x\",\"text\":\"se\\u00e9ven\"}\r\n");
    put_text(all[4], "");
    put_gz(all[5], "eight");   /* gzip by content */

    CHECK_OK(join(all, 6, &files, out));
    CHECK(memcmp(out, "one\ntwo\n|three\r\n\r\nfour|five\0\n|six|se\xc3\xa9ven|eight|", 49) == 0, "\"%s\"", out);
    CHECK_OK(join(all, 2, &lines, out));
    CHECK(strcmp(out, "one|two|three|four|") == 0, "\"%s\"", out);

    const char *bad = in_folder("bad.jsonl");
    put_text(bad, "{\"body\":\"x\"}\n\n{\"text\":\"y\"}\n");
    CHECK_FAILS(join(&bad, 1, &field, out), SEL_EFILE, "bad.jsonl:3: the object has no field \"body\"");
    CHECK_FAILS(join(&bad, 1, &files, out), SEL_EFILE, "bad.jsonl:1: the object has no field \"text\"");
    put_text(bad, "{\"text\":\"x\"}\n{\"text\":\n");
    CHECK_FAILS(join(&bad, 1, &files, out), SEL_EFILE, "bad.jsonl:2: bad JSON");
    put_text(bad, "{\"text\":7}\n");
    CHECK_FAILS(join(&bad, 1, &files, out), SEL_EFILE, "bad.jsonl:1: the field \"text\" is not a string");
    put_text(bad, "[1]\n");
    CHECK_FAILS(join(&bad, 1, &files, out), SEL_EFILE, "bad.jsonl:1: expected a JSON object");

    const char *latin = in_folder("latin.txt");
    put_text(latin, "fine\nfine\ncaf\xe9 latin\n");
    CHECK_FAILS(join(&latin, 1, &files, out), SEL_EFILE, "latin.txt:3: byte 0xe9 at offset 13");
    CHECK_FAILS(join(&latin, 1, &lines, out), SEL_EFILE, "latin.txt:3: byte 0xe9 at offset 13");

    CHECK_FAILS(join((const char *const[]){all[0], in_folder("nope.txt")}, 2, &files, out), SEL_EUSER, "nope.txt");
    CHECK(out[0] == '\0', "read before all inputs were known to be there");
    CHECK_FAILS(join((const char *const[]){folder}, 1, &files, out), SEL_EUSER, "is a folder");
    CHECK_FAILS(join(all, 0, &files, out), SEL_EUSER, "no input");

    /* gzip cut off, flipped, and only by name. */
    char *data, *text = make_text(5, 300000);
    size_t bytes;
    const char *gz = in_folder("broken.txt.gz");
    put_gz(gz, text);
    CHECK_OK(sel_read_file(gz, &data, &bytes));
    for (size_t keep = 1; keep < bytes; keep = keep * 3 + 7) {
        put(gz, data, keep);
        CHECK_FAILS(join(&gz, 1, &lines, out), SEL_EFILE, "broken.txt.gz");
    }
    put(gz, data, bytes - 1);
    CHECK_FAILS(join(&gz, 1, &files, out), SEL_EFILE, "broken.txt.gz");
    data[bytes / 2] ^= 0x55;
    put(gz, data, bytes);
    CHECK_FAILS(join(&gz, 1, &lines, out), SEL_EFILE, "broken.txt.gz");
    put_text(gz, "plain text");
    CHECK_FAILS(join(&gz, 1, &lines, out), SEL_EFILE, "is not a gzip file");
    free(data);

    /* Long lines and files, whole and in parts; seeking to every document. */
    const char *lengthy = in_folder("long.txt");
    for (size_t i = 0; i < 300000; i++)
        if (text[i] == '\n' && (i < 100000 || i > 230000)) text[i] = ' ';
    text[299999] = '\n';
    for (size_t i = SEL_TEXT_PART - 4; i < SEL_TEXT_PART + 4; i++) {   /* line ends around a part's length */
        FILE *f = fopen(lengthy, "wb");
        fprintf(f, "%.*s\r\nshort\n\n\r\n%s", (int)i, text + 231000, text);
        fclose(f);
        sel_documents *d = NULL;
        const char *got, *line = text;
        CHECK_OK(sel_documents_open(&d, &lengthy, 1, &lines));
        CHECK_OK(sel_documents_next(d, &got, &bytes));
        CHECK(bytes == i && memcmp(got, text + 231000, i) == 0, "%zu bytes, not %zu", bytes, i);
        CHECK_OK(sel_documents_next(d, &got, &bytes));
        CHECK(bytes == 5 && memcmp(got, "short", 5) == 0, "%zu bytes", bytes);
        for (int document = 0; *line; document++) {
            int file;
            int64_t number;
            sel_documents_tell(d, &file, &number);
            if (document % 700 == 0) CHECK_OK(sel_documents_seek(d, file, number));
            CHECK_OK(sel_documents_next(d, &got, &bytes));
            const size_t n = (size_t)(strchr(line, '\n') - line);
            CHECK(got && bytes == n && memcmp(got, line, n) == 0, "document %d has %zu bytes, not %zu", document, bytes, n);
            if (!got) break;
            for (line += n; *line == '\n'; line++) {}
        }
        CHECK_OK(sel_documents_next(d, &got, &bytes));
        CHECK(!got, "a document too many");
        int64_t done, total;
        sel_documents_progress(d, &done, &total);
        CHECK(done == total && total > 300000, "%" PRId64 " of %" PRId64 " bytes", done, total);
        CHECK_FAILS(sel_documents_seek(d, 0, 1 << 20), SEL_EFILE, "lines now");
        sel_documents_close(&d);
    }
    CHECK_OK(join(&lengthy, 1, &files, out));
    CHECK(strlen(out) > 300000 + SEL_TEXT_PART && strstr(out, text + 100000), "a long file came back as %zu bytes", strlen(out));
    free(text);
}

/* --- packing ---------------------------------------------------------------------------------------------- */

static const char *model_path, *inputs[3];
static sel_tokenizer *tokenizer;

/* JSON lines, lines of text, and one file that is a document of several parts. */
static void make_inputs(void)
{
    char *text = make_text(9, 400000);
    const char *jsonl = in_folder("in.jsonl.gz");
    gzFile f = gzopen(jsonl, "wb");
    for (size_t at = 0, i = 0; at < 150000; i++) {
        const size_t n = 1 + random_below(i, 900);
        char *line = strndup(text + at, n);
        json_t *o = json_pack("{s:s, s:i}", "text", line, "i", (int)i);
        char *json = json_dumps(o, JSON_COMPACT);
        gzprintf(f, "%s\n", json);
        free(json);
        json_decref(o);
        free(line);
        at += n;
    }
    gzclose(f);
    inputs[0] = strdup(jsonl);
    inputs[1] = strdup(in_folder("in-small.txt"));
    inputs[2] = strdup(in_folder("in-large.txt"));
    put_text(inputs[1], "a small document\nof two lines");
    put(inputs[2], text + 150000, 250000);
    model_path = strdup(in_folder("pack.model"));
    CHECK_OK(train("unigram", 400, text, model_path));
    CHECK_OK(sel_tokenizer_open(&tokenizer, model_path));
    free(text);
}

static sel_status pack_to(const char *output, const sel_tokenizer *t, int n_inputs, int threads, int64_t shard_tokens)
{
    const sel_documents_options o = {0};
    const sel_pack_options p = {.threads = threads, .shard_tokens = shard_tokens};
    sel_documents *d = NULL;
    sel_status rc = sel_documents_open(&d, inputs, n_inputs, &o);

    if (rc == SEL_OK) rc = sel_pack(d, t, output, &p);
    sel_documents_close(&d);
    return rc;
}

/* Both folders hold the same files with the same bytes. */
static void check_same(const char *a, const char *b, int shards)
{
    char name[64], path_a[SEL_PATH_MAX], path_b[SEL_PATH_MAX];

    for (int i = 0; i < shards + 3; i++) {
        const char *const last[] = {"index.json", "documents.bin", "tokenizer.model"};
        char *x = NULL, *y = NULL;
        size_t n = 0, m = 0;
        snprintf(name, sizeof name, "shard-%05d.bin", i);
        CHECK_OK(sel_path_join(path_a, a, i < shards ? name : last[i - shards]));
        CHECK_OK(sel_path_join(path_b, b, i < shards ? name : last[i - shards]));
        CHECK_OK(sel_read_file(path_a, &x, &n));
        CHECK_OK(sel_read_file(path_b, &y, &m));
        CHECK(x && y && n == m && memcmp(x, y, n) == 0, "%s and %s differ", path_a, path_b);
        free(x);
        free(y);
    }
}

/* The stream as the header promises it: every document's ids, then EOS. */
static void check_stream(const char *dir)
{
    const sel_documents_options o = {0};
    sel_documents *d = NULL;
    sel_corpus *c = NULL;
    const char *text;
    size_t bytes, n, capacity = 0;
    int32_t *ids = NULL, two[2];
    int64_t at = 0, documents = 0, total = 0;

    CHECK_OK(sel_corpus_open(&c, dir));
    if (!c) return;
    CHECK_OK(sel_corpus_verify(c));
    CHECK_OK(sel_documents_open(&d, inputs, 3, &o));
    while (sel_documents_next(d, &text, &bytes) == SEL_OK && text) {
        CHECK_OK(sel_tokenizer_encode(tokenizer, text, bytes, &ids, &n, &capacity));
        for (size_t i = 0; i <= n && at < sel_corpus_tokens(c); i++, at++) {
            sel_corpus_window(c, 1, at, two);
            if (two[1] != (i < n ? ids[i] : sel_tokenizer_eos(tokenizer))) {
                CHECK(false, "document %" PRId64 ", token %zu is %d", documents, i, two[1]);
                break;
            }
        }
        documents++;
        total += (int64_t)bytes;
    }
    CHECK(at == sel_corpus_tokens(c) && documents == sel_corpus_documents(c) && total == sel_corpus_bytes(c),
          "%" PRId64 " tokens, %" PRId64 " documents, %" PRId64 " bytes", at, documents, total);
    free(ids);
    sel_documents_close(&d);
    sel_corpus_close(&c);
}

static int shards_of(const char *dir)
{
    sel_corpus *c = NULL;
    CHECK_OK(sel_corpus_open(&c, dir));
    const int n = c ? (int)sel_corpus_shards(c) : 0;
    sel_corpus_close(&c);
    return n;
}

/* Packs in a child: killed after some microseconds (0: left alone), files limited to some bytes (0: not).  Its exit status,
   or -1 when it was killed. */
static int pack_in_child(const char *output, int threads, int64_t shard_tokens, useconds_t kill_after, rlim_t largest)
{
    const pid_t child = fork();
    int status;

    if (child == 0) {
        if (largest) {
            signal(SIGXFSZ, SIG_IGN);
            setrlimit(RLIMIT_FSIZE, &(struct rlimit){largest, largest});
        }
        const sel_status rc = pack_to(output, tokenizer, 3, threads, shard_tokens);
        _exit(rc == SEL_OK ? 0 : rc == SEL_EIO && strstr(sel_error(), output) ? 3 : 4);
    }
    if (kill_after) {
        usleep(kill_after);
        kill(child, SIGKILL);
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void test_pack(void)
{
    const char *one = strdup(in_folder("one")), *four = strdup(in_folder("four")), *again = strdup(in_folder("again"));
    const int64_t shard = 6000;

    CHECK_OK(pack_to(one, tokenizer, 3, 1, shard));
    CHECK_OK(pack_to(four, tokenizer, 3, 4, shard));
    const int shards = shards_of(one);
    CHECK(shards > 5, "%d shards", shards);
    check_same(one, four, shards);
    check_stream(one);
    CHECK(!sel_path_exists(in_folder("one/pack-state.json")), "the state was left");
    CHECK_FAILS(pack_to(one, tokenizer, 3, 1, shard), SEL_EUSER, "complete packed corpus");

    /* Killed at any moment, then the same call: the same bytes. */
    int killed = 0, resumed = 0;
    for (int round = 0; round < 3; round++) {
        CHECK_OK(sel_remove_tree(again));
        for (int attempt = 0; attempt < 200; attempt++) {
            const useconds_t wait = 500 + random_below((uint64_t)(round * 1000 + attempt), 20000 + 3000 * (uint32_t)attempt);
            if (pack_in_child(again, 1 + attempt % 3, shard, wait, 0) == 0) break;
            killed++;
            resumed += sel_path_exists(in_folder("again/shard-00000.bin"));
        }
        check_same(one, again, shards);
    }
    CHECK(killed >= 3 && resumed >= 1, "killed %d times, %d of them after a shard", killed, resumed);

    /* No room for a shard: an error that names the folder, and what is whole stays and counts. */
    CHECK_OK(sel_remove_tree(again));
    CHECK(pack_in_child(again, 2, shard, 0, 20000) == 3, "a full disk gave another outcome");
    CHECK(sel_path_exists(in_folder("again/shard-00000.bin")), "nothing was kept");
    sel_corpus *c = NULL;
    CHECK_FAILS(sel_corpus_open(&c, again), SEL_EUSER, "interrupted");
    CHECK_FAILS(pack_to(again, tokenizer, 2, 1, shard), SEL_EUSER, "begun with 3 inputs");
    CHECK_FAILS(pack_to(again, tokenizer, 3, 1, shard + 1), SEL_EUSER, "another shard_tokens");
    const char *held = inputs[1];
    inputs[1] = inputs[2];
    CHECK_FAILS(pack_to(again, tokenizer, 3, 1, shard), SEL_EUSER, "other inputs (number 2: ");
    inputs[1] = held;
    sel_tokenizer *other = NULL;
    CHECK_OK(sel_tokenizer_open(&other, in_folder("trained.model")));
    if (other) CHECK_FAILS(pack_to(again, other, 3, 1, shard), SEL_EUSER, "another tokenizer");
    sel_tokenizer_close(&other);
    const int lock = open(again, O_RDONLY | O_DIRECTORY);
    CHECK(flock(lock, LOCK_EX) == 0, "flock: %s", strerror(errno));
    CHECK_FAILS(pack_to(again, tokenizer, 3, 1, shard), SEL_EUSER, "another process");
    close(lock);
    CHECK_OK(pack_to(again, tokenizer, 3, 2, shard));
    check_same(one, again, shards);

    /* A shard that the state counts has gone. */
    CHECK_OK(sel_remove_tree(again));
    CHECK(pack_in_child(again, 2, shard, 0, 20000) == 3, "a full disk gave another outcome");
    CHECK(truncate(in_folder("again/shard-00000.bin"), 100) == 0, "truncate");
    CHECK_FAILS(pack_to(again, tokenizer, 3, 1, shard), SEL_EFILE, "missing or short");

    /* Nothing to pack, a bad input, a folder of something else: nothing is left, nothing is touched. */
    const char *saved = inputs[0], *none = in_folder("none");
    inputs[0] = in_folder("empty.txt");
    CHECK_FAILS(pack_to(none, tokenizer, 1, 2, shard), SEL_EUSER, "no document");
    CHECK(!sel_path_exists(none), "an empty corpus was left");
    inputs[0] = in_folder("latin.txt");
    CHECK_FAILS(pack_to(none, tokenizer, 1, 2, shard), SEL_EFILE, "latin.txt:3");
    CHECK(!sel_path_exists(none), "a failed corpus was left");
    inputs[0] = saved;
    CHECK_FAILS(pack_to(folder, tokenizer, 3, 1, shard), SEL_EUSER, "other files");
    CHECK_FAILS(pack_to(model_path, tokenizer, 3, 1, shard), SEL_EUSER, "not a folder");

    /* 70,000 pieces do not fit two bytes. */
    static message m;
    m.n = 0;
    put_piece(&m, "<unk>", 2);
    put_piece(&m, "<s>", 3);
    put_piece(&m, "</s>", 3);
    put_piece(&m, "\xe2\x96\x81", 1);
    for (int i = 0; i < 70000; i++) {
        char piece[16];
        snprintf(piece, sizeof piece, "w%d", i);
        put_piece(&m, piece, 1);
    }
    put_field(&m, 2, "\x18\x01", 2);
    put_field(&m, 3, "\x0a\x08identity\x18\x00\x20\x00", 14);
    put(in_folder("wide.model"), m.bytes, m.n);
    put_text(in_folder("wide.txt"), "w69999 w0");
    CHECK_OK(sel_tokenizer_open(&other, in_folder("wide.model")));
    inputs[0] = in_folder("wide.txt");
    const char *wide = in_folder("wide");
    if (other) CHECK_OK(pack_to(wide, other, 1, 1, shard));
    inputs[0] = saved;
    int32_t window[5];
    CHECK_OK(sel_corpus_open(&c, wide));
    if (c) {
        const int64_t n = sel_corpus_window(c, 4, 0, window);
        CHECK(n == 4 && window[0] == 1 && window[1] == 4 + 69999 && window[2] == 3 && window[3] == 4 && window[4] == 2,
              "%d %d %d %d", window[0], window[1], window[2], window[3]);
        CHECK_OK(sel_corpus_verify(c));
    }
    sel_corpus_close(&c);
    sel_tokenizer_close(&other);
    free((void *)(uintptr_t)one);
    free((void *)(uintptr_t)four);
    free((void *)(uintptr_t)again);
}

/* --- corpora ---------------------------------------------------------------------------------------------- */

/* Windows of every kind of N against the stream read token by token. */
static void test_windows(void)
{
    sel_corpus *c = NULL;
    CHECK_OK(sel_corpus_open(&c, in_folder("one")));
    if (!c) return;
    const int64_t T = sel_corpus_tokens(c), sizes[] = {1, 2, 7, 512, 2999, 3001, 10000, T - 1, T, T + 1};
    int32_t *stream = malloc((size_t)T * sizeof *stream), *out = malloc((size_t)(T + 2) * sizeof *out), two[2];

    for (int64_t i = 0; i < T; i++) {
        sel_corpus_window(c, 1, i, two);
        stream[i] = two[1];
    }
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        const int64_t N = sizes[k], windows = sel_corpus_windows(c, N), tail = sel_corpus_tail(c, N);
        CHECK(windows * N + tail == T && tail < N, "N %" PRId64 ": %" PRId64 " windows, tail %" PRId64, N, windows, tail);
        int64_t wrong = 0;
        for (int64_t w = 0; w <= windows; w++) {
            const int64_t n = sel_corpus_window(c, N, w, out);
            wrong += n != (w < windows ? N : tail) || out[0] != 1;
            for (int64_t i = 0; i < N; i++) wrong += out[1 + i] != (i < n ? stream[w * N + i] : -1);
        }
        CHECK(wrong == 0, "N %" PRId64 ": %" PRId64 " wrong", N, wrong);
    }
    free(stream);
    free(out);
    sel_corpus_close(&c);
}

/* Replaces one value of the index and restores the file after the check. */
static void check_bad_index(const char *dir, const char *from, const char *to, sel_status status, const char *part)
{
    char path[SEL_PATH_MAX], *text = NULL, changed[8192];
    size_t bytes;
    sel_corpus *c = NULL;

    CHECK_OK(sel_path_join(path, dir, "index.json"));
    CHECK_OK(sel_read_file(path, &text, &bytes));
    const char *at = strstr(text, from);
    CHECK(at, "no %s in the index", from);
    if (!at) return;
    snprintf(changed, sizeof changed, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    put_text(path, changed);
    CHECK_FAILS(sel_corpus_open(&c, dir), status, part);
    sel_corpus_close(&c);
    put(path, text, bytes);
    free(text);
}

static void test_damage(void)
{
    const char *dir = strdup(in_folder("one")), *shard = strdup(in_folder("one/shard-00003.bin"));
    sel_corpus *c = NULL;
    char *data;
    size_t bytes;

    check_bad_index(dir, "selectra-packed-1", "something", SEL_EUSER, "is not a packed corpus");
    check_bad_index(dir, "\"tokens\": ", "\"tokens\": 1", SEL_EFILE, "tokens");
    check_bad_index(dir, "\"bos\": 1", "\"bos\": 400", SEL_EFILE, "\"bos\"");
    check_bad_index(dir, "\"token_bytes\": 2", "\"token_bytes\": 3", SEL_EFILE, "3 bytes a token");
    check_bad_index(dir, "\"token_bytes\": 2", "\"token_bytes\": 4", SEL_EFILE, "shard-00000.bin");
    check_bad_index(dir, "\"documents\": ", "\"documents\": 9", SEL_EFILE, "documents.bin");
    check_bad_index(dir, "shard-00003.bin", "../one/shard-00003.bin", SEL_EFILE, "plain name");
    check_bad_index(dir, "{", "", SEL_EFILE, "bad JSON");
    check_bad_index(dir, "\"vocab\": 400,", "", SEL_EFILE, "\"vocab\" is missing");

    CHECK_OK(sel_read_file(shard, &data, &bytes));
    put(shard, data, bytes - 2);
    CHECK_FAILS(sel_corpus_open(&c, dir), SEL_EFILE, "shard-00003.bin: has ");
    data[bytes / 2] ^= 1;
    put(shard, data, bytes);
    CHECK_OK(sel_corpus_open(&c, dir));
    if (c) CHECK_FAILS(sel_corpus_verify(c), SEL_EFILE, "shard-00003.bin: damaged");
    sel_corpus_close(&c);
    data[bytes / 2] ^= 1;
    unlink(shard);
    CHECK_FAILS(sel_corpus_open(&c, dir), SEL_EFILE, "shard-00003.bin");
    put(shard, data, bytes);
    free(data);

    /* An id outside the vocabulary, under a right checksum. */
    check_bad_index(dir, "\"vocab\": 400", "\"vocab\": 2", SEL_EFILE, "\"eos\"");
    char *text = NULL, path[SEL_PATH_MAX], changed[8192];
    CHECK_OK(sel_path_join(path, dir, "index.json"));
    CHECK_OK(sel_read_file(path, &text, &bytes));
    char *at = strstr(text, "\"vocab\": 400");
    snprintf(changed, sizeof changed, "%.*s\"vocab\": 300%s", (int)(at - text), text, at + strlen("\"vocab\": 400"));
    put_text(path, changed);
    CHECK_OK(sel_corpus_open(&c, dir));
    if (c) CHECK_FAILS(sel_corpus_verify(c), SEL_EFILE, "the vocabulary has 300");
    sel_corpus_close(&c);
    put(path, text, bytes);
    free(text);

    CHECK_OK(sel_corpus_open(&c, dir));
    uint32_t crc;
    int64_t size;
    CHECK_OK(sel_file_crc32(path, &crc, &size));
    CHECK(c && crc == sel_corpus_crc32(c) && sel_corpus_tokenizer_crc32(c) == sel_tokenizer_crc32(tokenizer), "checksums");
    CHECK(c && strcmp(sel_corpus_dir(c), dir) == 0 && sel_corpus_vocab(c) == 400 && sel_corpus_eos(c) == 2, "its values");
    sel_corpus_close(&c);
    CHECK_FAILS(sel_corpus_open(&c, in_folder("nowhere")), SEL_EUSER, "nowhere");
    CHECK_FAILS(sel_corpus_open(&c, folder), SEL_EUSER, "no index.json");
    free((void *)(uintptr_t)dir);
    free((void *)(uintptr_t)shard);
}

/* Every window exactly once an epoch, whatever the batch; epochs and seeds in other orders. */
static void test_sampler(void)
{
    static const struct { int64_t windows, batch; } cases[] = {{1, 1}, {1, 4}, {7, 3}, {64, 8}, {1000, 7}, {1000, 1000}, {5, 16}};

    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        const int64_t W = cases[k].windows, B = cases[k].batch;
        int *seen = calloc((size_t)W, sizeof *seen);
        int64_t moved = 0, wrong = 0;
        for (int64_t g = 0; g < 3 * W; g++) {
            const int64_t w = sel_sample_window(5, g / B + 1, g % B, B, W);
            if (w < 0 || w >= W || seen[w] != g / W) {
                wrong++;
                continue;
            }
            seen[w]++;
            const int64_t next_epoch = g + W, other = sel_sample_window(5, next_epoch / B + 1, next_epoch % B, B, W);
            moved += other != w;
        }
        CHECK(wrong == 0, "%" PRId64 " windows, batch %" PRId64 ": %" PRId64 " wrong", W, B, wrong);
        if (W >= 64) CHECK(moved > W, "epochs repeat: %" PRId64 " of %" PRId64 " moved", moved, 3 * W);
        free(seen);
    }
    int differ = 0, in_order = 0;
    for (int64_t i = 0; i < 500; i++) {
        differ += sel_sample_window(5, 1, i, 500, 500) != sel_sample_window(6, 1, i, 500, 500);
        in_order += sel_sample_window(5, 1, i, 500, 500) == i;
        CHECK(sel_sample_window(5, 1, i, 500, 500) == sel_sample_window(5, i / 10 + 1, i % 10, 10, 500), "batch matters");
    }
    CHECK(differ > 400 && in_order < 50, "%d differ between seeds, %d stay in place", differ, in_order);
}

int main(void)
{
    if (!mkdtemp(folder)) {
        perror(folder);
        return EXIT_FAILURE;
    }
    test_text();
    test_trained("bpe");
    test_trained("unigram");
    test_training_errors();
    test_given_model();
    test_documents();
    make_inputs();
    if (tokenizer) {
        test_pack();
        test_windows();
        test_damage();
    }
    test_sampler();
    sel_tokenizer_close(&tokenizer);
    for (int i = 0; i < 3; i++) free((void *)(uintptr_t)inputs[i]);
    free((void *)(uintptr_t)model_path);
    CHECK_OK(sel_remove_tree(folder));
    return check_verdict();
}
