/* Documents out of text files and JSON lines, plain or gzip.
 *
 * One growing buffer holds the unread bytes of the current file; a document leaves it in parts (text.h), so the
 * buffer's size follows the longest JSON line, not the longest document.
 */
#include "core/data/documents.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "core/data/text.h"

enum { READ_BYTES = 1 << 18 };

struct sel_documents {
    struct input { char *path; int64_t bytes; } *inputs;
    int n_inputs;
    bool lines;
    char *field;

    int file;                 /* the current input; -1 before the first, n_inputs after the last */
    gzFile gz;                /* NULL between files */
    bool json;
    int64_t line;             /* lines of the current file left behind */
    int64_t offset;           /* its decompressed bytes left behind */
    bool inside;              /* a part of the current document has been given */
    int64_t finished_bytes;   /* sizes of the inputs before the current one */

    char *buffer;             /* unread: buffer[at .. end) */
    size_t at, end, capacity;
    bool eof;                 /* nothing follows buffer[end] */

    json_t *object;           /* the current JSON line, while rest[0 .. rest_bytes) of its text is to be given */
    const char *rest;
    size_t rest_bytes;

    char *whole;              /* sel_documents_next's document, where it has several parts */
    size_t whole_capacity;
};

static bool ends_with(const char *s, const char *suffix)
{
    const size_t n = strlen(s), m = strlen(suffix);

    return n >= m && strcmp(s + n - m, suffix) == 0;
}

static bool is_json(const char *path)
{
    return ends_with(path, ".jsonl") || ends_with(path, ".jsonl.gz") || ends_with(path, ".json") ||
           ends_with(path, ".json.gz");
}

static sel_status reserve(char **block, size_t *capacity, size_t bytes)
{
    if (bytes <= *capacity) return SEL_OK;

    size_t grown = *capacity ? *capacity : (size_t)2 * READ_BYTES;
    while (grown < bytes) grown *= 2;
    char *moved = realloc(*block, grown);
    if (!moved) return sel_fail(SEL_ENOMEM, "no memory for a document of %zu bytes", bytes);
    *block = moved;
    *capacity = grown;
    return SEL_OK;
}

/* --- files ------------------------------------------------------------------------------------------------ */

