/* loop.c: a run from its first step to its last: log, validate, save, end on request. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zlib.h>
#include "core/base/clock.h"
#include "core/base/fault.h"
#include "core/base/pulse.h"
#include "core/infer/score.h"
#include "core/train/trainer.h"
#include "dist/watchdog.h"

/* Replicas that drift apart are found within this many steps, and before every save. */
enum { COMPARE_EVERY = 100 };

typedef struct {
    double started, last_log, last_save;   /* seconds of the clock */
    int64_t log_step, log_tokens;          /* where the last logged interval ended */
    double paused;                         /* seconds of saving and validating since then: not training */
    int64_t saved_step;                    /* -1: none in this run folder yet */
    sel_wire wire;                         /* moved since then, all ranks */
    bool save_owed;                        /* one was due while steps were not finite */
} pace;

static bool is_first(const sel_trainer *t) { return sel_comm_rank(t->comm) == 0; }

/* [collective] Every rank must hold the same weights, to the bit. */
static sel_status compare_replicas(sel_trainer *t)
{
    const uint64_t crc = crc32_z(0, (const unsigned char *)t->params, (size_t)t->layout->total * sizeof(float));
    if (sel_comm_same(t->comm, crc)) return SEL_OK;
    return sel_fail(SEL_ECOMM, "step %" PRId64 ": the ranks' weights differ (rank %d has checksum %08x); stopping "
                    "before they are saved", t->step, sel_comm_rank(t->comm), (unsigned)crc);
}

/* A state that no longer counts must not take the place of one that does. */
static sel_status finite_weights(const sel_trainer *t)
{
    if (isfinite(t->ops.sum_squares(t->params, t->layout->total, t->threads))) return SEL_OK;
    return sel_fail(SEL_ENUM, "step %" PRId64 ": the weights are not finite; stopping before they are saved", t->step);
}

static sel_status save(sel_trainer *t, pace *p)
{
    const double begun = sel_now();
    char *yaml = NULL;
    sel_checkpoint_info info = { .step = t->step, .tokens = t->tokens_seen, .corpus_crc32 = sel_corpus_crc32(t->train),
                                 .tokenizer_crc32 = sel_tokenizer_crc32(t->tokenizer), .skipped = t->skipped,
                                 .n_skipped = t->n_skipped };

    sel_pulse_phase("save", t->step);
    SEL_TRY(compare_replicas(t));
    SEL_TRY(sel_comm_agree(t->comm, finite_weights(t)));
    SEL_TRY(sel_comm_agree(t->comm, sel_config_emit(t->config, &yaml)));
    info.config = yaml;
    info.tokenizer = sel_tokenizer_bytes(t->tokenizer, &info.tokenizer_bytes);
    const sel_status rc = sel_arrays_save(t, &info);
    free(yaml);
    if (rc != SEL_OK) {
        char why[1024];
        snprintf(why, sizeof why, "%s", sel_error());
        return sel_fail(rc, "saving step %" PRId64 ": %s", t->step, why);
    }
    p->saved_step = t->step;
    p->save_owed = false;
    if (t->n_skipped && t->step > t->skipped[t->n_skipped - 1]) t->rolled_back = false;
    p->last_save = sel_now();
    p->paused += p->last_save - begun;
    return SEL_OK;
}

static sel_status validate(sel_trainer *t, pace *p, sel_metrics *row)
{
    const double begun = sel_now();
    const sel_profile steps = t->profile;   /* the model's laps in here are no part of a step */
    const int64_t N = t->config->model.context, most = t->config->train.validate_tokens;
    const sel_score_job job = { .model = t->model, .params = t->params, .batch = t->micro, .N = N,
                                .max_windows = (most + N - 1) / N, .comm = t->comm,
                                .sequence = t->mesh.sequence };
    sel_batch_stats sum;

    sel_fault("validate", t->step, "");
    SEL_TRY(sel_score_corpus(&job, t->validation, &sum));
    t->profile = steps;
    sel_trainer_forget_wire(t);
    row->val_loss = sum.loss / (double)sum.tokens;
    row->val_tokens = sum.tokens;
    p->paused += sel_now() - begun;
    return SEL_OK;
}

