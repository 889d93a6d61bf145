/* setup.c: opens and checks all that a run needs before it writes a byte; loads or makes its state. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "core/base/mem.h"
#include "core/base/fault.h"
#include "core/model/choice.h"
#include "core/train/trainer.h"

/* Tokens that a micro-batch holds when it may choose: enough rows for the matrix products, a bounded memory. */
enum { MICRO_TOKENS = 4096 };

static sel_status choose_micro(sel_trainer *t)
{
    const int64_t wanted = t->config->train.micro_batch, count = t->count / t->leaves;
    const int64_t own = t->config->model.context / t->mesh.sequence;   /* tokens of a sequence on this rank */

    if (wanted) {
        if (count % wanted)
            return sel_fail(SEL_EUSER, "train.micro_batch: %" PRId64 " does not divide the %" PRId64
                            " sequences of each %s (train.batch %" PRId64 " over %d)", wanted, count,
                            t->config->dist.virtual_ranks ? "virtual rank" : t->mesh.sequence > 1 ? "sequence group"
                                                                                                  : "rank",
                            t->config->train.batch,
                            t->mesh.data * t->leaves);
        t->micro = wanted;
        return SEL_OK;
    }
    t->micro = 1;
    for (int64_t m = 1; m <= count && m * own <= MICRO_TOKENS; m++)
        if (count % m == 0) t->micro = m;
    return SEL_OK;
}

/* The corpus's own copy unless the configuration names another, which must be the same. */
static sel_status open_tokenizer(sel_trainer *t)
{
    char path[SEL_PATH_MAX];
    if (t->config->data.tokenizer[0]) snprintf(path, sizeof path, "%s", t->config->data.tokenizer);
    else SEL_TRY(sel_path_join(path, t->config->data.train, "tokenizer.model"));
    SEL_TRY(sel_tokenizer_open(&t->tokenizer, path));
    if (sel_tokenizer_crc32(t->tokenizer) != sel_corpus_tokenizer_crc32(t->train))
        return sel_fail(SEL_EUSER, "%s: is not the tokenizer that packed %s (checksum %08x, the corpus has %08x)", path,
                        t->config->data.train, sel_tokenizer_crc32(t->tokenizer), sel_corpus_tokenizer_crc32(t->train));
    return SEL_OK;
}

/* Everything of this rank that may fail and needs no other rank. */
static sel_status open_inputs(sel_trainer *t)
{
    const sel_config *c = t->config;
    const int64_t N = c->model.context;

    if (!c->run.dir[0]) return sel_fail(SEL_EUSER, "run.dir: missing: the folder that the run is kept in");
    if (!c->data.train[0]) return sel_fail(SEL_EUSER, "data.train: missing: a packed corpus (selectra data pack)");
    SEL_TRY(sel_mesh_init(&t->mesh, sel_comm_rank(t->comm), sel_comm_size(t->comm), c->dist.mesh.data,
                          c->dist.mesh.sequence));
    SEL_TRY(sel_mesh_chunks(&t->mesh, N, (sel_cut)c->dist.sequence_chunks, &t->chunks));
    SEL_TRY(sel_mesh_samples(&t->mesh, c->train.batch, &t->first, &t->count));
    SEL_TRY(sel_leaves_choose(t));
    SEL_TRY(choose_micro(t));
    SEL_TRY(sel_corpus_open(&t->train, c->data.train));
    SEL_TRY(open_tokenizer(t));
    if (c->model.vocab && c->model.vocab < sel_corpus_vocab(t->train))
        return sel_fail(SEL_EUSER, "model.vocab: %" PRId64 " is smaller than the tokenizer's %" PRId64 " pieces",
                        c->model.vocab, sel_corpus_vocab(t->train));
    t->windows = sel_corpus_windows(t->train, N);
    if (t->windows < c->train.batch)
        return sel_fail(SEL_EUSER, "%s: %" PRId64 " tokens make %" PRId64 " windows of model.context %" PRId64
                        ", too few for one batch of %" PRId64 " (train.batch)", c->data.train,
                        sel_corpus_tokens(t->train), t->windows, N, c->train.batch);
    if (c->data.validation[0]) {
        SEL_TRY(sel_corpus_open(&t->validation, c->data.validation));
        if (sel_corpus_tokenizer_crc32(t->validation) != sel_corpus_tokenizer_crc32(t->train))
            return sel_fail(SEL_EUSER, "%s: was packed with another tokenizer than %s", c->data.validation,
                            c->data.train);
    }
    sel_cpu_level level;
    SEL_TRY(sel_cpu_choose(c->compute.cpu, &level));
    sel_ops_init(&t->ops, level);
    return SEL_OK;
}

