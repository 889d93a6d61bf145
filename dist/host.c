/* host.c: windows of MPI_Win_allocate_shared, and waiting for a neighbour without burning a core that it needs. */
#include "dist/host.h"

#include <mpi.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/base/pulse.h"
#include "dist/comm_mpi.h"

#define ALIGNMENT ((size_t)64)
#define SHARED_DIR "/dev/shm" /* where MPI libraries keep shared memory on Linux */

struct sel_host_window {
    sel_comm *group; /* not owned */
    MPI_Win win;
    void **parts;   /* [host_size] */
};

/* Whether the host lends `bytes` bytes.  Asked before MPI is: a library that runs out of it on one rank may leave the
   others waiting, and memory that was promised and is not there ends a process at its first touch (SIGBUS). */
static sel_status room(size_t bytes, const char *what)
{
    struct statvfs s;

    if (statvfs(SHARED_DIR, &s) != 0)
        return sel_fail(SEL_EIO, "%s: no shared memory on this host: %s: %s", what, SHARED_DIR, strerror(errno));
    const double free_bytes = (double)s.f_bavail * (double)s.f_frsize;
    if (free_bytes < (double)bytes + 0x1p20)
        return sel_fail(SEL_ENOMEM, "%s: %.1f MiB of shared memory are needed, %s has %.1f MiB", what,
                        (double)bytes / 0x1p20, SHARED_DIR, free_bytes / 0x1p20);
    return SEL_OK;
}

/* Makes the pages of this rank's part now, on its own memory node, and zeroes them.  The kernel does it: where it finds
   no page it returns an error, while a store would end in a signal. */
static sel_status populate(char *part, size_t bytes, const char *what)
{
    const int zeros = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    size_t at = 0;

    if (zeros < 0) return sel_fail(SEL_EIO, "%s: /dev/zero: %s", what, strerror(errno));
    while (at < bytes) {
        const ssize_t n = read(zeros, part + at, bytes - at);
        if (n > 0) at += (size_t)n;
        else if (n == 0 || errno != EINTR) break;
    }
    close(zeros);
    if (at == bytes) return SEL_OK;
    return sel_fail(SEL_ENOMEM, "%s: the host gives only %.1f of the %.1f MiB of shared memory that it promised", what,
                    (double)at / 0x1p20, (double)bytes / 0x1p20);
}

