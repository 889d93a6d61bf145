/* comm.c: the world of ranks over MPI.
 *
 * MPI counts with int, so everything that can be large goes in chunks.
 */
#include "dist/comm.h"

#include <mpi.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/mem.h"
#include "core/base/pulse.h"
#include "dist/comm_mpi.h"
#include "dist/tree.h"

#define CHUNK_BYTES ((size_t)64 << 20)
#define FOLD_BLOCK 64 /* doubles a rank that are folded at once: the statistics of a step fit in one */

_Noreturn void sel_comm_mpi_die(const sel_comm *c, const char *call, int code)
{
    char text[MPI_MAX_ERROR_STRING] = "unknown MPI error";
    int length;

    MPI_Error_string(code, text, &length);
    sel_fail(SEL_ECOMM, "%.200s", text);
    sel_comm_die(c, call);
}

/* A collective begins; sel_pulse_leave() when it has ended.  Debug builds: ranks that meet in different collectives, or
   bring different sizes, would hang or mix up their data.  They compare what they are about to do first, and say where
   they differ. */
static void meet(const sel_comm *c, const char *call, uint64_t detail)
{
    sel_pulse_enter(call + sizeof "sel_comm_" - 1);
#ifdef NDEBUG
    (void)c, (void)detail;
#else
    enum { WIDTH = FOLD_BLOCK * sizeof(double) };
    char mine[WIDTH] = "";
    char *all = (char *)c->all;

    snprintf(mine, sizeof mine, "%s (%llu)", call, (unsigned long long)detail);
    CK(c, MPI_Allgather(mine, WIDTH, MPI_CHAR, all, WIDTH, MPI_CHAR, c->world));
    for (int r = 0; r < c->size; r++) {
        if (strcmp(all + (size_t)r * WIDTH, all) != 0) {
            sel_fail(SEL_ECOMM, "rank 0 is in %.80s while rank %d is in %.80s", all, r, all + (size_t)r * WIDTH);
            sel_comm_die(c, call);
        }
    }
#endif
}

/* For tests: SELECTRA_HOSTS="2,1" makes hosts of the first two ranks and of the third.  The host of `rank`, -1 without
   that wish. */
static int pretended_host(int rank, int size)
{
    const char *text = getenv("SELECTRA_HOSTS");
    int host = -1, sum = 0;

    if (!text || !*text) return -1;
    for (int i = 0;; i++, text++) {
        char *end;
        const long n = strtol(text, &end, 10);
        if (end == text || n < 1 || n > size - sum || (*end && *end != ',')) break;
        if (rank >= sum && rank < sum + n) host = i;
        sum += (int)n;
        text = end;
        if (!*end && sum == size) return host;
        if (!*end) break;
    }
    sel_fail(SEL_EUSER, "SELECTRA_HOSTS: %s: expected the ranks of each host, %d in all, with commas",
             getenv("SELECTRA_HOSTS"), size);
    sel_comm_die(NULL, "start");
}

/* The ranks of this host. */
static void split_host(MPI_Comm of, MPI_Comm *host)
{
    int rank, size;

    CK(NULL, MPI_Comm_rank(of, &rank));
    CK(NULL, MPI_Comm_size(of, &size));
    const int pretended = pretended_host(rank, size);
    if (pretended >= 0)
        CK(NULL, MPI_Comm_split(of, pretended, rank, host));
    else
        CK(NULL, MPI_Comm_split_type(of, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, host));
}

/* The ranks, a host's together: hosts by their lowest rank, in a host as MPI has them.  Rank 0 stays rank 0. */
static MPI_Comm host_by_host(void)
{
    MPI_Comm host, world;
    int first;

    CK(NULL, MPI_Comm_rank(MPI_COMM_WORLD, &first));
    split_host(MPI_COMM_WORLD, &host);
    CK(NULL, MPI_Bcast(&first, 1, MPI_INT, 0, host));
    CK(NULL, MPI_Comm_free(&host));
    CK(NULL, MPI_Comm_split(MPI_COMM_WORLD, 0, first, &world));
    return world;
}

