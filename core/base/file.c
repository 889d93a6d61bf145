/* file.c: reading and writing that either works or names the path and the reason. */
#include "core/base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "core/base/pulse.h"

#define CHUNK ((size_t)1 << 20)
#define OPEN_FOLDERS 16 /* descriptors that a tree walk may hold */

static sel_status fail_errno(const char *path, const char *doing)
{
    return sel_fail(SEL_EIO, "%s: cannot %s: %s", path, doing, strerror(errno));
}

sel_status sel_path_join(char out[SEL_PATH_MAX], const char *dir, const char *name)
{
    size_t length = strlen(dir);
    const size_t name_length = strlen(name);
    const bool slash = length > 0 && dir[length - 1] != '/';

    if (length + slash + name_length >= SEL_PATH_MAX)
        return sel_fail(SEL_EUSER, "%.200s.../%.200s: path longer than %d bytes", dir, name, SEL_PATH_MAX - 1);
    memmove(out, dir, length); /* out may be dir */
    if (slash) out[length++] = '/';
    memcpy(out + length, name, name_length + 1);
    return SEL_OK;
}

bool sel_path_exists(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0;
}

bool sel_path_is_dir(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* The folder of a path: "a/b" -> "a", "b" -> ".", "/b" -> "/". */
static void parent_of(char out[SEL_PATH_MAX], const char *path)
{
    const char *slash = strrchr(path, '/');
    size_t length = slash ? (size_t)(slash - path) : 1;
    const char *from = slash ? path : ".";
    if (slash == path) length = 1;
    memcpy(out, from, length);
    out[length] = '\0';
}

/* Makes one folder, its name durable in the folder above; another process may make it at the same time. */
static sel_status make_dir(const char *path)
{
    if (mkdir(path, 0777) == 0) {
        char parent[SEL_PATH_MAX];
        parent_of(parent, path);
        return sel_sync_dir(parent);
    }
    const int reason = errno;
    if (sel_path_is_dir(path)) return SEL_OK;
    if (reason == EEXIST || reason == ENOTDIR)
        return sel_fail(SEL_EUSER, "%s: cannot make the folder: a file is in the way", path);
    if (reason == EACCES || reason == EPERM || reason == EROFS)
        return sel_fail(SEL_EUSER, "%s: cannot make the folder: %s", path, strerror(reason));
    errno = reason;
    return fail_errno(path, "make the folder");
}

sel_status sel_make_dirs(const char *path)
{
    char part[SEL_PATH_MAX];
    const size_t length = strlen(path);
    if (length == 0) return sel_fail(SEL_EUSER, "cannot make a folder without a name");
    if (length >= SEL_PATH_MAX)
        return sel_fail(SEL_EUSER, "%.200s...: path longer than %d bytes", path, SEL_PATH_MAX - 1);

    memcpy(part, path, length + 1);
    for (size_t i = 1; i < length; i++) {
        if (part[i] != '/' || part[i - 1] == '/') continue;
        part[i] = '\0';
        SEL_TRY(make_dir(part));
        part[i] = '/';
    }
    return make_dir(path);
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *place)
{
    (void)st;
    (void)type;
    (void)place;
    if (remove(path) == 0 || errno == ENOENT) return 0;
    fail_errno(path, "remove");
    return 1;
}

sel_status sel_remove_tree(const char *path)
{
    struct stat st;
    const int rc = nftw(path, remove_entry, OPEN_FOLDERS, FTW_DEPTH | FTW_PHYS);
    if (rc == 0) return SEL_OK;
    if (rc > 0) return SEL_EIO;
    const int reason = errno;
    if (lstat(path, &st) != 0 && (errno == ENOENT || errno == ENOTDIR)) return SEL_OK;
    errno = reason;
    return fail_errno(path, "remove");
}

/* Opens a file for reading; a missing one and a folder are the user's mistake. */
static sel_status open_input(const char *path, int *fd, struct stat *st)
{
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0) {
        if (errno == ENOENT || errno == ENOTDIR) return sel_fail(SEL_EUSER, "%s: no such file", path);
        if (errno == EACCES || errno == EPERM) return sel_fail(SEL_EUSER, "%s: cannot open: %s", path, strerror(errno));
        return fail_errno(path, "open");
    }
    sel_status rc = SEL_OK;
    if (fstat(*fd, st) != 0)
        rc = fail_errno(path, "read");
    else if (S_ISDIR(st->st_mode))
        rc = sel_fail(SEL_EUSER, "%s: is a folder, not a file", path);
    if (rc != SEL_OK) close(*fd);
    return rc;
}

/* Up to `bytes` bytes, fewer only at the end of the file. */
static sel_status read_up_to(int fd, char *data, size_t bytes, size_t *got, const char *path)
{
    *got = 0;
    while (*got < bytes) {
        const ssize_t n = read(fd, data + *got, bytes - *got);
        if (n == 0) break;
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno(path, "read");
        *got += (size_t)n;
        sel_pulse_tick();
    }
    return SEL_OK;
}

