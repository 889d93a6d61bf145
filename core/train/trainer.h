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
#include "dist/sequence.h"

/* Levels of the tree over a rank's leaves, and numbers that are summed in it beside the gradient. */
enum { SEL_LEVELS = 18, SEL_LEAF_NUMBERS = 3 };

/* Where ranks and threads run, in words; a warning where they share processors, or "".  Of rank 0. */
typedef struct {
    char line[512], warning[512];
} sel_binding;

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
    float *params, *grads;           /* [layout total] */
    float *exp_avg, *exp_avg_sq;     /* [owned]: of the stretches that this rank updates, one after another */
    sel_stretch *stretches;          /* [sel_reducer_pieces] */
    int64_t owned;
    double *squares;                 /* [blocks of the layout], dist.zero only */
    int leaves;                      /* of the batch on this rank: 1 without dist.virtual_ranks */
    float *sums[SEL_LEVELS];         /* [layout total]: sums of leaves, by depth; 0: grads; NULL where not needed */
    sel_ops ops;
    sel_linear_engine *engine;
    sel_model *model;
    sel_reducer *reducer;
    sel_chunks chunks;               /* of each sequence, this rank's: all of it where mesh.sequence is 1 */
    sel_sequence *sequence;          /* NULL there */

    int64_t first, count, micro;     /* samples of a batch that are this rank's sequence group's; how many at once */
    int32_t *tokens;                 /* [micro][N + 1] */
    double *live_keys;               /* [layers] of the last micro-batch: shares of the pairs that attention computed */
    int threads;
    sel_binding binding;
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
    sel_wire wire;                   /* summed over the ranks */
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

/* [collective in a sequence group] Computes this rank's gradient of a step once more, not summed over the ranks: is its
   loss, is its gradient finite?  (step.c) */
sel_status sel_trainer_gradient_again(sel_trainer *t, int64_t step, bool *loss, bool *gradient);

/* What sequence groups have exchanged since the last step was no part of a step: it is not counted.  (step.c) */
void sel_trainer_forget_wire(sel_trainer *t);

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

/* The arrays: made and freed; their bytes; the sum of squares of the whole gradient, the same bits for any ranks and
   with dist.zero or without; from a checkpoint, and into one.  (arrays.c) */
sel_status sel_arrays_new(sel_trainer *t);    /* [collective] */
void       sel_arrays_free(sel_trainer *t);   /* [collective] */
int64_t    sel_arrays_bytes(const sel_trainer *t);
double     sel_arrays_norm_squared(sel_trainer *t);   /* [collective] */
sel_status sel_arrays_load(sel_trainer *t, const sel_manifest *m, bool moments);
sel_status sel_arrays_save(sel_trainer *t, const sel_checkpoint_info *info);   /* [collective] */

/* dist.virtual_ranks: leaves of this rank, checked; at what depth of t->sums a leaf adds up its gradient; after it,
   over floats [begin, end), and over the numbers beside it, adds up what closes with it.  (leaves.c) */
sel_status sel_leaves_choose(sel_trainer *t);
int        sel_leaf_depth(int leaf);
void       sel_leaf_close(sel_trainer *t, int leaf, int64_t begin, int64_t end);
void       sel_leaf_close_numbers(double numbers[SEL_LEVELS][SEL_LEAF_NUMBERS], int leaf);

/* AdamW over the stretches that this rank owns, with the gradient scaled by g_scale; all get the result.  (optimizer.c)
   [collective] */
void sel_optimizer_update(sel_trainer *t, int64_t step, double lr, double g_scale);

/* Threads that this rank should use: `wanted`, or, at 0, what its binding allows, shared with the ranks that are bound
   alike; on rank 0 also where they run.  SEL_EUSER where OpenMP would not give them.  (threads.c) [collective] */
sel_status sel_threads_choose(sel_comm *c, int64_t wanted, int *threads, sel_binding *b);

#endif
