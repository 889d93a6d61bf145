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

static void gradients_ready(void *reducer, int64_t begin, int64_t end) { sel_reducer_ready(reducer, begin, end); }

static _Noreturn void die(const sel_trainer *t, const char *phase, int64_t step)
{
    char where[64];
    snprintf(where, sizeof where, "%s of step %lld", phase, (long long)step);
    sel_comm_die(t->comm, where);
}

/* Gradient of this rank's samples into t->grads, scaled for the global mean; sums into s. */
static sel_status local_gradient(sel_trainer *t, int64_t step, double *sums)
{
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
            sel_corpus_window(t->train, N, w, t->tokens + k * (N + 1));
        }
        sel_profile_lap(&t->profile, SEL_PART_DATA, 0.0, 0.0);
        SEL_TRY(sel_model_train(t->model, t->params, t->grads, i > 0, t->tokens, t->micro, N, loss_scale,
                                memory_scale, last ? gradients_ready : NULL, t->reducer, &stats));
        sums[SUM_LOSS] += stats.loss;
        sums[SUM_MEMORY] += stats.memory;
        sums[SUM_TOKENS] += (double)stats.tokens;
    }
    return SEL_OK;
}

sel_status sel_trainer_step(sel_trainer *t, bool save_due, sel_step_stats *s)
{
    const sel_config *c = t->config;
    const int64_t step = t->step + 1;
    double sums[SUMS] = { 0 };

    sel_fault("forward", step, "");
    sel_profile_start(&t->profile);
    if (local_gradient(t, step, sums) != SEL_OK) die(t, "the gradient", step);
    if (sel_fault("forward", step, "nan")) sums[SUM_LOSS] = NAN;
    if (sel_fault("backward", step, "nan")) t->grads[0] = NAN;
    sel_fault("reduce", step, "");
    sel_reducer_finish(t->reducer);
    sel_profile_lap(&t->profile, SEL_PART_REDUCE, 0.0, 0.0);

    const double norm = sqrt(t->ops.sum_squares(t->grads, t->layout->total, t->threads));
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
    s->signal = sums[SUM_SIGNAL] != 0.0;
    s->save_due = sums[SUM_SAVE] != 0.0;
    if (sums[SUM_NOT_FINITE] != 0.0)
        return sel_fail(SEL_ENUM, "step %lld: the %s is not finite (loss %g, gradient norm %g); the step was not taken",
                        (long long)step, isfinite(s->loss) ? "gradient" : "loss", s->loss, norm);

    const double clip = c->train.clip;
    sel_fault("optimizer", step, "");
    sel_optimizer_update(t, step, s->lr, clip > 0.0 && norm > clip ? clip / norm : 1.0);
    sel_profile_lap(&t->profile, SEL_PART_OPTIMIZER, 0.0, 28.0 * (double)t->layout->parameters);
    if (sel_model_pack(t->model, t->params) != SEL_OK) die(t, "packing the weights", step);
    t->step = step;
    t->tokens_seen += s->tokens;
    return SEL_OK;
}
