/* mesh.c: what the ranks can move: the reducer's ways beside MPI's own and beside copies of memory. */
#include <string.h>
#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/bench/bench.h"
#include "dist/reduce.h"
#include "dist/sequence.h"

enum { MOST_ROUNDS = 1000, MOST_CASES = 18 };

/* The ranks that a case is about, with all they need. */
typedef struct {
    sel_comm *comm;
    sel_reducer *sum, *shares, *one;   /* all-reduce; reduce-scatter and all-gather; of one float */
} group;

typedef struct {
    group host, hosts, all;
    sel_sequence *keys;                /* of one sequence, shared by all ranks */
    int64_t keys_width;
    float *from, *to;                  /* [n] of this rank alone */
    int64_t n;
    int threads;
} bench;

typedef struct {
    const char *name;
    void (*run)(bench *b, group *g);
    group *g;
    int64_t bytes;
    double seconds[MOST_ROUNDS];
} mesh_case;

static void run_memcpy(bench *b, group *g)
{
    (void)g;
#pragma omp parallel for num_threads(b->threads) schedule(static)
    for (int i = 0; i < b->threads; i++) {
        const int64_t begin = b->n * i / b->threads, end = b->n * (i + 1) / b->threads;
        memcpy(b->to + begin, b->from + begin, (size_t)(end - begin) * sizeof(float));
    }
}

static void run_sum(bench *b, group *g) { (void)b; sel_reducer_finish(g->sum); }
static void run_one(bench *b, group *g) { (void)b; sel_reducer_finish(g->one); }
static void run_scatter(bench *b, group *g) { (void)b; sel_reducer_finish(g->shares); }
static void run_gather(bench *b, group *g) { (void)b; sel_reducer_gather(g->shares); }
static void run_mpi_sum(bench *b, group *g) { sel_comm_sum_floats(g->comm, b->to, b->n); }
static void run_mpi_one(bench *b, group *g) { sel_comm_sum_floats(g->comm, b->to, 1); }
static void run_mpi_scatter(bench *b, group *g) { sel_comm_scatter_floats(g->comm, b->from, b->to, b->n); }
static void run_mpi_gather(bench *b, group *g) { sel_comm_gather_floats(g->comm, b->from, b->to, b->n); }

/* Each rank's keys to all; the gradients of all keys to their ranks. */
static void run_keys(bench *b, group *g)
{
    const sel_chunks *const c = sel_sequence_chunks(b->keys);
    float *const keys = sel_sequence_begin(b->keys);
    (void)g;
    for (int k = 0; k < c->chunks; k++) {
        const int64_t n = c->each * b->keys_width, at = sel_chunk_place(c, c->rank, k) * n;
        memcpy(keys + at, b->from + at, (size_t)n * sizeof *keys);
    }
    sel_sequence_share(b->keys, 1);
    sel_sequence_end(b->keys);
}

static void run_key_gradients(bench *b, group *g)
{
    (void)g;
    sel_sequence_sum_gradients(b->keys, 1);
}

/* As many keys as fit into the array; *bytes of them. */
static sel_status open_keys(bench *b, int64_t *bytes)
{
    const int ranks = sel_comm_size(b->all.comm);
    sel_sequence_options o = { .batch = 1, .threads = b->threads };
    sel_mesh m;

    o.width = b->keys_width = b->n >= 2048 * ranks ? 1024 : 1;
    const int64_t tokens = b->n / o.width / (2 * ranks) * (2 * ranks);
    SEL_TRY(sel_mesh_init(&m, sel_comm_rank(b->all.comm), ranks, 1, ranks));
    SEL_TRY(sel_mesh_chunks(&m, tokens ? tokens : ranks, SEL_CUT_AUTO, &o.chunks));
    *bytes = o.chunks.tokens * o.width * (int64_t)sizeof(float);
    return sel_sequence_new(&b->keys, b->all.comm, &o);
}

static sel_status open_group(bench *b, group *g, bool wanted, bool shares)
{
    if (!wanted) return SEL_OK;
    sel_reducer_options o = { .n = b->n, .threads = b->threads };

    SEL_TRY(sel_reducer_new(&g->sum, g->comm, &o));
    o.zero = true;
    if (shares) SEL_TRY(sel_reducer_new(&g->shares, g->comm, &o));
    o = (sel_reducer_options){ .n = 1, .threads = 1 };
    return sel_reducer_new(&g->one, g->comm, &o);
}

static void close_group(group *g)
{
    sel_reducer_free(&g->sum);
    sel_reducer_free(&g->shares);
    sel_reducer_free(&g->one);
}