/* [collective] Every rank must have been given the same settings (mpirun can start ranks with different arguments). */
static sel_status compare_settings(sel_trainer *t)
{
    sel_config *const first = malloc(sizeof *first);
    if (!first) {
        sel_fail(SEL_ENOMEM, "no memory for the settings");
        sel_comm_die(t->comm, "start");
    }
    *first = *t->config;
    sel_comm_bcast(t->comm, first, sizeof *first, 0);
    const sel_status rc = sel_config_same(first, t->config);
    free(first);
    return sel_comm_agree(t->comm, rc);
}

/* [collective] Every rank must have found the same data under the same names (a host's own disk may differ). */
static sel_status compare_inputs(sel_trainer *t)
{
    const struct { const char *key; uint32_t crc; } inputs[] = {
        { "data.train", sel_corpus_crc32(t->train) },
        { "data.validation", t->validation ? sel_corpus_crc32(t->validation) : 0 },
        { "data.tokenizer", sel_tokenizer_crc32(t->tokenizer) },
    };
    for (size_t i = 0; i < sizeof inputs / sizeof inputs[0]; i++)
        if (!sel_comm_same(t->comm, inputs[i].crc))
            return sel_fail(SEL_EUSER, "%s: the ranks read different data under this name (rank %d has checksum %08x)",
                            inputs[i].key, sel_comm_rank(t->comm), inputs[i].crc);
    return SEL_OK;
}

static sel_linear_backend backend_of(const sel_config *c)
{
    return c->compute.linear_backend == SEL_BACKEND_OPENBLAS ? SEL_LINEAR_OPENBLAS : SEL_LINEAR_ONEDNN;
}

static sel_dtype dtype_of(const sel_config *c)
{
    return c->train.precision == SEL_PRECISION_BFLOAT16 ? SEL_BFLOAT16 : SEL_FLOAT32;
}

/* train.precision: auto.  bfloat16 where the attention kernel has its instructions and the library's products are
   faster with it on this rank, now. */
static sel_status probe_precision(const sel_trainer *t, sel_precision *out)
{
    double gflops[2];

    *out = SEL_PRECISION_FLOAT32;
    if (t->ops.level < SEL_CPU_AVX512BF16 || backend_of(t->config) != SEL_LINEAR_ONEDNN) return SEL_OK;
    for (int dtype = SEL_FLOAT32; dtype <= SEL_BFLOAT16; dtype++) {
        sel_linear_engine *e;
        SEL_TRY(sel_linear_open(&e, SEL_LINEAR_ONEDNN, (sel_dtype)dtype, t->threads));
        const sel_status rc = sel_linear_measure_peak(e, &gflops[dtype]);
        sel_linear_close(&e);
        SEL_TRY(rc);
    }
    if (gflops[SEL_BFLOAT16] > 1.2 * gflops[SEL_FLOAT32]) *out = SEL_PRECISION_BFLOAT16;
    return SEL_OK;
}

static sel_status make_layout(sel_trainer *t)
{
    const sel_dims dims = sel_dims_of(t->config, sel_corpus_vocab(t->train));

    t->resolved.model.vocab = dims.V;
    return sel_layout_new(&t->layout, &dims);
}

/* [collective] What the ranks of a sequence group share. */
static sel_status open_sequence(sel_trainer *t)
{
    const sel_sequence_options o = { .chunks = t->chunks, .group = t->mesh.data_rank, .batch = t->micro,
                                     .width = sel_model_keys_width(&t->layout->dims),
                                     .no_window = !t->config->dist.shared_memory,
                                     .bfloat16 = t->config->train.precision == SEL_PRECISION_BFLOAT16,
                                     .threads = t->threads };
    return t->mesh.sequence > 1 ? sel_sequence_new(&t->sequence, t->comm, &o) : SEL_OK;
}

static void move_along(void *reducer) { sel_reducer_poll(reducer); }

