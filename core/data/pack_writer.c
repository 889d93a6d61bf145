/* Shards, document ends, state and index of a packed corpus. */
#include "core/data/pack_writer.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "core/base/file.h"

#define INDEX_FORMAT "selectra-packed-1"
#define STATE_FORMAT "selectra-pack-state-1"
#define INDEX_FILE "index.json"
#define STATE_FILE "pack-state.json"
#define ENDS_FILE "documents.bin"
#define ENDS_TEMPORARY "documents.bin.tmp"
#define TOKENIZER_FILE "tokenizer.model"

enum { BUFFER_BYTES = 1 << 20 };

/* An append-only file behind a buffer. */
typedef struct {
    int fd;                       /* -1: closed */
    char path[SEL_PATH_MAX];
    unsigned char *buffer;        /* [BUFFER_BYTES] */
    size_t used;
} stream;

struct sel_pack_writer {
    const sel_tokenizer *tokenizer;
    char dir[SEL_PATH_MAX];
    int lock;                     /* the folder, locked */
    bool made;                    /* the folder was not there before */
    bool begun, complete;         /* the state is ours; so is index.json */
    int token_bytes;
    int64_t shard_limit;

    stream shard, ends;
    uint32_t shard_crc;
    int64_t shard_tokens;         /* in the open shard */
    int64_t open_tokens;          /* of them in the document that has not ended */
    int64_t tokens, documents, bytes;   /* of ended documents */
    int file;                     /* where the next document starts */
    int64_t line;

    json_t *setup;                /* what must be the same to go on */
    json_t *shards;               /* the whole ones, as in index.json */
};

/* --- streams ---------------------------------------------------------------------------------------------- */

static sel_status stream_open(stream *s, const char *dir, const char *name, int flags)
{
    SEL_TRY(sel_path_join(s->path, dir, name));
    s->used = 0;
    s->fd = open(s->path, O_WRONLY | O_CREAT | O_CLOEXEC | flags, 0666);
    return s->fd >= 0 ? SEL_OK : sel_fail(SEL_EIO, "%s: %s", s->path, strerror(errno));
}

static sel_status stream_flush(stream *s)
{
    SEL_TRY(sel_write_all(s->fd, s->buffer, s->used, s->path));
    s->used = 0;
    return SEL_OK;
}

static sel_status stream_add(stream *s, const unsigned char *data, size_t bytes)
{
    while (bytes > 0) {
        const size_t room = BUFFER_BYTES - s->used, n = bytes < room ? bytes : room;
        memcpy(s->buffer + s->used, data, n);
        s->used += n;
        data += n;
        bytes -= n;
        if (s->used == BUFFER_BYTES) SEL_TRY(stream_flush(s));
    }
    return SEL_OK;
}

static sel_status stream_sync(stream *s)
{
    SEL_TRY(stream_flush(s));
    return fsync(s->fd) == 0 ? SEL_OK : sel_fail(SEL_EIO, "%s: %s", s->path, strerror(errno));
}

static sel_status stream_close(stream *s)
{
    const int fd = s->fd;

    s->fd = -1;
    return fd < 0 || close(fd) == 0 ? SEL_OK : sel_fail(SEL_EIO, "%s: %s", s->path, strerror(errno));
}

static sel_status move(const char *dir, const char *from, const char *to)
{
    char a[SEL_PATH_MAX], b[SEL_PATH_MAX];

    SEL_TRY(sel_path_join(a, dir, from));
    SEL_TRY(sel_path_join(b, dir, to));
    if (rename(a, b) != 0) return sel_fail(SEL_EIO, "%s: cannot be renamed to %s: %s", a, to, strerror(errno));
    return sel_sync_dir(dir);
}

/* --- JSON ------------------------------------------------------------------------------------------------- */

static sel_status no_json(void)
{
    return sel_fail(SEL_ENOMEM, "no memory for the corpus's index, or a path that is not UTF-8");
}

