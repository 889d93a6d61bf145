/* The reference itself: figure 2 against numbers worked by hand, every gradient against central differences. */
#include "tests/check.h"
#include "tests/random.h"
#include "tests/switches.h"

#include <math.h>
#include <string.h>

static sel_ref_attention attention_of(int s)
{
    sel_ref_attention a = { 0 };
    switches_set(&a, s);
    return a;
}

/* One head of width 1 makes L[i,j] = q[i] k[j]: F can be worked out on paper.
       L = 2                 S = 0                     S without protection = 2
           2 -1                  0  0                                         2  0
           2 -1  3               0  0  0                                      2  0  3
           4 -2  6  1            0  0  6  0                                   4  0  6  1
           2 -1  3  .5 1         0  0  3 .5  0                                2  0  3 .5  1
   The same L as sel_q[i] sel_k[j] makes the same F, whatever the head's own logits are. */
static void check_by_hand(void)
{
    const double selecting_q[5] = { 1, 1, 1, 2, 1 }, selecting_k[5] = { 2, -1, 3, 0.5, 1 }, v[5] = { 1, 2, 3, 4, 5 };
    const double other_q[5] = { -1, 0.5, 2, 1, 0.25 }, other_k[5] = { 1, 1.5, -2, 0.5, 3 };
    const struct {
        int switches;
        int64_t window;
        double F[5][5], carry[5];
    } cases[] = {
        { 1, 0, { { 0 }, { 0 }, { 0 }, { 0 }, { 0, 0, 6, 0, 0 } }, { 0, 0, 9, 0.5, 0 } },
        { 1, 2, { { 0 }, { 0 }, { 0 }, { 0 }, { 0, 0, 6, 0, 0 } }, { 0, 0, 6, 0.5, 0 } },
        { 2, 0, { { 0 }, { 0 }, { 0, 0, 0 }, { 0, -1, 0, 0 }, { 0, -3, 6, 0, 0 } }, { 0, -4, 9, 0.5, 0 } },
        { 3, 0, { { 0 }, { 0 }, { 2 }, { 4 }, { 8, 0, 6, 0, 0 } }, { 10, 0, 9, 0.5, 0 } },
        { 4, 0, { { 0 }, { 0 }, { 0 }, { 0, 0, 3 }, { 0, 0, 9, 1, 0 } }, { 0, 0, 12, 1.5, 1 } },
        { 5, 0, { { 0 }, { 0 }, { 0 }, { 0, 0, 6 }, { 0, 0, 9, 0.5, 0 } }, { 0, 0, 9, 0.5, 0 } },
        { 7, 0, { { 2 }, { 4, -1 }, { 6, -2, 3 }, { 10, -4, 9, 1 }, { 12, -5, 12, 1.5, 1 } }, { 12, -5, 12, 1.5, 1 } },
    };
    for (size_t n = 0; n < 2 * (sizeof cases / sizeof cases[0]); n++) {
        const size_t c = n / 2;
        const bool bilinear = n % 2;
        const double *const q = bilinear ? other_q : selecting_q, *const k = bilinear ? other_k : selecting_k;
        sel_ref_attention a = attention_of(cases[c].switches);
        double F[5][5], carry[5], out[5], m_max;
        int64_t m_row;
        a.B = a.H = a.Hkv = a.dh = 1;
        a.N = 5;
        a.window = cases[c].window;
        a.tau = 4.0;
        a.sel_q = bilinear ? selecting_q : NULL;
        a.sel_k = bilinear ? selecting_k : NULL;
        sel_ref_attend(&a, q, k, v, &(sel_ref_results){ .F = F[0], .carry = carry, .out = out, .m_max = &m_max,
                                                        .m_row = &m_row });
        for (int i = 0; i < 5; i++) {
            double sum = 0.0, o = 0.0;
            for (int j = 0; j <= i; j++) {
                CHECK(F[i][j] == cases[c].F[i][j], "case %zu: F[%d][%d] = %g, not %g", c, i, j, F[i][j],
                      cases[c].F[i][j]);
                if (a.window && j <= i - a.window) continue;
                sum += exp(q[i] * k[j] - cases[c].F[i][j]);
                o += exp(q[i] * k[j] - cases[c].F[i][j]) * v[j];
            }
            CHECK(fabs(out[i] - o / sum) < 1e-14, "case %zu: out[%d] = %.17g, not %.17g", c, i, out[i], o / sum);
            CHECK(carry[i] == cases[c].carry[i], "case %zu: carry[%d] = %g", c, i, carry[i]);
        }
        /* tau 4: M[4] = 5 - 1 while F[4,:] = 0 0 6 0 0, equal to M[3] = 4: the smaller row wins */
        if (c == 0) CHECK(m_max == 4.0 && m_row == 3, "M[%d] = %g", (int)m_row, m_max);
    }
}

