/* generate.c: sampling, and the decoding loop over a cache that carries F. */
#include "core/infer/generate.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "core/base/rng.h"

/* Prompts enter the cache this many tokens at a time. */
enum { PREFILL = 128 };

static int by_logit(const void *a, const void *b, void *context)
{
    const float *logits = context;
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return logits[x] > logits[y] ? -1 : logits[x] < logits[y] ? 1 : x < y ? -1 : 1;
}

int32_t sel_sample(const sel_sampling *s, const float *logits, int64_t V, int64_t index, int32_t *order)
{
    int32_t best = 0;
    for (int32_t v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    if (s->temperature <= 0.0) return best;

    for (int32_t v = 0; v < V; v++) order[v] = v;
    qsort_r(order, (size_t)V, sizeof *order, by_logit, (void *)(uintptr_t)logits);

    /* Of the top_k likeliest, the shortest run that holds top_p of the probability. */
    const int64_t k = s->top_k > 0 && s->top_k < V ? s->top_k : V;
    const double top = logits[best];
    double total = 0.0, kept = 0.0;
    for (int64_t r = 0; r < k; r++) total += exp(((double)logits[order[r]] - top) / s->temperature);
    int64_t n = 0;
    while (n < k && (n == 0 || kept < s->top_p * total))
        kept += exp(((double)logits[order[n++]] - top) / s->temperature);

    double left = kept * sel_rng_uniform(s->seed, sel_rng_stream("sample"), (uint64_t)index);
    for (int64_t r = 0; r < n; r++) {
        left -= exp(((double)logits[order[r]] - top) / s->temperature);
        if (left <= 0.0) return order[r];
    }
    return order[n - 1];
}

static double log_probability(const float *logits, int64_t V, int32_t id)
{
    double top = logits[0], sum = 0.0;
    for (int64_t v = 1; v < V; v++) top = fmax(top, (double)logits[v]);
    for (int64_t v = 0; v < V; v++) sum += exp((double)logits[v] - top);
    return (double)logits[id] - top - log(sum);
}

/* ids[from .. to) into the cache; logits of the last one. */
static sel_status extend(sel_model *m, const float *params, const int32_t *ids, int64_t from, int64_t to, int64_t step,
                         float *logits)
{
    for (int64_t i = from; i < to; i += step)
        SEL_TRY(sel_model_extend(m, params, ids + i, 1, to - i < step ? to - i : step, logits));
    return SEL_OK;
}

sel_status sel_generate(const sel_loaded *l, const int32_t *ids, int64_t n, const sel_generate_options *o, int32_t *out,
                        double *logp, int64_t *made, sel_stop *stop)
{
    const sel_dims *d = &l->layout->dims;
    const int64_t step = o->cache && d->N > PREFILL ? PREFILL : d->N;
    const int32_t eos = sel_tokenizer_eos(l->tokenizer);
    const int64_t pieces = sel_tokenizer_size(l->tokenizer) < d->V ? sel_tokenizer_size(l->tokenizer) : d->V;
    sel_model *m = NULL;
    int32_t *order = NULL, *all = NULL;
    float *logits = NULL;
    sel_status rc;

    *made = 0;
    *stop = SEL_STOP_LENGTH;
    if (n > d->N)
        return sel_fail(SEL_EUSER, "the prompt has %" PRId64 " tokens, BOS included; the model's context is %" PRId64,
                        n, d->N);
    order = malloc((size_t)d->V * sizeof *order);
    logits = malloc((size_t)d->V * sizeof *logits);
    all = malloc((size_t)(d->N + 1) * sizeof *all);
    if (!order || !logits || !all) {
        rc = sel_fail(SEL_ENOMEM, "no memory for %" PRId64 " tokens", d->N);
        goto out;
    }
    memcpy(all, ids, (size_t)n * sizeof *all);
    if ((rc = sel_loaded_model(l, SEL_USE_DECODE, 1, step, &m)) != SEL_OK) goto out;

    /* A token is drawn from the logits of the one before it, so N tokens of context predict one more. */
    for (int64_t k = 0; k < o->most; k++) {
        if (n + k > d->N) {
            *stop = SEL_STOP_CONTEXT;
            break;
        }
        if (!o->cache) sel_model_restart(m);
        if ((rc = extend(m, l->params, all, sel_model_cached(m), n + k, step, logits)) != SEL_OK) goto out;
        out[k] = all[n + k] = sel_sample(&o->sampling, logits, pieces, k, order);
        logp[k] = log_probability(logits, d->V, out[k]);
        *made = k + 1;
        if (out[k] == eos) {
            *stop = SEL_STOP_EOS;
            break;
        }
    }
out:
    sel_model_free(&m);
    free(order);
    free(logits);
    free(all);
    return rc;
}
