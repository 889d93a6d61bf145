/* The model against the reference in double precision: losses, gradients, log-probabilities, decoding.
 *
 * Loss within 1e-6 of itself; the gradient within 1e-5 of its norm, and within 1e-4 of the norm of each tensor
 * (for tensors whose gradient all but vanishes, 1e-7 of the whole gradient's norm).  Without relu F grows in both
 * directions, to some tens here, and float's rounding with it (specification, section 3): three times these bounds.
 */
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
static bool is_bilinear(int c) { return c >= SWITCHES; }
static int switches_of(int c) { return c < SWITCHES ? c : c == SWITCHES ? 1 : 6; }   /* selective; no self, no shift */

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

static void *room(int64_t count, size_t size)
{
    void *p = calloc((size_t)(count > 0 ? count : 1), size);
    if (!p) abort();
    return p;
}

/* Copies between the reference's array and the product's, tensor by tensor, by name. */
static void to_layout(const example *e, const double *from, float *to)
{
    for (int64_t t = 0; t < e->n_tensors; t++) {
        const sel_ref_tensor *r = &e->tensors[t];
        const sel_tensor *p = sel_layout_find(e->layout, r->name);
        CHECK(p && p->count == r->rows * r->cols, "%s: tensor %s is missing or of another size", e->name, r->name);
        for (int64_t i = 0; p && i < p->count; i++) to[p->offset + i] = (float)from[r->offset + i];
    }
}

static example example_new(const sel_dims *sizes, int64_t B, int64_t n, int c, double epsilon, uint64_t seed)
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
    sel_ref_model_loss(&e.ref, params, inputs, targets, B, n, &e.loss, &e.memory_loss, e.logp, grad);

    e.params = sel_alloc((size_t)e.layout->total * sizeof *e.params, "parameters");
    e.grad = room(e.layout->total, sizeof *e.grad);
    if (!e.params) abort();
    to_layout(&e, params, e.params);
    to_layout(&e, grad, e.grad);
    free(params);
    free(grad);
    free(inputs);
    free(targets);
    return e;
}

static void example_free(example *e)
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
} way;

static void way_name(char *text, size_t size, const way *w)
{
    snprintf(text, size, "%s, %s, %d threads, micro-batch %d", w->backend == SEL_LINEAR_ONEDNN ? "oneDNN" : "OpenBLAS",
             sel_cpu_level_name(w->level), w->threads, (int)w->micro);
}

static sel_model *model_open(const example *e, const way *w, sel_use use, const sel_ops *ops, sel_linear_engine *engine)
{
    const sel_ref_attention *a = &e->ref.attention;
    sel_model *m = NULL;
    const sel_model_options o = { .use = use, .batch = w->micro, .tokens = e->n,
                                  .attention = { .selective = a->selective, .relu = a->relu,
                                                 .protect_bos = a->protect_bos, .protect_self = a->protect_self,
                                                 .shift = a->shift, .epsilon = e->ref.epsilon, .tau = a->tau },
                                  .bfloat16 = w->bfloat16, .threads = w->threads, .ops = ops, .engine = engine };
    CHECK_OK(sel_model_new(&m, e->layout, &o));
    if (!m) abort();
    CHECK_OK(sel_model_pack(m, e->params));
    return m;
}

/* Stretches of the gradient that the model has said are final, as they were then. */
typedef struct {
    const float *grads;
    float *copy;
    unsigned char *told;
    int64_t total, mistakes;
} progress;

static void note_ready(void *ctx, int64_t begin, int64_t end)
{
    progress *p = ctx;
    if (begin < 0 || end > p->total || begin >= end) {
        p->mistakes++;
        return;
    }
    for (int64_t i = begin; i < end; i++) {
        p->mistakes += p->told[i];
        p->told[i] = 1;
        p->copy[i] = p->grads[i];
    }
}

static double distance(const float *x, const float *y, int64_t n)
{
    double s = 0.0;
    for (int64_t i = 0; i < n; i++) s += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
    return sqrt(s);
}

static double norm(const float *x, int64_t n)
{
    double s = 0.0;
    for (int64_t i = 0; i < n; i++) s += (double)x[i] * (double)x[i];
    return sqrt(s);
}

static void check_gradient(const example *e, const char *how, const float *grads)
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

static void check_stats(const example *e, const char *how, const sel_batch_stats *s)
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

