/* cmd_bench.c: `selectra bench gemm|attention|ops|step|mesh`: the kernels beside the machine's peak. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include "core/bench/bench.h"
#include "launcher/launcher.h"
#include "launcher/options.h"

enum { MOST = 16 };

typedef struct {
    int64_t at[MOST];
    int n;
} numbers;

/* "1,2,4" */
static bool read_numbers(const char *text, numbers *out)
{
    out->n = 0;
    for (char *end; out->n < MOST; text = end + 1) {
        out->at[out->n] = strtoll(text, &end, 10);
        if (end == text || out->at[out->n++] < 1) return false;
        if (*end == '\0') return true;
        if (*end != ',') return false;
    }
    return false;
}

static void print_rates(const sel_bench_result *x)
{
    if (x->gflops > 0.0) printf("  %7.1f GFLOP/s  %5.1f%% of peak", x->gflops, 100.0 * x->share_of_peak);
    else if (x->gbytes_per_second > 0.0)
        printf("  %7.1f GB/s  %5.1f%% of copy", x->gbytes_per_second, 100.0 * x->share_of_copy);
    if (x->tokens_per_second > 0.0) printf("  %.0f tokens/s", x->tokens_per_second);
    if (x->live_share > 0.0)
        printf("  %.1f%% of pairs alive, %.1f%% of the time", 100.0 * x->live_share, 100.0 * x->seconds_share);
    putchar('\n');
}

static void print_table(const sel_bench_rows *r, int from)
{
    for (int i = from; i < r->n; i++) {
        const sel_bench_result *x = &r->rows[i];
        printf("%-14s %-10s %-15s", x->name, x->kind ? x->kind : "", x->pass);
        if (x->B) printf(" B %-4" PRId64, x->B);
        if (x->N) printf(" N %-6" PRId64, x->N);
        printf(" %d thread%s  %9.3f ms", x->threads, x->threads == 1 ? " " : "s", 1e3 * x->seconds_median);
        print_rates(x);
    }
}

/* The parts of the steps, and the memory that one needs. */
static void print_parts(const sel_bench_results *out, int from)
{
    for (int i = from; i < out->parts.n; i++) {
        const sel_bench_result *x = &out->parts.rows[i];
        printf("  %-10s %-5" PRId64 " %-14s %-15s %9.3f ms %5.1f%%", x->kind, x->N, x->name, x->pass,
               1e3 * x->seconds_median, 100.0 * x->seconds_share);
        print_rates(x);
    }
}

static const double MIB = 1048576.0;

static void print_memory(const sel_bench_memory *m)
{
    printf("memory, %s, B %" PRId64 " N %" PRId64 ": %.0f MiB budgeted (program %.0f, parameters %.0f, gradients %.0f, "
           "moments %.0f, packed weights %.0f, kept for backward %.0f, scratch %.0f, yardsticks %.0f), %.0f MiB at the "
           "peak\n", m->dtype, m->B, m->N, (double)sel_bench_budget(m) / MIB, (double)m->program / MIB,
           (double)m->parameters / MIB, (double)m->gradients / MIB, (double)m->moments / MIB, (double)m->packed / MIB,
           (double)m->kept / MIB, (double)m->scratch / MIB, (double)m->yardsticks / MIB, (double)m->resident / MIB);
}

