/* mpi_host.c: windows of shared memory and the counters in them, at 1 to 4 ranks. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dist/comm.h"
#include "dist/host.h"
#include "tests/check.h"

static sel_comm *comm;
static int rank, size;

/* Every rank reads what every other wrote; parts are zeroed, aligned and do not touch. */
static void test_window(void)
{
    static const size_t lengths[] = {0, 1, 64, 4099, (size_t)5 << 20};

    for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++) {
        const size_t n = lengths[k];
        sel_host_window *w;
        size_t wrong = 0;

        CHECK_OK(sel_host_window_new(&w, comm, comm, n, "the test"));
        unsigned char *mine = sel_host_window_part(w, rank);
        CHECK((uintptr_t)mine % 64 == 0, "part at %p", (void *)mine);
        for (size_t i = 0; i < n; i++) wrong += mine[i] != 0;
        CHECK(wrong == 0, "%zu of %zu bytes are not zero", wrong, n);
        memset(mine, rank + 1, n);
        sel_host_barrier(comm);
        for (int r = 0; r < size; r++) {
            const unsigned char *part = sel_host_window_part(w, r);
            for (size_t i = 0; i < n; i++) wrong += part[i] != r + 1;
        }
        CHECK(wrong == 0, "%zu wrong bytes in parts of %zu", wrong, n);
        sel_host_barrier(comm);
        sel_host_window_free(&w);
        CHECK(w == NULL, "freed");
    }
}

/* Ranks of even and of odd numbers, each with a window of their own. */
static void test_groups(void)
{
    sel_comm *group;
    sel_host_window *w;
    int wrong = 0;

    sel_comm_split(&group, comm, rank % 2);
    CHECK_OK(sel_host_window_new(&w, comm, group, sizeof(int), "a group"));
    *(int *)sel_host_window_part(w, sel_comm_host_rank(group)) = rank;
    sel_host_barrier(group);
    for (int r = 0; r < sel_comm_size(group); r++) wrong += *(int *)sel_host_window_part(w, r) != 2 * r + rank % 2;
    CHECK(wrong == 0, "%d parts are of other ranks", wrong);
    sel_host_barrier(group);
    sel_host_window_free(&w);

    const size_t bytes = rank == size - 1 ? (size_t)1 << 44 : 1; /* one group's alone are too large */
    CHECK(sel_host_window_new(&w, comm, group, bytes, "a giant") == SEL_ENOMEM && !w, "16 TiB of a rank");
    sel_comm_close(&group);
}

/* More than the host has: all ranks are told, with the size, and nobody dies of it. */
static void test_too_much(void)
{
    sel_host_window *w;

    CHECK(sel_host_window_new(&w, comm, comm, (size_t)1 << 44, "a giant") == SEL_ENOMEM && !w, "16 TiB a rank");
    CHECK(strstr(sel_error(), "a giant") && strstr(sel_error(), "/dev/shm has"), "%s", sel_error());
    CHECK_OK(sel_host_window_new(&w, comm, comm, 100, "a small one"));
    sel_host_window_free(&w);
}

/* A ball goes round the ranks; each of them is late now and then, so that the others sleep. */
static void test_counters(void)
{
    enum { ROUNDS = 300 };
    sel_host_window *w;

    CHECK_OK(sel_host_window_new(&w, comm, comm, sizeof(sel_host_count) + sizeof(int), "the counters"));
    for (uint32_t turn = 1; turn <= ROUNDS; turn++) {
        sel_host_count *const mine = sel_host_window_part(w, rank),
                              *const before = sel_host_window_part(w, (rank + size - 1) % size);
        const uint32_t want = rank == 0 ? turn - 1 : turn;
        const int *const ball = (const int *)(before + 1);

        for (sel_host_waiter wait = {0}; !sel_host_reached(before, want);)
            sel_host_pause(comm, &wait, before, want, turn % 2 != 0);
        if (size > 1) CHECK(*ball == (int)want, "turn %u: the ball says %d", turn, *ball);
        if (turn % 100 == 0 && rank == (int)(turn / 100) % size) {
            const struct timespec late = {.tv_nsec = 30000000};
            nanosleep(&late, NULL);
        }
        *(int *)(mine + 1) = (int)turn;
        sel_host_post(mine, turn);
    }
    sel_host_barrier(comm);
    sel_host_window_free(&w);

    sel_host_count c = {.value = 5};
    CHECK(sel_host_reached(&c, 5) && sel_host_reached(&c, UINT32_MAX - 3) && !sel_host_reached(&c, 6), "wrap");
}

int main(int argc, char **argv)
{
    if (sel_comm_open(&comm, &argc, &argv) != SEL_OK) {
        fprintf(stderr, "%s\n", sel_error());
        return EXIT_FAILURE;
    }
    rank = sel_comm_rank(comm);
    size = sel_comm_size(comm);
    CHECK(sel_comm_host_index(comm) == 0, "host %d", sel_comm_host_index(comm));
    test_window();
    test_groups();
    test_too_much();
    test_counters();

    const int verdict = check_verdict();
    sel_comm_close(&comm);
    return verdict;
}