static void check_train(const example *e, const way *w, const sel_ops *ops, sel_linear_engine *engine)
{
    const int64_t total = e->layout->total;
    sel_model *m = model_open(e, w, SEL_USE_TRAIN, ops, engine);
    float *grads = sel_alloc((size_t)total * sizeof *grads, "gradients");
    progress p = { .grads = grads, .copy = room(total, sizeof(float)), .told = room(total, 1), .total = total };
    char how[128];
    way_name(how, sizeof how, w);
    if (!grads) abort();

    /* Twice: the second step must not remember the first. */
    for (int step = 0; step < 2; step++) {
        sel_batch_stats sum = { 0 };
        for (int t = 0; t < e->layout->n_tensors; t++)   /* what lies there must not matter */
            for (int64_t i = 0; i < e->layout->tensors[t].count; i++) grads[e->layout->tensors[t].offset + i] = NAN;
        memset(p.told, 0, (size_t)total);
        p.mistakes = 0;
        for (int64_t b = 0; b < e->B; b += w->micro) {
            const int64_t count = e->B - b < w->micro ? e->B - b : w->micro;
            const bool last = b + count == e->B;
            sel_batch_stats s;
            CHECK_OK(sel_model_train(m, e->params, grads, b > 0, e->tokens + b * (e->n + 1), count, e->n,
                                     1.0 / (double)e->predicted, e->ref.epsilon / (double)e->B,
                                     last ? note_ready : NULL, &p, &s));
            sum.loss += s.loss;
            sum.memory += s.memory;
            sum.tokens += s.tokens;
        }
        check_stats(e, how, &sum);
        check_gradient(e, how, grads);
        int64_t untold = 0;
        for (int t = 0; t < e->layout->n_tensors; t++)
            for (int64_t i = 0; i < e->layout->tensors[t].count; i++)
                untold += !p.told[e->layout->tensors[t].offset + i];
        for (int64_t i = 0; i < total; i++) p.mistakes += p.told[i] && p.copy[i] != grads[i];
        CHECK(untold == 0 && p.mistakes == 0, "%s; %s: ready: %lld values never told, %lld told wrongly", e->name, how,
              (long long)untold, (long long)p.mistakes);
    }
    free(p.copy);
    free(p.told);
    sel_free(grads);
    sel_model_free(&m);
}

static void check_score(const example *e, const way *w, const sel_ops *ops, sel_linear_engine *engine)
{
    sel_model *m = model_open(e, w, SEL_USE_SCORE, ops, engine);
    double *logp = room(e->B * e->n, sizeof *logp), worst = 0.0;
    uint8_t *best = room(e->B * e->n, 1);
    sel_batch_stats sum = { 0 };
    int64_t correct = 0;
    char how[128];
    way_name(how, sizeof how, w);

    for (int64_t b = 0; b < e->B; b += w->micro) {
        const int64_t count = e->B - b < w->micro ? e->B - b : w->micro;
        sel_batch_stats s;
        CHECK_OK(sel_model_score(m, e->params, e->tokens + b * (e->n + 1), count, e->n, logp + b * e->n,
                                 best + b * e->n, &s));
        sum.loss += s.loss;
        sum.memory += s.memory;
        sum.tokens += s.tokens;
        sum.correct += s.correct;
    }
    check_stats(e, how, &sum);
    for (int64_t i = 0; i < e->B * e->n; i++) {
        worst = fmax(worst, fabs(logp[i] - e->logp[i]));
        correct += best[i];
    }
    CHECK(worst <= e->slack * LOGP_BOUND, "%s; %s: score: log p off by %.3g", e->name, how, worst);
    CHECK(correct == sum.correct, "%s; %s: %lld best, %lld correct", e->name, how, (long long)correct,
          (long long)sum.correct);
    free(logp);
    free(best);
    sel_model_free(&m);
}

