/* attention_plan.h: how one attention call is cut into tiles and where its scratch lies.
 *
 * Shared by all versions of the kernel; only ops/ includes it.
 */
#ifndef SEL_OPS_ATTENTION_PLAN_H
#define SEL_OPS_ATTENTION_PLAN_H

#include "ops/attention.h"

enum {
    TILE = 64,      /* queries of a row tile, keys of a column tile */
    SUPER = 16,     /* column tiles whose F stays in cache while all heads pass over them */
    MOST_CARRIES = 64,
    LANES = 16      /* widest vector: rows of padded arrays are multiples of it */
};

/* Offsets are in floats from the start of the workspace. */
typedef struct {
    int64_t rows, tiles;          /* of this call: tiles = ceil(rows / TILE) */
    int64_t columns;              /* column tiles: ceil(i1 / TILE) */
    int64_t group, groups;        /* row tiles a saved carry stands for; how many carries */
    int64_t dhp;                  /* dh rounded up to LANES */
    bool copied;                  /* backward copies rows of q, k, v and dout: dh != dhp, or they are to be widened */
    int64_t thread0, thread_size; /* scratch of thread t at thread0 + t * thread_size */
    /* forward, in a thread's scratch */
    int64_t qt, ot, ml, f, tile, carry, began, rowsum, krows, vrows, sel_qt;
    int64_t carries;              /* shared: [groups][i1], where `saved` is NULL and threads share a sequence */
    /* backward, in a thread's scratch */
    int64_t l0, g, p, dz, dk, dv, kcopy, vcopy, dq, dsel_q, dsel_k, sel_kcopy;
    /* backward, packed sequences: set s at pack0 + s * pack_size; one a thread, or one for all */
    int64_t pack0, pack_size, qt_all, dot_all, lse_all, delta_all, q_rows, dout_rows, sel_qt_all, sel_q_rows;
    int64_t total;
} attention_plan;

attention_plan sel_attention_plan(const sel_attention *a, bool backward);

/* The same for the AVX-512 kernels (attention_words.h): in words of 32 bits, with room for either type of operand. */
typedef struct {
    int64_t rows, tiles, columns, group, groups;
    int64_t height;                                  /* rows of a row tile: fewer than TILE with dead keys */
    int64_t thread0, thread_size;
    int64_t slots;                                   /* forward: heads whose rows are kept between super-blocks, or 1 */
    int64_t qt, ot, ml, raw, redo, f, p, carry;      /* in a thread's scratch */
    int64_t carries;
    int64_t l0, g, pi, zi, zk, dk, dv, dq;           /* backward */
    int64_t pack0, pack_size, packs;                 /* set s at pack0 + s * pack_size: one a thread, or one for all */
    int64_t k, v;                                    /* packed keys and values, in a sequence's pack */
    int64_t k_pairs, qt_all, dot_all, lse_all, delta_all, q_rows, dout_rows;
    /* a selection with rows of its own: as qt, dq, dk, then in the pack as k, k_pairs, qt_all, q_rows; without room
       elsewhere */
    int64_t sel_qt, dsel_q, dsel_k, sel_k, sel_k_pairs, sel_qt_all, sel_q_rows;
    /* dead keys: lists of keys, backward: of those that the next list brings; their places, so many, and operands there
       (live_k: by row; live_v: forward by pairs, backward by row; live_pairs: backward); backward: tiles of keys taken
       together, sums of gradients, dF */
    int64_t lists, list_size, coming, held, where, places, live_k, live_v, live_pairs, live_sel_k, live_sel_pairs;
    int64_t live_tiles, live_dk, live_dv, live_dsel_k, dcarry;
    int64_t total;
} words_plan;

/* The AVX-512 kernels take pairs of column tiles and, in backward, of row tiles together. */
enum {
    SIDE = 2,
    LIVE_SIDE = 4,   /* with dead keys: tiles of one row tile's live keys */
    MOST_PACKS = 4   /* of threads that share a sequence in forward: so many pack its keys each for itself */
};

words_plan sel_attention_words_plan(const sel_attention *a, bool backward);

/* Theirs of attention_carry and attention_carry_backward (attention_words_carry.h). */
typedef struct {
    int64_t rows, height;            /* height: rows of a row tile */
    int64_t tiles, columns;
    int64_t group, groups;           /* with dead keys: row tiles a saved carry stands for; how many carries */
    int64_t thread0, thread_size;
    int64_t kt;                      /* forward, in a thread's scratch */
    int64_t z, zk, dk, dq;           /* backward */
    int64_t pack0, pack_size;
    int64_t qt;                      /* in a sequence's pack; the rest backward's alone */
    int64_t q_rows, k, k_pairs, list, dcarry;
    int64_t total;
} carry_plan;

carry_plan sel_attention_carry_plan(const sel_attention *a, bool backward);

/* Does the selection have rows of its own, or is it made of head 0's? */
static inline bool attention_bilinear(const sel_attention *a) { return a->selective && a->sel_q; }

/* What S is made of: the rows that begin with the call's first and all keys, of the first sequence; dh values a row. */
typedef struct {
    const void *q, *k;
    int64_t q_seq, q_row, k_seq, k_row;
} selection_source;

static inline selection_source attention_selection(const sel_attention *a)
{
    if (attention_bilinear(a))
        return (selection_source){ .q = a->sel_q, .q_seq = a->sel_q_seq, .q_row = a->sel_q_row,
                                   .k = a->sel_k, .k_seq = a->sel_k_seq, .k_row = a->sel_k_row };
    return (selection_source){ .q = a->q, .q_seq = a->q_seq, .q_row = a->q_row,
                               .k = a->k, .k_seq = a->k_seq, .k_row = a->k_row };
}

/* Its gradients. */
typedef struct {
    float *dq, *dk;
    int64_t dq_seq, dq_row, dk_seq, dk_row;
} selection_gradients;

static inline selection_gradients attention_selection_gradients(const sel_attention *a, const sel_attention_grad *g)
{
    if (attention_bilinear(a))
        return (selection_gradients){ .dq = g->dsel_q, .dq_seq = g->dsel_q_seq, .dq_row = g->dsel_q_row,
                                      .dk = g->dsel_k, .dk_seq = g->dsel_k_seq, .dk_row = g->dsel_k_row };
    return (selection_gradients){ .dq = g->dq, .dq_seq = g->dq_seq, .dq_row = g->dq_row,
                                  .dk = g->dk, .dk_seq = g->dk_seq, .dk_row = g->dk_row };
}

/* Head widths that are no multiple of 16 go to the portable kernel. */
static inline bool attention_fits_words(const sel_attention *a) { return a->dh % LANES == 0; }

/* The first `whole` sequences are taken by one thread each, the rest by all threads together. */
static inline int64_t attention_whole(const sel_attention *a) { return a->B / a->threads * a->threads; }

#endif
