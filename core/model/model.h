/* model.h: the decoder-only transformer of spec, section 7: forward, backward, decoding.
 *
 * A sel_model is a plan: sizes, scratch and the linear layers' packed weights for one use
 * of a layout.  The parameters stay with the caller.  After sel_model_new nothing is
 * allocated.
 */
#ifndef SEL_CORE_MODEL_MODEL_H
#define SEL_CORE_MODEL_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "core/model/layout.h"
#include "ops/linear.h"
#include "ops/ops.h"

typedef struct sel_model sel_model;

/* What a model is going to be used for; each use plans its own memory. */
typedef enum {
    SEL_USE_TRAIN,    /* whole sequences, activations kept for backward */
    SEL_USE_SCORE,    /* whole sequences, log-probabilities of their targets */
    SEL_USE_DECODE    /* a few tokens at a time, keys, values and F cached */
} sel_use;

/* The switches of spec, section 2, and the memory loss of section 5. */
typedef struct {
    bool selective, relu, protect_bos, protect_self, shift;
    double epsilon, tau;
    sel_dead_keys dead_keys;      /* section 3.1; off where it cannot be: without relu, in decoding */
} sel_attention_options;

typedef struct {
    sel_use use;
    int64_t batch;                /* sequences at once, at most */
    int64_t tokens;               /* tokens of a sequence at once, at most; <= dims.N */
    sel_attention_options attention;
    bool bfloat16;                /* operands of matrix products in bfloat16, as the engine's; all else float32 */
    int threads;
    const sel_ops *ops;           /* must outlive the model */
    sel_linear_engine *engine;    /* must outlive the model */
    void (*tick)(void *ctx);      /* training: called between the operations of backward; NULL: nobody is interested */
    void *tick_ctx;
} sel_model_options;

/* The attention options that a configuration asks for. */
sel_attention_options sel_attention_options_of(const sel_config *c);

/* The layout must outlive the model; projections for the selection (dims.bilinear) need attention.selective.
   SEL_ENOMEM when its memory is not to be had. */
sel_status sel_model_new(sel_model **m, const sel_layout *layout, const sel_model_options *o);
void       sel_model_free(sel_model **m);

/* Bytes of activations and scratch that the model holds, and of packed weights (estimate). */
size_t sel_model_bytes(const sel_model *m);

/* Packs the linear layers' weights.  params [layout total] are read by every later call
   too (norms, embeddings): the same array must be passed, unchanged since. */
sel_status sel_model_pack(sel_model *m, const float *params);

/* Sums over the sequences of one call. */
typedef struct {
    double loss;          /* -log p, summed over target tokens, nats */
    double memory;        /* sum over sequences of sum_l max_i M[l,i] / (L n) (equation 2, without epsilon) */
    int64_t tokens;       /* targets counted */
    int64_t correct;      /* targets that had the largest logit */
} sel_batch_stats;

/* Forward and backward of `batch` sequences of n tokens: tokens [batch][n + 1], inputs
   then targets.  grads [layout total] += loss_scale * d(sum of -log p) + memory_scale * d(stats->memory).
   ready(ctx, begin, end), where not NULL, is told each stretch of grads that no later
   layer of this call will touch, from the last layer to the first. */
sel_status sel_model_train(sel_model *m, const float *params, float *grads, const int32_t *tokens, int64_t batch,
                           int64_t n, double loss_scale, double memory_scale,
                           void (*ready)(void *ctx, int64_t begin, int64_t end), void *ctx, sel_batch_stats *stats);

/* Forward only.  logp, best [batch][n] where not NULL: log p of each target, and whether it
   had the largest logit.  Targets < 0 are padding: not counted, logp 0. */
sel_status sel_model_score(sel_model *m, const float *params, const int32_t *tokens, int64_t batch, int64_t n,
                           double *logp, uint8_t *best, sel_batch_stats *stats);

/* Pairs of a query and a key that layer l's attention computed in the last call of sel_model_train or _score, as a
   share of all n (n + 1) / 2 of its sequences: 1 unless dead keys were left out. */
double sel_model_live_keys(const sel_model *m, int64_t l);

/* Decoding: n more tokens of each of `batch` sequences, tokens [batch][n], after those
   cached.  logits [batch][V] of the last one.  SEL_EUSER when the context is full. */
sel_status sel_model_extend(sel_model *m, const float *params, const int32_t *tokens, int64_t batch, int64_t n,
                            float *logits);
/* Tokens cached so far; forgetting them all. */
int64_t sel_model_cached(const sel_model *m);
void    sel_model_restart(sel_model *m);

/* Model FLOPs of a training step over `tokens` tokens in sequences of n: backward counts twice forward;
   attention as causal products (spec, section 16). */
double sel_model_flops(const sel_dims *d, int64_t tokens, int64_t n);

#endif
