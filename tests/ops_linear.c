/* ops_linear.c: the linear layers of both libraries against sums in double.
 *
 * Two kinds of data.  Exact: small integers, whose products and sums float32 holds exactly in any order, so results
 * must be equal.  Rounded: a sum of n products, in whatever order, is within n 2^-24 sum |terms| of the true one
 * (Higham, Accuracy and Stability, section 3.1), plus one rounding where it is added to something.
 */
#include "tests/check.h"
#include "tests/random.h"

#include <inttypes.h>
#include <math.h>
#include <omp.h>
#include <stdbool.h>
#include <string.h>
#include "ops/linear.h"

static const float RIM = 7.25f;   /* what gaps and ends hold: any write changes it */

/* Integers in [-4, 4], or fractions in (-1, 1). */
static float draw(bool exact)
{
    return (float)(exact ? floor(9.0 * random_uniform()) - 4.0 : 2.0 * random_uniform() - 1.0);
}

/* A matrix [rows][n] with row stride `row`; gaps and 16 floats after the end hold RIM. */
typedef struct {
    float *at;
    int64_t rows, n, row, size;
} grid;

static grid grid_new(int64_t rows, int64_t n, int64_t row, bool exact)
{
    grid g = { .rows = rows, .n = n, .row = row, .size = rows * row + 16 };
    g.at = malloc((size_t)g.size * sizeof(float));
    if (!g.at) abort();
    for (int64_t i = 0; i < g.size; i++) g.at[i] = RIM;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < n; j++) g.at[r * row + j] = draw(exact);
    return g;
}

static void rim_check(const grid *g, const char *what)
{
    for (int64_t i = 0; i < g->size; i++)
        if (i / g->row >= g->rows || i % g->row >= g->n)
            if (g->at[i] != RIM) {
                CHECK(false, "%s: float %" PRId64 " outside the matrix was written", what, i);
                return;
            }
}

/* got = start + sum over k < n of a[k * a_step] * b[k * b_step] ? */
static bool near(float got, double start, const float *a, int64_t a_step, const float *b, int64_t b_step, int64_t n,
                 bool exact)
{
    double sum = start, size = fabs(start);
    for (int64_t k = 0; k < n; k++) {
        const double term = (double)a[k * a_step] * (double)b[k * b_step];
        sum += term;
        size += fabs(term);
    }
    return exact ? (double)got == sum : fabs((double)got - sum) <= (double)(n + 1) * 0x1p-24 * size;
}

typedef struct {
    sel_linear_engine *e;
    int64_t out, in, rows, x_gap, y_gap;
    bool exact;
} setup;

static void describe(char name[160], const setup *s, const char *what)
{
    snprintf(name, 160, "%s %s: %" PRId64 " rows, %" PRId64 " x %" PRId64 ", gaps %" PRId64 " %" PRId64 "%s",
             sel_linear_library(s->e), what, s->rows, s->out, s->in, s->x_gap, s->y_gap, s->exact ? ", exact" : "");
}

static void check_forward(const setup *s, sel_linear *l, const grid *w, const grid *x)
{
    char name[160];
    describe(name, s, "forward");
    grid y = grid_new(s->rows, s->out, s->out + s->y_gap, true), again = grid_new(s->rows, s->out, y.row, true);
    CHECK_OK(sel_linear_forward(l, s->rows, x->at, x->row, y.at, y.row));
    CHECK_OK(sel_linear_forward(l, s->rows, x->at, x->row, again.at, again.row));
    CHECK(memcmp(y.at, again.at, (size_t)y.size * sizeof(float)) == 0, "%s: two runs differ", name);
    bool good = true;
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t o = 0; o < s->out; o++)
            good &= near(y.at[r * y.row + o], 0.0, x->at + r * x->row, 1, w->at + o * s->in, 1, s->in, s->exact);
    CHECK(good, "%s", name);
    rim_check(&y, name);
    free(again.at);
    free(y.at);
}

static void check_backward_input(const setup *s, sel_linear *l, const grid *w, const grid *dy)
{
    char name[160];
    describe(name, s, "backward_input");
    grid dx = grid_new(s->rows, s->in, s->in + s->x_gap, true);
    CHECK_OK(sel_linear_backward_input(l, s->rows, dy->at, dy->row, dx.at, SEL_FLOAT32, dx.row));
    bool good = true;
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t i = 0; i < s->in; i++)
            good &= near(dx.at[r * dx.row + i], 0.0, dy->at + r * dy->row, 1, w->at + i, s->in, s->out, s->exact);
    CHECK(good, "%s", name);
    rim_check(&dx, name);
    free(dx.at);
}

