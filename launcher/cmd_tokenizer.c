/* selectra tokenizer train|encode|decode: SentencePiece models. */
#include <ctype.h>
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/clock.h"
#include "core/data/documents.h"
#include "core/data/tokenizer.h"
#include "launcher/launcher.h"
#include "launcher/options.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

/* --- train ------------------------------------------------------------------------------------------------ */

typedef struct {
    sel_documents *documents;
    int64_t texts, bytes;
} source;

static int next_text(void *ctx, const char **text, size_t *bytes)
{
    source *s = ctx;
    bool last;
    const sel_status rc = sel_documents_part(s->documents, text, bytes, &last);

    if (rc != SEL_OK) return (int)rc;
    if (!*text) return 0;
    s->texts += last;
    s->bytes += (int64_t)*bytes;
    return 1;
}

static int train(int argc, char **argv)
{
    int64_t vocab = 8192, sample_bytes = 64000000, threads = 0, seed = 0;
    const char *output = NULL, *kind = "unigram", *field = "text";
    bool lines = false;
    const sel_option options[] = {
        {"vocab", SEL_OPT_INTEGER, &vocab, 1, "V", "pieces, 3 specials and 256 bytes among them (8192)"},
        {"output", SEL_OPT_TEXT, &output, 0, "FILE.model", "where the model goes"},
        {"kind", SEL_OPT_TEXT, &kind, 0, "KIND", "unigram or bpe (unigram)"},
        {"sample-bytes", SEL_OPT_INTEGER, &sample_bytes, 1, "N", "text to train on, spread over the inputs (64000000)"},
        {"seed", SEL_OPT_INTEGER, &seed, 0, "N", "which sample (0)"},
        {"threads", SEL_OPT_INTEGER, &threads, 0, "N", "threads (those the process may use)"},
        {"lines", SEL_OPT_FLAG, &lines, 0, NULL, "text files hold a document a line"},
        {"field", SEL_OPT_TEXT, &field, 0, "NAME", "the text's field in JSON lines (text)"},
    };
    const sel_command command = {
        "selectra tokenizer train", "--vocab V --output FILE.model [OPTIONS] INPUT...",
        "Trains a SentencePiece model on .txt[.gz] and .jsonl[.gz], .json.gz files.", options, COUNT(options)};
    int n;
    cpu_set_t set;
    source s = {0};

    const int status = sel_options_begin(&command, argc, argv, 1, -1, &n);
    if (status >= 0) return status;
    if (!output) return sel_options_mistake(&command, "--output FILE.model is missing");
    if (threads == 0) threads = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    if (threads > 128) threads = 128;   /* as many as SentencePiece takes */

    const sel_documents_options o = {.lines = lines, .field = field};
    sel_status rc = sel_documents_open(&s.documents, (const char *const *)argv + 1, n, &o);
    if (rc != SEL_OK) return sel_options_failed(&command, rc);

    const double started = sel_now();
    const sel_tokenizer_options t = {
        .vocab = vocab, .kind = kind, .sample_bytes = sample_bytes, .seed = (uint64_t)seed, .threads = (int)threads};
    rc = sel_tokenizer_train(&t, next_text, &s, output);
    sel_documents_close(&s.documents);
    if (rc != SEL_OK) return sel_options_failed(&command, rc);

    char count[32], took[32];
    sel_format_count(count, (double)s.bytes);
    sel_format_duration(took, sel_now() - started);
    printf("%s: %lld %s pieces from %lld documents (%s bytes of text) in %s\n", output, (long long)vocab, kind,
           (long long)s.texts, count, took);
    return 0;
}

/* --- encode, decode --------------------------------------------------------------------------------------- */

typedef sel_status line_fn(const sel_tokenizer *t, const char *line, size_t bytes, void *scratch);

typedef struct {
    int32_t *ids;
    size_t n, capacity;
} id_list;

static sel_status encode_line(const sel_tokenizer *t, const char *line, size_t bytes, void *scratch)
{
    id_list *l = scratch;

    SEL_TRY(sel_tokenizer_encode(t, line, bytes, &l->ids, &l->n, &l->capacity));
    for (size_t i = 0; i < l->n; i++) printf(i == 0 ? "%d" : " %d", (int)l->ids[i]);
    putchar('\n');
    return SEL_OK;
}

