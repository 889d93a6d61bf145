/* mpi_reduce.c: the reducer at 1 to 4 ranks: one host, several (SELECTRA_HOSTS), none that lends shared memory. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/rng.h"
#include "dist/comm.h"
#include "dist/reduce.h"
#include "dist/tree.h"
#include "tests/check.h"

static sel_comm *comm;
static int rank, size;

static float term(int r, int64_t i)
{
    return (float)((sel_rng_uniform(9, (uint64_t)r, (uint64_t)i) - 0.5) * exp((double)(i % 23) - 11));
}

/* Neighbours are added, level by level; the odd one waits: the tree of dist/tree.h. */
static float tree(float *x, int n)
{
    for (; n > 1; n = (n + 1) / 2)
        for (int i = 0; i < n; i += 2) x[i / 2] = i + 1 < n ? x[i] + x[i + 1] : x[i];
    return x[0];
}

/* What the sum must be: over the ranks, or over hosts of sums over their ranks, to the bit. */
static float expected(int64_t i, bool by_host)
{
    float hosts[8], ranks[8];
    int n_hosts = 0;

    if (!by_host) {
        for (int r = 0; r < size; r++) ranks[r] = term(r, i);
        return tree(ranks, size);
    }
    const char *text = getenv("SELECTRA_HOSTS");
    char all[16];
    snprintf(all, sizeof all, "%d", size);
    if (!text || !*text) text = all;
    for (int first = 0; first < size;) {
        char *end;
        const int n = (int)strtol(text, &end, 10);
        for (int r = 0; r < n; r++) ranks[r] = term(first + r, i);
        hosts[n_hosts++] = tree(ranks, n);
        first += n;
        text = end + 1;
    }
    return tree(hosts, n_hosts);
}

static void late(int trial)
{
    const struct timespec t = {.tv_nsec = (rank * 7 + trial * 5) % 4 * 2000000L};
    nanosleep(&t, NULL);
}

static void fill(float *grads, int64_t begin, int64_t end)
{
    for (int64_t i = begin; i < end; i++) grads[i] = term(rank, i);
}

/* Two rounds of steps with stretches that fit no bucket; ranks come late in turn. */
static void test_sums(int64_t n, const sel_reducer_options *options)
{
    sel_reducer_options o = *options;
    sel_reducer *r;
    o.n = n;

    CHECK_OK(sel_reducer_new(&r, comm, &o));
    float *const grads = sel_reducer_grads(r);
    const bool windowless = sel_reducer_note(r)[0] != '\0';
    CHECK(windowless == (o.no_window && size > sel_comm_hosts(comm)), "note: %s", sel_reducer_note(r));

    for (int trial = 0; trial < 4; trial++) {
        for (int64_t end = n; end > 0;) {
            const int64_t begin = end > 7001 ? end - 7001 : 0;
            fill(grads, begin, end);
            if (trial == 3 && begin % 3 == 0) late(trial);
            if (trial != 1) sel_reducer_ready(r, begin);
            sel_reducer_poll(r);
            end = begin;
        }
        late(trial);
        int64_t wrong = 0, seen = 0;
        for (int64_t j = 0; o.no_overlap && j < n; j++) wrong += fabsf(grads[j] - term(rank, j)) > 0;
        CHECK(wrong == 0, "%lld floats, trial %d: %lld moved before all was there", (long long)n, trial,
              (long long)wrong);
        sel_reducer_finish(r);
        for (int i = 0; i < sel_reducer_pieces(r); i++) {
            int64_t begin, end;
            sel_reducer_piece(r, i, &begin, &end);
            seen += end - begin;
            for (int64_t j = begin; j < end; j++) {
                const float sum = expected(j, !windowless);
                const double bound = 3 * 0x1p-9 * (fabsf(sum) + size * 0.5 * exp((double)(j % 23) - 11));
                if (o.bfloat16)
                    wrong += !(fabs((double)grads[j] - (double)sum) <= bound);
                else
                    wrong += memcmp(&grads[j], &sum, sizeof sum) != 0;
            }
        }
        CHECK(wrong == 0, "%lld floats, trial %d: %lld sums are wrong", (long long)n, trial, (long long)wrong);
        double all = (double)seen;
        sel_comm_sum_doubles(comm, &all, 1);
        CHECK((int64_t)all == (o.zero ? n : n * size), "the ranks own %g of %lld", all, (long long)n);
        if (!o.zero) {
            uint64_t h = 0;
            for (int64_t j = 0; j < n; j++) {
                uint32_t u;
                memcpy(&u, &grads[j], sizeof u);
                h = h * 1099511628211u + u;
            }
            CHECK(sel_comm_same(comm, h), "the ranks' sums differ");
        }

        float *const params = sel_reducer_params(r);
        CHECK(!params == !o.zero, "parameters");
        for (int i = 0; params && i < sel_reducer_pieces(r); i++) {
            int64_t begin, end;
            sel_reducer_piece(r, i, &begin, &end);
            for (int64_t j = begin; j < end; j++) params[j] = (float)(j * (trial + 1) % 10007);
            late(i);
            if (trial != 2 || i % 2) sel_reducer_updated(r, i);
        }
        sel_reducer_gather(r);
        wrong = 0;
        for (int64_t j = 0; params && j < n; j++) wrong += params[j] < (float)(j * (trial + 1) % 10007) ||
                                                         params[j] > (float)(j * (trial + 1) % 10007);
        CHECK(wrong == 0, "%lld floats, trial %d: %lld parameters are wrong", (long long)n, trial, (long long)wrong);
        sel_comm_barrier(comm);   /* else a rank would write its parameters while another checks them */
    }

    /* Bytes between hosts: 2 (h - 1) of the array, no more. */
    sel_wire w;
    sel_reducer_wire(r, &w);
    double sums[3] = {w.wire_bytes, w.wire_least, w.host_bytes};
    sel_comm_sum_doubles(comm, sums, 3);
    const int hosts = windowless ? size : sel_comm_hosts(comm), there = o.bfloat16 ? 2 : 4, back = o.zero ? 4 : there;
    const double want = 4.0 * (hosts - 1) * (double)n * (there + back);
    CHECK(fabs(sums[0] - want) <= 1e-9 * want && fabs(sums[1] - want) <= 1e-9 * want,
          "%g bytes between hosts, least %g, by the formula %g", sums[0], sums[1], want);
    if (windowless || size == sel_comm_hosts(comm)) CHECK(sums[2] <= 0, "%g bytes in shared memory", sums[2]);
    if (!windowless && hosts == 1)
        CHECK(fabs(sums[2] - 4.0 * 8.0 * (size - 1) * (double)n) <= 1e-9 * sums[2], "%g bytes in a host", sums[2]);
    CHECK(w.wait_seconds >= 0 && w.busy_seconds >= w.wait_seconds, "waited %g of %g s", w.wait_seconds, w.busy_seconds);
    sel_reducer_wire(r, &w);
    CHECK(w.wire_bytes <= 0 && w.busy_seconds <= 0, "a second question");
    sel_reducer_free(&r);
    CHECK(r == NULL, "freed");
}