sel_status sel_read_file(const char *path, char **data, size_t *bytes)
{
    struct stat st;
    int fd;
    SEL_TRY(open_input(path, &fd, &st));

    /* The size is a first guess only: pipes and /proc have none.  One byte beyond it finds the end. */
    size_t capacity = st.st_size > 0 ? (size_t)st.st_size + 1 : 4096, length = 0;
    char *buffer = NULL;
    sel_status rc = SEL_OK;
    for (;;) {
        char *larger = realloc(buffer, capacity + 1);
        if (!larger) {
            rc = sel_fail(SEL_ENOMEM, "out of memory: %s needs more than %zu bytes", path, length);
            break;
        }
        buffer = larger;
        size_t got;
        rc = read_up_to(fd, buffer + length, capacity - length, &got, path);
        if (rc != SEL_OK) break;
        length += got;
        if (length < capacity) break;
        capacity *= 2;
    }
    close(fd);
    if (rc != SEL_OK) {
        free(buffer);
        return rc;
    }
    buffer[length] = '\0';
    *data = buffer;
    *bytes = length;
    return SEL_OK;
}

sel_status sel_write_all(int fd, const void *data, size_t bytes, const char *path)
{
    const char *p = data;
    while (bytes > 0) {
        const ssize_t n = write(fd, p, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno(path, "write");
        if (n == 0) return sel_fail(SEL_EIO, "%s: cannot write: the system takes no more bytes", path);
        p += n;
        bytes -= (size_t)n;
        sel_pulse_tick();
    }
    return SEL_OK;
}

sel_status sel_pwrite_all(int fd, const void *data, size_t bytes, int64_t offset, const char *path)
{
    const char *p = data;
    while (bytes > 0) {
        const ssize_t n = pwrite(fd, p, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno(path, "write");
        if (n == 0) return sel_fail(SEL_EIO, "%s: cannot write: the system takes no more bytes", path);
        p += n;
        bytes -= (size_t)n;
        sel_pulse_tick();
        offset += n;
    }
    return SEL_OK;
}

sel_status sel_pread_all(int fd, void *data, size_t bytes, int64_t offset, const char *path)
{
    char *p = data;
    while (bytes > 0) {
        const ssize_t n = pread(fd, p, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno(path, "read");
        if (n == 0)
            return sel_fail(SEL_EFILE, "%s: file is short: it ends at or before byte %lld, %zu more are needed", path,
                            (long long)offset, bytes);
        p += n;
        bytes -= (size_t)n;
        sel_pulse_tick();
        offset += n;
    }
    return SEL_OK;
}

sel_status sel_sync_dir(const char *path)
{
    const int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return fail_errno(path, "open the folder");
    sel_status rc = SEL_OK;
    /* EINVAL: a file system that has nothing to do here. */
    if (fsync(fd) != 0 && errno != EINVAL) rc = fail_errno(path, "fsync the folder");
    close(fd);
    return rc;
}

/* Writes the bytes into a new file and has them on the disk, or leaves no file. */
static sel_status write_synced(const char *tmp, const void *data, size_t bytes)
{
    const int fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return fail_errno(tmp, "create");
    sel_status rc = sel_write_all(fd, data, bytes, tmp);
    if (rc == SEL_OK && fsync(fd) != 0) rc = fail_errno(tmp, "fsync");
    if (close(fd) != 0 && rc == SEL_OK) rc = fail_errno(tmp, "close");
    if (rc != SEL_OK) unlink(tmp);
    return rc;
}

sel_status sel_write_file(const char *path, const void *data, size_t bytes)
{
    char tmp[SEL_PATH_MAX], parent[SEL_PATH_MAX];
    const int length = snprintf(tmp, sizeof tmp, "%s.tmp", path);
    if (length < 0 || length >= SEL_PATH_MAX)
        return sel_fail(SEL_EUSER, "%.200s...: path longer than %d bytes", path, SEL_PATH_MAX - 5);

    SEL_TRY(write_synced(tmp, data, bytes));
    if (rename(tmp, path) != 0) {
        const sel_status rc = fail_errno(path, "put the new file in place");
        unlink(tmp);
        return rc;
    }
    parent_of(parent, path);
    return sel_sync_dir(parent);
}

sel_status sel_file_crc32(const char *path, uint32_t *crc, int64_t *bytes)
{
    struct stat st;
    int fd;
    SEL_TRY(open_input(path, &fd, &st));
    char *buffer = malloc(CHUNK);
    sel_status rc = SEL_OK;
    if (!buffer) {
        rc = sel_fail(SEL_ENOMEM, "out of memory: %s needs %zu bytes", path, CHUNK);
        goto out;
    }

    uLong sum = crc32(0, NULL, 0);
    int64_t total = 0;
    for (size_t got = CHUNK; got == CHUNK;) {
        if ((rc = read_up_to(fd, buffer, CHUNK, &got, path)) != SEL_OK) goto out;
        sum = crc32(sum, (const Bytef *)buffer, (uInt)got);
        total += (int64_t)got;
    }
    *crc = (uint32_t)sum;
    *bytes = total;
out:
    free(buffer);
    close(fd);
    return rc;
}
