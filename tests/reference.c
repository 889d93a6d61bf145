#include "tests/reference.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static double *zeros(int64_t n)
{
    double *x = calloc((size_t)(n > 0 ? n : 1), sizeof *x);
    if (!x) {
        fprintf(stderr, "reference: no memory for %lld numbers\n", (long long)n);
        abort();
    }
    return x;
}

static double dot(const double *x, const double *y, int64_t n)
{
    double s = 0.0;
    for (int64_t i = 0; i < n; i++) s += x[i] * y[i];
    return s;
}

/* y += a x */
static void axpy(double *y, double a, const double *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}

const char *sel_ref_wrong_name(sel_ref_wrong wrong)
{
    static const char *const names[] = {
        [SEL_REF_RIGHT] = "right",
        [SEL_REF_SUM_OVER_KEYS] = "sum over keys",
        [SEL_REF_NO_SHIFT] = "no shift",
        [SEL_REF_FUTURE_VOTES] = "future keys vote",
        [SEL_REF_DIAGONAL_OF_FIRST] = "diagonal of the first sequence only",
        [SEL_REF_BOS_MASKED] = "BOS not protected",
        [SEL_REF_RESTARTED] = "F restarted",
        [SEL_REF_ROUNDED_VOTES] = "S from rounded logits",
        [SEL_REF_HEAD0_VOTES] = "S from head 0, not from sel_q and sel_k",
        [SEL_REF_HEAD0_SHARES] = "the gradient of sel_q and sel_k also to head 0",
    };
    return names[wrong];
}

/* To the nearest bfloat16 (8 significant bits), ties to even. */
static double round_bfloat16(double x)
{
    int e;
    const double m = frexp(x, &e);
    return ldexp(nearbyint(ldexp(m, 8)), e - 8);
}

/* One sequence: its operands and the matrices of figure 2. */
typedef struct {
    const sel_ref_attention *a;
    int64_t b;
    const double *q, *k, *v;     /* [N][H or Hkv][dh] */
    const double *sel_q, *sel_k; /* [N][dh], or NULL */
    double *P;                   /* [H][N][N] logits, then softmax(L - F), then the gradient of L - F */
    double *Ls;                  /* [N][N] the logits that S is made of: head 0's before F, or sel_q's and sel_k's */
    double *S, *F;               /* [N][N] */
    double *dLs;                 /* [N][N] what comes through F to them */
} sequence;

static double logit(const sequence *s, int64_t h, int64_t i, int64_t j)
{
    const sel_ref_attention *a = s->a;
    const double *q = s->q + (i * a->H + h) * a->dh;
    const double *k = s->k + (j * a->Hkv + h * a->Hkv / a->H) * a->dh;
    return dot(q, k, a->dh) / sqrt((double)a->dh);
}

static bool own_source(const sequence *s) { return s->sel_q && s->a->wrong != SEL_REF_HEAD0_VOTES; }

/* The logit that S[i,j] is made of. */
static double selection_logit(const sequence *s, int64_t i, int64_t j)
{
    const int64_t dh = s->a->dh;
    return own_source(s) ? dot(s->sel_q + i * dh, s->sel_k + j * dh, dh) / sqrt((double)dh) : logit(s, 0, i, j);
}

static void compute_logits(sequence *s)
{
    const int64_t N = s->a->N, window = s->a->window;
    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j < N; j++) {
            const bool seen = j <= i && (!window || j > i - window);
            for (int64_t h = 0; h < s->a->H; h++)
                s->P[(h * N + i) * N + j] = seen ? logit(s, h, i, j) : -INFINITY;
            s->Ls[i * N + j] = seen ? selection_logit(s, i, j) : -INFINITY;
        }
}

