/* selectra data pack|info|batch: packed corpora. */
#include <jansson.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/config/config.h"
#include "core/data/corpus.h"
#include "core/data/pack.h"
#include "launcher/launcher.h"
#include "launcher/options.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

/* Prints JSON on one line of stdout and frees it; the exit status (main.c sees whether it arrived). */
static int print_json(const sel_command *c, json_t *root)
{
    if (!root) return sel_options_failed(c, sel_fail(SEL_ENOMEM, "no memory for the JSON object"));
    json_dumpf(root, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(root);
    return SEL_EXIT_DONE;
}

/* --- pack ------------------------------------------------------------------------------------------------- */

typedef struct {
    bool terminal;
    bool started;
    double shown;           /* when the last line was printed */
    double from_seconds;    /* of the first call: an earlier call's work does not count for the rate */
    int64_t from_done, from_tokens;
} progress;

/* On a terminal one line that is rewritten, else a line every 10 seconds. */
static void show_progress(void *ctx, int64_t done, int64_t total, int64_t tokens, double seconds)
{
    progress *p = ctx;
    char count[32], rate[32], left[32];

    if (!p->started) {
        p->started = true;
        p->shown = p->from_seconds = seconds;
        p->from_done = done;
        p->from_tokens = tokens;
    }
    if (seconds - p->shown < (p->terminal ? 0.2 : 10.0)) return;
    p->shown = seconds;

    const double elapsed = seconds - p->from_seconds;
    const double eta = done > p->from_done ? elapsed * (double)(total - done) / (double)(done - p->from_done) : -1.0;
    sel_format_count(count, (double)tokens);
    sel_format_count(rate, (double)(tokens - p->from_tokens) / elapsed);
    sel_format_duration(left, eta);
    fprintf(stderr, "%s%5.1f%%  %s tokens  %s tokens/s  ETA %s%s", p->terminal ? "\r" : "",
            total > 0 ? 100.0 * (double)done / (double)total : 100.0, count, rate, left, p->terminal ? "\033[K" : "\n");
    fflush(stderr);
}

static sel_status pack_inputs(const char *model, const char *output, const sel_pack_options *p,
                              const sel_documents_options *o, char **inputs, int n)
{
    sel_tokenizer *t = NULL;
    sel_documents *d = NULL;

    sel_status rc = sel_tokenizer_open(&t, model);
    if (rc == SEL_OK) rc = sel_documents_open(&d, (const char *const *)inputs, n, o);
    if (rc == SEL_OK) rc = sel_pack(d, t, output, p);
    sel_documents_close(&d);
    sel_tokenizer_close(&t);
    return rc;
}

static int pack(int argc, char **argv)
{
    int64_t threads = 0, shard_tokens = (int64_t)1 << 26;
    const char *model = NULL, *output = NULL, *field = "text";
    bool lines = false;
    const sel_option options[] = {
        {"tokenizer", SEL_OPT_TEXT, &model, 0, "FILE.model", "the SentencePiece model"},
        {"output", SEL_OPT_TEXT, &output, 0, "DIR", "the packed corpus, a new or empty folder"},
        {"lines", SEL_OPT_FLAG, &lines, 0, NULL, "text files hold a document a line"},
        {"field", SEL_OPT_TEXT, &field, 0, "NAME", "the text's field in JSON lines (text)"},
        {"threads", SEL_OPT_INTEGER, &threads, 0, "N", "tokenizing threads (the processors it may use)"},
        {"shard-tokens", SEL_OPT_INTEGER, &shard_tokens, 1, "N", "a shard ends with the document that reaches N"},
    };
    const sel_command command = {
        "selectra data pack", "--tokenizer FILE.model --output DIR [OPTIONS] INPUT...",
        "Tokenizes documents into a packed corpus.  .txt[.gz]: a document a file (--lines: a line);\n"
        ".jsonl[.gz], .json.gz: a document a line.  Interrupted, the same command goes on after the last whole shard.",
        options, COUNT(options)};
    int n;
    cpu_set_t set;

    const int status = sel_options_begin(&command, argc, argv, 1, -1, &n);
    if (status >= 0) return status;
    if (!model) return sel_options_mistake(&command, "--tokenizer FILE.model is missing");
    if (!output) return sel_options_mistake(&command, "--output DIR is missing");
    if (threads > 4096) return sel_options_mistake(&command, "--threads: expected 4096 or less");
    if (threads == 0) threads = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;

    progress shown = {.terminal = isatty(STDERR_FILENO) == 1};
    const sel_documents_options o = {.lines = lines, .field = field};
    const sel_pack_options p = {
        .threads = (int)threads, .shard_tokens = shard_tokens, .progress = show_progress, .ctx = &shown};
    const double started = sel_now();
    sel_corpus *c = NULL;
    sel_status rc = pack_inputs(model, output, &p, &o, argv + 1, n);
    if (shown.terminal) fputs("\r\033[K", stderr);
    if (rc == SEL_OK) rc = sel_corpus_open(&c, output);
    if (rc != SEL_OK) return sel_options_failed(&command, rc);

    char took[32];
    sel_format_duration(took, sel_now() - started);
    printf("%s: %lld tokens, %lld documents, %lld bytes of text, %lld shards in %s\n", output,
           (long long)sel_corpus_tokens(c), (long long)sel_corpus_documents(c), (long long)sel_corpus_bytes(c),
           (long long)sel_corpus_shards(c), took);
    sel_corpus_close(&c);
    return 0;
}

/* --- info ------------------------------------------------------------------------------------------------- */

static int info(int argc, char **argv)
{
    bool json = false, verify = false;
    const sel_option options[] = {
        {"json", SEL_OPT_FLAG, &json, 0, NULL, "one JSON object"},
        {"verify", SEL_OPT_FLAG, &verify, 0, NULL, "read every shard and compare checksums"},
    };
    const sel_command command = {"selectra data info", "DIR [--json] [--verify]", "Describes a packed corpus.", options,
                                 COUNT(options)};
    int n;
    sel_corpus *c = NULL;

    const int status = sel_options_begin(&command, argc, argv, 1, 1, &n);
    if (status >= 0) return status;
    sel_status rc = sel_corpus_open(&c, argv[1]);
    if (rc == SEL_OK && verify) rc = sel_corpus_verify(c);
    if (rc != SEL_OK) {
        sel_corpus_close(&c);
        return sel_options_failed(&command, rc);
    }

    const int64_t tokens = sel_corpus_tokens(c), documents = sel_corpus_documents(c), bytes = sel_corpus_bytes(c);
    int exit_status = 0;
    if (json) {
        json_t *root = json_pack(
            "{s:s, s:I, s:I, s:I, s:I, s:I, s:i, s:i, s:I, s:I, s:b}", "dir", argv[1], "tokens", (json_int_t)tokens,
            "documents", (json_int_t)documents, "bytes", (json_int_t)bytes, "shards", (json_int_t)sel_corpus_shards(c),
            "vocab", (json_int_t)sel_corpus_vocab(c), "bos", sel_corpus_bos(c), "eos", sel_corpus_eos(c), "crc32",
            (json_int_t)sel_corpus_crc32(c), "tokenizer_crc32", (json_int_t)sel_corpus_tokenizer_crc32(c), "verified",
            verify);
        exit_status = print_json(&command, root);
    } else {
        printf("tokens      %lld\n", (long long)tokens);
        printf("documents   %lld (%.1f tokens each)\n", (long long)documents, (double)tokens / (double)documents);
        printf("text        %lld bytes (%.3f a token)\n", (long long)bytes, (double)bytes / (double)tokens);
        printf("shards      %lld%s\n", (long long)sel_corpus_shards(c), verify ? ", checksums right" : "");
        printf("vocabulary  %lld pieces, BOS %d, EOS %d\n", (long long)sel_corpus_vocab(c), sel_corpus_bos(c),
               sel_corpus_eos(c));
        printf("checksums   index %08x, tokenizer %08x\n", sel_corpus_crc32(c), sel_corpus_tokenizer_crc32(c));
    }
    sel_corpus_close(&c);
    return exit_status;
}

/* --- batch ------------------------------------------------------------------------------------------------ */

/* What step S of a configuration trains on, sample by sample. */
static int show_batch(const sel_command *command, const sel_config *config, const sel_corpus *c, int64_t step,
                      bool json)
{
    const int64_t N = config->model.context, batch = config->train.batch, windows = sel_corpus_windows(c, N);

    if (windows < 1)
        return sel_options_mistake(command, "%s: %lld tokens are less than one window of model.context %lld",
                                 sel_corpus_dir(c), (long long)sel_corpus_tokens(c), (long long)N);
    int32_t *ids = malloc((size_t)(N + 1) * sizeof *ids);
    json_t *list = json_array(), *samples = json_array();
    if (!ids || !list || !samples) {
        free(ids);
        json_decref(list);
        json_decref(samples);
        sel_options_mistake(command, "no memory for a window of %lld tokens", (long long)N);
        return sel_exit_status(SEL_ENOMEM);
    }

    for (int64_t b = 0; b < batch; b++) {
        const int64_t w = sel_sample_window((uint64_t)config->run.seed, step, b, batch, windows);
        const sel_status rc = sel_corpus_window(c, N, w, ids, NULL);
        if (rc != SEL_OK) {
            free(ids);
            json_decref(list);
            json_decref(samples);
            return sel_options_failed(command, rc);
        }
        if (json) {
            json_t *row = json_array();
            for (int64_t i = 0; i <= N; i++) json_array_append_new(row, json_integer(ids[i]));
            json_array_append_new(list, json_integer(w));
            json_array_append_new(samples, row);
        } else {
            printf("window %lld:", (long long)w);
            for (int64_t i = 0; i <= N; i++) printf(" %d", ids[i]);
            putchar('\n');
        }
    }
    free(ids);
    json_t *root = json_pack("{s:I, s:o, s:o}", "step", (json_int_t)step, "windows", list, "tokens", samples);
    if (json) return print_json(command, root);
    json_decref(root);
    return 0;
}

static int batch(int argc, char **argv)
{
    int64_t step = 0;
    bool json = false;
    const sel_option options[] = {
        {"step", SEL_OPT_INTEGER, &step, 1, "S", "the optimizer step, from 1"},
        {"json", SEL_OPT_FLAG, &json, 0, NULL, "{\"step\", \"windows\": [...], \"tokens\": [[BOS and N ids] ...]}"},
    };
    const sel_command command = {"selectra data batch", "CONFIG --step S [--json] [key=value ...]",
                                 "Shows the windows and tokens that a training step reads.", options, COUNT(options)};
    char *text = NULL;
    int n;
    size_t bytes;
    sel_corpus *c = NULL;

    int status = sel_options_begin(&command, argc, argv, 1, -1, &n);
    if (status >= 0) return status;
    if (step == 0) return sel_options_mistake(&command, "--step S is missing");
    sel_config *config = calloc(1, sizeof *config);
    sel_status rc = config ? sel_read_file(argv[1], &text, &bytes) : sel_fail(SEL_ENOMEM, "no memory");
    if (rc == SEL_OK) rc = sel_config_parse(config, text, bytes, argv[1], (const char *const *)argv + 2, n - 1);
    if (rc == SEL_OK && !config->data.train[0])
        rc = sel_fail(SEL_EUSER, "%s: data.train is not set: no corpus to read from", argv[1]);
    if (rc == SEL_OK) rc = sel_corpus_open(&c, config->data.train);
    status = rc == SEL_OK ? show_batch(&command, config, c, step, json) : sel_options_failed(&command, rc);
    sel_corpus_close(&c);
    free(text);
    free(config);
    return status;
}

int sel_cmd_data(int argc, char **argv)
{
    static const char *const names[] = {"pack", "info", "batch"};
    static int (*const run[])(int argc, char **argv) = {pack, info, batch};
    const char *word = argc > 1 ? argv[1] : NULL;

    if (!word || strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
        fprintf(word ? stdout : stderr,
                "usage: selectra data pack --tokenizer FILE.model --output DIR [OPTIONS] INPUT...\n"
                "       selectra data info DIR [--json] [--verify]\n"
                "       selectra data batch CONFIG --step S [--json] [key=value ...]\n"
                "\n--help after one of them tells more.\n");
        return word ? SEL_EXIT_DONE : SEL_EXIT_USER;
    }
    for (int i = 0; i < COUNT(names); i++)
        if (strcmp(word, names[i]) == 0) return run[i](argc - 1, argv + 1);

    const char *near = sel_options_nearest(word, names, COUNT(names));
    fprintf(stderr, "selectra data: %s: no such command%s%s%s\n", word, near ? "; did you mean " : "", near ? near : "",
            near ? "?" : " (--help lists them)");
    return SEL_EXIT_USER;
}
