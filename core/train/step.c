/* step.c: one training step, as the data sees it:
 *
 *     samples -> forward -> backward -> sum over ranks -> norm, clip -> AdamW -> packed weights
 *
 * Every decision (not finite, signal, time to save) is taken from sums over all ranks, so all ranks take it.
 */
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include "core/base/fault.h"
#include "core/train/schedule.h"
#include "core/train/trainer.h"

/* Numbers that all ranks sum in one message. */
enum { SUM_LOSS, SUM_MEMORY, SUM_TOKENS, SUM_NOT_FINITE, SUM_SIGNAL, SUM_SAVE,
       SUM_WIRE, SUM_WIRE_LEAST, SUM_HOST, SUM_WAIT, SUM_BUSY, SUMS };
_Static_assert(SUM_TOKENS + 1 == SEL_LEAF_NUMBERS, "the first numbers are those that leaves sum");

/* Where a stretch of the gradient goes when it is final. */
typedef struct {
    sel_trainer *t;
    bool reduce;
} destination;

static void gradients_ready(void *ctx, int64_t begin, int64_t end)
{
    const destination *to = ctx;

    sel_leaf_close(to->t, to->t->leaves - 1, begin, end);
    if (begin == 0 && sel_fault("backward", to->t->step + 1, "nan")) to->t->grads[0] = NAN;
    if (to->reduce) sel_reducer_ready(to->t->reducer, begin);
}

static _Noreturn void die(const sel_trainer *t, const char *phase, int64_t step)
{
    char where[64];
    snprintf(where, sizeof where, "%s of step %lld", phase, (long long)step);
    sel_comm_die(t->comm, where);
}

/* Gradient of this rank's samples into t->grads, scaled for the global mean, and to the reducer; their sums. */
static sel_status local_gradient(sel_trainer *t, int64_t step, bool reduce, double *sums)
{
    destination to = { .t = t, .reduce = reduce };
    const sel_config *c = t->config;
    const int64_t N = c->model.context, batch = c->train.batch;
    const double loss_scale = 1.0 / (double)(batch * N),
                 memory_scale = c->attention.memory_loss.epsilon / (double)batch;

    const int64_t total = t->layout->total, each = t->count / t->leaves;
    double numbers[SEL_LEVELS][SEL_LEAF_NUMBERS];

    sel_fault("data", step, "");
    for (int64_t i = 0; i < t->count; i += t->micro) {
        const int leaf = (int)(i / each), depth = sel_leaf_depth(leaf);
        const bool leaf_ends = (i + t->micro) % each == 0, last = i + t->micro >= t->count;
        float *const grads = t->sums[depth];
        sel_batch_stats stats;

        if (i % each == 0) memset(numbers[depth], 0, sizeof numbers[depth]);
        for (int64_t k = 0; k < t->micro; k++) {
            const int64_t w = sel_sample_window((uint64_t)c->run.seed, step, t->first + i + k, batch, t->windows);
            SEL_TRY(sel_corpus_window(t->train, N, w, t->tokens + k * (N + 1), NULL));
        }
        sel_profile_lap(&t->profile, SEL_PART_DATA, 0.0, 0.0);
        sel_fault("forward", step, "");
        SEL_TRY(sel_model_train(t->model, t->params, grads, i % each != 0, t->tokens, t->micro, N, loss_scale,
                                memory_scale, last ? gradients_ready : NULL, &to, &stats));
        for (int64_t l = 0; l < t->layout->dims.L; l++) t->live_keys[l] = sel_model_live_keys(t->model, l);
        numbers[depth][SUM_LOSS] += stats.loss;
        numbers[depth][SUM_MEMORY] += stats.memory;
        numbers[depth][SUM_TOKENS] += (double)stats.tokens;
        if (leaf_ends && !last) sel_leaf_close(t, leaf, 0, total);
        if (leaf_ends) sel_leaf_close_numbers(numbers, leaf);
    }
    memcpy(sums, numbers[0], sizeof numbers[0]);
    if (sel_fault("forward", step, "nan")) sums[SUM_LOSS] = NAN;
    sel_fault("backward", step, "");
    return SEL_OK;
}

sel_status sel_trainer_gradient_again(sel_trainer *t, int64_t step, bool *loss, bool *gradient)
{
    double sums[SUMS] = { 0 };

    if (local_gradient(t, step, false, sums) != SEL_OK) die(t, "the gradient", step);
    *loss = isfinite(sums[SUM_LOSS]) && isfinite(sums[SUM_MEMORY]);
    *gradient = isfinite(t->ops.sum_squares(t->grads, t->layout->total, t->threads));
    sel_trainer_forget_wire(t);
    return SEL_OK;
}

