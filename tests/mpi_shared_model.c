/* mpi_shared_model.c: the model over sequences that 1, 2, 3, 4 and 8 ranks share against the reference in double
 * precision, which knows of no ranks: log-probabilities, both losses, every gradient.
 *
 * The bounds are those of the unshared model (model_case.h): the error does not grow with the ranks, as the table says
 * that is printed for the long sequences.  By messages the bits are those of the window.
 */
#include "tests/model_case.h"

#include "dist/comm.h"

#include <math.h>

enum { RANKS = 8 };

static sel_comm *world;
static int rank;

/* What a way of sharing made of an example, on all ranks. */
typedef struct {
    double loss, memory, logp, gradient;   /* errors: relative, relative, absolute, relative */
    double live;
    float *grads;                          /* [total] summed over the ranks */
} outcome;

/* The reference's results from rank 0 to all. */
static void share_example(example *e)
{
    sel_comm_bcast(world, &e->loss, sizeof e->loss, 0);
    sel_comm_bcast(world, &e->memory_loss, sizeof e->memory_loss, 0);
    sel_comm_bcast(world, e->logp, (size_t)(e->B * e->n) * sizeof *e->logp, 0);
    sel_comm_bcast(world, e->grad, (size_t)e->layout->total * sizeof *e->grad, 0);
}

/* The largest error of log p of one call's sequences, which lie chunk by chunk. */
static double logp_error(const example *e, const sel_chunks *c, int64_t first, int64_t count, const double *logp)
{
    double worst = 0.0;
    for (int k = 0; k < c->chunks; k++)
        for (int64_t b = 0; b < count; b++)
            for (int64_t i = 0; i < c->each; i++) {
                const int64_t at = sel_chunk_place(c, c->rank, k) * c->each + i;
                worst = fmax(worst, fabs(logp[(k * count + b) * c->each + i] - e->logp[(first + b) * e->n + at]));
            }
    return worst;
}

/* [collective, ranks of part] */
static outcome run(const example *e, sel_comm *part, const way *w, sel_cut cut, bool no_window, sel_ops *ops,
                   sel_linear_engine *engine)
{
    const int64_t total = e->layout->total;
    outcome o = { .grads = room(total, sizeof(float)) };
    double *const sum = room(total, sizeof *sum), *const logp = room(e->B * e->n, sizeof *logp);
    float *const grads = sel_alloc((size_t)total * sizeof *grads, "gradients");
    sel_batch_stats trained = { 0 }, scored = { 0 };
    sel_sequence *q = NULL;
    sel_mesh mesh;
    way here = *w;

    if (!grads) abort();
    CHECK_OK(sel_mesh_init(&mesh, sel_comm_rank(part), sel_comm_size(part), 1, sel_comm_size(part)));
    sel_sequence_options s = { .batch = w->micro, .width = sel_model_keys_width(&e->layout->dims),
                               .no_window = no_window, .bfloat16 = w->bfloat16, .threads = w->threads };
    CHECK_OK(sel_mesh_chunks(&mesh, e->n, cut, &s.chunks));
    CHECK_OK(sel_sequence_new(&q, part, &s));
    if (!q) abort();
    here.sequence = q;
    sel_model *m = model_open(e, &here, SEL_USE_TRAIN, ops, engine);
    memset(grads, 0, (size_t)total * sizeof *grads);
    for (int64_t b = 0; b < e->B; b += w->micro) {
        const int64_t count = e->B - b < w->micro ? e->B - b : w->micro;
        sel_batch_stats t, f;
        CHECK_OK(sel_model_score(m, e->params, e->tokens + b * (e->n + 1), count, e->n, logp, NULL, &f));
        o.logp = fmax(o.logp, logp_error(e, &s.chunks, b, count, logp));
        CHECK_OK(sel_model_train(m, e->params, grads, b > 0, e->tokens + b * (e->n + 1), count, e->n,
                                 1.0 / (double)e->predicted, e->ref.epsilon / (double)e->B, NULL, NULL, &t));
        CHECK(t.loss == f.loss && t.memory == f.memory && t.tokens == f.tokens, "%s: training and scoring differ",
              e->name);
        trained.loss += t.loss;
        trained.memory += t.memory;
        trained.tokens += t.tokens;
        scored.correct += f.correct;
    }
    double sums[3] = { trained.loss, trained.memory, (double)trained.tokens };
    sel_comm_sum_doubles(part, sums, 3);
    sel_comm_max_doubles(part, &o.logp, 1);
    for (int64_t i = 0; i < total; i++) sum[i] = (double)grads[i];
    sel_comm_merge_doubles(part, sum, total);
    for (int64_t i = 0; i < total; i++) o.grads[i] = (float)sum[i];
    for (int64_t l = 0; l < e->layout->dims.L; l++) o.live += sel_model_live_keys(m, l) / (double)e->layout->dims.L;

    char how[128];
    snprintf(how, sizeof how, "%d ranks, %s%s, micro-batch %d", sel_comm_size(part),
             s.chunks.chunks > 1 ? "zigzag" : "contiguous", no_window ? ", messages" : "", (int)w->micro);
    if (!w->bfloat16) {
        const sel_batch_stats all = { .loss = sums[0], .memory = sums[1], .tokens = (int64_t)sums[2] };
        check_stats(e, how, &all);
        check_gradient(e, how, o.grads);
        CHECK(o.logp <= e->slack * LOGP_BOUND, "%s; %s: log p off by %.3g", e->name, how, o.logp);
    }
    o.loss = fabs(sums[0] / (double)e->predicted - e->loss) / e->loss;
    if (e->ref.epsilon > 0.0)
        o.memory = fabs(e->ref.epsilon * sums[1] / (double)e->B - e->memory_loss) / fabs(e->memory_loss);
    o.gradient = distance(o.grads, e->grad, total) / norm(e->grad, total);
    sel_model_free(&m);
    sel_sequence_free(&q);
    sel_free(grads);
    free(sum);
    free(logp);
    return o;
}

