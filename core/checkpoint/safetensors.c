/* safetensors.c: the header of a safetensors file, made and checked. */
#include "core/checkpoint/safetensors.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/file.h"

#define ALIGNMENT 64
#define MAX_JSON 100000000 /* the limit of the format's own library */

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "arrays go to the file as they are in memory");

/* 4 bytes a float; false when the shape is negative or the product too large. */
static bool tensor_bytes(const sel_st_entry *e, int64_t *bytes)
{
    *bytes = sizeof(float);
    for (int r = 0; r < e->rank; r++)
        if (e->shape[r] < 0 || __builtin_mul_overflow(*bytes, e->shape[r], bytes)) return false;
    return true;
}

static json_t *entry_json(const sel_st_entry *e)
{
    json_t *shape = json_array();

    for (int r = 0; r < e->rank; r++) json_array_append_new(shape, json_integer(e->shape[r]));
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", "F32", "shape", shape, "data_offsets", (json_int_t)e->begin,
                     (json_int_t)e->end);
}

/* Places the tensors one after the other and puts them into `root`, in order. */
static sel_status place_entries(sel_st_index *ix, json_t *root)
{
    int64_t at = 0;

    for (int i = 0; i < ix->n; i++) {
        sel_st_entry *e = &ix->entries[i];
        int64_t bytes;

        if (json_object_get(root, e->name))
            return sel_fail(SEL_EUSER, "safetensors: the name %s is taken twice", e->name);
        if (e->rank < 0 || e->rank > 2 || !tensor_bytes(e, &bytes) || __builtin_add_overflow(at, bytes, &e->end))
            return sel_fail(SEL_EUSER, "safetensors: tensor %s has an impossible shape", e->name);
        e->begin = at;
        at = e->end;
        if (json_object_set_new(root, e->name, entry_json(e)) != 0)
            return sel_fail(SEL_ENOMEM, "safetensors: no memory for the header, or %s is not UTF-8", e->name);
    }
    ix->data_bytes = at;
    return SEL_OK;
}

sel_status sel_st_make(sel_st_index *ix, char **header, size_t *bytes)
{
    sel_status rc;
    char *text = NULL;
    json_t *root = json_object();

    *header = NULL;
    if (!root || json_object_set_new(root, "__metadata__", json_pack("{s:s}", "format", "pt")) != 0) {
        rc = sel_fail(SEL_ENOMEM, "safetensors: no memory for the header");
        goto out;
    }
    if ((rc = place_entries(ix, root)) != SEL_OK) goto out;
    text = json_dumps(root, JSON_COMPACT);
    const size_t length = text ? strlen(text) : 0;
    const size_t total = (8 + length + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    *header = text ? malloc(total) : NULL;
    if (!*header) {
        rc = sel_fail(SEL_ENOMEM, "safetensors: no memory for the header");
        goto out;
    }
    if (total - 8 > MAX_JSON) {
        rc = sel_fail(SEL_EUSER, "safetensors: %d tensors make a header of %zu bytes, the format allows %d", ix->n,
                      total - 8, MAX_JSON);
        free(*header);
        *header = NULL;
        goto out;
    }

    const uint64_t json_bytes = total - 8;
    memcpy(*header, &json_bytes, 8);
    memcpy(*header + 8, text, length);
    memset(*header + 8 + length, ' ', total - 8 - length);
    *bytes = total;
    ix->header_bytes = (int64_t)total;
out:
    free(text);
    json_decref(root);
    return rc;
}

/* One tensor of the header, not yet compared with its neighbours. */
static sel_status parse_entry(sel_st_entry *e, const char *name, json_t *value, const char *path)
{
    const char *dtype;
    json_t *shape;
    json_int_t begin, end;
    json_error_t why;
    int64_t bytes;

    for (const char *p = name; *p; p++)
        if (iscntrl((unsigned char)*p))
            return sel_fail(SEL_EFILE, "%s: header: a name has the control character 0x%02x in it", path, (unsigned)*p);
    if (strlen(name) >= sizeof e->name)
        return sel_fail(SEL_EFILE, "%s: header: the name %.100s... is longer than %zu bytes", path, name,
                        sizeof e->name - 1);
    strcpy(e->name, name);
    if (json_unpack_ex(value, &why, JSON_STRICT, "{s:s, s:o, s:[I, I]}", "dtype", &dtype, "shape", &shape,
                       "data_offsets", &begin, &end) != 0)
        return sel_fail(SEL_EFILE, "%s: header: tensor %s: %s", path, name, why.text);
    if (strcmp(dtype, "F32") != 0)
        return sel_fail(SEL_EFILE, "%s: header: tensor %s: its dtype is not F32, the only one read", path, name);
    if (!json_is_array(shape) || json_array_size(shape) > 2)
        return sel_fail(SEL_EFILE, "%s: header: tensor %s: the shape is not a list of at most 2 sizes", path, name);
    e->rank = (int)json_array_size(shape);
    for (int r = 0; r < e->rank; r++) {
        const json_t *size = json_array_get(shape, (size_t)r);
        if (!json_is_integer(size))
            return sel_fail(SEL_EFILE, "%s: header: tensor %s: a size in the shape is no integer", path, name);
        e->shape[r] = json_integer_value(size);
    }
    if (!tensor_bytes(e, &bytes) || begin < 0 || end < begin || end - begin != bytes)
        return sel_fail(SEL_EFILE, "%s: header: tensor %s: offsets %lld to %lld do not fit its shape", path, name,
                        (long long)begin, (long long)end);
    e->begin = begin;
    e->end = end;
    return SEL_OK;
}

static int by_place(const void *a, const void *b)
{
    const sel_st_entry *x = a, *y = b;

    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end); /* empty tensors first */
}

