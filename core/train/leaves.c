/* leaves.c: dist.virtual_ranks: the batch in W leaves, whose gradients are added in one fixed binary tree.
 *
 * A rank has W / R neighbouring leaves.  A leaf's micro-batches are added in order into an array of its own; when a
 * leaf ends, arrays of neighbours are added as the tree has it, like carries of a binary counter: leaf i begins at the
 * depth of the ones in i, and at its end as many levels close as i has trailing ones.  The ranks' sums go on in the
 * same tree (dist/reduce.h).  Without virtual ranks a rank is one leaf.
 */
#include <inttypes.h>
#include "core/train/trainer.h"
#include "dist/tree.h"

static bool power_of_two(int64_t n) { return (n & (n - 1)) == 0; }

sel_status sel_leaves_choose(sel_trainer *t)
{
    const int64_t W = t->config->dist.virtual_ranks, batch = t->config->train.batch;
    const int ranks = t->mesh.data;

    t->leaves = 1;
    if (W == 0) return SEL_OK;
    if (!power_of_two(W))
        return sel_fail(SEL_EUSER, "dist.virtual_ranks: %" PRId64 " is not a power of two", W);
    if (!power_of_two(ranks) || W % ranks)
        return sel_fail(SEL_EUSER,
                        "dist.virtual_ranks: %" PRId64 " leaves cannot be shared out to %d data-parallel ranks; "
                        "powers of two up to %" PRId64 " would work",
                        W, ranks, W);
    if (batch % W)
        return sel_fail(SEL_EUSER, "train.batch: %" PRId64 " sequences cannot be cut into the %" PRId64 " leaves of "
                        "dist.virtual_ranks; multiples of %" PRId64 " would work", batch, W, W);
    if (t->config->dist.wire != SEL_WIRE_FLOAT32)
        return sel_fail(SEL_EUSER,
                        "dist.wire: bfloat16 rounds what goes between hosts, so that results would depend on "
                        "the hosts; with dist.virtual_ranks only float32 works");
    t->leaves = (int)(W / ranks);
    return SEL_OK;
}

int sel_leaf_depth(int leaf) { return __builtin_popcount((unsigned)leaf); }

/* How many levels of the tree close with a leaf. */
static int closing(int leaf) { return __builtin_ctz(~(unsigned)leaf); }

void sel_leaf_close(sel_trainer *t, int leaf, int64_t begin, int64_t end)
{
    for (int d = sel_leaf_depth(leaf), n = closing(leaf); n > 0; d--, n--) {
        float *const sum = t->sums[d - 1] + begin;
        sel_tree_sum(&sum, 1, (const float *const[]){ sum, t->sums[d] + begin }, 2, end - begin, t->threads);
    }
}

void sel_leaf_close_numbers(double numbers[SEL_LEVELS][SEL_LEAF_NUMBERS], int leaf)
{
    for (int d = sel_leaf_depth(leaf), n = closing(leaf); n > 0; d--, n--)
        for (int i = 0; i < SEL_LEAF_NUMBERS; i++) numbers[d - 1][i] += numbers[d][i];
}
