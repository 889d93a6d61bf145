/* ops.c: fills the table of operations: plain C first, the processor's levels laid over it. */
#include "ops/ops.h"

#include <string.h>
#include "ops/levels.h"

void sel_ops_init(sel_ops *ops, sel_cpu_level level)
{
    memset(ops, 0, sizeof *ops);
    ops->level = SEL_CPU_C;
    sel_ops_embed_init_c(ops);
    sel_ops_norm_init_c(ops);
    sel_ops_swiglu_init_c(ops);
    sel_ops_cross_entropy_init_c(ops);
    sel_ops_adamw_init_c(ops);
    sel_ops_attention_forward_init_c(ops);
    sel_ops_attention_backward_init_c(ops);
    sel_ops_attention_carry_init_c(ops);
    sel_ops_attention_gap_init_c(ops);

#ifdef SEL_X86
    if (level < SEL_CPU_AVX2) return;
    ops->level = SEL_CPU_AVX2;
    sel_ops_embed_init_avx2(ops);
    sel_ops_norm_init_avx2(ops);
    sel_ops_swiglu_init_avx2(ops);
    sel_ops_cross_entropy_init_avx2(ops);
    sel_ops_adamw_init_avx2(ops);
    sel_ops_attention_forward_init_avx2(ops);
    sel_ops_attention_backward_init_avx2(ops);
    sel_ops_attention_carry_init_avx2(ops);
    sel_ops_attention_gap_init_avx2(ops);

    if (level < SEL_CPU_AVX512) return;
    ops->level = SEL_CPU_AVX512;
    sel_ops_embed_init_avx512(ops);
    sel_ops_norm_init_avx512(ops);
    sel_ops_swiglu_init_avx512(ops);
    sel_ops_cross_entropy_init_avx512(ops);
    sel_ops_adamw_init_avx512(ops);
    sel_ops_attention_forward_init_avx512(ops);
    sel_ops_attention_backward_init_avx512(ops);
    sel_ops_attention_carry_init_avx512(ops);
    sel_ops_attention_gap_init_avx512(ops);
    sel_ops_attention_words_init_avx512(ops);

    if (level < SEL_CPU_AVX512BF16) return;
    ops->level = SEL_CPU_AVX512BF16;
    sel_ops_attention_words_init_avx512bf16(ops);
#else
    (void)level;   /* only C is compiled for this processor */
#endif
}