void sel_trainer_forget_wire(sel_trainer *t)
{
    sel_wire forgotten;
    if (t->sequence) sel_sequence_wire(t->sequence, &forgotten);
}

/* What this rank has moved since the last step: gradients, parameters, and what sequence groups share. */
static sel_wire moved(sel_trainer *t)
{
    sel_wire w, keys = { 0 };
    sel_reducer_wire(t->reducer, &w);   /* of this step's sums, and of the last one's parameters */
    if (t->sequence) sel_sequence_wire(t->sequence, &keys);
    sel_wire_add(&w, &keys);
    return w;
}

/* [collective] A rank has been asked to end: which signal it was, told to the user at once. */
static int hear_signal(sel_trainer *t, int64_t step)
{
    static const struct { int number; const char *name; } names[] = {
        { SIGTERM, "SIGTERM" }, { SIGINT, "SIGINT" }, { SIGUSR1, "SIGUSR1" }, { SIGUSR2, "SIGUSR2" },
        { SIGHUP, "SIGHUP" }, { SIGXCPU, "SIGXCPU" },
    };
    const char *name = "a signal";
    char line[96];
    double number = *t->job->signal;

    sel_comm_max_doubles(t->comm, &number, 1);   /* of several signals one is named */
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (names[i].number == (int)number) name = names[i].name;
    snprintf(line, sizeof line, "%s received: finishing step %lld, then saving", name, (long long)step);
    if (sel_comm_rank(t->comm) == 0) t->job->watcher->message(t->job->watcher->ctx, line);
    return (int)number;
}

sel_status sel_trainer_step(sel_trainer *t, bool save_due, sel_step_stats *s)
{
    const sel_config *c = t->config;
    const int64_t step = t->step + 1;
    double sums[SUMS] = { 0 };

    sel_profile_start(&t->profile);
    if (local_gradient(t, step, true, sums) != SEL_OK) die(t, "the gradient", step);
    sel_fault("reduce", step, "");
    sel_reducer_finish(t->reducer);
    sel_profile_lap(&t->profile, SEL_PART_REDUCE, 0.0, 0.0);

    const double norm = sqrt(sel_arrays_norm_squared(t));
    sel_profile_lap(&t->profile, SEL_PART_GRADIENT_NORM, 0.0, 4.0 * (double)t->layout->total);
    const sel_wire w = moved(t);
    sums[SUM_WIRE] = w.wire_bytes;
    sums[SUM_WIRE_LEAST] = w.wire_least;
    sums[SUM_HOST] = w.host_bytes;
    sums[SUM_WAIT] = w.wait_seconds;
    sums[SUM_BUSY] = w.busy_seconds;
    sums[SUM_NOT_FINITE] = !isfinite(norm) || !isfinite(sums[SUM_LOSS]) || !isfinite(sums[SUM_MEMORY]);
    sums[SUM_SIGNAL] = *t->job->signal ? 1.0 : 0.0;
    sums[SUM_SAVE] = save_due ? 1.0 : 0.0;
    sel_comm_sum_doubles(t->comm, sums, SUMS);
    sel_profile_lap(&t->profile, SEL_PART_REDUCE, 0.0, 0.0);

    s->loss = sums[SUM_LOSS] / sums[SUM_TOKENS];
    s->memory_loss = c->attention.memory_loss.epsilon * sums[SUM_MEMORY] / (double)c->train.batch;
    s->tokens = (int64_t)sums[SUM_TOKENS];
    s->grad_norm = norm;
    s->lr = sel_learning_rate(c->train.lr, c->train.warmup, c->train.steps, step);
    s->save_due = sums[SUM_SAVE] != 0.0;
    s->signal = sums[SUM_SIGNAL] != 0.0 ? hear_signal(t, step) : 0;
    s->wire = (sel_wire){ .wire_bytes = sums[SUM_WIRE], .wire_least = sums[SUM_WIRE_LEAST],
                          .host_bytes = sums[SUM_HOST], .wait_seconds = sums[SUM_WAIT],
                          .busy_seconds = sums[SUM_BUSY] };
    if (sums[SUM_NOT_FINITE] != 0.0) {
        sel_reducer_gather(t->reducer);   /* of parameters as they were: the next step begins like any other */
        return sel_trainer_blame(t, step, s);
    }

    const double clip = c->train.clip;
    sel_fault("optimizer", step, "");
    sel_optimizer_update(t, step, s->lr, clip > 0.0 && norm > clip ? clip / norm : 1.0);
    sel_profile_lap(&t->profile, SEL_PART_OPTIMIZER, 0.0, 28.0 * (double)t->layout->parameters);
    if (sel_model_pack(t->model, t->params) != SEL_OK) die(t, "packing the weights", step);
    t->step = step;
    t->tokens_seen += s->tokens;
    return SEL_OK;
}
