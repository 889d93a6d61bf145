/* bench_dead.c: what attention gains from dead keys (spec, section 3.1), on inputs where a known share of keys dies. */
#include <math.h>
#include <string.h>
#include "core/base/mem.h"
#include "core/base/rng.h"
#include "core/bench/rounds.h"

/* F of a masked key, and the threshold: far apart, so that only keys masked on purpose die. */
#define MASKED_BY  200.0f
#define DEAD_AFTER 100.0f

typedef struct {
    const sel_ops *ops;
    sel_attention a;
    sel_attention_grad g;
    void *q, *k;                 /* head 0's decide who dies: own arrays a case */
    float *dead_after;
    double *live;
} dead_case;

static sel_status forward(void *ctx)
{
    const dead_case *c = ctx;
    c->ops->attention_forward(&c->a);
    return SEL_OK;
}
static sel_status backward(void *ctx)
{
    const dead_case *c = ctx;
    c->ops->attention_backward(&c->a, &c->g);
    return SEL_OK;
}

/* Head 0 of q and k such that a key lives with probability p and else is masked by the row after it: the first half of
   a head is below 0 in every product, the second holds one value a masked key, which the next row looks for. */
static void choose_victims(float *q, float *k, int64_t B, int64_t N, int64_t row, int64_t dh, double p, uint64_t seed)
{
    const float spike = sqrtf(MASKED_BY * sqrtf((float)dh)), small = 1.0f / (float)dh;
    for (int64_t b = 0; b < B; b++) {
        bool doomed = false;
        for (int64_t i = 0; i < N; i++) {
            float *const qi = q + (b * N + i) * row, *const ki = k + (b * N + i) * row;
            for (int64_t d = 0; d < dh; d++) {
                qi[d] = d < dh / 2 ? 1.0f : 0.0f;
                ki[d] = d < dh / 2 ? -small : 0.0f;
            }
            if (doomed) qi[dh / 2 + (i - 1) % (dh / 2)] = spike;
            uint32_t bits[4];
            sel_philox(bits, seed, 0, (uint64_t)(b * N + i));
            doomed = i > 0 && (double)bits[0] * 0x1p-32 >= p;
            if (doomed) ki[dh / 2 + i % (dh / 2)] = spike;
        }
    }
}

