/* score.h: the loss of a model on a packed corpus, windows shared among the ranks. */
#ifndef SEL_CORE_INFER_SCORE_H
#define SEL_CORE_INFER_SCORE_H

#include "core/data/corpus.h"
#include "core/model/model.h"
#include "dist/comm.h"

/* One window's results, in stream order: tokens [n + 1] (BOS, then n targets), logp [n]. */
typedef sel_status sel_score_fn(void *ctx, int64_t window, const int32_t *tokens, const double *logp, int64_t n);

typedef struct {
    sel_model *model;          /* for training or scoring, packed */
    const float *params;
    int64_t batch, N;          /* windows at once; the context */
    int64_t max_windows;       /* 0: all, the last, incomplete one included */
    sel_comm *comm;            /* NULL: this rank alone does it all */
    int sequence;              /* so many neighbours in comm share the model's sequences, and so have the same windows;
                                  0 or 1: each rank has its own */
    sel_score_fn *each;        /* may be NULL; needs comm NULL */
    void (*progress)(void *ctx, int64_t done, int64_t total);   /* may be NULL; windows of this rank */
    void *ctx;
} sel_score_job;

/* [collective where comm is given] Sums over all windows and ranks, equal on all ranks. */
sel_status sel_score_corpus(const sel_score_job *job, const sel_corpus *corpus, sel_batch_stats *sum);

/* The same for one stream of ids in memory: BOS is put before each window as in a corpus. */
sel_status sel_score_ids(const sel_score_job *job, const int32_t *ids, int64_t n, int32_t bos, sel_batch_stats *sum);

#endif
