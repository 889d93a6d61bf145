/* config.c: from YAML text and overrides to a checked sel_config, and back. */
#include "core/config/config.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "core/config/schema.h"
#include "core/config/text.h"
#include "core/config/yaml.h"

#define PLACE_MAX (SEL_PATH_MAX + SEL_YAML_KEY_MAX + SEL_SHOWN_MAX)
#define MAX_TOKENS ((int64_t)1 << 62)

enum { FROM_DEFAULT = 0, FROM_COMMAND_LINE = INT32_MAX }; /* otherwise the line of the file */

typedef struct {
    sel_config *c;
    const char *name;       /* of the file, for messages */
    int from[SEL_KEYS_MAX]; /* where each key got its value */
} loader;

static sel_status fail_unknown(const char *place, const char *key, bool section)
{
    char hint[SEL_HINT_MAX];
    sel_key_hint(hint, key, section);
    return sel_fail(SEL_EUSER, "%s: %s", place, hint);
}

/* A value for what is a section: names a key of it. */
static sel_status fail_section_value(const char *place, const char *section)
{
    const size_t n = strlen(section);
    for (int i = 0; i < sel_n_keys; i++) {
        const char *key = sel_keys[i].key;
        if (strncmp(key, section, n) != 0 || key[n] != '.') continue;
        return sel_fail(SEL_EUSER, "%s: is a section: expected keys below it, such as %s", place, key);
    }
    return fail_unknown(place, section, true);
}

static sel_status set_defaults(sel_config *c)
{
    for (int i = 0; i < sel_n_keys; i++) {
        const sel_key *k = &sel_keys[i];
        const sel_yaml_kind kind = k->type == SEL_KEY_TEXT ? SEL_YAML_QUOTED : SEL_YAML_PLAIN;
        if (k->preset) SEL_TRY(sel_key_set(k, c, k->preset, kind, k->key));
    }
    return SEL_OK;
}

static sel_status take_section(const sel_yaml *y, size_t at, const char *name, const char *place)
{
    const sel_yaml_entry *e = &y->entries[at];
    if (!sel_key_is_section(e->key)) return fail_unknown(place, e->key, true);
    for (size_t i = 0; i < at; i++) {
        const sel_yaml_entry *before = &y->entries[i];
        if (before->kind == SEL_YAML_SECTION && strcmp(before->key, e->key) == 0)
            return sel_fail(SEL_EUSER, "%s: section appears twice, first at %s:%d", place, name, before->key_line);
    }
    return SEL_OK;
}

static sel_status take_entry(loader *l, const sel_yaml *y, size_t at)
{
    const sel_yaml_entry *e = &y->entries[at];
    char place[PLACE_MAX], shown[SEL_SHOWN_MAX];
    sel_text_show(shown, e->key);
    snprintf(place, sizeof place, "%s:%d: %s", l->name, e->key_line, shown);

    const int i = sel_key_find(e->key);
    if (i < 0) {
        if (e->kind == SEL_YAML_SECTION) return take_section(y, at, l->name, place);
        if (!sel_key_is_section(e->key)) return fail_unknown(place, e->key, false);
        /* "model:" with nothing but comments below it */
        const bool empty = e->kind == SEL_YAML_PLAIN && e->value[0] == '\0';
        return empty ? SEL_OK : fail_section_value(place, e->key);
    }
    if (l->from[i] != FROM_DEFAULT)
        return sel_fail(SEL_EUSER, "%s: key appears twice, first at %s:%d", place, l->name, l->from[i]);
    l->from[i] = e->key_line;
    snprintf(place, sizeof place, "%s:%d: %s", l->name, e->line, shown);
    return sel_key_set(&sel_keys[i], l->c, e->value, e->kind, place);
}

static sel_status take_file(loader *l, const char *text, size_t bytes)
{
    sel_yaml y;
    SEL_TRY(sel_yaml_parse(&y, text, bytes, l->name));
    sel_status rc = SEL_OK;
    for (size_t i = 0; i < y.n && rc == SEL_OK; i++) rc = take_entry(l, &y, i);
    sel_yaml_free(&y);
    return rc;
}

