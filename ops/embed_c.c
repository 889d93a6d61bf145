/* embed_c.c: token and position embeddings. */
#include "ops/levels.h"
#include "ops/vec.h"

static void embed_forward(float *restrict x, const int32_t *restrict tokens, const float *restrict tok,
                          const float *restrict pos, int64_t rows, int64_t n, int64_t pos0, int64_t D, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *t = tok + tokens[r] * D, *p = pos + (pos0 + r % n) * D;
        float *y = x + r * D;
        for (int64_t d = 0; d < D; d++) y[d] = t[d] + p[d];
    }
}

/* Rows may name the same token, so threads share columns, a cache line at least, and each walks the rows in
   order: no two write one place, and the sums do not depend on the number of threads. */
static void embed_backward(float *restrict dtok, float *restrict dpos, const float *restrict dx,
                           const int32_t *restrict tokens, int64_t rows, int64_t n, int64_t D, int threads)
{
    const int64_t line = 16, lines = (D + line - 1) / line;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        const int64_t d0 = lines * t / threads * line, end = lines * (t + 1) / threads * line;
        const int64_t d1 = end < D ? end : D;
        for (int64_t r = 0; r < rows && d0 < d1; r++) {
            const float *g = dx + r * D;
            float *dt = dtok + tokens[r] * D, *dp = dpos + r % n * D;
            for (int64_t d = d0; d < d1; d++) {
                dt[d] += g[d];
                dp[d] += g[d];
            }
        }
    }
}

void SEL_FN(sel_ops_embed_init)(sel_ops *ops)
{
    ops->embed_forward = embed_forward;
    ops->embed_backward = embed_backward;
}