static sel_status decode_line(const sel_tokenizer *t, const char *line, size_t bytes, void *scratch)
{
    id_list *l = scratch;
    const char *end = line + bytes;

    l->n = 0;
    for (const char *p = line;;) {
        while (p < end && isspace((unsigned char)*p)) p++;
        if (p == end) break;
        char *after;
        errno = 0;
        const long id = strtol(p, &after, 10);
        if (after == p || (after < end && !isspace((unsigned char)*after)) || errno || id < INT32_MIN || id > INT32_MAX)
            return sel_fail(SEL_EUSER, "expected token ids, found \"%.20s\"", p);
        if (l->n == l->capacity) {
            const size_t grown = l->capacity ? 2 * l->capacity : 1024;
            int32_t *moved = realloc(l->ids, grown * sizeof *moved);
            if (!moved) return sel_fail(SEL_ENOMEM, "no memory for %zu token ids", grown);
            l->ids = moved;
            l->capacity = grown;
        }
        l->ids[l->n++] = (int32_t)id;
        p = after;
    }

    char *text;
    size_t n;
    SEL_TRY(sel_tokenizer_decode(t, l->ids, l->n, &text, &n));
    fwrite(text, 1, n, stdout);
    putchar('\n');
    free(text);
    return SEL_OK;
}

static sel_status each_line(const sel_tokenizer *t, FILE *in, const char *path, line_fn *f)
{
    char *line = NULL;
    size_t capacity = 0;
    id_list scratch = {0};
    sel_status rc = SEL_OK;
    ssize_t n;

    errno = 0;
    for (long long number = 1; rc == SEL_OK && (n = getline(&line, &capacity, in)) >= 0; number++) {
        if (n > 0 && line[n - 1] == '\n') line[--n] = '\0';
        rc = f(t, line, (size_t)n, &scratch);
        if (rc != SEL_OK) {
            char why[1024];
            snprintf(why, sizeof why, "%s", sel_error());
            rc = sel_fail(rc, "%s:%lld: %s", path, number, why);
        }
    }
    if (rc == SEL_OK && ferror(in)) rc = sel_fail(SEL_EIO, "%s: %s", path, strerror(errno));
    if (rc == SEL_OK && (fflush(stdout) != 0 || ferror(stdout)))
        rc = sel_fail(SEL_EIO, "standard output: %s", strerror(errno));
    free(scratch.ids);
    free(line);
    return rc;
}

static int convert(const char *name, const char *about, line_fn *f, int argc, char **argv)
{
    const char *model = NULL;
    const sel_option options[] = {{"model", SEL_OPT_TEXT, &model, 0, "FILE.model", "the SentencePiece model"}};
    const sel_command command = {name, "--model FILE.model [FILE]", about, options, COUNT(options)};
    int n;
    sel_tokenizer *t = NULL;

    const int status = sel_options_begin(&command, argc, argv, 0, 1, &n);
    if (status >= 0) return status;
    if (!model) return sel_options_mistake(&command, "--model FILE.model is missing");
    sel_status rc = sel_tokenizer_open(&t, model);
    if (rc != SEL_OK) return sel_options_failed(&command, rc);

    const bool file = n == 1 && strcmp(argv[1], "-") != 0;
    FILE *in = file ? fopen(argv[1], "r") : stdin;
    rc = in ? each_line(t, in, file ? argv[1] : "standard input", f)
            : sel_fail(SEL_EUSER, "%s: %s", argv[1], strerror(errno));
    if (file && in) fclose(in);
    sel_tokenizer_close(&t);
    return rc == SEL_OK ? 0 : sel_options_failed(&command, rc);
}

static int encode(int argc, char **argv)
{
    return convert("selectra tokenizer encode", "Prints one line of token ids for each line of text.", encode_line,
                   argc, argv);
}

static int decode(int argc, char **argv)
{
    return convert("selectra tokenizer decode", "Prints one line of text for each line of token ids.", decode_line,
                   argc, argv);
}

int sel_cmd_tokenizer(int argc, char **argv)
{
    static const char *const names[] = {"train", "encode", "decode"};
    static int (*const run[])(int argc, char **argv) = {train, encode, decode};
    const char *word = argc > 1 ? argv[1] : NULL;

    if (!word || strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
        fprintf(word ? stdout : stderr,
                "usage: selectra tokenizer train --vocab V --output FILE.model [OPTIONS] INPUT...\n"
                "       selectra tokenizer encode --model FILE.model [FILE]\n"
                "       selectra tokenizer decode --model FILE.model [FILE]\n"
                "\n--help after one of them tells more.\n");
        return word ? SEL_EXIT_DONE : SEL_EXIT_USER;
    }
    for (int i = 0; i < COUNT(names); i++)
        if (strcmp(word, names[i]) == 0) return run[i](argc - 1, argv + 1);

    const char *near = sel_options_nearest(word, names, COUNT(names));
    fprintf(stderr, "selectra tokenizer: %s: no such command%s%s%s\n", word, near ? "; did you mean " : "",
            near ? near : "", near ? "?" : " (--help lists them)");
    return SEL_EXIT_USER;
}
