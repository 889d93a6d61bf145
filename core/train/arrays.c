/* arrays.c: where parameters, gradients and moments lie, and how moments that ranks share out become whole on disk.
 *
 * Bytes a rank, of n parameters on R ranks: parameters 4 n, gradients 4 n, moments 8 n, or 8 n / R with dist.zero 1;
 * dist.virtual_ranks W adds log2(W / R) arrays of 4 n.
 */
#include <stdlib.h>
#include <string.h>
#include "core/base/mem.h"
#include "core/train/trainer.h"

static bool sharded(const sel_trainer *t) { return t->config->dist.zero != 0; }

static float *new_array(int64_t n, const char *what) { return sel_alloc((size_t)n * sizeof(float), what); }

/* Everything of this rank beside what the reducer holds. */
static sel_status make_own(sel_trainer *t)
{
    const int64_t total = t->layout->total;
    const int n = sel_reducer_pieces(t->reducer);

    t->stretches = calloc((size_t)n + 1, sizeof *t->stretches);
    if (!t->stretches) return sel_fail(SEL_ENOMEM, "no memory for a list of %d pieces", n);
    for (int i = 0; i < n; i++) {
        sel_reducer_piece(t->reducer, i, &t->stretches[i].begin, &t->stretches[i].end);
        t->owned += t->stretches[i].end - t->stretches[i].begin;
    }
    t->exp_avg = new_array(t->owned, "first moments");
    t->exp_avg_sq = new_array(t->owned, "second moments");
    t->params = sharded(t) ? sel_reducer_params(t->reducer) : new_array(total, "parameters");
    if (!t->exp_avg || !t->exp_avg_sq || !t->params) return SEL_ENOMEM;

    t->grads = t->sums[0] = sel_reducer_grads(t->reducer);
    for (int d = 1; 1 << d <= t->leaves; d++)
        if (!(t->sums[d] = new_array(total, "gradients of dist.virtual_ranks"))) return SEL_ENOMEM;
    if (!sharded(t)) return SEL_OK;
    const int64_t blocks = (total + SEL_BLOCK - 1) / SEL_BLOCK;
    t->squares = sel_alloc((size_t)blocks * sizeof *t->squares, "sums of squares");
    return t->squares ? SEL_OK : SEL_ENOMEM;
}

sel_status sel_arrays_new(sel_trainer *t)
{
    const sel_config *c = t->config;
    const sel_reducer_options o = { .n = t->layout->total, .zero = sharded(t),
                                    .bfloat16 = c->dist.wire == SEL_WIRE_BFLOAT16,
                                    .fixed_tree = c->dist.virtual_ranks > 0, .no_window = !c->dist.shared_memory,
                                    .no_overlap = !c->dist.overlap, .threads = t->threads };

    SEL_TRY(sel_reducer_new(&t->reducer, t->comm, &o));
    return sel_comm_agree(t->comm, make_own(t));
}

void sel_arrays_free(sel_trainer *t)
{
    if (!t->reducer || t->params != sel_reducer_params(t->reducer)) sel_free(t->params);
    sel_free(t->exp_avg);
    sel_free(t->exp_avg_sq);
    sel_free(t->squares);
    for (int d = 1; d < SEL_LEVELS; d++) sel_free(t->sums[d]);
    free(t->stretches);
    sel_reducer_free(&t->reducer);
}

int64_t sel_arrays_bytes(const sel_trainer *t)
{
    int64_t floats = 2 * t->layout->total + 2 * t->owned;

    for (int d = 1; d < SEL_LEVELS; d++) floats += t->sums[d] ? t->layout->total : 0;
    return floats * (int64_t)sizeof(float);
}

double sel_arrays_norm_squared(sel_trainer *t)
{
    const int64_t total = t->layout->total, blocks = (total + SEL_BLOCK - 1) / SEL_BLOCK;
    double sum = 0.0;

    if (!sharded(t)) return t->ops.sum_squares(t->grads, total, t->threads);

    /* The blocks and the order are those of sum_squares: the same bits. */
    memset(t->squares, 0, (size_t)blocks * sizeof *t->squares);
    for (int i = 0; i < sel_reducer_pieces(t->reducer); i++)
        for (int64_t at = t->stretches[i].begin; at < t->stretches[i].end; at += SEL_BLOCK) {
            const int64_t left = t->stretches[i].end - at;
            t->squares[at / SEL_BLOCK] = t->ops.sum_squares(t->grads + at, left < SEL_BLOCK ? left : SEL_BLOCK, 1);
        }
    sel_comm_merge_doubles(t->comm, t->squares, blocks);
    for (int64_t b = 0; b < blocks; b++) sum += t->squares[b];
    return sum;
}

sel_status sel_arrays_load(sel_trainer *t, const sel_manifest *m, bool moments)
{
    SEL_TRY(sel_checkpoint_load(m, t->layout, t->params, NULL, NULL));
    if (!moments) return SEL_OK;
    return sel_checkpoint_load_moments(m, t->layout, t->stretches, sel_reducer_pieces(t->reducer), t->exp_avg,
                                       t->exp_avg_sq);
}

/* [collective] The part of one moment that this rank writes, at its place in `whole`: pages of it that are not touched
   take no memory. */
static sel_status make_whole(sel_trainer *t, const float *mine, int array, float *stretch, float *whole)
{
    int64_t begin, end, first, last;

    SEL_TRY(sel_comm_agree(t->comm, sel_checkpoint_share(t->layout, sel_comm_rank(t->comm), sel_comm_size(t->comm),
                                                         array, &begin, &end)));
    for (int i = 0; i < sel_reducer_pieces(t->reducer); i++) {
        const sel_stretch s = t->stretches[i];
        sel_comm_join_floats(t->comm, mine, s.begin, s.end, stretch, sel_reducer_stretch(t->reducer), &first, &last);
        mine += s.end - s.begin;
        const int64_t from = first > begin ? first : begin, to = last < end ? last : end;
        if (from < to) memcpy(whole + from, stretch + (from - first), (size_t)(to - from) * sizeof(float));
    }
    return SEL_OK;
}

sel_status sel_arrays_save(sel_trainer *t, const sel_checkpoint_info *info)
{
    const int64_t keep = t->config->checkpoint.keep;
    sel_status rc = SEL_OK;

    if (!sharded(t))
        return sel_checkpoint_save(t->comm, t->checkpoints, t->layout, info, t->params, t->exp_avg, t->exp_avg_sq,
                                   keep);

    float *const stretch = new_array(sel_reducer_stretch(t->reducer), "moments on their way to the disk");
    float *const whole[2] = { new_array(t->layout->total, "first moments to be saved"),
                              new_array(t->layout->total, "second moments to be saved") };
    if (!stretch || !whole[0] || !whole[1]) rc = SEL_ENOMEM;
    rc = sel_comm_agree(t->comm, rc);
    if (rc == SEL_OK) rc = make_whole(t, t->exp_avg, 0, stretch, whole[0]);
    if (rc == SEL_OK) rc = make_whole(t, t->exp_avg_sq, 1, stretch, whole[1]);
    if (rc == SEL_OK)
        rc = sel_checkpoint_save(t->comm, t->checkpoints, t->layout, info, t->params, whole[0], whole[1], keep);
    sel_free(stretch);
    sel_free(whole[0]);
    sel_free(whole[1]);
    return rc;
}
