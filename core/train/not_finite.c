/* not_finite.c: a step whose loss or gradient is not finite: on which rank, and what becomes of its batch
 * (dist.on_nan; spec, section 14).
 *
 * A batch that is left out is a step without an update: the step's number passes, so that which step sees which
 * samples stays a function of the seed and the step alone.  The list of such steps goes into every checkpoint.
 */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "core/base/clock.h"
#include "core/train/trainer.h"

bool sel_trainer_leaves_out(const sel_trainer *t, int64_t step)
{
    for (int i = 0; i < t->n_skipped; i++)
        if (t->skipped[i] == step) return true;
    return false;
}

sel_status sel_trainer_leave_out(sel_trainer *t, int64_t step)
{
    if (sel_trainer_leaves_out(t, step)) return SEL_OK;
    int64_t *const more = realloc(t->skipped, ((size_t)t->n_skipped + 1) * sizeof *more);
    if (!more) return sel_fail(SEL_ENOMEM, "out of memory for the list of %d steps that are left out", t->n_skipped);
    t->skipped = more;
    int at = t->n_skipped++;
    for (; at > 0 && more[at - 1] > step; at--) more[at] = more[at - 1];
    more[at] = step;
    return SEL_OK;
}

sel_status sel_trainer_share_left_out(sel_trainer *t)
{
    sel_status rc = SEL_OK;
    int n = t->n_skipped;

    sel_comm_bcast(t->comm, &n, sizeof n, 0);
    if (n > t->n_skipped) {
        int64_t *const more = realloc(t->skipped, (size_t)n * sizeof *more);
        if (more) t->skipped = more;
        else rc = sel_fail(SEL_ENOMEM, "out of memory for the list of %d steps that are left out", n);
    }
    SEL_TRY(sel_comm_agree(t->comm, rc));
    t->n_skipped = n;
    if (n) sel_comm_bcast(t->comm, t->skipped, (size_t)n * sizeof *t->skipped, 0);
    return SEL_OK;
}

sel_status sel_trainer_blame(sel_trainer *t, int64_t step, const sel_step_stats *s)
{
    const int rank = sel_comm_rank(t->comm), size = sel_comm_size(t->comm);
    bool loss, gradient;
    char where[128], who[64];

    SEL_TRY(sel_trainer_gradient_again(t, step, &loss, &gradient));
    /* The lowest rank wins; of what it has, the loss, which comes first. */
    double blame = !loss || !gradient ? 2.0 * (size - rank) + (loss ? 0.0 : 1.0) : 0.0;
    sel_comm_max_doubles(t->comm, &blame, 1);
    const int code = (int)blame, blamed = size - code / 2, group = t->mesh.sequence;
    if (group > 1)   /* keys are shared: what is not finite on one is so on all at once */
        snprintf(who, sizeof who, "among ranks %d to %d, which share sequences", blamed / group * group,
                 blamed / group * group + group - 1);
    else snprintf(who, sizeof who, "on rank %d", blamed);
    if (code)
        snprintf(where, sizeof where, "%s, in %s", who, code % 2 ? "forward" : "backward");
    else
        snprintf(where, sizeof where, "but computed again it is, on every rank: the sum over the ranks overflows, or a "
                 "machine has erred");
    return sel_fail(SEL_ENUM, "step %" PRId64 ": the %s is not finite (loss %g, gradient norm %g) %s; the step was not "
                    "taken", step, isfinite(s->loss) ? "gradient" : "loss", s->loss, s->grad_norm, where);
}

/* On rank 0: an event into the metrics. */
static void record(sel_trainer *t, int64_t step, const char *line)
{
    const sel_metrics event = { .step = step, .tokens = t->tokens_seen, .event = line };

    if (sel_comm_rank(t->comm) != 0) return;
    if (sel_run_metrics(t->run, &event) != SEL_OK) sel_comm_die(t->comm, "writing the metrics");
}

/* And on the terminal, since the run goes on. */
static void tell(sel_trainer *t, int64_t step, const char *line)
{
    record(t, step, line);
    if (sel_comm_rank(t->comm) == 0) t->job->watcher->message(t->job->watcher->ctx, line);
}

/* [collective] Back to the last checkpoint, with the list of left-out steps as it is now. */
static sel_status roll_back(sel_trainer *t, int64_t last)
{
    const int64_t first = last - t->in_a_row + 1;
    char line[256];
    int64_t step;

    if (t->rolled_back)
        return sel_fail(SEL_ENUM, "steps %" PRId64 " to %" PRId64 ": not finite again, after a return to the last "
                        "checkpoint already; stopping", first, last);
    SEL_TRY(sel_trainer_load(t, &step));
    if (sel_comm_rank(t->comm) == 0 && sel_run_cut_metrics(t->run, t->step) != SEL_OK)
        sel_comm_die(t->comm, "cutting the metrics back");
    snprintf(line, sizeof line, "steps %" PRId64 " to %" PRId64 " were not finite: back to step %" PRId64
             ", their batches are left out", first, last, t->step);
    tell(t, t->step, line);
    t->in_a_row = 0;
    t->rolled_back = true;
    return SEL_OK;
}

sel_status sel_trainer_skip(sel_trainer *t)
{
    const int64_t step = t->step + 1;
    char line[512];

    if (t->config->dist.on_nan == SEL_ON_NAN_STOP) {
        snprintf(line, sizeof line, "%s", sel_error());
        record(t, t->step, line);
        return sel_fail(SEL_ENUM, "%s", line);
    }
    snprintf(line, sizeof line, "%.400s; its batch is left out", sel_error());
    SEL_TRY(sel_comm_agree(t->comm, sel_trainer_leave_out(t, step)));
    tell(t, step, line);
    t->step = step;
    if (++t->in_a_row >= t->config->dist.nan_rollback) return roll_back(t, step);
    return SEL_OK;
}

void sel_trainer_pass(sel_trainer *t)
{
    char line[64];

    t->step++;
    snprintf(line, sizeof line, "step %" PRId64 ": its batch is left out", t->step);
    tell(t, t->step, line);
}
