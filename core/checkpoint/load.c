/* load.c: tensors by name from a checkpoint's files straight into the arrays. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/checkpoint/stepdir.h"

static int by_name(const void *a, const void *b)
{
    return strcmp(((const sel_st_entry *)a)->name, ((const sel_st_entry *)b)->name);
}

static sel_status wrong_shape(const char *path, const sel_st_entry *has, const sel_st_entry *want)
{
    char text[2][64];

    for (int i = 0; i < 2; i++) {
        const sel_st_entry *e = i ? want : has;
        int at = snprintf(text[i], sizeof text[i], "[");
        for (int r = 0; r < e->rank; r++)
            at += snprintf(text[i] + at, sizeof text[i] - (size_t)at, "%s%lld", r ? ", " : "", (long long)e->shape[r]);
        snprintf(text[i] + at, sizeof text[i] - (size_t)at, "]");
    }
    return sel_fail(SEL_EFILE, "%s: tensor %s has shape %s, the model needs %s", path, has->name, text[0], text[1]);
}

static bool same_shape(const sel_st_entry *a, const sel_st_entry *b)
{
    if (a->rank != b->rank) return false;
    for (int r = 0; r < a->rank; r++)
        if (a->shape[r] != b->shape[r]) return false;
    return true;
}

/* For each tensor of `want` where it is in the file: *found[i], begin and end from the start of the data. */
static sel_status match(const sel_st_index *want, sel_st_index *has, const sel_st_entry **found, const char *path)
{
    qsort(has->entries, (size_t)has->n, sizeof *has->entries, by_name);
    for (int i = 0; i < want->n; i++) {
        const sel_st_entry *e = &want->entries[i];
        found[i] = bsearch(e, has->entries, (size_t)has->n, sizeof *e, by_name);
        if (!found[i]) return sel_fail(SEL_EFILE, "%s: tensor %s is missing", path, e->name);
        if (!same_shape(found[i], e)) return wrong_shape(path, found[i], e);
    }
    if (has->n == want->n) return SEL_OK; /* names in a file differ, so there is nothing else in it */

    for (int k = 0; k < has->n; k++) {
        bool wanted = false;
        for (int i = 0; i < want->n && !wanted; i++) wanted = found[i] == &has->entries[k];
        if (!wanted) return sel_fail(SEL_EFILE, "%s: tensor %s is not part of the model", path, has->entries[k].name);
    }
    return SEL_OK;
}

/* The stretches' floats of one tensor, from `at` in the file: stretches lie one after another in `array`. */
static sel_status load_tensor(int fd, const sel_tensor *t, int64_t at, const sel_stretch *stretches, int n_stretches,
                              float *array, const char *path)
{
    for (int i = 0; i < n_stretches; i++) {
        const sel_stretch *s = &stretches[i];
        const int64_t begin = s->begin > t->offset ? s->begin : t->offset;
        const int64_t stop = t->offset + t->count, end = s->end < stop ? s->end : stop;

        if (begin < end)
            SEL_TRY(sel_pread_all(fd, array + (begin - s->begin), (size_t)(end - begin) * sizeof(float),
                                  at + (begin - t->offset) * (int64_t)sizeof(float), path));
        array += s->end - s->begin;
    }
    return SEL_OK;
}

/* Loads the stretches of FOLDER/name, which holds one tensor for every tensor of the layout and each of the n
   prefixes. */
static sel_status load_file(const char *folder, const char *name, const sel_layout *layout, const char *const *prefixes,
                            int n, const sel_stretch *stretches, int n_stretches, float *const *arrays)
{
    char path[SEL_PATH_MAX];
    sel_st_index want = {0}, has = {0};
    const sel_st_entry **found = NULL;
    int fd = -1;
    sel_status rc;

    if ((rc = sel_path_join(path, folder, name)) != SEL_OK) goto out;
    if ((rc = sel_step_index(&want, layout, prefixes, n)) != SEL_OK) goto out;
    if ((rc = sel_st_read(&has, path)) != SEL_OK) goto out;
    found = calloc((size_t)want.n + 1, sizeof(const sel_st_entry *));
    if (!found) {
        rc = sel_fail(SEL_ENOMEM, "%s: out of memory", path);
        goto out;
    }
    if ((rc = match(&want, &has, found, path)) != SEL_OK) goto out;

    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        rc = sel_fail(SEL_EIO, "%s: cannot open: %s", path, strerror(errno));
        goto out;
    }
    for (int i = 0; i < want.n && rc == SEL_OK; i++) {
        rc = load_tensor(fd, &layout->tensors[i % layout->n_tensors], has.header_bytes + found[i]->begin, stretches,
                         n_stretches, arrays[i / layout->n_tensors], path);
    }
out:
    if (fd >= 0) close(fd);
    free(found);
    sel_st_free(&has);
    sel_st_free(&want);
    return rc;
}

sel_status sel_checkpoint_load_moments(const sel_manifest *m, const sel_layout *layout, const sel_stretch *stretches,
                                       int n, float *exp_avg, float *exp_avg_sq)
{
    static const char *const optimizer[] = {"exp_avg.", "exp_avg_sq."};
    float *const moments[] = {exp_avg, exp_avg_sq};

    return load_file(m->path, SEL_STEP_OPTIMIZER, layout, optimizer, 2, stretches, n, moments);
}

sel_status sel_checkpoint_load(const sel_manifest *m, const sel_layout *layout, float *params, float *exp_avg,
                               float *exp_avg_sq)
{
    static const char *const model[] = {""};
    const sel_stretch whole = {.begin = 0, .end = layout->total};

    SEL_ASSERT(params && !exp_avg == !exp_avg_sq);
    SEL_TRY(load_file(m->path, SEL_STEP_MODEL, layout, model, 1, &whole, 1, &params));
    if (!exp_avg) return SEL_OK;
    return sel_checkpoint_load_moments(m, layout, &whole, 1, exp_avg, exp_avg_sq);
}
