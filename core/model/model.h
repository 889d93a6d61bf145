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
#include "core/base/profile.h"
#include "core/model/layout.h"
#include "dist/sequence.h"
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
    sel_sequence *sequence;       /* the ranks that share each sequence, for these sizes; must outlive the model; NULL:
                                     this one has all tokens.  Not for decoding */
    void (*tick)(void *ctx);      /* training: called between the operations of backward; NULL: nobody is interested */
    void *tick_ctx;
    sel_profile *profile;         /* laps of every call are added to it; must outlive the model; NULL: not wanted */
} sel_model_options;

/* The attention options that a configuration asks for. */
sel_attention_options sel_attention_options_of(const sel_config *c);

/* Values of a token's row of keys that ranks share: its keys, values and, bilinear, sel_k. */
int64_t sel_model_keys_width(const sel_dims *d);

/* The layout must outlive the model; projections for the selection (dims.bilinear) need attention.selective.
   SEL_ENOMEM when its memory is not to be had. */
sel_status sel_model_new(sel_model **m, const sel_layout *layout, const sel_model_options *o);
void       sel_model_free(sel_model **m);

/* Bytes that the model holds: packed weights, activations kept for backward, scratch. */
void sel_model_memory(const sel_model *m, size_t *packed, size_t *kept, size_t *scratch);

/* For measurements: selection off, or on again in a model that was made with it, and where its laps go from now on. */
void sel_model_set_selective(sel_model *m, bool selective, sel_profile *profile);

/* Packs the linear layers' weights.  params [layout total] are read by every later call
   too (norms, embeddings): the same array must be passed, unchanged since. */
sel_status sel_model_pack(sel_model *m, const float *params);

/* Sums over the sequences of one call; where ranks share them, over the tokens of this rank. */
typedef struct {
    double loss;          /* -log p, summed over target tokens, nats */
    double memory;        /* sum over sequences of sum_l max_i M[l,i] / (L n) (equation 2, without epsilon); each
                             maximum is counted by one rank */
    int64_t tokens;       /* targets counted */
    int64_t correct;      /* targets that had the largest logit */
} sel_batch_stats;

/* Forward and backward of `batch` sequences of n tokens: tokens [batch][n + 1], inputs
   then targets.  grads [layout total] = (add: +=) loss_scale * d(sum of -log p) + memory_scale * d(stats->memory).
   Unless add, what grads held does not matter, but for the gaps between tensors, which are left alone.
   ready(ctx, begin, end), where not NULL, is told each stretch of grads that no later
   layer of this call will touch, from the last layer to the first.
   [collective, ranks of options.sequence] They call it with the same tokens; n is options.tokens then. */
sel_status sel_model_train(sel_model *m, const float *params, float *grads, bool add, const int32_t *tokens,
                           int64_t batch, int64_t n, double loss_scale, double memory_scale,
                           void (*ready)(void *ctx, int64_t begin, int64_t end), void *ctx, sel_batch_stats *stats);

/* Forward only.  logp, best [batch][n] where not NULL: log p of each target, and whether it
   had the largest logit (ranks that share sequences: of the rank's own, chunk by chunk).  Targets < 0 are padding: not
   counted, logp 0; so may be whole ends of sequences.  [collective] as sel_model_train. */
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