/* Who is where, in a world in which a host's ranks are neighbours; `host`: the ranks of this host in it. */
static void know_places(sel_comm *c, MPI_Comm world, MPI_Comm host)
{
    c->world = world;
    c->host = host;
    CK(NULL, MPI_Comm_set_errhandler(c->world, MPI_ERRORS_RETURN));
    CK(NULL, MPI_Comm_rank(c->world, &c->rank));
    CK(NULL, MPI_Comm_size(c->world, &c->size));

    CK(c, MPI_Comm_set_errhandler(c->host, MPI_ERRORS_RETURN));
    CK(c, MPI_Comm_rank(c->host, &c->host_rank));
    CK(c, MPI_Comm_size(c->host, &c->host_size));
    const int begins = c->host_rank == 0;
    CK(c, MPI_Allreduce(&begins, &c->hosts, 1, MPI_INT, MPI_SUM, c->world));
    CK(c, MPI_Scan(&begins, &c->host_index, 1, MPI_INT, MPI_SUM, c->world));
    c->host_index--;
    CK(c, MPI_Allreduce(&c->host_size, &c->host_least, 1, MPI_INT, MPI_MIN, c->world));
}

/* The processes of this host, and whether each may have a core of its own. */
static void know_neighbours(sel_comm *c)
{
    struct neighbour {
        long pid;
        unsigned long long pids; /* the name space that the pid is of */
        cpu_set_t cpus;
    } mine, *all = calloc((size_t)c->host_size, sizeof *all);
    struct stat s;
    bool alike = true;
    cpu_set_t cpus;

    c->pids = calloc((size_t)c->host_size, sizeof *c->pids);
    if (!all || !c->pids) {
        sel_fail(SEL_ENOMEM, "out of memory");
        sel_comm_die(c, "sel_comm_open");
    }
    memset(&mine, 0, sizeof mine);
    mine.pid = getpid();
    mine.pids = stat("/proc/self/ns/pid", &s) == 0 ? s.st_ino : (unsigned long long)getpid();
    if (sched_getaffinity(0, sizeof mine.cpus, &mine.cpus) != 0) CPU_SET(0, &mine.cpus);
    CK(c, MPI_Allgather(&mine, sizeof mine, MPI_BYTE, all, sizeof mine, MPI_BYTE, c->host));
    CPU_ZERO(&cpus);
    for (int r = 0; r < c->host_size; r++) {
        c->pids[r] = (pid_t)all[r].pid;
        alike = alike && all[r].pids == mine.pids;
        CPU_OR(&cpus, &cpus, &all[r].cpus);
    }
    c->crowded = CPU_COUNT(&cpus) < c->host_size;
    if (!alike) { /* containers: these numbers say nothing here */
        free(c->pids);
        c->pids = NULL;
    }
    free(all);
}

sel_status sel_comm_open(sel_comm **out, int *argc, char ***argv)
{
    int level;

    *out = NULL;
    CK(NULL, MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &level));
    if (level < MPI_THREAD_FUNNELED) {
        MPI_Finalize();
        return sel_fail(SEL_ECOMM, "this MPI library does not work with threads (level %d, needs FUNNELED): %s", level,
                        sel_comm_library());
    }

    /* From here on a rank that fails alone cannot return: the others would wait for it. */
    sel_comm *c = calloc(1, sizeof *c);
    if (!c) {
        sel_fail(SEL_ENOMEM, "out of memory");
        sel_comm_die(NULL, "sel_comm_open");
    }
    const MPI_Comm world = host_by_host();
    MPI_Comm host;
    split_host(world, &host);
    know_places(c, world, host);
    c->is_world = true;
    c->all = sel_alloc((size_t)c->size * FOLD_BLOCK * sizeof *c->all, "the communicator");
    if (!c->all) sel_comm_die(c, "sel_comm_open");
    know_neighbours(c);

    *out = c;
    return SEL_OK;
}