static void *aligned(void *p)
{
    /* Mappings begin at pages on all ranks, so that all come to the same place in them. */
    return (void *)(((uintptr_t)p + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

sel_status sel_host_window_new(sel_host_window **out, sel_comm *c, sel_comm *group, size_t bytes, const char *what)
{
    const size_t part = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + ALIGNMENT;
    const size_t ranks = (size_t)group->host_size;
    sel_host_window *w = NULL;
    sel_status rc;
    void *mine;

    *out = NULL;
    uint64_t all = part;
    CK(c, MPI_Allreduce(MPI_IN_PLACE, &all, 1, MPI_UINT64_T, MPI_SUM, c->host));
    rc = c->host_rank == 0 ? room(all, what) : SEL_OK;
    if (rc == SEL_OK && !(w = calloc(1, sizeof *w))) rc = sel_fail(SEL_ENOMEM, "%s: out of memory", what);
    if (w && !(w->parts = calloc(ranks, sizeof *w->parts)))
        rc = sel_fail(SEL_ENOMEM, "%s: out of memory", what);
    if ((rc = sel_comm_agree(c, rc)) != SEL_OK) goto fail;

    w->group = group;
    /* A library that fails in it on one rank alone leaves the others there: the watchdog names it. */
    sel_pulse_enter("MPI_Win_allocate_shared");
    const int code = MPI_Win_allocate_shared((MPI_Aint)part, 1, MPI_INFO_NULL, group->host, &mine, &w->win);
    sel_pulse_leave();
    if (code != MPI_SUCCESS) {
        char text[MPI_MAX_ERROR_STRING] = "unknown MPI error";
        int length;
        MPI_Error_string(code, text, &length);
        w->win = MPI_WIN_NULL;
        rc = sel_fail(SEL_ENOMEM, "%s: MPI_Win_allocate_shared: %.200s", what, text);
    }
    if ((rc = sel_comm_agree(c, rc)) != SEL_OK) {
        w->win = MPI_WIN_NULL; /* not all have one, and to free it takes all */
        goto fail;
    }

    for (int r = 0; r < group->host_size; r++) {
        MPI_Aint size;
        int unit;
        CK(c, MPI_Win_shared_query(w->win, r, &size, &unit, &w->parts[r]));
        w->parts[r] = aligned(w->parts[r]);
    }
    CK(c, MPI_Win_lock_all(MPI_MODE_NOCHECK, w->win));
    rc = sel_comm_agree(c, populate(w->parts[group->host_rank], bytes, what));
    if (rc != SEL_OK) goto fail;
    *out = w;
    return SEL_OK;
fail:
    if (w && w->group && w->win != MPI_WIN_NULL) {
        sel_host_window_free(&w);
    } else if (w) {
        free(w->parts);
        free(w);
    }
    return rc;
}

void sel_host_window_free(sel_host_window **window)
{
    sel_host_window *w = *window;
    int over;

    if (!w) return;
    MPI_Finalized(&over);
    if (!over) {
        MPI_Win_unlock_all(w->win); /* fails harmlessly where the lock was never taken */
        CK(w->group, MPI_Win_free(&w->win));
    }
    free(w->parts);
    free(w);
    *window = NULL;
}

void *sel_host_window_part(const sel_host_window *w, int host_rank)
{
    SEL_ASSERT(host_rank >= 0 && host_rank < w->group->host_size);
    return w->parts[host_rank];
}

void sel_host_barrier(sel_comm *c)
{
    CK(c, MPI_Barrier(c->host));
}

/* ---- waiting */

_Static_assert(sizeof(sel_host_count) == 64, "a counter is one cache line");

static void futex(_Atomic uint32_t *word, int op, uint32_t value, const struct timespec *limit)
{
    /* Whatever it returns (woken, timed out, the value has changed meanwhile), the caller looks again. */
    syscall(SYS_futex, word, op, value, limit, NULL, 0);
}

void sel_host_post(sel_host_count *count, uint32_t value)
{
    /* Sequentially consistent, as is the sleeper's: either it sees the value or this sees that it sleeps. */
    atomic_store(&count->value, value);
    if (atomic_load(&count->sleepers)) futex(&count->value, FUTEX_WAKE, INT32_MAX, NULL);
}

/* A process that is no more, or a zombie that nobody has waited for. */
static bool is_dead(pid_t pid)
{
    char path[64], line[512];

    snprintf(path, sizeof path, "/proc/%ld/stat", (long)pid);
    FILE *f = fopen(path, "r");
    if (!f) return errno == ENOENT;
    const bool read = fgets(line, sizeof line, f) != NULL;
    fclose(f);
    if (!read) return true; /* it went while we looked */
    const char *const name_end = strrchr(line, ')');
    return name_end && (name_end[2] == 'Z' || name_end[2] == 'X');
}

static void look_for_dead(sel_comm *c, sel_host_waiter *w)
{
    enum { PATIENCE = 3 };   /* looks, a second apart */

    for (int r = 0; c->pids && r < c->host_size; r++) {
        if (!is_dead(c->pids[r])) continue;
        if (++w->dead < PATIENCE) return;
        sel_fail(SEL_ECOMM, "rank %d (process %ld on this host) has died", c->rank - c->host_rank + r,
                 (long)c->pids[r]);
        sel_comm_die(c, "waiting for the ranks of this host");
    }
    w->dead = 0;
}

void sel_host_pause(sel_comm *c, sel_host_waiter *w, sel_host_count *count, uint32_t value, int busy)
{
    enum { SPINS = 2000, YIELDS = 50 };

    w->rounds++;
    if (!c->crowded && w->rounds < SPINS) {
#if defined __x86_64__
        __builtin_ia32_pause();
#endif
        return;
    }
    if (w->rounds < SPINS + YIELDS) {
        if (w->rounds < SPINS) w->rounds = SPINS;
        sched_yield();
        return;
    }
    const struct timespec nap = { .tv_nsec = busy ? 100000 : 20000000 };
    const uint32_t seen = count ? atomic_load(&count->value) : 0;
    if (!count) {
        nanosleep(&nap, NULL);
    } else if ((int32_t)(seen - value) < 0) {
        atomic_fetch_add(&count->sleepers, 1);
        futex(&count->value, FUTEX_WAIT, seen, &nap);
        atomic_fetch_sub(&count->sleepers, 1);
    }

    const double now = sel_now();
    if (w->looked == 0.0) w->looked = now;
    if (now - w->looked >= 1.0) {
        look_for_dead(c, w);
        w->looked = now;
    }
}
