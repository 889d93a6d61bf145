/* run.c: the run folder: its lock, its settings and its metrics. */
#include "core/run/run.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/clock.h"

struct sel_run {
    char dir[SEL_PATH_MAX], metrics[SEL_PATH_MAX];
    int lock_fd, metrics_fd; /* metrics_fd: -1 until the first row */
};

static sel_status fail_errno(const char *path, const char *doing)
{
    return sel_fail(SEL_EIO, "%s: cannot %s: %s", path, doing, strerror(errno));
}

/* Somebody else holds the lock: the line in the file says who. */
static sel_status fail_locked(const char *dir, int fd)
{
    char who[512];
    const ssize_t n = pread(fd, who, sizeof who - 1, 0);

    who[n > 0 ? n : 0] = '\0';
    who[strcspn(who, "\r\n")] = '\0';
    return sel_fail(SEL_EUSER, "%s: another job is using this run folder: %s", dir,
                    who[0] ? who : "a process that has just started");
}

/* fcntl's lock, since it works over NFS between hosts and the system drops it when the process dies, so that none is
   ever left behind.  It belongs to the process: the file must be opened here alone. */
static sel_status take_lock(sel_run *r)
{
    char path[SEL_PATH_MAX], host[256] = "?", now[32], line[512];
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

    SEL_TRY(sel_path_join(path, r->dir, "lock"));
    r->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (r->lock_fd < 0) return fail_errno(path, "open");
    if (fcntl(r->lock_fd, F_SETLK, &lock) != 0) {
        if (errno == EACCES || errno == EAGAIN) return fail_locked(r->dir, r->lock_fd);
        return fail_errno(path, "lock");
    }
    gethostname(host, sizeof host - 1);
    sel_utc(now);
    const int n = snprintf(line, sizeof line, "process %ld on host %s since %s\n", (long)getpid(), host, now);
    if (ftruncate(r->lock_fd, 0) != 0) return fail_errno(path, "truncate");
    return sel_pwrite_all(r->lock_fd, line, (size_t)n, 0, path);
}

sel_status sel_run_open(sel_run **out, const char *dir)
{
    *out = NULL;
    sel_run *r = calloc(1, sizeof *r);
    if (!r) return sel_fail(SEL_ENOMEM, "out of memory for the run folder");
    r->lock_fd = r->metrics_fd = -1;

    sel_status rc = sel_make_dirs(dir);
    if (rc == SEL_OK) rc = sel_path_join(r->metrics, dir, "metrics.jsonl");
    if (rc == SEL_OK) {
        memcpy(r->dir, dir, strlen(dir) + 1); /* fits, since the longer path did */
        rc = take_lock(r);
    }
    if (rc != SEL_OK) {
        sel_run_close(&r);
        return rc;
    }
    *out = r;
    return SEL_OK;
}

void sel_run_close(sel_run **r)
{
    if (!*r) return;
    if ((*r)->metrics_fd >= 0) close((*r)->metrics_fd);
    if ((*r)->lock_fd >= 0) close((*r)->lock_fd); /* this drops the lock */
    free(*r);
    *r = NULL;
}

const char *sel_run_dir(const sel_run *r)
{
    return r->dir;
}

sel_status sel_run_write_config(sel_run *r, const char *yaml)
{
    char path[SEL_PATH_MAX];

    SEL_TRY(sel_path_join(path, r->dir, "config.yaml"));
    return sel_write_file(path, yaml, strlen(yaml));
}

/* Whether a row (without its end of line) is whole and of a step up to `step`. */
static bool row_stays(const char *row, size_t bytes, int64_t step)
{
    json_t *object = json_loadb(row, bytes, 0, NULL);
    const json_t *value = json_object_get(object, "step");
    const bool stays = json_is_integer(value) && json_integer_value(value) <= step;

    json_decref(object);
    return stays;
}

/* Adds the cut rows to metrics.cut.jsonl, on the disk when it returns. */
static sel_status keep_aside(const sel_run *r, const char *rows, size_t bytes)
{
    char path[SEL_PATH_MAX];

    SEL_TRY(sel_path_join(path, r->dir, "metrics.cut.jsonl"));
    const int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0) return fail_errno(path, "open");
    sel_status rc = sel_write_all(fd, rows, bytes, path);
    if (rc == SEL_OK && fsync(fd) != 0) rc = fail_errno(path, "fsync");
    if (close(fd) != 0 && rc == SEL_OK) rc = fail_errno(path, "close");
    return rc;
}