/* S = relu(Ls);  S[..., 0] = 0;  S *= 1 - eye(n)  -- each as far as its switch is on. */
static void compute_selection(sequence *s)
{
    const sel_ref_attention *a = s->a;
    const int64_t N = a->N;
    const bool protect_bos = a->protect_bos && a->wrong != SEL_REF_BOS_MASKED;
    const bool protect_self = a->protect_self && !(a->wrong == SEL_REF_DIAGONAL_OF_FIRST && s->b > 0);

    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j < N; j++) {
            double x = s->Ls[i * N + j];
            if (a->wrong == SEL_REF_FUTURE_VOTES && j > i) x = selection_logit(s, i, j);
            if (x == -INFINITY) x = 0.0;             /* no logit, no vote, whatever relu is */
            if (a->wrong == SEL_REF_ROUNDED_VOTES) x = round_bfloat16(x);
            if (a->relu && x < 0.0) x = 0.0;
            if (protect_bos && j == 0) x = 0.0;
            if (protect_self && j == i) x = 0.0;
            s->S[i * N + j] = x;
        }
}

/* S = roll(S, 1, rows);  S[0] = 0;  F = cumsum(S, rows) */
static void accumulate_selection(sequence *s)
{
    const sel_ref_attention *a = s->a;
    const int64_t N = a->N;
    const bool shift = a->shift && a->wrong != SEL_REF_NO_SHIFT;

    double *rolled = zeros(N * N);
    if (shift)
        memcpy(rolled + N, s->S, (size_t)((N - 1) * N) * sizeof *rolled);
    else
        memcpy(rolled, s->S, (size_t)(N * N) * sizeof *rolled);

    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j < N; j++) {
            double before = 0.0;
            if (a->wrong == SEL_REF_SUM_OVER_KEYS)
                before = j > 0 ? s->F[i * N + j - 1] : 0.0;
            else if (i > 0 && !(a->wrong == SEL_REF_RESTARTED && i == a->restart))
                before = s->F[(i - 1) * N + j];
            s->F[i * N + j] = before + rolled[i * N + j];
        }
    free(rolled);
}

/* logits -= F;  P = softmax(logits);  out = P v */
static void compute_output(sequence *s, double *out, double *lse)
{
    const sel_ref_attention *a = s->a;
    const int64_t N = a->N;
    for (int64_t h = 0; h < a->H; h++)
        for (int64_t i = 0; i < N; i++) {
            double *p = s->P + (h * N + i) * N;
            double top = -INFINITY, sum = 0.0;
            for (int64_t j = 0; j < N; j++) {
                p[j] -= s->F[i * N + j];
                if (p[j] > top) top = p[j];
            }
            for (int64_t j = 0; j < N; j++) {
                p[j] = exp(p[j] - top);
                sum += p[j];
            }
            double *o = out + (i * a->H + h) * a->dh;
            memset(o, 0, (size_t)a->dh * sizeof *o);
            for (int64_t j = 0; j < N; j++) {
                p[j] /= sum;
                if (p[j] != 0.0) axpy(o, p[j], s->v + (j * a->Hkv + h * a->Hkv / a->H) * a->dh, a->dh);
            }
            if (lse) lse[h * N + i] = top + log(sum);
        }
}

/* max over i of M[i] = i + 1 - sum over j <= i of min(F[i,j], tau) / tau */
static void compute_memory(const sequence *s, double *m_max, int64_t *m_row)
{
    const int64_t N = s->a->N;
    *m_max = -INFINITY;
    for (int64_t i = 0; i < N; i++) {
        double M = (double)(i + 1);
        for (int64_t j = 0; j <= i; j++) M -= fmin(s->F[i * N + j], s->a->tau) / s->a->tau;
        if (M > *m_max) {
            *m_max = M;
            *m_row = i;
        }
    }
}

