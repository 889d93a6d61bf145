/* A packed corpus: index.json says which shards follow one another, mmap shows them as one stream. */
#include "core/data/corpus.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "core/base/file.h"

#define FORMAT "selectra-packed-1"

typedef struct {
    char *file;
    const void *ids;      /* mmap of the whole file; NULL when it is empty */
    int64_t first;        /* position of its first token in the stream */
    int64_t tokens;
    uint32_t crc32;
} shard;

struct sel_corpus {
    char dir[SEL_PATH_MAX];
    shard *shards;
    int64_t n_shards;
    int64_t tokens, documents, bytes, vocab;
    int32_t bos, eos;
    int token_bytes;
    uint32_t crc32, tokenizer_crc32;
    char *documents_file;
    uint32_t documents_crc32;
};

/* --- index.json ------------------------------------------------------------------------------------------- */

/* object[key] as a whole number in [low, high]. */
static sel_status get_int(const json_t *object, const char *path, const char *key, int64_t low, int64_t high,
                          int64_t *value)
{
    const json_t *v = json_object_get(object, key);

    *value = json_integer_value(v);
    if (!json_is_integer(v) || *value < low || *value > high)
        return sel_fail(SEL_EFILE, "%s: \"%s\" is missing or not a whole number from %" PRId64 " to %" PRId64, path,
                        key, low, high);
    return SEL_OK;
}

static sel_status get_crc32(const json_t *object, const char *path, uint32_t *value)
{
    int64_t v;

    SEL_TRY(get_int(object, path, "crc32", 0, UINT32_MAX, &v));
    *value = (uint32_t)v;
    return SEL_OK;
}

/* object[key] as the name of a file in the folder itself. */
static sel_status get_file(const json_t *object, const char *path, char **name)
{
    const char *s = json_string_value(json_object_get(object, "file"));

    if (!s || !*s || strchr(s, '/')) return sel_fail(SEL_EFILE, "%s: a \"file\" is missing or not a plain name", path);
    *name = strdup(s);
    return *name ? SEL_OK : sel_fail(SEL_ENOMEM, "%s: no memory to read it", path);
}

static sel_status read_index(sel_corpus *c, const json_t *root, const char *path)
{
    int64_t v;
    const json_t *files = json_object_get(root, "documents_file"), *list = json_object_get(root, "shards");
    const char *format = json_string_value(json_object_get(root, "format"));

    if (!format || strcmp(format, FORMAT) != 0)
        return sel_fail(SEL_EUSER, "%s: is not a packed corpus (its \"format\" is not \"" FORMAT "\")", path);
    SEL_TRY(get_int(root, path, "tokens", 1, INT64_MAX / 8, &c->tokens));
    SEL_TRY(get_int(root, path, "documents", 1, INT64_MAX / 8, &c->documents));
    SEL_TRY(get_int(root, path, "bytes", 0, INT64_MAX, &c->bytes));
    SEL_TRY(get_int(root, path, "vocab", 1, INT32_MAX, &c->vocab));
    SEL_TRY(get_int(root, path, "token_bytes", 2, 4, &v));
    c->token_bytes = (int)v;
    if (v == 3 || (v == 2 && c->vocab > 65536))
        return sel_fail(SEL_EFILE, "%s: %d bytes a token do not fit a vocabulary of %" PRId64, path, c->token_bytes,
                        c->vocab);
    SEL_TRY(get_int(root, path, "bos", 0, c->vocab - 1, &v));
    c->bos = (int32_t)v;
    SEL_TRY(get_int(root, path, "eos", 0, c->vocab - 1, &v));
    c->eos = (int32_t)v;
    SEL_TRY(get_crc32(json_object_get(root, "tokenizer"), path, &c->tokenizer_crc32));
    SEL_TRY(get_file(files, path, &c->documents_file));
    SEL_TRY(get_crc32(files, path, &c->documents_crc32));

    c->shards = calloc(json_array_size(list) + 1, sizeof *c->shards);
    if (!c->shards) return sel_fail(SEL_ENOMEM, "%s: no memory for %zu shards", path, json_array_size(list));
    int64_t sum = 0;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *item = json_array_get(list, i);
        shard *s = &c->shards[c->n_shards++];
        SEL_TRY(get_file(item, path, &s->file));
        SEL_TRY(get_int(item, path, "tokens", 0, INT64_MAX / 8, &s->tokens));
        SEL_TRY(get_crc32(item, path, &s->crc32));
        s->first = sum;
        sum += s->tokens;
        if (sum > c->tokens) break;
    }
    if (sum != c->tokens)
        return sel_fail(SEL_EFILE, "%s: the shards have %" PRId64 " tokens, \"tokens\" says %" PRId64, path, sum,
                        c->tokens);
    return SEL_OK;
}

