/* mesh.c: who owns what; arithmetic without MPI. */
#include "dist/mesh.h"

#include <stdbool.h>
#include <stdio.h>

sel_status sel_mesh_init(sel_mesh *m, int rank, int size, int64_t data, int64_t sequence)
{
    SEL_ASSERT(size >= 1 && rank >= 0 && rank < size);
    if (sequence < 1 || sequence > size || size % sequence != 0) {
        int64_t below = sequence < size ? sequence : size, above = sequence;
        if (below < 1) below = 1;
        while (size % below) below--;
        while (above <= size && (above < 1 || size % above)) above++;
        if (above > size || above == below)
            return sel_fail(SEL_EUSER,
                            "dist.mesh.sequence: the %d ranks of this job do not make groups of %lld that share "
                            "sequences; %lld would work",
                            size, (long long)sequence, (long long)below);
        return sel_fail(SEL_EUSER,
                        "dist.mesh.sequence: the %d ranks of this job do not make groups of %lld that share sequences; "
                        "%lld or %lld would work",
                        size, (long long)sequence, (long long)below, (long long)above);
    }
    if (data < 0)
        return sel_fail(SEL_EUSER,
                        "dist.mesh.data: expected 0 (all ranks) or the number of data-parallel ranks, "
                        "not %lld",
                        (long long)data);
    if (data == 0) data = size / sequence;
    if (data != size / sequence)
        return sel_fail(SEL_EUSER,
                        "dist.mesh: data %lld x sequence %lld does not make the %d ranks of this job; "
                        "data %lld, or 0 for all ranks, would work",
                        (long long)data, (long long)sequence, size, (long long)(size / sequence));

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

sel_status sel_mesh_chunks(const sel_mesh *m, int64_t tokens, sel_cut cut, sel_chunks *c)
{
    const int64_t s = m->sequence;
    const bool twice = s > 1 && (cut == SEL_CUT_ZIGZAG || (cut == SEL_CUT_AUTO && tokens % (2 * s) == 0));
    const int64_t parts = twice ? 2 * s : s;

    if (tokens < parts || tokens % parts) {
        const int64_t below = tokens / parts * parts;
        int64_t fewer = s - 1;
        char other[32] = "";

        while (fewer > 1 && tokens % (twice ? 2 * fewer : fewer)) fewer--;
        if (below > 0) snprintf(other, sizeof other, "%lld or ", (long long)below);
        return sel_fail(SEL_EUSER,
                        "model.context: %lld tokens cannot be cut into the %lld equal %schunks of dist.mesh.sequence "
                        "%lld; model.context %s%lld would work, or dist.mesh.sequence %lld%s",
                        (long long)tokens, (long long)parts, twice ? "zigzag " : "", (long long)s, other,
                        (long long)(below + parts), (long long)fewer,
                        twice && tokens % s == 0 ? ", or dist.sequence_chunks: contiguous" : "");
    }
    *c = (sel_chunks){.tokens = tokens, .each = tokens / parts, .ranks = m->sequence, .rank = m->sequence_rank,
                      .chunks = twice ? 2 : 1};
    return SEL_OK;
}

int sel_chunk_place(const sel_chunks *c, int rank, int k)
{
    return k == 0 ? rank : 2 * c->ranks - 1 - rank;
}

int sel_chunk_owner(const sel_chunks *c, int place, int *k)
{
    *k = place >= c->ranks;
    return *k ? 2 * c->ranks - 1 - place : place;
}

void sel_mesh_share(int64_t bytes, int rank, int size, int64_t *begin, int64_t *end)
{
    /* The first `rest` ranks have one byte more.  (bytes * rank / size would overflow for large files.) */
    const int64_t each = bytes / size, rest = bytes % size;

    SEL_ASSERT(bytes >= 0 && rank >= 0 && rank < size);
    *begin = each * rank + (rank < rest ? rank : rest);
    *end = *begin + each + (rank < rest);
}
