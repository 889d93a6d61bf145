/* core_layout.c: the paper's table 8, the places of tensors, and the initial values (spec, section 7). */
#include <math.h>
#include <string.h>
#include "core/base/mem.h"
#include "core/model/layout.h"
#include "tests/check.h"

static sel_dims paper(int64_t d)
{
    return (sel_dims){ .V = 8192, .N = 512, .D = 64 * d, .L = d, .H = d, .Hkv = d, .dh = 64, .F = 64 * d * 8 / 3 };
}

/* params = D (L (4D + 3F + 6) + 16440): the matrices of the layers are pinned by it for every d. */
static void table_8(void)
{
    static const struct { int64_t d, params;
    } rows[] = {
        {8, 33603584},   {10, 59699200},  {12, 97615872},  {14, 149666048}, {16, 218226688},  {18, 305717760},
        {20, 414387200}, {22, 546641920}, {24, 704950272}, {26, 891468032}, {28, 1108645888},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        const sel_dims d = paper(rows[i].d);
        sel_layout *l;
        CHECK_OK(sel_layout_new(&l, &d));
        int64_t matrices = 0;
        for (int t = 0; t < l->n_tensors; t++)
            if (strncmp(l->tensors[t].name, "layers.", 7) == 0 && l->tensors[t].rank == 2)
                matrices += l->tensors[t].count;
        CHECK(matrices == rows[i].params - d.D * (6 * d.L + 16440), "d = %lld: %lld", (long long)rows[i].d,
              (long long)matrices);
        CHECK(sel_layout_find(l, "lm_head.weight")->shape[0] == 8192, "untied output matrix");
        sel_layout_free(&l);
    }
}

static void places(bool bilinear)
{
    const sel_dims d = { .V = 11, .N = 7, .D = 10, .L = 2, .H = 4, .Hkv = 2, .dh = 3, .F = 13, .bilinear = bilinear };
    sel_layout *l;
    CHECK_OK(sel_layout_new(&l, &d));
    int64_t end = 0, sum = 0;
    for (int i = 0; i < l->n_tensors; i++) {
        const sel_tensor *t = &l->tensors[i];
        CHECK(t->offset >= end, "%s overlaps", t->name);
        CHECK(t->count == t->shape[0] * t->shape[1], "%s", t->name);
        CHECK(t->decay == (t->rank == 2 && !strstr(t->name, "embed")), "%s: weight decay", t->name);
        end = t->offset + t->count;
        sum += t->count;
    }
    CHECK(end <= l->total && sum == l->parameters, "total %lld", (long long)l->total);
    CHECK(l->n_tensors == 4 + (bilinear ? 13 : 11) * 2, "%d tensors", l->n_tensors);
    for (int i = 0; i < 2; i++) {
        char name[64];
        const int64_t q = l->layers[i].qkv, g = l->layers[i].gate_up;
        snprintf(name, sizeof name, "layers.%d.attn.k_proj.weight", i);
        CHECK(sel_layout_find(l, name)->offset == q + 4 * 3 * 10, "k follows q");
        snprintf(name, sizeof name, "layers.%d.attn.v_proj.weight", i);
        CHECK(sel_layout_find(l, name)->offset == q + 6 * 3 * 10, "v follows k");
        for (int k = 0; k < 2; k++) {
            snprintf(name, sizeof name, "layers.%d.attn.sel_%c.weight", i, "qk"[k]);
            const sel_tensor *t = sel_layout_find(l, name);
            CHECK((t != NULL) == bilinear, "%s: there", name);
            CHECK(!t || (t->offset == q + (8 + k) * 3 * 10 && t->shape[0] == 3 && t->shape[1] == 10 && t->decay),
                  "%s: [dh][D] after v, decayed", name);
        }
        snprintf(name, sizeof name, "layers.%d.ffn.up_proj.weight", i);
        CHECK(sel_layout_find(l, name)->offset == g + 13 * 10, "up follows gate");
    }
    CHECK(sel_layout_find(l, "layers.2.attn_norm.weight") == NULL, "no third layer");
    sel_layout_free(&l);
}

static void initial_values(void)
{
    sel_dims d = paper(2);
    sel_layout *l;
    d.bilinear = true;
    CHECK_OK(sel_layout_new(&l, &d));
    float *a = sel_alloc((size_t)l->total * 4, "a"), *b = sel_alloc((size_t)l->total * 4, "b");
    sel_layout_init_params(l, 7, a, 1);
    sel_layout_init_params(l, 7, b, 3);
    CHECK(memcmp(a, b, (size_t)l->total * 4) == 0, "values depend on threads");
    sel_layout_init_params(l, 8, b, 1);
    CHECK(memcmp(a, b, (size_t)l->total * 4) != 0, "values do not depend on the seed");
    for (int i = 0; i < l->n_tensors; i++) {
        const sel_tensor *t = &l->tensors[i];
        double sum = 0.0, squares = 0.0, most = 0.0;
        for (int64_t k = 0; k < t->count; k++) {
            const double w = a[t->offset + k];
            sum += w;
            squares += w * w;
            most = fmax(most, fabs(w));
        }
        const double n = (double)t->count, mean = sum / n, deviation = sqrt(squares / n - mean * mean);
        if (t->init_std == 0.0) {
            CHECK(mean == 1.0 && deviation == 0.0, "%s: scales start at 1", t->name);
            continue;
        }
        /* A normal cut at 2 deviations has deviation 0.8796 of the uncut one's. */
        CHECK(fabs(deviation / (0.8796 * t->init_std) - 1.0) < 5.0 / sqrt(n), "%s: deviation %g", t->name, deviation);
        CHECK(fabs(mean) < 5.0 * deviation / sqrt(n), "%s: mean %g", t->name, mean);
        CHECK(most <= 2.0001 * t->init_std && most > 1.9 * t->init_std, "%s: largest %g", t->name, most);
    }
    sel_free(a);
    sel_free(b);
    sel_layout_free(&l);
}

int main(void)
{
    table_8();
    places(false);
    places(true);
    initial_values();
    return check_verdict();
}