sel_status sel_bench_dead_keys(const sel_bench *b, int64_t heads, int64_t dh, int64_t N, int64_t batch,
                               sel_bench_results *out)
{
    static const struct { const char *kind; double share;
    } shares[] = {
        {"all keys", 1.0}, {"live 1/2", 1.0 / 2}, {"live 1/4", 1.0 / 4}, {"live 1/8", 1.0 / 8}, {"live 1/16", 1.0 / 16},
    };
    enum { V, OUT, DOUT, OPERANDS, DQ = OPERANDS, DK, DV, ARRAYS, CASES = sizeof shares / sizeof shares[0] };
    const int64_t row = heads * dh, seq = N * row, n = batch * seq;
    /* A row tile's own keys are alive in it: of 32 rows up to 2,048, in the AVX-512 kernels. */
    const int64_t height = N <= 2048 ? 32 : 64, tiles = (N + height - 1) / height;
    const double pairs = (double)N * (double)(N + 1) / 2.0,
                 own = (double)(tiles * height * (height + 1) / 2) / pairs;
    void *x[ARRAYS] = { 0 };
    float *const lse = sel_bench_array(batch * heads * N, 9);
    float *const saved = sel_bench_array(batch * sel_attention_saved_size(N), 10);
    void *workspace = NULL;
    size_t bytes = 0;
    dead_case t[CASES];
    sel_bench_case cases[2 * CASES];
    sel_status rc = lse && saved ? SEL_OK : SEL_ENOMEM;

    memset(t, 0, sizeof t);
    for (int i = 0; i < ARRAYS; i++)
        if (!(x[i] = i < OPERANDS ? sel_bench_operand(b, n, (uint64_t)i) : sel_bench_array(n, (uint64_t)i)))
            rc = SEL_ENOMEM;
    for (int i = 0; i < CASES; i++) {
        const double p = (shares[i].share - own) / (1.0 - own);
        float *const q = sel_bench_array(n, 20), *const k = sel_bench_array(n, 21);
        if (q && k) choose_victims(q, k, batch, N, row, dh, p, (uint64_t)i);
        t[i].q = sel_bench_as_operand(b, q, n);
        t[i].k = sel_bench_as_operand(b, k, n);
        t[i].dead_after = sel_bench_array(batch, 22);
        t[i].live = sel_alloc((size_t)batch * sizeof *t[i].live, "a benchmark's array");
        if (!t[i].q || !t[i].k || !t[i].dead_after || !t[i].live) rc = SEL_ENOMEM;
    }
    for (int i = 0; rc == SEL_OK && i < CASES; i++) {
        const double flops = 4.0 * (double)dh * pairs * (double)(heads * batch);
        for (int64_t s = 0; s < batch; s++) t[i].dead_after[s] = DEAD_AFTER;
        t[i].ops = b->ops;
        t[i].a = (sel_attention){ .B = batch, .heads = heads, .kv_heads = heads, .dh = dh, .i1 = N, .selective = true,
                                  .relu = true, .protect_bos = true, .protect_self = true, .shift = true, .q = t[i].q,
                                  .k = t[i].k, .v = x[V], .q_seq = seq, .q_row = row, .k_seq = seq, .k_row = row,
                                  .v_seq = seq, .v_row = row, .out = x[OUT], .out_seq = seq, .out_row = row, .lse = lse,
                                  .saved = saved, .dead_after = i ? t[i].dead_after : NULL, .live = t[i].live,
                                  .bfloat16 = b->dtype == SEL_BFLOAT16, .threads = b->threads };
        t[i].g = (sel_attention_grad){ .dout = x[DOUT], .dq = x[DQ], .dk = x[DK], .dv = x[DV], .dq_seq = seq,
                                       .dq_row = row, .dk_seq = seq, .dk_row = row, .dv_seq = seq, .dv_row = row };
        for (int pass = 0; pass < 2; pass++) {
            const size_t need = sel_attention_workspace(&t[i].a, pass == 1);
            if (need > bytes) bytes = need;
            cases[2 * i + pass] = (sel_bench_case){
                .run = pass ? backward : forward, .ctx = &t[i], .flops = (pass ? 2.5 : 1.0) * flops,
                .row = { .name = "attention", .kind = shares[i].kind, .pass = pass ? "backward" : "forward", .B = batch,
                         .H = heads, .N = N, .dh = dh } };
        }
    }
    if (rc == SEL_OK && !(workspace = sel_alloc(bytes, "attention's scratch"))) rc = SEL_ENOMEM;
    for (int i = 0; i < CASES; i++) t[i].a.workspace = workspace;

    const int from = out->results.n;
    if (rc == SEL_OK) rc = sel_bench_rounds(b, cases, 2 * CASES, SEL_YARD_PEAK, out);
    for (int i = 0; rc == SEL_OK && i < CASES; i++) {
        double live = 0.0;
        for (int64_t s = 0; i && s < batch; s++) live += t[i].live[s] / (pairs * (double)batch);
        for (int pass = 0; pass < 2; pass++) {
            sel_bench_result *const r = &out->results.rows[from + 2 * i + pass];
            r->live_share = i ? live : 1.0;
            r->seconds_share = r->seconds_median / out->results.rows[from + pass].seconds_median;
        }
    }
    for (int i = 0; i < ARRAYS; i++) sel_free(x[i]);
    for (int i = 0; i < CASES; i++) {
        sel_free(t[i].q);
        sel_free(t[i].k);
        sel_free(t[i].dead_after);
        sel_free(t[i].live);
    }
    sel_free(lse);
    sel_free(saved);
    sel_free(workspace);
    return rc;
}