/* Backward through out = P v and the softmax: P becomes dZ, the gradient of L - F; dv. */
static void differentiate_output(sequence *s, const double *dout, double *dv)
{
    const sel_ref_attention *a = s->a;
    const int64_t N = a->N;
    double *dp = zeros(N);
    for (int64_t h = 0; h < a->H; h++)
        for (int64_t i = 0; i < N; i++) {
            double *p = s->P + (h * N + i) * N;
            const double *dO = dout + (i * a->H + h) * a->dh;
            double mean = 0.0;
            for (int64_t j = 0; j <= i; j++) {
                const int64_t kv = (j * a->Hkv + h * a->Hkv / a->H) * a->dh;
                dp[j] = dot(dO, s->v + kv, a->dh);
                mean += p[j] * dp[j];
                axpy(dv + kv, p[j], dO, a->dh);
            }
            for (int64_t j = 0; j <= i; j++) p[j] *= dp[j] - mean;
        }
    free(dp);
}

/* Backward through F, cumsum, roll and the masks: the gradient of the logits that S is made of; head 0's dZ gets it
   where these are its own. */
static void differentiate_selection(sequence *s, int64_t m_row, double *dcarry)
{
    const sel_ref_attention *a = s->a;
    const int64_t N = a->N;

    double *dF = zeros(N * N);
    for (int64_t h = 0; h < a->H; h++) axpy(dF, -1.0, s->P + h * N * N, N * N);
    if (a->tau > 0.0)
        for (int64_t j = 0; j <= m_row; j++)
            if (s->F[m_row * N + j] < a->tau) dF[m_row * N + j] -= a->memory_coef;
    if (dcarry)
        for (int64_t i = 0; i < N; i++) axpy(dcarry, 1.0, dF + i * N, N);

    /* cumsum: row i of the rolled S is in every row of F from i on; roll: row i of S became row i + 1 */
    double *dS = dF;
    for (int64_t i = N - 2; i >= 0; i--) axpy(dS + i * N, 1.0, dS + (i + 1) * N, N);
    if (a->shift) {
        memmove(dS, dS + N, (size_t)((N - 1) * N) * sizeof *dS);
        memset(dS + (N - 1) * N, 0, (size_t)N * sizeof *dS);
    }
    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j <= i; j++) {
            const double x = s->Ls[i * N + j];
            if (x == -INFINITY || (a->relu && x <= 0.0) || (a->protect_bos && j == 0) || (a->protect_self && j == i))
                continue;
            s->dLs[i * N + j] = dS[i * N + j];
        }
    if (!own_source(s) || a->wrong == SEL_REF_HEAD0_SHARES) axpy(s->P, 1.0, s->dLs, N * N);
    free(dF);
}

/* Backward through L = q k / sqrt(dh). */
static void differentiate_logits(const sequence *s, double *dq, double *dk)
{
    const sel_ref_attention *a = s->a;
    const int64_t N = a->N;
    const double scale = 1.0 / sqrt((double)a->dh);
    for (int64_t h = 0; h < a->H; h++)
        for (int64_t i = 0; i < N; i++)
            for (int64_t j = 0; j <= i; j++) {
                const double dL = s->P[(h * N + i) * N + j] * scale;
                const int64_t qo = (i * a->H + h) * a->dh, ko = (j * a->Hkv + h * a->Hkv / a->H) * a->dh;
                axpy(dq + qo, dL, s->k + ko, a->dh);
                axpy(dk + ko, dL, s->q + qo, a->dh);
            }
}

/* The same for the logits of sel_q and sel_k. */
static void differentiate_selection_logits(const sequence *s, double *dsel_q, double *dsel_k)
{
    const int64_t N = s->a->N, dh = s->a->dh;
    const double scale = 1.0 / sqrt((double)dh);
    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j <= i; j++) {
            axpy(dsel_q + i * dh, s->dLs[i * N + j] * scale, s->sel_k + j * dh, dh);
            axpy(dsel_k + j * dh, s->dLs[i * N + j] * scale, s->sel_q + i * dh, dh);
        }
}