static void json_rows(const char *key, const sel_bench_rows *r)
{
    printf(", \"%s\": [", key);
    for (int i = 0; i < r->n; i++) {
        const sel_bench_result *x = &r->rows[i];
        printf("%s\n {\"name\": \"%s\", ", i ? "," : "", x->name);
        if (x->kind) printf("\"kind\": \"%s\", ", x->kind);
        printf("\"dtype\": \"%s\", \"pass\": \"%s\", \"B\": %" PRId64 ", \"H\": %" PRId64 ", \"N\": %" PRId64
               ", \"dh\": %" PRId64 ", \"threads\": %d, \"seconds_median\": %.6g, \"runs\": %d",
               x->dtype, x->pass, x->B, x->H, x->N, x->dh, x->threads, x->seconds_median, x->runs);
        if (x->seconds_share > 0.0) printf(", \"seconds_share\": %.6g", x->seconds_share);
        if (x->gflops > 0.0) printf(", \"gflops\": %.6g, \"share_of_peak\": %.6g", x->gflops, x->share_of_peak);
        if (x->gbytes_per_second > 0.0)
            printf(", \"gbytes_per_second\": %.6g, \"share_of_copy\": %.6g", x->gbytes_per_second, x->share_of_copy);
        if (x->tokens_per_second > 0.0) printf(", \"tokens_per_second\": %.6g", x->tokens_per_second);
        if (x->live_share > 0.0)
            printf(", \"live_share\": %.6g, \"time_share\": %.6g", x->live_share, x->seconds_share);
        putchar('}');
    }
    printf("\n]");
}

static void json_memory(const sel_bench_results *r)
{
    printf(", \"memory\": [");
    for (int i = 0; i < r->n_memory; i++) {
        const sel_bench_memory *m = &r->memory[i];
        printf("%s\n {\"dtype\": \"%s\", \"B\": %" PRId64 ", \"N\": %" PRId64 ", \"budget_bytes\": %zu, "
               "\"program\": %zu, \"parameters\": %zu, \"gradients\": %zu, \"moments\": %zu, "
               "\"packed_weights\": %zu, \"kept\": %zu, \"scratch\": %zu, \"yardsticks\": %zu, "
               "\"peak_rss_bytes\": %zu}",
               i ? "," : "", m->dtype, m->B, m->N, sel_bench_budget(m), m->program, m->parameters, m->gradients,
               m->moments, m->packed, m->kept, m->scratch, m->yardsticks, m->resident);
    }
    printf("\n]");
}

static void print_json(const sel_bench_results *r, int threads)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    printf("{\"cpu\": \"%s\", \"threads\": %d, \"peak_gflops\": {\"float32\": %.6g, \"bfloat16\": %.6g}, "
           "\"peak_rss_bytes\": %lld",
           sel_cpu_name(), threads, r->peak_gflops[SEL_FLOAT32], r->peak_gflops[SEL_BFLOAT16], 1024LL * u.ru_maxrss);
    if (r->copy_gbytes > 0.0) printf(", \"copy_gbytes_per_second\": %.6g", r->copy_gbytes);
    json_rows("results", &r->results);
    if (r->parts.n) json_rows("parts", &r->parts);
    if (r->n_memory) json_memory(r);
    if (r->choice[0]) printf(", \"linear_choice\": \"%s\"", r->choice);
    printf("}\n");
}

typedef struct {
    const char *threads, *contexts, *config, *backend, *dtypes;
    int64_t batch, heads, head_width, runs;
    bool json, dead_keys;
} request;

static sel_status attention_cases(const sel_bench *b, const request *r, const numbers *contexts, sel_bench_results *out)
{
    for (int i = 0; i < contexts->n; i++) {
        const int64_t N = contexts->at[i], whole = 2048 * b->threads / N;
        if (r->dead_keys) {
            const int64_t batch = r->batch ? r->batch : whole > b->threads ? whole : b->threads;
            SEL_TRY(sel_bench_dead_keys(b, r->heads, r->head_width, N, batch, out));
            continue;
        }
        if (r->batch) {
            SEL_TRY(sel_bench_attention(b, r->heads, r->head_width, N, r->batch, out));
            continue;
        }
        /* whole sequences, at least one a thread and 2,048 tokens a thread; then one sequence for all threads */
        SEL_TRY(sel_bench_attention(b, r->heads, r->head_width, N, whole > b->threads ? whole : b->threads, out));
        if (b->threads > 1) SEL_TRY(sel_bench_attention(b, r->heads, r->head_width, N, 1, out));
    }
    return SEL_OK;
}

