/* comm_mpi.h: what the sources in dist/ share about MPI.  Private to this room: include mpi.h first. */
#ifndef SEL_DIST_COMM_MPI_H
#define SEL_DIST_COMM_MPI_H

#ifndef MPI_VERSION
#error "include mpi.h before dist/comm_mpi.h"
#endif
#include <stdbool.h>
#include <sys/types.h>
#include "dist/comm.h"

struct sel_comm {
    MPI_Comm world;    /* our own: no message of ours meets a library's; a host's ranks are neighbours in it */
    MPI_Comm host;     /* the ranks of this host, in the same order */
    int rank, size;
    int host_rank, host_size, hosts;
    int host_index;    /* of this host, hosts being in the order of their ranks */
    int host_least;    /* ranks of the host that has fewest */
    bool is_world;     /* MPI ends with it */
    bool crowded;      /* this host has fewer cores for its ranks than ranks: who waits must not spin */
    pid_t *pids;       /* [host_size], owned; NULL where they mean nothing to each other (containers) */
    double *all;       /* [size][a block], owned: what the ranks bring to a fold */
};

/* An MPI call that fails is never recovered from, since other ranks may be inside it: it ends the job. */
_Noreturn void sel_comm_mpi_die(const sel_comm *c, const char *call, int code);

#define CK(c, call)                                                                                                    \
    do {                                                                                                               \
        const int ck_rc_ = (call);                                                                                     \
        if (ck_rc_ != MPI_SUCCESS) sel_comm_mpi_die((c), #call, ck_rc_);                                               \
    } while (0)

#endif
