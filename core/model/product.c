/* product.c: a model's matrix products: the linear layers' calls, each a lap of the profile. */
#include "core/model/plan.h"

/* `operands` elements read, and the bytes of the result. */
static void lap(const sel_model *m, const sel_linear *w, int part, int64_t rows, double operands, double result)
{
    const double out = (double)sel_linear_out(w), in = (double)sel_linear_in(w);
    sel_profile_lap(m->opt.profile, (sel_part)part, 2.0 * (double)rows * out * in,
                    operands * (double)operand_bytes(m) + result);
}

sel_status sel_model_product(const sel_model *m, sel_linear *w, sel_part part, int64_t rows, const void *x,
                             int64_t x_row, float *y, int64_t y_row)
{
    const double T = (double)rows, out = (double)sel_linear_out(w), in = (double)sel_linear_in(w);
    SEL_TRY(sel_linear_forward(w, rows, x, x_row, y, y_row));
    lap(m, w, (int)part, rows, T * in + out * in, 4.0 * T * out);
    return SEL_OK;
}

sel_status sel_model_product_input(const sel_model *m, sel_linear *w, sel_part part, int64_t rows, const void *dy,
                                   int64_t dy_row, void *dx, sel_dtype type, int64_t dx_row)
{
    const double T = (double)rows, out = (double)sel_linear_out(w), in = (double)sel_linear_in(w);
    SEL_TRY(sel_linear_backward_input(w, rows, dy, dy_row, dx, type, dx_row));
    lap(m, w, (int)part + 1, rows, T * out + out * in, (type == SEL_BFLOAT16 ? 2.0 : 4.0) * T * in);
    return SEL_OK;
}

sel_status sel_model_product_weight(const sel_model *m, sel_linear *w, sel_part part, int64_t rows, const void *dy,
                                    int64_t dy_row, const void *x, int64_t x_row, float *dw, bool add)
{
    const double T = (double)rows, out = (double)sel_linear_out(w), in = (double)sel_linear_in(w);
    SEL_TRY(sel_linear_backward_weight(w, rows, dy, dy_row, x, x_row, dw, add));
    lap(m, w, (int)part + 2, rows, T * (out + in), (add ? 8.0 : 4.0) * out * in);
    return SEL_OK;
}
