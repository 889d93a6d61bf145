/* stepdir.c: names, manifest and checksums of one step folder. */
#include "core/checkpoint/stepdir.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#define FORMAT "selectra-checkpoint-1"
#define READ_BYTES ((size_t)1 << 20)

sel_status sel_step_index(sel_st_index *ix, const sel_layout *layout, const char *const *prefixes, int n)
{
    *ix = (sel_st_index){.n = n * layout->n_tensors};
    ix->entries = calloc((size_t)ix->n + 1, sizeof *ix->entries);
    if (!ix->entries) return sel_fail(SEL_ENOMEM, "out of memory for the table of %d tensors", ix->n);
    for (int i = 0; i < ix->n; i++) {
        const sel_tensor *t = &layout->tensors[i % layout->n_tensors];
        sel_st_entry *e = &ix->entries[i];
        snprintf(e->name, sizeof e->name, "%s%s", prefixes[i / layout->n_tensors], t->name);
        e->rank = t->rank;
        e->shape[0] = t->shape[0];
        e->shape[1] = t->shape[1];
    }
    return SEL_OK;
}

void sel_step_name(char out[32], int64_t step)
{
    snprintf(out, 32, "step-%08" PRId64, step);
}

int64_t sel_step_of_name(const char *name)
{
    char canonical[32];

    if (strncmp(name, "step-", 5) != 0 || !isdigit((unsigned char)name[5]) || strlen(name) > 5 + 18) return -1;
    const int64_t step = strtoll(name + 5, NULL, 10);
    sel_step_name(canonical, step);
    return strcmp(name, canonical) == 0 ? step : -1;
}

static int newest_first(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

    return (x < y) - (x > y);
}

sel_status sel_step_list(const char *dir, int64_t **steps, int *n)
{
    int room = 0;
    sel_status rc = SEL_OK;

    *steps = NULL;
    *n = 0;
    DIR *d = opendir(dir);
    if (!d)
        return sel_fail(errno == ENOENT ? SEL_EUSER : SEL_EIO, "%s: cannot read the folder: %s", dir, strerror(errno));
    for (;;) {
        errno = 0;
        const struct dirent *entry = readdir(d);
        if (!entry) {
            if (errno) rc = sel_fail(SEL_EIO, "%s: cannot read the folder: %s", dir, strerror(errno));
            break;
        }
        const int64_t step = sel_step_of_name(entry->d_name);
        if (step < 0) continue;
        if (*n == room) {
            room = room ? 2 * room : 16;
            int64_t *more = realloc(*steps, (size_t)room * sizeof **steps);
            if (!more) {
                rc = sel_fail(SEL_ENOMEM, "out of memory for the list of checkpoints in %s", dir);
                break;
            }
            *steps = more;
        }
        (*steps)[(*n)++] = step;
    }
    closedir(d);
    if (rc != SEL_OK) {
        free(*steps);
        *steps = NULL;
        *n = 0;
        return rc;
    }
    if (*n) qsort(*steps, (size_t)*n, sizeof **steps, newest_first);
    return SEL_OK;
}

static json_t *hex(uint32_t crc)
{
    char text[16];

    snprintf(text, sizeof text, "%08" PRIx32, crc);
    return json_string(text);
}

/* {"crc32": "1a2b3c4d"}, or null for 0: there is none. */
static json_t *named_by_crc(uint32_t crc)
{
    return crc ? json_pack("{s:o}", "crc32", hex(crc)) : json_null();
}

/* CRC-32 of an object's compact form: white space and a rewriting that keeps the order do not change it. */
static sel_status object_crc32(const json_t *object, uint32_t *crc)
{
    char *text = json_dumps(object, JSON_COMPACT);

    if (!text) return sel_fail(SEL_ENOMEM, "out of memory for a manifest");
    *crc = (uint32_t)crc32_z(0, (const Bytef *)text, strlen(text));
    free(text);
    return SEL_OK;
}

sel_status sel_step_write_manifest(const char *folder, const sel_checkpoint_info *info, const sel_step_file *files,
                                   int n)
{
    char path[SEL_PATH_MAX];
    json_t *list = json_array(), *skipped = json_array();
    uint32_t crc = 0;

    for (int i = 0; i < n; i++)
        json_array_append_new(list, json_pack("{s:s, s:I, s:o, s:s}", "name", files[i].name, "bytes",
                                              (json_int_t)files[i].bytes, "checksum", hex(files[i].crc32),
                                              "checksum_kind", "crc32"));
    for (int i = 0; i < info->n_skipped; i++) json_array_append_new(skipped, json_integer(info->skipped[i]));
    json_t *root =
        json_pack("{s:s, s:I, s:I, s:s, s:o, s:o, s:o, s:o}", "format", FORMAT, "step", (json_int_t)info->step,
                  "tokens", (json_int_t)info->tokens, "config", info->config, "files", list, "corpus",
                  named_by_crc(info->corpus_crc32), "tokenizer", named_by_crc(info->tokenizer_crc32), "skipped",
                  skipped);
    if (!root) return sel_fail(SEL_EUSER, "%s: the settings cannot be saved: they are not UTF-8", folder);

    char *text = NULL;
    sel_status rc = object_crc32(root, &crc);
    if (rc == SEL_OK && json_object_set_new(root, "manifest_crc32", hex(crc)) == 0)
        text = json_dumps(root, JSON_INDENT(2));
    if (rc == SEL_OK && !text) rc = sel_fail(SEL_ENOMEM, "out of memory for a manifest");
    if (rc == SEL_OK) rc = sel_path_join(path, folder, SEL_STEP_MANIFEST);
    if (rc == SEL_OK) rc = sel_write_file(path, text, strlen(text));
    free(text);
    json_decref(root);
    return rc;
}

