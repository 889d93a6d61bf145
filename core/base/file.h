/* file.h: files that are whole or absent, and errors that name the path.
 *
 * Every function that fails leaves a line with the path and the system's reason.
 */
#ifndef SEL_CORE_BASE_FILE_H
#define SEL_CORE_BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "core/base/error.h"

#define SEL_PATH_MAX 4096

/* "DIR/NAME" into out[SEL_PATH_MAX]; SEL_EUSER when it does not fit. */
sel_status sel_path_join(char out[SEL_PATH_MAX], const char *dir, const char *name);

bool sel_path_exists(const char *path);
bool sel_path_is_dir(const char *path);

/* Makes the folder and its missing parents; fine if it exists. */
sel_status sel_make_dirs(const char *path);

/* Removes a file or a whole folder tree; fine if it is missing. */
sel_status sel_remove_tree(const char *path);

/* The whole file, NUL-terminated (the NUL not counted), into *data (freed by the
   caller with free) and *bytes.  A missing file or a folder is SEL_EUSER, other errors SEL_EIO. */
sel_status sel_read_file(const char *path, char **data, size_t *bytes);

/* All bytes or an error; restarts after signals and short writes. */
sel_status sel_write_all(int fd, const void *data, size_t bytes, const char *path);
sel_status sel_pwrite_all(int fd, const void *data, size_t bytes, int64_t offset, const char *path);
sel_status sel_pread_all(int fd, void *data, size_t bytes, int64_t offset, const char *path);

/* fsync of a folder, so that renames in it last. */
sel_status sel_sync_dir(const char *path);

/* Puts a small file in place at once: PATH.tmp, fsync, rename, fsync of the folder.
   After a crash the old file or the new one is there, whole. */
sel_status sel_write_file(const char *path, const void *data, size_t bytes);

/* CRC-32 (zlib's) of a whole file into *crc and its size into *bytes. */
sel_status sel_file_crc32(const char *path, uint32_t *crc, int64_t *bytes);

#endif
