/* mpi_comm.c: collectives, at 1 to 4 ranks. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "dist/comm.h"
#include "tests/check.h"

static sel_comm *comm;
static int rank, size;

static uint64_t hash(const void *data, size_t bytes)
{
    const unsigned char *p = data;
    uint64_t h = 14695981039346656037u;

    for (size_t i = 0; i < bytes; i++) h = (h ^ p[i]) * 1099511628211u;
    return h;
}

static void *need(size_t bytes)
{
    void *p = malloc(bytes);
    if (!p) {
        sel_fail(SEL_ENOMEM, "no memory for the test");
        sel_comm_die(comm, "need");
    }
    return p;
}

static void test_who(void)
{
    CHECK(rank >= 0 && rank < size, "rank %d of %d", rank, size);
    CHECK(sel_comm_host_size(comm) == size && sel_comm_host_rank(comm) == rank && sel_comm_hosts(comm) == 1,
          "one host: %d of %d, %d hosts", sel_comm_host_rank(comm), sel_comm_host_size(comm), sel_comm_hosts(comm));
    CHECK(sel_comm_library()[0] && !strchr(sel_comm_library(), '\n'), "library: %s", sel_comm_library());
}

static void test_agree(void)
{
    char want[64];

    CHECK(sel_comm_agree(comm, SEL_OK) == SEL_OK, "all are fine");

    /* One fails: all get its code and line. */
    for (int bad = 0; bad < size; bad++) {
        sel_fail(SEL_EUSER, "an old line of rank %d", rank);
        const sel_status mine = rank == bad ? sel_fail(SEL_EIO, "disk of %d", bad) : SEL_OK;
        CHECK(sel_comm_agree(comm, mine) == SEL_EIO, "rank %d failed", bad);
        snprintf(want, sizeof want, "rank %d: disk of %d", bad, bad);
        CHECK(strcmp(sel_error(), size > 1 ? want : "disk of 0") == 0, "%s", sel_error());
    }

    /* All fail alike: the lowest rank speaks.  Agreeing once more changes nothing. */
    CHECK(sel_comm_agree(comm, sel_fail(SEL_EFILE, "file of %d", rank)) == SEL_EFILE, "all failed");
    CHECK(strstr(sel_error(), "file of 0"), "%s", sel_error());
    snprintf(want, sizeof want, "%s", sel_error());
    CHECK(sel_comm_agree(comm, SEL_EFILE) == SEL_EFILE && strcmp(sel_error(), want) == 0, "%s", sel_error());

    /* The worst code wins, of the lowest rank that has it. */
    if (size >= 3) {
        const sel_status mine = rank == 0 ? SEL_EUSER : SEL_ENOMEM;
        sel_fail(mine, "line %d", rank);
        CHECK(sel_comm_agree(comm, mine) == SEL_ENOMEM, "the worst one");
        CHECK(strcmp(sel_error(), "rank 1: line 1") == 0, "%s", sel_error());
    }

    /* A long line arrives whole. */
    char line[1001];
    memset(line, 'x', sizeof line - 1);
    line[sizeof line - 1] = '\0';
    CHECK(sel_comm_agree(comm, rank == size - 1 ? sel_fail(SEL_EUSER, "%s", line) : SEL_OK) == SEL_EUSER, "long line");
    CHECK(strstr(sel_error(), line), "%zu bytes", strlen(sel_error()));
}

static void test_same(void)
{
    CHECK(sel_comm_same(comm, 0), "zeros");
    CHECK(sel_comm_same(comm, UINT64_MAX), "ones");
    CHECK(sel_comm_same(comm, 0x8000000000000001u), "the top bit");
    CHECK(sel_comm_same(comm, (uint64_t)(rank == size - 1)) == (size == 1), "the last one differs");
    CHECK(sel_comm_same(comm, rank == 0 ? UINT64_MAX : 1) == (size == 1), "the first one differs");
}

/* A payload beyond one chunk, with every root. */
static void test_bcast(void)
{
    static const size_t lengths[] = {0, 1, 4099, ((size_t)64 << 20) + 12345};

    for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
        const size_t n = lengths[k];
        const int root = (int)k % size;
        unsigned char *data = need(n + 1);
        for (size_t i = 0; i < n; i++) data[i] = rank == root ? (unsigned char)((i * 2654435761u) >> 13) : 0;
        data[n] = 77;
        sel_comm_bcast(comm, data, n, root);
        size_t wrong = 0;
        for (size_t i = 0; i < n; i++) wrong += data[i] != (unsigned char)((i * 2654435761u) >> 13);
        CHECK(wrong == 0 && data[n] == 77, "%zu of %zu bytes from root %d", wrong, n, root);
        free(data);
    }
}