/* Takes over root (NULL: what it should hold could not be made). */
static sel_status put_json(const char *dir, const char *name, json_t *root)
{
    char path[SEL_PATH_MAX];
    char *text = root ? json_dumps(root, JSON_INDENT(2)) : NULL;
    sel_status rc = text ? sel_path_join(path, dir, name) : no_json();

    if (rc == SEL_OK) rc = sel_write_file(path, text, strlen(text));
    free(text);
    json_decref(root);
    return rc;
}

static json_t *describe_tokenizer(const sel_tokenizer *t)
{
    size_t bytes;

    sel_tokenizer_bytes(t, &bytes);
    return json_pack("{s:s, s:I, s:I}", "file", TOKENIZER_FILE, "crc32", (json_int_t)sel_tokenizer_crc32(t), "bytes",
                     (json_int_t)bytes);
}

static json_t *describe_setup(const sel_pack_writer *w, const sel_documents *d)
{
    const sel_documents_options o = sel_documents_settings(d);
    json_t *inputs = json_array();

    for (int i = 0; i < sel_documents_files(d); i++) {
        int64_t bytes;
        const char *path = sel_documents_file(d, i, &bytes);
        if (json_array_append_new(inputs, json_pack("{s:s, s:I}", "file", path, "bytes", (json_int_t)bytes)) != 0) {
            json_decref(inputs);
            return NULL;
        }
    }
    return json_pack("{s:o, s:o, s:I, s:b, s:s}", "inputs", inputs, "tokenizer", describe_tokenizer(w->tokenizer),
                     "shard_tokens", (json_int_t)w->shard_limit, "lines", o.lines, "field", o.field);
}

static sel_status save_state(const sel_pack_writer *w)
{
    return put_json(w->dir, STATE_FILE,
                    json_pack("{s:s, s:O, s:{s:i, s:I}, s:I, s:I, s:I, s:O}", "format", STATE_FORMAT, "setup", w->setup,
                              "next", "file", w->file, "line", (json_int_t)w->line, "tokens", (json_int_t)w->tokens,
                              "documents", (json_int_t)w->documents, "bytes", (json_int_t)w->bytes,
                              "shards", w->shards));
}

/* --- going on --------------------------------------------------------------------------------------------- */

/* The first thing that differs between the setup a folder was begun with and this one. */
static sel_status compare_setup(const sel_pack_writer *w, const json_t *old)
{
    const char *key;
    json_t *now;

    json_object_foreach(w->setup, key, now) {
        const json_t *then = json_object_get(old, key);
        if (json_equal(now, then)) continue;
        if (strcmp(key, "inputs") != 0)
            return sel_fail(SEL_EUSER, "%s: packing was begun with another %s; give the same, or remove the folder",
                            w->dir, strcmp(key, "tokenizer") == 0 ? "tokenizer" : key);
        for (size_t i = 0; i < json_array_size(now); i++) {
            const json_t *a = json_array_get(now, i), *b = json_array_get(then, i);
            if (json_equal(a, b)) continue;
            return sel_fail(SEL_EUSER, "%s: packing was begun with other inputs (number %zu: %s of %lld bytes then, "
                            "%s of %lld now); give the same, or remove the folder", w->dir, i + 1,
                            b ? json_string_value(json_object_get(b, "file")) : "none",
                            (long long)json_integer_value(json_object_get(b, "bytes")),
                            json_string_value(json_object_get(a, "file")),
                            (long long)json_integer_value(json_object_get(a, "bytes")));
        }
        return sel_fail(SEL_EUSER, "%s: packing was begun with %zu inputs, now there are %zu; give the same, or remove "
                        "the folder", w->dir, json_array_size(then), json_array_size(now));
    }
    return SEL_OK;
}

static bool shards_are_whole(const sel_pack_writer *w)
{
    for (size_t i = 0; i < json_array_size(w->shards); i++) {
        const json_t *item = json_array_get(w->shards, i);
        const char *name = json_string_value(json_object_get(item, "file"));
        char path[SEL_PATH_MAX];
        struct stat st;
        if (!name || sel_path_join(path, w->dir, name) != SEL_OK || stat(path, &st) != 0 ||
            st.st_size != json_integer_value(json_object_get(item, "tokens")) * w->token_bytes)
            return false;
    }
    return true;
}

