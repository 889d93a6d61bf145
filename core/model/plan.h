/* plan.h: a model's memory: what is kept for backward, what is scratch.  Only core/model includes it.
 *
 * T = batch * tokens rows; where ranks share sequences those of this rank: [chunk][batch][each].
 * Kept a layer: what backward cannot cheaply rebuild.  Rebuilt:
 * the norms' outputs, the normed q and k, silu(gate) * up.
 */
#ifndef SEL_CORE_MODEL_PLAN_H
#define SEL_CORE_MODEL_PLAN_H

#include "core/model/model.h"

/* One layer's kept activations; forward-only uses share one set among all layers. */
typedef struct {
    float *x_in;      /* [T][D]   residual stream coming in */
    float *rstd1;     /* [T]      of the attention norm */
    float *qkv;       /* [T][qkv_width]   q, k (before their norm), v; sel_q, sel_k where the layer has them */
    float *rstd_q;    /* [T][H]   of the q norm */
    float *rstd_k;    /* [T][Hkv] */
    void *att;        /* [T][H dh]   attention's output, an operand */
    float *lse;       /* [batch][H][tokens]; shared sequences: [chunks][batch][H][each] */
    float *saved;     /* [batch][carries][tokens]; shared: one after another those of each chunk */
    int64_t *m_row;   /* [batch]  row of the memory loss */
    float *dead_after; /* [batch]  F beyond which a key is left out */
    float *x_mid;     /* [T][D]   residual stream between the two halves */
    float *rstd2;     /* [T]      of the feed-forward norm */
    float *gu;        /* [T][2 F] gate, up */
} sel_kept;

/* What attention found in a sequence and layer: the largest M and its row, pairs of a row and a live key. */
typedef struct {
    double m_max, live;
    int64_t m_row;
} sel_finding;

/* A layer's linear layers, packed. */
typedef struct {
    sel_linear *qkv, *o_proj, *gate_up, *down_proj;
} sel_layer_linears;

struct sel_model {
    const sel_layout *layout;
    sel_model_options opt;
    sel_layer_linears *linears;   /* [L] */
    sel_linear *lm_head;

    char *memory;                 /* the one block behind all arrays below */
    size_t bytes, kept_bytes;     /* of the block; of what backward needs of it */
    sel_kept *kept;               /* [L]; all alike unless training */
    float *x;                     /* [T][D]   residual stream after the last layer; unless training, all along */
    float *rstd_final;            /* [T] */

    /* scratch */
    float *h;                     /* [T][D]   a branch's result; a norm's output where operands are float32 */
    void *normed;                 /* [T][normed_width]   operands: q and k after their norm, and see normed_width */
    void *act;                    /* [T][F]   silu(gate) * up, an operand */
    uint16_t *h16;                /* [T][D]   a norm's output as bfloat16; these three only where operands are */
    uint16_t *logits16;           /* [logit_rows][V]   gradient */
    uint16_t *dx16, *dqkv16;      /* [T][D]: dx rounded; [T][qkv_width] */
    float *logits;                /* [logit_rows][V] */
    int64_t logit_rows;
    double *logp;                 /* [logit_rows] */
    uint8_t *best;                /* [logit_rows] */
    int32_t *inputs, *targets;    /* [T] */
    double *m_max;                /* [batch] */
    double *live;                 /* [batch]  pairs of a row and a live key */
    double *live_share;           /* [L]  of the last call */
    void *attention;              /* attention's workspace */

    /* training */
    float *dx, *dh;               /* [T][D] */
    float *dqkv;                  /* [T][qkv_width] */
    void *datt;                   /* [T][H dh], an operand */
    void *dgu;                    /* [T][2 F], an operand */
    float *da;                    /* [T][F] */
    float *partial;               /* [threads][max(D, 2 dh)] */

    /* sequences shared with other ranks (shared.c) */
    sel_chunks chunks;            /* ranks 1, chunks 1 where they are not */
    float *sums;                  /* [batch][sel_sequence_row]  those of the chunks before, or after */
    sel_finding *found, *all_found;   /* [L][batch] of this rank; [ranks] of them */

    /* decoding */
    void **k_cache, **v_cache;    /* [L] of [batch][N][Hkv dh], operands */
    void **sel_k_cache;           /* [L] of [batch][N][dh], where the selection has projections of its own */
    float **carry;                /* [L] of [batch][N]: F of each cached token */
    int64_t cached;
};

/* The widths that come up everywhere. */
static inline int64_t q_width(const sel_dims *d) { return d->H * d->dh; }
static inline int64_t kv_width(const sel_dims *d) { return d->Hkv * d->dh; }
static inline int64_t sel_width(const sel_dims *d) { return d->bilinear ? d->dh : 0; }
static inline int64_t qkv_width(const sel_dims *d) { return q_width(d) + 2 * kv_width(d) + 2 * sel_width(d); }
static inline int64_t sel_column(const sel_dims *d) { return q_width(d) + 2 * kv_width(d); }   /* sel_q's in qkv */

/* The operands of matrix products are bfloat16 or float32: bytes of one, and where the i-th of an array lies. */
static inline sel_dtype operand_type(const sel_model *m) { return m->opt.bfloat16 ? SEL_BFLOAT16 : SEL_FLOAT32; }
static inline size_t operand_bytes(const sel_model *m) { return m->opt.bfloat16 ? sizeof(uint16_t) : sizeof(float); }
static inline void *operand_at(const sel_model *m, void *x, int64_t i)
{
    return (char *)x + i * (int64_t)operand_bytes(m);
}

/* Of a row of m->normed.  In bfloat16 v and the selection's projections follow q and k, rounded, as they lie in qkv; in
   float32 attention reads them there. */
