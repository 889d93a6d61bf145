/* cmd_generate.c: `selectra generate CKPT --prompt TEXT`: text, decoded with a cache that carries F. */
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "core/base/clock.h"
#include "core/infer/generate.h"
#include "launcher/launcher.h"
#include "launcher/options.h"

typedef struct {
    const char *prompt, *logprobs;
    int64_t tokens, top_k, seed, threads;
    double temperature, top_p;
    bool greedy, no_cache, json;
} request;

/* The sequence: BOS and the prompt's n ids, then what was made. */
typedef struct {
    int32_t *ids;
    double *logp;
    int64_t n, made;
    sel_stop stop;
    char *text;              /* of the new tokens */
    double seconds;
} outcome;

static void warn(void *ctx, const char *line)
{
    (void)ctx;
    fprintf(stderr, "selectra generate: %s\n", line);
}

static sel_status generate(const request *r, const sel_loaded *l, outcome *o)
{
    const sel_generate_options options = {
        .sampling = { .temperature = r->greedy ? 0.0 : r->temperature, .top_k = r->top_k, .top_p = r->top_p,
                      .seed = (uint64_t)r->seed },
        .most = r->tokens, .cache = !r->no_cache,
    };
    int32_t *prompt = NULL;
    size_t n = 0, capacity = 0, bytes;

    sel_status rc = sel_tokenizer_encode(l->tokenizer, r->prompt, strlen(r->prompt), &prompt, &n, &capacity);
    if (rc != SEL_OK) goto out;
    o->n = (int64_t)n + 1;
    const size_t context = (size_t)l->layout->dims.N;   /* no more can be made, whatever was asked for */
    o->ids = malloc((n + 2 + context) * sizeof *o->ids);
    o->logp = malloc((context + 1) * sizeof *o->logp);
    if (!o->ids || !o->logp) {
        rc = sel_fail(SEL_ENOMEM, "no memory for %zu tokens", context);
        goto out;
    }
    o->ids[0] = sel_tokenizer_bos(l->tokenizer);
    if (n) memcpy(o->ids + 1, prompt, n * sizeof *prompt);
    const double begun = sel_now();
    rc = sel_generate(l, o->ids, o->n, &options, o->ids + o->n, o->logp, &o->made, &o->stop);
    o->seconds = sel_now() - begun;
    if (rc == SEL_OK) rc = sel_tokenizer_decode(l->tokenizer, o->ids + o->n, (size_t)o->made, &o->text, &bytes);
out:
    free(prompt);
    return rc;
}

/* The form of `eval --logprobs`, for the generated tokens alone. */
static sel_status write_logprobs(const char *path, FILE *f, const outcome *o)
{
    fputs("{\"window\": 0, \"input_ids\": [", f);
    for (int64_t i = 0; i < o->made; i++) fprintf(f, i ? ", %d" : "%d", o->ids[o->n - 1 + i]);
    fputs("], \"target_ids\": [", f);
    for (int64_t i = 0; i < o->made; i++) fprintf(f, i ? ", %d" : "%d", o->ids[o->n + i]);
    fputs("], \"logprobs\": [", f);
    for (int64_t i = 0; i < o->made; i++) fprintf(f, i ? ", %.9g" : "%.9g", o->logp[i]);
    fputs("]}\n", f);
    const bool failed = ferror(f);
    return fclose(f) != 0 || failed ? sel_fail(SEL_EIO, "%s: writing failed", path) : SEL_OK;
}

/* Bytes of the character that text begins with; 0 where they are not UTF-8. */
static size_t character(const char *text)
{
    const unsigned char c = (unsigned char)text[0];
    const size_t n = c < 0x80                ? 1
                     : c >= 0xc2 && c < 0xe0 ? 2
                     : c >= 0xe0 && c < 0xf0 ? 3
                     : c >= 0xf0 && c < 0xf5 ? 4
                                             : 0;
    for (size_t i = 1; i < n; i++)
        if (((unsigned char)text[i] & 0xc0) != 0x80) return 0;
    const unsigned char second = n > 2 ? (unsigned char)text[1] : 0;
    const bool wrong = (c == 0xe0 && second < 0xa0) || (c == 0xed && second > 0x9f) || (c == 0xf0 && second < 0x90) ||
                       (c == 0xf4 && second > 0x8f);
    return wrong ? 0 : n;
}

/* A copy in which bytes that make no character (a byte-level piece cut off from its fellows) are U+FFFD; freed by the
   caller. */
static char *whole_characters(const char *text)
{
    char *const out = malloc(3 * strlen(text) + 1), *to = out;
    while (out && *text) {
        const size_t n = character(text);
        if (n) {
            to = mempcpy(to, text, n);
            text += n;
        } else {
            to = mempcpy(to, "\xef\xbf\xbd", 3);
            text++;
        }
    }
    if (out) *to = '\0';
    return out;
}

