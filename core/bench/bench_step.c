/* bench_step.c: whole training steps on random tokens, selective and standard in turn. */
#include <math.h>
#include <string.h>
#include <sys/resource.h>
#include "core/base/mem.h"
#include "core/base/rng.h"
#include "core/bench/rounds.h"
#include "core/model/model.h"

typedef struct {
    const sel_bench *b;
    sel_layout *layout;
    sel_model *model;                /* one for both kinds */
    bool selective;
    sel_profile profile;
    float *params, *grads, *m, *v;
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
    sel_profile *const p = &s->profile;

    sel_model_set_selective(s->model, s->selective, p);
    SEL_TRY(sel_model_train(s->model, s->params, s->grads, false, s->tokens, s->batch, N, 1.0 / (double)(s->batch * N),
                            0.0, NULL, NULL, &stats));
    const double norm = sqrt(ops->sum_squares(s->grads, total, s->b->threads));
    sel_profile_lap(p, SEL_PART_GRADIENT_NORM, 0.0, 4.0 * (double)total);
    if (!isfinite(norm)) return sel_fail(SEL_ENUM, "the benchmark's gradient is not finite");
    ops->adamw(s->params, s->m, s->v, s->grads, total, 1.0, 1e-6, 0.9, 0.999, 1e-8, 0.0, 0.1, 0.001, s->b->threads);
    sel_profile_lap(p, SEL_PART_OPTIMIZER, 0.0, 28.0 * (double)total);
    return sel_model_pack(s->model, s->params);
}

static size_t peak_resident(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return 1024 * (size_t)u.ru_maxrss;
}

sel_status sel_bench_step(const sel_bench *b, const sel_config *c, int64_t vocab, sel_bench_results *out)
{
    static const char *const kinds[] = { "selective", "standard" };
    const sel_dims dims = sel_dims_of(c, vocab);
    const int n = dims.bilinear ? 1 : 2;   /* without selection its projections would be idle: another model */
    const int64_t batch = c->train.micro_batch ? c->train.micro_batch : dims.N < 4096 ? 4096 / dims.N : 1;
    step both[2] = { { .b = b, .selective = true, .batch = batch } }, *const s = &both[0];
    sel_bench_case cases[2];
    const int yards = SEL_YARD_PEAK | SEL_YARD_COPY;
    sel_bench_memory memory = { .dtype = b->dtype == SEL_BFLOAT16 ? "bfloat16" : "float32", .B = batch, .N = dims.N,
                                .program = peak_resident(), .yardsticks = sel_bench_yard_bytes(b, yards) };
    sel_status rc = sel_layout_new(&s->layout, &dims);

    if (rc != SEL_OK) return rc;
    const size_t bytes = (size_t)s->layout->total * sizeof(float);
    s->params = sel_alloc(bytes, "parameters");
    s->grads = sel_alloc(bytes, "gradients");
    s->m = sel_alloc(bytes, "first moments");
    s->v = sel_alloc(bytes, "second moments");
    s->tokens = sel_alloc((size_t)(batch * (dims.N + 1)) * sizeof *s->tokens, "tokens");
    if (!s->params || !s->grads || !s->m || !s->v || !s->tokens) rc = SEL_ENOMEM;
    if (rc == SEL_OK) {
        sel_model_options o = { .use = SEL_USE_TRAIN, .batch = batch, .tokens = dims.N,
                                .attention = sel_attention_options_of(c), .bfloat16 = b->dtype == SEL_BFLOAT16,
                                .threads = b->threads, .ops = b->ops, .engine = b->engine };
        o.attention.selective = true;
        o.attention.epsilon = 0.0;
        sel_layout_init_params(s->layout, 1, s->params, b->threads);
        for (int64_t i = 0; i < batch * (dims.N + 1); i++)
            s->tokens[i] = (int32_t)(sel_rng_uniform(1, 0, (uint64_t)i) * (double)dims.V);
        if (b->probe) rc = sel_choice_probe(b->engine, &dims, batch * dims.N, out->choice);
        if (rc == SEL_OK && b->probe) rc = sel_choice_apply(b->engine, &dims, out->choice);
        if (rc == SEL_OK) rc = sel_model_new(&s->model, s->layout, &o);
    }
    if (rc == SEL_OK) rc = sel_model_pack(s->model, s->params);
    both[1] = both[0];
    both[1].selective = false;
    for (int i = 0; i < n; i++)
        cases[i] = (sel_bench_case){ .run = run_step, .ctx = &both[i], .tokens = (double)(batch * dims.N),
                                     .flops = sel_model_flops(&dims, batch * dims.N, dims.N),
                                     .profile = &both[i].profile,
                                     .row = { .name = "step", .kind = kinds[i], .pass = "step",
                                              .B = batch, .H = dims.H, .N = dims.N, .dh = dims.dh } };
    if (rc == SEL_OK) rc = sel_bench_rounds(b, cases, n, yards, out);
    if (rc == SEL_OK && out->n_memory < SEL_BENCH_BUDGETS) {
        memory.parameters = memory.gradients = bytes;
        memory.moments = 2 * bytes;
        sel_model_memory(s->model, &memory.packed, &memory.kept, &memory.scratch);
        memory.resident = peak_resident();
        out->memory[out->n_memory++] = memory;
    }
    sel_model_free(&s->model);
    sel_free(s->params);
    sel_free(s->grads);
    sel_free(s->m);
    sel_free(s->v);
    sel_free(s->tokens);
    sel_layout_free(&s->layout);
    return rc;
}
