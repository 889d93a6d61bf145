/* choice.h: who makes the matrix products of a model, measured once and then kept as a line of text.
 *
 *     qkv=mmi,o_proj=mmi,gate_up=mmm,down_proj=mmi,lm_head=mmm
 *
 * A letter (ops/linear.h) for each layer's forward, input-gradient and weight-gradient product.
 */
#ifndef SEL_CORE_MODEL_CHOICE_H
#define SEL_CORE_MODEL_CHOICE_H

#include <stddef.h>
#include "core/model/layout.h"
#include "ops/linear.h"

enum { SEL_CHOICE_MAX = 128 };

/* Measures the products of a model's training step with micro-batches of `rows` tokens on the engine (oneDNN) and
   writes the line. */
sel_status sel_choice_probe(sel_linear_engine *e, const sel_dims *d, int64_t rows, char text[SEL_CHOICE_MAX]);

/* Makes the engine follow the line; before its matrices are made.  SEL_EUSER saying what is wrong with it. */
sel_status sel_choice_apply(sel_linear_engine *e, const sel_dims *d, const char *text);

#endif
