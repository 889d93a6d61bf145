/* cmd_eval.c: `selectra eval CKPT`: loss, perplexity, accuracy; token log-probabilities. */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "core/base/file.h"
#include "core/base/pulse.h"
#include "core/infer/loaded.h"
#include "core/infer/score.h"
#include "dist/watchdog.h"
#include "launcher/launcher.h"
#include "launcher/options.h"

/* Tokens scored at once. */
enum { BATCH_TOKENS = 4096 };

typedef struct {
    const char *data, *text, *logprobs;
    bool json;
    int64_t threads, watchdog;
} request;

typedef struct {
    const char *path;
    FILE *file;
} rows;

typedef struct {
    sel_batch_stats sum;
    int64_t bytes;           /* of text */
} outcome;

static void warn(void *ctx, const char *line)
{
    (void)ctx;
    fprintf(stderr, "selectra eval: %s\n", line);
}

/* One line a window (spec, section 16). */
static sel_status write_row(void *ctx, int64_t window, const int32_t *tokens, const double *logp, int64_t n)
{
    const rows *r = ctx;
    FILE *const f = r->file;
    fprintf(f, "{\"window\": %" PRId64 ", \"input_ids\": [", window);
    for (int64_t i = 0; i < n; i++) fprintf(f, i ? ", %d" : "%d", tokens[i]);
    fputs("], \"target_ids\": [", f);
    for (int64_t i = 0; i < n; i++) fprintf(f, i ? ", %d" : "%d", tokens[i + 1]);
    fputs("], \"logprobs\": [", f);
    for (int64_t i = 0; i < n; i++) fprintf(f, i ? ", %.9g" : "%.9g", logp[i]);
    fputs("]}\n", f);
    return ferror(f) ? sel_fail(SEL_EIO, "%s: writing failed: %s", r->path, strerror(errno)) : SEL_OK;
}

static sel_status eval_corpus(const sel_loaded *l, const sel_score_job *job, const char *dir, outcome *o)
{
    sel_corpus *corpus = NULL;
    sel_status rc = sel_corpus_open(&corpus, dir);
    if (rc == SEL_OK && sel_corpus_tokenizer_crc32(corpus) != sel_tokenizer_crc32(l->tokenizer))
        rc = sel_fail(SEL_EUSER, "%s: was packed with another tokenizer than the model's", dir);
    if (job->comm) rc = sel_comm_agree(job->comm, rc);
    if (rc == SEL_OK) rc = sel_score_corpus(job, corpus, &o->sum);
    if (rc == SEL_OK) o->bytes = sel_corpus_bytes(corpus);
    sel_corpus_close(&corpus);
    return rc;
}

/* One document: its ids and EOS. */
static sel_status eval_text(const sel_loaded *l, const sel_score_job *job, const char *path, outcome *o)
{
    char *text = NULL;
    int32_t *ids = NULL;
    size_t bytes = 0, n = 0, capacity = 0;
    sel_status rc = sel_read_file(path, &text, &bytes);

    if (rc == SEL_OK && bytes == 0) rc = sel_fail(SEL_EUSER, "%s: is empty", path);
    if (rc == SEL_OK) rc = sel_tokenizer_encode(l->tokenizer, text, bytes, &ids, &n, &capacity);
    if (rc == SEL_OK) {
        int32_t *const more = realloc(ids, (n + 1) * sizeof *ids);
        if (more) (ids = more)[n] = sel_tokenizer_eos(l->tokenizer);
        else rc = sel_fail(SEL_ENOMEM, "%s: no memory for %zu tokens", path, n);
    }
    if (job->comm) rc = sel_comm_agree(job->comm, rc);
    if (rc == SEL_OK) rc = sel_score_ids(job, ids, (int64_t)n + 1, sel_tokenizer_bos(l->tokenizer), &o->sum);
    o->bytes = (int64_t)bytes;
    free(ids);
    free(text);
    return rc;
}

/* [collective] Rank 0 looks for the checkpoint, so that all ranks take the same one: its step folder into `step`. */
static sel_status find_for_all(const char *path, sel_comm *c, char step[SEL_PATH_MAX])
{
    sel_manifest m = { 0 };
    const sel_status rc = sel_comm_rank(c) == 0 ? sel_checkpoint_find(&m, path, warn, NULL) : SEL_OK;
    snprintf(step, SEL_PATH_MAX, "%s", m.path);
    sel_manifest_free(&m);
    SEL_TRY(sel_comm_agree(c, rc));
    sel_comm_bcast(c, step, SEL_PATH_MAX, 0);
    return SEL_OK;
}