static sel_status make_model(sel_trainer *t)
{
    const sel_config *c = t->config;
    const sel_dims dims = t->layout->dims;

    t->live_keys = sel_alloc((size_t)dims.L * sizeof *t->live_keys, "shares of live keys");
    if (!t->live_keys) return SEL_ENOMEM;
    t->tokens = sel_alloc((size_t)(t->micro * (dims.N + 1)) * sizeof *t->tokens, "tokens of a micro-batch");
    if (!t->tokens) return SEL_ENOMEM;

    const sel_model_options o = { .use = SEL_USE_TRAIN, .batch = t->micro, .tokens = dims.N,
                                  .attention = sel_attention_options_of(c),
                                  .bfloat16 = c->train.precision == SEL_PRECISION_BFLOAT16, .threads = t->threads,
                                  .ops = &t->ops, .engine = t->engine, .sequence = t->sequence,
                                  .profile = &t->profile, .tick = move_along, .tick_ctx = t->reducer };
    return sel_model_new(&t->model, t->layout, &o);
}

static void warn(void *job, const char *line)
{
    const sel_train_job *j = job;
    j->watcher->message(j->watcher->ctx, line);
}

/* What RUN/config.yaml says, where a run is there to go on with. */
static bool earlier_config(const sel_trainer *t, sel_config *old)
{
    char path[SEL_PATH_MAX], *text = NULL;
    size_t bytes;

    if (sel_path_join(path, t->config->run.dir, "config.yaml") != SEL_OK || !sel_path_exists(path)) return false;
    const bool known = sel_read_file(path, &text, &bytes) == SEL_OK &&
                       sel_config_parse(old, text, bytes, path, NULL, 0) == SEL_OK;
    free(text);
    return known;
}

static bool earlier_precision(const sel_trainer *t, sel_precision *out)
{
    sel_config old;
    if (!earlier_config(t, &old) || old.train.precision == SEL_PRECISION_AUTO) return false;
    *out = old.train.precision;
    return true;
}

/* compute.linear_backend: auto.  What the run was trained with so far, unless its operands were of another type, or
   what is measured on this rank now, with the engine that the model will use. */
static sel_status probe_choice(const sel_trainer *t, sel_linear_engine *e, char choice[SEL_CHOICE_MAX])
{
    sel_config old;
    if (earlier_config(t, &old) && old.compute.linear_choice[0] &&
        old.compute.linear_backend == SEL_BACKEND_AUTO && old.train.precision == t->config->train.precision) {
        snprintf(choice, SEL_CHOICE_MAX, "%s", old.compute.linear_choice);
        return SEL_OK;
    }
    const sel_dims dims = sel_dims_of(t->config, sel_corpus_vocab(t->train));
    return sel_choice_probe(e, &dims, t->micro * dims.N / t->mesh.sequence, choice);
}

/* [collective] Opens the engine; with auto rank 0's choice, or the configuration's own, is every rank's. */
static sel_status open_engine(sel_trainer *t)
{
    const sel_config *c = t->config;
    const sel_dims dims = sel_dims_of(c, sel_corpus_vocab(t->train));
    char choice[SEL_CHOICE_MAX] = "";
    sel_status rc = sel_linear_open(&t->engine, backend_of(c), dtype_of(c), t->threads);

    SEL_TRY(sel_comm_agree(t->comm, rc));
    if (c->compute.linear_backend != SEL_BACKEND_AUTO) {
        t->resolved.compute.linear_choice[0] = '\0';
        return SEL_OK;
    }
    if (!c->compute.linear_choice[0]) {
        if (sel_comm_rank(t->comm) == 0) rc = probe_choice(t, t->engine, choice);
        SEL_TRY(sel_comm_agree(t->comm, rc));
        sel_comm_bcast(t->comm, choice, sizeof choice, 0);
        snprintf(t->resolved.compute.linear_choice, sizeof t->resolved.compute.linear_choice, "%s", choice);
    }
    return sel_comm_agree(t->comm, sel_choice_apply(t->engine, &dims, c->compute.linear_choice));
}

/* What rank 0 found in the run folder, for all. */
typedef struct {
    char path[SEL_PATH_MAX];    /* "": nothing to resume */
    int64_t step, tokens;
} found;

/* On rank 0: the newest intact checkpoint of the run, if any, and whether it is of the same model, corpus and
   tokenizer. */