void sel_ref_attend(const sel_ref_attention *a, const double *q, const double *k, const double *v,
                    const sel_ref_results *r)
{
    const int64_t N = a->N, q_size = N * a->H * a->dh, k_size = N * a->Hkv * a->dh, sel_size = N * a->dh;
    const bool bilinear = a->selective && a->sel_q;
    sequence s = { .a = a };
    s.P = zeros(a->H * N * N);
    s.Ls = zeros(N * N);
    s.S = zeros(N * N);
    s.F = zeros(N * N);
    s.dLs = zeros(N * N);
    double *spare = zeros(q_size);

    for (int64_t b = 0; b < a->B; b++) {
        double m_max = 0.0;
        int64_t m_row = 0;
        s.b = b;
        s.q = q + b * q_size;
        s.k = k + b * k_size;
        s.v = v + b * k_size;
        if (bilinear) {
            s.sel_q = a->sel_q + b * sel_size;
            s.sel_k = a->sel_k + b * sel_size;
        }
        compute_logits(&s);
        if (a->selective) {
            compute_selection(&s);
            accumulate_selection(&s);
            if (a->tau > 0.0) compute_memory(&s, &m_max, &m_row);
        }
        compute_output(&s, r->out ? r->out + b * q_size : spare, r->lse ? r->lse + b * a->H * N : NULL);
        if (r->F) memcpy(r->F + b * N * N, s.F, (size_t)(N * N) * sizeof *s.F);
        if (r->m_max) r->m_max[b] = m_max;
        if (r->m_row) r->m_row[b] = m_row;
        if (r->carry) {
            memset(r->carry + b * N, 0, (size_t)N * sizeof *r->carry);
            for (int64_t i = 0; i < N; i++) axpy(r->carry + b * N, 1.0, s.S + i * N, N);
        }
        if (!r->dout) continue;

        memset(r->dq + b * q_size, 0, (size_t)q_size * sizeof *r->dq);
        memset(r->dk + b * k_size, 0, (size_t)k_size * sizeof *r->dk);
        memset(r->dv + b * k_size, 0, (size_t)k_size * sizeof *r->dv);
        if (r->dcarry) memset(r->dcarry + b * N, 0, (size_t)N * sizeof *r->dcarry);
        differentiate_output(&s, r->dout + b * q_size, r->dv + b * k_size);
        memset(s.dLs, 0, (size_t)(N * N) * sizeof *s.dLs);
        if (a->selective) differentiate_selection(&s, m_row, r->dcarry ? r->dcarry + b * N : NULL);
        differentiate_logits(&s, r->dq + b * q_size, r->dk + b * k_size);
        if (!bilinear) continue;
        memset(r->dsel_q + b * sel_size, 0, (size_t)sel_size * sizeof *r->dsel_q);
        memset(r->dsel_k + b * sel_size, 0, (size_t)sel_size * sizeof *r->dsel_k);
        differentiate_selection_logits(&s, r->dsel_q + b * sel_size, r->dsel_k + b * sel_size);
    }
    free(s.P);
    free(s.Ls);
    free(s.S);
    free(s.F);
    free(s.dLs);
    free(spare);
}

/* The model.  T = B n tokens; every array is [T][width]. */

enum { LAYER_TENSORS = 11, SELECTION_TENSORS = 2 };

static int64_t layer_tensors(const sel_ref_dims *d) { return LAYER_TENSORS + (d->bilinear ? SELECTION_TENSORS : 0); }