static void check_backward_weight(const setup *s, sel_linear *l, const grid *x, const grid *dy)
{
    char name[160];
    describe(name, s, "backward_weight");
    grid dw = grid_new(s->out, s->in, s->in, s->exact), before = grid_new(s->out, s->in, s->in, s->exact);
    memcpy(before.at, dw.at, (size_t)dw.size * sizeof(float));
    grid again = grid_new(s->out, s->in, s->in, s->exact);
    memcpy(again.at, dw.at, (size_t)dw.size * sizeof(float));
    CHECK_OK(sel_linear_backward_weight(l, s->rows, dy->at, dy->row, x->at, x->row, dw.at, true));
    CHECK_OK(sel_linear_backward_weight(l, s->rows, dy->at, dy->row, x->at, x->row, again.at, true));
    CHECK(memcmp(dw.at, again.at, (size_t)dw.size * sizeof(float)) == 0, "%s: two runs differ", name);
    bool good = true;
    for (int64_t o = 0; o < s->out; o++)
        for (int64_t i = 0; i < s->in; i++)
            good &= near(dw.at[o * s->in + i], (double)before.at[o * s->in + i], dy->at + o, dy->row, x->at + i, x->row,
                         s->rows, s->exact);
    CHECK(good, "%s", name);
    rim_check(&dw, name);

    /* written instead of added to: NaN that lies there must not matter */
    for (int64_t i = 0; i < s->out * s->in; i++) again.at[i] = NAN;
    CHECK_OK(sel_linear_backward_weight(l, s->rows, dy->at, dy->row, x->at, x->row, again.at, false));
    good = true;
    for (int64_t o = 0; o < s->out; o++)
        for (int64_t i = 0; i < s->in; i++)
            good &= near(again.at[o * s->in + i], 0.0, dy->at + o, dy->row, x->at + i, x->row, s->rows, s->exact);
    CHECK(good, "%s, written", name);
    rim_check(&again, name);
    free(again.at);
    free(before.at);
    free(dw.at);
}

static const int64_t ROWS[] = { 1, 2, 3, 17, 33, 127 };
static const int64_t SHAPES[][2] = { { 1, 1 },   { 1, 7 },    { 7, 1 },     { 5, 3 },    { 16, 16 },
                                     { 31, 33 }, { 33, 127 }, { 127, 257 }, { 257, 48 }, { 192, 64 } };
static const int64_t GAPS[][2] = { { 0, 0 }, { 5, 0 }, { 0, 9 }, { 3, 17 } };

/* Every maker of a float32 engine's products, on shapes wide and tall; what cannot make them is refused; a probe leaves
   the engine as it was and finds letters that it may choose. */
static void check_shape(sel_linear_engine *e, int64_t out, int64_t in, bool exact);
static void check_choices(int threads)
{
    static const char makers[][SEL_LINEAR_PASSES + 1] = { "mmm", "mmi", "bbb", "bmi", "mbm" };
    static const char wrong[][SEL_LINEAR_PASSES + 1] = { "imm", "mim", "mmx" };
    sel_linear_engine *e = NULL;
    CHECK_OK(sel_linear_open(&e, SEL_LINEAR_ONEDNN, SEL_FLOAT32, threads));
    if (!e) return;
    for (size_t k = 0; k < sizeof makers / sizeof *makers; k++)
        for (int tall = 0; tall < 2; tall++) {
            sel_linear_choice c = { .out = tall ? 127 : 33, .in = tall ? 33 : 127 };
            memcpy(c.by, makers[k], sizeof c.by);
            CHECK_OK(sel_linear_choose(e, &c));
            check_shape(e, c.out, c.in, false);
        }
    for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++) {
        sel_linear_choice c = { .out = 7, .in = 5 };
        memcpy(c.by, wrong[k], sizeof c.by);
        CHECK(sel_linear_choose(e, &c) == SEL_EUSER && strstr(sel_error(), wrong[k]), "%s: %s", wrong[k], sel_error());
    }
    sel_linear_choice found = { .out = 64, .in = 48 };
    CHECK_OK(sel_linear_probe(e, 100, &found));
    CHECK_OK(sel_linear_choose(e, &found));
    check_shape(e, 64, 48, false);
    sel_linear_close(&e);
}