static sel_status find_own(sel_trainer *t, found *f)
{
    sel_manifest m;
    sel_config old;
    sel_status rc;

    memset(f, 0, sizeof *f);
    if (!sel_path_is_dir(t->checkpoints)) return SEL_OK;
    if ((rc = sel_checkpoint_find(&m, t->checkpoints, warn, (void *)(uintptr_t)t->job)) == SEL_EUSER) return SEL_OK;
    SEL_TRY(rc);
    rc = sel_config_parse(&old, m.config, strlen(m.config), m.path, NULL, 0);
    if (rc == SEL_OK && (rc = sel_config_same_model(&old, t->config)) != SEL_OK) {
        char why[512];
        snprintf(why, sizeof why, "%s", sel_error());
        rc = sel_fail(SEL_EUSER, "%s: cannot go on with another model: %s", t->config->run.dir, why);
    }
    if (rc == SEL_OK && m.corpus_crc32 != sel_corpus_crc32(t->train))
        rc = sel_fail(SEL_EUSER,
                      "%s: cannot go on with another corpus: its checkpoint was trained on one with checksum "
                      "%08x, %s has %08x",
                      t->config->run.dir, m.corpus_crc32, t->config->data.train, sel_corpus_crc32(t->train));
    if (rc == SEL_OK && m.tokenizer_crc32 != sel_tokenizer_crc32(t->tokenizer))
        rc = sel_fail(SEL_EUSER, "%s: cannot go on with another tokenizer (checksum %08x -> %08x)", t->config->run.dir,
                      m.tokenizer_crc32, sel_tokenizer_crc32(t->tokenizer));
    if (rc == SEL_OK && m.step > t->config->train.steps)
        rc = sel_fail(SEL_EUSER, "%s: is at step %" PRId64 " already, beyond train.steps %" PRId64, t->config->run.dir,
                      m.step, t->config->train.steps);
    for (int i = 0; rc == SEL_OK && i < m.n_skipped; i++) rc = sel_trainer_leave_out(t, m.skipped[i]);
    if (rc == SEL_OK) {
        snprintf(f->path, sizeof f->path, "%s", m.path);
        f->step = m.step;
        f->tokens = m.tokens;
    }
    sel_manifest_free(&m);
    return rc;
}

/* [collective] Rank 0's measurement, or what the run's checkpoint was trained with, decides for all. */
static sel_status resolve_precision(sel_trainer *t)
{
    sel_precision chosen = t->resolved.train.precision;
    sel_status rc = SEL_OK;

    if (chosen != SEL_PRECISION_AUTO) return SEL_OK;
    if (sel_comm_rank(t->comm) == 0 && !earlier_precision(t, &chosen)) rc = probe_precision(t, &chosen);
    SEL_TRY(sel_comm_agree(t->comm, rc));
    sel_comm_bcast(t->comm, &chosen, sizeof chosen, 0);
    t->resolved.train.precision = chosen;
    return SEL_OK;
}

/* On rank 0: the checkpoint that a new run takes its first weights from. */
static sel_status find_initial(const sel_trainer *t, found *f)
{
    sel_manifest m;
    memset(f, 0, sizeof *f);
    if (!t->config->train.init_from[0]) return SEL_OK;
    SEL_TRY(sel_checkpoint_find(&m, t->config->train.init_from, warn, (void *)(uintptr_t)t->job));
    snprintf(f->path, sizeof f->path, "%s", m.path);
    sel_status rc = SEL_OK;
    if (m.tokenizer_crc32 != sel_tokenizer_crc32(t->tokenizer))
        rc = sel_fail(SEL_EUSER, "train.init_from: %s was trained with another tokenizer (checksum %08x, here %08x)",
                      m.path, m.tokenizer_crc32, sel_tokenizer_crc32(t->tokenizer));
    sel_manifest_free(&m);
    return rc;
}

/* [collective] rank 0's finding for everyone. */
static sel_status share(sel_trainer *t, sel_status rc, found *f)
{
    SEL_TRY(sel_comm_agree(t->comm, rc));
    sel_comm_bcast(t->comm, f, sizeof *f, 0);
    return SEL_OK;
}

static sel_status load_found(sel_trainer *t, const found *f, bool moments)
{
    sel_manifest m = { .step = f->step, .tokens = f->tokens };
    snprintf(m.path, sizeof m.path, "%s", f->path);
    return sel_arrays_load(t, &m, moments);
}

