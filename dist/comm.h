/* comm.h: who the ranks are, and how they fail together.
 *
 * [collective] after a prototype: every rank of the job must call it, in the
 * same order.  Functions without the mark may be called by one rank alone.
 * The sources in dist/ include mpi.h; nothing else knows that MPI exists.
 * Only the main thread communicates.  The ranks of a host are neighbours in it,
 * whatever order MPI gave them; without mpirun's mapping by node nothing changes.
 */
#ifndef SEL_DIST_COMM_H
#define SEL_DIST_COMM_H

#include <stddef.h>
#include <stdint.h>
#include "core/base/error.h"

typedef struct sel_comm sel_comm;

/* [collective] Starts MPI (MPI_THREAD_MULTIPLE asked for) and makes the world of ranks.
   Started without mpirun it is one rank.  *c is owned by the caller. */
sel_status sel_comm_open(sel_comm **c, int *argc, char ***argv);

/* [collective] Ends MPI, where *c is the world; sets *c to NULL.  NULL is fine. */
void sel_comm_close(sel_comm **c);

/* [collective] A world of those ranks of c that bring the same part >= 0, in the order of c; *out is owned by the
   caller, and closed before c. */
void sel_comm_split(sel_comm **out, sel_comm *c, int part);

int sel_comm_rank(const sel_comm *c);
int sel_comm_size(const sel_comm *c);
int sel_comm_host_rank(const sel_comm *c);   /* among the ranks of this host */
int sel_comm_host_size(const sel_comm *c);
int sel_comm_hosts(const sel_comm *c);       /* hosts in the job */
int sel_comm_host_least(const sel_comm *c);  /* ranks of the host that has fewest */
int sel_comm_host_index(const sel_comm *c);  /* of this rank's host, 0 .. hosts - 1 */

/* Name and version of the MPI library, one line. */
const char *sel_comm_library(void);

/* [collective] Every rank brings the outcome of what it just did alone; every
   rank leaves with the same code: SEL_OK only if all were, else the worst one,
   with the line of the lowest rank that had it.  After each step that can fail
   on one rank and before the next collective call. */
sel_status sel_comm_agree(sel_comm *c, sel_status mine);

/* Not collective.  For a failure where returning would leave others waiting:
   says rank, place and sel_error() on stderr, then ends the whole job with status 1. */
_Noreturn void sel_comm_die(const sel_comm *c, const char *where);

/* Not collective, from any thread.  Ends the whole job with that status, and this process within seconds even where MPI
   no longer reaches anyone. */
_Noreturn void sel_comm_abort(int status);

/* [collective] */
void sel_comm_barrier(sel_comm *c);
void sel_comm_bcast(sel_comm *c, void *data, size_t bytes, int root);
/* In place, element by element in the tree over the ranks (tree.h): the same bits on all ranks, NaN where any rank has
   NaN. */
void sel_comm_sum_doubles(sel_comm *c, double *x, int n);
void sel_comm_max_doubles(sel_comm *c, double *x, int n);
/* In place: each number is brought by one rank, the others bring 0. */
void sel_comm_merge_doubles(sel_comm *c, double *x, int64_t n);

/* MPI's own collectives on float32, which the benchmark compares with: the sum, in place; the sum of each rank's share
   (n a multiple of the ranks) into out [n / size]; the ranks' shares in [n / size] into out [n]. */
void sel_comm_sum_floats(sel_comm *c, float *x, int64_t n);
void sel_comm_scatter_floats(sel_comm *c, const float *x, float *out, int64_t n);
void sel_comm_gather_floats(sel_comm *c, const float *in, float *out, int64_t n);

/* Every rank brings floats [begin, end) of one array; together they are the stretch [*first, *last) of it without gaps
   or overlaps, which all ranks get in `all`, room for `most`.  Empty ones are fine. */
void sel_comm_join_floats(sel_comm *c, const float *mine, int64_t begin, int64_t end, float *all, int64_t most,
                          int64_t *first, int64_t *last);

/* `all` is [size][bytes] at root, not touched (may be NULL) elsewhere. */
void sel_comm_gather(sel_comm *c, const void *mine, size_t bytes, void *all, int root);

/* [collective] Whether every rank brought the same 64-bit value. */
int sel_comm_same(sel_comm *c, uint64_t value);

#endif