/* Feeds whole sequences in spans of `span` tokens; the logits after each span give the next target's log p. */
static void check_decode(const example *e, const way *w, int64_t span, const sel_ops *ops, sel_linear_engine *engine)
{
    const int64_t V = e->ref.dims.V;
    way all = *w;
    all.micro = e->B;
    sel_model *m = model_open(e, &all, SEL_USE_DECODE, ops, engine);
    float *logits = room(e->B * V, sizeof *logits);
    int32_t *next = room(e->B * e->n, sizeof *next);
    char how[128];
    way_name(how, sizeof how, &all);

    for (int round = 0; round < 2; round++) {
        double worst = 0.0;
        sel_model_restart(m);
        for (int64_t i = 0; i < e->n; i += span) {
            const int64_t count = e->n - i < span ? e->n - i : span;
            for (int64_t b = 0; b < e->B; b++)
                memcpy(next + b * count, e->tokens + b * (e->n + 1) + i, (size_t)count * sizeof *next);
            CHECK_OK(sel_model_extend(m, e->params, next, e->B, count, logits));
            CHECK(sel_model_cached(m) == i + count, "%s: %lld tokens cached, not %lld", e->name,
                  (long long)sel_model_cached(m), (long long)(i + count));
            for (int64_t b = 0; b < e->B; b++) {
                const int32_t target = e->tokens[b * (e->n + 1) + i + count];
                double sum = 0.0;
                if (target < 0) continue;
                for (int64_t v = 0; v < V; v++) sum += exp((double)logits[b * V + v]);
                const double logp = (double)logits[b * V + target] - log(sum);
                worst = fmax(worst, fabs(logp - e->logp[b * e->n + i + count - 1]));
            }
        }
        CHECK(worst <= e->slack * LOGP_BOUND, "%s; %s: decoding %d at a time, round %d: log p off by %.3g", e->name,
              how, (int)span, round, worst);
    }
    if (e->n == e->ref.dims.N)
        CHECK(sel_model_extend(m, e->params, next, e->B, 1, logits) == SEL_EUSER, "%s: a full context took one more",
              e->name);
    free(logits);
    free(next);
    sel_model_free(&m);
}

/* bfloat16 operands: the same model within their rounding, 2^-9 an operand; more than float32's rounding, or they were
   not used.  Where the library cannot multiply them the call says so. */
static void check_bfloat16(const example *e, int threads, const sel_ops *ops)
{
    const way w = { SEL_LINEAR_ONEDNN, threads, e->B, ops->level, true };
    const int64_t total = e->layout->total;
    sel_linear_engine *engine = NULL;
    sel_linear *probe = NULL;
    sel_batch_stats s = { 0 };

    CHECK_OK(sel_linear_open(&engine, SEL_LINEAR_ONEDNN, SEL_BFLOAT16, threads));
    if (sel_linear_new(&probe, engine, 8, 8, true) != SEL_OK) {
        printf("bfloat16 not tested: %s\n", sel_error());
        sel_linear_close(&engine);
        return;
    }
    sel_linear_free(&probe);
    sel_model *m = model_open(e, &w, SEL_USE_TRAIN, ops, engine);
    float *grads = sel_alloc((size_t)total * sizeof *grads, "gradients");
    if (!grads) abort();
    CHECK_OK(sel_model_train(m, e->params, grads, false, e->tokens, e->B, e->n, 1.0 / (double)e->predicted,
                             e->ref.epsilon / (double)e->B, NULL, NULL, &s));
    const double off = fabs(s.loss / (double)e->predicted - e->loss) / e->loss;
    const double error = distance(grads, e->grad, total) / norm(e->grad, total);
    CHECK(off < 5e-3, "%s: bfloat16: loss off by %.3g", e->name, off);
    /* Logits of a selection of its own have no norm: more of them are near relu's kink, where rounding flips them. */
    const double bound = e->layout->dims.bilinear ? 5e-2 : 3e-2;
    CHECK(error < bound && error > 1e-4, "%s: bfloat16, level %d: gradient off by %.3g", e->name, (int)ops->level,
          error);
    sel_free(grads);
    sel_model_free(&m);
    sel_linear_close(&engine);
}

/* A call shorter than the model was made for gets the bits of a model made for that length; also where it saves more
   carries than the longest call would (4,096 of 4,100 rows: 64, not 33), which must find room. */
