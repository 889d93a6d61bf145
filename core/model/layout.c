/* layout.c: where each parameter lies, and what it starts as (spec, section 7). */
#include "core/model/layout.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "core/base/rng.h"

enum { ALIGN_FLOATS = 16 };   /* one cache line */

sel_dims sel_dims_of(const sel_config *c, int64_t vocab)
{
    return (sel_dims){ .V = c->model.vocab ? c->model.vocab : vocab, .N = c->model.context, .D = c->model.width,
                       .L = c->model.layers, .H = c->model.heads, .Hkv = c->model.kv_heads,
                       .dh = c->model.head_width, .F = c->model.ffn_width,
                       .bilinear = c->attention.selection.source == SEL_SOURCE_BILINEAR };
}

static void align(sel_layout *l)
{
    l->total = (l->total + ALIGN_FLOATS - 1) / ALIGN_FLOATS * ALIGN_FLOATS;
}

/* Appends a tensor without a gap and returns its offset. */
static int64_t append(sel_layout *l, const char *name, int64_t rows, int64_t columns, double init_std, bool decay)
{
    sel_tensor *t = &l->tensors[l->n_tensors++];
    snprintf(t->name, sizeof t->name, "%s", name);
    t->rank = columns ? 2 : 1;
    t->shape[0] = rows;
    t->shape[1] = columns ? columns : 1;
    t->offset = l->total;
    t->count = rows * t->shape[1];
    t->init_std = init_std;
    t->decay = decay;
    l->total += t->count;
    l->parameters += t->count;
    return t->offset;
}

static int64_t append_scale(sel_layout *l, const char *name, int64_t n)
{
    align(l);
    return append(l, name, n, 0, 0.0, false);
}

/* A linear layer's matrix [out][in]: standard deviation gain / sqrt(fan_in), decayed. */
static int64_t append_matrix(sel_layout *l, const char *name, int64_t out, int64_t in, double gain)
{
    return append(l, name, out, in, gain / sqrt((double)in), true);
}

static void append_layer(sel_layout *l, int64_t index)
{
    const sel_dims *d = &l->dims;
    const double residual = 1.0 / sqrt(2.0 * (double)d->L);   /* output projections start smaller */
    sel_layer_offsets *o = &l->layers[index];
    char name[64];

#define NAME(suffix) (snprintf(name, sizeof name, "layers.%lld." suffix, (long long)index), name)
    align(l);
    o->begin = l->total;
    o->attn_norm = append_scale(l, NAME("attn_norm.weight"), d->D);
    align(l);
    o->qkv = append_matrix(l, NAME("attn.q_proj.weight"), d->H * d->dh, d->D, 1.0);
    append_matrix(l, NAME("attn.k_proj.weight"), d->Hkv * d->dh, d->D, 1.0);
    append_matrix(l, NAME("attn.v_proj.weight"), d->Hkv * d->dh, d->D, 1.0);
    if (d->bilinear) {
        append_matrix(l, NAME("attn.sel_q.weight"), d->dh, d->D, 1.0);
        append_matrix(l, NAME("attn.sel_k.weight"), d->dh, d->D, 1.0);
    }
    align(l);
    o->o_proj = append_matrix(l, NAME("attn.o_proj.weight"), d->D, d->H * d->dh, residual);
    o->q_norm = append_scale(l, NAME("attn.q_norm.weight"), d->dh);
    o->k_norm = append_scale(l, NAME("attn.k_norm.weight"), d->dh);
    o->ffn_norm = append_scale(l, NAME("ffn_norm.weight"), d->D);
    align(l);
    o->gate_up = append_matrix(l, NAME("ffn.gate_proj.weight"), d->F, d->D, 1.0);
    append_matrix(l, NAME("ffn.up_proj.weight"), d->F, d->D, 1.0);
    align(l);
    o->down_proj = append_matrix(l, NAME("ffn.down_proj.weight"), d->D, d->F, residual);
    align(l);
    o->end = l->total;
#undef NAME
}