/* Eight hexadecimal digits, and nothing else. */
static bool parse_hex(const json_t *value, uint32_t *crc)
{
    const char *text = json_string_value(value);

    if (!text || strlen(text) != 8 || strspn(text, "0123456789abcdef") != 8) return false;
    *crc = (uint32_t)strtoul(text, NULL, 16);
    return true;
}

/* Text out of a damaged file that may stand in a line for people. */
static bool printable(const char *text)
{
    for (const char *p = text; *p; p++)
        if (iscntrl((unsigned char)*p)) return false;
    return true;
}

static bool parse_named(const json_t *value, uint32_t *crc)
{
    *crc = 0;
    return json_is_null(value) || parse_hex(json_object_get(value, "crc32"), crc);
}

/* One element of "files".  A name must stay inside the folder. */
static sel_status parse_file(sel_step_file *file, json_t *value, const char *path)
{
    const char *name, *kind;
    json_t *checksum;
    json_int_t bytes;
    json_error_t why;

    if (json_unpack_ex(value, &why, 0, "{s:s, s:I, s:o, s:s}", "name", &name, "bytes", &bytes, "checksum", &checksum,
                       "checksum_kind", &kind) != 0)
        return sel_fail(SEL_EFILE, "%s: files: %s", path, why.text);
    if (!*name || strlen(name) >= sizeof file->name || strchr(name, '/') || name[0] == '.' || !printable(name))
        return sel_fail(SEL_EFILE, "%s: files: a name is none of a file in this folder", path);
    if (strcmp(kind, "crc32") != 0)
        return sel_fail(SEL_EFILE, "%s: files: %s: its checksum_kind is not crc32, the only one known", path, name);
    if (bytes < 0 || !parse_hex(checksum, &file->crc32))
        return sel_fail(SEL_EFILE, "%s: files: %s: size or checksum is damaged", path, name);
    strcpy(file->name, name);
    file->bytes = bytes;
    return SEL_OK;
}

/* Steps in ascending order; absent where another tool has written the manifest. */
static sel_status parse_skipped(sel_manifest *m, const json_t *list, const char *path)
{
    const size_t n = json_array_size(list);

    if (!list || n == 0) return SEL_OK;
    m->skipped = malloc(n * sizeof *m->skipped);
    if (!m->skipped) return sel_fail(SEL_ENOMEM, "%s: out of memory", path);
    for (size_t i = 0; i < n; i++) {
        const json_t *step = json_array_get(list, i);
        m->skipped[i] = json_integer_value(step);
        if (!json_is_integer(step) || m->skipped[i] < 1 || (i > 0 && m->skipped[i] <= m->skipped[i - 1]))
            return sel_fail(SEL_EFILE, "%s: skipped is no list of steps in ascending order", path);
    }
    m->n_skipped = (int)n;
    return SEL_OK;
}

static bool has_file(const sel_step_file *files, int n, const char *name)
{
    for (int i = 0; i < n; i++)
        if (strcmp(files[i].name, name) == 0) return true;
    return false;
}

/* The manifest's own checksum.  It may be absent: other tools may write manifests too. */
static sel_status check_own_crc32(json_t *root, const char *path)
{
    json_t *value = json_object_get(root, "manifest_crc32");
    uint32_t said, is = 0;

    if (!value) return SEL_OK;
    if (!parse_hex(value, &said)) return sel_fail(SEL_EFILE, "%s: manifest_crc32 is damaged", path);
    json_object_del(root, "manifest_crc32");
    SEL_TRY(object_crc32(root, &is));
    if (is != said)
        return sel_fail(SEL_EFILE, "%s: checksum differs (it says %08" PRIx32 ", it is %08" PRIx32 ")", path, said, is);
    return SEL_OK;
}