/* What the steps since the last row have moved, a step. */
static void log_wire(const sel_trainer *t, const pace *p, sel_metrics *row)
{
    const double ranks = sel_comm_size(t->comm), steps = (double)(t->step - p->log_step);
    const sel_wire *w = &p->wire;

    row->has_wire = ranks > 1;
    row->wire_bytes = w->wire_bytes / steps;
    row->wire_bytes_least = w->wire_least / steps;
    row->host_bytes = w->host_bytes / steps;
    row->wire_wait_seconds = w->wait_seconds / ranks / steps;
    row->wire_hidden = w->busy_seconds > 0.0 ? 1.0 - w->wait_seconds / w->busy_seconds : 1.0;
}

/* The logged row of a step, on rank 0. */
static sel_status log_step(sel_trainer *t, pace *p, const sel_step_stats *s, sel_metrics *row, bool train_row)
{
    const sel_config *c = t->config;
    const double now = sel_now(), seconds = now - p->last_log - p->paused;
    const int64_t tokens = t->tokens_seen - p->log_tokens;

    row->step = t->step;
    row->tokens = t->tokens_seen;
    row->seconds = now - p->started;
    row->has_train = train_row;
    if (train_row) {
        row->loss = s->loss;
        row->has_memory_loss = c->attention.memory_loss.epsilon > 0.0;
        row->memory_loss = s->memory_loss;
        row->lr = s->lr;
        row->grad_norm = s->grad_norm;
        if (c->attention.kind == SEL_KIND_SELECTIVE && c->attention.dead_keys != SEL_DEAD_KEYS_OFF) {
            row->live_keys = t->live_keys;
            row->layers = t->layout->dims.L;
        }
        row->tokens_per_second = (double)tokens / seconds;
        row->mfu = sel_model_flops(&t->layout->dims, tokens, c->model.context) / seconds /
                   (t->peak_gflops * 1e9 * sel_comm_size(t->comm));
    }
    if (train_row) log_wire(t, p, row);
    SEL_TRY(sel_run_metrics(t->run, row));
    if (train_row) {
        const double a_step = seconds / (double)(t->step - p->log_step);
        const sel_train_progress told = { .row = *row, .steps = c->train.steps,
                                          .eta_seconds = a_step * (double)(c->train.steps - t->step) };
        t->job->watcher->progress(t->job->watcher->ctx, &told);
    } else if (row->val_tokens) {
        const sel_train_progress told = { .row = *row, .steps = c->train.steps, .eta_seconds = -1.0 };
        t->job->watcher->progress(t->job->watcher->ctx, &told);
    }
    if (train_row) {
        p->last_log = sel_now();
        p->paused = 0.0;
        p->wire = (sel_wire){ 0 };
        p->log_step = t->step;
        p->log_tokens = t->tokens_seen;
    }
    return SEL_OK;
}

static bool due(int64_t every, int64_t step) { return every > 0 && step % every == 0; }

/* What follows a step: validation, its row, a check of the replicas, a checkpoint.  s is NULL after a step that was
   left out. */
static sel_status after_step(sel_trainer *t, pace *p, const sel_step_stats *s, bool last)
{
    const sel_config *c = t->config;
    const bool train_row = s && (due(c->train.log_every, t->step) || t->step == c->train.steps || t->step == 1);
    sel_metrics row = { 0 };

    if (s) sel_wire_add(&p->wire, &s->wire);
    if (t->validation && !(s && s->signal) && (due(c->train.validate_every, t->step) || t->step == c->train.steps))
        SEL_TRY(validate(t, p, &row));
    if (is_first(t) && (train_row || row.val_tokens)) {
        const sel_status rc = log_step(t, p, s, &row, train_row);
        if (rc != SEL_OK) sel_comm_die(t->comm, "writing the metrics");
    }
    if (due(COMPARE_EVERY, t->step)) SEL_TRY(compare_replicas(t));
    if (due(c->checkpoint.every, t->step) || (s && s->save_due)) p->save_owed = true;
    /* While steps are not finite the weights are in doubt: they do not take the place of the last checkpoint. */
    if (last || (p->save_owed && t->in_a_row == 0)) SEL_TRY(save(t, p));
    return SEL_OK;
}

