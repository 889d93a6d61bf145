/* mpi_comm.c: collectives and the reducer, at 1 to 4 ranks. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/rng.h"
#include "dist/comm.h"
#include "dist/mesh.h"
#include "dist/reduce.h"
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

/* Doubles: the order of additions is by rank, so the result is that of a plain loop, to the bit, on all ranks. */
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
        double sum = 0;
        for (int r = 0; r < size; r++) sum += sel_rng_uniform(5, (uint64_t)r, (uint64_t)i) * exp((double)(i % 60));
        CHECK(memcmp(&sum, &x[i], sizeof sum) == 0, "sum %d: %.17g, in rank order %.17g", i, x[i], sum);
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

/* Small dyadic numbers: any order of additions is exact. */
static float exact(int r, int64_t i)
{
    return (float)((i * 7 + r * 13) % 64 - 31) / 8;
}

static void test_sum_exact(void)
{
    static const int64_t lengths[] = {0, 1, 2, 15, 1000, 65537, (16 << 20) + 7};

    for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
        const int64_t n = lengths[k];
        float *x = need(((size_t)n + 1) * sizeof *x);
        sel_mesh m;
        sel_reducer *reducer;
        double bytes, seconds;

        for (int64_t i = 0; i < n; i++) x[i] = exact(rank, i);
        x[n] = 42;
        CHECK_OK(sel_mesh_init(&m, rank, size, 0, 1));
        CHECK_OK(sel_reducer_new(&reducer, comm, &m, x, n));
        sel_reducer_ready(reducer, n / 2, n);
        sel_reducer_ready(reducer, 0, n / 2);
        sel_reducer_finish(reducer);
        int64_t wrong = 0;
        for (int64_t i = 0; i < n; i++) {
            float sum = 0;
            for (int r = 0; r < size; r++) sum += exact(r, i);
            wrong += memcmp(&x[i], &sum, sizeof sum) != 0;
        }
        CHECK(wrong == 0 && x[n] > 41, "%lld of %lld sums are wrong", (long long)wrong, (long long)n);

        sel_reducer_wire(reducer, &bytes, &seconds);
        const double least = 8.0 * (size - 1) / size * (double)n;
        CHECK(fabs(bytes - least) <= 1e-12 * least, "bytes %g, a ring sends %g", bytes, least);
        CHECK(seconds >= 0, "seconds %g", seconds);
        sel_reducer_wire(reducer, &bytes, &seconds);
        CHECK(bytes <= 0 && seconds <= 0, "a second question: %g bytes, %g s", bytes, seconds);
        sel_reducer_free(&reducer);
        free(x);
    }

    sel_mesh wrong = {.data = size + 1, .sequence = 1};
    sel_reducer *reducer;
    CHECK(sel_reducer_new(&reducer, comm, &wrong, NULL, 0) == SEL_ECOMM && !reducer, "a mesh of another size");
}

/* Real numbers: the same bits on all ranks and every time, however the ranks arrive, and near the sum in double. */
static void test_sum_real(void)
{
    static const int64_t lengths[] = {3, 257, 5000, 300001};

    for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
        const int64_t n = lengths[k];
        float *x = need((size_t)n * sizeof *x);
        uint64_t first = 0;

        for (int trial = 0; trial < 4; trial++) {
            for (int64_t i = 0; i < n; i++) x[i] = (float)(sel_rng_uniform(9, (uint64_t)rank, (uint64_t)i) - 0.5);
            const struct timespec late = {.tv_nsec = (rank * 7 + trial * 5) % 4 * 3000000L};
            nanosleep(&late, NULL);
            sel_comm_sum_floats(comm, x, n);
            const uint64_t h = hash(x, (size_t)n * sizeof *x);
            CHECK(sel_comm_same(comm, h), "%lld floats: sums differ between ranks", (long long)n);
            if (trial == 0) first = h;
            CHECK(h == first, "%lld floats: trial %d differs", (long long)n, trial);
        }
        for (int64_t i = 0; i < n; i++) {
            double sum = 0, absolute = 0;
            for (int r = 0; r < size; r++) {
                const double term = (float)(sel_rng_uniform(9, (uint64_t)r, (uint64_t)i) - 0.5);
                sum += term;
                absolute += fabs(term);
            }
            /* size - 1 additions, each rounds a partial sum of at most `absolute` */
            const double bound = (size - 1) * 0x1p-24 * absolute;
            if (fabs(x[i] - sum) > bound) CHECK(0, "float %lld: %.9g, should be %.9g", (long long)i, (double)x[i], sum);
        }
        free(x);
    }
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
    test_sum_exact();
    test_sum_real();
    sel_comm_barrier(comm);

    const int verdict = check_verdict();
    sel_comm_close(&comm);
    CHECK(comm == NULL, "closed");
    sel_comm_close(&comm);
    return verdict;
}