sel_ref_tensor *sel_ref_tensors(const sel_ref_dims *d, int64_t *count, int64_t *total)
{
    const struct {
        const char *name;
        int64_t rows, cols;
    } ends[] = {
        { "tok_embed.weight", d->V, d->D },
        { "pos_embed.weight", d->N, d->D },
        { "final_norm.weight", d->D, 1 },
        { "lm_head.weight", d->V, d->D },
    }, layer[LAYER_TENSORS + SELECTION_TENSORS] = {
        { "attn_norm", d->D, 1 },
        { "attn.q_proj", d->H * d->dh, d->D },
        { "attn.k_proj", d->Hkv * d->dh, d->D },
        { "attn.v_proj", d->Hkv * d->dh, d->D },
        { "attn.o_proj", d->D, d->H * d->dh },
        { "attn.q_norm", d->dh, 1 },
        { "attn.k_norm", d->dh, 1 },
        { "ffn_norm", d->D, 1 },
        { "ffn.gate_proj", d->F, d->D },
        { "ffn.up_proj", d->F, d->D },
        { "ffn.down_proj", d->D, d->F },
        { "attn.sel_q", d->dh, d->D },
        { "attn.sel_k", d->dh, d->D },
    };
    const int64_t each = layer_tensors(d), n = 4 + each * d->L;
    sel_ref_tensor *t = calloc((size_t)n, sizeof *t);
    if (!t) abort();

    *count = n;
    *total = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t l = (i - 4) / each, w = i < 4 ? i : (i - 4) % each;
        if (i < 4)
            snprintf(t[i].name, sizeof t[i].name, "%s", ends[w].name);
        else
            snprintf(t[i].name, sizeof t[i].name, "layers.%lld.%s.weight", (long long)l, layer[w].name);
        t[i].rows = i < 4 ? ends[w].rows : layer[w].rows;
        t[i].cols = i < 4 ? ends[w].cols : layer[w].cols;
        t[i].offset = *total;
        *total += t[i].rows * t[i].cols;
    }
    return t;
}

/* y [T][out] = x [T][in] W^T */
static void linear(double *y, const double *x, const double *W, int64_t T, int64_t out, int64_t in)
{
    for (int64_t t = 0; t < T; t++)
        for (int64_t o = 0; o < out; o++) y[t * out + o] = dot(x + t * in, W + o * in, in);
}

/* dx += dy W;  dW += dy^T x */
static void linear_backward(double *dx, double *dW, const double *dy, const double *x, const double *W, int64_t T,
                            int64_t out, int64_t in)
{
    for (int64_t t = 0; t < T; t++)
        for (int64_t o = 0; o < out; o++) {
            axpy(dx + t * in, dy[t * out + o], W + o * in, in);
            axpy(dW + o * in, dy[t * out + o], x + t * in, in);
        }
}

static double rms_inverse(const double *x, int64_t n)
{
    return 1.0 / sqrt(dot(x, x, n) / (double)n + 1e-6);
}

/* y = x / rms(x) w, each of `rows` rows of n */
static void rmsnorm(double *y, const double *x, const double *w, int64_t rows, int64_t n)
{
    for (int64_t t = 0; t < rows; t++) {
        const double r = rms_inverse(x + t * n, n);
        for (int64_t i = 0; i < n; i++) y[t * n + i] = x[t * n + i] * r * w[i];
    }
}

/* With r = 1 / rms(x): dr/dx = -r^3 x / n, hence dx += r w dy - r^3 x (sum of w dy x) / n;  dw += dy x r */
static void rmsnorm_backward(double *dx, double *dw, const double *dy, const double *x, const double *w, int64_t rows,
                             int64_t n)
{
    for (int64_t t = 0; t < rows; t++, dx += n, dy += n, x += n) {
        const double r = rms_inverse(x, n);
        double sum = 0.0;
        for (int64_t i = 0; i < n; i++) sum += w[i] * dy[i] * x[i];
        for (int64_t i = 0; i < n; i++) {
            dx[i] += r * w[i] * dy[i] - r * r * r * x[i] * sum / (double)n;
            dw[i] += dy[i] * x[i] * r;
        }
    }
}