/* After a return to an earlier step the clock of the metrics starts anew. */
static void restart_pace(const sel_trainer *t, pace *p)
{
    p->last_log = sel_now();
    p->paused = 0.0;
    p->wire = (sel_wire){ 0 };
    p->log_step = t->step;
    p->log_tokens = t->tokens_seen;
    p->save_owed = false;
}

static sel_status run_steps(sel_trainer *t, pace *p, sel_train_result *result)
{
    const sel_config *c = t->config;
    const double save_seconds = 60.0 * c->checkpoint.every_minutes;

    while (t->step < c->train.steps) {
        const bool save_due = is_first(t) && save_seconds > 0.0 && sel_now() - p->last_save >= save_seconds;
        const int64_t before = t->step;
        sel_step_stats s = { 0 };

        if (sel_trainer_leaves_out(t, before + 1)) {
            sel_trainer_pass(t);
            SEL_TRY(after_step(t, p, NULL, t->step == c->train.steps));
            continue;
        }
        sel_status rc = sel_trainer_step(t, save_due, &s);
        const bool taken = rc == SEL_OK;
        if (rc == SEL_ENUM) rc = sel_trainer_skip(t);
        SEL_TRY(rc);
        if (taken) t->in_a_row = 0;
        if (t->step < before) {
            restart_pace(t, p);
            continue;
        }
        SEL_TRY(after_step(t, p, taken ? &s : NULL, s.signal || t->step == c->train.steps));
        if (s.signal && t->step < c->train.steps) {
            result->signal = s.signal;
            break;
        }
    }
    return SEL_OK;
}

enum { NAME = 64 };

/* The hosts' names, each once, with commas, into out [ranks * NAME]. */
static void host_names(sel_trainer *t, char *out, size_t bytes)
{
    const int size = sel_comm_size(t->comm);
    char mine[NAME] = "", *all = calloc((size_t)size, NAME);

    gethostname(mine, sizeof mine - 1);
    if (all) sel_comm_gather(t->comm, mine, NAME, all, 0);
    else sel_comm_die(t->comm, "gathering the hosts' names");
    for (int r = 0; r < size && is_first(t); r++) {
        bool known = false;
        for (int q = 0; q < r; q++) known |= strcmp(all + q * NAME, all + r * NAME) == 0;
        const size_t used = strlen(out);
        if (!known) snprintf(out + used, bytes - used, "%s%s", used ? "," : "", all + r * NAME);
    }
    free(all);
}

