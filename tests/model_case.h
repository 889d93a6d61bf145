/* model_case.h: a model with random weights and tokens, what the reference in double precision makes of it, and the
 * product's model of it.
 *
 * Loss within 1e-6 of itself; the gradient within 1e-5 of its norm, and within 1e-4 of the norm of each tensor
 * (for tensors whose gradient all but vanishes, 1e-7 of the whole gradient's norm).  Without relu F grows in both
 * directions, to some tens here, and float's rounding with it (specification, section 3): three times these bounds.
 */
#ifndef SEL_TESTS_MODEL_CASE_H
#define SEL_TESTS_MODEL_CASE_H

#include "tests/check.h"
#include "tests/random.h"
#include "tests/switches.h"

#include "core/base/mem.h"
#include "core/model/model.h"

#include <string.h>

#define LOSS_BOUND 1e-6
#define GRADIENT_BOUND 1e-5
#define TENSOR_BOUND 1e-4
#define LOGP_BOUND 1e-5      /* absolute: float logits of a few units */

/* Cases: the sets of switches, then two with the bilinear source. */
enum { CASES = SWITCHES + 2 };
static inline bool is_bilinear(int c) { return c >= SWITCHES; }
/* selective; no self, no shift */
static inline int switches_of(int c) { return c < SWITCHES ? c : c == SWITCHES ? 1 : 6; }

/* A model, its data, and what the reference makes of them. */
typedef struct {
    char name[160];
    sel_ref_model ref;
    int64_t B, n;
    int32_t *tokens;             /* [B][n + 1] */
    int64_t predicted;
    sel_layout *layout;
    float *params;               /* in the product's layout */
    double loss, memory_loss;
    double *logp;                /* [B][n] */
    double slack;                /* of the bounds */
    float *grad;                 /* the reference's, in the product's layout */
    sel_ref_tensor *tensors;
    int64_t n_tensors;
} example;

static bool example_computes = true;   /* whether this process asks the reference; else its results stay zero */

static inline void *room(int64_t count, size_t size)
{
    void *p = calloc((size_t)(count > 0 ? count : 1), size);
    if (!p) abort();
    return p;
}

/* Copies between the reference's array and the product's, tensor by tensor, by name. */
static inline void to_layout(const example *e, const double *from, float *to)
{
    for (int64_t t = 0; t < e->n_tensors; t++) {
        const sel_ref_tensor *r = &e->tensors[t];
        const sel_tensor *p = sel_layout_find(e->layout, r->name);
        CHECK(p && p->count == r->rows * r->cols, "%s: tensor %s is missing or of another size", e->name, r->name);
        for (int64_t i = 0; p && i < p->count; i++) to[p->offset + i] = (float)from[r->offset + i];
    }
}

static inline example example_new(const sel_dims *sizes, int64_t B, int64_t n, int c, double epsilon, uint64_t seed)
{
    example e = { .B = B, .n = n };
    sel_dims dims = *sizes;
    const sel_dims *const d = &dims;
    const int s = switches_of(c);
    dims.bilinear = is_bilinear(c);
    e.ref.dims = (sel_ref_dims){ d->V, d->N, d->D, d->L, d->H, d->Hkv, d->dh, d->F, d->bilinear };
    e.ref.epsilon = switches[s].selective ? epsilon : 0.0;
    e.ref.attention.tau = 0.8;
    switches_set(&e.ref.attention, s);
    e.slack = switches[s].selective && !switches[s].relu ? 3.0 : 1.0;
    snprintf(e.name, sizeof e.name, "%s%s, V %d D %d L %d H %d/%d dh %d F %d, B %d n %d, epsilon %g", switches[s].name,
             dims.bilinear ? ", bilinear" : "",
             (int)d->V, (int)d->D, (int)d->L, (int)d->H, (int)d->Hkv, (int)d->dh, (int)d->F, (int)B, (int)n,
             e.ref.epsilon);
    CHECK_OK(sel_layout_new(&e.layout, d));
    if (!e.layout) abort();
    int64_t total;
    e.tensors = sel_ref_tensors(&e.ref.dims, &e.n_tensors, &total);
    CHECK(e.n_tensors == e.layout->n_tensors && total == e.layout->parameters, "%s: %d tensors, %lld parameters",
          e.name, e.layout->n_tensors, (long long)e.layout->parameters);

    random_seed(seed);
    double *params = room(total, sizeof *params), *grad = room(total, sizeof *grad);
    for (int64_t t = 0; t < e.n_tensors; t++) {
        const sel_ref_tensor *r = &e.tensors[t];
        const bool embedding = strstr(r->name, "embed") != NULL;
        const double deviation = embedding ? 1.0 : r->cols == 1 ? 0.2 : 1.0 / sqrt((double)r->cols);
        for (int64_t i = 0; i < r->rows * r->cols; i++)
            params[r->offset + i] = (double)(float)((r->cols == 1 ? 1.0 : 0.0) + deviation * random_normal());
    }
    /* The last target of the first sequence is padding, where that leaves others. */
    e.tokens = room(B * (n + 1), sizeof *e.tokens);
    int32_t *inputs = room(B * n, sizeof *inputs), *targets = room(B * n, sizeof *targets);
    for (int64_t i = 0; i < B * (n + 1); i++) e.tokens[i] = (int32_t)((double)d->V * random_uniform());
    if (B * n > 1) e.tokens[n] = -1;
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0; i < n; i++) {
            inputs[b * n + i] = e.tokens[b * (n + 1) + i];
            targets[b * n + i] = e.tokens[b * (n + 1) + i + 1];
            e.predicted += targets[b * n + i] >= 0;
        }
    e.logp = room(B * n, sizeof *e.logp);
    if (example_computes)
        sel_ref_model_loss(&e.ref, params, inputs, targets, B, n, &e.loss, &e.memory_loss, e.logp, grad);

    e.params = sel_alloc((size_t)e.layout->total * sizeof *e.params, "parameters");
    e.grad = room(e.layout->total, sizeof *e.grad);
    if (!e.params) abort();
    to_layout(&e, params, e.params);
    if (example_computes) to_layout(&e, grad, e.grad);
    free(params);
    free(grad);
    free(inputs);
    free(targets);
    return e;
}

