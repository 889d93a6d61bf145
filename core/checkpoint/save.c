/* save.c: all ranks write one checkpoint together.
 *
 * In this order, so that a crash at any point leaves the older checkpoints and either none or all of the new one:
 *     1. DIR/.tmp-step-N: files made at full size, headers, fsync (rank 0)
 *     2. every rank writes its byte ranges, fsync
 *     3. manifest.json, fsync; fsync of the folder
 *     4. all ranks read back and compare checksums
 *     5. rename to DIR/step-N, fsync of DIR; `latest` by rename, fsync of DIR
 *     6. old ones beyond `keep` are removed
 *
 * After each part that may fail on one rank the ranks agree, so that all of them return the same.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "core/base/fault.h"
#include "core/checkpoint/keep.h"
#include "core/checkpoint/stepdir.h"
#include "dist/mesh.h"

#define PIECE_BYTES ((size_t)4 << 20) /* checksummed and written while in cache */

/* One of the two files that all ranks write. */
typedef struct {
    char path[SEL_PATH_MAX];
    sel_st_index ix;
    char *header; /* owned */
    size_t header_bytes;
    const float *arrays[2]; /* those that its prefixes stand for */
    uint32_t crc32;         /* of this rank's share of the data */
} shared_file;

typedef struct {
    sel_comm *comm;
    int rank, size;
    const char *dir;
    const sel_layout *layout;
    const sel_checkpoint_info *info;
    char tmp[SEL_PATH_MAX], final[SEL_PATH_MAX];
    shared_file model, optimizer;
} saving;

static sel_status fail_errno(const char *path, const char *doing)
{
    return sel_fail(SEL_EIO, "%s: cannot %s: %s", path, doing, strerror(errno));
}

static void free_file(shared_file *f)
{
    free(f->header);
    sel_st_free(&f->ix);
}

static sel_status plan_file(saving *s, shared_file *f, const char *name, const char *const *prefixes, int n)
{
    SEL_TRY(sel_path_join(f->path, s->tmp, name));
    SEL_TRY(sel_step_index(&f->ix, s->layout, prefixes, n));
    return sel_st_make(&f->ix, &f->header, &f->header_bytes);
}

/* Names and headers, the same on every rank. */
static sel_status plan(saving *s)
{
    static const char *const model[] = {""}, *const optimizer[] = {"exp_avg.", "exp_avg_sq."};
    char step[32], name[48];

    sel_step_name(step, s->info->step);
    snprintf(name, sizeof name, ".tmp-%s", step);
    SEL_TRY(sel_path_join(s->final, s->dir, step));
    SEL_TRY(sel_path_join(s->tmp, s->dir, name));
    SEL_TRY(plan_file(s, &s->model, SEL_STEP_MODEL, model, 1));
    return plan_file(s, &s->optimizer, SEL_STEP_OPTIMIZER, optimizer, 2);
}