sel_status sel_trainer_load(sel_trainer *t, int64_t *resumed_from)
{
    const bool first = sel_comm_rank(t->comm) == 0;
    found own = { 0 }, initial = { 0 };

    *resumed_from = -1;
    SEL_TRY(share(t, first ? find_own(t, &own) : SEL_OK, &own));
    if (own.path[0]) {
        SEL_TRY(sel_comm_agree(t->comm, load_found(t, &own, true)));
        t->step = *resumed_from = own.step;
        t->tokens_seen = own.tokens;
        SEL_TRY(sel_trainer_share_left_out(t));
    } else {
        SEL_TRY(share(t, first ? find_initial(t, &initial) : SEL_OK, &initial));
        sel_status rc = SEL_OK;
        if (initial.path[0] && (rc = load_found(t, &initial, false)) == SEL_EFILE) {
            char why[512];
            snprintf(why, sizeof why, "%s", sel_error());
            rc = sel_fail(SEL_EUSER, "train.init_from: not of this model: %s", why);
        }
        if (!initial.path[0]) sel_layout_init_params(t->layout, (uint64_t)t->config->run.seed, t->params, t->threads);
        SEL_TRY(sel_comm_agree(t->comm, rc));
    }
    return sel_comm_agree(t->comm, sel_model_pack(t->model, t->params));
}

/* On rank 0: a run that is there is locked before anything of it is read: an earlier job may still be saving. */
static sel_status lock_run(sel_trainer *t)
{
    return sel_path_is_dir(t->checkpoints) ? sel_run_open(&t->run, t->config->run.dir) : SEL_OK;
}

/* On rank 0: the run folder, from here on. */
static sel_status open_run(sel_trainer *t)
{
    char *yaml = NULL;
    if (!t->run) SEL_TRY(sel_run_open(&t->run, t->config->run.dir));
    SEL_TRY(sel_make_dirs(t->checkpoints));
    SEL_TRY(sel_config_emit(t->config, &yaml));
    const sel_status rc = sel_run_write_config(t->run, yaml);
    free(yaml);
    return rc;
}

static sel_status open_all(sel_trainer *t, int64_t *resumed_from)
{
    SEL_TRY(sel_comm_agree(t->comm, sel_fault_init(sel_comm_rank(t->comm))));
    SEL_TRY(compare_settings(t));
    SEL_TRY(sel_comm_agree(t->comm, open_inputs(t)));
    SEL_TRY(compare_inputs(t));
    SEL_TRY(sel_path_join(t->checkpoints, t->config->run.dir, "checkpoints"));
    SEL_TRY(sel_threads_choose(t->comm, t->config->compute.threads, &t->threads, &t->binding));
    SEL_TRY(sel_comm_agree(t->comm, sel_comm_rank(t->comm) == 0 ? lock_run(t) : SEL_OK));
    SEL_TRY(resolve_precision(t));
    SEL_TRY(sel_comm_agree(t->comm, make_layout(t)));
    SEL_TRY(sel_arrays_new(t));
    SEL_TRY(open_engine(t));
    SEL_TRY(open_sequence(t));
    SEL_TRY(sel_comm_agree(t->comm, make_model(t)));
    sel_comm_barrier(t->comm);   /* all measure at once: the peak that they have together */
    SEL_TRY(sel_comm_agree(t->comm, sel_linear_measure_peak(t->engine, &t->peak_gflops)));
    SEL_TRY(sel_trainer_load(t, resumed_from));
    return sel_comm_agree(t->comm, sel_comm_rank(t->comm) == 0 ? open_run(t) : SEL_OK);
}

sel_status sel_trainer_open(sel_trainer *t, const sel_train_job *job, int64_t *resumed_from)
{
    memset(t, 0, sizeof *t);
    t->job = job;
    t->resolved = *job->config;
    t->config = &t->resolved;
    t->comm = job->comm;
    const sel_status rc = open_all(t, resumed_from);
    if (rc != SEL_OK) sel_trainer_close(t);
    return rc;
}

void sel_trainer_close(sel_trainer *t)
{
    sel_run_close(&t->run);
    sel_arrays_free(t);
    sel_model_free(&t->model);
    sel_sequence_free(&t->sequence);
    sel_linear_close(&t->engine);
    sel_layout_free(&t->layout);
    sel_free(t->live_keys);
    sel_free(t->tokens);
    free(t->skipped);
    sel_tokenizer_close(&t->tokenizer);
    sel_corpus_close(&t->train);
    sel_corpus_close(&t->validation);
    memset(t, 0, sizeof *t);
}
