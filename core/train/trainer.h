/* trainer.h: everything that a training run holds, for the files of core/train. */
#ifndef SEL_CORE_TRAIN_TRAINER_H
#define SEL_CORE_TRAIN_TRAINER_H

#include "core/checkpoint/checkpoint.h"
#include "core/data/corpus.h"
#include "core/data/tokenizer.h"
#include "core/model/model.h"
#include "core/train/train.h"
#include "dist/mesh.h"
#include "dist/reduce.h"

typedef struct sel_trainer {
    const sel_train_job *job;
    const sel_config *config;        /* the job's, with what had to be measured filled in: `resolved` */
    sel_config resolved;
    sel_comm *comm;
    sel_mesh mesh;
    sel_run *run;                    /* rank 0 only */
    char checkpoints[SEL_PATH_MAX];  /* RUN/checkpoints */

    sel_corpus *train, *validation;  /* validation may be NULL */
    sel_tokenizer *tokenizer;
    int64_t windows;                 /* of the training corpus */

    sel_layout *layout;
    float *params, *grads, *exp_avg, *exp_avg_sq;   /* [layout total] each */
    sel_ops ops;
    sel_linear_engine *engine;
    sel_model *model;
    sel_reducer *reducer;

    int64_t first, count, micro;     /* this rank's samples of a batch; how many at once */
    int32_t *tokens;                 /* [micro][N + 1] */
    int threads;
    double peak_gflops;
    sel_profile profile;             /* laps of all steps of this job */

    int64_t step, tokens_seen;       /* completed */
    int64_t *skipped;                /* [n_skipped], ascending: steps whose batches are left out */
    int n_skipped, in_a_row;         /* in_a_row: the last steps, none of which was finite */
    bool rolled_back;                /* and since then no checkpoint beyond the steps that are left out */
} sel_trainer;

/* What one step did; equal on all ranks. */
typedef struct {
    double loss, memory_loss, lr, grad_norm;
    int64_t tokens;
    int signal;                      /* by which a rank has been asked to end; 0: none */
    bool save_due;                   /* rank 0's clock says so */
} sel_step_stats;

/* Opens and checks all that a run needs, loads or makes its state.  (setup.c) [collective] */
sel_status sel_trainer_open(sel_trainer *t, const sel_train_job *job, int64_t *resumed_from);
void       sel_trainer_close(sel_trainer *t);

/* The state of the run's newest intact checkpoint (*resumed_from: its step), or a new one (-1).  Steps that were left
   out before, and those that the checkpoint names, stay left out.  (setup.c) [collective] */
sel_status sel_trainer_load(sel_trainer *t, int64_t *resumed_from);

/* One optimizer step: t->step grows by one.  save_due is this rank's wish.  SEL_ENUM on all ranks, with t as it was and
   a line that names the rank, when loss or gradient is not finite.  (step.c) [collective] */
sel_status sel_trainer_step(sel_trainer *t, bool save_due, sel_step_stats *s);

/* Computes this rank's gradient of a step once more, for itself: is its loss, is its gradient finite?  (step.c) */
sel_status sel_trainer_gradient_again(sel_trainer *t, int64_t step, bool *loss, bool *gradient);

/* Returns SEL_ENUM with a line that says on which rank the step is not finite.  (not_finite.c) [collective] */
sel_status sel_trainer_blame(sel_trainer *t, int64_t step, const sel_step_stats *s);

/* After SEL_ENUM of a step (its line is sel_error()): as dist.on_nan says.  stop: SEL_ENUM.  skip: SEL_OK, the step has
   passed without an update; or, dist.nan_rollback of them in a row, t is at the last checkpoint, and its step is
   smaller; the second time SEL_ENUM.  (not_finite.c) [collective] */
sel_status sel_trainer_skip(sel_trainer *t);

/* Passes a step that is left out.  (not_finite.c) */
void sel_trainer_pass(sel_trainer *t);

/* The list of them: whether the step is in it; puts it in; everyone gets rank 0's, which has all that others have.
   (not_finite.c) */
bool       sel_trainer_leaves_out(const sel_trainer *t, int64_t step);
sel_status sel_trainer_leave_out(sel_trainer *t, int64_t step);
sel_status sel_trainer_share_left_out(sel_trainer *t);   /* [collective] */

/* AdamW over the whole layout with the gradient scaled by g_scale.  (optimizer.c) */
void sel_optimizer_update(sel_trainer *t, int64_t step, double lr, double g_scale);

/* Threads that this rank should use: `wanted`, or, at 0, what its binding allows, shared with the ranks that are bound
   alike.  SEL_EUSER where OpenMP would not give them.  (threads.c) [collective] */
sel_status sel_threads_choose(sel_comm *c, int64_t wanted, int *threads);

#endif
