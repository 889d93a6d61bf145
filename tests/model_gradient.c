/* The model against the reference in double precision: losses, gradients, log-probabilities, decoding. */
#include "tests/model_case.h"

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

/* With operands in bfloat16: a log p is a sum of some products whose operands are off by 2^-9 of themselves. */
static const double BF16_LOGP_BOUND = 0.05;

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
        CHECK(worst <= (w->bfloat16 ? BF16_LOGP_BOUND : e->slack * LOGP_BOUND),
              "%s; %s: decoding %d at a time, round %d: log p off by %.3g", e->name, how, (int)span, round, worst);
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
    const way w = { .backend = SEL_LINEAR_ONEDNN, .threads = threads, .micro = e->B, .level = ops->level,
                    .bfloat16 = true };
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
    check_decode(e, &w, 1, ops, engine);
    check_decode(e, &w, 7, ops, engine);
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
                    const way w = { .backend = (sel_linear_backend)backend, .threads = threads,
                                    .micro = c % 4 == 3 ? 2 : c % 2 ? 1 : 3,
                                    .level = (sel_cpu_level)(c % 5 ? (int)top : c / 5 % ((int)top + 1)) };
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