/* Takes over what the state says; state is borrowed. */
static sel_status resume(sel_pack_writer *w, const json_t *state, const char *path, int n_files)
{
    const json_t *next = json_object_get(state, "next");
    json_t *shards = json_object_get(state, "shards");
    const char *format = json_string_value(json_object_get(state, "format"));
    char ends[SEL_PATH_MAX], temporary[SEL_PATH_MAX];
    struct stat st;

    if (!format || strcmp(format, STATE_FORMAT) != 0) return sel_fail(SEL_EFILE, "%s: is not a state of packing", path);
    if (json_array_size(shards) == 0) return SEL_OK;   /* nothing to lose: begin anew, with whatever setup */

    SEL_TRY(compare_setup(w, json_object_get(state, "setup")));
    w->tokens = json_integer_value(json_object_get(state, "tokens"));
    w->documents = json_integer_value(json_object_get(state, "documents"));
    w->bytes = json_integer_value(json_object_get(state, "bytes"));
    w->line = json_integer_value(json_object_get(next, "line"));
    const int64_t file = json_integer_value(json_object_get(next, "file"));
    json_decref(w->shards);
    w->shards = json_incref(shards);
    if (file < 0 || file > n_files || w->line < 0 || w->documents < 1)
        return sel_fail(SEL_EFILE, "%s: damaged; remove the folder", path);
    w->file = (int)file;

    /* An interruption after the last shard may have left the document ends under their final name. */
    SEL_TRY(sel_path_join(ends, w->dir, ENDS_FILE));
    SEL_TRY(sel_path_join(temporary, w->dir, ENDS_TEMPORARY));
    if (sel_path_exists(ends) && !sel_path_exists(temporary)) SEL_TRY(move(w->dir, ENDS_FILE, ENDS_TEMPORARY));
    if (stat(temporary, &st) != 0 || st.st_size < w->documents * 8 || !shards_are_whole(w))
        return sel_fail(SEL_EFILE, "%s: packing cannot go on, files that " STATE_FILE " names are missing or short; "
                        "remove the folder", w->dir);
    return SEL_OK;
}

/* Only a folder that packing began, or an empty one, is written to. */
static sel_status check_foreign(const char *dir)
{
    DIR *folder = opendir(dir);
    sel_status rc = SEL_OK;

    if (!folder) return sel_fail(SEL_EIO, "%s: %s", dir, strerror(errno));
    for (const struct dirent *e; rc == SEL_OK && (e = readdir(folder));)
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0 &&
            strncmp(e->d_name, STATE_FILE, strlen(STATE_FILE)) != 0)
            rc = sel_fail(SEL_EUSER, "%s: holds other files (%s); name a new or an empty folder", dir, e->d_name);
    closedir(folder);
    return rc;
}

/* After a failure: what was being written is removed, and all of it where no shard is whole. */
static void abandon(sel_pack_writer *w)
{
    static const char *const names[] = {ENDS_TEMPORARY, STATE_FILE};
    char path[SEL_PATH_MAX];

    stream_close(&w->shard);
    stream_close(&w->ends);
    if (w->shard.path[0]) unlink(w->shard.path);
    if (!w->begun || w->complete || json_array_size(w->shards) > 0) return;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (sel_path_join(path, w->dir, names[i]) == SEL_OK) unlink(path);
    if (w->made) rmdir(w->dir);
}

