/* optimizer.c: AdamW over the parameter array (spec, section 8). */
#include <math.h>
#include "core/train/trainer.h"

void sel_optimizer_update(sel_trainer *t, int64_t step, double lr, double g_scale)
{
    const sel_layout *l = t->layout;
    const double beta1 = t->config->train.beta1, beta2 = t->config->train.beta2;
    const double correction1 = 1.0 - pow(beta1, (double)step), correction2 = 1.0 - pow(beta2, (double)step);

    /* Neighbours that are decayed alike are one stretch. */
    for (int i = 0; i < l->n_tensors;) {
        const bool decay = l->tensors[i].decay;
        const int64_t begin = l->tensors[i].offset;
        int64_t end = begin;
        for (; i < l->n_tensors && l->tensors[i].decay == decay; i++) end = l->tensors[i].offset + l->tensors[i].count;
        t->ops.adamw(t->params + begin, t->exp_avg + begin, t->exp_avg_sq + begin, t->grads + begin, end - begin,
                     g_scale, lr, beta1, beta2, t->config->train.adam_epsilon,
                     decay ? t->config->train.weight_decay : 0.0, correction1, correction2, t->threads);
    }
}
