/* head.c: final norm, output matrix and cross-entropy, a slice of rows at a time: the logits of all
 * rows never exist together, and their gradient is made while they are in cache.
 */
#include "core/model/plan.h"

#include <string.h>

sel_status sel_model_head(sel_model *m, const float *params, float *grads, int64_t rows, double loss_scale,
                          double *logp, uint8_t *best, sel_batch_stats *stats)
{
    const sel_dims *d = &m->layout->dims;
    const sel_ops *ops = m->opt.ops;
    const int threads = m->opt.threads;
    const size_t row_bytes = (size_t)d->D * (m->opt.bfloat16 ? sizeof(uint16_t) : sizeof(float));

    const char *const normed_rows = normed(m, params, m->layout->final_norm, m->rstd_final, m->x, rows);
    for (int64_t r = 0; r < rows; r += m->logit_rows) {
        const int64_t n = rows - r < m->logit_rows ? rows - r : m->logit_rows;
        const void *const h = normed_rows + (size_t)r * row_bytes;

        SEL_TRY(sel_linear_forward(m->lm_head, n, h, d->D, m->logits, d->V));
        ops->cross_entropy(m->logits, m->logp, m->best, m->targets + r, grads ? (float)loss_scale : 0.0f, n, d->V,
                           threads);
        for (int64_t i = 0; i < n; i++) {
            if (m->targets[r + i] < 0) continue;
            stats->loss -= m->logp[i];
            stats->correct += m->best[i];
            stats->tokens++;
        }
        if (logp) memcpy(logp + r, m->logp, (size_t)n * sizeof *logp);
        if (best) memcpy(best + r, m->best, (size_t)n);
        if (grads) {
            const void *const dy = operand(m, m->logits16, m->logits, n * d->V);
            SEL_TRY(sel_linear_backward_input(m->lm_head, n, dy, d->V, m->dh + r * d->D, d->D));
            SEL_TRY(sel_linear_backward_weight(m->lm_head, n, dy, d->V, h, d->D, grads + m->layout->lm_head));
        }
    }
    if (grads) {
        memset(m->dx, 0, (size_t)(rows * d->D) * sizeof(float));
        ops->rmsnorm_backward(m->dx, grads + m->layout->final_norm, m->dh, m->x, m->rstd_final,
                              params + m->layout->final_norm, m->partial, rows, d->D, threads);
    }
    return SEL_OK;
}