/* "key.path=value"; the last one of a key wins. */
static sel_status take_override(loader *l, const char *override)
{
    char place[PLACE_MAX], key[SEL_YAML_KEY_MAX], shown[SEL_SHOWN_MAX];
    snprintf(place, sizeof place, "command line: %s", sel_text_show(shown, override));

    const char *equals = strchr(override, '=');
    if (!equals || equals == override)
        return sel_fail(SEL_EUSER, "%s: expected key=value, such as train.steps=1000", place);
    if (!sel_text_is_utf8(override)) return sel_fail(SEL_EUSER, "%s: expected text in UTF-8", place);
    const size_t length = (size_t)(equals - override);
    if (length >= sizeof key) return sel_fail(SEL_EUSER, "%s: key longer than %zu bytes", place, sizeof key - 1);
    memcpy(key, override, length);
    key[length] = '\0';

    const int i = sel_key_find(key);
    if (i < 0) return sel_key_is_section(key) ? fail_section_value(place, key) : fail_unknown(place, key, false);
    l->from[i] = FROM_COMMAND_LINE;
    /* The shell has taken the quotes away: what is to be text is text. */
    const sel_yaml_kind kind = sel_keys[i].type == SEL_KEY_TEXT ? SEL_YAML_QUOTED : SEL_YAML_PLAIN;
    return sel_key_set(&sel_keys[i], l->c, equals + 1, kind, place);
}

/* A contradiction between two keys: points at the one that was set last. */
__attribute__((format(printf, 4, 5))) static sel_status fail_between(const loader *l, const char *a, const char *b,
                                                                     const char *fmt, ...)
{
    char what[256];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);

    const int from_a = l->from[sel_key_find(a)], from_b = l->from[sel_key_find(b)];
    const int from = from_a > from_b ? from_a : from_b;
    if (from == FROM_COMMAND_LINE) return sel_fail(SEL_EUSER, "command line: %s", what);
    if (from == FROM_DEFAULT) return sel_fail(SEL_EUSER, "%s: %s", l->name, what);
    return sel_fail(SEL_EUSER, "%s:%d: %s", l->name, from, what);
}

static void set_unless_given(int64_t *size, int64_t value)
{
    if (*size == 0) *size = value;
}

/* D = 64 d, L = H = d, Hkv = H, F_ff = floor(8 D / 3) where not given (spec, section 7). */
static sel_status resolve_sizes(const loader *l)
{
    sel_config *c = l->c;
    if (c->model.d > 0) {
        set_unless_given(&c->model.width, 64 * c->model.d);
        set_unless_given(&c->model.layers, c->model.d);
        set_unless_given(&c->model.heads, c->model.d);
    }
    const bool width = c->model.width > 0, layers = c->model.layers > 0, heads = c->model.heads > 0;
    if (!width && !layers && !heads)
        return sel_fail(
            SEL_EUSER, "%s: the model has no size: set model.d, or model.width, model.layers and model.heads", l->name);
    if (!width || !layers || !heads)
        return sel_fail(SEL_EUSER, "%s: missing:%s%s%s (or set model.d)", l->name, width ? "" : " model.width",
                        layers ? "" : " model.layers", heads ? "" : " model.heads");
    set_unless_given(&c->model.kv_heads, c->model.heads);
    set_unless_given(&c->model.ffn_width, 8 * c->model.width / 3);
    return SEL_OK;
}

/* What one row of the schema cannot see. */
static sel_status check_together(const loader *l)
{
    const sel_config *c = l->c;
    if (c->model.heads % c->model.kv_heads != 0)
        return fail_between(l, "model.heads", "model.kv_heads",
                            "model.heads (%lld) must be a multiple of model.kv_heads (%lld)", (long long)c->model.heads,
                            (long long)c->model.kv_heads);
    if (c->attention.memory_loss.epsilon > 0 && c->attention.kind != SEL_KIND_SELECTIVE)
        return fail_between(l, "attention.memory_loss.epsilon", "attention.kind",
                            "attention.memory_loss.epsilon (%g) needs attention.kind selective, not standard",
                            c->attention.memory_loss.epsilon);
    if (c->attention.selection.source == SEL_SOURCE_BILINEAR && c->attention.kind != SEL_KIND_SELECTIVE)
        return fail_between(l, "attention.selection.source", "attention.kind",
                            "attention.selection.source bilinear needs attention.kind selective, not standard");

    int64_t tokens;
    const bool too_many = __builtin_mul_overflow(c->train.steps, c->train.batch, &tokens) ||
                          __builtin_mul_overflow(tokens, c->model.context, &tokens) || tokens > MAX_TOKENS;
    if (too_many)
        return fail_between(l, "train.steps", "train.batch",
                            "train.steps (%lld) times train.batch (%lld) times model.context (%lld) is more than 2^62 "
                            "tokens",
                            (long long)c->train.steps, (long long)c->train.batch, (long long)c->model.context);
    return SEL_OK;
}

sel_status sel_config_parse(sel_config *c, const char *text, size_t bytes, const char *name,
                            const char *const *overrides, int n_overrides)
{
    memset(c, 0, sizeof *c);
    loader l = {.c = c, .name = name};
    SEL_TRY(set_defaults(c));
    SEL_TRY(take_file(&l, text, bytes));
    for (int i = 0; i < n_overrides; i++) SEL_TRY(take_override(&l, overrides[i]));
    SEL_TRY(resolve_sizes(&l));
    return check_together(&l);
}

