/* levels.h: the one function that each kernel file (*_c.c) exports, once a level: it stores that file's
 * operations in the table.
 *
 * The definitions read SEL_FN(sel_ops_norm_init) (vec.h); sel_ops_init calls them in rising order, so a
 * level that lacks a file keeps the entries of the level below.
 */
#ifndef SEL_OPS_LEVELS_H
#define SEL_OPS_LEVELS_H

#include "ops/ops.h"

void sel_ops_embed_init_c(sel_ops *ops);                      /* embed_c.c */
void sel_ops_norm_init_c(sel_ops *ops);                       /* norm_c.c */
void sel_ops_swiglu_init_c(sel_ops *ops);                     /* swiglu_c.c */
void sel_ops_cross_entropy_init_c(sel_ops *ops);              /* cross_entropy_c.c */
void sel_ops_adamw_init_c(sel_ops *ops);                      /* adamw_c.c */
void sel_ops_attention_forward_init_c(sel_ops *ops);          /* attention_forward_c.c */
void sel_ops_attention_backward_init_c(sel_ops *ops);         /* attention_backward_c.c */
void sel_ops_attention_carry_init_c(sel_ops *ops);            /* attention_carry_c.c */
void sel_ops_attention_gap_init_c(sel_ops *ops);              /* attention_gap_c.c */

void sel_ops_embed_init_avx2(sel_ops *ops);
void sel_ops_norm_init_avx2(sel_ops *ops);
void sel_ops_swiglu_init_avx2(sel_ops *ops);
void sel_ops_cross_entropy_init_avx2(sel_ops *ops);
void sel_ops_adamw_init_avx2(sel_ops *ops);
void sel_ops_attention_forward_init_avx2(sel_ops *ops);
void sel_ops_attention_backward_init_avx2(sel_ops *ops);
void sel_ops_attention_carry_init_avx2(sel_ops *ops);
void sel_ops_attention_gap_init_avx2(sel_ops *ops);

void sel_ops_embed_init_avx512(sel_ops *ops);
void sel_ops_norm_init_avx512(sel_ops *ops);
void sel_ops_swiglu_init_avx512(sel_ops *ops);
void sel_ops_cross_entropy_init_avx512(sel_ops *ops);
void sel_ops_adamw_init_avx512(sel_ops *ops);
void sel_ops_attention_forward_init_avx512(sel_ops *ops);
void sel_ops_attention_backward_init_avx512(sel_ops *ops);
void sel_ops_attention_carry_init_avx512(sel_ops *ops);
void sel_ops_attention_gap_init_avx512(sel_ops *ops);
void sel_ops_attention_words_init_avx512(sel_ops *ops);   /* attention_avx512.c, over the two above */

void sel_ops_attention_words_init_avx512bf16(sel_ops *ops);   /* attention_avx512bf16.c */

#endif