sel_status sel_run_cut_metrics(sel_run *r, int64_t step)
{
    char *text;
    size_t bytes, kept = 0, cut = 0;

    if (r->metrics_fd >= 0) close(r->metrics_fd); /* the file is about to be another one */
    r->metrics_fd = -1;
    if (!sel_path_exists(r->metrics)) return SEL_OK;
    SEL_TRY(sel_read_file(r->metrics, &text, &bytes));
    char *aside = malloc(bytes + 1);
    if (!aside) {
        free(text);
        return sel_fail(SEL_ENOMEM, "out of memory for %s", r->metrics);
    }

    /* Rows that stay move up in place; each of the others ends in a new line at last, also a torn one. */
    for (size_t at = 0, next; at < bytes; at = next) {
        const char *end = memchr(text + at, '\n', bytes - at);
        next = end ? (size_t)(end - text) + 1 : bytes;
        const size_t length = next - at;
        if (end && row_stays(text + at, length - 1, step)) {
            memmove(text + kept, text + at, length);
            kept += length;
        } else {
            memcpy(aside + cut, text + at, length);
            cut += length;
            if (!end) aside[cut++] = '\n';
        }
    }
    sel_status rc = SEL_OK;
    if (cut) rc = keep_aside(r, aside, cut);
    if (cut && rc == SEL_OK) rc = sel_write_file(r->metrics, text, kept);
    free(aside);
    free(text);
    return rc;
}

/* A row as it grows; what does not fit is counted and not written. */
typedef struct {
    char text[65536];     /* a number a layer, at most 4,096 layers, among others */
    size_t length;
} row_text;

__attribute__((format(printf, 2, 3))) static void add(row_text *t, const char *format, ...)
{
    va_list args;
    const size_t room = t->length < sizeof t->text ? sizeof t->text - t->length : 0;

    va_start(args, format);
    const int n = vsnprintf(room ? t->text + t->length : NULL, room, format, args);
    va_end(args);
    if (n > 0) t->length += (size_t)n;
}

/* The shortest decimal that reads back as the same double.  JSON has no NaN or infinity: null. */
static void add_number(row_text *t, const char *key, double x)
{
    char text[40] = "null";

    for (int digits = 1; isfinite(x) && digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, x);
        const double back = strtod(text, NULL);
        if (back >= x && back <= x) break;
    }
    add(t, ",\"%s\":%s", key, text);
}

static sel_status add_string(row_text *t, const char *key, const char *value)
{
    json_t *string = json_string(value);
    char *text = string ? json_dumps(string, JSON_ENCODE_ANY) : NULL;

    if (text) add(t, ",\"%s\":%s", key, text);
    free(text);
    json_decref(string);
    return text ? SEL_OK : sel_fail(SEL_EUSER, "metrics: the event is not UTF-8, or out of memory");
}

static sel_status format_row(row_text *t, const sel_metrics *m)
{
    add(t, "{\"step\":%" PRId64, m->step);
    if (m->event) {
        SEL_TRY(add_string(t, "event", m->event));
    } else {
        if (m->has_train) {
            add_number(t, "loss", m->loss);
            if (m->has_memory_loss) add_number(t, "memory_loss", m->memory_loss);
            add_number(t, "lr", m->lr);
            add_number(t, "grad_norm", m->grad_norm);
            for (int64_t l = 0; m->live_keys && l < m->layers; l++)
                add(t, "%s%.4f%s", l ? "," : ",\"live_keys\":[", m->live_keys[l], l + 1 < m->layers ? "" : "]");
        }
        add(t, ",\"tokens\":%" PRId64, m->tokens);
        if (m->has_train) {
            add_number(t, "tokens_per_second", m->tokens_per_second);
            add_number(t, "mfu", m->mfu);
            add_number(t, "seconds", m->seconds);
        }
        if (m->has_train && m->has_wire) {
            add_number(t, "wire_bytes", m->wire_bytes);
            add_number(t, "wire_bytes_least", m->wire_bytes_least);
            add_number(t, "host_bytes", m->host_bytes);
            add_number(t, "wire_wait_seconds", m->wire_wait_seconds);
            add_number(t, "wire_hidden", m->wire_hidden);
        }
        if (m->val_tokens > 0) {
            add_number(t, "val_loss", m->val_loss);
            add(t, ",\"val_tokens\":%" PRId64, m->val_tokens);
        }
    }
    add(t, "}\n");
    if (t->length >= sizeof t->text) return sel_fail(SEL_EUSER, "metrics: a row of %zu bytes is too long", t->length);
    return SEL_OK;
}

sel_status sel_run_metrics(sel_run *r, const sel_metrics *m)
{
    row_text row = {.length = 0};

    SEL_TRY(format_row(&row, m));
    if (r->metrics_fd < 0) {
        r->metrics_fd = open(r->metrics, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
        if (r->metrics_fd < 0) return fail_errno(r->metrics, "open");
    }
    /* In one write, so that somebody who follows the file sees whole rows. */
    return sel_write_all(r->metrics_fd, row.text, row.length, r->metrics);
}