/* One matrix, many row counts and strides; then other weights. */
static void check_shape(sel_linear_engine *e, int64_t out, int64_t in, bool exact)
{
    sel_linear *l = NULL;
    CHECK_OK(sel_linear_new(&l, e, out, in, true));
    if (!l) return;
    for (int pass = 0; pass < 2; pass++) {
        grid w = grid_new(out, in, in, exact);
        CHECK_OK(sel_linear_pack(l, w.at));
        for (size_t r = 0; r < sizeof ROWS / sizeof *ROWS; r++)
            for (size_t g = 0; g < sizeof GAPS / sizeof *GAPS; g++) {
                const setup s = { e, out, in, ROWS[r], GAPS[g][0], GAPS[g][1], exact };
                grid x = grid_new(s.rows, in, in + s.x_gap, exact), dy = grid_new(s.rows, out, out + s.y_gap, exact);
                if (pass == 0 && r % 2 == 0) CHECK_OK(sel_linear_prepare(l, s.rows, x.row, dy.row, SEL_FLOAT32));
                check_forward(&s, l, &w, &x);
                check_backward_input(&s, l, &w, &dy);
                check_backward_weight(&s, l, &x, &dy);
                free(x.at);
                free(dy.at);
            }
        CHECK_OK(sel_linear_prepare(l, 0, in, out, SEL_FLOAT32));
        CHECK_OK(sel_linear_forward(l, 0, NULL, in, NULL, out));
        CHECK_OK(sel_linear_backward_input(l, 0, NULL, out, NULL, SEL_FLOAT32, in));
        CHECK_OK(sel_linear_backward_weight(l, 0, NULL, out, NULL, in, NULL, true));
        CHECK(sel_linear_prepare(l, 1, in, out, SEL_BFLOAT16) == SEL_EUSER &&
                  sel_linear_backward_input(l, 1, NULL, out, NULL, SEL_BFLOAT16, in) == SEL_EUSER &&
                  strstr(sel_error(), "float32"),
              "a float32 engine takes bfloat16 for a result: %s", sel_error());
        free(w.at);
    }
    sel_linear_free(&l);
    CHECK(l == NULL, "free leaves the pointer");
}

/* Two matrices of one shape share primitives, not weights; a matrix without gradients goes forward. */
static void check_sharing(sel_linear_engine *e)
{
    const int64_t out = 96, in = 80, rows = 21;
    sel_linear *a = NULL, *b = NULL;
    CHECK_OK(sel_linear_new(&a, e, out, in, true));
    CHECK_OK(sel_linear_new(&b, e, out, in, false));
    if (a && b) {
        grid wa = grid_new(out, in, in, true), wb = grid_new(out, in, in, true), x = grid_new(rows, in, in, true);
        CHECK_OK(sel_linear_pack(a, wa.at));
        CHECK_OK(sel_linear_pack(b, wb.at));
        const setup s = { e, out, in, rows, 0, 0, true };
        check_forward(&s, a, &wa, &x);
        check_forward(&s, b, &wb, &x);
        check_forward(&s, a, &wa, &x);
        free(wa.at);
        free(wb.at);
        free(x.at);
    }
    sel_linear_free(&a);
    sel_linear_free(&b);
}

/* More row counts than the engine keeps products for, and the first again. */
static void check_many_rows(sel_linear_engine *e)
{
    enum { OUT = 3, IN = 5, MOST = 530 };
    sel_linear *l = NULL;
    CHECK_OK(sel_linear_new(&l, e, OUT, IN, false));
    if (!l) return;
    grid w = grid_new(OUT, IN, IN, true), x = grid_new(MOST, IN, IN, true), y = grid_new(MOST, OUT, OUT, true);
    CHECK_OK(sel_linear_pack(l, w.at));
    for (int64_t i = 0; i <= MOST; i++) {
        const int64_t rows = i % MOST + 1;
        CHECK_OK(sel_linear_forward(l, rows, x.at, IN, y.at, OUT));
        const int64_t last = rows - 1;
        for (int64_t o = 0; o < OUT; o++)
            CHECK(near(y.at[last * OUT + o], 0.0, x.at + last * IN, 1, w.at + o * IN, 1, IN, true),
                  "%s: %" PRId64 " rows", sel_linear_library(e), rows);
    }
    free(w.at);
    free(x.at);
    free(y.at);
    sel_linear_free(&l);
}