/* The objective whose gradient attention is asked for: sum of out * dout + memory_coef tau * sum of max M. */
static double attention_objective(const sel_ref_attention *a, const double *q, const double *k, const double *v,
                                  const double *dout, double *out, double *m_max)
{
    const int64_t n = a->B * a->N * a->H * a->dh;
    double s = 0.0;
    sel_ref_attend(a, q, k, v, &(sel_ref_results){ .out = out, .m_max = m_max });
    for (int64_t i = 0; i < n; i++) s += out[i] * dout[i];
    for (int64_t b = 0; a->selective && a->tau > 0.0 && b < a->B; b++) s += a->memory_coef * a->tau * m_max[b];
    return s;
}

static double distance(const double *x, const double *y, int64_t n)
{
    double s = 0.0;
    for (int64_t i = 0; i < n; i++) s += (x[i] - y[i]) * (x[i] - y[i]);
    return sqrt(s);
}

static double norm(const double *x, int64_t n)
{
    double s = 0.0;
    for (int64_t i = 0; i < n; i++) s += x[i] * x[i];
    return sqrt(s);
}

#define STEP 1e-5   /* truncation ~ STEP^2, rounding ~ 1e-16 / STEP: both near 1e-10 */

/* The gradient with respect to operand x of n numbers, against central differences. */
static void check_operand(const sel_ref_attention *a, const char *what, const double *q, const double *k,
                          const double *v, const double *dout, double *x, const double *dx, int64_t n)
{
    double *numeric = random_normals(n), *m_max = random_normals(a->B);
    double *out = random_normals(a->B * a->N * a->H * a->dh);
    for (int64_t i = 0; i < n; i++) {
        const double kept = x[i];
        x[i] = kept + STEP;
        const double above = attention_objective(a, q, k, v, dout, out, m_max);
        x[i] = kept - STEP;
        const double below = attention_objective(a, q, k, v, dout, out, m_max);
        x[i] = kept;
        numeric[i] = (above - below) / (2.0 * STEP);
    }
    const double error = distance(numeric, dx, n) / norm(dx, n);
    CHECK(error < 1e-7, "%s: relative error %g", what, error);
    free(numeric);
    free(out);
    free(m_max);
}