static sel_status step_cases(const sel_bench *b, const request *r, const numbers *contexts, sel_bench_results *out)
{
    /* all keys: of random tokens and weights many would die, and the FLOPs counted would not be those done */
    static const char standard[] = "model: {d: 12}\nattention: {dead_keys: off}\n";
    sel_config c;
    char *text = NULL, context[64];
    size_t bytes = sizeof standard - 1;
    sel_status rc = SEL_OK;

    if (r->config) SEL_TRY(sel_read_file(r->config, &text, &bytes));
    for (int i = 0; rc == SEL_OK && i < (contexts->n ? contexts->n : 1); i++) {
        const char *const override = context;
        if (contexts->n) snprintf(context, sizeof context, "model.context=%" PRId64, contexts->at[i]);
        rc = sel_config_parse(&c, text ? text : standard, bytes, r->config ? r->config : "built-in", &override,
                              contexts->n ? 1 : 0);
        if (rc == SEL_OK) rc = sel_bench_step(b, &c, 8192, out);
    }
    free(text);
    return rc;
}

static const char *const dtype_names[] = { [SEL_FLOAT32] = "float32", [SEL_BFLOAT16] = "bfloat16" };

/* All that was asked for on that many threads with operands of that type. */
static sel_status run_cases(const char *what, const request *r, const sel_ops *ops, int threads, sel_dtype dtype,
                            const numbers *contexts, sel_bench_results *out)
{
    sel_bench b = { .ops = ops, .dtype = dtype, .threads = threads, .runs = (int)r->runs };
    const int from = out->results.n, parts = out->parts.n, memory = out->n_memory;
    sel_status rc;

    SEL_TRY(sel_linear_open(&b.engine, strcmp(r->backend, "openblas") == 0 ? SEL_LINEAR_OPENBLAS : SEL_LINEAR_ONEDNN,
                            dtype, threads));
    b.probe = strcmp(r->backend, "auto") == 0;
    if (strcmp(what, "gemm") == 0) rc = sel_bench_gemm(&b, out);
    else if (strcmp(what, "attention") == 0) rc = attention_cases(&b, r, contexts, out);
    else if (strcmp(what, "ops") == 0) rc = sel_bench_ops(&b, 8192, 768, out);
    else rc = step_cases(&b, r, contexts, out);
    if (rc == SEL_OK && !r->json) {
        printf("%s, %d thread%s", sel_linear_library(b.engine), threads, threads == 1 ? "" : "s");
        if (out->peak_gflops[dtype] > 0.0)
            printf(", peak of %s matrix products %.0f GFLOP/s", dtype_names[dtype], out->peak_gflops[dtype]);
        if (out->copy_gbytes > 0.0) printf(", copy of memory %.1f GB/s", out->copy_gbytes);
        putchar('\n');
        if (out->choice[0]) printf("products by %s\n", out->choice);
        print_table(&out->results, from);
        print_parts(out, parts);
        for (int i = memory; i < out->n_memory; i++) print_memory(&out->memory[i]);
        fflush(stdout);
    }
    sel_linear_close(&b.engine);
    return rc;
}

static sel_status run(const char *what, const request *r, const numbers *threads, const numbers *contexts)
{
    sel_bench_results out = { 0 };
    sel_ops ops;
    sel_cpu_level level;
    sel_status rc = sel_cpu_choose("auto", &level);

    if (rc != SEL_OK) return rc;
    sel_ops_init(&ops, level);
    for (int i = 0; rc == SEL_OK && i < threads->n; i++) rc = sel_cpu_check_threads(threads->at[i]);
    if (rc == SEL_OK && !r->json)
        printf("%s, kernels for %s; medians of %d rounds\n", sel_cpu_name(), sel_cpu_level_name(level), (int)r->runs);
    for (int i = 0; rc == SEL_OK && i < threads->n; i++)
        for (int dtype = SEL_FLOAT32; rc == SEL_OK && dtype <= SEL_BFLOAT16; dtype++)
            if (strstr(r->dtypes, dtype_names[dtype]))
                rc = run_cases(what, r, &ops, (int)threads->at[i], (sel_dtype)dtype, contexts, &out);
    if (rc == SEL_OK && r->json) print_json(&out, (int)threads->at[threads->n - 1]);
    sel_bench_free(&out);
    return rc;
}

