/* core_tokenizer.c: cutting texts, training, encoding and decoding. */
#include "core/data/text.h"
#include "tests/data.h"

/* --- text ------------------------------------------------------------------------------------------------- */

static void test_text(void)
{
    static const struct { const char *text; size_t valid; } cases[] = {
        {"", 0}, {"plain text of more than eight", 29}, {"\xc3\xa9", 2}, {"\xe2\x82\xac!", 4}, {"\xf0\x9f\x98\x80", 4},
        {"a\xc0\x80", 1}, {"a\xed\xa0\x80", 1}, {"a\xf4\x90\x80\x80", 1}, {"ab\xe2\x82", 2}, {"\x80", 0},
        {"\xe0\x80\x80", 0}, {"\xf0\x80\x80\x80", 0}, {"\xf8\x88\x80\x80\x80", 0}, {"12345678\xff", 8},
        {"\xf4\x8f\xbf\xbf", 4},
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
    CHECK(back && back_bytes == bytes && memcmp(back, text, bytes) == 0 && back[bytes] == '\0',
          "%s: %zu bytes came back as %zu: \"%.60s\" as \"%.60s\"", what, bytes, back_bytes, text, back ? back : "");
    free(back);
    free(ids);
    return n;
}

/* A character of any kind, UTF-8 into out; its length. */
static size_t random_character(uint64_t i, char *out)
{
    static const uint32_t likely[] = {' ', ' ', '\n', '\t', '\r', 0, 0x2581, 0x2585, 0x2047, 0xfffd, 0xfeff,
                                      0xa0, 0x3000};
    const uint32_t kind = random_below(2 * i, 8), r = random_below(2 * i + 1, 1u << 30);
    uint32_t c = kind < 3   ? likely[r % (sizeof likely / sizeof *likely)]
                 : kind < 5 ? 'a' + r % 26
                 : kind < 6 ? r % 0x800
                 : kind < 7 ? r % 0x10000
                            : r % 0x110000;
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
        "", " ", "   ", "\n", "\n\n\n", "\t\t", "a", " a", "a ", "  a  b  ", "line\nline\r\n", "<s>", "</s>", "<unk>",
        "<0x41>",
        "x<s>y</s> <unk><0x0A>", "\xe2\x96\x81", " \xe2\x96\x81 \xe2\x96\x81\xe2\x96\x81", "a\xe2\x96\x81\x62",
        "\xe2\x96\x85 \xe2\x81\x87", "\xf0\x9f\x98\x80\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x92\xbb",
        "\xe6\x97\xa5\xe6\x9c\xac\xe8\xaa\x9e", "\xef\xbb\xbf\x62om", "\xe2\x96", "\xff\xfe bytes \xed\xa0\x80",
        "kalomi teren, san",
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
    CHECK(sel_tokenizer_size(t) == 400 && sel_tokenizer_bos(t) == 1 && sel_tokenizer_eos(t) == 2,
          "%s: %lld pieces, BOS %d, EOS %d", kind, (long long)sel_tokenizer_size(t), sel_tokenizer_bos(t),
          sel_tokenizer_eos(t));
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
    CHECK(crc == sel_tokenizer_crc32(t) && size == (int64_t)held, "crc %08x of %zu bytes", sel_tokenizer_crc32(t),
          held);
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

static void test_given_model(void)
{
    static message m;
    const char *path = in_folder("given.model");
    const char *const pieces[] = {"\xe2\x96\x81", "a", "b", "\xe2\x96\x81\x61\x62"};
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

int main(void)
{
    make_folder();
    test_text();
    test_trained("bpe");
    test_trained("unigram");
    test_training_errors();
    test_given_model();
    CHECK_OK(sel_remove_tree(folder));
    return check_verdict();
}
