/* layout.h: the table of all parameters: names, shapes, places in one array.  Pure arithmetic.
 *
 * Parameters, gradients and moments are one array each over the same layout.  Matrices
 * that one product reads together (q, k, v; gate, up) are neighbours without a gap.
 */
#ifndef SEL_CORE_MODEL_LAYOUT_H
#define SEL_CORE_MODEL_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>
#include "core/base/error.h"
#include "core/config/config.h"

/* The sizes of spec, section 7. */
typedef struct {
    int64_t V, N, D, L, H, Hkv, dh, F;
    bool bilinear;          /* selection has projections of its own, sel_q and sel_k */
} sel_dims;

typedef struct {
    char name[64];          /* as in checkpoints */
    int64_t shape[2];       /* [rows, columns], or [n, 1] with rank 1 */
    int rank;
    int64_t offset, count;  /* in floats */
    double init_std;        /* truncated normal; 0: all ones */
    bool decay;             /* weight decay applies */
} sel_tensor;

/* Offsets of one layer's tensors; qkv is q_proj, k_proj, v_proj (and sel_q, sel_k) as one
   matrix [(H + 2 Hkv (+ 2)) dh][D], gate_up is gate_proj, up_proj as one [2 F][D]. */
typedef struct {
    int64_t attn_norm, qkv, o_proj, q_norm, k_norm, ffn_norm, gate_up, down_proj;
    int64_t begin, end;     /* the layer's stretch of the array */
} sel_layer_offsets;

typedef struct {
    sel_dims dims;
    int n_tensors;
    sel_tensor *tensors;
    sel_layer_offsets *layers;
    int64_t tok_embed, pos_embed, final_norm, lm_head;
    int64_t total;          /* floats of the array, alignment gaps included */
    int64_t parameters;     /* floats of all tensors */
} sel_layout;

sel_dims   sel_dims_of(const sel_config *c, int64_t vocab);
sel_status sel_layout_new(sel_layout **l, const sel_dims *dims);
void       sel_layout_free(sel_layout **l);

/* The tensor with that name, or NULL. */
const sel_tensor *sel_layout_find(const sel_layout *l, const char *name);

/* Initial values into params [total], keyed by (seed, tensor name, element); gaps are zero. */
void sel_layout_init_params(const sel_layout *l, uint64_t seed, float *params, int threads);

#endif