/* Rank 0's part before the first step. */
static sel_status announce(sel_trainer *t, int64_t resumed_from, const char *hosts)
{
    const sel_train_job *j = t->job;
    const sel_provenance p = {
        .program = j->program,
        .commit = j->commit,
        .compiler = j->compiler,
        .build = j->build,
        .mpi = sel_comm_library(),
        .linear = sel_linear_library(t->engine),
        .precision = t->config->train.precision == SEL_PRECISION_BFLOAT16 ? "bfloat16" : "float32",
        .cpu = sel_cpu_name(),
        .cpu_level = sel_cpu_level_name(t->ops.level),
        .ranks = sel_comm_size(t->comm),
        .threads = t->threads,
        .hosts = sel_comm_hosts(t->comm),
        .host_names = hosts,
        .command = j->command,
        .resumed_from = resumed_from,
        .corpus_crc32 = sel_corpus_crc32(t->train),
        .tokenizer_crc32 = sel_tokenizer_crc32(t->tokenizer),
        .seed = (uint64_t)t->config->run.seed,
    };
    size_t packed, kept, scratch;
    sel_model_memory(t->model, &packed, &kept, &scratch);
    const sel_train_start s = {
        .parameters = t->layout->parameters,
        .memory_bytes = sel_arrays_bytes(t) + (int64_t)(packed + kept + scratch) +
                        (t->sequence ? (int64_t)sel_sequence_bytes(t->sequence) : 0),
        .train_tokens = sel_corpus_tokens(t->train),
        .validation_tokens = t->validation ? sel_corpus_tokens(t->validation) : 0, .windows = t->windows,
        .micro_batch = t->micro, .local_batch = t->count, .resumed_from = resumed_from, .ranks = p.ranks,
        .sequence = t->mesh.sequence, .zigzag = t->chunks.chunks > 1,
        .hosts = p.hosts, .threads = p.threads, .peak_gflops = t->peak_gflops, .level = p.cpu_level, .cpu = p.cpu,
        .linear = p.linear, .precision = p.precision, .mpi = p.mpi,
        .binding = t->binding.line,
    };
    SEL_TRY(sel_run_provenance(t->run, &p));
    SEL_TRY(sel_run_cut_metrics(t->run, t->step));
    j->watcher->start(j->watcher->ctx, &s);
    if (t->binding.warning[0]) j->watcher->message(j->watcher->ctx, t->binding.warning);
    if (t->sequence && sel_sequence_note(t->sequence)[0])
        j->watcher->message(j->watcher->ctx, sel_sequence_note(t->sequence));
    if (sel_reducer_note(t->reducer)[0]) j->watcher->message(j->watcher->ctx, sel_reducer_note(t->reducer));
    return SEL_OK;
}

/* Rank 0's profile of the steps of this job, to the watcher and the metrics. */
static sel_status tell_profile(sel_trainer *t, int64_t steps)
{
    const sel_train_watcher *w = t->job->watcher;
    const sel_metrics row = { .step = t->step, .tokens = t->tokens_seen, .event = "profile", .profile = &t->profile,
                              .profiled = steps };
    w->profile(w->ctx, &t->profile, steps, t->peak_gflops);
    return sel_run_metrics(t->run, &row);
}

static sel_status train(const sel_train_job *job, sel_train_result *result)
{
    sel_trainer t;
    int64_t resumed_from;

    SEL_TRY(sel_trainer_open(&t, job, &resumed_from));
    const size_t bytes = (size_t)sel_comm_size(t.comm) * NAME;
    char *const hosts = calloc(1, bytes);
    if (!hosts) {
        sel_fail(SEL_ENOMEM, "no memory for the hosts' names");
        sel_comm_die(t.comm, "start");
    }
    host_names(&t, hosts, bytes);
    sel_status rc = sel_comm_agree(t.comm, is_first(&t) ? announce(&t, resumed_from, hosts) : SEL_OK);

    const double now = sel_now();
    pace p = { .started = now, .last_log = now, .last_save = now, .log_step = t.step, .log_tokens = t.tokens_seen,
               .saved_step = resumed_from };
    if (rc == SEL_OK && p.saved_step < 0) rc = save(&t, &p);   /* step 0 proves that the folder takes a checkpoint */
    if (rc == SEL_OK) {
        p.paused = 0.0;
        p.last_log = sel_now();
        const int64_t from = t.step;
        rc = run_steps(&t, &p, result);
        if (rc == SEL_OK && job->profile && t.step > from)
            rc = sel_comm_agree(t.comm, is_first(&t) ? tell_profile(&t, t.step - from) : SEL_OK);
    }
    free(hosts);
    result->step = p.saved_step;
    sel_trainer_close(&t);
    return rc;
}

sel_status sel_train(const sel_train_job *job, sel_train_result *result)
{
    sel_watchdog *watchdog;

    memset(result, 0, sizeof *result);
    sel_pulse_phase("start", 0);
    SEL_TRY(sel_watchdog_open(&watchdog, job->comm, (double)job->config->dist.watchdog_seconds));
    const sel_status rc = train(job, result);
    sel_pulse_phase("end", -1);
    sel_watchdog_close(&watchdog);
    return rc;
}
