/* loaded.h: a trained model opened for use: settings, weights, tokenizer, kernels. */
#ifndef SEL_CORE_INFER_LOADED_H
#define SEL_CORE_INFER_LOADED_H

#include "core/checkpoint/checkpoint.h"
#include "core/config/config.h"
#include "core/data/tokenizer.h"
#include "core/model/model.h"

typedef struct {
    sel_manifest manifest;
    sel_config config;          /* that it was trained with */
    sel_layout *layout;
    float *params;
    sel_tokenizer *tokenizer;
    sel_ops ops;
    sel_linear_engine *engine;
    int threads;
} sel_loaded;

/* Opens CKPT: a run folder (its newest intact checkpoint) or a step folder.  threads 0: all processors that this
   process may use. */
sel_status sel_loaded_open(sel_loaded *l, const char *path, int64_t threads, void (*warn)(void *ctx, const char *line),
                           void *ctx);
void       sel_loaded_close(sel_loaded *l);

/* A model of it, packed, for scoring or decoding `batch` sequences, `tokens` at once. */
sel_status sel_loaded_model(const sel_loaded *l, sel_use use, int64_t batch, int64_t tokens, sel_model **m);

#endif