/* Makes the file at its full size, so that a full disk shows now and not in the middle, and writes its header. */
static sel_status create_file(const shared_file *f)
{
    const int64_t bytes = f->ix.header_bytes + f->ix.data_bytes;
    const int fd = open(f->path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    sel_status rc = SEL_OK;

    if (fd < 0) return fail_errno(f->path, "create");
    /* Not posix_fallocate: where the file system cannot reserve, the C library would write every block instead. */
    if (fallocate(fd, 0, 0, bytes) != 0) {
        const bool unsupported = errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL;
        if (!unsupported)
            rc = fail_errno(f->path, "reserve the space");
        else if (ftruncate(fd, bytes) != 0)
            rc = fail_errno(f->path, "set the size");
    }
    if (rc == SEL_OK) rc = sel_pwrite_all(fd, f->header, f->header_bytes, 0, f->path);
    if (rc == SEL_OK && fsync(fd) != 0) rc = fail_errno(f->path, "fsync");
    if (close(fd) != 0 && rc == SEL_OK) rc = fail_errno(f->path, "close");
    return rc;
}

/* Rank 0: the temporary folder with everything that does not need the others. */
static sel_status create_folder(const saving *s)
{
    char path[SEL_PATH_MAX];

    SEL_TRY(sel_make_dirs(s->dir));
    SEL_TRY(sel_keep_remove_stale(s->dir));
    SEL_TRY(sel_make_dirs(s->tmp));
    SEL_TRY(create_file(&s->model));
    SEL_TRY(create_file(&s->optimizer));
    if (s->info->tokenizer_bytes == 0) return SEL_OK;
    SEL_TRY(sel_path_join(path, s->tmp, SEL_STEP_TOKENIZER));
    return sel_write_file(path, s->info->tokenizer, s->info->tokenizer_bytes);
}

/* Bytes [begin, end) of the data, straight from the arrays. */
static sel_status write_range(const saving *s, shared_file *f, int fd, int64_t begin, int64_t end)
{
    for (int i = 0; i < f->ix.n; i++) {
        const sel_st_entry *e = &f->ix.entries[i];
        const sel_tensor *t = &s->layout->tensors[i % s->layout->n_tensors];
        const char *tensor = (const char *)(f->arrays[i / s->layout->n_tensors] + t->offset);
        int64_t at = begin > e->begin ? begin : e->begin;
        const int64_t stop = end < e->end ? end : e->end;

        while (at < stop) {
            const size_t n = stop - at < (int64_t)PIECE_BYTES ? (size_t)(stop - at) : PIECE_BYTES;
            const char *from = tensor + (at - e->begin);
            f->crc32 = (uint32_t)crc32_z(f->crc32, (const Bytef *)from, n);
            SEL_TRY(sel_pwrite_all(fd, from, n, f->ix.header_bytes + at, f->path));
            at += (int64_t)n;
        }
    }
    return SEL_OK;
}

/* This rank's share of one file, on the disk when it returns. */
static sel_status write_share(const saving *s, shared_file *f)
{
    int64_t begin, end;

    sel_mesh_share(f->ix.data_bytes, s->rank, s->size, &begin, &end);
    /* Write-only: a network file system's client that has read a page may write it back whole, and with it bytes
       that are another host's. */
    const int fd = open(f->path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return fail_errno(f->path, "open");
    sel_status rc = write_range(s, f, fd, begin, end);
    if (rc == SEL_OK && fsync(fd) != 0) rc = fail_errno(f->path, "fsync");
    /* Clean pages go, so that reading back asks the disk. */
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    if (close(fd) != 0 && rc == SEL_OK) rc = fail_errno(f->path, "close");
    return rc;
}

sel_status sel_checkpoint_share(const sel_layout *layout, int rank, int size, int array, int64_t *begin, int64_t *end)
{
    static const char *const optimizer[] = {"exp_avg.", "exp_avg_sq."};
    shared_file f = {.crc32 = 0};
    int64_t first, last;

    *begin = *end = 0;
    sel_status rc = sel_step_index(&f.ix, layout, optimizer, 2);
    if (rc == SEL_OK) rc = sel_st_make(&f.ix, &f.header, &f.header_bytes);
    if (rc == SEL_OK) sel_mesh_share(f.ix.data_bytes, rank, size, &first, &last);
    for (int i = 0; rc == SEL_OK && i < layout->n_tensors; i++) {
        const sel_st_entry *e = &f.ix.entries[array * layout->n_tensors + i];
        const int64_t from = first > e->begin ? first : e->begin, to = last < e->end ? last : e->end;
        const int64_t offset = layout->tensors[i].offset;

        if (from >= to) continue;
        if (*end == 0) *begin = offset + (from - e->begin) / (int64_t)sizeof(float);
        *end = offset + (to - e->begin + (int64_t)sizeof(float) - 1) / (int64_t)sizeof(float);
    }
    free_file(&f);
    return rc;
}

static sel_status write_shares(saving *s)
{
    SEL_TRY(write_share(s, &s->model));
    /* The place where a fault is worst: half of the data is there. */
    if (sel_fault("save", s->info->step, "enospc")) {
        errno = ENOSPC;
        return fail_errno(s->optimizer.path, "write");
    }
    return write_share(s, &s->optimizer);
}

/* [collective] Checksum of the whole file out of the ranks', at rank 0; `all` has room for one a rank. */
static void combine(const saving *s, const shared_file *f, uint32_t *all, const char *name, sel_step_file *file)
{
    int64_t begin, end;

    sel_comm_gather(s->comm, &f->crc32, sizeof f->crc32, all, 0);
    if (s->rank != 0) return;
    uLong crc = crc32_z(0, (const Bytef *)f->header, f->header_bytes);
    for (int r = 0; r < s->size; r++) {
        sel_mesh_share(f->ix.data_bytes, r, s->size, &begin, &end);
        crc = crc32_combine64(crc, all[r], end - begin);
    }
    *file = (sel_step_file){.bytes = f->ix.header_bytes + f->ix.data_bytes, .crc32 = (uint32_t)crc};
    snprintf(file->name, sizeof file->name, "%s", name);
}

/* [collective] Rank 0 writes the manifest, then the folder is complete under its temporary name. */
static sel_status write_manifest(const saving *s)
{
    sel_step_file files[3];
    int n = 2;
    sel_status rc = SEL_OK;
    uint32_t *all = calloc((size_t)s->size, sizeof *all);

    rc = sel_comm_agree(s->comm, all ? SEL_OK : sel_fail(SEL_ENOMEM, "out of memory for the checksums"));
    if (rc == SEL_OK) {
        combine(s, &s->model, all, SEL_STEP_MODEL, &files[0]);
        combine(s, &s->optimizer, all, SEL_STEP_OPTIMIZER, &files[1]);
        if (s->rank == 0 && s->info->tokenizer_bytes > 0) {
            const uLong crc = crc32_z(0, (const Bytef *)s->info->tokenizer, s->info->tokenizer_bytes);
            files[n++] = (sel_step_file){SEL_STEP_TOKENIZER, (int64_t)s->info->tokenizer_bytes, (uint32_t)crc};
        }
        if (s->rank == 0) rc = sel_step_write_manifest(s->tmp, s->info, files, n); /* fsyncs the folder too */
        rc = sel_comm_agree(s->comm, rc);
    }
    free(all);
    return rc;
}

/* [collective] Everything up to a complete folder under its temporary name, read back. */
static sel_status fill(saving *s)
{
    SEL_TRY(sel_comm_agree(s->comm, plan(s)));
    SEL_TRY(sel_comm_agree(s->comm, s->rank == 0 ? create_folder(s) : SEL_OK));
    SEL_TRY(sel_comm_agree(s->comm, write_shares(s)));
    SEL_TRY(write_manifest(s));
    return sel_keep_verify(s->comm, s->tmp);
}

/* [collective] Removes the attempt; it is gone when any rank returns.  What is told is why it failed, also where it
   cannot be removed: the next save tries again. */
static sel_status give_up(const saving *s, sel_status rc)
{
    char line[1024];

    snprintf(line, sizeof line, "%s", sel_error());
    if (s->rank == 0 && s->tmp[0]) sel_remove_tree(s->tmp);
    sel_comm_barrier(s->comm);
    return sel_fail(rc, "%s", line);
}

sel_status sel_checkpoint_save(sel_comm *c, const char *dir, const sel_layout *layout, const sel_checkpoint_info *info,
                               const float *params, const float *exp_avg, const float *exp_avg_sq, int64_t keep)
{
    saving s = {
        .comm = c, .rank = sel_comm_rank(c), .size = sel_comm_size(c), .dir = dir, .layout = layout, .info = info};

    s.model.arrays[0] = params;
    s.optimizer.arrays[0] = exp_avg;
    s.optimizer.arrays[1] = exp_avg_sq;
    sel_status rc = fill(&s);
    if (rc == SEL_OK) rc = sel_comm_agree(c, s.rank == 0 ? sel_keep_place(dir, s.tmp, s.final) : SEL_OK);
    if (rc != SEL_OK) rc = give_up(&s, rc);
    free_file(&s.model);
    free_file(&s.optimizer);
    if (rc != SEL_OK) return rc;

    /* From here on it is a checkpoint like the others: a failure is told, and takes nothing away. */
    SEL_TRY(sel_comm_agree(c, s.rank == 0 ? sel_keep_settle(dir, s.tmp, info->step) : SEL_OK));
    return sel_keep_newest(c, dir, info->step, keep);
}
