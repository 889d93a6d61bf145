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

/* One vector, or its first n lanes, at element i of a row; results are float32 or bfloat16. */
static inline void forward_vector(bool bfloat16, void *a, const float *g, const float *u, int64_t i, int64_t n)
{
    const vf x = vload_n(g + i, n);
    vstore_as(bfloat16, a, i, x * sigmoid(x).s * vload_n(u + i, n), n);
}

static inline void forward_row(bool bfloat16, void *a, const float *gu, int64_t Fw)
{
    int64_t i = 0;
    for (; i + VL <= Fw; i += VL) {
        vfetch(gu + i);
        vfetch(gu + Fw + i);
        forward_vector(bfloat16, a, gu, gu + Fw, i, VL);
    }
    if (i < Fw) forward_vector(bfloat16, a, gu, gu + Fw, i, Fw - i);
}

static inline void backward_vector(bool bfloat16, void *dgu, void *a, const float *da, const float *gu, int64_t Fw,
                                   int64_t i, int64_t n)
{
    const vf x = vload_n(gu + i, n), up = vload_n(gu + Fw + i, n), d = vload_n(da + i, n);
    const gate q = sigmoid(x);
    const vf silu = x * q.s;
    if (a) vstore_as(bfloat16, a, i, silu * up, n);
    vstore_as(bfloat16, dgu, i, d * up * (q.s + silu * q.rest), n);
    vstore_as(bfloat16, dgu, Fw + i, d * silu, n);
}

static inline void backward_row(bool bfloat16, void *dgu, void *a, const float *da, const float *gu, int64_t Fw)
{
    int64_t i = 0;
    for (; i + VL <= Fw; i += VL) {
        vfetch(gu + i);
        vfetch(gu + Fw + i);
        vfetch(da + i);
        backward_vector(bfloat16, dgu, a, da, gu, Fw, i, VL);
    }
    if (i < Fw) backward_vector(bfloat16, dgu, a, da, gu, Fw, i, Fw - i);
}

static void swiglu_forward(float *restrict a, const float *restrict gu, int64_t rows, int64_t Fw, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) forward_row(false, a + r * Fw, gu + r * 2 * Fw, Fw);
}

static void swiglu_forward_bf16(uint16_t *restrict a, const float *restrict gu, int64_t rows, int64_t Fw, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) forward_row(true, a + r * Fw, gu + r * 2 * Fw, Fw);
}

static void swiglu_backward(float *dgu, float *restrict a, const float *restrict da, const float *gu, int64_t rows,
                            int64_t Fw, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        backward_row(false, dgu + r * 2 * Fw, a ? a + r * Fw : NULL, da + r * Fw, gu + r * 2 * Fw, Fw);
}

static void swiglu_backward_bf16(uint16_t *restrict dgu, uint16_t *restrict a, const float *restrict da,
                                 const float *restrict gu, int64_t rows, int64_t Fw, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        backward_row(true, dgu + r * 2 * Fw, a ? a + r * Fw : NULL, da + r * Fw, gu + r * 2 * Fw, Fw);
}

void SEL_FN(sel_ops_swiglu_init)(sel_ops *ops)
{
    ops->swiglu_forward = swiglu_forward;
    ops->swiglu_backward = swiglu_backward;
    ops->swiglu_forward_bf16 = swiglu_forward_bf16;
    ops->swiglu_backward_bf16 = swiglu_backward_bf16;
}
