/* tree.h: sums of arrays in one fixed binary tree.
 *
 * The tree over n arrays: the first 2^k < n of them, and the rest, each a tree; their sums are added.
 * So the tree over 2^a hosts of trees over 2^b ranks is the tree over all 2^(a+b) ranks.
 */
#ifndef SEL_DIST_TREE_H
#define SEL_DIST_TREE_H

#include <stdint.h>

/* out[j][i] = the tree over in[0 .. n_in)[i], for i < count and all j < n_out, in float32.  Arrays are the same or
   do not overlap; n_in = 1 copies. */
void sel_tree_sum(float *const *out, int n_out, const float *const *in, int n_in, int64_t count, int threads);

/* The same over the `n` numbers x[0], x[stride], ... */
double sel_tree_sum_doubles(const double *x, int n, int stride);

/* To bfloat16, to nearest even (NaN stays NaN), and back: a relative error of at most 2^-9. */
void sel_to_bfloat16(uint16_t *y, const float *x, int64_t n, int threads);
void sel_from_bfloat16(float *y, const uint16_t *x, int64_t n, int threads);

#endif
