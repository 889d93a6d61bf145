/* attention_avx512.c: fused selective attention for AVX-512, float32 operands. */
#define WORD_BF16 0
#include "ops/attention_words_live.h"
#include "ops/attention_words_carry.h"
#include "ops/levels.h"

/* What this kernel does not cover, and bfloat16 operands, are the portable one's, which is in the table already. */
static sel_attention_forward_fn *portable_forward;
static sel_attention_backward_fn *portable_backward;
static sel_attention_carry_fn *portable_carry;
static sel_attention_carry_backward_fn *portable_carry_backward;

static void attention_forward(const sel_attention *a)
{
    if (!a->bfloat16 && attention_fits_words(a)) (a->dead_after ? forward_live : forward_words)(a);
    else portable_forward(a);
}

static void attention_backward(const sel_attention *a, const sel_attention_grad *g)
{
    if (!a->bfloat16 && attention_fits_words(a)) (a->dead_after ? backward_live : backward_words)(a, g);
    else portable_backward(a, g);
}

static void attention_carry(const sel_attention *a)
{
    if (!a->bfloat16 && attention_fits_words(a)) carry_words(a);
    else portable_carry(a);
}

static void attention_carry_backward(const sel_attention *a, const sel_attention_grad *g)
{
    if (!a->bfloat16 && attention_fits_words(a)) carry_backward_words(a, g);
    else portable_carry_backward(a, g);
}

void sel_ops_attention_words_init_avx512(sel_ops *ops)
{
    portable_forward = ops->attention_forward;
    portable_backward = ops->attention_backward;
    portable_carry = ops->attention_carry;
    portable_carry_backward = ops->attention_carry_backward;
    ops->attention_forward = attention_forward;
    ops->attention_backward = attention_backward;
    ops->attention_carry = attention_carry;
    ops->attention_carry_backward = attention_carry_backward;
}
