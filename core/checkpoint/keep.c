/* keep.c: putting checkpoints in place, verifying them, and deleting old ones. */
#include "core/checkpoint/keep.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zlib.h>

#include "core/checkpoint/stepdir.h"
#include "dist/mesh.h"

static sel_status fail_errno(const char *path, const char *doing)
{
    return sel_fail(SEL_EIO, "%s: cannot %s: %s", path, doing, strerror(errno));
}

sel_status sel_keep_remove_stale(const char *dir)
{
    char path[SEL_PATH_MAX];
    const struct dirent *entry;
    sel_status rc = SEL_OK;
    DIR *d = opendir(dir);

    if (!d) return fail_errno(dir, "read the folder");
    while (rc == SEL_OK && (entry = readdir(d))) {
        if (strncmp(entry->d_name, ".tmp-", 5) != 0) continue;
        rc = sel_path_join(path, dir, entry->d_name);
        if (rc == SEL_OK) rc = sel_remove_tree(path);
    }
    closedir(d);
    return rc;
}

/* The share of a file that a rank reads back is the one that its neighbour wrote: with several hosts that shows that
   the bytes have left the writer. */
static void share_to_read(const sel_step_file *file, int rank, int size, int64_t *begin, int64_t *end)
{
    sel_mesh_share(file->bytes, (rank + 1) % size, size, begin, end);
}

/* The files of a manifest, the same on every rank. */
typedef struct {
    sel_step_file files[SEL_STEP_FILES];
    int n;
} file_list;

/* [collective] */
static sel_status read_list(sel_comm *c, file_list *list, const char *folder)
{
    sel_manifest m = {0};
    sel_status rc = SEL_OK;

    if (sel_comm_rank(c) == 0) rc = sel_step_read_manifest(&m, list->files, &list->n, folder);
    sel_manifest_free(&m);
    SEL_TRY(sel_comm_agree(c, rc));
    sel_comm_bcast(c, list, sizeof *list, 0);
    return SEL_OK;
}

/* Rank 0: crcs[r][SEL_STEP_FILES] are of the shares that the ranks have read. */
static sel_status compare_all(const file_list *list, const uint32_t *crcs, int size, const char *folder)
{
    char path[SEL_PATH_MAX];
    sel_st_index ix;
    int64_t begin, end;

    for (int i = 0; i < list->n; i++) {
        const sel_step_file *file = &list->files[i];
        uLong crc = 0; /* of nothing */
        for (int share = 0; share < size; share++) {
            const int reader = (share + size - 1) % size;
            share_to_read(file, reader, size, &begin, &end);
            crc = crc32_combine64(crc, crcs[reader * SEL_STEP_FILES + i], end - begin);
        }
        SEL_TRY(sel_step_compare(folder, file, (uint32_t)crc));
        if (strcmp(file->name, SEL_STEP_MODEL) != 0 && strcmp(file->name, SEL_STEP_OPTIMIZER) != 0) continue;
        SEL_TRY(sel_path_join(path, folder, file->name));
        SEL_TRY(sel_st_read(&ix, path));
        sel_st_free(&ix);
    }
    return SEL_OK;
}

sel_status sel_keep_verify(sel_comm *c, const char *folder)
{
    const int rank = sel_comm_rank(c), size = sel_comm_size(c);
    file_list list;
    uint32_t mine[SEL_STEP_FILES] = {0};
    int64_t begin, end;

    memset(&list, 0, sizeof list);
    SEL_TRY(read_list(c, &list, folder));
    uint32_t *all = calloc((size_t)size * SEL_STEP_FILES, sizeof *all);
    sel_status rc = all ? SEL_OK : sel_fail(SEL_ENOMEM, "out of memory for the checksums");
    for (int i = 0; i < list.n && rc == SEL_OK; i++) {
        share_to_read(&list.files[i], rank, size, &begin, &end);
        rc = sel_step_crc32(folder, &list.files[i], begin, end, &mine[i]);
    }
    rc = sel_comm_agree(c, rc);
    if (rc == SEL_OK) {
        sel_comm_gather(c, mine, sizeof mine, all, 0);
        rc = sel_comm_agree(c, rank == 0 ? compare_all(&list, all, size, folder) : SEL_OK);
    }
    free(all);
    return rc;
}