static void check_shorter(int64_t planned, int64_t used)
{
    const sel_dims d = { .V = 11, .N = planned, .D = 8, .L = 1, .H = 1, .Hkv = 1, .dh = 8, .F = 8 };
    sel_layout *layout;
    sel_linear_engine *engine;
    sel_ops ops;
    sel_batch_stats s[4] = { { 0 } };
    float *grads[2];
    double *logp[2];
    int32_t *tokens = room(used + 1, sizeof *tokens);

    sel_ops_init(&ops, sel_cpu_detect());
    CHECK_OK(sel_layout_new(&layout, &d));
    CHECK_OK(sel_linear_open(&engine, SEL_LINEAR_ONEDNN, SEL_FLOAT32, 1));
    float *const params = sel_alloc((size_t)layout->total * sizeof *params, "parameters");
    if (!params) abort();
    sel_layout_init_params(layout, 5, params, 1);
    random_seed(77);
    for (int64_t i = 0; i <= used; i++) tokens[i] = (int32_t)((double)d.V * random_uniform());
    for (int k = 0; k < 2; k++) {
        const sel_model_options o = { .use = SEL_USE_TRAIN, .batch = 1, .tokens = k ? used : planned,
                                      .attention = { .selective = true, .relu = true, .protect_bos = true,
                                                     .protect_self = true, .shift = true, .tau = 1.0 },
                                      .threads = 1, .ops = &ops, .engine = engine };
        sel_model *m = NULL;
        CHECK_OK(sel_model_new(&m, layout, &o));
        if (!m) abort();
        CHECK_OK(sel_model_pack(m, params));
        grads[k] = sel_alloc((size_t)layout->total * sizeof **grads, "gradients");
        if (!grads[k]) abort();
        memset(grads[k], 0, (size_t)layout->total * sizeof **grads);
        logp[k] = room(used, sizeof **logp);
        CHECK_OK(sel_model_score(m, params, tokens, 1, used, logp[k], NULL, &s[k]));
        CHECK_OK(sel_model_train(m, params, grads[k], false, tokens, 1, used, 1.0 / (double)used, 0.0, NULL, NULL,
                                 &s[2 + k]));
        sel_model_free(&m);
    }
    CHECK(memcmp(logp[0], logp[1], (size_t)used * sizeof **logp) == 0, "%d of %d tokens: other log p", (int)used,
          (int)planned);
    CHECK(memcmp(grads[0], grads[1], (size_t)layout->total * sizeof **grads) == 0, "%d of %d tokens: gradient off by "
          "%.3g of %.3g", (int)used, (int)planned, distance(grads[0], grads[1], layout->total),
          norm(grads[1], layout->total));
    CHECK(!memcmp(&s[0].loss, &s[1].loss, sizeof s[0].loss) && !memcmp(&s[2].loss, &s[3].loss, sizeof s[2].loss),
          "%d of %d tokens: losses %.9g, %.9g and %.9g, %.9g", (int)used, (int)planned, s[0].loss, s[1].loss,
          s[2].loss, s[3].loss);
    for (int k = 0; k < 2; k++) {
        sel_free(grads[k]);
        free(logp[k]);
    }
    free(tokens);
    sel_free(params);
    sel_linear_close(&engine);
    sel_layout_free(&layout);
}

int main(void)
{
    static const struct {
        sel_dims dims;           /* V, N, D, L, H, Hkv, dh, F */
        int64_t B, n;
    } shapes[] = {
        { { 67, 40, 24, 2, 3, 1, 8, 17, false }, 3, 33 },
        { { 13, 9, 15, 3, 3, 3, 5, 11, false }, 3, 9 },
        { { 300, 130, 48, 2, 6, 2, 16, 101, false }, 3, 130 },
        { { 259, 70, 128, 1, 2, 2, 64, 341, false }, 3, 70 },
        { { 31, 8, 10, 2, 2, 1, 6, 7, false }, 3, 1 },
    };
    const bool quick = getenv("SEL_TEST_QUICK") != NULL;
    const sel_cpu_level top = sel_cpu_detect();
    int next = 0;
    for (int threads = 1; threads <= 2; threads++)
        for (int backend = SEL_LINEAR_ONEDNN; backend <= SEL_LINEAR_OPENBLAS; backend++) {
            sel_linear_engine *engine = NULL;
            CHECK_OK(sel_linear_open(&engine, (sel_linear_backend)backend, SEL_FLOAT32, threads));
            if (!engine) abort();
            for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
                for (int s = 0; s < CASES; s++) {
                    const int c = is_bilinear(s) ? 1000 + next + s : next++;   /* seeds; ways go round */
                    if (quick && c % 3) continue;
                    sel_ops ops;
                    const way w = { (sel_linear_backend)backend, threads, c % 4 == 3 ? 2 : c % 2 ? 1 : 3,
                                    (sel_cpu_level)(c % 5 ? (int)top : c / 5 % ((int)top + 1)), false };
                    sel_ops_init(&ops, w.level);
                    example e = example_new(&shapes[i].dims, shapes[i].B, shapes[i].n, s, c / 2 % 2 ? 0.3 : 0.0,
                                            (uint64_t)c);
                    check_train(&e, &w, &ops, engine);
                    check_score(&e, &w, &ops, engine);
                    check_decode(&e, &w, (int64_t[]){ 1, 7, e.n }[c % 3], &ops, engine);
                    const bool usual = s == 0 || s == SWITCHES;
                    if (usual && e.n > 1 && backend == SEL_LINEAR_ONEDNN) check_bfloat16(&e, threads, &ops);
                    example_free(&e);
                }
            sel_linear_close(&engine);
        }
    check_shorter(4100, 4096);
    return check_verdict();
}