sel_status sel_layout_new(sel_layout **out, const sel_dims *dims)
{
    sel_layout *l = calloc(1, sizeof *l);
    *out = NULL;
    if (l) {
        l->dims = *dims;
        l->tensors = calloc((size_t)(4 + (dims->bilinear ? 13 : 11) * dims->L), sizeof *l->tensors);
        l->layers = calloc((size_t)dims->L, sizeof *l->layers);
    }
    if (!l || !l->tensors || !l->layers) {
        sel_layout_free(&l);
        return sel_fail(SEL_ENOMEM, "no memory for a table of %lld layers", (long long)dims->L);
    }
    const double embed_std = 0.02;
    l->tok_embed = append(l, "tok_embed.weight", dims->V, dims->D, embed_std, false);
    align(l);
    l->pos_embed = append(l, "pos_embed.weight", dims->N, dims->D, embed_std, false);
    for (int64_t i = 0; i < dims->L; i++) append_layer(l, i);
    l->final_norm = append_scale(l, "final_norm.weight", dims->D);
    align(l);
    l->lm_head = append_matrix(l, "lm_head.weight", dims->V, dims->D, 1.0);
    align(l);
    *out = l;
    return SEL_OK;
}

void sel_layout_free(sel_layout **l)
{
    if (!*l) return;
    free((*l)->tensors);
    free((*l)->layers);
    free(*l);
    *l = NULL;
}

const sel_tensor *sel_layout_find(const sel_layout *l, const char *name)
{
    for (int i = 0; i < l->n_tensors; i++)
        if (strcmp(l->tensors[i].name, name) == 0) return &l->tensors[i];
    return NULL;
}

/* The standard normal's inverse distribution function (Acklam's rational approximation, relative
   error 1.2e-9), so that one uniform number makes one truncated normal value. */
static double normal_quantile(double p)
{
    static const double a[] = { -3.969683028665376e+01, 2.209460984245205e+02, -2.759285104469687e+02,
                                1.383577518672690e+02, -3.066479806614716e+01, 2.506628277459239e+00 };
    static const double b[] = { -5.447609879822406e+01, 1.615858368580409e+02, -1.556989798598866e+02,
                                6.680131188771972e+01, -1.328068155288572e+01 };
    static const double c[] = { -7.784894002430293e-03, -3.223964580411365e-01, -2.400758277161838e+00,
                                -2.549732539343734e+00, 4.374664141464968e+00, 2.938163982698783e+00 };
    static const double d[] = { 7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e+00,
                                3.754408661907416e+00 };
    const double tail = 0.02425;
    if (p < tail || p > 1.0 - tail) {
        const double q = sqrt(-2.0 * log(p < tail ? p : 1.0 - p));
        const double x = (((((c[0] * q + c[1]) * q + c[2]) * q + c[3]) * q + c[4]) * q + c[5]) /
                         ((((d[0] * q + d[1]) * q + d[2]) * q + d[3]) * q + 1.0);
        return p < tail ? x : -x;
    }
    const double q = p - 0.5, r = q * q;
    return (((((a[0] * r + a[1]) * r + a[2]) * r + a[3]) * r + a[4]) * r + a[5]) * q /
           (((((b[0] * r + b[1]) * r + b[2]) * r + b[3]) * r + b[4]) * r + 1.0);
}

void sel_layout_init_params(const sel_layout *l, uint64_t seed, float *params, int threads)
{
    const double low = 0.022750131948179195;   /* P(z < -2) */
    memset(params, 0, (size_t)l->total * sizeof *params);
    for (int i = 0; i < l->n_tensors; i++) {
        const sel_tensor *t = &l->tensors[i];
        const uint64_t stream = sel_rng_stream(t->name);
        float *w = params + t->offset;
        #pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t k = 0; k < t->count; k++)
            w[k] = t->init_std == 0.0 ? 1.0f
                 : (float)(t->init_std * normal_quantile(low + (1.0 - 2.0 * low) *
                                                         sel_rng_uniform(seed, stream, (uint64_t)k)));
    }
}
