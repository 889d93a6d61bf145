/* adamw_c.c: operations on long flat arrays: AdamW, sum of squares.
 *
 * AdamW is elementwise, and compiled without fused multiply-add (CMakeLists.txt): an element's result depends
 * neither on where it lies in the call nor on the level, so threads and ranks may share the arrays in any way.
 */
#include <math.h>
#include "ops/levels.h"
#include "ops/vec.h"

/* Constants of a step, worked out in double and rounded once to float32. */
typedef struct {
    float g_scale;
    float keep1, take1;       /* beta1, 1 - beta1 */
    float keep2, take2;       /* beta2, 1 - beta2 */
    float lr;                 /* lr / correction1 */
    float root;               /* 1 / sqrt(correction2) */
    float eps, decay;         /* decay: lr * decay */
} adamw_step;

/*     m = beta1 m + (1 - beta1) g
 *     v = beta2 v + (1 - beta2) g^2
 *     w -= lr mhat / (sqrt(vhat) + eps) + lr decay w
 *
 * on one vector, or its first n lanes.  The two parts of the update are added before they meet w: 1 - lr decay
 * would be rounded to a multiple of 2^-24, a tenth of lr decay itself.
 */
static inline void adamw_vector(float *w, float *m, float *v, const float *g, int64_t n, const adamw_step *s)
{
    const vf x = vload_n(g, n) * s->g_scale, w0 = vload_n(w, n);
    const vf m1 = vload_n(m, n) * s->keep1 + x * s->take1;
    const vf v1 = vload_n(v, n) * s->keep2 + x * x * s->take2;
    const vf update = m1 * s->lr / (vsqrt(v1) * s->root + s->eps) + w0 * s->decay;
    vstore_n(m, m1, n);
    vstore_n(v, v1, n);
    vstore_n(w, w0 - update, n);
}

static void adamw_block(float *restrict w, float *restrict m, float *restrict v, const float *restrict g, int64_t n,
                        const adamw_step *s)
{
    int64_t i = 0;
    for (; i + VL <= n; i += VL) adamw_vector(w + i, m + i, v + i, g + i, VL, s);
    if (i < n) adamw_vector(w + i, m + i, v + i, g + i, n - i, s);
}

static void adamw(float *w, float *m, float *v, const float *g, int64_t n, double g_scale, double lr, double beta1,
                  double beta2, double eps, double decay, double correction1, double correction2, int threads)
{
    const adamw_step s = {
        .g_scale = (float)g_scale,
        .keep1 = (float)beta1,
        .take1 = (float)(1.0 - beta1),
        .keep2 = (float)beta2,
        .take2 = (float)(1.0 - beta2),
        .lr = (float)(lr / correction1),
        .root = (float)(1.0 / sqrt(correction2)),
        .eps = (float)eps,
        .decay = (float)(lr * decay),
    };
    const int64_t block = 4096, blocks = (n + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t i = b * block, left = n - i;
        adamw_block(w + i, m + i, v + i, g + i, left < block ? left : block, &s);
    }
}

enum { SQUARES_BLOCK = 4096, SQUARES_LANES = 16 };

/* In double the square of a float32 is exact, and the lanes are 16 at every level: all levels agree to the bit. */
static double block_squares(const float *x, int64_t n)
{
    double lane[SQUARES_LANES] = { 0 };
    int64_t i = 0;
    for (; i + SQUARES_LANES <= n; i += SQUARES_LANES)
        for (int j = 0; j < SQUARES_LANES; j++) lane[j] += (double)x[i + j] * (double)x[i + j];
    for (int j = 0; i < n; i++, j++) lane[j] += (double)x[i] * (double)x[i];
    double sum = 0.0;
    for (int j = 0; j < SQUARES_LANES; j++) sum += lane[j];
    return sum;
}

static double sum_squares(const float *x, int64_t n, int threads)
{
    enum { BATCH = 1024 };                  /* blocks whose sums are kept at once */
    double part[BATCH], sum = 0.0;
    const int64_t blocks = (n + SQUARES_BLOCK - 1) / SQUARES_BLOCK;
    for (int64_t first = 0; first < blocks; first += BATCH) {
        const int64_t some = blocks - first < BATCH ? blocks - first : BATCH;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t b = 0; b < some; b++) {
            const int64_t i = (first + b) * SQUARES_BLOCK, left = n - i;
            part[b] = block_squares(x + i, left < SQUARES_BLOCK ? left : SQUARES_BLOCK);
        }
        for (int64_t b = 0; b < some; b++) sum += part[b];
    }
    return sum;
}

void SEL_FN(sel_ops_adamw_init)(sel_ops *ops)
{
    ops->adamw = adamw;
    ops->sum_squares = sum_squares;
}