void sel_comm_split(sel_comm **out, sel_comm *c, int part)
{
    sel_comm *s = calloc(1, sizeof *s);
    MPI_Comm world, host;

    meet(c, __func__, 0);
    if (!s) {
        sel_fail(SEL_ENOMEM, "out of memory");
        sel_comm_die(c, __func__);
    }
    CK(c, MPI_Comm_split(c->world, part, c->rank, &world));
    CK(c, MPI_Comm_split(c->host, part, c->rank, &host));
    know_places(s, world, host);
    s->all = sel_alloc((size_t)s->size * FOLD_BLOCK * sizeof *s->all, "the communicator");
    if (!s->all) sel_comm_die(c, __func__);
    know_neighbours(s);
    s->crowded = s->crowded || c->crowded;   /* by ranks of other parts, too */
    *out = s;
    sel_pulse_leave();
}

void sel_comm_close(sel_comm **c)
{
    int over;

    if (!*c) return;
    MPI_Finalized(&over);
    if (!over) {
        CK(*c, MPI_Comm_free(&(*c)->host));
        CK(*c, MPI_Comm_free(&(*c)->world));
        if ((*c)->is_world) CK(*c, MPI_Finalize());
    }
    sel_free((*c)->all);
    free((*c)->pids);
    free(*c);
    *c = NULL;
}

int sel_comm_rank(const sel_comm *c)
{
    return c->rank;
}

int sel_comm_size(const sel_comm *c)
{
    return c->size;
}

int sel_comm_host_rank(const sel_comm *c)
{
    return c->host_rank;
}

int sel_comm_host_size(const sel_comm *c)
{
    return c->host_size;
}

int sel_comm_hosts(const sel_comm *c)
{
    return c->hosts;
}

int sel_comm_host_least(const sel_comm *c)
{
    return c->host_least;
}

int sel_comm_host_index(const sel_comm *c)
{
    return c->host_index;
}

const char *sel_comm_library(void)
{
    static char text[MPI_MAX_LIBRARY_VERSION_STRING + 1];
    int length;

    MPI_Get_library_version(text, &length);
    text[strcspn(text, "\r\n")] = '\0';
    return text;
}

/* "rank 3: " stands before the line already: it has been agreed on once. */
static bool names_rank(const char *line)
{
    int rank, length = 0;

    return sscanf(line, "rank %d: %n", &rank, &length) == 1 && length > 0;
}

sel_status sel_comm_agree(sel_comm *c, sel_status mine)
{
    struct {
        int code, rank;
    } in = {(int)mine, c->rank}, worst;
    char line[1024] = "";

    meet(c, __func__, 0);
    /* MINLOC: the lowest code wins, among equals the lowest rank. */
    CK(c, MPI_Allreduce(&in, &worst, 1, MPI_2INT, MPI_MINLOC, c->world));
    if (worst.code != SEL_OK) {
        if (c->rank == worst.rank) snprintf(line, sizeof line, "%s", sel_error());
        CK(c, MPI_Bcast(line, sizeof line, MPI_CHAR, worst.rank, c->world));
    }
    sel_pulse_leave();
    if (worst.code == SEL_OK) return SEL_OK;
    if (c->size == 1 || names_rank(line)) return sel_fail((sel_status)worst.code, "%s", line);
    return sel_fail((sel_status)worst.code, "rank %d: %s", worst.rank, line);
}

_Noreturn void sel_comm_die(const sel_comm *c, const char *where)
{
    int up, over, rank = -1;

    MPI_Initialized(&up);
    MPI_Finalized(&over);
    if (c)
        rank = c->rank;
    else if (up && !over)
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    fprintf(stderr, "[rank %d] fatal in %s: %s\n", rank, where, sel_error());
    fflush(stderr);
    sel_comm_abort(EXIT_FAILURE);
}