static void check_backend(sel_linear_backend backend, const char *library)
{
    for (int threads = 1; threads <= 3; threads++) {
        sel_linear_engine *e = NULL, *other = NULL;
        const int before = omp_get_max_threads();
        CHECK_OK(sel_linear_open(&e, backend, SEL_FLOAT32, threads));
        CHECK_OK(sel_linear_open(&other, backend, SEL_FLOAT32, threads % 3 + 1));   /* must not disturb the first */
        if (!e || !other) return;
        const char *name = sel_linear_library(e);
        CHECK(strncmp(name, library, strlen(library)) == 0 && strpbrk(name, "0123456789"),
              "\"%s\" is not a name and a version", name);
        for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) {
            check_shape(e, SHAPES[i][0], SHAPES[i][1], true);
            if (threads == 2) check_shape(e, SHAPES[i][0], SHAPES[i][1], false);
        }
        check_sharing(other);
        check_sharing(e);
        if (threads == 1) check_many_rows(e);
        CHECK(omp_get_max_threads() == before, "OpenMP's setting was left at %d", omp_get_max_threads());
        if (threads == 1) {
            double peak = 0.0;
            CHECK_OK(sel_linear_measure_peak(e, &peak));
            CHECK(peak > 0.1 && peak < 1e5, "%s: %g GFLOP/s", library, peak);
            printf("%s: %.0f GFLOP/s on one thread\n", sel_linear_library(e), peak);
        }
        sel_linear_close(&other);
        sel_linear_close(&e);
        CHECK(e == NULL, "close leaves the pointer");
        sel_linear_close(&e);
    }
}

/* Small integers, exact in bfloat16 and in any order of float32 sums. */
static uint16_t *integers16(int64_t n, float *as_float)
{
    uint16_t *x = malloc((size_t)n * sizeof *x);
    if (!x) abort();
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        as_float[i] = (float)((int)(random_uniform() * 17.0) - 8);
        memcpy(&bits, as_float + i, sizeof bits);
        x[i] = (uint16_t)(bits >> 16);
    }
    return x;
}

/* x rounded to bfloat16's 8 bits, to nearest even; normal numbers. */
static double to_bfloat16(double x)
{
    int power;
    frexp(x, &power);
    return ldexp(rint(ldexp(x, 8 - power)), power - 8);
}

/* dx as the next product's operand, rows of both further apart than their width: the exact sums df w, whose products
   float32 holds, rounded once; what lies between the rows stays. */
static void check_bfloat16_result(sel_linear *l, int64_t rows, int64_t out, int64_t in, const float *df, const float *w,
                                  int64_t dy_gap, int64_t dx_gap, bool prepared)
{
    const int64_t dy_row = out + dy_gap, dx_row = in + dx_gap;
    uint16_t *dy = calloc((size_t)(rows * dy_row), sizeof *dy), *dx = malloc((size_t)(rows * dx_row) * sizeof *dx);
    int64_t wrong = 0;
    if (!dy || !dx) abort();
    memset(dx, 0xff, (size_t)(rows * dx_row) * sizeof *dx);
    for (int64_t i = 0; i < rows * out; i++) {
        uint32_t bits;
        memcpy(&bits, df + i, sizeof bits);
        dy[i / out * dy_row + i % out] = (uint16_t)(bits >> 16);
    }
    if (prepared) CHECK_OK(sel_linear_prepare(l, rows, dx_row, dy_row, SEL_BFLOAT16));
    CHECK_OK(sel_linear_backward_input(l, rows, dy, dy_row, dx, SEL_BFLOAT16, dx_row));
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < in; i++) {
            const uint32_t bits = (uint32_t)dx[r * dx_row + i] << 16;
            float got;
            double sum = 0.0;
            memcpy(&got, &bits, sizeof got);
            for (int64_t o = 0; o < out; o++) sum += (double)df[r * out + o] * (double)w[o * in + i];
            wrong += (double)got != to_bfloat16(sum);
        }
        for (int64_t i = in; i < dx_row; i++) wrong += dx[r * dx_row + i] != 0xffff;
    }
    CHECK(wrong == 0, "bfloat16 result %d x %d, %d rows, gaps %d %d: %d values wrong", (int)out, (int)in, (int)rows,
          (int)dy_gap, (int)dx_gap, (int)wrong);
    free(dy);
    free(dx);
}