/* Ends a memory stream; its text goes to the caller. */
static sel_status finish_text(FILE *out, char **buffer, char **text)
{
    const bool bad = ferror(out) != 0;
    if (fclose(out) != 0 || bad) {
        free(*buffer);
        return sel_fail(SEL_ENOMEM, "out of memory: text of the configuration");
    }
    *text = *buffer;
    return SEL_OK;
}

static sel_status open_text(FILE **out, char **buffer, size_t *bytes)
{
    *out = open_memstream(buffer, bytes);
    return *out ? SEL_OK : sel_fail(SEL_ENOMEM, "out of memory: text of the configuration");
}

/* The number of leading parts, each with its dot, that two keys share, in bytes. */
static size_t shared_sections(const char *a, const char *b)
{
    size_t shared = 0;
    for (size_t i = 0; a[i] && a[i] == b[i]; i++)
        if (a[i] == '.') shared = i + 1;
    return shared;
}

static void print_indent(FILE *out, int depth)
{
    fprintf(out, "%*s", 2 * depth, "");
}

sel_status sel_config_emit(const sel_config *c, char **text)
{
    char *buffer = NULL;
    size_t bytes;
    FILE *out;

    for (int i = 0; i < sel_n_keys; i++) {
        const sel_key *k = &sel_keys[i];
        if (k->type == SEL_KEY_TEXT && !sel_text_is_utf8((const char *)c + k->offset))
            return sel_fail(SEL_EUSER, "%s: expected text in UTF-8", k->key);
    }
    SEL_TRY(open_text(&out, &buffer, &bytes));

    const char *last = "";
    for (int i = 0; i < sel_n_keys; i++) {
        /* The sections that this key opens, then the key itself. */
        const char *key = sel_keys[i].key, *part = key;
        const size_t shared = shared_sections(last, key);
        int depth = 0;
        for (const char *dot; (dot = strchr(part, '.')); part = dot + 1, depth++) {
            if ((size_t)(dot - key) < shared) continue;
            print_indent(out, depth);
            fprintf(out, "%.*s:\n", (int)(dot - part), part);
        }
        print_indent(out, depth);
        fprintf(out, "%s: ", part);
        sel_key_print(out, &sel_keys[i], c);
        fputc('\n', out);
        last = key;
    }
    return finish_text(out, &buffer, text);
}

sel_status sel_config_help(char **text)
{
    static const char *const types[] = {
        [SEL_KEY_INT] = "integer", [SEL_KEY_NUMBER] = "number", [SEL_KEY_BOOL] = "true|false",
        [SEL_KEY_TEXT] = "text",   [SEL_KEY_CHOICE] = "choice", [SEL_KEY_WORD] = "choice",
    };
    char *buffer = NULL;
    size_t bytes;
    FILE *out;
    SEL_TRY(open_text(&out, &buffer, &bytes));
    for (int i = 0; i < sel_n_keys; i++) {
        const sel_key *k = &sel_keys[i];
        const char *preset = !k->preset ? k->follows : k->preset[0] ? k->preset : "\"\"";
        fprintf(out, "%-33s %-19s %-12s %s\n", k->key, k->choices ? k->choices : types[k->type], preset, k->help);
    }
    return finish_text(out, &buffer, text);
}

/* "key: old -> new" for each key, of the model or of all, that differs; freed by the caller. */
static sel_status list_differences(const sel_config *old, const sel_config *now, bool model, int *n, char **list)
{
    char *buffer = NULL;
    size_t bytes;
    FILE *out;
    SEL_TRY(open_text(&out, &buffer, &bytes));

    *n = 0;
    for (int i = 0; i < sel_n_keys; i++) {
        const sel_key *k = &sel_keys[i];
        if ((model && !k->model) || sel_key_equal(k, old, now)) continue;
        fprintf(out, "%s%s: ", (*n)++ ? ", " : "", k->key);
        sel_key_print(out, k, old);
        fputs(" -> ", out);
        sel_key_print(out, k, now);
    }
    return finish_text(out, &buffer, list);
}

sel_status sel_config_same_model(const sel_config *old, const sel_config *now)
{
    char *list = NULL;
    int n;
    SEL_TRY(list_differences(old, now, true, &n, &list));
    const sel_status rc = n ? sel_fail(SEL_EUSER, "the model is not the checkpoint's: %s", list) : SEL_OK;
    free(list);
    return rc;
}

sel_status sel_config_same(const sel_config *first, const sel_config *mine)
{
    char *list = NULL;
    int n;
    SEL_TRY(list_differences(first, mine, false, &n, &list));
    const sel_status rc = n ? sel_fail(SEL_EUSER, "the ranks were given different settings: %s", list) : SEL_OK;
    free(list);
    return rc;
}