/* Fills ix from the parsed header; data_bytes is what the file holds after it. */
static sel_status parse_header(sel_st_index *ix, json_t *root, const char *path)
{
    const char *name;
    json_t *value;

    if (!json_is_object(root)) return sel_fail(SEL_EFILE, "%s: the header is no JSON object", path);
    ix->entries = calloc(json_object_size(root) + 1, sizeof *ix->entries);
    if (!ix->entries) return sel_fail(SEL_ENOMEM, "%s: out of memory for the header", path);
    json_object_foreach(root, name, value)
    {
        if (strcmp(name, "__metadata__") == 0) continue;
        SEL_TRY(parse_entry(&ix->entries[ix->n], name, value, path));
        ix->n++;
    }
    qsort(ix->entries, (size_t)ix->n, sizeof *ix->entries, by_place);

    int64_t at = 0;
    for (int i = 0; i < ix->n; i++) {
        const sel_st_entry *e = &ix->entries[i];
        if (e->begin != at)
            return sel_fail(SEL_EFILE, "%s: header: tensor %s begins at byte %lld where %lld is due", path, e->name,
                            (long long)e->begin, (long long)at);
        at = e->end;
    }
    if (at != ix->data_bytes)
        return sel_fail(SEL_EFILE, "%s: the tensors need %lld bytes, the file has %lld", path, (long long)at,
                        (long long)ix->data_bytes);
    return SEL_OK;
}

/* Reads the JSON text of an open file into *text (freed by the caller). */
static sel_status read_header(int fd, char **text, size_t *length, int64_t *file_bytes, const char *path)
{
    struct stat st;
    uint64_t json_bytes;

    if (fstat(fd, &st) != 0) return sel_fail(SEL_EIO, "%s: cannot stat: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode)) return sel_fail(SEL_EUSER, "%s: is no regular file", path);
    *file_bytes = st.st_size;
    if (*file_bytes < 8) return sel_fail(SEL_EFILE, "%s: too short for a safetensors file", path);
    SEL_TRY(sel_pread_all(fd, &json_bytes, 8, 0, path));
    if (json_bytes > MAX_JSON || json_bytes > (uint64_t)*file_bytes - 8)
        return sel_fail(SEL_EFILE, "%s: no safetensors file: a header of %llu bytes in a file of %lld", path,
                        (unsigned long long)json_bytes, (long long)*file_bytes);
    *text = malloc(json_bytes + 1);
    if (!*text) return sel_fail(SEL_ENOMEM, "%s: out of memory for the header", path);
    *length = json_bytes;
    return sel_pread_all(fd, *text, json_bytes, 8, path);
}

sel_status sel_st_read(sel_st_index *ix, const char *path)
{
    char *text = NULL;
    size_t length = 0;
    int64_t file_bytes;
    json_t *root = NULL;
    json_error_t why;

    *ix = (sel_st_index){0};
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return sel_fail(errno == ENOENT ? SEL_EUSER : SEL_EIO, "%s: cannot open: %s", path, strerror(errno));
    sel_status rc = read_header(fd, &text, &length, &file_bytes, path);
    if (rc != SEL_OK) goto out;

    root = length && text[0] == '{' ? json_loadb(text, length, JSON_REJECT_DUPLICATES, &why) : NULL;
    if (!root) {
        rc = sel_fail(SEL_EFILE, "%s: the header is no JSON object: %s", path,
                      length && text[0] == '{' ? why.text : "it does not begin with {");
        goto out;
    }
    ix->header_bytes = 8 + (int64_t)length;
    ix->data_bytes = file_bytes - ix->header_bytes;
    rc = parse_header(ix, root, path);
out:
    json_decref(root);
    free(text);
    close(fd);
    if (rc != SEL_OK) sel_st_free(ix);
    return rc;
}

void sel_st_free(sel_st_index *ix)
{
    free(ix->entries);
    *ix = (sel_st_index){0};
}
