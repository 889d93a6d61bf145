/* profile.h: where the time of a step goes: seconds, FLOPs and bytes of each part.
 *
 * One reading of the clock ends a part and begins the next, so the parts' seconds add up to
 * the whole and nothing hides between them.  Always compiled: a lap costs some 30 ns.
 */
#ifndef SEL_CORE_BASE_PROFILE_H
#define SEL_CORE_BASE_PROFILE_H

#include <stdint.h>

/* Part, its name, its pass.  The three passes of a linear layer follow each other, forward first. */
#define SEL_PARTS(X)                                             \
    X(DATA, "data", "forward")                                   \
    X(EMBED, "embed", "forward")                                 \
    X(EMBED_BACKWARD, "embed", "backward")                       \
    X(NORM, "norm", "forward")                                   \
    X(NORM_BACKWARD, "norm", "backward")                         \
    X(QKV, "qkv", "forward")                                     \
    X(QKV_INPUT, "qkv", "backward_input")                        \
    X(QKV_WEIGHT, "qkv", "backward_weight")                      \
    X(QK_NORM, "qk_norm", "forward")                             \
    X(QK_NORM_BACKWARD, "qk_norm", "backward")                   \
    X(ATTENTION, "attention", "forward")                         \
    X(ATTENTION_BACKWARD, "attention", "backward")               \
    X(O_PROJ, "o_proj", "forward")                               \
    X(O_PROJ_INPUT, "o_proj", "backward_input")                  \
    X(O_PROJ_WEIGHT, "o_proj", "backward_weight")                \
    X(GATE_UP, "gate_up", "forward")                             \
    X(GATE_UP_INPUT, "gate_up", "backward_input")                \
    X(GATE_UP_WEIGHT, "gate_up", "backward_weight")              \
    X(SWIGLU, "swiglu", "forward")                               \
    X(SWIGLU_BACKWARD, "swiglu", "backward")                     \
    X(DOWN_PROJ, "down_proj", "forward")                         \
    X(DOWN_PROJ_INPUT, "down_proj", "backward_input")            \
    X(DOWN_PROJ_WEIGHT, "down_proj", "backward_weight")          \
    X(LM_HEAD, "lm_head", "forward")                             \
    X(LM_HEAD_INPUT, "lm_head", "backward_input")                \
    X(LM_HEAD_WEIGHT, "lm_head", "backward_weight")              \
    X(CROSS_ENTROPY, "cross_entropy", "forward")                 \
    X(SHARE, "share_keys", "step")                               \
    X(ZERO, "zero_gradients", "step")                            \
    X(REDUCE, "reduce", "step")                                  \
    X(GRADIENT_NORM, "gradient_norm", "step")                    \
    X(OPTIMIZER, "adamw", "step")                                \
    X(PACK, "pack_weights", "step")                              \
    X(OTHER, "other", "step")

#define SEL_PART_ENUM(id, name, pass) SEL_PART_##id,
typedef enum { SEL_PARTS(SEL_PART_ENUM) SEL_N_PARTS } sel_part;
#undef SEL_PART_ENUM

typedef struct {
    double seconds, flops, bytes;   /* bytes: every array of the part read or written once */
    int64_t laps;
} sel_part_sum;

/* Zeroed it is ready; only its owner's thread writes it. */
typedef struct {
    double mark;                    /* the clock at the end of the last lap */
    sel_part_sum parts[SEL_N_PARTS];
} sel_profile;

const char *sel_part_name(sel_part p);
const char *sel_part_pass(sel_part p);

/* What follows is not waited for: the clock starts here.  NULL is fine, in both. */
void sel_profile_start(sel_profile *p);

/* The time since the last lap, or the start, was spent on that part. */
void sel_profile_lap(sel_profile *p, sel_part part, double flops, double bytes);

#endif
