/* cross_entropy_c.c: log softmax at the target, and its gradient, in place.
 *
 *     logp = z[t] - m - log(sum of exp(z - m)),    m = max z
 *     gradient = scale (exp(z - m) / sum - onehot)      in place, or to bfloat16
 *
 * A row is walked in blocks small enough for the first cache.  Each block's exponentials are taken relative to the
 * largest logit seen so far (its base), so that maximum and exponentials need one trip through memory; the trip
 * that scales them also moves the early blocks from their base to m.
 */
#include <math.h>
#include "ops/levels.h"
#include "ops/vec.h"

enum { MOST_BLOCKS = 64, LEAST_BLOCK = 1024 };

/* Largest of n values; -inf for none.  NaN is passed over: the sum of exponentials brings it out. */
static inline float largest(const float *z, int64_t n)
{
    vf a = vset1(-INFINITY), b = a;
    int64_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        a = vmax(vload(z + i), a);
        b = vmax(vload(z + i + VL), b);
    }
    float lane[VL], most = -INFINITY;
    vstore(lane, vmax(a, b));
    for (int j = 0; j < VL; j++) most = lane[j] > most ? lane[j] : most;
    for (; i < n; i++) most = z[i] > most ? z[i] : most;
    return most;
}

/* Sum of exp(z - base); where store, z becomes exp(z - base). */
static inline double exponentials(float *z, int64_t n, float base, bool store)
{
    vf a = vset1(0.0f), b = a;
    int64_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        const vf x = vexp(vload(z + i) - base), y = vexp(vload(z + i + VL) - base);
        a += x;
        b += y;
        if (store) {
            vstore(z + i, x);
            vstore(z + i + VL, y);
        }
    }
    double sum = (double)vsum(a + b);
    for (; i < n; i += VL) {
        float lane[VL];
        const int64_t left = n - i < VL ? n - i : VL;
        vstore(lane, vexp(vload_n(z + i, left) - base));
        for (int64_t j = 0; j < left; j++) sum += (double)lane[j];
        if (store) memcpy(z + i, lane, (size_t)left * sizeof *lane);
    }
    return sum;
}

static inline void row_loss(float *z, uint16_t *grad16, int64_t V, int32_t target, double *logp, uint8_t *best,
                            float scale)
{
    float base[MOST_BLOCKS];
    int64_t block = (V + MOST_BLOCKS - 1) / MOST_BLOCKS;
    block = block < LEAST_BLOCK ? LEAST_BLOCK : (block + VL - 1) / VL * VL;
    const float zt = z[target];
    float before = -INFINITY, m = -INFINITY;        /* the largest before the target, and of all so far */
    double sum = 0.0;

    for (int64_t b = 0, i = 0; i < V; b++, i += block) {
        const int64_t n = V - i < block ? V - i : block;
        float most;
        if (target >= i && target < i + n) {
            const float head = largest(z + i, target - i), tail = largest(z + target, n - (target - i));
            before = head > m ? head : m;
            most = head > tail ? head : tail;
        } else {
            most = largest(z + i, n);
        }
        if (most > m) {
            sum *= exp((double)m - (double)most);
            m = most;
        }
        base[b] = m;
        sum += exponentials(z + i, n, m == -INFINITY ? 0.0f : m, scale != 0.0f);
    }
    *logp = (double)zt - (double)m - log(sum);
    *best = zt == m && zt > before;

    if (scale == 0.0f) return;
    for (int64_t b = 0, i = 0; i < V; b++, i += block) {
        const int64_t n = V - i < block ? V - i : block;
        const float factor = (float)((double)scale * exp((double)base[b] - (double)m) / sum);
        const bool here = target >= i && target < i + n;
        const float at_target = here ? z[target] * factor - scale : 0.0f;   /* rounded once, also to bfloat16 */
        if (!grad16) {
            for (int64_t j = i; j < i + n; j++) z[j] *= factor;
        } else {
            int64_t j = i;
            for (; j + VL <= i + n; j += VL) vstore_bf16(grad16 + j, vload(z + j) * factor, VL);
            if (j < i + n) vstore_bf16(grad16 + j, vload_n(z + j, i + n - j) * factor, i + n - j);
        }
        if (here && grad16) vstore_bf16(grad16 + target, vset1(at_target), 1);
        else if (here) z[target] = at_target;
    }
}

static void cross_entropy(float *logits, uint16_t *grad16, double *logp, uint8_t *best, const int32_t *target,
                          float grad_scale, int64_t rows, int64_t V, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float *z = logits + r * V;
        uint16_t *const g = grad16 ? grad16 + r * V : NULL;
        if (target[r] >= 0) {
            row_loss(z, g, V, target[r], &logp[r], &best[r], grad_scale);
            continue;
        }
        logp[r] = 0.0;
        best[r] = 0;
        if (grad_scale == 0.0f) continue;
        if (g) memset(g, 0, (size_t)V * sizeof *g);
        else memset(z, 0, (size_t)V * sizeof *z);
    }
}

void SEL_FN(sel_ops_cross_entropy_init)(sel_ops *ops)
{
    ops->cross_entropy = cross_entropy;
}