/* The three products of bfloat16 operands, by matmul and inner product, equal to the exact sums. */
static void check_bfloat16(int64_t rows, int64_t out, int64_t in, char weight_by, int threads)
{
    sel_linear_engine *e = NULL;
    sel_linear *l = NULL;
    const sel_linear_choice c = { .out = out, .in = in, .by = { SEL_BY_MATMUL, SEL_BY_MATMUL, weight_by } };
    CHECK_OK(sel_linear_open(&e, SEL_LINEAR_ONEDNN, SEL_BFLOAT16, threads));
    if (!e) return;
    CHECK_OK(sel_linear_choose(e, &c));
    if (sel_linear_new(&l, e, out, in, true) != SEL_OK) {
        printf("bfloat16 not tested: %s\n", sel_error());
        sel_linear_close(&e);
        return;
    }
    float *xf = malloc((size_t)(rows * in) * sizeof *xf), *df = malloc((size_t)(rows * out) * sizeof *df);
    float *w = malloc((size_t)(out * in) * sizeof *w), *y = malloc((size_t)(rows * out) * sizeof *y);
    float *dx = malloc((size_t)(rows * in) * sizeof *dx), *dw = malloc((size_t)(out * in) * sizeof *dw);
    if (!xf || !df || !w || !y || !dx || !dw) abort();
    uint16_t *x = integers16(rows * in, xf), *dy = integers16(rows * out, df);
    free(integers16(out * in, w));
    CHECK_OK(sel_linear_pack(l, w));
    CHECK_OK(sel_linear_forward(l, rows, x, in, y, out));
    CHECK_OK(sel_linear_backward_input(l, rows, dy, out, dx, SEL_FLOAT32, in));
    CHECK_OK(sel_linear_backward_weight(l, rows, dy, out, x, in, dw, false));
    CHECK_OK(sel_linear_backward_weight(l, rows, dy, out, x, in, dw, true));
    int64_t wrong = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t o = 0; o < out; o++) {
            double sum = 0.0;
            for (int64_t i = 0; i < in; i++) sum += (double)xf[r * in + i] * (double)w[o * in + i];
            wrong += sum != (double)y[r * out + o];
        }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < in; i++) {
            double sum = 0.0;
            for (int64_t o = 0; o < out; o++) sum += (double)df[r * out + o] * (double)w[o * in + i];
            wrong += sum != (double)dx[r * in + i];
        }
    for (int64_t o = 0; o < out; o++)
        for (int64_t i = 0; i < in; i++) {
            double sum = 0.0;
            for (int64_t r = 0; r < rows; r++) sum += (double)df[r * out + o] * (double)xf[r * in + i];
            wrong += 2.0 * sum != (double)dw[o * in + i];
        }
    CHECK(wrong == 0, "bfloat16 %d x %d, %d rows, %c: %d values wrong", (int)out, (int)in, (int)rows, weight_by,
          (int)wrong);
    for (int gaps = 0; gaps < 4; gaps++)
        check_bfloat16_result(l, rows, out, in, df, w, gaps & 1 ? 5 : 0, gaps & 2 ? 3 : 0, gaps % 2 == 0);
    free(x);
    free(dy);
    free(xf);
    free(df);
    free(w);
    free(y);
    free(dx);
    free(dw);
    sel_linear_free(&l);
    sel_linear_close(&e);
}

int main(void)
{
    for (int threads = 1; threads <= 2; threads++) {
        check_choices(threads);
        for (int k = 0; k < 2; k++) {
            const char by = k ? SEL_BY_INNER : SEL_BY_MATMUL;
            check_bfloat16(33, 48, 64, by, threads);
            check_bfloat16(127, 65, 129, by, threads);
            check_bfloat16(70, 1500, 96, by, threads);   /* sums long enough to be made in parts */
        }
    }
    check_backend(SEL_LINEAR_ONEDNN, "oneDNN ");
    check_backend(SEL_LINEAR_OPENBLAS, "OpenBLAS ");
    return check_verdict();
}