static void test_rounding(void)
{
    static const struct { uint32_t in; uint16_t out; } cases[] = {
        {0x3f800000, 0x3f80}, {0x3f808000, 0x3f80}, {0x3f818000, 0x3f82}, {0x3f808001, 0x3f81}, {0x7f7fffff, 0x7f80},
        {0xff800000, 0xff80}, {0x7f800001, 0x7fc0}, {0x80000001, 0x8000}, {0xffffffff, 0xffff},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float x, y;
        uint16_t b;
        uint32_t u;
        memcpy(&x, &cases[i].in, sizeof x);
        sel_to_bfloat16(&b, &x, 1, 1);
        CHECK(b == cases[i].out, "%08x becomes %04x", cases[i].in, b);
        sel_from_bfloat16(&y, &b, 1, 1);
        memcpy(&u, &y, sizeof u);
        CHECK(u == (uint32_t)cases[i].out << 16, "%04x becomes %08x", b, u);
    }
}

/* The tree in one process, any number of arrays, in place and not, on one and two threads. */
static void test_tree(void)
{
    enum { MOST = 19, N = 40001 };
    static float in[MOST][N], out[2][N];
    const float *ins[MOST];
    float *outs[2] = {out[0], out[1]};

    for (int a = 0; a < MOST; a++) {
        ins[a] = in[a];
        for (int i = 0; i < N; i++) in[a][i] = term(a, i);
    }
    for (int n = 1; n <= MOST; n++) {
        int wrong = 0;
        sel_tree_sum(outs, 2, ins, n, N - n, 1 + n % 2);
        for (int i = 0; i < N - n; i++) {
            float x[MOST];
            for (int a = 0; a < n; a++) x[a] = in[a][i];
            const float sum = tree(x, n);
            wrong += memcmp(&sum, &out[0][i], sizeof sum) || memcmp(&sum, &out[1][i], sizeof sum);
        }
        CHECK(wrong == 0, "%d arrays: %d sums are wrong", n, wrong);
    }
    memcpy(out[0], in[0], sizeof out[0]);
    const float *two[] = {out[0], in[1]};
    sel_tree_sum(outs, 1, two, 2, N, 2);
    int wrong = 0;
    for (int i = 0; i < N; i++) wrong += fabsf(out[0][i] - (in[0][i] + in[1][i])) > 0;
    CHECK(wrong == 0, "in place: %d sums are wrong", wrong);
}

int main(int argc, char **argv)
{
    static const int64_t lengths[] = {0, 1, 4096, 30011, 140003};

    if (sel_comm_open(&comm, &argc, &argv) != SEL_OK) {
        fprintf(stderr, "%s\n", sel_error());
        return EXIT_FAILURE;
    }
    rank = sel_comm_rank(comm);
    size = sel_comm_size(comm);
    if (rank == 0) {
        test_rounding();
        test_tree();
    }
    for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++)
        for (int way = 0; way < 8; way++)
            for (int small = 0; small < 2; small++) {
                const sel_reducer_options o = {.zero = way & 1, .no_window = way & 2, .bfloat16 = way & 4, .threads = 1,
                                               .bucket_floats = small ? 8192 : 0};
                test_sums(lengths[k], &o);
                if (lengths[k] != 30011) continue;
                sel_reducer_options late_ones = o;
                late_ones.no_overlap = true;
                test_sums(lengths[k], &late_ones);
            }

    const int verdict = check_verdict();
    sel_comm_close(&comm);
    return verdict;
}