/* A FINAL is there already.  On file systems that can, the two change places at once; then TMP is the old one. */
static sel_status swap(const char *dir, const char *tmp, const char *final)
{
    char aside[SEL_PATH_MAX];

    if (renameat2(AT_FDCWD, tmp, AT_FDCWD, final, RENAME_EXCHANGE) == 0) return SEL_OK;
    if (errno != EINVAL && errno != ENOSYS) return fail_errno(final, "replace the old one");

    /* Elsewhere (NFS) for a moment neither is in place, and the older checkpoints carry the run. */
    SEL_TRY(sel_path_join(aside, dir, ".tmp-replaced"));
    if (rename(final, aside) != 0) return fail_errno(final, "move the old one aside");
    if (rename(tmp, final) != 0) {
        const sel_status rc = fail_errno(final, "put the new one in place");
        rename(aside, final);
        return rc;
    }
    if (rename(aside, tmp) != 0) return fail_errno(aside, "rename");
    return SEL_OK;
}

sel_status sel_keep_place(const char *dir, const char *tmp, const char *final)
{
    if (rename(tmp, final) == 0) return SEL_OK;
    if (errno != ENOTEMPTY && errno != EEXIST) return fail_errno(final, "rename the complete checkpoint");
    return swap(dir, tmp, final);
}

sel_status sel_keep_settle(const char *dir, const char *tmp, int64_t step)
{
    char name[32], link[SEL_PATH_MAX], latest[SEL_PATH_MAX];

    SEL_TRY(sel_sync_dir(dir));
    sel_step_name(name, step);
    SEL_TRY(sel_path_join(link, dir, ".tmp-latest"));
    SEL_TRY(sel_path_join(latest, dir, "latest"));
    if (symlink(name, link) != 0) return fail_errno(link, "make the link");
    if (rename(link, latest) != 0) {
        const sel_status rc = fail_errno(latest, "move the link");
        unlink(link);
        return rc;
    }
    SEL_TRY(sel_sync_dir(dir));
    return sel_remove_tree(tmp);
}

/* Under a temporary name first: a job killed while deleting leaves no half of a checkpoint to wonder about. */
static sel_status remove_step(const char *dir, const char *folder)
{
    char gone[SEL_PATH_MAX];

    SEL_TRY(sel_path_join(gone, dir, ".tmp-deleted"));
    if (rename(folder, gone) != 0) return fail_errno(folder, "rename it to delete it");
    return sel_remove_tree(gone);
}

/* [collective] The older steps, newest first, the same list on every rank; freed by the caller. */
static sel_status list_older(sel_comm *c, const char *dir, int64_t step, int64_t **older, int *n)
{
    const int rank = sel_comm_rank(c);
    int64_t *steps = NULL;
    int all = 0;
    sel_status rc = SEL_OK;

    *n = 0;
    if (rank == 0) rc = sel_step_list(dir, &steps, &all);
    for (int i = 0; i < all; i++)
        if (steps[i] < step) steps[(*n)++] = steps[i];
    rc = sel_comm_agree(c, rc);
    if (rc == SEL_OK) {
        sel_comm_bcast(c, n, sizeof *n, 0);
        if (rank != 0) steps = calloc((size_t)*n + 1, sizeof *steps);
        rc = sel_comm_agree(c, steps || *n == 0 ? SEL_OK : sel_fail(SEL_ENOMEM, "out of memory"));
    }
    if (rc == SEL_OK) sel_comm_bcast(c, steps, (size_t)*n * sizeof *steps, 0);
    if (rc != SEL_OK) {
        free(steps);
        steps = NULL;
    }
    *older = steps;
    return rc;
}

sel_status sel_keep_newest(sel_comm *c, const char *dir, int64_t step, int64_t keep)
{
    char name[32], folder[SEL_PATH_MAX];
    int64_t *older, kept = 1;
    int n;
    sel_status rc;

    if (keep <= 0) return SEL_OK;
    SEL_TRY(list_older(c, dir, step, &older, &n));
    rc = SEL_OK;
    if (n < keep) n = 0; /* nothing is too many, so nothing has to be read */
    for (int i = 0; i < n && rc == SEL_OK; i++) {
        sel_step_name(name, older[i]);
        rc = sel_comm_agree(c, sel_path_join(folder, dir, name));
        if (rc != SEL_OK) break;
        if (kept < keep)
            kept += sel_keep_verify(c, folder) == SEL_OK; /* not intact: stays, and does not count */
        else
            rc = sel_comm_agree(c, sel_comm_rank(c) == 0 ? remove_step(dir, folder) : SEL_OK);
    }
    free(older);
    return rc;
}
