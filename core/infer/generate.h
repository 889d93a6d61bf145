/* generate.h: text from a model, token by token. */
#ifndef SEL_CORE_INFER_GENERATE_H
#define SEL_CORE_INFER_GENERATE_H

#include "core/infer/loaded.h"

/* How the next token is drawn.  temperature 0: the likeliest (smallest id among equals). */
typedef struct {
    double temperature;
    int64_t top_k;        /* 0: all */
    double top_p;         /* 1: all */
    uint64_t seed;
} sel_sampling;

/* Draws a token from logits [V] (the tokenizer's ids: V may be smaller than the model's); `index` numbers the draws of
 * a seed.  order [V] is scratch. */
int32_t sel_sample(const sel_sampling *s, const float *logits, int64_t V, int64_t index, int32_t *order);

typedef enum { SEL_STOP_LENGTH, SEL_STOP_EOS, SEL_STOP_CONTEXT } sel_stop;

typedef struct {
    sel_sampling sampling;
    int64_t most;         /* new tokens at most */
    bool cache;           /* false: the whole sequence anew for every token (to check the cache) */
} sel_generate_options;

/* Goes on after ids[0 .. n), BOS included.  New tokens into out and their log-probabilities (of the unchanged
   distribution) into logp, both of min(most, context + 1 - n); how many into *made.  SEL_EUSER when the prompt leaves
   no room in the context. */
sel_status sel_generate(const sel_loaded *l, const int32_t *ids, int64_t n, const sel_generate_options *o, int32_t *out,
                        double *logp, int64_t *made, sel_stop *stop);

#endif
