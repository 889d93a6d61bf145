/* attention_gap_c.c: how far a logit may exceed what the softmax of its row is sure to contain (spec, section 3.1). */
#include <math.h>
#include <string.h>
#include "ops/attention.h"
#include "ops/levels.h"
#include "ops/vec.h"

static float dot(const float *x, const float *y, int64_t n)
{
    vf s = vset1(0.0f);
    for (int64_t d = 0; d < n; d += VL) s += vload_n(x + d, n - d) * vload_n(y + d, n - d);
    return vsum(s);
}

/* S of a token on itself, at most. */
static float own_selection(const sel_attention *a, int64_t b, int64_t i, float slack)
{
    const bool bilinear = a->selective && a->sel_q;
    const float *const q = bilinear ? a->sel_q + b * a->sel_q_seq + (i - a->i0) * a->sel_q_row
                                    : a->q + b * a->q_seq + (i - a->i0) * a->q_row;
    const float *const k = bilinear ? a->sel_k + b * a->sel_k_seq + i * a->sel_k_row
                                    : a->k + b * a->k_seq + i * a->k_row;
    const float most = sqrtf(dot(q, q, a->dh) * dot(k, k, a->dh));
    const float s = (dot(q, k, a->dh) + 2.0f * slack * most) / (float)sqrt((double)a->dh);
    return s > 0.0f ? s : 0.0f;
}

/* The largest gap of head h of sequence b: |q| max |k| / sqrt(dh) bounds every logit of a row; its own token's and
   BOS's are there with F = 0 (the own token's F is its own S where neither shift nor protect_self is on). */
static float head_gap(const sel_attention *a, int64_t b, int64_t h)
{
    const int64_t dh = a->dh, kh = h * a->kv_heads / a->heads;
    const float *const q = a->q + b * a->q_seq, *const k = a->k + b * a->k_seq + kh * dh;
    const float root = (float)sqrt((double)dh), slack = a->bfloat16 ? 0x1p-6f : 0x1p-18f;   /* of rounded operands */
    float longest = 0.0f, gap = 0.0f;

    for (int64_t j = 0; j < a->i1; j++) {
        const float square = dot(k + j * a->k_row, k + j * a->k_row, dh);
        if (!(square <= longest)) longest = square;   /* NaN stays */
    }
    longest = sqrtf(longest);
    for (int64_t i = a->i0; i < a->i1; i++) {
        const float *const own = q + (i - a->i0) * a->q_row + h * dh;
        const float bound = sqrtf(dot(own, own, dh)) * longest / root;
        float sure = dot(own, k + i * a->k_row, dh) / root;
        if (!a->shift && !a->protect_self) sure -= own_selection(a, b, i, slack);
        if (a->protect_bos) {
            const float bos = dot(own, k, dh) / root;
            if (bos > sure) sure = bos;
        }
        const float here = bound * (1.0f + 2.0f * slack) - sure;
        if (!(here <= gap)) gap = here;
    }
    return gap;
}

static void attention_gap(const sel_attention *a, float *gap)
{
    const int64_t n = a->B * a->heads;
    memset(gap, 0, (size_t)a->B * sizeof *gap);
    #pragma omp parallel for num_threads(a->threads) schedule(static)
    for (int64_t s = 0; s < n; s++) {
        const float here = head_gap(a, s / a->heads, s % a->heads);
        #pragma omp critical(attention_gap)
        if (!(here <= gap[s / a->heads])) gap[s / a->heads] = here;   /* the largest: the same in any order */
    }
}

void SEL_FN(sel_ops_attention_gap_init)(sel_ops *ops) { ops->attention_gap = attention_gap; }