/* [collective] */
static sel_status evaluate(const request *r, const char *path, sel_comm *c, outcome *o)
{
    const bool alone = sel_comm_size(c) == 1;
    rows logprobs = { .path = r->logprobs };
    char step[SEL_PATH_MAX];
    sel_loaded l;
    sel_model *m = NULL;

    SEL_TRY(find_for_all(path, c, step));
    const int64_t share = sel_cpu_threads() / sel_comm_host_size(c), threads = share > 0 ? share : 1;
    SEL_TRY(sel_comm_agree(c, sel_loaded_open(&l, step, r->threads ? r->threads : threads, NULL, NULL)));

    const int64_t N = l.layout->dims.N, batch = BATCH_TOKENS / N > 0 ? BATCH_TOKENS / N : 1;
    sel_status rc = sel_comm_agree(c, sel_loaded_model(&l, SEL_USE_SCORE, batch, N, &m));
    const sel_score_job job = { .model = m, .params = l.params, .batch = batch, .N = N,
                                .comm = alone ? NULL : c, .each = r->logprobs ? write_row : NULL, .ctx = &logprobs };
    if (rc == SEL_OK && r->logprobs && !(logprobs.file = fopen(r->logprobs, "w")))
        rc = sel_fail(SEL_EUSER, "%s: cannot be written: %s", r->logprobs, strerror(errno));
    if (rc == SEL_OK && r->text) {
        rc = eval_text(&l, &job, r->text, o);
    } else if (rc == SEL_OK) {
        const char *dir = r->data ? r->data : l.config.data.validation;
        rc = dir[0] ? eval_corpus(&l, &job, dir, o)
                    : sel_fail(SEL_EUSER, "nothing to evaluate on: --data PACKED or --text FILE (the model's "
                               "configuration names no data.validation)");
    }
    if (logprobs.file && fclose(logprobs.file) != 0 && rc == SEL_OK)
        rc = sel_fail(SEL_EIO, "%s: writing failed: %s", r->logprobs, strerror(errno));
    sel_model_free(&m);
    sel_loaded_close(&l);
    return rc;
}

enum { NUMBER = 32 };

/* JSON has no infinity: null. */
static const char *number(char out[NUMBER], double x)
{
    snprintf(out, NUMBER, isfinite(x) ? "%.9g" : "null", x);
    return out;
}

static void print(const request *r, const outcome *o)
{
    const double loss = o->sum.loss / (double)o->sum.tokens, accuracy = (double)o->sum.correct / (double)o->sum.tokens;
    const double bits = o->sum.loss / log(2.0) / (double)o->bytes;
    if (r->json) {
        char text[4][NUMBER];
        printf("{\"loss\": %s, \"perplexity\": %s, \"accuracy\": %s, \"tokens\": %" PRId64 ", \"bytes\": %" PRId64
               ", \"bits_per_byte\": %s}\n",
               number(text[0], loss), number(text[1], exp(loss)), number(text[2], accuracy), o->sum.tokens, o->bytes,
               number(text[3], bits));
    } else
        printf("loss %.5f nats a token, perplexity %.3f, accuracy %.2f%%, %.4f bits a byte (%" PRId64
               " tokens, %" PRId64 " bytes)\n",
               loss, exp(loss), 100.0 * accuracy, bits, o->sum.tokens, o->bytes);
}

int sel_cmd_eval(int argc, char **argv)
{
    request r = { .watchdog = 300 };
    const sel_option options[] = {
        { "data", SEL_OPT_TEXT, &r.data, 0, "PACKED", "a packed corpus; default: the model's data.validation" },
        { "text", SEL_OPT_TEXT, &r.text, 0, "FILE", "one UTF-8 document" },
        { "logprobs", SEL_OPT_TEXT, &r.logprobs, 0, "OUT.jsonl", "ids and log-probabilities, a line a window" },
        { "threads", SEL_OPT_INTEGER, &r.threads, 0, "T", "threads a rank; 0: all it may use" },
        { "watchdog", SEL_OPT_INTEGER, &r.watchdog, 0, "SECONDS", "without progress, after which it ends; 0: never" },
        { "json", SEL_OPT_FLAG, &r.json, 0, NULL, "one JSON object" },
    };
    const sel_command command = {
        "selectra eval", "CKPT [--data PACKED | --text FILE] [--logprobs OUT.jsonl] [--json]",
        "CKPT is a run folder (its newest intact checkpoint) or a step folder.  Under mpirun the "
        "ranks share the windows.",
        options, sizeof options / sizeof options[0]};
    sel_comm *c = NULL;
    outcome o = { 0 };
    int n;

    const int status = sel_options_begin(&command, argc, argv, 1, 1, &n);
    if (status >= 0) return status;
    if (r.data && r.text) return sel_options_mistake(&command, "--data and --text: one of them");

    sel_status rc = sel_comm_open(&c, &argc, &argv);
    if (rc != SEL_OK) {
        fprintf(stderr, "selectra eval: %s\n", sel_error());
        return SEL_EXIT_FAILURE;
    }
    const bool first = sel_comm_rank(c) == 0;
    sel_watchdog *watchdog = NULL;
    sel_pulse_phase("evaluation", 0);
    rc = sel_watchdog_open(&watchdog, c, (double)r.watchdog);
    if (r.logprobs && sel_comm_size(c) > 1)
        rc = sel_fail(SEL_EUSER, "--logprobs: needs one rank (the lines are in stream order)");
    if (rc == SEL_OK) rc = evaluate(&r, argv[1], c, &o);
    if (first && rc == SEL_OK) print(&r, &o);
    if (first && rc != SEL_OK) fprintf(stderr, "selectra eval: %s\n", sel_error());
    sel_watchdog_close(&watchdog);
    sel_comm_close(&c);
    return sel_exit_status(rc);
}