static void check_attention(int s, int64_t window, int64_t Hkv, bool memory, bool bilinear)
{
    sel_ref_attention a = attention_of(s);
    a.B = 2;
    a.N = 9;
    a.H = 4;
    a.Hkv = Hkv;
    a.dh = 3;
    a.window = window;
    a.tau = memory ? 0.8 : 0.0;
    a.memory_coef = memory ? 0.7 : 0.0;

    const int64_t nq = a.B * a.N * a.H * a.dh, nk = a.B * a.N * Hkv * a.dh, ns = a.B * a.N * a.dh;
    random_seed((uint64_t)(100 * s + 10 * window + Hkv));
    double *q = random_normals(nq), *k = random_normals(nk), *v = random_normals(nk), *dout = random_normals(nq);
    double *dq = random_normals(nq), *dk = random_normals(nk), *dv = random_normals(nk);
    double *F = random_normals(a.B * a.N * a.N);
    double *sel_q = random_normals(ns), *sel_k = random_normals(ns);
    double *dsel_q = random_normals(ns), *dsel_k = random_normals(ns);
    char what[128];

    a.sel_q = bilinear ? sel_q : NULL;
    a.sel_k = bilinear ? sel_k : NULL;
    sel_ref_attend(&a, q, k, v, &(sel_ref_results){ .dout = dout, .dq = dq, .dk = dk, .dv = dv, .dsel_q = dsel_q,
                                                    .dsel_k = dsel_k, .F = F });
    snprintf(what, sizeof what, "%s%s, window %d, kv heads %d, memory %d: ", switches[s].name,
             bilinear ? ", bilinear" : "", (int)window, (int)Hkv, (int)memory);
    CHECK((norm(F, a.B * a.N * a.N) > 0.5) == a.selective, "%s: no selection to differentiate", what);

    char *const end = what + strlen(what);
    snprintf(end, sizeof what - strlen(what), "dq");
    check_operand(&a, what, q, k, v, dout, q, dq, nq);
    snprintf(end, 3, "dk");
    check_operand(&a, what, q, k, v, dout, k, dk, nk);
    snprintf(end, 3, "dv");
    check_operand(&a, what, q, k, v, dout, v, dv, nk);
    if (bilinear) {
        snprintf(end, 7, "dsel_q");
        check_operand(&a, what, q, k, v, dout, sel_q, dsel_q, ns);
        snprintf(end, 7, "dsel_k");
        check_operand(&a, what, q, k, v, dout, sel_k, dsel_k, ns);
    }

    double *const all[] = { q, k, v, dout, dq, dk, dv, F, sel_q, sel_k, dsel_q, dsel_k };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

/* Every tensor of a small model, the sum of both losses. */
static void check_model(int s, int64_t Hkv, int64_t window, double epsilon, bool bilinear)
{
    sel_ref_model m = { .dims = { .V = 13, .N = 8, .D = 12, .L = 2, .H = 3, .Hkv = Hkv, .dh = 4, .F = 9,
                                  .bilinear = bilinear },
                        .attention = attention_of(s),
                        .epsilon = epsilon };
    const int64_t B = 2, n = 7;
    m.attention.tau = 1.0;
    m.attention.window = window;
    int64_t count, total;
    sel_ref_tensor *tensors = sel_ref_tensors(&m.dims, &count, &total);
    random_seed(1000 + (uint64_t)s);
    double *params = random_normals(total), *grad = random_normals(total), *numeric = random_normals(total);
    double loss, memory;
    for (int64_t t = 0; t < count; t++) {
        const sel_ref_tensor *x = &tensors[t];
        for (int64_t i = 0; i < x->rows * x->cols; i++)
            params[x->offset + i] = x->cols == 1 ? 1.0 + 0.3 * params[x->offset + i] : 0.5 * params[x->offset + i];
    }
    int32_t inputs[14], targets[14];
    for (int i = 0; i < 14; i++) {
        inputs[i] = (int32_t)(13.0 * random_uniform());
        targets[i] = (int32_t)(13.0 * random_uniform());
    }
    targets[3] = -1;

    sel_ref_model_loss(&m, params, inputs, targets, B, n, &loss, &memory, NULL, grad);
    CHECK(loss > 0.5 && loss < 10.0, "loss %g", loss);
    CHECK((memory != 0.0) == (epsilon > 0.0 && m.attention.selective), "memory loss %g", memory);
    for (int64_t i = 0; i < total; i++) {
        const double kept = params[i];
        double above_memory, below_memory, above, below;
        params[i] = kept + STEP;
        sel_ref_model_loss(&m, params, inputs, targets, B, n, &above, &above_memory, NULL, NULL);
        params[i] = kept - STEP;
        sel_ref_model_loss(&m, params, inputs, targets, B, n, &below, &below_memory, NULL, NULL);
        params[i] = kept;
        numeric[i] = (above + above_memory - below - below_memory) / (2.0 * STEP);
    }
    for (int64_t t = 0; t < count; t++) {
        const sel_ref_tensor *x = &tensors[t];
        const int64_t size = x->rows * x->cols;
        const double error = distance(numeric + x->offset, grad + x->offset, size) / norm(grad + x->offset, size);
        CHECK(error < 1e-6, "%s%s, kv heads %d, epsilon %g: %s: relative error %g", switches[s].name,
              bilinear ? ", bilinear" : "", (int)Hkv, epsilon, x->name, error);
    }
    free(tensors);
    free(params);
    free(grad);
    free(numeric);
}

int main(void)
{
    check_by_hand();
    for (int s = 0; s < SWITCHES; s++) {
        for (int memory = 0; memory < 2; memory++) {
            check_attention(s, 0, 4, memory, false);
            check_attention(s, 3, 2, memory, false);
            check_attention(s, 0, 1, memory, false);
            if (!switches[s].selective) continue;
            check_attention(s, 0, 2, memory, true);
            check_attention(s, 3, 4, memory, true);
        }
        check_model(s, s % 2 ? 3 : 1, 0, 0.0, false);
        if (!switches[s].selective) continue;
        check_model(s, s % 2 ? 1 : 3, s % 3 ? 0 : 4, 0.4, false);
        check_model(s, s % 2 ? 3 : 1, s % 3 ? 4 : 0, s % 2 ? 0.0 : 0.4, true);
    }
    return check_verdict();
}
