/* folder.h: a test's own folder, made at its start and removed at its end, and files in it. */
#ifndef SEL_TESTS_FOLDER_H
#define SEL_TESTS_FOLDER_H

#include <string.h>
#include <unistd.h>

#include "core/base/file.h"
#include "tests/check.h"

static char folder[64];

static inline void make_folder(void)
{
    /* In memory where that is to be had: what is written here is synced often. */
    static const char *const places[] = {"/dev/shm/selectra-test-XXXXXX", "/tmp/selectra-test-XXXXXX"};
    for (int i = 0; i < 2; i++) {
        snprintf(folder, sizeof folder, "%s", places[i]);
        if (mkdtemp(folder)) return;
    }
    perror(folder);
    exit(EXIT_FAILURE);
}

/* Paths in the test's folder, a few alive at a time. */
static inline const char *in_folder(const char *name)
{
    static char paths[16][SEL_PATH_MAX];
    static int next;
    char *path = paths[next++ % 16];

    snprintf(path, SEL_PATH_MAX, "%s/%s", folder, name);
    return path;
}

static inline void put(const char *path, const void *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, bytes, f) == bytes && fclose(f) == 0, "%s", path);
}

static inline void put_text(const char *path, const char *text) { put(path, text, strlen(text)); }

#endif
