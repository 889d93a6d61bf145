/* ops.h: every operation of a training step but the linear layers: one table of
 * function pointers, filled once for the processor (C first, faster ones laid over it).
 * To add one: a member here, its code in a *_c.c file, that file's init in levels.h and
 * ops.c, its test in tests/ops_vectors.c.
 *
 * Arrays are float32, row-major, and do not overlap unless a comment says so.
 * `threads` OpenMP threads are used; for equal threads results are equal to the bit.
 * n = 0 rows are allowed everywhere and do nothing.  NaN in gives NaN out.
 */
#ifndef SEL_OPS_OPS_H
#define SEL_OPS_OPS_H

#include <stdbool.h>
#include "ops/attention.h"
#include "ops/cpu.h"

/* Rows of the product that attention's q, k and v are made of.  Rows are x_row values apart; of each, q's heads come
   first, then k's, then `rest` values that have no norm: v, and what else the caller puts there. */
typedef struct {
    int64_t rows, heads, kv_heads, dh, rest;
    const float *x;
    int64_t x_row;
    const float *w_q, *w_k;     /* [dh]  the norms' scales */
    float *rstd_q, *rstd_k;     /* [rows][heads], [rows][kv_heads]  1 / rms */
} sel_qkv_rows;

typedef struct sel_ops {
    sel_cpu_level level;

    /* x [rows][D] = table[token] + positions[pos0 + r % n]: tok [vocab][D], pos [context][D];
       tokens [rows], n rows a sequence. */
    void (*embed_forward)(float *x, const int32_t *tokens, const float *tok, const float *pos, int64_t rows,
                          int64_t n, int64_t pos0, int64_t D, int threads);

    /* dtok[token] += dx, dpos[r % n] += dx; pos0 = 0. */
    void (*embed_backward)(float *dtok, float *dpos, const float *dx, const int32_t *tokens, int64_t rows,
                           int64_t n, int64_t D, int threads);

    /* y[r] = x[r] / rms(x[r]) * w with rms = sqrt(mean of squares + 1e-6); rstd [rows] = 1 / rms,
       NULL where not wanted. */
    void (*rmsnorm_forward)(float *y, float *rstd, const float *x, const float *w, int64_t rows, int64_t D,
                            int threads);

    /* sum = x + branch (sum may be x), then the norm of sum to y, which is bfloat16 or float32: the residual stream
       and what the next product reads of it, in one pass. */
    void (*residual_norm)(void *y, bool bfloat16, float *rstd, float *sum, const float *x, const float *branch,
                          const float *w, int64_t rows, int64_t D, int threads);

    /* dx = residual + gradient through the norm; residual is the other branch's gradient, NULL: none, and may be dx.
       dw [D] += ; scratch [threads][D].  Where not NULL: dx16 is dx rounded to bfloat16; y is the norm's output again
       as forward gave it, bfloat16 where dx16 is wanted, else float32. */
    void (*rmsnorm_backward)(float *dx, const float *residual, uint16_t *dx16, void *y, float *dw, const float *dy,
                             const float *x, const float *rstd, const float *w, float *scratch, int64_t rows,
                             int64_t D, int threads);

    /* q/k norm: y of each row is q and k normed, the same norm over each head's dh values; then, where y is bfloat16,
       the rest as it is, rounded.  In float32 the rest is read where it is: y has no place for it.  Writes rstd. */
    void (*qk_norm_forward)(void *y, bool bfloat16, int64_t y_row, const sel_qkv_rows *r, int threads);

    /* y again as qk_norm_forward gave it, from the rstd that it left. */
    void (*qk_norm_again)(void *y, bool bfloat16, int64_t y_row, const sel_qkv_rows *r, int threads);

    /* dx = gradient; dw_q, dw_k [dh] += ; scratch [threads][2 dh].  dx is bfloat16, and its rest is dy's rounded, or
       float32: then the rest is left alone and dx may be dy. */
    void (*qk_norm_backward)(void *dx, bool bfloat16, int64_t dx_row, float *dw_q, float *dw_k, const float *dy,
                             int64_t dy_row, const sel_qkv_rows *r, float *scratch, int threads);

    /* a [rows][Fw] = silu(gate) * up; gu [rows][2 Fw]: gate's Fw values, then up's. */
    void (*swiglu_forward)(float *a, const float *gu, int64_t rows, int64_t Fw, int threads);

    /* dgu [rows][2 Fw] from da and gu; dgu may be gu.  a, where not NULL, is rebuilt as forward gave it. */
    void (*swiglu_backward)(float *dgu, float *a, const float *da, const float *gu, int64_t rows, int64_t Fw,
                            int threads);

    /* rmsnorm_forward, swiglu_forward and swiglu_backward whose results go straight into products: y, a and dgu are
       bfloat16; otherwise as above (dgu may not be gu). */
    void (*rmsnorm_forward_bf16)(uint16_t *y, float *rstd, const float *x, const float *w, int64_t rows, int64_t D,
                                 int threads);
    void (*swiglu_forward_bf16)(uint16_t *a, const float *gu, int64_t rows, int64_t Fw, int threads);
    void (*swiglu_backward_bf16)(uint16_t *dgu, uint16_t *a, const float *da, const float *gu, int64_t rows, int64_t Fw,
                                 int threads);

    /* Per row of logits [rows][V] (in place): logp[r] = log softmax at target[r] in double;
       best[r] = 1 where target is the largest logit (first among equals), else 0; where
       grad_scale is not 0 the logits become grad_scale * (softmax - onehot), or, grad16 [rows][V] not NULL, that
       goes there as bfloat16 and the logits are spoilt.  A target < 0 is padding: logp 0, best 0, gradient 0. */
    void (*cross_entropy)(float *logits, uint16_t *grad16, double *logp, uint8_t *best, const int32_t *target,
                          float grad_scale, int64_t rows, int64_t V, int threads);

    /* AdamW (Loshchilov & Hutter) on n values: m, v moments; g is scaled by g_scale (clipping)
       first; correction1 = 1 - beta1^t, correction2 = 1 - beta2^t; w -= lr (mhat / (sqrt(vhat) + eps) + decay w). */
    void (*adamw)(float *w, float *m, float *v, const float *g, int64_t n, double g_scale, double lr, double beta1,
                  double beta2, double eps, double decay, double correction1, double correction2, int threads);

    /* Sum of squares in double over fixed blocks of 4,096 values, blocks added in order: the
       same for any thread count. */
    double (*sum_squares)(const float *x, int64_t n, int threads);

    sel_attention_forward_fn  *attention_forward;
    sel_attention_backward_fn *attention_backward;

    /* For sequences whose rows are dealt to several calls. */
    sel_attention_carry_fn          *attention_carry;
    sel_attention_carry_backward_fn *attention_carry_backward;

    /* gap [B]: for dead keys (attention.h): what a logit of the call's rows can exceed the largest L - F of its row by,
       at most; measured on q and k.  A key with F > gap + 104 has weight 0 in float32, all keys with F > gap + 17 +
       ln(i1) together weigh less than half a unit in the last place (spec, section 3.1). */
    void (*attention_gap)(const sel_attention *a, float *gap);
} sel_ops;

/* Fills the table for a level: plain C compiled for it, then the files that level adds. */
void sel_ops_init(sel_ops *ops, sel_cpu_level level);

#endif
