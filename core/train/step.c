/* step.c: one training step, as the data sees it:
 *
 *     samples -> forward -> backward -> sum over ranks -> norm, clip -> AdamW -> packed weights
 *
 * Every decision (not finite, signal, time to save) is taken from sums over all ranks, so all ranks take it.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "core/base/fault.h"
#include "core/train/schedule.h"
#include "core/train/trainer.h"

/* Numbers that all ranks sum in one message. */
enum { SUM_LOSS, SUM_MEMORY, SUM_TOKENS, SUM_NOT_FINITE, SUM_SIGNAL, SUM_SAVE, SUMS };

/* Where a stretch of the gradient goes when it is final. */
typedef struct {
    sel_trainer *t;
    bool reduce;
} destination;

static void gradients_ready(void *ctx, int64_t begin, int64_t end)
{
    const destination *to = ctx;

    if (begin == 0 && sel_fault("backward", to->t->step + 1, "nan")) to->t->grads[0] = NAN;
    if (to->reduce) sel_reducer_ready(to->t->reducer, begin, end);
}

static _Noreturn void die(const sel_trainer *t, const char *phase, int64_t step)
{
    char where[64];
    snprintf(where, sizeof where, "%s of step %lld", phase, (long long)step);
    sel_comm_die(t->comm, where);
}

/* Gradient of this rank's samples into t->grads, scaled for the global mean, and to the reducer; adds to sums. */
static sel_status local_gradient(sel_trainer *t, int64_t step, bool reduce, double *sums)
{
    destination to = { .t = t, .reduce = reduce };
    const sel_config *c = t->config;
    const int64_t N = c->model.context, batch = c->train.batch;
    const double loss_scale = 1.0 / (double)(batch * N),
                 memory_scale = c->attention.memory_loss.epsilon / (double)batch;

    sel_fault("data", step, "");
    for (int64_t i = 0; i < t->count; i += t->micro) {
        const bool last = i + t->micro >= t->count;
        sel_batch_stats stats;

        for (int64_t k = 0; k < t->micro; k++) {
            const int64_t w = sel_sample_window((uint64_t)c->run.seed, step, t->first + i + k, batch, t->windows);
            SEL_TRY(sel_corpus_window(t->train, N, w, t->tokens + k * (N + 1), NULL));
        }
        sel_profile_lap(&t->profile, SEL_PART_DATA, 0.0, 0.0);
        sel_fault("forward", step, "");
        SEL_TRY(sel_model_train(t->model, t->params, t->grads, i > 0, t->tokens, t->micro, N, loss_scale,
                                memory_scale, last ? gradients_ready : NULL, &to, &stats));
        sums[SUM_LOSS] += stats.loss;
        sums[SUM_MEMORY] += stats.memory;
        sums[SUM_TOKENS] += (double)stats.tokens;
    }
    if (sel_fault("forward", step, "nan")) sums[SUM_LOSS] = NAN;
    sel_fault("backward", step, "");
    return SEL_OK;
}

static double gradient_norm(const sel_trainer *t)
{
    return sqrt(t->ops.sum_squares(t->grads, t->layout->total, t->threads));
}

sel_status sel_trainer_gradient_again(sel_trainer *t, int64_t step, bool *loss, bool *gradient)
{
    double sums[SUMS] = { 0 };

    if (local_gradient(t, step, false, sums) != SEL_OK) die(t, "the gradient", step);
    *loss = isfinite(sums[SUM_LOSS]) && isfinite(sums[SUM_MEMORY]);
    *gradient = isfinite(gradient_norm(t));
    return SEL_OK;
}

/* [collective] A rank has been asked to end: which signal it was, told to the user at once. */
static int hear_signal(sel_trainer *t, int64_t step)
{
    static const struct { int number; const char *name; } names[] = {
        { SIGTERM, "SIGTERM" }, { SIGINT, "SIGINT" }, { SIGUSR1, "SIGUSR1" }, { SIGUSR2, "SIGUSR2" },
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

    const double norm = gradient_norm(t);
    sel_profile_lap(&t->profile, SEL_PART_GRADIENT_NORM, 0.0, 4.0 * (double)t->layout->total);
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
    if (sums[SUM_NOT_FINITE] != 0.0) return sel_trainer_blame(t, step, s);

    const double clip = c->train.clip;
    sel_fault("optimizer", step, "");
    sel_optimizer_update(t, step, s->lr, clip > 0.0 && norm > clip ? clip / norm : 1.0);
    sel_profile_lap(&t->profile, SEL_PART_OPTIMIZER, 0.0, 28.0 * (double)t->layout->parameters);
    if (sel_model_pack(t->model, t->params) != SEL_OK) die(t, "packing the weights", step);
    t->step = step;
    t->tokens_seen += s->tokens;
    return SEL_OK;
}
