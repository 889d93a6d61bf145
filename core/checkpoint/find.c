/* find.c: the newest intact checkpoint at a path.
 *
 * The folder is scanned; `latest` is not asked.  It is for people and scripts: a job killed between the two renames
 * leaves it one step behind, and it cannot know that what it points at has been damaged since.
 */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/checkpoint/stepdir.h"

static sel_status check_files(const char *folder, const sel_step_file *files, int n)
{
    char path[SEL_PATH_MAX];
    sel_st_index ix;
    uint32_t crc;

    /* Sizes first: that is quick, and finds most of what goes wrong. */
    for (int i = 0; i < n; i++) SEL_TRY(sel_step_crc32(folder, &files[i], 0, 0, &crc));
    for (int i = 0; i < n; i++) {
        SEL_TRY(sel_step_crc32(folder, &files[i], 0, files[i].bytes, &crc));
        SEL_TRY(sel_step_compare(folder, &files[i], crc));
        if (strcmp(files[i].name, SEL_STEP_MODEL) != 0 && strcmp(files[i].name, SEL_STEP_OPTIMIZER) != 0) continue;
        SEL_TRY(sel_path_join(path, folder, files[i].name));
        SEL_TRY(sel_st_read(&ix, path));
        sel_st_free(&ix);
    }
    return SEL_OK;
}

/* Everything about one step folder.  step: what its name says, -1 when it says nothing. */
static sel_status check_folder(sel_manifest *m, const char *folder, int64_t step)
{
    sel_step_file files[SEL_STEP_FILES];
    int n;

    SEL_TRY(sel_step_read_manifest(m, files, &n, folder));
    sel_status rc = check_files(folder, files, n);
    if (rc == SEL_OK && step >= 0 && m->step != step)
        rc = sel_fail(SEL_EFILE, "%s/%s: is of step %lld", folder, SEL_STEP_MANIFEST, (long long)m->step);
    if (rc != SEL_OK) sel_manifest_free(m);
    return rc;
}

/* What is not as the manifest says is damage, whatever the system called it. */
static sel_status as_damage(sel_status rc)
{
    return rc == SEL_OK || rc == SEL_ENOMEM ? rc : SEL_EFILE;
}

static sel_status find_newest(sel_manifest *m, const char *dir, void (*warn)(void *ctx, const char *line), void *ctx)
{
    int64_t *steps;
    int n;
    char name[32], folder[SEL_PATH_MAX], newest[1024] = "";
    sel_status rc = sel_step_list(dir, &steps, &n);

    if (rc != SEL_OK) return rc;
    if (n == 0) return sel_fail(SEL_EUSER, "%s: no checkpoint there", dir);
    for (int i = 0; i < n; i++) {
        sel_step_name(name, steps[i]);
        rc = sel_path_join(folder, dir, name);
        if (rc == SEL_OK) rc = as_damage(check_folder(m, folder, steps[i]));
        if (rc == SEL_OK && i > 0 && warn) {
            char line[SEL_PATH_MAX + 64];
            snprintf(line, sizeof line, "%s: the newest intact one, is used instead", m->path);
            warn(ctx, line);
        }
        if (rc != SEL_EFILE) break;
        if (i == 0) snprintf(newest, sizeof newest, "%s", sel_error());
        if (warn) warn(ctx, sel_error());
    }
    free(steps);
    if (rc != SEL_EFILE) return rc;
    return sel_fail(SEL_EFILE, "%s: none of its %d checkpoint%s is intact; the newest: %.700s", dir, n,
                    n == 1 ? "" : "s", newest);
}

/* The step that a step folder's name says, also through a link such as `latest`; -1: not such a name. */
static int64_t step_of_path(const char *path)
{
    char *real = realpath(path, NULL);
    const char *slash = real ? strrchr(real, '/') : NULL;
    const int64_t step = slash ? sel_step_of_name(slash + 1) : -1;

    free(real);
    return step;
}

sel_status sel_checkpoint_find(sel_manifest *m, const char *path, void (*warn)(void *ctx, const char *line), void *ctx)
{
    char given[SEL_PATH_MAX], inner[SEL_PATH_MAX];
    size_t length = strlen(path);

    *m = (sel_manifest){0};
    while (length > 1 && path[length - 1] == '/') length--;
    if (length == 0 || length >= sizeof given) return sel_fail(SEL_EUSER, "a checkpoint's path is empty or too long");
    snprintf(given, sizeof given, "%.*s", (int)length, path);

    const int64_t step = step_of_path(given);
    if (!sel_path_exists(given)) return sel_fail(SEL_EUSER, "%s: no such checkpoint or run folder", given);
    if (!sel_path_is_dir(given))
        return sel_fail(SEL_EUSER, "%s: is a file; expected a run folder or a step folder", given);
    SEL_TRY(sel_path_join(inner, given, SEL_STEP_MANIFEST));
    if (step >= 0 || sel_path_exists(inner)) return as_damage(check_folder(m, given, step));
    SEL_TRY(sel_path_join(inner, given, "checkpoints"));
    return find_newest(m, sel_path_is_dir(inner) ? inner : given, warn, ctx);
}
