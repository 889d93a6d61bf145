/* attention.h: selective attention, fused and tiled: O(N) memory (spec, sections 2, 3, 5).
 *
 *     L[h,i,j] = q[h,i] . k[g(h),j] / sqrt(dh)     for max(0, i - window + 1) <= j <= i
 *     S[i,j]   = relu(L[0,i,j]);  S[i,0] = 0;  S[i,i] = 0          (L[0]: or sel_q[i] . sel_k[j] / sqrt(dh))
 *     F[i,j]   = sum over k <= i-1 of S[k,j]
 *     out[h,i] = softmax_j(L[h,i,:] - F[i,:]) . v[g(h),:]        g(h) = h * Hkv / H
 *
 * No N x N matrix exists.  Rows are queries, columns keys; "position" is the place
 * in the sequence, so that a call may cover only rows [i0, i1) of it: in a shard of
 * the sequence, in prefill, in decoding (one row).
 */
#ifndef SEL_OPS_ATTENTION_H
#define SEL_OPS_ATTENTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* How many carries forward saves for backward over `rows` rows: one a group of row tiles,
   at most 64, so O(N) memory; the carries inside a group are rebuilt from head 0. */
int64_t sel_attention_carries(int64_t rows);

/* Floats that `saved` takes for any call of up to `rows` rows, a sequence (fewer rows may save more carries). */
int64_t sel_attention_saved_size(int64_t rows);

typedef struct {
    /* Shape.  Rows [i0, i1) attend to keys [0, i1).  heads is a multiple of kv_heads. */
    int64_t B, heads, kv_heads, dh;
    int64_t i0, i1;
    int64_t window;        /* keys a row sees, itself included; 0: all */

    /* Switches of spec, section 2.  selective false: F = 0, all else ignored. */
    bool selective, relu, protect_bos, protect_self, shift;

    /* The type of all operands of matrix products: q, k, v, sel_q, sel_k, out (o_proj's) and dout are arrays of
       bfloat16 (uint16_t), or of float32; P, dZ and dS are rounded to it.  All else, sums included, is float32. */
    bool bfloat16;

    /* q [B][i1-i0][heads][dh], k and v [B][i1][kv_heads][dh]: strides in values
       of a sequence and of a token; heads are dh apart. */
    const void *q, *k, *v;
    int64_t q_seq, q_row, k_seq, k_row, v_seq, v_row;

    /* What makes S where it is not head 0 (source bilinear): sel_q [B][i1-i0][dh], sel_k [B][i1][dh], strides as
       above.  NULL, both: head 0.  Ignored unless selective. */
    const void *sel_q, *sel_k;
    int64_t sel_q_seq, sel_q_row, sel_k_seq, sel_k_row;

    /* out [B][i1-i0][heads][dh] */
    void *out;
    int64_t out_seq, out_row;

    /* lse [B][heads][i1-i0]: log-sum-exp of each row, for backward. */
    float *lse;

    /* carry_in [B][carry_seq]: column sums of S over the rows before i0 (its keys
       [0, i0) are read); NULL: zero.  carry_out [B][carry_seq]: the same over the rows
       before i1, for keys [0, i1); may be carry_in; NULL: not wanted. */
    const float *carry_in;
    float *carry_out;
    int64_t carry_seq;

    /* saved [B][sel_attention_carries(i1 - i0)][i1]: carries at the starts of the groups
       of row tiles, written by forward, read by backward; NULL where no backward
       follows.  Ignored unless selective. */
    float *saved;

    /* Memory loss (spec, section 5), where tau > 0: forward writes the largest
       M[i] = i + 1 - sum over j of min(F[i,j], tau) / tau of each sequence's rows into
       m_max [B] and its row (a position; the smallest among equals) into m_row [B].
       For whole causal attention only: tau > 0 needs window 0. */
    double tau;
    double *m_max;
    int64_t *m_row;

    /* Dead keys (spec, section 3.1), where dead_after [B] is given: a key whose F has passed dead_after[b] where a
       group of row tiles begins is left out from there on: P = 0, no gradient, F stays as it was.  Thresholds from
       attention_gap (ops.h); at least tau; the same in all calls that share a sequence, backward included.  Where
       dead_margin > 0 forward, of whole sequences, sets them itself first, when it has q and k at hand:
       max(tau, gap + dead_margin); else dead_margin is 0.
       Needs relu and no window.  live [B], NULL: not wanted: pairs (i, j <= i) of a row and a live key.
       carry_out of a dead key is a lower bound. */
    float *dead_after;
    double dead_margin;
    double *live;

    /* Scratch of sel_attention_workspace bytes, 64-byte aligned. */
    void *workspace;
    int threads;
} sel_attention;

