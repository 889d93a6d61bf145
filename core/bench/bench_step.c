/* bench_step.c: whole training steps on random tokens, selective and standard in turn. */
#include <math.h>
#include <string.h>
#include "core/base/mem.h"
#include "core/base/rng.h"
#include "core/bench/rounds.h"
#include "core/model/model.h"

typedef struct {
    const sel_bench *b;
    const sel_config *c;
    sel_layout *layout;
    sel_model *model;
    float *params, *grads, *m, *v;   /* shared by the two kinds */
    int32_t *tokens;
    int64_t batch;
} step;

/* What core/train/step.c does for one micro-batch on one rank. */
static sel_status run_step(void *ctx)
{
    step *s = ctx;
    const sel_ops *ops = s->b->ops;
    const int64_t N = s->layout->dims.N, total = s->layout->total;
    sel_batch_stats stats;

    SEL_TRY(sel_model_train(s->model, s->params, s->grads, false, s->tokens, s->batch, N, 1.0 / (double)(s->batch * N), 0.0,
                            NULL, NULL, &stats));
    const double norm = sqrt(ops->sum_squares(s->grads, total, s->b->threads));
    if (!isfinite(norm)) return sel_fail(SEL_ENUM, "the benchmark's gradient is not finite");
    ops->adamw(s->params, s->m, s->v, s->grads, total, 1.0, 1e-6, 0.9, 0.999, 1e-8, 0.0, 0.1, 0.001, s->b->threads);
    return sel_model_pack(s->model, s->params);
}

static sel_status make(step *s, const sel_bench *b, const sel_config *c, bool selective)
{
    sel_model_options o = {.use = SEL_USE_TRAIN,
                           .batch = s->batch,
                           .tokens = s->layout->dims.N,
                           .attention = sel_attention_options_of(c),
                           .bfloat16 = b->dtype == SEL_BFLOAT16,
                           .threads = b->threads,
                           .ops = b->ops,
                           .engine = b->engine};
    o.attention.selective = selective;
    if (!selective) o.attention.epsilon = 0.0;
    SEL_TRY(sel_model_new(&s->model, s->layout, &o));
    return sel_model_pack(s->model, s->params);
}

sel_status sel_bench_step(const sel_bench *b, const sel_config *c, int64_t vocab, sel_bench_results *out)
{
    static const char *const kinds[] = { "selective", "standard" };
    const sel_dims dims = sel_dims_of(c, vocab);
    const int64_t batch = c->train.micro_batch ? c->train.micro_batch : dims.N < 4096 ? 4096 / dims.N : 1;
    step s = { .b = b, .c = c, .batch = batch };
    step both[2];
    sel_bench_case cases[2];
    sel_status rc = sel_layout_new(&s.layout, &dims);

    if (rc != SEL_OK) return rc;
    const size_t bytes = (size_t)s.layout->total * sizeof(float);
    s.params = sel_alloc(bytes, "parameters");
    s.grads = sel_alloc(bytes, "gradients");
    s.m = sel_alloc(bytes, "first moments");
    s.v = sel_alloc(bytes, "second moments");
    s.tokens = sel_alloc((size_t)(batch * (dims.N + 1)) * sizeof *s.tokens, "tokens");
    if (!s.params || !s.grads || !s.m || !s.v || !s.tokens) rc = SEL_ENOMEM;
    if (rc == SEL_OK) {
        sel_layout_init_params(s.layout, 1, s.params, b->threads);
        for (int64_t i = 0; i < batch * (dims.N + 1); i++)
            s.tokens[i] = (int32_t)(sel_rng_uniform(1, 0, (uint64_t)i) * (double)dims.V);
    }
    both[0] = both[1] = s;
    for (int i = 0; rc == SEL_OK && i < 2; i++) {
        rc = make(&both[i], b, c, i == 0);
        cases[i] = (sel_bench_case){ .run = run_step, .ctx = &both[i], .tokens = (double)(batch * dims.N),
                                     .flops = sel_model_flops(&dims, batch * dims.N, dims.N),
                                     .row = { .name = "step", .kind = kinds[i], .pass = "step",
                                              .B = batch, .H = dims.H, .N = dims.N, .dh = dims.dh } };
    }
    if (rc == SEL_OK) rc = sel_bench_rounds(b, cases, 2, false, out);
    for (int i = 0; i < 2; i++) sel_model_free(&both[i].model);
    sel_free(s.params);
    sel_free(s.grads);
    sel_free(s.m);
    sel_free(s.v);
    sel_free(s.tokens);
    sel_layout_free(&s.layout);
    return rc;
}