static int abort_status;

static void abort_alone(int number)
{
    (void)number;
    _exit(abort_status);
}

_Noreturn void sel_comm_abort(int status)
{
    int up, over;

    MPI_Initialized(&up);
    MPI_Finalized(&over);
    if (up && !over) {
        abort_status = status;
        signal(SIGALRM, abort_alone);
        alarm(3); /* MPI_Abort asks the launcher to end the others, and may wait for an answer that never comes */
        MPI_Abort(MPI_COMM_WORLD, status);
    }
    _exit(status);
}

void sel_comm_barrier(sel_comm *c)
{
    meet(c, __func__, 0);
    CK(c, MPI_Barrier(c->world));
    sel_pulse_leave();
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

void sel_comm_bcast(sel_comm *c, void *data, size_t bytes, int root)
{
    SEL_ASSERT(root >= 0 && root < c->size);
    meet(c, __func__, bytes);
    for (size_t at = 0; at < bytes; at += CHUNK_BYTES)
        CK(c, MPI_Bcast((char *)data + at, (int)smaller(CHUNK_BYTES, bytes - at), MPI_BYTE, root, c->world));
    sel_pulse_leave();
}

/* The larger one, NaN as soon as one is: MPI_MAX leaves open what becomes of NaN. */
static double larger(double a, double b)
{
    return a != a || a > b ? a : b;
}

static double max_of(const double *x, int n, int stride)
{
    double most = x[0];
    for (int r = 1; r < n; r++) most = larger(most, x[(int64_t)r * stride]);
    return most;
}

/* x[i] = op over the ranks' x[i].  Every rank folds the same numbers in the same order, so that the result has the same
   bits on all ranks, whatever algorithm the MPI library picks. */
static void fold(sel_comm *c, double *x, int n, double (*op)(const double *x, int n, int stride))
{
    for (int at = 0; at < n; at += FOLD_BLOCK) {
        const int m = n - at < FOLD_BLOCK ? n - at : FOLD_BLOCK;
        CK(c, MPI_Allgather(x + at, m, MPI_DOUBLE, c->all, m, MPI_DOUBLE, c->world));
        for (int i = 0; i < m; i++) x[at + i] = op(c->all + i, c->size, m);
    }
}

void sel_comm_sum_doubles(sel_comm *c, double *x, int n)
{
    meet(c, __func__, (uint64_t)n);
    fold(c, x, n, sel_tree_sum_doubles);
    sel_pulse_leave();
}

void sel_comm_max_doubles(sel_comm *c, double *x, int n)
{
    meet(c, __func__, (uint64_t)n);
    fold(c, x, n, max_of);
    sel_pulse_leave();
}

void sel_comm_merge_doubles(sel_comm *c, double *x, int64_t n)
{
    const int64_t chunk = (int64_t)(CHUNK_BYTES / sizeof(double));

    meet(c, __func__, (uint64_t)n);
    for (int64_t at = 0; at < n; at += chunk)
        CK(c, MPI_Allreduce(MPI_IN_PLACE, x + at, (int)(n - at < chunk ? n - at : chunk), MPI_DOUBLE, MPI_SUM,
                            c->world));
    sel_pulse_leave();
}

void sel_comm_sum_floats(sel_comm *c, float *x, int64_t n)
{
    const int64_t chunk = INT32_MAX / 2;

    meet(c, __func__, (uint64_t)n);
    for (int64_t at = 0; at < n; at += chunk)
        CK(c, MPI_Allreduce(MPI_IN_PLACE, x + at, (int)(n - at < chunk ? n - at : chunk), MPI_FLOAT, MPI_SUM,
                            c->world));
    sel_pulse_leave();
}

void sel_comm_scatter_floats(sel_comm *c, const float *x, float *out, int64_t n)
{
    meet(c, __func__, (uint64_t)n);
    SEL_ASSERT(n % c->size == 0 && n <= INT32_MAX);
    CK(c, MPI_Reduce_scatter_block(x, out, (int)(n / c->size), MPI_FLOAT, MPI_SUM, c->world));
    sel_pulse_leave();
}

void sel_comm_gather_floats(sel_comm *c, const float *in, float *out, int64_t n)
{
    const int each = (int)(n / c->size);

    meet(c, __func__, (uint64_t)n);
    SEL_ASSERT(n % c->size == 0 && n <= INT32_MAX);
    CK(c, MPI_Allgather(in, each, MPI_FLOAT, out, each, MPI_FLOAT, c->world));
    sel_pulse_leave();
}

void sel_comm_join_floats(sel_comm *c, const float *mine, int64_t begin, int64_t end, float *all, int64_t most,
                          int64_t *first, int64_t *last)
{
    const size_t size = (size_t)c->size;
    const int64_t range[2] = {begin, end};
    int64_t *const ranges = calloc(size, sizeof range);
    int *const counts = calloc(2 * size, sizeof *counts), *const at = counts ? counts + size : NULL;

    meet(c, __func__, (uint64_t)most);
    if (!ranges || !counts) {
        sel_fail(SEL_ENOMEM, "out of memory for the ranges of %d ranks", c->size);
        sel_comm_die(c, __func__);
    }
    CK(c, MPI_Allgather(range, 2, MPI_INT64_T, ranges, 2, MPI_INT64_T, c->world));
    *first = INT64_MAX;
    *last = 0;
    for (size_t r = 0; r < size; r++) {
        if (ranges[2 * r] == ranges[2 * r + 1]) continue;
        if (ranges[2 * r] < *first) *first = ranges[2 * r];
        if (ranges[2 * r + 1] > *last) *last = ranges[2 * r + 1];
    }
    if (*first > *last) *first = *last;
    SEL_ASSERT(*last - *first <= most && most <= INT32_MAX);
    for (size_t r = 0; r < size; r++) {
        counts[r] = (int)(ranges[2 * r + 1] - ranges[2 * r]);
        at[r] = counts[r] ? (int)(ranges[2 * r] - *first) : 0;
    }
    CK(c, MPI_Allgatherv(mine, (int)(end - begin), MPI_FLOAT, all, counts, at, MPI_FLOAT, c->world));
    free(ranges);
    free(counts);
    sel_pulse_leave();
}

void sel_comm_gather(sel_comm *c, const void *mine, size_t bytes, void *all, int root)
{
    SEL_ASSERT(root >= 0 && root < c->size);
    meet(c, __func__, bytes);
    for (size_t at = 0; at < bytes; at += CHUNK_BYTES) {
        const int n = (int)smaller(CHUNK_BYTES, bytes - at);
        MPI_Datatype piece, slot; /* n bytes, the next rank's `bytes` further on */

        CK(c, MPI_Type_contiguous(n, MPI_BYTE, &piece));
        CK(c, MPI_Type_create_resized(piece, 0, (MPI_Aint)bytes, &slot));
        CK(c, MPI_Type_commit(&slot));
        CK(c, MPI_Gather((const char *)mine + at, n, MPI_BYTE, all ? (char *)all + at : NULL, 1, slot, root, c->world));
        CK(c, MPI_Type_free(&slot));
        CK(c, MPI_Type_free(&piece));
    }
    sel_pulse_leave();
}

int sel_comm_same(sel_comm *c, uint64_t value)
{
    uint64_t low[2] = {value, ~value}; /* the least complement is that of the greatest */

    meet(c, __func__, 0);
    CK(c, MPI_Allreduce(MPI_IN_PLACE, low, 2, MPI_UINT64_T, MPI_MIN, c->world));
    sel_pulse_leave();
    return low[0] == ~low[1];
}
