/* product.c: a model's matrix products: the linear layers' calls, each a lap of the profile. */
#include "core/model/plan.h"

static size_t operand_bytes(const sel_model *m) { return m->opt.bfloat16 ? sizeof(uint16_t) : sizeof(float); }

/* Operands of `in` and `out` elements and a result of `to` floats, written (passes 1) or added to (2). */
static void lap(const sel_model *m, const sel_linear *w, int part, int64_t rows, double operands, double to, int passes)
{
    const double out = (double)sel_linear_out(w), in = (double)sel_linear_in(w);
    sel_profile_lap(m->opt.profile, (sel_part)part, 2.0 * (double)rows * out * in,
                    operands * (double)operand_bytes(m) + to * (double)passes * sizeof(float));
}

sel_status sel_model_product(const sel_model *m, sel_linear *w, sel_part part, int64_t rows, const void *x,
                             int64_t x_row, float *y, int64_t y_row)
{
    const double T = (double)rows, out = (double)sel_linear_out(w), in = (double)sel_linear_in(w);
    SEL_TRY(sel_linear_forward(w, rows, x, x_row, y, y_row));
    lap(m, w, (int)part, rows, T * in + out * in, T * out, 1);
    return SEL_OK;
}

sel_status sel_model_product_input(const sel_model *m, sel_linear *w, sel_part part, int64_t rows, const void *dy,
                                   int64_t dy_row, float *dx, int64_t dx_row)
{
    const double T = (double)rows, out = (double)sel_linear_out(w), in = (double)sel_linear_in(w);
    SEL_TRY(sel_linear_backward_input(w, rows, dy, dy_row, dx, dx_row));
    lap(m, w, (int)part + 1, rows, T * out + out * in, T * in, 1);
    return SEL_OK;
}

sel_status sel_model_product_weight(const sel_model *m, sel_linear *w, sel_part part, int64_t rows, const void *dy,
                                    int64_t dy_row, const void *x, int64_t x_row, float *dw, bool add)
{
    const double T = (double)rows, out = (double)sel_linear_out(w), in = (double)sel_linear_in(w);
    SEL_TRY(sel_linear_backward_weight(w, rows, dy, dy_row, x, x_row, dw, add));
    lap(m, w, (int)part + 2, rows, T * (out + in), out * in, add ? 2 : 1);
    return SEL_OK;
}
