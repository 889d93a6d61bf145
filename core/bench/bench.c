/* bench.c: rounds, medians, and the cases of products, attention and memory-bound operations. */
#include "core/bench/bench.h"

#include <stdlib.h>
#include <string.h>
#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/base/rng.h"
#include "core/bench/rounds.h"
#include "dist/tree.h"

void sel_bench_free(sel_bench_results *r)
{
    free(r->results.rows);
    free(r->parts.rows);
    memset(r, 0, sizeof *r);
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double sel_bench_median(double *x, int n)
{
    qsort(x, (size_t)n, sizeof *x, by_value);
    return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

sel_status sel_bench_append(sel_bench_rows *out, const sel_bench_result *row)
{
    if (out->n == out->capacity) {
        const int more = out->capacity ? 2 * out->capacity : 32;
        sel_bench_result *const rows = realloc(out->rows, (size_t)more * sizeof *rows);
        if (!rows) return sel_fail(SEL_ENOMEM, "no memory for %d figures", more);
        out->rows = rows;
        out->capacity = more;
    }
    out->rows[out->n++] = *row;
    return SEL_OK;
}

float *sel_bench_array(int64_t n, uint64_t stream)
{
    float *const x = sel_alloc((size_t)n * sizeof *x, "a benchmark's array");
    for (int64_t i = 0; x && i < n; i += 4) {   /* close to unit normal: sums of four uniform numbers */
        uint32_t bits[4];
        sel_philox(bits, 0, stream, (uint64_t)i);
        for (int64_t k = i; k < n && k < i + 4; k++) {
            double sum = 0.0;
            for (int q = 0; q < 4; q++) sum += (double)((bits[k - i] >> (8 * q)) & 255u) / 255.0 - 0.5;
            x[k] = (float)(sum * 1.73);
        }
    }
    return x;
}

void *sel_bench_as_operand(const sel_bench *b, float *x, int64_t n)
{
    if (!x || b->dtype == SEL_FLOAT32) return x;
    uint16_t *const rounded = sel_alloc((size_t)n * sizeof *rounded, "a benchmark's array");
    if (rounded) sel_to_bfloat16(rounded, x, n, b->threads);
    sel_free(x);
    return rounded;
}

void *sel_bench_operand(const sel_bench *b, int64_t n, uint64_t stream)
{
    return sel_bench_as_operand(b, sel_bench_array(n, stream), n);
}

enum { PEAK_ROWS = 4096, PEAK_WIDTH = 768 };
static const double peak_flops = 2.0 * PEAK_ROWS * PEAK_WIDTH * PEAK_WIDTH;

enum { COPY_FLOATS = 1 << 25 };   /* 128 MiB: no cache holds it */

/* What every round is measured against: the matrix product of the peak, a copy of memory. */
typedef struct {
    sel_linear *l;
    void *x;
    float *w, *y;
    float *from, *to;
} yardstick;

size_t sel_bench_yard_bytes(const sel_bench *b, int yards)
{
    const size_t n = (size_t)PEAK_ROWS * PEAK_WIDTH, w = (size_t)PEAK_WIDTH * PEAK_WIDTH;
    const size_t each = b->dtype == SEL_BFLOAT16 ? sizeof(uint16_t) : sizeof(float);
    return (yards & SEL_YARD_PEAK ? n * (each + sizeof(float)) + w * (each + sizeof(float)) : 0) +
           (yards & SEL_YARD_COPY ? 2 * (size_t)COPY_FLOATS * sizeof(float) : 0);
}

static sel_status yardstick_open(yardstick *y, const sel_bench *b, int yards)
{
    memset(y, 0, sizeof *y);
    if (yards & SEL_YARD_COPY) {
        y->from = sel_bench_array(COPY_FLOATS, 1);
        y->to = sel_bench_array(COPY_FLOATS, 2);
        if (!y->from || !y->to) return SEL_ENOMEM;
    }
    if (!(yards & SEL_YARD_PEAK)) return SEL_OK;
    y->x = sel_bench_operand(b, PEAK_ROWS * PEAK_WIDTH, 1);
    y->w = sel_bench_array(PEAK_WIDTH * PEAK_WIDTH, 2);
    y->y = sel_bench_array(PEAK_ROWS * PEAK_WIDTH, 3);
    if (!y->x || !y->w || !y->y) return SEL_ENOMEM;
    SEL_TRY(sel_linear_new(&y->l, b->engine, PEAK_WIDTH, PEAK_WIDTH, false));
    return sel_linear_pack(y->l, y->w);
}

static void yardstick_close(yardstick *y)
{
    sel_linear_free(&y->l);
    sel_free(y->x);
    sel_free(y->w);
    sel_free(y->y);
    sel_free(y->from);
    sel_free(y->to);
}

/* Seconds of each yardstick; 0: not asked for. */
static sel_status yardstick_run(const yardstick *y, const sel_bench *b, double *peak, double *copy)
{
    *peak = *copy = 0.0;
    if (y->l) {
        const double begin = sel_now();
        SEL_TRY(sel_linear_forward(y->l, PEAK_ROWS, y->x, PEAK_WIDTH, y->y, PEAK_WIDTH));
        *peak = sel_now() - begin;
    }
    if (y->from) {
        const double begin = sel_now();
        #pragma omp parallel for num_threads(b->threads) schedule(static)
        for (int64_t i = 0; i < COPY_FLOATS; i += 4096) memcpy(y->to + i, y->from + i, 4096 * sizeof *y->to);
        *copy = sel_now() - begin;
    }
    return SEL_OK;
}

/* The rates of `row` from its seconds. */
static void rate(sel_bench_result *row, double flops, double bytes, const sel_bench_results *out, sel_dtype dtype)
{
    const double seconds = row->seconds_median;
    if (seconds <= 0.0) return;
    row->gflops = flops / seconds * 1e-9;
    row->gbytes_per_second = bytes / seconds * 1e-9;
    if (out->peak_gflops[dtype] > 0.0) row->share_of_peak = row->gflops / out->peak_gflops[dtype];
    if (out->copy_gbytes > 0.0) row->share_of_copy = row->gbytes_per_second / out->copy_gbytes;
}

/* The parts of a case that took time: seconds [SEL_N_PARTS][runs]. */
static sel_status append_parts(const sel_bench *b, const sel_bench_case *c, double *seconds,
                               const sel_bench_result *whole, sel_bench_results *out)
{
    for (int p = 0; p < SEL_N_PARTS; p++) {
        const sel_part_sum *const sum = &c->profile->parts[p];
        if (sum->laps == 0) continue;
        sel_bench_result row = *whole;
        row.name = sel_part_name((sel_part)p);
        row.pass = sel_part_pass((sel_part)p);
        row.tokens_per_second = row.gflops = row.share_of_peak = 0.0;
        row.seconds_median = sel_bench_median(seconds + p * b->runs, b->runs);
        row.seconds_share = row.seconds_median / whole->seconds_median;
        rate(&row, sum->flops / b->runs, sum->bytes / b->runs, out, b->dtype);
        SEL_TRY(sel_bench_append(&out->parts, &row));
    }
    return SEL_OK;
}

/* Runs a case once and notes its seconds [0] and, of each part, [(1 + p) runs]. */
static sel_status time_case(const sel_bench_case *c, double *seconds, int runs)
{
    double before[SEL_N_PARTS];
    for (int p = 0; c->profile && p < SEL_N_PARTS; p++) before[p] = c->profile->parts[p].seconds;
    const double begin = sel_now();
    const sel_status rc = c->run(c->ctx);
    seconds[0] = sel_now() - begin;
    for (int p = 0; c->profile && p < SEL_N_PARTS; p++)
        seconds[(1 + p) * runs] = c->profile->parts[p].seconds - before[p];
    return rc;
}

sel_status sel_bench_rounds(const sel_bench *b, const sel_bench_case *cases, int n, int yards, sel_bench_results *out)
{
    enum { LINES = 1 + SEL_N_PARTS };       /* of a case: the whole, its parts */
    yardstick y;
    const int runs = b->runs;
    double *const yard = calloc((size_t)((2 + n * LINES) * runs), sizeof *yard), *const seconds = yard + 2 * runs;
    sel_status rc = yardstick_open(&y, b, yards);

    if (!yard) rc = sel_fail(SEL_ENOMEM, "no memory for %d rounds of %d cases", runs, n);
    for (int round = -1; rc == SEL_OK && round < runs; round++) {   /* round -1 warms up */
        const int at = round < 0 ? 0 : round;
        rc = yardstick_run(&y, b, &yard[at], &yard[runs + at]);
        for (int i = 0; rc == SEL_OK && i < n; i++) {
            if (round == 0 && cases[i].profile) memset(cases[i].profile, 0, sizeof *cases[i].profile);
            rc = time_case(&cases[i], seconds + i * LINES * runs + at, runs);
        }
    }
    if (rc == SEL_OK) {
        if (y.l) out->peak_gflops[b->dtype] = peak_flops / sel_bench_median(yard, runs) * 1e-9;
        if (y.from) out->copy_gbytes = 2.0 * sizeof(float) * COPY_FLOATS / sel_bench_median(yard + runs, runs) * 1e-9;
        for (int i = 0; rc == SEL_OK && i < n; i++) {
            double *const mine = seconds + i * LINES * runs;
            sel_bench_result row = cases[i].row;
            row.dtype = b->dtype == SEL_BFLOAT16 && y.l ? "bfloat16" : "float32";
            row.threads = b->threads;
            row.runs = runs;
            row.seconds_median = sel_bench_median(mine, runs);
            rate(&row, cases[i].flops, cases[i].bytes, out, b->dtype);
            if (cases[i].tokens > 0.0) row.tokens_per_second = cases[i].tokens / row.seconds_median;
            rc = sel_bench_append(&out->results, &row);
            if (rc == SEL_OK && cases[i].profile) rc = append_parts(b, &cases[i], mine + runs, &row, out);
        }
    }
    yardstick_close(&y);
    free(yard);
    return rc;
}

/* ---- matrix products ---- */

typedef struct {
    sel_linear *l;
    int64_t out, in;
    void *x, *dy;               /* operands */
    float *y, *dx, *w, *dw;
} gemm;

static sel_status gemm_forward(void *ctx)
{
    gemm *g = ctx;
    return sel_linear_forward(g->l, PEAK_ROWS, g->x, g->in, g->y, g->out);
}
static sel_status gemm_input(void *ctx)
{
    gemm *g = ctx;
    return sel_linear_backward_input(g->l, PEAK_ROWS, g->dy, g->out, g->dx, SEL_FLOAT32, g->in);
}
static sel_status gemm_weight(void *ctx)
{
    gemm *g = ctx;
    return sel_linear_backward_weight(g->l, PEAK_ROWS, g->dy, g->out, g->x, g->in, g->dw, true);
}

sel_status sel_bench_gemm(const sel_bench *b, sel_bench_results *out)
{
    /* d = 12: q, k, v together; o_proj; gate and up; down; the output matrix of 8,192 pieces */
    static const struct { const char *name; int64_t out, in; } shapes[] = {
        { "qkv", 2304, 768 }, { "o_proj", 768, 768 }, { "gate_up", 4096, 768 }, { "down_proj", 768, 2048 },
        { "lm_head", 8192, 768 },
    };
    enum { SHAPES = sizeof shapes / sizeof shapes[0] };
    const sel_dims d12 = { .V = 8192, .N = 512, .D = 768, .L = 12, .H = 12, .Hkv = 12, .dh = 64, .F = 2048 };
    gemm g[SHAPES];
    sel_bench_case cases[3 * SHAPES];
    sel_status rc = SEL_OK;

    memset(g, 0, sizeof g);
    if (b->probe) rc = sel_choice_probe(b->engine, &d12, PEAK_ROWS, out->choice);
    if (rc == SEL_OK && b->probe) rc = sel_choice_apply(b->engine, &d12, out->choice);
    for (int i = 0; rc == SEL_OK && i < SHAPES; i++) {
        g[i] = (gemm){ .out = shapes[i].out, .in = shapes[i].in };
        g[i].x = sel_bench_operand(b, PEAK_ROWS * g[i].in, 11);
        g[i].dy = sel_bench_operand(b, PEAK_ROWS * g[i].out, 12);
        g[i].y = sel_bench_array(PEAK_ROWS * g[i].out, 12);
        g[i].dx = sel_bench_array(PEAK_ROWS * g[i].in, 11);
        g[i].w = sel_bench_array(g[i].out * g[i].in, 13);
        g[i].dw = sel_bench_array(g[i].out * g[i].in, 14);
        if (!g[i].x || !g[i].dy || !g[i].y || !g[i].dx || !g[i].w || !g[i].dw) rc = SEL_ENOMEM;
        if (rc == SEL_OK) rc = sel_linear_new(&g[i].l, b->engine, g[i].out, g[i].in, true);
        if (rc == SEL_OK) rc = sel_linear_pack(g[i].l, g[i].w);
        const double flops = 2.0 * PEAK_ROWS * (double)(g[i].out * g[i].in);
        const sel_bench_result row = { .name = shapes[i].name, .pass = "forward", .N = PEAK_ROWS };
        cases[3 * i] = (sel_bench_case){ .run = gemm_forward, .ctx = &g[i], .flops = flops, .row = row };
        cases[3 * i + 1] = (sel_bench_case){ .run = gemm_input, .ctx = &g[i], .flops = flops, .row = row };
        cases[3 * i + 2] = (sel_bench_case){ .run = gemm_weight, .ctx = &g[i], .flops = flops, .row = row };
        cases[3 * i + 1].row.pass = "backward_input";
        cases[3 * i + 2].row.pass = "backward_weight";
    }
    if (rc == SEL_OK) rc = sel_bench_rounds(b, cases, 3 * SHAPES, SEL_YARD_PEAK, out);
    for (int i = 0; i < SHAPES; i++) {
        sel_linear_free(&g[i].l);
        sel_free(g[i].x);
        sel_free(g[i].dy);
        sel_free(g[i].y);
        sel_free(g[i].dx);
        sel_free(g[i].w);
        sel_free(g[i].dw);
    }
    return rc;
}

/* ---- attention ---- */

typedef struct {
    const sel_ops *ops;
    sel_attention a;
    sel_attention_grad g;
} attention;

static sel_status attention_forward(void *ctx)
{
    const attention *t = ctx;
    t->ops->attention_forward(&t->a);
    return SEL_OK;
}
static sel_status attention_backward(void *ctx)
{
    const attention *t = ctx;
    t->ops->attention_backward(&t->a, &t->g);
    return SEL_OK;
}
static sel_status attention_carry(void *ctx)
{
    const attention *t = ctx;
    t->ops->attention_carry(&t->a);
    return SEL_OK;
}
static sel_status attention_carry_backward(void *ctx)
{
    const attention *t = ctx;
    t->ops->attention_carry_backward(&t->a, &t->g);
    return SEL_OK;
}

sel_status sel_bench_attention(const sel_bench *b, int64_t heads, int64_t dh, int64_t N, int64_t batch,
                               sel_bench_results *out)
{
    enum { Q, K, V, OUT, DOUT, OPERANDS, DQ = OPERANDS, DK, DV, ARRAYS };
    static const char *const kinds[] = { "selective", "standard" };
    const int64_t row = heads * dh, seq = N * row, n = batch * seq;
    void *x[ARRAYS] = { 0 };
    float *const lse = sel_bench_array(batch * heads * N, 9);
    float *const saved = sel_bench_array(batch * sel_attention_saved_size(N), 10);
    float *const carry = sel_bench_array(batch * N, 11), *const dcarry = sel_bench_array(batch * N, 12);
    void *workspace = NULL;
    attention t[2], part;
    sel_bench_case cases[6];
    sel_status rc = lse && saved && carry && dcarry ? SEL_OK : SEL_ENOMEM;

    for (int i = 0; i < ARRAYS; i++)
        if (!(x[i] = i < OPERANDS ? sel_bench_operand(b, n, (uint64_t)i) : sel_bench_array(n, (uint64_t)i)))
            rc = SEL_ENOMEM;
    for (int i = 0; rc == SEL_OK && i < 2; i++) {
        const double flops = 4.0 * (double)dh * (double)N * (double)(N + 1) / 2.0 * (double)(heads * batch);
        t[i].ops = b->ops;
        t[i].a = (sel_attention){ .B = batch, .heads = heads, .kv_heads = heads, .dh = dh, .i1 = N, .selective = i == 0,
                                  .relu = true, .protect_bos = true, .protect_self = true, .shift = true, .q = x[Q],
                                  .k = x[K], .v = x[V], .q_seq = seq, .q_row = row, .k_seq = seq, .k_row = row,
                                  .v_seq = seq, .v_row = row, .out = x[OUT], .out_seq = seq, .out_row = row, .lse = lse,
                                  .saved = saved, .bfloat16 = b->dtype == SEL_BFLOAT16, .threads = b->threads };
        t[i].g = (sel_attention_grad){ .dout = x[DOUT], .dq = x[DQ], .dk = x[DK], .dv = x[DV], .dq_seq = seq,
                                       .dq_row = row, .dk_seq = seq, .dk_row = row, .dv_seq = seq, .dv_row = row };
        const size_t forward = sel_attention_workspace(&t[i].a, false),
                     backward = sel_attention_workspace(&t[i].a, true);
        if (!workspace && !(workspace = sel_alloc(forward > backward ? forward : backward, "attention's scratch")))
            rc = SEL_ENOMEM;
        t[i].a.workspace = workspace;
        const sel_bench_result figure = { .name = "attention", .kind = kinds[i], .pass = "forward",
                                          .B = batch, .H = heads, .N = N, .dh = dh };
        cases[2 * i] = (sel_bench_case){ .run = attention_forward, .ctx = &t[i], .flops = flops, .row = figure };
        cases[2 * i + 1] =
            (sel_bench_case){.run = attention_backward, .ctx = &t[i], .flops = 2.5 * flops, .row = figure};
        cases[2 * i + 1].row.pass = "backward";
    }
    if (rc == SEL_OK) {   /* what a sequence's shards need beside these: over the selection alone */
        part = t[0];
        part.a.carry_out = carry;
        part.a.carry_seq = N;
        part.g.dcarry_in = dcarry;
        cases[4] = cases[0];
        cases[5] = cases[1];
        for (int i = 4; i < 6; i++) {
            cases[i].run = i == 4 ? attention_carry : attention_carry_backward;
            cases[i].ctx = &part;
            cases[i].flops = (i == 4 ? 0.5 : 1.5) * cases[0].flops / (double)heads;
            cases[i].row.kind = "carry";
        }
        rc = sel_bench_rounds(b, cases, 6, SEL_YARD_PEAK, out);
    }
    for (int i = 0; i < ARRAYS; i++) sel_free(x[i]);
    sel_free(lse);
    sel_free(saved);
    sel_free(carry);
    sel_free(dcarry);
    sel_free(workspace);
    return rc;
}