/* Value i of an operand array of the call. */
static inline const void *sel_attention_at(const sel_attention *a, const void *x, int64_t i)
{
    return (const char *)x + i * (a->bfloat16 ? (int64_t)sizeof(uint16_t) : (int64_t)sizeof(float));
}

/* What backward needs besides the forward's arguments (q, k, v, out, lse, saved, m_row
   as forward left them; carry_in as forward got it). */
typedef struct {
    const void *dout;      /* [B][i1-i0][heads][dh] with out's type and strides */
    float *dq, *dk, *dv;   /* float32; overwritten; strides of a sequence and a token below */
    int64_t dq_seq, dq_row, dk_seq, dk_row, dv_seq, dv_row;

    /* Where sel_q and sel_k make S: all that comes through F, and head 0's q and k get none of it; overwritten. */
    float *dsel_q, *dsel_k;
    int64_t dsel_q_seq, dsel_q_row, dsel_k_seq, dsel_k_row;

    /* dF of the rows after i1 summed over rows, [B][carry_seq] for keys [0, i1); NULL:
       zero.  dcarry_out [B][carry_seq]: the same with the rows of this call; NULL: not
       wanted; may be dcarry_in. */
    const float *dcarry_in;
    float *dcarry_out;

    /* Gradient of the whole loss with respect to each F[i*,j] < tau of the arg-max
       row, negated: dF[i*,j] -= memory_coef.  0: no memory loss. */
    float memory_coef;
} sel_attention_grad;

/* Bytes of scratch that forward and attention_carry (backward false) or backward and attention_carry_backward need for
   these sizes. */
size_t sel_attention_workspace(const sel_attention *a, bool backward);

/* attention_forward and attention_backward (ops.h). */
typedef void sel_attention_forward_fn(const sel_attention *a);
typedef void sel_attention_backward_fn(const sel_attention *a, const sel_attention_grad *g);

/* A sequence whose rows are dealt to several calls (spec, section 4) that do not wait for each other's carries: these
 * two passes over the selection alone, head 0's q and k or sel_q and sel_k, give what the calls must tell each other.
 * Both are for selective causal attention: window 0.
 *
 * attention_carry, before forward: carry_out = carry_in + column sums of S over the call's rows, for keys [0, i1).
 * With carry_in NULL an exclusive prefix sum over the calls, in order of position, is each one's carry_in for forward;
 * S is made of the same products as there.  Of the arrays only q, k, sel_q, sel_k and the carries are used; dead keys
 * are summed as all others (dead_after is ignored): carry_out is no lower bound.  The same bits for any number of
 * threads.
 *
 * attention_carry_backward, after backward with dcarry_in NULL: what dF of later calls' rows, dcarry_in, adds to the
 * gradients of this call's,
 *     dL[0][i,j] += dcarry_in[j] where S passed L on         dq, dk (head 0's) or dsel_q, dsel_k += from it
 * so that both together equal backward with that dcarry_in, up to rounding.  Backward's dcarry_out, with dcarry_in
 * NULL, is the column sums of dF over its own rows: an exclusive suffix sum over the calls is each one's dcarry_in.
 * Here dcarry_out is left alone: it would count dF twice.  Of g only dcarry_in (NULL: nothing to do), dq, dk, dsel_q
 * and dsel_k are used, of a's arrays q, k, sel_q, sel_k and, with dead_after, saved, as forward left it.  For equal
 * threads equal bits.
 */
typedef sel_attention_forward_fn sel_attention_carry_fn;
typedef sel_attention_backward_fn sel_attention_carry_backward_fn;

#endif