static sel_status parse_manifest(sel_manifest *m, sel_step_file *files, int *n, json_t *root, const char *path)
{
    const char *format, *config;
    json_t *list, *corpus, *tokenizer;
    json_int_t step, tokens;
    json_error_t why;

    if (json_unpack_ex(root, &why, 0, "{s:s}", "format", &format) != 0)
        return sel_fail(SEL_EFILE, "%s: %s", path, why.text);
    if (strcmp(format, FORMAT) != 0)
        return sel_fail(SEL_EFILE, "%s: format %.40s is not known, this program reads %s", path,
                        printable(format) ? format : "?", FORMAT);
    SEL_TRY(check_own_crc32(root, path));
    if (json_unpack_ex(root, &why, 0, "{s:I, s:I, s:s, s:o, s:o, s:o}", "step", &step, "tokens", &tokens, "config",
                       &config, "files", &list, "corpus", &corpus, "tokenizer", &tokenizer) != 0)
        return sel_fail(SEL_EFILE, "%s: %s", path, why.text);
    if (step < 0 || tokens < 0 || !parse_named(corpus, &m->corpus_crc32) ||
        !parse_named(tokenizer, &m->tokenizer_crc32))
        return sel_fail(SEL_EFILE, "%s: step, tokens, corpus or tokenizer is damaged", path);
    if (!json_is_array(list) || json_array_size(list) > SEL_STEP_FILES)
        return sel_fail(SEL_EFILE, "%s: files is no list of at most %d files", path, SEL_STEP_FILES);
    m->step = step;
    m->tokens = tokens;
    for (*n = 0; *n < (int)json_array_size(list); ++*n) {
        SEL_TRY(parse_file(&files[*n], json_array_get(list, (size_t)*n), path));
        if (has_file(files, *n, files[*n].name))
            return sel_fail(SEL_EFILE, "%s: files: %s is named twice", path, files[*n].name);
    }
    if (!has_file(files, *n, SEL_STEP_MODEL) || !has_file(files, *n, SEL_STEP_OPTIMIZER))
        return sel_fail(SEL_EFILE, "%s: files: %s or %s is not among them", path, SEL_STEP_MODEL, SEL_STEP_OPTIMIZER);
    SEL_TRY(parse_skipped(m, json_object_get(root, "skipped"), path));
    m->config = strdup(config);
    return m->config ? SEL_OK : sel_fail(SEL_ENOMEM, "%s: out of memory", path);
}

sel_status sel_step_read_manifest(sel_manifest *m, sel_step_file files[SEL_STEP_FILES], int *n, const char *folder)
{
    char path[SEL_PATH_MAX], *text;
    size_t bytes;
    json_error_t why;

    *m = (sel_manifest){0};
    SEL_TRY(sel_path_join(path, folder, SEL_STEP_MANIFEST));
    if (!sel_path_exists(path)) return sel_fail(SEL_EFILE, "%s: missing, the checkpoint is not complete", path);
    SEL_TRY(sel_read_file(path, &text, &bytes));
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &why);
    free(text);
    if (!root) return sel_fail(SEL_EFILE, "%s: line %d: %s", path, why.line, why.text);

    const sel_status rc = parse_manifest(m, files, n, root, path);
    json_decref(root);
    if (rc != SEL_OK) {
        sel_manifest_free(m);
        return rc;
    }
    snprintf(m->path, sizeof m->path, "%s", folder); /* fits: path was longer */
    return SEL_OK;
}

void sel_manifest_free(sel_manifest *m)
{
    free(m->config);
    free(m->skipped);
    *m = (sel_manifest){0};
}

sel_status sel_step_crc32(const char *folder, const sel_step_file *file, int64_t begin, int64_t end, uint32_t *crc)
{
    char path[SEL_PATH_MAX];
    struct stat st;
    sel_status rc = SEL_OK;

    SEL_TRY(sel_path_join(path, folder, file->name));
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT) return sel_fail(SEL_EFILE, "%s: missing", path);
    if (fd < 0) return sel_fail(SEL_EIO, "%s: cannot open: %s", path, strerror(errno));
    char *buffer = malloc(READ_BYTES);
    if (!buffer)
        rc = sel_fail(SEL_ENOMEM, "%s: out of memory", path);
    else if (fstat(fd, &st) != 0)
        rc = sel_fail(SEL_EIO, "%s: cannot stat: %s", path, strerror(errno));
    else if (st.st_size != file->bytes)
        rc = sel_fail(SEL_EFILE, "%s: %lld bytes, the manifest says %lld", path, (long long)st.st_size,
                      (long long)file->bytes);

    uLong sum = crc32_z(0, NULL, 0);
    for (int64_t at = begin; rc == SEL_OK && at < end; at += (int64_t)READ_BYTES) {
        const size_t n = end - at < (int64_t)READ_BYTES ? (size_t)(end - at) : READ_BYTES;
        rc = sel_pread_all(fd, buffer, n, at, path);
        if (rc == SEL_OK) sum = crc32_z(sum, (const Bytef *)buffer, n);
    }
    *crc = (uint32_t)sum;
    free(buffer);
    close(fd);
    return rc;
}

sel_status sel_step_compare(const char *folder, const sel_step_file *file, uint32_t crc)
{
    if (crc == file->crc32) return SEL_OK;
    return sel_fail(SEL_EFILE, "%s/%s: checksum differs (manifest %08" PRIx32 ", file %08" PRIx32 ")", folder,
                    file->name, file->crc32, crc);
}