/* Makes or finds the folder, locks it and reads its state. */
static sel_status prepare(sel_pack_writer *w, const sel_documents *d, const char *output)
{
    char path[SEL_PATH_MAX], *text = NULL;
    size_t bytes;
    json_error_t e;

    if (snprintf(w->dir, sizeof w->dir, "%s", output) >= (int)sizeof w->dir)
        return sel_fail(SEL_EUSER, "%s: the path is too long", output);
    if (sel_path_exists(output) && !sel_path_is_dir(output)) return sel_fail(SEL_EUSER, "%s: is not a folder", output);
    w->made = !sel_path_exists(output);
    SEL_TRY(sel_make_dirs(output));
    w->lock = open(output, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (w->lock < 0) return sel_fail(SEL_EIO, "%s: %s", output, strerror(errno));
    /* Some network file systems cannot lock; only a lock that another holds is an error. */
    if (flock(w->lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return sel_fail(SEL_EUSER, "%s: another process is packing into it", output);

    SEL_TRY(sel_path_join(path, output, INDEX_FILE));
    if (sel_path_exists(path)) return sel_fail(SEL_EUSER, "%s: holds a complete packed corpus already", output);
    SEL_TRY(sel_path_join(path, output, STATE_FILE));
    if (!sel_path_exists(path)) return check_foreign(output);

    SEL_TRY(sel_read_file(path, &text, &bytes));
    json_t *state = json_loadb(text, bytes, 0, &e);
    free(text);
    if (!state) return sel_fail(SEL_EFILE, "%s:%d: bad JSON: %s", path, e.line, e.text);
    const sel_status rc = resume(w, state, path, sel_documents_files(d));
    json_decref(state);
    return rc;
}

static sel_status begin(sel_pack_writer *w, sel_documents *d, const char *output)
{
    w->shard.buffer = malloc(BUFFER_BYTES);
    w->ends.buffer = malloc(BUFFER_BYTES);
    w->setup = describe_setup(w, d);
    w->shards = json_array();
    if (!w->shard.buffer || !w->ends.buffer) return sel_fail(SEL_ENOMEM, "no memory to pack a corpus");
    if (!w->setup || !w->shards) return no_json();

    SEL_TRY(prepare(w, d, output));
    SEL_TRY(sel_documents_seek(d, w->file, w->line));
    w->begun = true;
    SEL_TRY(save_state(w));
    SEL_TRY(stream_open(&w->ends, w->dir, ENDS_TEMPORARY, 0));
    if (ftruncate(w->ends.fd, w->documents * 8) != 0 || lseek(w->ends.fd, 0, SEEK_END) < 0)
        return sel_fail(SEL_EIO, "%s: %s", w->ends.path, strerror(errno));
    return SEL_OK;
}

/* --- the interface ---------------------------------------------------------------------------------------- */

int sel_pack_token_bytes(const sel_tokenizer *t) { return sel_tokenizer_size(t) <= 65536 ? 2 : 4; }

sel_status sel_pack_writer_open(sel_pack_writer **out, sel_documents *d, const sel_tokenizer *t, const char *output,
                                int64_t shard_tokens)
{
    *out = NULL;
    sel_pack_writer *w = calloc(1, sizeof *w);
    if (!w) return sel_fail(SEL_ENOMEM, "no memory to pack a corpus");
    w->tokenizer = t;
    w->token_bytes = sel_pack_token_bytes(t);
    w->shard_limit = shard_tokens;
    w->lock = w->shard.fd = w->ends.fd = -1;
    const sel_status rc = begin(w, d, output);
    if (rc != SEL_OK)
        sel_pack_writer_close(&w);
    else
        *out = w;
    return rc;
}

void sel_pack_writer_close(sel_pack_writer **out)
{
    sel_pack_writer *w = *out;

    if (!w) return;
    abandon(w);
    if (w->lock >= 0) close(w->lock);
    json_decref(w->setup);
    json_decref(w->shards);
    free(w->shard.buffer);
    free(w->ends.buffer);
    free(w);
    *out = NULL;
}

int64_t sel_pack_writer_tokens(const sel_pack_writer *w) { return w->tokens; }

sel_status sel_pack_writer_add(sel_pack_writer *w, const unsigned char *tokens, int64_t n)
{
    const size_t bytes = (size_t)n * (size_t)w->token_bytes;

    if (w->shard.fd < 0) {
        char name[64];
        snprintf(name, sizeof name, "shard-%05zu.bin.tmp", json_array_size(w->shards));
        SEL_TRY(stream_open(&w->shard, w->dir, name, O_TRUNC));
        w->shard_crc = 0;
        w->shard_tokens = 0;
    }
    SEL_TRY(stream_add(&w->shard, tokens, bytes));
    w->shard_crc = (uint32_t)crc32_z(w->shard_crc, tokens, bytes);
    w->shard_tokens += n;
    w->open_tokens += n;
    return SEL_OK;
}

/* The shard first, then the ends of its documents, then the state that counts both. */
static sel_status close_shard(sel_pack_writer *w)
{
    const size_t number = json_array_size(w->shards);
    char temporary[64], name[64];

    snprintf(name, sizeof name, "shard-%05zu.bin", number);
    snprintf(temporary, sizeof temporary, "shard-%05zu.bin.tmp", number);
    SEL_TRY(stream_sync(&w->shard));
    SEL_TRY(stream_close(&w->shard));
    SEL_TRY(move(w->dir, temporary, name));
    SEL_TRY(stream_sync(&w->ends));
    json_t *entry = json_pack("{s:s, s:I, s:I}", "file", name, "tokens", (json_int_t)w->shard_tokens, "crc32",
                              (json_int_t)w->shard_crc);
    if (json_array_append_new(w->shards, entry) != 0) return no_json();
    return save_state(w);
}

sel_status sel_pack_writer_end_document(sel_pack_writer *w, int64_t text_bytes, int file, int64_t line)
{
    unsigned char end[8];

    w->tokens += w->open_tokens;
    w->open_tokens = 0;
    w->documents++;
    w->bytes += text_bytes;
    w->file = file;
    w->line = line;
    for (int i = 0; i < 8; i++) end[i] = (unsigned char)((uint64_t)w->tokens >> (8 * i));
    SEL_TRY(stream_add(&w->ends, end, sizeof end));
    return w->shard_tokens >= w->shard_limit ? close_shard(w) : SEL_OK;
}

sel_status sel_pack_writer_finish(sel_pack_writer *w)
{
    char path[SEL_PATH_MAX];
    uint32_t ends_crc;
    int64_t ends_bytes;
    size_t model_bytes;

    if (w->documents == 0) return sel_fail(SEL_EUSER, "the inputs hold no document: there is nothing to pack");
    if (w->shard.fd >= 0) SEL_TRY(close_shard(w));
    SEL_TRY(stream_sync(&w->ends));
    SEL_TRY(stream_close(&w->ends));
    SEL_TRY(move(w->dir, ENDS_TEMPORARY, ENDS_FILE));
    SEL_TRY(sel_path_join(path, w->dir, ENDS_FILE));
    SEL_TRY(sel_file_crc32(path, &ends_crc, &ends_bytes));

    const char *model = sel_tokenizer_bytes(w->tokenizer, &model_bytes);
    SEL_TRY(sel_path_join(path, w->dir, TOKENIZER_FILE));
    SEL_TRY(sel_write_file(path, model, model_bytes));

    SEL_TRY(put_json(w->dir, INDEX_FILE,
                     json_pack("{s:s, s:I, s:I, s:I, s:i, s:I, s:i, s:i, s:o, s:{s:s, s:I}, s:O}", "format",
                               INDEX_FORMAT, "tokens", (json_int_t)w->tokens, "documents", (json_int_t)w->documents,
                               "bytes", (json_int_t)w->bytes, "token_bytes", w->token_bytes, "vocab",
                               (json_int_t)sel_tokenizer_size(w->tokenizer), "bos", sel_tokenizer_bos(w->tokenizer),
                               "eos", sel_tokenizer_eos(w->tokenizer), "tokenizer", describe_tokenizer(w->tokenizer),
                               "documents_file", "file", ENDS_FILE, "crc32", (json_int_t)ends_crc, "shards",
                               w->shards)));
    w->complete = true;

    SEL_TRY(sel_path_join(path, w->dir, STATE_FILE));
    if (unlink(path) != 0) return sel_fail(SEL_EIO, "%s: %s", path, strerror(errno));
    return sel_sync_dir(w->dir);
}