static double sigmoid(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

/* One layer's weights (or their gradients), in the order of sel_ref_tensors. */
typedef struct {
    double *attn_norm, *q_proj, *k_proj, *v_proj, *o_proj, *q_norm, *k_norm, *ffn_norm, *gate, *up, *down;
    double *sel_q, *sel_k;       /* or NULL */
} layer_weights;

static layer_weights layer_view(const sel_ref_dims *d, double *base, const sel_ref_tensor *tensors, int64_t l)
{
    const sel_ref_tensor *t = tensors + 4 + layer_tensors(d) * l;
    return (layer_weights){ base + t[0].offset, base + t[1].offset, base + t[2].offset, base + t[3].offset,
                            base + t[4].offset, base + t[5].offset, base + t[6].offset, base + t[7].offset,
                            base + t[8].offset, base + t[9].offset, base + t[10].offset,
                            d->bilinear ? base + t[11].offset : NULL, d->bilinear ? base + t[12].offset : NULL };
}

/* What forward leaves of a layer.  x: its input; q0, k0: before the q/k norm; x1: after attention's residual. */
typedef struct {
    double *x, *h, *q0, *k0, *q, *k, *v, *att, *x1, *h1, *gate, *up, *act, *sel_q, *sel_k;
} layer_state;

static layer_state layer_state_new(const sel_ref_dims *d, int64_t T)
{
    const int64_t Q = d->H * d->dh, K = d->Hkv * d->dh;
    return (layer_state){ .x = zeros(T * d->D), .h = zeros(T * d->D), .q0 = zeros(T * Q), .k0 = zeros(T * K),
                          .q = zeros(T * Q), .k = zeros(T * K), .v = zeros(T * K), .att = zeros(T * Q),
                          .x1 = zeros(T * d->D), .h1 = zeros(T * d->D), .gate = zeros(T * d->F),
                          .up = zeros(T * d->F), .act = zeros(T * d->F), .sel_q = zeros(T * d->dh),
                          .sel_k = zeros(T * d->dh) };
}

static void layer_state_free(layer_state *s)
{
    double *const all[] = { s->x,  s->h,  s->q0,   s->k0, s->q,   s->k,     s->v,    s->att,
                            s->x1, s->h1, s->gate, s->up, s->act, s->sel_q, s->sel_k };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

/* Attention of a layer: with sel_q and sel_k, made of the attention norm's output without a norm of their own, where
   the model has them. */
static void layer_attend(const sel_ref_dims *d, const sel_ref_attention *a, const layer_state *s,
                         const sel_ref_results *r)
{
    sel_ref_attention of_layer = *a;
    of_layer.sel_q = d->bilinear ? s->sel_q : NULL;
    of_layer.sel_k = d->bilinear ? s->sel_k : NULL;
    sel_ref_attend(&of_layer, s->q, s->k, s->v, r);
}

/* y [T][D]: the layer's output, from s->x. */
static void layer_forward(const sel_ref_dims *d, const sel_ref_attention *a, const layer_weights *w, layer_state *s,
                          double *y, double *m_max)
{
    const int64_t T = a->B * a->N, D = d->D, Q = d->H * d->dh, K = d->Hkv * d->dh;

    rmsnorm(s->h, s->x, w->attn_norm, T, D);
    linear(s->q0, s->h, w->q_proj, T, Q, D);
    linear(s->k0, s->h, w->k_proj, T, K, D);
    linear(s->v, s->h, w->v_proj, T, K, D);
    rmsnorm(s->q, s->q0, w->q_norm, T * d->H, d->dh);
    rmsnorm(s->k, s->k0, w->k_norm, T * d->Hkv, d->dh);
    if (d->bilinear) {
        linear(s->sel_q, s->h, w->sel_q, T, d->dh, D);
        linear(s->sel_k, s->h, w->sel_k, T, d->dh, D);
    }
    layer_attend(d, a, s, &(sel_ref_results){ .out = s->att, .m_max = m_max });
    linear(s->x1, s->att, w->o_proj, T, D, Q);
    axpy(s->x1, 1.0, s->x, T * D);

    rmsnorm(s->h1, s->x1, w->ffn_norm, T, D);
    linear(s->gate, s->h1, w->gate, T, d->F, D);
    linear(s->up, s->h1, w->up, T, d->F, D);
    for (int64_t i = 0; i < T * d->F; i++) s->act[i] = s->gate[i] * sigmoid(s->gate[i]) * s->up[i];
    linear(y, s->act, w->down, T, D, d->F);
    axpy(y, 1.0, s->x1, T * D);
}

/* dy [T][D]: gradient of the layer's output, replaced by that of its input. */
static void layer_backward(const sel_ref_dims *d, const sel_ref_attention *a, const layer_weights *w,
                           const layer_weights *dw, const layer_state *s, double *dy)
{
    const int64_t T = a->B * a->N, D = d->D, Fw = d->F;
    layer_state g = layer_state_new(d, T);

    linear_backward(g.act, dw->down, dy, s->act, w->down, T, D, Fw);
    for (int64_t i = 0; i < T * Fw; i++) {
        const double x = s->gate[i], sg = sigmoid(x);
        g.up[i] = g.act[i] * x * sg;
        g.gate[i] = g.act[i] * s->up[i] * (sg + x * sg * (1.0 - sg));
    }
    linear_backward(g.h1, dw->gate, g.gate, s->h1, w->gate, T, Fw, D);
    linear_backward(g.h1, dw->up, g.up, s->h1, w->up, T, Fw, D);
    memcpy(g.x1, dy, (size_t)(T * D) * sizeof *dy);
    rmsnorm_backward(g.x1, dw->ffn_norm, g.h1, s->x1, w->ffn_norm, T, D);

    const int64_t Q = d->H * d->dh, K = d->Hkv * d->dh;
    linear_backward(g.att, dw->o_proj, g.x1, s->att, w->o_proj, T, D, Q);
    layer_attend(d, a, s, &(sel_ref_results){ .dout = g.att, .dq = g.q, .dk = g.k, .dv = g.v, .dsel_q = g.sel_q,
                                              .dsel_k = g.sel_k });
    rmsnorm_backward(g.q0, dw->q_norm, g.q, s->q0, w->q_norm, T * d->H, d->dh);
    rmsnorm_backward(g.k0, dw->k_norm, g.k, s->k0, w->k_norm, T * d->Hkv, d->dh);
    linear_backward(g.h, dw->q_proj, g.q0, s->h, w->q_proj, T, Q, D);
    linear_backward(g.h, dw->k_proj, g.k0, s->h, w->k_proj, T, K, D);
    linear_backward(g.h, dw->v_proj, g.v, s->h, w->v_proj, T, K, D);
    if (d->bilinear) {
        linear_backward(g.h, dw->sel_q, g.sel_q, s->h, w->sel_q, T, d->dh, D);
        linear_backward(g.h, dw->sel_k, g.sel_k, s->h, w->sel_k, T, d->dh, D);
    }
    memcpy(dy, g.x1, (size_t)(T * D) * sizeof *dy);
    rmsnorm_backward(dy, dw->attn_norm, g.h, s->x, w->attn_norm, T, D);
    layer_state_free(&g);
}

/* logp [T] = log softmax(logits)[target]; returns the mean of -logp, whose gradient the logits become. */
static double cross_entropy(double *logits, const int32_t *targets, int64_t T, int64_t V, double *logp)
{
    int64_t predicted = 0;
    double loss = 0.0;
    for (int64_t t = 0; t < T; t++) predicted += targets[t] >= 0;
    for (int64_t t = 0; t < T; t++, logits += V) {
        logp[t] = 0.0;
        if (targets[t] < 0) {
            memset(logits, 0, (size_t)V * sizeof *logits);
            continue;
        }
        double top = -INFINITY, sum = 0.0;
        for (int64_t i = 0; i < V; i++) top = fmax(top, logits[i]);
        for (int64_t i = 0; i < V; i++) sum += exp(logits[i] - top);
        logp[t] = logits[targets[t]] - top - log(sum);
        loss -= logp[t];
        for (int64_t i = 0; i < V; i++)
            logits[i] = (exp(logits[i] - top) / sum - (i == targets[t])) / (double)predicted;
    }
    return predicted ? loss / (double)predicted : 0.0;
}

void sel_ref_model_loss(const sel_ref_model *m, const double *params, const int32_t *inputs, const int32_t *targets,
                        int64_t B, int64_t n, double *loss, double *memory_loss, double *logp, double *grad)
{
    const sel_ref_dims *d = &m->dims;
    const int64_t T = B * n, D = d->D;
    int64_t count, total;
    sel_ref_tensor *tensors = sel_ref_tensors(d, &count, &total);
    double *weights = zeros(total);
    memcpy(weights, params, (size_t)total * sizeof *weights);
    double *tok = weights + tensors[0].offset, *pos = weights + tensors[1].offset;
    double *norm = weights + tensors[2].offset, *head = weights + tensors[3].offset;

    const bool memory = m->attention.selective && m->epsilon > 0.0;
    sel_ref_attention a = m->attention;
    a.B = B;
    a.N = n;
    a.H = d->H;
    a.Hkv = d->Hkv;
    a.dh = d->dh;
    if (!memory) a.tau = 0.0;
    if (memory) a.memory_coef = m->epsilon / ((double)(d->L * n * B) * a.tau);

    layer_state *states = calloc((size_t)(d->L > 0 ? d->L : 1), sizeof *states);
    if (!states) abort();
    double *x = zeros(T * D), *h = zeros(T * D), *logits = zeros(T * d->V), *m_max = zeros(B), *lp = zeros(T);

    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < D; i++) x[t * D + i] = tok[inputs[t] * D + i] + pos[t % n * D + i];
    *memory_loss = 0.0;
    for (int64_t l = 0; l < d->L; l++) {
        const layer_weights w = layer_view(d, weights, tensors, l);
        states[l] = layer_state_new(d, T);
        memcpy(states[l].x, x, (size_t)(T * D) * sizeof *x);
        layer_forward(d, &a, &w, &states[l], x, m_max);
        for (int64_t b = 0; memory && b < B; b++)
            *memory_loss += m->epsilon * m_max[b] / (double)(d->L * n * B);
    }
    rmsnorm(h, x, norm, T, D);
    linear(logits, h, head, T, d->V, D);
    *loss = cross_entropy(logits, targets, T, d->V, lp);
    if (logp) memcpy(logp, lp, (size_t)T * sizeof *lp);

    if (grad) {
        memset(grad, 0, (size_t)total * sizeof *grad);
        double *dh = zeros(T * D), *dx = zeros(T * D);
        linear_backward(dh, grad + tensors[3].offset, logits, h, head, T, d->V, D);
        rmsnorm_backward(dx, grad + tensors[2].offset, dh, x, norm, T, D);
        for (int64_t l = d->L - 1; l >= 0; l--) {
            const layer_weights w = layer_view(d, weights, tensors, l), dw = layer_view(d, grad, tensors, l);
            layer_backward(d, &a, &w, &dw, &states[l], dx);
        }
        for (int64_t t = 0; t < T; t++) {
            axpy(grad + tensors[0].offset + inputs[t] * D, 1.0, dx + t * D, D);
            axpy(grad + tensors[1].offset + t % n * D, 1.0, dx + t * D, D);
        }
        free(dh);
        free(dx);
    }
    for (int64_t l = 0; l < d->L; l++) layer_state_free(&states[l]);
    free(states);
    free(x);
    free(h);
    free(logits);
    free(m_max);
    free(lp);
    free(weights);
    free(tensors);
}
