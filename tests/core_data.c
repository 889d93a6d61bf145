/* core_data.c: documents, packing, corpora, sampling. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "core/data/corpus.h"
#include "core/data/documents.h"
#include "core/data/pack.h"
#include "core/data/text.h"
#include "tests/data.h"

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
    put_text(all[2], "{\"text\": \"five\\u0000\\n\", \"n\": 123456789012345678901234567890}\n\n  \n{\"text\":\"\"}\n"
                     "{\"text\":\"six\"}");
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
        CHECK_FAILS(join(&gz, 1, &files, out), SEL_EFILE, "broken.txt.gz");
        CHECK(out[0] == '\0', "a file cut off at %zu bytes gave a document", keep);
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
            CHECK(got && bytes == n && memcmp(got, line, n) == 0, "document %d has %zu bytes, not %zu", document, bytes,
                  n);
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
    CHECK(strlen(out) > 300000 + SEL_TEXT_PART && strstr(out, text + 100000), "a long file came back as %zu bytes",
          strlen(out));
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
    CHECK_OK(train("bpe", 300, text, in_folder("other.model")));
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
    int64_t at = 0, documents = 0, total = 0, expected = 0;

    CHECK_OK(sel_corpus_open(&c, dir));
    if (!c) return;
    CHECK_OK(sel_corpus_verify(c));
    CHECK_OK(sel_documents_open(&d, inputs, 3, &o));
    while (sel_documents_next(d, &text, &bytes) == SEL_OK && text) {
        CHECK_OK(sel_tokenizer_encode(tokenizer, text, bytes, &ids, &n, &capacity));
        for (size_t i = 0; i <= n && at < sel_corpus_tokens(c); i++, at++) {
            CHECK_OK(sel_corpus_window(c, 1, at, two, NULL));
            if (two[1] != (i < n ? ids[i] : sel_tokenizer_eos(tokenizer))) {
                CHECK(false, "document %" PRId64 ", token %zu is %d", documents, i, two[1]);
                break;
            }
        }
        documents++;
        total += (int64_t)bytes;
        expected += (int64_t)n + 1;
    }
    CHECK(at == expected && expected == sel_corpus_tokens(c), "%" PRId64 " tokens, not %" PRId64, at, expected);
    CHECK(documents == sel_corpus_documents(c) && total == sel_corpus_bytes(c),
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

/* Packs in a child: killed after some microseconds (0: left alone), files limited to some bytes (0: not).  Its exit
   status, or -1 when it was killed. */
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
            const uint32_t longest = 30000 + 10000 * (uint32_t)attempt;
            const useconds_t wait = 500 + random_below((uint64_t)(round * 1000 + attempt), longest);
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
    CHECK_OK(sel_tokenizer_open(&other, in_folder("other.model")));
    if (other) CHECK_FAILS(pack_to(again, other, 3, 1, shard), SEL_EUSER, "another tokenizer");
    sel_tokenizer_close(&other);
    const int lock = open(again, O_RDONLY | O_DIRECTORY);
    CHECK(flock(lock, LOCK_EX) == 0, "flock: %s", strerror(errno));
    CHECK_FAILS(pack_to(again, tokenizer, 3, 1, shard), SEL_EUSER, "another process");
    close(lock);
    FILE *ends = fopen(in_folder("again/documents.bin.tmp"), "ab");   /* as if killed between the ends and the state */
    CHECK(ends && fwrite("beyond the state", 1, 16, ends) == 16, "%s", strerror(errno));
    if (ends) fclose(ends);
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
        int64_t n;
        CHECK_OK(sel_corpus_window(c, 4, 0, window, &n));
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
        CHECK_OK(sel_corpus_window(c, 1, i, two, NULL));
        stream[i] = two[1];
    }
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        const int64_t N = sizes[k], windows = sel_corpus_windows(c, N), tail = sel_corpus_tail(c, N);
        CHECK(windows * N + tail == T && tail < N, "N %" PRId64 ": %" PRId64 " windows, tail %" PRId64, N, windows,
              tail);
        int64_t wrong = 0;
        for (int64_t w = 0; w <= windows; w++) {
            int64_t n = 0;
            wrong += sel_corpus_window(c, N, w, out, &n) != SEL_OK;
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
    CHECK(c && crc == sel_corpus_crc32(c), "the index's checksum");
    CHECK(c && sel_corpus_tokenizer_crc32(c) == sel_tokenizer_crc32(tokenizer), "the tokenizer's checksum");
    CHECK(c && strcmp(sel_corpus_dir(c), dir) == 0 && sel_corpus_vocab(c) == 400 && sel_corpus_eos(c) == 2, "values");
    sel_corpus_close(&c);
    CHECK_FAILS(sel_corpus_open(&c, in_folder("nowhere")), SEL_EUSER, "nowhere");
    CHECK_FAILS(sel_corpus_open(&c, folder), SEL_EUSER, "no index.json");
    free((void *)(uintptr_t)dir);
    free((void *)(uintptr_t)shard);
}

/* Every window exactly once an epoch, whatever the batch; epochs and seeds in other orders. */
static void test_sampler(void)
{
    static const struct { int64_t windows, batch; } cases[] = {{1, 1}, {1, 4}, {7, 3}, {64, 8}, {1000, 7}, {1000, 1000},
                                                               {5, 16}};

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
        CHECK(sel_sample_window(5, 1, i, 500, 500) == sel_sample_window(5, i / 10 + 1, i % 10, 10, 500),
              "the batch's size matters at sample %" PRId64, i);
    }
    CHECK(differ > 400 && in_order < 50, "%d differ between seeds, %d stay in place", differ, in_order);
}

int main(void)
{
    make_folder();
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