static inline int64_t normed_width(const sel_model *m)
{
    const sel_dims *d = &m->layout->dims;
    return m->opt.bfloat16 ? qkv_width(d) : q_width(d) + kv_width(d);
}

/* Tokens of this rank in `batch` sequences of n. */
static inline int64_t own_rows(const sel_model *m, int64_t batch, int64_t n) { return batch * n / m->chunks.ranks; }

/* Rows of logits that exist at once in a call over `rows` rows.  (model.c) */
int64_t sel_model_logit_rows(const sel_dims *d, int64_t rows);

/* FLOPs of attention forward: causal products (spec, section 16), two a head; the selection's own logits are one more.
   Kernels' backward does 2.5 times that. */
static inline double attention_flops(const sel_dims *d, int64_t batch, int64_t n)
{
    return (4.0 * (double)q_width(d) + 2.0 * (double)sel_width(d)) * (double)n * (double)(n + 1) / 2.0 * (double)batch;
}

/* Threads for the passes over `rows` rows: one where waking another costs more than it takes over (decoding). */
static inline int pass_threads(const sel_model *m, int64_t rows) { return rows < 32 ? 1 : m->opt.threads; }

/* The attention call of layer l for `batch` sequences of n tokens, without a cache, on what sel_model_norm_qk made. */
sel_attention sel_model_attention(const sel_model *m, int64_t l, int64_t batch, int64_t n);

/* Whether attention leaves out dead keys (spec, section 3.1). */
static inline bool sel_model_leaves_out(const sel_model *m)
{
    return m->opt.attention.selective && m->opt.attention.dead_keys != SEL_DEAD_KEYS_OFF &&
           m->opt.use != SEL_USE_DECODE;
}

/* Attention of layer l over sequences that ranks share: forward; what all layers found, added up (to *memory, sum of
   max M); backward, gradients into m->dqkv.  (shared.c) [collective] */
void sel_shared_attention(sel_model *m, int64_t l, int64_t batch);
void sel_shared_findings(sel_model *m, int64_t batch, double *memory);
void sel_shared_attention_backward(sel_model *m, int64_t l, int64_t batch, double memory_scale);

/* The attention call of one of this rank's chunks, keys where the ranks share them (NULL: sizes only).  (shared.c) */
sel_attention sel_shared_call(const sel_model *m, int64_t l, int64_t batch, int k, const void *keys);

/* The F beyond which a key is left out, from the gap that attention_gap found over a sequence of n.  (forward.c) */
float sel_model_dead_after(const sel_model *m, float gap, int64_t n);

/* The weight of the memory loss in each F of its row (sel_attention_grad). */
static inline float memory_coefficient(const sel_model *m, int64_t n, double memory_scale)
{
    return (float)(memory_scale / ((double)(m->layout->dims.L * n) * m->opt.attention.tau));
}

/* Residual stream through all layers: m->inputs [batch][n] to the last layer's x_mid and m->h, the last branch,
   which is still to be added.  (forward.c) */
sel_status sel_model_forward(sel_model *m, const float *params, int64_t batch, int64_t n, double *memory);

/* Where a norm's output goes that is an operand of a product. */
static inline void *norm_operand(const sel_model *m) { return m->opt.bfloat16 ? (void *)m->h16 : (void *)m->h; }

/* A layer's products, each a lap of the profile: `part` is the layer's forward one.  dx is an array of `type`.
   (product.c) */
sel_status sel_model_product(const sel_model *m, sel_linear *w, sel_part part, int64_t rows, const void *x,
                             int64_t x_row, float *y, int64_t y_row);
sel_status sel_model_product_input(const sel_model *m, sel_linear *w, sel_part part, int64_t rows, const void *dy,
                                   int64_t dy_row, void *dx, sel_dtype type, int64_t dx_row);
sel_status sel_model_product_weight(const sel_model *m, sel_linear *w, sel_part part, int64_t rows, const void *dy,
                                    int64_t dy_row, const void *x, int64_t x_row, float *dw, bool add);

/* The residual stream x + m->h to sum (which may be x) and its RMSNorm with the scale at `offset` of params, as an
   operand; rstd may be NULL. */
static inline const void *residual_normed(const sel_model *m, const float *params, int64_t offset, float *rstd,
                                          float *sum, const float *x, int64_t rows)
{
    const int64_t D = m->layout->dims.D;
    void *const h = norm_operand(m);
    m->opt.ops->residual_norm(h, m->opt.bfloat16, rstd, sum, x, m->h, params + offset, rows, D, pass_threads(m, rows));
    sel_profile_lap(m->opt.profile, SEL_PART_NORM, 0.0, (double)(rows * D) * (m->opt.bfloat16 ? 14.0 : 16.0));
    return h;
}

/* A layer's rows of qkv for the q/k norm. */
sel_qkv_rows sel_model_qkv_rows(const sel_model *m, const float *params, int64_t l, int64_t rows);

/* What attention reads of a layer's qkv into m->normed, forward, or again for backward. */
void sel_model_norm_qk(const sel_model *m, const float *params, int64_t l, int64_t rows, bool again);

/* Rows of the output matrix in slices: log-probabilities, and, grads not NULL, gradients: of the output matrix (=, or
   += where add) and final norm (+=) into grads, of the residual stream into m->dx.  (head.c) */
sel_status sel_model_head(sel_model *m, const float *params, float *grads, bool add, int64_t rows, double loss_scale,
                          double *logp, uint8_t *best, sel_batch_stats *stats);

/* Splits tokens [batch][n + 1] into m->inputs and m->targets; SEL_EFILE for an id outside the vocabulary. */
sel_status sel_model_take_tokens(sel_model *m, const int32_t *tokens, int64_t batch, int64_t n);

#endif