/* --- files ------------------------------------------------------------------------------------------------ */

/* Maps a file that must have so many bytes; *data NULL for an empty one. */
static sel_status map_file(const char *dir, const char *name, int64_t bytes, const void **data)
{
    char path[SEL_PATH_MAX];
    struct stat st;
    sel_status rc = SEL_OK;

    *data = NULL;
    SEL_TRY(sel_path_join(path, dir, name));
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return sel_fail(errno == ENOENT ? SEL_EFILE : SEL_EIO, "%s: %s", path, strerror(errno));
    if (fstat(fd, &st) != 0) {
        rc = sel_fail(SEL_EIO, "%s: %s", path, strerror(errno));
    } else if (st.st_size != bytes) {
        rc = sel_fail(SEL_EFILE, "%s: has %lld bytes, index.json says %" PRId64, path, (long long)st.st_size, bytes);
    } else if (bytes > 0) {
        void *map = mmap(NULL, (size_t)bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED)
            rc = sel_fail(SEL_EIO, "%s: cannot map %" PRId64 " bytes: %s", path, bytes, strerror(errno));
        else
            *data = map;
    }
    close(fd);
    return rc;
}

static int32_t id_at(const sel_corpus *c, const shard *s, int64_t i)
{
    if (c->token_bytes == 2) return le16toh(((const uint16_t *)s->ids)[i]);
    return (int32_t)le32toh(((const uint32_t *)s->ids)[i]);
}

/* The document ends: ascending, the last at the stream's end.  Only the last is looked at unless `all`. */
static sel_status check_documents(const sel_corpus *c, bool all)
{
    const void *map;
    sel_status rc = SEL_OK;
    const size_t bytes = (size_t)c->documents * sizeof(uint64_t);

    SEL_TRY(map_file(c->dir, c->documents_file, (int64_t)bytes, &map));
    const uint64_t *ends = map;
    uint64_t before = 0;
    for (int64_t i = all ? 0 : c->documents - 1; i < c->documents && rc == SEL_OK; i++) {
        const uint64_t end = le64toh(ends[i]);
        if (end <= before || (i == c->documents - 1 && end != (uint64_t)c->tokens))
            rc = sel_fail(SEL_EFILE, "%s/%s: document %" PRId64 " ends at token %" PRIu64 " of %" PRId64, c->dir,
                          c->documents_file, i, end, c->tokens);
        before = end;
    }
    if (rc == SEL_OK && all && crc32_z(0, map, bytes) != c->documents_crc32)
        rc = sel_fail(SEL_EFILE, "%s/%s: damaged, its checksum differs from index.json's", c->dir, c->documents_file);
    munmap((void *)(uintptr_t)map, bytes);
    return rc;
}

static sel_status load(sel_corpus *c, const char *dir)
{
    char path[SEL_PATH_MAX], *text = NULL;
    size_t bytes;
    json_error_t e;

    const int n = snprintf(c->dir, sizeof c->dir, "%s", dir);
    if (n >= (int)sizeof c->dir) return sel_fail(SEL_EUSER, "%s: the path is too long", dir);
    if (!sel_path_is_dir(dir)) return sel_fail(SEL_EUSER, "%s: no such folder (expected a packed corpus)", dir);
    SEL_TRY(sel_path_join(path, dir, "pack-state.json"));
    const bool begun = sel_path_exists(path);
    SEL_TRY(sel_path_join(path, dir, "index.json"));
    if (!sel_path_exists(path))
        return begun ? sel_fail(SEL_EUSER, "%s: packing was interrupted; the same `data pack` goes on with it", dir)
                     : sel_fail(SEL_EUSER, "%s: is not a packed corpus (no index.json)", dir);

    SEL_TRY(sel_read_file(path, &text, &bytes));
    c->crc32 = (uint32_t)crc32_z(0, (const unsigned char *)text, bytes);
    json_t *root = json_loadb(text, bytes, 0, &e);
    free(text);
    if (!root) return sel_fail(SEL_EFILE, "%s:%d: bad JSON: %s", path, e.line, e.text);
    const sel_status rc = read_index(c, root, path);
    json_decref(root);
    SEL_TRY(rc);

    for (int64_t i = 0; i < c->n_shards; i++)
        SEL_TRY(map_file(dir, c->shards[i].file, c->shards[i].tokens * c->token_bytes, &c->shards[i].ids));
    return check_documents(c, false);
}