/* The example on groups of `ranks`; the outcome on the first of them. */
static outcome share(const example *e, int ranks, const way *w, sel_cut cut, bool no_window, sel_ops *ops,
                     sel_linear_engine *engine)
{
    outcome o = { 0 };
    sel_comm *part;
    sel_comm_split(&part, world, rank < ranks ? 0 : 1);
    if (rank < ranks) o = run(e, part, w, cut, no_window, ops, engine);
    sel_comm_close(&part);
    sel_comm_barrier(world);
    return o;
}

static bool divides(int64_t n, int ranks, sel_cut cut)
{
    return n % (ranks * (cut == SEL_CUT_ZIGZAG && ranks > 1 ? 2 : 1)) == 0;
}

/* All sets of switches on short sequences, in all ways that their lengths allow. */
static void test_switches(sel_ops *ops, sel_linear_engine *engine, bool quick)
{
    static const struct {
        sel_dims dims;           /* V, N, D, L, H, Hkv, dh, F */
        int64_t B;
    } shapes[] = {
        { { 67, 48, 24, 2, 3, 1, 8, 17, false }, 3 },
        { { 13, 16, 15, 3, 3, 3, 5, 11, false }, 3 },
        { { 31, 8, 10, 1, 2, 1, 16, 7, false }, 1 },
        { { 67, 330, 32, 2, 2, 2, 16, 17, false }, 2 },
    };
    static const int groups[] = { 1, 2, 3, 4, 8 };
    int next = 0;

    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        for (int c = 0; c < CASES; c++, next++) {
            /* F without relu grows with the rows, and float's rounding with it: on short sequences only */
            const int s = switches_of(c);
            if (shapes[i].dims.N > 100 && switches[s].selective && !switches[s].relu) continue;
            if (quick && next % 5) continue;
            example e = example_new(&shapes[i].dims, shapes[i].B, shapes[i].dims.N, c, next % 2 ? 0.3 : 0.0,
                                    (uint64_t)next);
            const way w = { .backend = SEL_LINEAR_ONEDNN, .threads = 1, .micro = next % 3 ? 2 : 1, .level = ops->level,
                            .dead_keys = next % 2 && switches[s].relu ? SEL_DEAD_KEYS_EXACT : SEL_DEAD_KEYS_OFF };
            share_example(&e);
            for (size_t g = 0; g < sizeof groups / sizeof groups[0]; g++)
                for (int zigzag = 0; zigzag < 2; zigzag++) {
                    const sel_cut cut = zigzag ? SEL_CUT_ZIGZAG : SEL_CUT_CONTIGUOUS;
                    if (!divides(e.n, groups[g], cut)) continue;
                    outcome window = share(&e, groups[g], &w, cut, false, ops, engine);
                    if ((next + (int)g) % 2) {
                        outcome messages = share(&e, groups[g], &w, cut, true, ops, engine);
                        if (rank == 0)
                            CHECK(memcmp(window.grads, messages.grads,
                                         (size_t)e.layout->total * sizeof(float)) == 0 &&
                                      window.live == messages.live,
                                  "%s: %d ranks: by messages other bits", e.name, groups[g]);
                        free(messages.grads);
                    }
                    free(window.grads);
                }
            example_free(&e);
        }
}

