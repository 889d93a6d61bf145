/* swiglu_c.c: the gated feed-forward's middle, a = silu(g) u with silu(g) = g s and s = 1 / (1 + exp(-g)).
 *
 *     du = da silu(g),    dg = da u (s + silu(g) (1 - s))
 */
#include "ops/levels.h"
#include "ops/vec.h"

typedef struct { vf s, rest; } gate;   /* s and 1 - s */

static inline gate sigmoid(vf g)
{
    const vf e = vexp(-g);             /* +inf below -88.7: s = 0 */
    const vf s = 1.0f / (1.0f + e);
    /* 1 - s loses all digits where s is near 1; there it is e s. */
    return (gate){ s, vselect(g > vset1(0.0f), e * s, 1.0f - s) };
}

/* One vector, or its first n lanes. */
static inline void forward_vector(float *a, const float *g, const float *u, int64_t n)
{
    const vf x = vload_n(g, n);
    vstore_n(a, x * sigmoid(x).s * vload_n(u, n), n);
}

static inline void backward_vector(float *dg, float *du, float *a, const float *da, const float *g, const float *u,
                                   int64_t n)
{
    const vf x = vload_n(g, n), up = vload_n(u, n), d = vload_n(da, n);
    const gate q = sigmoid(x);
    const vf silu = x * q.s;
    if (a) vstore_n(a, silu * up, n);
    vstore_n(dg, d * up * (q.s + silu * q.rest), n);
    vstore_n(du, d * silu, n);
}

static void swiglu_forward(float *restrict a, const float *restrict gu, int64_t rows, int64_t Fw, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *g = gu + r * 2 * Fw, *u = g + Fw;
        float *y = a + r * Fw;
        int64_t i = 0;
        for (; i + VL <= Fw; i += VL) forward_vector(y + i, g + i, u + i, VL);
        if (i < Fw) forward_vector(y + i, g + i, u + i, Fw - i);
    }
}

static void swiglu_backward(float *dgu, float *restrict a, const float *restrict da, const float *gu, int64_t rows,
                            int64_t Fw, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *g = gu + r * 2 * Fw, *u = g + Fw, *d = da + r * Fw;
        float *dg = dgu + r * 2 * Fw, *du = dg + Fw, *y = a ? a + r * Fw : NULL;
        int64_t i = 0;
        for (; i + VL <= Fw; i += VL) backward_vector(dg + i, du + i, y ? y + i : NULL, d + i, g + i, u + i, VL);
        if (i < Fw) backward_vector(dg + i, du + i, y ? y + i : NULL, d + i, g + i, u + i, Fw - i);
    }
}

void SEL_FN(sel_ops_swiglu_init)(sel_ops *ops)
{
    ops->swiglu_forward = swiglu_forward;
    ops->swiglu_backward = swiglu_backward;
}
