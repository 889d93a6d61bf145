/* mesh.c: who owns what; arithmetic without MPI. */
#include "dist/mesh.h"

sel_status sel_mesh_init(sel_mesh *m, int rank, int size, int64_t data, int64_t sequence)
{
    SEL_ASSERT(size >= 1 && rank >= 0 && rank < size);
    if (sequence != 1)
        return sel_fail(SEL_EUSER,
                        "dist.mesh.sequence: %lld ranks a sequence are not available in this version, "
                        "only 1",
                        (long long)sequence);
    if (data < 0)
        return sel_fail(SEL_EUSER,
                        "dist.mesh.data: expected 0 (all ranks) or the number of data-parallel ranks, "
                        "not %lld",
                        (long long)data);
    if (data == 0) data = size / sequence;
    if (data != size / sequence)
        return sel_fail(SEL_EUSER,
                        "dist.mesh: data %lld x sequence %lld does not make the %d ranks of this job; "
                        "data %d, or 0 for all ranks, would work",
                        (long long)data, (long long)sequence, size, size);

    m->data = (int)data;
    m->sequence = (int)sequence;
    m->data_rank = rank / m->sequence;
    m->sequence_rank = rank % m->sequence;
    return SEL_OK;
}

sel_status sel_mesh_samples(const sel_mesh *m, int64_t batch, int64_t *first, int64_t *count)
{
    const int64_t rest = batch % m->data;
    const int64_t below = batch - rest;

    if (batch < 1)
        return sel_fail(SEL_EUSER, "train.batch: %lld samples are no batch; %d would work", (long long)batch, m->data);
    if (rest != 0 && below == 0)
        return sel_fail(SEL_EUSER,
                        "train.batch: %lld samples cannot be divided equally among %d data-parallel ranks; "
                        "%d would work",
                        (long long)batch, m->data, m->data);
    if (rest != 0)
        return sel_fail(SEL_EUSER,
                        "train.batch: %lld samples cannot be divided equally among %d data-parallel ranks; "
                        "%lld or %lld would work",
                        (long long)batch, m->data, (long long)below, (long long)(below + m->data));
    *count = batch / m->data;
    *first = *count * m->data_rank;
    return SEL_OK;
}

void sel_mesh_share(int64_t bytes, int rank, int size, int64_t *begin, int64_t *end)
{
    /* The first `rest` ranks have one byte more.  (bytes * rank / size would overflow for large files.) */
    const int64_t each = bytes / size, rest = bytes % size;

    SEL_ASSERT(bytes >= 0 && rank >= 0 && rank < size);
    *begin = each * rank + (rank < rest ? rank : rest);
    *end = *begin + each + (rank < rest);
}
