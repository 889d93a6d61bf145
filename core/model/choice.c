/* choice.c: measuring, writing and reading who makes the products. */
#include "core/model/choice.h"

#include <stdio.h>
#include <string.h>
#include "core/model/plan.h"

enum { LAYERS = 5 };

typedef struct {
    const char *name;
    int64_t out, in, rows;
} layer;

static void layers_of(layer list[LAYERS], const sel_dims *d, int64_t rows)
{
    list[0] = (layer){ "qkv", qkv_width(d), d->D, rows };
    list[1] = (layer){ "o_proj", d->D, q_width(d), rows };
    list[2] = (layer){ "gate_up", 2 * d->F, d->D, rows };
    list[3] = (layer){ "down_proj", d->D, d->F, rows };
    list[4] = (layer){ "lm_head", d->V, d->D, sel_model_logit_rows(d, rows) };
}

sel_status sel_choice_probe(sel_linear_engine *e, const sel_dims *d, int64_t rows, char text[SEL_CHOICE_MAX])
{
    layer list[LAYERS];
    int used = 0;
    layers_of(list, d, rows);
    for (int i = 0; i < LAYERS; i++) {
        sel_linear_choice c = { .out = list[i].out, .in = list[i].in };
        SEL_TRY(sel_linear_probe(e, list[i].rows, &c));
        used += snprintf(text + used, (size_t)(SEL_CHOICE_MAX - used), "%s%s=%.3s", i ? "," : "", list[i].name, c.by);
    }
    return SEL_OK;
}

sel_status sel_choice_apply(sel_linear_engine *e, const sel_dims *d, const char *text)
{
    layer list[LAYERS];
    layers_of(list, d, 1);
    for (int i = 0; i < LAYERS; i++) {
        const size_t name = strlen(list[i].name);
        sel_linear_choice c = { .out = list[i].out, .in = list[i].in };
        if (i > 0 && *text == ',') text++;
        if (strncmp(text, list[i].name, name) != 0 || text[name] != '=' || strspn(text + name + 1, "mib") != 3)
            return sel_fail(SEL_EUSER, "compute.linear_choice: expected %s= and three of the letters m, i, b at \"%s\"",
                            list[i].name, text);
        memcpy(c.by, text + name + 1, sizeof c.by);
        text += name + 4;
        SEL_TRY(sel_linear_choose(e, &c));
    }
    if (*text) return sel_fail(SEL_EUSER, "compute.linear_choice: \"%s\" is too much at its end", text);
    return SEL_OK;
}
