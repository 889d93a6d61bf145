/* reference.h: selective attention and the model in double precision, as plainly as they can be written.
 *
 * Made from the formulas alone (arXiv 2410.02703, figure 2 and equation 2; specification, sections 2, 5, 7, 8):
 * whole N x N matrices, nothing tiled, fused, threaded or shared with the product, which the tests hold
 * against it.  For tests: a function that runs out of memory says so and aborts.
 */
#ifndef SEL_TESTS_REFERENCE_H
#define SEL_TESTS_REFERENCE_H

#include <stdbool.h>
#include <stdint.h>

/* The wrong implementations that a test must catch. */
typedef enum {
    SEL_REF_RIGHT,
    SEL_REF_SUM_OVER_KEYS,       /* F accumulates along a row, not down a column */
    SEL_REF_NO_SHIFT,            /* a row's selection acts on the row itself */
    SEL_REF_FUTURE_VOTES,        /* S taken from the logits before the causal mask */
    SEL_REF_DIAGONAL_OF_FIRST,   /* S[i,i] = 0 in batch element 0 alone */
    SEL_REF_BOS_MASKED,          /* column 0 not protected */
    SEL_REF_RESTARTED,           /* rows from `restart` on know nothing of S before it */
    SEL_REF_ROUNDED_VOTES,       /* S from logits rounded to bfloat16, which softmax does not see */
    SEL_REF_HEAD0_VOTES,         /* S from head 0 although sel_q and sel_k are there */
    SEL_REF_HEAD0_SHARES,        /* head 0 gets the gradient of sel_q's and sel_k's logits too */
    SEL_REF_WRONG_END
} sel_ref_wrong;

const char *sel_ref_wrong_name(sel_ref_wrong wrong);

typedef struct {
    int64_t B, H, Hkv, N, dh;
    int64_t window;              /* keys a row sees, itself included; 0: all */
    bool selective, relu, protect_bos, protect_self, shift;
    const double *sel_q, *sel_k; /* [B][N][dh]: their logits make S; NULL: head 0's do */
    double tau;                  /* memory loss: M is wanted where tau > 0 */
    double memory_coef;          /* dF[i*,j] -= memory_coef where F[i*,j] < tau, j <= i* */
    sel_ref_wrong wrong;
    int64_t restart;             /* row of SEL_REF_RESTARTED */
} sel_ref_attention;

/* What is wanted; NULL: not.  The gradients need dout, and come all or not at all (those of sel_q and sel_k where these
   are). */
typedef struct {
    double *out;                 /* [B][N][H][dh] */
    double *lse;                 /* [B][H][N] */
    double *F;                   /* [B][N][N] */
    double *carry;               /* [B][N] column sums of S over all rows */
    double *m_max;               /* [B] the largest M[i] */
    int64_t *m_row;              /* [B] its row, the smallest among equals */
    const double *dout;          /* [B][N][H][dh] */
    double *dq, *dk, *dv;        /* [B][N][H or Hkv][dh], overwritten */
    double *dsel_q, *dsel_k;     /* [B][N][dh], overwritten */
    double *dcarry;              /* [B][N] column sums of dF over all rows */
} sel_ref_results;

/* q [B][N][H][dh], k and v [B][N][Hkv][dh]; head h reads key head h * Hkv / H. */
void sel_ref_attend(const sel_ref_attention *a, const double *q, const double *k, const double *v,
                    const sel_ref_results *r);

typedef struct {
    int64_t V, N, D, L, H, Hkv, dh, F;
    bool bilinear;               /* the layers have sel_q and sel_k */
} sel_ref_dims;

typedef struct {
    char name[64];
    int64_t rows, cols;          /* cols 1: a vector */
    int64_t offset;
} sel_ref_tensor;

/* The model's tensors in one array of *total numbers, without gaps; freed by the caller. */
sel_ref_tensor *sel_ref_tensors(const sel_ref_dims *d, int64_t *count, int64_t *total);

typedef struct {
    sel_ref_dims dims;
    sel_ref_attention attention; /* window, switches and tau; sizes and memory_coef are the model's to set */
    double epsilon;              /* of the memory loss; 0: none */
} sel_ref_model;

/* Mean cross-entropy of B sequences of n tokens over all targets >= 0 (inputs and targets [B][n]), and
   epsilon times the mean memory loss.  logp [B][n]: log p of each target, 0 where there is none; grad [total]:
   gradient of the two losses' sum, overwritten; either NULL: not wanted. */
void sel_ref_model_loss(const sel_ref_model *m, const double *params, const int32_t *inputs, const int32_t *targets,
                        int64_t B, int64_t n, double *loss, double *memory_loss, double *logp, double *grad);

#endif