static inline void example_free(example *e)
{
    sel_free(e->params);
    free(e->tokens);
    free(e->logp);
    free(e->grad);
    free(e->tensors);
    sel_layout_free(&e->layout);
}

/* How the product runs it. */
typedef struct {
    sel_linear_backend backend;
    int threads;
    int64_t micro;               /* sequences a call */
    sel_cpu_level level;
    bool bfloat16;
    sel_dead_keys dead_keys;
    sel_sequence *sequence;      /* NULL: whole sequences */
} way;

static inline void way_name(char *text, size_t size, const way *w)
{
    snprintf(text, size, "%s, %s, %d threads, micro-batch %d", w->backend == SEL_LINEAR_ONEDNN ? "oneDNN" : "OpenBLAS",
             sel_cpu_level_name(w->level), w->threads, (int)w->micro);
}

static inline sel_model *model_open(const example *e, const way *w, sel_use use, const sel_ops *ops,
                                    sel_linear_engine *engine)
{
    const sel_ref_attention *a = &e->ref.attention;
    sel_model *m = NULL;
    const sel_model_options o = { .use = use, .batch = w->micro, .tokens = e->n,
                                  .attention = { .selective = a->selective, .relu = a->relu,
                                                 .protect_bos = a->protect_bos, .protect_self = a->protect_self,
                                                 .shift = a->shift, .epsilon = e->ref.epsilon, .tau = a->tau,
                                                 .dead_keys = w->dead_keys },
                                  .sequence = w->sequence, .bfloat16 = w->bfloat16, .threads = w->threads,
                                  .ops = ops, .engine = engine };
    CHECK_OK(sel_model_new(&m, e->layout, &o));
    if (!m) abort();
    CHECK_OK(sel_model_pack(m, e->params));
    return m;
}

static inline double distance(const float *x, const float *y, int64_t n)
{
    double s = 0.0;
    for (int64_t i = 0; i < n; i++) s += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
    return sqrt(s);
}

static inline double norm(const float *x, int64_t n)
{
    double s = 0.0;
    for (int64_t i = 0; i < n; i++) s += (double)x[i] * (double)x[i];
    return sqrt(s);
}

static inline void check_gradient(const example *e, const char *how, const float *grads)
{
    const int64_t total = e->layout->total;
    const double whole = norm(e->grad, total), error = distance(grads, e->grad, total);
    CHECK(error <= e->slack * GRADIENT_BOUND * whole, "%s; %s: gradient: relative error %.3g", e->name, how,
          error / whole);
    for (int t = 0; t < e->layout->n_tensors; t++) {
        const sel_tensor *x = &e->layout->tensors[t];
        const double size = norm(e->grad + x->offset, x->count);
        const double limit = e->slack * fmax(TENSOR_BOUND * size, 1e-7 * whole);
        const double off = distance(grads + x->offset, e->grad + x->offset, x->count);
        CHECK(off <= limit, "%s; %s: gradient of %s: error %.3g of norm %.3g", e->name, how, x->name, off, size);
    }
}

static inline void check_stats(const example *e, const char *how, const sel_batch_stats *s)
{
    const double loss = s->loss / (double)e->predicted, memory = e->ref.epsilon * s->memory / (double)e->B;
    CHECK(s->tokens == e->predicted, "%s; %s: %lld targets counted, not %lld", e->name, how, (long long)s->tokens,
          (long long)e->predicted);
    CHECK(fabs(loss - e->loss) <= e->slack * LOSS_BOUND * e->loss, "%s; %s: loss %.9g, not %.9g", e->name, how, loss,
          e->loss);
    if (e->ref.epsilon > 0.0)
        CHECK(fabs(memory - e->memory_loss) <= e->slack * LOSS_BOUND * fabs(e->memory_loss),
              "%s; %s: memory loss %.9g, not %.9g", e->name, how, memory, e->memory_loss);
}

#endif
