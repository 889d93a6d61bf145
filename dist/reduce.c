/* reduce.c: gradients summed over the data axis, today by one all-reduce at the end of backward. */
#include "dist/reduce.h"

#include <stdlib.h>

#include "core/base/clock.h"

struct sel_reducer {
    sel_comm *comm; /* not owned */
    float *grads;   /* [n], not owned */
    int64_t n;
    int64_t ready; /* floats announced since the last finish */
    double bytes, seconds;
};

sel_status sel_reducer_new(sel_reducer **out, sel_comm *c, const sel_mesh *m, float *grads, int64_t n)
{
    *out = NULL;
    if (m->sequence != 1 || m->data != sel_comm_size(c))
        return sel_fail(SEL_ECOMM, "the reducer needs all %d ranks on the data axis, the mesh is %d x %d",
                        sel_comm_size(c), m->data, m->sequence);
    sel_reducer *r = calloc(1, sizeof *r);
    if (!r) return sel_fail(SEL_ENOMEM, "out of memory");
    r->comm = c;
    r->grads = grads;
    r->n = n;
    *out = r;
    return SEL_OK;
}

void sel_reducer_free(sel_reducer **r)
{
    free(*r);
    *r = NULL;
}

void sel_reducer_ready(sel_reducer *r, int64_t begin, int64_t end)
{
    SEL_ASSERT(0 <= begin && begin <= end && end <= r->n);
    r->ready += end - begin;
    SEL_ASSERT(r->ready <= r->n); /* else a stretch was announced twice */
}

void sel_reducer_finish(sel_reducer *r)
{
    const double ranks = sel_comm_size(r->comm);
    const double start = sel_now();

    sel_comm_sum_floats(r->comm, r->grads, r->n);
    r->seconds += sel_now() - start;
    /* What a ring, which is optimal in bytes, sends: each rank passes on R-1 of the R shares twice, once while they
       are summed and once while they are spread.  MPI does not tell what it really sent. */
    r->bytes += 2 * (ranks - 1) / ranks * (double)r->n * sizeof(float);
    r->ready = 0;
}

void sel_reducer_wire(sel_reducer *r, double *bytes, double *seconds)
{
    *bytes = r->bytes;
    *seconds = r->seconds;
    r->bytes = r->seconds = 0;
}