static sel_status print(const request *r, const outcome *o)
{
    static const char *const stops[] = { [SEL_STOP_LENGTH] = "length", [SEL_STOP_EOS] = "eos",
                                         [SEL_STOP_CONTEXT] = "context" };
    char *const text = whole_characters(o->text);
    if (!text) return sel_fail(SEL_ENOMEM, "no memory for the text");
    if (!r->json) {
        printf("%s%s\n", r->prompt, text);
        free(text);
        if (o->stop == SEL_STOP_CONTEXT)
            fprintf(stderr, "selectra generate: the model's context is full after %" PRId64 " tokens\n", o->made);
        return SEL_OK;
    }
    json_t *const prompt = json_string(r->prompt), *ids = json_array();
    if (!prompt) {
        json_decref(ids);
        free(text);
        return sel_fail(SEL_EUSER, "--prompt: is not UTF-8 text");
    }
    for (int64_t i = 0; ids && i < o->made; i++) json_array_append_new(ids, json_integer(o->ids[o->n + i]));
    json_t *const all =
        json_pack("{s:o, s:s, s:o, s:I, s:s, s:f}", "prompt", prompt, "text", text, "ids", ids, "tokens",
                  (json_int_t)o->made, "stop", stops[o->stop], "tokens_per_second", (double)o->made / o->seconds);
    free(text);
    if (!all) return sel_fail(SEL_ENOMEM, "no memory for the JSON object");
    json_dumpf(all, stdout, JSON_REAL_PRECISION(6));
    putchar('\n');
    json_decref(all);
    return SEL_OK;
}

int sel_cmd_generate(int argc, char **argv)
{
    request r = { .tokens = 100, .temperature = 0.8, .top_p = 0.95, .top_k = 0 };
    const sel_option options[] = {
        { "prompt", SEL_OPT_TEXT, &r.prompt, 0, "TEXT", "what the text starts with; \"\" is fine" },
        { "tokens", SEL_OPT_INTEGER, &r.tokens, 0, "N", "new tokens at most (100)" },
        { "temperature", SEL_OPT_NUMBER, &r.temperature, 0, "T", "0: always the likeliest token (0.8)" },
        { "top-k", SEL_OPT_INTEGER, &r.top_k, 0, "K", "only the K likeliest; 0: all (0)" },
        { "top-p", SEL_OPT_NUMBER, &r.top_p, 0, "P", "only the likeliest that hold P of the probability (0.95)" },
        { "seed", SEL_OPT_INTEGER, &r.seed, 0, "S", "another seed, another text (0)" },
        { "greedy", SEL_OPT_FLAG, &r.greedy, 0, NULL, "the same as --temperature 0" },
        { "no-cache", SEL_OPT_FLAG, &r.no_cache, 0, NULL, "the whole sequence anew for each token: slow, to compare" },
        { "logprobs", SEL_OPT_TEXT, &r.logprobs, 0, "OUT.jsonl", "ids and log-probabilities of the new tokens" },
        { "threads", SEL_OPT_INTEGER, &r.threads, 0, "T", "0: all that the process may use (0)" },
        { "json", SEL_OPT_FLAG, &r.json, 0, NULL, "one JSON object" },
    };
    const sel_command command = { "selectra generate", "CKPT --prompt TEXT [OPTIONS]", NULL, options,
                                  sizeof options / sizeof options[0] };
    sel_loaded l;
    outcome o = { 0 };
    int n;

    const int status = sel_options_begin(&command, argc, argv, 1, 1, &n);
    if (status >= 0) return status;
    if (!r.prompt) return sel_options_mistake(&command, "--prompt is missing");
    if (r.top_p > 1.0) return sel_options_mistake(&command, "--top-p: expected a number from 0 to 1, got %g", r.top_p);

    sel_status rc = sel_loaded_open(&l, argv[1], r.threads, warn, NULL);
    if (rc == SEL_OK) {
        FILE *const rows = r.logprobs ? fopen(r.logprobs, "w") : NULL;   /* known to be writable before the work */
        if (r.logprobs && !rows) rc = sel_fail(SEL_EUSER, "%s: cannot be written: %s", r.logprobs, strerror(errno));
        if (rc == SEL_OK) rc = generate(&r, &l, &o);
        if (rc == SEL_OK && rows) rc = write_logprobs(r.logprobs, rows, &o);
        else if (rows) fclose(rows);
        if (rc == SEL_OK) rc = print(&r, &o);
        sel_loaded_close(&l);
    }
    if (rc != SEL_OK) fprintf(stderr, "selectra generate: %s\n", sel_error());
    free(o.ids);
    free(o.logp);
    free(o.text);
    return sel_exit_status(rc);
}