/* Long sequences: errors against the number of ranks. */
static void test_long(int64_t n, int c, bool bfloat16, sel_ops *ops, sel_linear_engine *engine)
{
    const sel_dims d = { .V = 61, .N = n, .D = 32, .L = 2, .H = 2, .Hkv = 2, .dh = 16, .F = 40 };
    static const int groups[] = { 1, 2, 3, 4, 8 };
    const way w = { .backend = SEL_LINEAR_ONEDNN, .threads = 1, .micro = 1, .level = ops->level, .bfloat16 = bfloat16 };
    example e = example_new(&d, 1, n, c, 0.1, (uint64_t)(n + c));
    outcome alone = { 0 };

    share_example(&e);
    if (rank == 0)
        printf("%s, %s\n    ranks              loss    memory   log p   gradient\n", e.name,
               bfloat16 ? "bfloat16" : "float32");
    for (size_t g = 0; g < sizeof groups / sizeof groups[0]; g++)
        for (int zigzag = groups[g] > 1; zigzag >= 0; zigzag--) {
            const sel_cut cut = zigzag ? SEL_CUT_ZIGZAG : SEL_CUT_CONTIGUOUS;
            if (!divides(n, groups[g], cut)) continue;
            const outcome o = share(&e, groups[g], &w, cut, false, ops, engine);
            if (groups[g] == 1) alone = o;
            if (rank == 0) {
                printf("    %d %-12s  %8.1e  %8.1e %8.1e  %8.1e\n", groups[g],
                       groups[g] == 1 ? "" : zigzag ? "zigzag" : "contiguous", o.loss, o.memory, o.logp, o.gradient);
                CHECK(o.gradient <= 1.5 * alone.gradient, "%s: %d ranks: gradient off by %.3g, 1 rank's by %.3g",
                      e.name, groups[g], o.gradient, alone.gradient);
                if (bfloat16) CHECK(o.loss < 5e-3, "%s: loss off by %.3g", e.name, o.loss);
            }
            free(o.grads);
        }
    example_free(&e);
}

int main(int argc, char **argv)
{
    const bool quick = getenv("SEL_TEST_QUICK") != NULL;   /* a fifth of the cases, shorter sequences */
    sel_linear_engine *engine = NULL, *engine16 = NULL;
    sel_ops ops;

    if (sel_comm_open(&world, &argc, &argv) != SEL_OK) {
        fprintf(stderr, "%s\n", sel_error());
        return EXIT_FAILURE;
    }
    rank = sel_comm_rank(world);
    example_computes = rank == 0;
    if (sel_comm_size(world) != RANKS) {
        fprintf(stderr, "needs %d ranks\n", RANKS);
        return EXIT_FAILURE;
    }
    sel_ops_init(&ops, sel_cpu_detect());
    CHECK_OK(sel_linear_open(&engine, SEL_LINEAR_ONEDNN, SEL_FLOAT32, 1));
    test_switches(&ops, engine, quick);
    test_long(quick ? 528 : 2048, 1, false, &ops, engine);
    test_long(quick ? 330 : 2046, 1, false, &ops, engine);
    test_long(quick ? 165 : 1155, SWITCHES, false, &ops, engine);
    CHECK_OK(sel_linear_open(&engine16, SEL_LINEAR_ONEDNN, SEL_BFLOAT16, 1));
    sel_linear *probe = NULL;
    if (sel_linear_new(&probe, engine16, 8, 8, true) == SEL_OK) test_long(quick ? 480 : 2040, 1, true, &ops, engine16);
    sel_linear_free(&probe);
    sel_linear_close(&engine);
    sel_linear_close(&engine16);
    const int verdict = check_verdict();
    sel_comm_close(&world);
    return verdict;
}
