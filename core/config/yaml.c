/* yaml.c: libyaml's events, flattened.  The only user of <yaml.h>. */
#include "core/config/yaml.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#include "core/config/text.h"

typedef struct {
    yaml_parser_t parser;
    yaml_event_t event; /* the latest; next() deletes it */
    bool holds_event;
    const char *text, *name;
    size_t bytes, capacity;
    char path[SEL_YAML_KEY_MAX]; /* the dotted key of the place that is being read */
    sel_yaml *out;
} reader;

__attribute__((format(printf, 3, 4))) static sel_status fail_at(const reader *r, int line, const char *fmt, ...)
{
    char what[512];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    return sel_fail(SEL_EUSER, "%s:%d: %s", r->name, line, what);
}

static int line_of(const reader *r)
{
    return (int)r->event.start_mark.line + 1;
}

/* The number of line breaks before a byte, plus one. */
static int line_at(const reader *r, size_t offset)
{
    int line = 1;
    for (size_t i = 0; i < offset && i < r->bytes; i++) line += r->text[i] == '\n';
    return line;
}

/* Is a line indented with a tab?  libyaml's own words for it do not say so. */
static bool tab_indents(const reader *r, size_t line)
{
    size_t i = 0;
    for (; i < r->bytes && line > 0; i++) line -= r->text[i] == '\n';
    while (i < r->bytes && r->text[i] == ' ') i++;
    return i < r->bytes && r->text[i] == '\t';
}

static sel_status fail_parser(const reader *r)
{
    const yaml_parser_t *p = &r->parser;
    if (p->error == YAML_MEMORY_ERROR) return sel_fail(SEL_ENOMEM, "out of memory: %s", r->name);
    if (p->error == YAML_READER_ERROR)
        return fail_at(r, line_at(r, p->problem_offset), "not plain text in UTF-8: %s (0x%02X)", p->problem,
                       (unsigned)p->problem_value);
    const int line = (int)p->problem_mark.line + 1;
    if (tab_indents(r, p->problem_mark.line)) return fail_at(r, line, "a tab cannot indent in YAML: use spaces");
    if (p->context) return fail_at(r, line, "not valid YAML: %s, %s", p->context, p->problem);
    return fail_at(r, line, "not valid YAML: %s", p->problem);
}

/* Refuses what a file of settings has no use for. */
static sel_status check_event(const reader *r)
{
    const yaml_event_t *e = &r->event;
    const yaml_char_t *anchor = NULL, *tag = NULL;
    switch (e->type) {
    case YAML_SCALAR_EVENT:
        anchor = e->data.scalar.anchor;
        tag = e->data.scalar.tag;
        if (strlen((const char *)e->data.scalar.value) != e->data.scalar.length)
            return fail_at(r, line_of(r), "a text may not contain a NUL byte");
        break;
    case YAML_SEQUENCE_START_EVENT:
        anchor = e->data.sequence_start.anchor;
        tag = e->data.sequence_start.tag;
        break;
    case YAML_MAPPING_START_EVENT:
        anchor = e->data.mapping_start.anchor;
        tag = e->data.mapping_start.tag;
        break;
    case YAML_ALIAS_EVENT:
        return fail_at(r, line_of(r), "aliases (*name) are not supported: write the value out");
    default:
        break;
    }
    if (anchor) return fail_at(r, line_of(r), "anchors (&name) are not supported");
    if (tag) return fail_at(r, line_of(r), "tags (!name) are not supported");
    return SEL_OK;
}

static sel_status next(reader *r)
{
    if (r->holds_event) yaml_event_delete(&r->event);
    r->holds_event = yaml_parser_parse(&r->parser, &r->event);
    return r->holds_event ? check_event(r) : fail_parser(r);
}

static sel_status add(reader *r, sel_yaml_kind kind, int key_line, const char *value)
{
    sel_yaml *y = r->out;
    if (y->n == r->capacity) {
        const size_t capacity = r->capacity ? 2 * r->capacity : 64;
        sel_yaml_entry *larger = realloc(y->entries, capacity * sizeof *larger);
        if (!larger) return sel_fail(SEL_ENOMEM, "out of memory: %s", r->name);
        y->entries = larger;
        r->capacity = capacity;
    }
    sel_yaml_entry *e = &y->entries[y->n++];
    *e = (sel_yaml_entry){.kind = kind, .key_line = key_line, .line = line_of(r)};
    e->key = strdup(r->path);
    if (value) e->value = strdup(value);
    if (!e->key || (value && !e->value)) return sel_fail(SEL_ENOMEM, "out of memory: %s", r->name);
    return SEL_OK;
}