static sel_status open_bench(bench *b, sel_comm *c, bool in_host, bool between)
{
    const size_t bytes = (size_t)b->n * sizeof(float);
    sel_status rc = SEL_OK;

    b->from = sel_alloc(bytes, "a benchmark's array");
    b->to = sel_alloc(bytes, "a benchmark's array");
    if (!b->from || !b->to) rc = SEL_ENOMEM;
    SEL_TRY(sel_comm_agree(c, rc));
    memset(b->from, 0, bytes);   /* the pages are there before they are measured; sums of zeros stay zeros */
    memset(b->to, 0, bytes);
    b->all.comm = c;
    sel_comm_split(&b->host.comm, c, sel_comm_host_index(c));
    sel_comm_split(&b->hosts.comm, c, sel_comm_host_rank(c));
    SEL_TRY(open_group(b, &b->host, in_host, false));
    SEL_TRY(open_group(b, &b->hosts, between, false));
    return open_group(b, &b->all, in_host || between, true);
}

static void close_bench(bench *b)
{
    close_group(&b->host);
    close_group(&b->hosts);
    close_group(&b->all);
    sel_sequence_free(&b->keys);
    sel_comm_close(&b->host.comm);
    sel_comm_close(&b->hosts.comm);
    sel_free(b->from);
    sel_free(b->to);
}

static sel_status measure(bench *b, sel_comm *c, mesh_case *cases, int n, int runs, sel_bench_results *out)
{
    for (int round = -1; round < runs; round++) /* the first one warms up */
        for (int i = 0; i < n; i++) {
            sel_comm_barrier(c);
            const double begun = sel_now();
            cases[i].run(b, cases[i].g);
            double seconds = sel_now() - begun;
            sel_comm_max_doubles(c, &seconds, 1);
            if (round >= 0) cases[i].seconds[round] = seconds;
        }
    for (int i = 0; i < n; i++) {
        const double seconds = sel_bench_median(cases[i].seconds, runs);
        const sel_bench_result row = { .name = cases[i].name, .dtype = "float32", .pass = "step",
                                       .threads = b->threads, .runs = runs, .seconds_median = seconds,
                                       .bytes = cases[i].bytes,
                                       .gbytes_per_second = (double)cases[i].bytes / seconds / 1e9 };
        SEL_TRY(sel_bench_append(&out->results, &row));
    }
    const double copy = out->results.rows[out->results.n - n].gbytes_per_second;
    for (int i = out->results.n - n; i < out->results.n; i++)
        out->results.rows[i].share_of_copy = out->results.rows[i].gbytes_per_second / copy;
    return SEL_OK;
}

sel_status sel_bench_mesh(sel_comm *c, int64_t bytes, int runs, int threads, sel_bench_results *out)
{
    const int ranks = sel_comm_size(c), hosts = sel_comm_hosts(c);
    const bool in_host = ranks > hosts, between = hosts > 1;
    static mesh_case cases[MOST_CASES];
    bench b = { .threads = threads, .n = bytes / (int64_t)sizeof(float) / ranks * ranks };
    const int64_t whole = b.n * (int64_t)sizeof(float);
    mesh_case *keys = NULL;
    int n = 0;

    if (runs > MOST_ROUNDS) return sel_fail(SEL_EUSER, "at most %d rounds can be measured, not %d", MOST_ROUNDS, runs);
    if (b.n < 1) return sel_fail(SEL_EUSER, "%lld bytes are less than one number a rank", (long long)bytes);
#define CASE(what, function, where, size) \
    cases[n++] = (mesh_case){ .name = what, .run = function, .g = where, .bytes = size }
    CASE("memcpy", run_memcpy, NULL, whole);
    if (in_host) {
        CASE("allreduce_host", run_sum, &b.host, whole);
        CASE("mpi_allreduce_host", run_mpi_sum, &b.host, whole);
        CASE("latency_host", run_one, &b.host, sizeof(float));
        CASE("mpi_latency_host", run_mpi_one, &b.host, sizeof(float));
    }
    if (between) {
        CASE("allreduce_hosts", run_sum, &b.hosts, whole);
        CASE("mpi_allreduce_hosts", run_mpi_sum, &b.hosts, whole);
        CASE("latency_hosts", run_one, &b.hosts, sizeof(float));
        CASE("mpi_latency_hosts", run_mpi_one, &b.hosts, sizeof(float));
    }
    if (ranks > 1) {
        CASE("allreduce", run_sum, &b.all, whole);
        CASE("mpi_allreduce", run_mpi_sum, &b.all, whole);
        CASE("reduce_scatter", run_scatter, &b.all, whole);
        CASE("all_gather", run_gather, &b.all, whole);
        CASE("mpi_reduce_scatter", run_mpi_scatter, &b.all, whole);
        CASE("mpi_all_gather", run_mpi_gather, &b.all, whole);
        keys = &cases[n];
        CASE("keys", run_keys, NULL, whole);
        CASE("key_gradients", run_key_gradients, NULL, whole);
    }
#undef CASE
    sel_status rc = open_bench(&b, c, in_host, between);
    if (rc == SEL_OK && keys) {
        rc = open_keys(&b, &keys[0].bytes);
        keys[1].bytes = keys[0].bytes;
    }
    if (rc == SEL_OK) rc = measure(&b, c, cases, n, runs, out);
    close_bench(&b);
    return rc;
}
