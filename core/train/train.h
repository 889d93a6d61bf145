/* train.h: a training run, from a configuration to its last checkpoint.
 *
 * Prints nothing: what happens is told to a watcher, which the launcher owns.
 */
#ifndef SEL_CORE_TRAIN_TRAIN_H
#define SEL_CORE_TRAIN_TRAIN_H

#include "core/config/config.h"
#include "core/run/run.h"
#include "dist/comm.h"

/* What a run is and where: told once, before its first step. */
typedef struct {
    int64_t parameters, memory_bytes;   /* of this rank: parameters, gradients, moments, activations, packed weights */
    int64_t train_tokens, validation_tokens, windows;
    int64_t micro_batch, local_batch, resumed_from;   /* -1: fresh */
    int ranks, hosts, threads;
    double peak_gflops;                 /* of a rank */
    const char *level, *cpu, *linear, *precision, *mpi;
    const char *binding;                /* where ranks and threads run, one line */
} sel_train_start;

/* After a logged step. */
typedef struct {
    sel_metrics row;
    int64_t steps;
    double eta_seconds;
} sel_train_progress;

/* Called on rank 0 only. */
typedef struct {
    void *ctx;
    void (*start)(void *ctx, const sel_train_start *s);
    void (*progress)(void *ctx, const sel_train_progress *p);
    void (*message)(void *ctx, const char *line);
    void (*profile)(void *ctx, const sel_profile *p, int64_t steps, double peak_gflops);   /* at the end, where asked */
} sel_train_watcher;

typedef struct {
    const sel_config *config;
    sel_comm *comm;
    const sel_train_watcher *watcher;
    bool profile;                          /* rank 0's time by part: to the watcher and metrics.jsonl at the end */
    const _Atomic int *signal;   /* number of a signal that asks to save and end; 0: none */
    const char *command, *program, *commit, *compiler, *build;   /* for provenance.json */
} sel_train_job;

typedef struct {
    int64_t step;            /* steps completed, all saved */
    int signal;              /* the run was saved and ended for this signal; 0: it is complete */
} sel_train_result;

/* [collective] Trains to train.steps or to a signal; resumes by itself from the newest intact checkpoint of run.dir.
   Nothing is written before everything that can be checked has been. */
sel_status sel_train(const sel_train_job *job, sel_train_result *result);

#endif
