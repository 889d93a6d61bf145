/* optimizer.c: AdamW over the parameter array, or this rank's share of it (spec, section 8). */
#include <math.h>
#include "core/train/trainer.h"

void sel_optimizer_update(sel_trainer *t, int64_t step, double lr, double g_scale)
{
    const sel_layout *l = t->layout;
    const double beta1 = t->config->train.beta1, beta2 = t->config->train.beta2;
    const double correction1 = 1.0 - pow(beta1, (double)step), correction2 = 1.0 - pow(beta2, (double)step);

    int64_t before = 0;   /* floats of the pieces before this one */

    for (int p = 0; p < sel_reducer_pieces(t->reducer); p++) {
        const sel_stretch own = t->stretches[p];
        /* Neighbours that are decayed alike are updated together. */
        for (int i = 0; i < l->n_tensors;) {
            const bool decay = l->tensors[i].decay;
            int64_t begin = l->tensors[i].offset, end = begin;
            for (; i < l->n_tensors && l->tensors[i].decay == decay; i++)
                end = l->tensors[i].offset + l->tensors[i].count;
            if (begin < own.begin) begin = own.begin;
            if (end > own.end) end = own.end;
            if (begin >= end) continue;
            const int64_t at = before + begin - own.begin;
            t->ops.adamw(t->params + begin, t->exp_avg + at, t->exp_avg_sq + at, t->grads + begin, end - begin,
                         g_scale, lr, beta1, beta2, t->config->train.adam_epsilon,
                         decay ? t->config->train.weight_decay : 0.0, correction1, correction2, t->threads);
        }
        before += own.end - own.begin;
        sel_reducer_updated(t->reducer, p);
    }
    sel_reducer_gather(t->reducer);
}