/* Puts the key, the event's scalar, behind path[0 .. length). */
static sel_status append_key(reader *r, size_t length, size_t *longer)
{
    char shown[SEL_SHOWN_MAX];
    if (r->event.type != YAML_SCALAR_EVENT)
        return fail_at(r, line_of(r), "a key must be a word, not a list or a mapping");
    const char *key = (const char *)r->event.data.scalar.value;
    const size_t n = strlen(key);
    if (n == 0) return fail_at(r, line_of(r), "a key is missing before \":\"");
    if (length + 1 + n >= SEL_YAML_KEY_MAX)
        return fail_at(r, line_of(r), "the dotted key that ends in %s is longer than %d bytes",
                       sel_text_show(shown, key), SEL_YAML_KEY_MAX - 2);

    if (length > 0) r->path[length++] = '.';
    memcpy(r->path + length, key, n + 1);
    *longer = length + n;
    return SEL_OK;
}

/* A list is noted, its elements are passed over: the schema says what was expected instead. */
static sel_status skip_list(reader *r)
{
    for (int depth = 1; depth > 0;) {
        SEL_TRY(next(r));
        depth += r->event.type == YAML_SEQUENCE_START_EVENT;
        depth -= r->event.type == YAML_SEQUENCE_END_EVENT;
    }
    return SEL_OK;
}

/* The rest of a mapping whose start has been read, below the key path[0 .. length).
   The depth is bounded because every level makes the path longer. */
static sel_status read_mapping(reader *r, size_t length)
{
    for (;;) {
        SEL_TRY(next(r));
        if (r->event.type == YAML_MAPPING_END_EVENT) return SEL_OK;

        size_t longer = 0;
        SEL_TRY(append_key(r, length, &longer));
        const int key_line = line_of(r);

        SEL_TRY(next(r));
        if (r->event.type == YAML_SCALAR_EVENT) {
            const bool plain = r->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
            const char *value = (const char *)r->event.data.scalar.value;
            SEL_TRY(add(r, plain ? SEL_YAML_PLAIN : SEL_YAML_QUOTED, key_line, value));
        } else if (r->event.type == YAML_SEQUENCE_START_EVENT) {
            SEL_TRY(add(r, SEL_YAML_LIST, key_line, NULL));
            SEL_TRY(skip_list(r));
        } else {
            SEL_TRY(add(r, SEL_YAML_SECTION, key_line, NULL));
            SEL_TRY(read_mapping(r, longer));
        }
    }
}

static sel_status read_file(reader *r)
{
    SEL_TRY(next(r)); /* the stream's start */
    SEL_TRY(next(r));
    if (r->event.type == YAML_STREAM_END_EVENT) return SEL_OK;

    SEL_TRY(next(r)); /* the document's start came before */
    if (r->event.type == YAML_MAPPING_START_EVENT) {
        SEL_TRY(read_mapping(r, 0));
    } else {
        const bool empty = r->event.type == YAML_SCALAR_EVENT && r->event.data.scalar.length == 0 &&
                           r->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE; /* "---" alone */
        if (!empty)
            return fail_at(r, line_of(r), "expected keys and values, such as \"model:\" and below it \"  d: 4\"");
    }
    SEL_TRY(next(r)); /* the document's end */
    SEL_TRY(next(r));
    if (r->event.type != YAML_STREAM_END_EVENT) return fail_at(r, line_of(r), "a second document: one file is one run");
    return SEL_OK;
}

sel_status sel_yaml_parse(sel_yaml *y, const char *text, size_t bytes, const char *name)
{
    reader r = {.text = text, .bytes = bytes, .name = name, .out = y};
    *y = (sel_yaml){0};
    if (bytes >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0) { /* a byte order mark */
        r.text += 3;
        r.bytes -= 3;
    }
    if (!yaml_parser_initialize(&r.parser)) return sel_fail(SEL_ENOMEM, "out of memory: %s", name);
    yaml_parser_set_encoding(&r.parser, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&r.parser, (const unsigned char *)r.text, r.bytes);

    const sel_status rc = read_file(&r);
    if (r.holds_event) yaml_event_delete(&r.event);
    yaml_parser_delete(&r.parser);
    if (rc != SEL_OK) sel_yaml_free(y);
    return rc;
}

void sel_yaml_free(sel_yaml *y)
{
    for (size_t i = 0; i < y->n; i++) {
        free(y->entries[i].key);
        free(y->entries[i].value);
    }
    free(y->entries);
    *y = (sel_yaml){0};
}
