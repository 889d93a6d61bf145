/* head.c: final norm, output matrix and cross-entropy, a slice of rows at a time: the logits of all
 * rows never exist together, and their gradient is made while they are in cache.
 */
#include "core/model/plan.h"

#include <string.h>

sel_status sel_model_head(sel_model *m, const float *params, float *grads, bool add, int64_t rows, double loss_scale,
                          double *logp, uint8_t *best, sel_batch_stats *stats)
{
    const sel_dims *d = &m->layout->dims;
    const sel_ops *ops = m->opt.ops;
    const int threads = m->opt.threads;
    const size_t row_bytes = (size_t)d->D * (m->opt.bfloat16 ? sizeof(uint16_t) : sizeof(float));

    const char *const normed_rows = residual_normed(m, params, m->layout->final_norm, m->rstd_final, m->x,
                                                    m->kept[d->L - 1].x_mid, rows);
    for (int64_t r = 0; r < rows; r += m->logit_rows) {
        const int64_t n = rows - r < m->logit_rows ? rows - r : m->logit_rows;
        const void *const h = normed_rows + (size_t)r * row_bytes;

        SEL_TRY(sel_model_product(m, m->lm_head, SEL_PART_LM_HEAD, n, h, d->D, m->logits, d->V));
        ops->cross_entropy(m->logits, grads ? m->logits16 : NULL, m->logp, m->best, m->targets + r,
                           grads ? (float)loss_scale : 0.0f, n, d->V, threads);
        sel_profile_lap(m->opt.profile, SEL_PART_CROSS_ENTROPY, 0.0,
                        (double)(n * d->V) * (!grads ? 4.0 : m->opt.bfloat16 ? 6.0 : 8.0));
        for (int64_t i = 0; i < n; i++) {
            if (m->targets[r + i] < 0) continue;
            stats->loss -= m->logp[i];
            stats->correct += m->best[i];
            stats->tokens++;
        }
        if (logp) memcpy(logp + r, m->logp, (size_t)n * sizeof *logp);
        if (best) memcpy(best + r, m->best, (size_t)n);
        if (grads) {
            const void *const dy = m->opt.bfloat16 ? (const void *)m->logits16 : m->logits;
            SEL_TRY(sel_model_product_input(m, m->lm_head, SEL_PART_LM_HEAD, n, dy, d->V, m->dh + r * d->D,
                                            SEL_FLOAT32, d->D));
            SEL_TRY(sel_model_product_weight(m, m->lm_head, SEL_PART_LM_HEAD, n, dy, d->V, h, d->D,
                                             grads + m->layout->lm_head, add || r > 0));
        }
    }
    if (grads) {
        ops->rmsnorm_backward(m->dx, NULL, m->dx16, NULL, grads + m->layout->final_norm, m->dh, m->x, m->rstd_final,
                              params + m->layout->final_norm, m->partial, rows, d->D, threads);
        sel_profile_lap(m->opt.profile, SEL_PART_NORM_BACKWARD, 0.0,
                        (double)(rows * d->D) * (m->opt.bfloat16 ? 14.0 : 12.0));
    }
    return SEL_OK;
}