sel_status sel_corpus_open(sel_corpus **out, const char *dir)
{
    *out = NULL;
    sel_corpus *c = calloc(1, sizeof *c);
    if (!c) return sel_fail(SEL_ENOMEM, "%s: no memory to open it", dir);
    const sel_status rc = load(c, dir);
    if (rc != SEL_OK)
        sel_corpus_close(&c);
    else
        *out = c;
    return rc;
}

void sel_corpus_close(sel_corpus **out)
{
    sel_corpus *c = *out;

    if (!c) return;
    for (int64_t i = 0; i < c->n_shards; i++) {
        const shard *s = &c->shards[i];
        if (s->ids) munmap((void *)(uintptr_t)s->ids, (size_t)(s->tokens * c->token_bytes));
        free(s->file);
    }
    free(c->shards);
    free(c->documents_file);
    free(c);
    *out = NULL;
}

static sel_status check_id(const sel_corpus *c, const shard *s, int64_t i, int32_t id)
{
    if (id >= 0 && id < c->vocab) return SEL_OK;
    return sel_fail(SEL_EFILE, "%s/%s: token %" PRId64 " is %" PRIu32 ", the vocabulary has %" PRId64, c->dir, s->file,
                    i, (uint32_t)id, c->vocab);
}

sel_status sel_corpus_verify(const sel_corpus *c)
{
    for (int64_t i = 0; i < c->n_shards; i++) {
        const shard *s = &c->shards[i];
        if (crc32_z(0, s->ids, s->ids ? (size_t)(s->tokens * c->token_bytes) : 0) != s->crc32)
            return sel_fail(SEL_EFILE, "%s/%s: damaged, its checksum differs from index.json's", c->dir, s->file);
        for (int64_t j = 0; j < s->tokens; j++) SEL_TRY(check_id(c, s, j, id_at(c, s, j)));
    }
    return check_documents(c, true);
}

int64_t     sel_corpus_tokens(const sel_corpus *c) { return c->tokens; }
int64_t     sel_corpus_documents(const sel_corpus *c) { return c->documents; }
int64_t     sel_corpus_bytes(const sel_corpus *c) { return c->bytes; }
int64_t     sel_corpus_vocab(const sel_corpus *c) { return c->vocab; }
int32_t     sel_corpus_bos(const sel_corpus *c) { return c->bos; }
int32_t     sel_corpus_eos(const sel_corpus *c) { return c->eos; }
uint32_t    sel_corpus_crc32(const sel_corpus *c) { return c->crc32; }
uint32_t    sel_corpus_tokenizer_crc32(const sel_corpus *c) { return c->tokenizer_crc32; }
const char *sel_corpus_dir(const sel_corpus *c) { return c->dir; }
int64_t     sel_corpus_shards(const sel_corpus *c) { return c->n_shards; }

/* --- windows ---------------------------------------------------------------------------------------------- */

int64_t sel_corpus_windows(const sel_corpus *c, int64_t N) { return c->tokens / N; }
int64_t sel_corpus_tail(const sel_corpus *c, int64_t N) { return c->tokens % N; }

/* The shard that holds the token at `position`. */
static const shard *find_shard(const sel_corpus *c, int64_t position)
{
    int64_t low = 0, high = c->n_shards - 1;

    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (position < c->shards[middle].first + c->shards[middle].tokens)
            high = middle;
        else
            low = middle + 1;
    }
    return &c->shards[low];
}

sel_status sel_corpus_window(const sel_corpus *c, int64_t N, int64_t w, int32_t *out, int64_t *targets)
{
    SEL_ASSERT(N >= 1 && w >= 0 && w <= c->tokens / N);
    const int64_t from = w * N;
    const int64_t n = c->tokens - from < N ? c->tokens - from : N;

    out[0] = c->bos;
    const shard *s = n > 0 ? find_shard(c, from) : NULL;
    for (int64_t i = 0; i < n; i++) {
        while (from + i >= s->first + s->tokens) s++;
        out[1 + i] = id_at(c, s, from + i - s->first);
        SEL_TRY(check_id(c, s, from + i - s->first, out[1 + i]));
    }
    for (int64_t i = n; i < N; i++) out[1 + i] = -1;
    if (targets) *targets = n;
    return SEL_OK;
}