int sel_cmd_bench(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "mesh") == 0) return sel_cmd_bench_mesh(argc - 1, argv + 1);
    char all[16];
    snprintf(all, sizeof all, "%d", sel_cpu_threads());
    request r = { .threads = all, .contexts = NULL, .backend = "onednn", .dtypes = "float32", .heads = 12,
                  .head_width = 64, .runs = 21 };
    const sel_option options[] = {
        {"threads", SEL_OPT_TEXT, &r.threads, 0, "1,2", "thread counts, one after another (all processors)"},
        {"context", SEL_OPT_TEXT, &r.contexts, 0, "512,1024",
         "attention, step: tokens of a sequence (512,1024,2048; 512)"},
        {"batch", SEL_OPT_INTEGER, &r.batch, 1, "B", "attention: sequences (2,048 tokens a thread, and B = 1)"},
        {"heads", SEL_OPT_INTEGER, &r.heads, 1, "H", "attention: heads (12)"},
        {"head-width", SEL_OPT_INTEGER, &r.head_width, 1, "W", "attention: width of a head (64)"},
        {"runs", SEL_OPT_INTEGER, &r.runs, 1, "N", "rounds that the medians are taken of (21)"},
        {"dtype", SEL_OPT_TEXT, &r.dtypes, 0, "TYPES", "float32, bfloat16 or float32,bfloat16 (float32)"},
        {"backend", SEL_OPT_TEXT, &r.backend, 0, "NAME", "linear layers: onednn, openblas, or auto: measured (onednn)"},
        {"dead-keys", SEL_OPT_FLAG, &r.dead_keys, 0, NULL, "attention: leaving out dead keys, at several shares"},
        {"json", SEL_OPT_FLAG, &r.json, 0, NULL, "one JSON object"},
    };
    const sel_command command = {
        "selectra bench", "gemm|attention|ops|step [CONFIG]|mesh [OPTIONS]",
        "Each round measures the matrix product that stands for the peak and every case once, so a\n"
        "shared machine's drift touches both.  `step` takes a configuration; default d = 12.",
        options, sizeof options / sizeof options[0]};
    numbers threads, contexts = { .n = 0 };
    int n;

    const int status = sel_options_begin(&command, argc, argv, 1, 2, &n);
    if (status >= 0) return status;
    static const char *const names[] = { "gemm", "attention", "ops", "step" };
    const char *what = NULL;
    for (size_t i = 0; n > 0 && i < sizeof names / sizeof names[0]; i++)
        if (strcmp(argv[1], names[i]) == 0) what = names[i];
    if (!what)
        return sel_options_mistake(&command, "expected gemm, attention, ops, step or mesh%s%s", n ? ", got " : "",
                                   n ? argv[1] : "");
    if (n > (strcmp(what, "step") == 0 ? 2 : 1))
        return sel_options_mistake(&command, "%s: one argument too many", argv[n]);
    if (n == 2) r.config = argv[2];
    if (!read_numbers(r.threads, &threads))
        return sel_options_mistake(&command, "--threads: expected numbers such as 1,2, got \"%s\"", r.threads);
    if (!r.contexts && strcmp(what, "attention") == 0) r.contexts = "512,1024,2048";
    if (r.contexts && !read_numbers(r.contexts, &contexts))
        return sel_options_mistake(&command, "--context: expected numbers such as 512,1024, got \"%s\"", r.contexts);
    if (strcmp(r.backend, "onednn") != 0 && strcmp(r.backend, "openblas") != 0 && strcmp(r.backend, "auto") != 0)
        return sel_options_mistake(&command, "--backend: expected onednn, openblas or auto, got \"%s\"", r.backend);

    if (!strstr(r.dtypes, "float32") && !strstr(r.dtypes, "bfloat16"))
        return sel_options_mistake(&command, "--dtype: expected float32, bfloat16 or both, got \"%s\"", r.dtypes);

    const sel_status rc = run(what, &r, &threads, &contexts);
    if (rc != SEL_OK) fprintf(stderr, "selectra bench: %s\n", sel_error());
    return sel_exit_status(rc);
}
