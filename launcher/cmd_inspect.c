/* cmd_inspect.c: `selectra inspect CKPT`: what a checkpoint holds, tensor by tensor. */
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include "core/infer/loaded.h"
#include "launcher/launcher.h"
#include "launcher/options.h"

typedef struct {
    double mean, deviation, least, most;
    int64_t not_finite;
} summary;

static summary summarize(const float *x, int64_t n)
{
    summary s = { .least = INFINITY, .most = -INFINITY };
    double sum = 0.0, squares = 0.0;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            s.not_finite++;
            continue;
        }
        sum += x[i];
        squares += (double)x[i] * x[i];
        s.least = fmin(s.least, x[i]);
        s.most = fmax(s.most, x[i]);
    }
    const double finite = (double)(n - s.not_finite);
    s.mean = sum / finite;
    s.deviation = sqrt(fmax(0.0, squares / finite - s.mean * s.mean));
    return s;
}

static void warn(void *ctx, const char *line)
{
    (void)ctx;
    fprintf(stderr, "selectra inspect: %s\n", line);
}

static void print(const sel_loaded *l)
{
    printf("%s: step %" PRId64 ", %" PRId64 " tokens, %" PRId64 " parameters, tokenizer of %" PRId64
           " pieces; all checksums hold\n\n%-36s %16s %11s %11s %11s %11s\n", l->manifest.path, l->manifest.step,
           l->manifest.tokens, l->layout->parameters, sel_tokenizer_size(l->tokenizer), "tensor", "shape", "mean",
           "deviation", "least", "most");
    for (int i = 0; i < l->layout->n_tensors; i++) {
        const sel_tensor *t = &l->layout->tensors[i];
        const summary s = summarize(l->params + t->offset, t->count);
        char shape[48];
        if (t->rank == 2) snprintf(shape, sizeof shape, "[%" PRId64 ", %" PRId64 "]", t->shape[0], t->shape[1]);
        else snprintf(shape, sizeof shape, "[%" PRId64 "]", t->shape[0]);
        printf("%-36s %16s %11.3e %11.3e %11.3e %11.3e", t->name, shape, s.mean, s.deviation, s.least, s.most);
        if (s.not_finite) printf("  %" PRId64 " not finite", s.not_finite);
        putchar('\n');
    }
    printf("\n%s", l->manifest.config);
}

/* A finite number, or null. */
static json_t *number(double x) { return isfinite(x) ? json_real(x) : json_null(); }

static void print_json(const sel_loaded *l)
{
    json_t *tensors = json_array();
    for (int i = 0; i < l->layout->n_tensors; i++) {
        const sel_tensor *t = &l->layout->tensors[i];
        const summary s = summarize(l->params + t->offset, t->count);
        json_t *shape = t->rank == 2 ? json_pack("[I,I]", (json_int_t)t->shape[0], (json_int_t)t->shape[1])
                                     : json_pack("[I]", (json_int_t)t->shape[0]);
        json_array_append_new(tensors, json_pack("{s:s, s:o, s:o, s:o, s:o, s:o, s:I}", "name", t->name, "shape", shape,
                                                 "mean", number(s.mean), "deviation", number(s.deviation), "least",
                                                 number(s.least), "most", number(s.most), "not_finite",
                                                 (json_int_t)s.not_finite));
    }
    json_t *all = json_pack("{s:s, s:I, s:I, s:I, s:I, s:s, s:o}", "path", l->manifest.path, "step",
                            (json_int_t)l->manifest.step, "tokens", (json_int_t)l->manifest.tokens, "parameters",
                            (json_int_t)l->layout->parameters, "vocab", (json_int_t)l->layout->dims.V, "config",
                            l->manifest.config, "tensors", tensors);
    json_dumpf(all, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(all);
}

int sel_cmd_inspect(int argc, char **argv)
{
    bool json = false;
    const sel_option options[] = { { "json", SEL_OPT_FLAG, &json, 0, NULL, "one JSON object" } };
    const sel_command command = { "selectra inspect", "CKPT [--json]", NULL, options, 1 };
    sel_loaded l;
    int n;

    const int status = sel_options_begin(&command, argc, argv, 1, 1, &n);
    if (status >= 0) return status;
    const sel_status rc = sel_loaded_open(&l, argv[1], 1, warn, NULL);
    if (rc != SEL_OK) {
        fprintf(stderr, "selectra inspect: %s\n", sel_error());
        return sel_exit_status(rc);
    }
    if (json) print_json(&l);
    else print(&l);
    sel_loaded_close(&l);
    return SEL_EXIT_DONE;
}
