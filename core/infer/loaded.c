/* loaded.c: from a checkpoint on disk to a model in memory. */
#include "core/infer/loaded.h"

#include <string.h>
#include "core/base/mem.h"

static sel_status open_all(sel_loaded *l, const char *path, void (*warn)(void *ctx, const char *line), void *ctx)
{
    char model[SEL_PATH_MAX];
    sel_cpu_level level;

    SEL_TRY(sel_checkpoint_find(&l->manifest, path, warn, ctx));
    SEL_TRY(sel_config_parse(&l->config, l->manifest.config, strlen(l->manifest.config), l->manifest.path, NULL, 0));
    SEL_TRY(sel_path_join(model, l->manifest.path, "tokenizer.model"));
    SEL_TRY(sel_tokenizer_open(&l->tokenizer, model));
    const sel_dims dims = sel_dims_of(&l->config, sel_tokenizer_size(l->tokenizer));
    SEL_TRY(sel_layout_new(&l->layout, &dims));
    l->params = sel_alloc((size_t)l->layout->total * sizeof(float), "parameters");
    if (!l->params) return SEL_ENOMEM;
    SEL_TRY(sel_checkpoint_load(&l->manifest, l->layout, l->params, NULL, NULL));
    SEL_TRY(sel_cpu_choose("auto", &level));   /* of this machine, not of the one that trained */
    sel_ops_init(&l->ops, level);
    return sel_linear_open(&l->engine, l->config.compute.linear_backend == SEL_BACKEND_OPENBLAS ? SEL_LINEAR_OPENBLAS
                                                                                                : SEL_LINEAR_ONEDNN,
                           SEL_FLOAT32, l->threads);
}

sel_status sel_loaded_open(sel_loaded *l, const char *path, int64_t threads, void (*warn)(void *ctx, const char *line),
                           void *ctx)
{
    memset(l, 0, sizeof *l);
    if (threads <= 0) threads = sel_cpu_threads();
    sel_status rc = sel_cpu_check_threads(threads);
    l->threads = (int)threads;
    if (rc == SEL_OK) rc = open_all(l, path, warn, ctx);
    if (rc != SEL_OK) sel_loaded_close(l);
    return rc;
}

void sel_loaded_close(sel_loaded *l)
{
    sel_linear_close(&l->engine);
    sel_tokenizer_close(&l->tokenizer);
    sel_layout_free(&l->layout);
    sel_free(l->params);
    sel_manifest_free(&l->manifest);
    memset(l, 0, sizeof *l);
}

sel_status sel_loaded_model(const sel_loaded *l, sel_use use, int64_t batch, int64_t tokens, sel_model **m)
{
    sel_attention_options attention = sel_attention_options_of(&l->config);
    attention.epsilon = 0.0;   /* the memory loss is training's */
    const sel_model_options o = { .use = use, .batch = batch, .tokens = tokens, .attention = attention,
                                  .threads = l->threads, .ops = &l->ops, .engine = l->engine };
    SEL_TRY(sel_model_new(m, l->layout, &o));
    const sel_status rc = sel_model_pack(*m, l->params);
    if (rc != SEL_OK) sel_model_free(m);
    return rc;
}