/* A missing or unreadable input is known before hours of work on the others. */
static sel_status check_input(struct input *in)
{
    const int fd = open(in->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    struct stat st;

    if (fd < 0) return sel_fail(SEL_EUSER, "%s: %s", in->path, strerror(errno));
    const int rc = fstat(fd, &st);
    close(fd);
    if (rc != 0) return sel_fail(SEL_EIO, "%s: %s", in->path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return sel_fail(SEL_EUSER, "%s: %s, an input must be a regular file", in->path,
                        S_ISDIR(st.st_mode) ? "is a folder" : "is not a regular file");
    in->bytes = st.st_size;
    return SEL_OK;
}

static sel_status stream_error(sel_documents *d)
{
    int code = Z_OK;
    const char *path = d->inputs[d->file].path, *why = gzerror(d->gz, &code);

    if (code == Z_ERRNO) return sel_fail(SEL_EIO, "%s: %s", path, strerror(errno));
    if (code == Z_MEM_ERROR) return sel_fail(SEL_ENOMEM, "%s: no memory to decompress it", path);
    if (code == Z_BUF_ERROR)
        return sel_fail(SEL_EFILE, "%s: gzip data end too early, the file is cut off after line %lld", path,
                        (long long)d->line);
    return sel_fail(SEL_EFILE, "%s: damaged gzip data after line %lld (%s)", path, (long long)d->line, why);
}

static sel_status open_next(sel_documents *d)
{
    if (d->file >= 0) d->finished_bytes += d->inputs[d->file].bytes;
    d->file++;
    d->at = d->end = 0;
    d->line = d->offset = 0;
    d->eof = d->inside = false;
    if (d->file == d->n_inputs) return SEL_OK;

    const char *path = d->inputs[d->file].path;
    errno = 0;
    d->gz = gzopen(path, "rbe");
    if (!d->gz) return sel_fail(SEL_EIO, "%s: %s", path, errno ? strerror(errno) : "no memory to read it");
    gzbuffer(d->gz, READ_BYTES);
    d->json = is_json(path);
    if (ends_with(path, ".gz") && gzdirect(d->gz)) return sel_fail(SEL_EFILE, "%s: is not a gzip file", path);
    return SEL_OK;
}

static sel_status close_file(sel_documents *d)
{
    const int rc = d->gz ? gzclose_r(d->gz) : Z_OK;

    d->gz = NULL;
    if (rc == Z_BUF_ERROR)
        return sel_fail(SEL_EFILE, "%s: gzip data end too early", d->inputs[d->file].path);
    if (rc != Z_OK) return sel_fail(SEL_EIO, "%s: error %d on closing it", d->inputs[d->file].path, rc);
    return SEL_OK;
}

/* Reads until the buffer holds `want` unread bytes or the file ends. */
static sel_status fill(sel_documents *d, size_t want)
{
    while (!d->eof && d->end - d->at < want) {
        if (d->at > 0) {
            memmove(d->buffer, d->buffer + d->at, d->end - d->at);
            d->end -= d->at;
            d->at = 0;
        }
        SEL_TRY(reserve(&d->buffer, &d->capacity, d->end + READ_BYTES));

        /* A large buffer is filled by as much again, so that a long line is moved a constant number of times. */
        const size_t room = d->capacity - d->end;
        const unsigned ask = room < (1u << 30) ? (unsigned)room : 1u << 30;
        const int got = gzread(d->gz, d->buffer + d->end, ask);
        if (got < 0) return stream_error(d);
        d->end += (size_t)got;
        if ((unsigned)got < ask) {
            int code = Z_OK;
            gzerror(d->gz, &code);
            if (code != Z_OK && code != Z_STREAM_END) return stream_error(d);
            d->eof = true;
        }
    }
    return SEL_OK;
}

static void leave_behind(sel_documents *d, size_t bytes)
{
    d->at += bytes;
    d->offset += (int64_t)bytes;
}

/* Looks for the end of the line at the buffer's start: *bytes before it, *ended.  Gives up at `limit` bytes. */
static sel_status find_line(sel_documents *d, size_t limit, size_t *bytes, bool *ended)
{
    size_t seen = 0;

    for (;;) {
        const size_t have = d->end - d->at;
        const char *start = d->buffer + d->at;
        const char *newline = have > seen ? memchr(start + seen, '\n', have - seen) : NULL;
        if (newline || d->eof || have >= limit) {
            *bytes = newline ? (size_t)(newline - start) : have;
            *ended = newline || d->eof;
            return SEL_OK;
        }
        seen = have;
        SEL_TRY(fill(d, have + 1));
    }
}

/* The line of `bytes` bytes at the buffer's start has been used, its newline with it. */
static void leave_line(sel_documents *d, size_t bytes)
{
    leave_behind(d, bytes + (d->at + bytes < d->end));
    d->line++;
}

/* --- parts ------------------------------------------------------------------------------------------------ */

static sel_status check_utf8(const sel_documents *d, const char *text, size_t bytes)
{
    const size_t good = sel_text_valid(text, bytes);
    int64_t line = d->line + 1;

    if (good == bytes) return SEL_OK;
    for (size_t i = 0; i < good; i++) line += text[i] == '\n';
    return sel_fail(SEL_EFILE, "%s:%lld: byte 0x%02x at offset %lld is not valid UTF-8", d->inputs[d->file].path,
                    (long long)line, (unsigned char)text[good], (long long)(d->offset + (int64_t)good));
}

/* A document a file.  *text NULL: the file has ended. */
static sel_status text_part(sel_documents *d, const char **text, size_t *bytes, bool *last)
{
    SEL_TRY(fill(d, SEL_TEXT_PART + 1));
    const size_t have = d->end - d->at;
    *text = NULL;
    if (have == 0) return SEL_OK;

    const size_t n = sel_text_cut(d->buffer + d->at, have);
    SEL_TRY(check_utf8(d, d->buffer + d->at, n));
    *text = d->buffer + d->at;
    *bytes = n;
    *last = d->eof && n == have;
    for (size_t i = 0; i < n; i++) d->line += (*text)[i] == '\n';
    leave_behind(d, n);
    return SEL_OK;
}

/* A document a line, without its "\n" or "\r\n". */
static sel_status line_part(sel_documents *d, const char **text, size_t *bytes, bool *last)
{
    *text = NULL;
    for (;;) {
        size_t have;
        bool ended;
        SEL_TRY(find_line(d, SEL_TEXT_PART + 3, &have, &ended));   /* a part, one more byte, "\r\n" */
        if (have == 0 && d->eof && d->at == d->end) return SEL_OK;

        const char *start = d->buffer + d->at;
        const size_t n = ended && have > 0 && start[have - 1] == '\r' ? have - 1 : have;
        if (n == 0) {
            leave_line(d, have);
            continue;
        }
        const size_t cut = sel_text_cut(start, n);
        SEL_TRY(check_utf8(d, start, cut));
        *text = start;
        *bytes = cut;
        *last = ended && cut == n;
        if (*last)
            leave_line(d, have);
        else
            leave_behind(d, cut);
        return SEL_OK;
    }
}

static bool is_blank(const char *s, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        if (s[i] != ' ' && s[i] != '\t' && s[i] != '\r') return false;
    return true;
}

static sel_status parse_line(sel_documents *d, const char *s, size_t bytes)
{
    const char *path = d->inputs[d->file].path;
    const long long line = d->line + 1;
    json_error_t e;

    /* Numbers as reals: a whole number beyond 64 bits in a field that nobody asked for is no error. */
    json_t *object = json_loadb(s, bytes, JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, &e);
    if (!object) return sel_fail(SEL_EFILE, "%s:%lld: bad JSON at byte %d: %s", path, line, e.position, e.text);

    const json_t *value = json_object_get(object, d->field);
    sel_status rc = SEL_OK;
    if (!json_is_object(object))
        rc = sel_fail(SEL_EFILE, "%s:%lld: expected a JSON object with the field \"%s\"", path, line, d->field);
    else if (!value)
        rc = sel_fail(SEL_EFILE, "%s:%lld: the object has no field \"%s\"", path, line, d->field);
    else if (!json_is_string(value))
        rc = sel_fail(SEL_EFILE, "%s:%lld: the field \"%s\" is not a string", path, line, d->field);
    if (rc != SEL_OK) {
        json_decref(object);
        return rc;
    }
    d->object = object;
    d->rest = json_string_value(value);
    d->rest_bytes = json_string_length(value);
    return SEL_OK;
}

static sel_status json_part(sel_documents *d, const char **text, size_t *bytes, bool *last)
{
    *text = NULL;
    while (d->rest_bytes == 0) {
        size_t have, skip = 0;
        bool ended;

        json_decref(d->object);
        d->object = NULL;
        SEL_TRY(find_line(d, SIZE_MAX, &have, &ended));
        if (have == 0 && d->eof && d->at == d->end) return SEL_OK;
        if (d->offset == 0 && have >= 3 && memcmp(d->buffer + d->at, "\xef\xbb\xbf", 3) == 0) skip = 3;
        if (!is_blank(d->buffer + d->at + skip, have - skip))
            SEL_TRY(parse_line(d, d->buffer + d->at + skip, have - skip));
        leave_line(d, have);
    }
    const size_t n = sel_text_cut(d->rest, d->rest_bytes);
    *text = d->rest;
    *bytes = n;
    d->rest += n;
    d->rest_bytes -= n;
    *last = d->rest_bytes == 0;
    return SEL_OK;
}

sel_status sel_documents_part(sel_documents *d, const char **text, size_t *bytes, bool *last)
{
    *text = NULL;
    *bytes = 0;
    *last = false;
    for (;;) {
        if (d->gz) {
            SEL_TRY(d->json ? json_part(d, text, bytes, last)
                    : d->lines ? line_part(d, text, bytes, last) : text_part(d, text, bytes, last));
            if (*text) {
                d->inside = !*last;
                return SEL_OK;
            }
            SEL_TRY(close_file(d));
        }
        if (d->file == d->n_inputs) return SEL_OK;
        SEL_TRY(open_next(d));
    }
}

sel_status sel_documents_next(sel_documents *d, const char **text, size_t *bytes)
{
    const char *part;
    size_t n, total = 0;
    bool last;

    SEL_TRY(sel_documents_part(d, text, bytes, &last));
    if (!*text || last) return SEL_OK;

    for (part = *text, n = *bytes;;) {
        SEL_TRY(reserve(&d->whole, &d->whole_capacity, total + n));
        memcpy(d->whole + total, part, n);
        total += n;
        if (last) break;
        SEL_TRY(sel_documents_part(d, &part, &n, &last));
    }
    *text = d->whole;
    *bytes = total;
    return SEL_OK;
}

/* --- opening, seeking ------------------------------------------------------------------------------------- */

sel_status sel_documents_open(sel_documents **out, const char *const *paths, int n_paths,
                              const sel_documents_options *o)
{
    sel_status rc = SEL_OK;

    *out = NULL;
    if (n_paths < 1) return sel_fail(SEL_EUSER, "no input files");
    sel_documents *d = calloc(1, sizeof *d);
    if (!d) return sel_fail(SEL_ENOMEM, "no memory for a list of %d inputs", n_paths);
    d->file = -1;
    d->lines = o->lines;
    d->field = strdup(o->field ? o->field : "text");
    d->inputs = calloc((size_t)n_paths, sizeof *d->inputs);
    d->n_inputs = n_paths;
    if (!d->field || !d->inputs) rc = sel_fail(SEL_ENOMEM, "no memory for a list of %d inputs", n_paths);
    if (rc == SEL_OK) rc = reserve(&d->buffer, &d->capacity, READ_BYTES);
    for (int i = 0; i < n_paths && rc == SEL_OK; i++) {
        d->inputs[i].path = strdup(paths[i]);
        rc = d->inputs[i].path ? check_input(&d->inputs[i]) : sel_fail(SEL_ENOMEM, "no memory for a path");
    }
    if (rc != SEL_OK)
        sel_documents_close(&d);
    else
        *out = d;
    return rc;
}

void sel_documents_close(sel_documents **out)
{
    sel_documents *d = *out;

    if (!d) return;
    if (d->gz) gzclose_r(d->gz);
    json_decref(d->object);
    for (int i = 0; d->inputs && i < d->n_inputs; i++) free(d->inputs[i].path);
    free(d->inputs);
    free(d->field);
    free(d->buffer);
    free(d->whole);
    free(d);
    *out = NULL;
}

void sel_documents_tell(const sel_documents *d, int *file, int64_t *line)
{
    SEL_ASSERT(!d->inside);
    const bool in_file = d->file >= 0 && d->file < d->n_inputs;
    const bool whole_file = in_file && !d->json && !d->lines;

    *file = d->file < 0 ? 0 : d->file + whole_file;
    *line = in_file && !whole_file ? d->line : 0;
}

sel_status sel_documents_seek(sel_documents *d, int file, int64_t line)
{
    SEL_ASSERT(file >= 0 && file <= d->n_inputs);
    if (d->gz) SEL_TRY(close_file(d));
    json_decref(d->object);
    d->object = NULL;
    d->rest_bytes = 0;

    d->inside = false;
    d->finished_bytes = 0;
    for (int i = 0; i + 1 < file; i++) d->finished_bytes += d->inputs[i].bytes;
    d->file = file - 1;
    SEL_TRY(open_next(d));
    while (d->gz && d->line < line) {
        size_t have;
        bool ended;
        SEL_TRY(fill(d, 1));
        if (d->at == d->end)
            return sel_fail(SEL_EFILE, "%s: has %lld lines now, %lld have been read from it before",
                            d->inputs[d->file].path, (long long)d->line, (long long)line);
        SEL_TRY(find_line(d, 1, &have, &ended));
        if (ended)
            leave_line(d, have);
        else
            leave_behind(d, have);
    }
    return SEL_OK;
}

int sel_documents_files(const sel_documents *d) { return d->n_inputs; }

const char *sel_documents_file(const sel_documents *d, int i, int64_t *bytes)
{
    SEL_ASSERT(i >= 0 && i < d->n_inputs);
    *bytes = d->inputs[i].bytes;
    return d->inputs[i].path;
}

sel_documents_options sel_documents_settings(const sel_documents *d)
{
    return (sel_documents_options){.lines = d->lines, .field = d->field};
}

void sel_documents_progress(const sel_documents *d, int64_t *done, int64_t *total)
{
    *done = d->finished_bytes;
    *total = 0;
    for (int i = 0; i < d->n_inputs; i++) *total += d->inputs[i].bytes;
    if (d->gz) *done += gzoffset(d->gz);
}