static void test_gather(void)
{
    static const size_t lengths[] = {0, 1, 13, 1000, ((size_t)64 << 20) + 5};

    for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
        const size_t n = lengths[k];
        const int root = (int)(k + 1) % size;
        unsigned char *mine = need(n + 1), *all = rank == root ? need(n * (size_t)size + 1) : NULL;
        for (size_t i = 0; i < n; i++) mine[i] = (unsigned char)(i * 31 + (size_t)rank * 7);
        sel_comm_gather(comm, mine, n, all, root);
        size_t wrong = 0;
        for (size_t r = 0; all && r < (size_t)size; r++)
            for (size_t i = 0; i < n; i++) wrong += all[r * n + i] != (unsigned char)(i * 31 + r * 7);
        CHECK(wrong == 0, "%zu wrong bytes of %zu a rank", wrong, n);
        free(mine);
        free(all);
    }
}

/* The fixed tree of dist/tree.h, written another way: neighbours are added, level by level; the odd one waits. */
static double tree(double *x, int n)
{
    for (; n > 1; n = (n + 1) / 2)
        for (int i = 0; i < n; i += 2) x[i / 2] = i + 1 < n ? x[i] + x[i + 1] : x[i];
    return x[0];
}

/* Doubles: the order of additions is that of the tree, to the bit, on all ranks. */
static void test_doubles(void)
{
    enum { N = 333 };
    double x[N], y[N];

    for (int i = 0; i < N; i++) {
        x[i] = sel_rng_uniform(5, (uint64_t)rank, (uint64_t)i) * exp((double)(i % 60));
        y[i] = x[i];
    }
    sel_comm_sum_doubles(comm, x, N);
    for (int i = 0; i < N; i++) {
        double terms[8];
        for (int r = 0; r < size; r++) terms[r] = sel_rng_uniform(5, (uint64_t)r, (uint64_t)i) * exp((double)(i % 60));
        const double sum = tree(terms, size);
        CHECK(memcmp(&sum, &x[i], sizeof sum) == 0, "sum %d: %.17g, by the tree %.17g", i, x[i], sum);
    }
    CHECK(sel_comm_same(comm, hash(x, sizeof x)), "sums differ between ranks");

    sel_comm_max_doubles(comm, y, N);
    for (int i = 0; i < N; i++) {
        double most = -INFINITY;
        for (int r = 0; r < size; r++)
            most = fmax(most, sel_rng_uniform(5, (uint64_t)r, (uint64_t)i) * exp((double)(i % 60)));
        CHECK(memcmp(&most, &y[i], sizeof most) == 0, "max %d: %.17g, should be %.17g", i, y[i], most);
    }

    /* Not finite on one rank is seen by all. */
    for (int bad = 0; bad < size; bad++) {
        double a[3] = {1, -rank, rank == bad ? NAN : 3}, b[3] = {rank, -INFINITY, rank == bad ? NAN : 3};
        sel_comm_sum_doubles(comm, a, 3);
        sel_comm_max_doubles(comm, b, 3);
        CHECK(isnan(a[2]) && isnan(b[2]), "NaN of rank %d is lost: %g %g", bad, a[2], b[2]);
        CHECK((int)a[0] == size && (int)b[0] == size - 1 && isinf(b[1]), "the others: %g %g %g", a[0], b[0], b[1]);
    }
    sel_comm_sum_doubles(comm, x, 0);
}

static void test_merge(void)
{
    enum { N = 1000 };
    double x[N], y[N];

    for (int i = 0; i < N; i++) {
        y[i] = sel_rng_uniform(7, 1, (uint64_t)i) * exp((double)(i % 60));
        x[i] = i % size == rank ? y[i] : 0;
    }
    sel_comm_merge_doubles(comm, x, N);
    CHECK(memcmp(x, y, sizeof x) == 0, "merged numbers are not those that were brought");
}

/* MPI's own sum of small dyadic numbers, which is exact in any order, beyond one chunk. */
static void test_sum_floats(void)
{
    const int64_t n = (16 << 20) + 7;
    float *x = need((size_t)n * sizeof *x);
    int64_t wrong = 0;

    for (int64_t i = 0; i < n; i++) x[i] = (float)((i * 7 + rank * 13) % 64 - 31) / 8;
    sel_comm_sum_floats(comm, x, n);
    for (int64_t i = 0; i < n; i++) {
        float sum = 0;
        for (int r = 0; r < size; r++) sum += (float)((i * 7 + r * 13) % 64 - 31) / 8;
        wrong += memcmp(&x[i], &sum, sizeof sum) != 0;
    }
    CHECK(wrong == 0, "%lld of %lld sums are wrong", (long long)wrong, (long long)n);
    free(x);
}

int main(int argc, char **argv)
{
    if (sel_comm_open(&comm, &argc, &argv) != SEL_OK) {
        fprintf(stderr, "%s\n", sel_error());
        return EXIT_FAILURE;
    }
    rank = sel_comm_rank(comm);
    size = sel_comm_size(comm);
    test_who();
    test_agree();
    test_same();
    test_bcast();
    test_gather();
    test_doubles();
    test_merge();
    test_sum_floats();
    sel_comm_barrier(comm);

    const int verdict = check_verdict();
    sel_comm_close(&comm);
    CHECK(comm == NULL, "closed");
    sel_comm_close(&comm);
    return verdict;
}
