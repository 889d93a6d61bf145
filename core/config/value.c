/* value.c: from the words of a file to the fields of sel_config, and back. */
#include "core/config/schema.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/config/text.h"

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* A number as written: [+-] digits [. digits] [e [+-] digits]. */
typedef struct {
    bool negative, has_point, has_exponent;
    const char *whole, *fraction; /* the digits before and after the point */
    int64_t n_whole, n_fraction;  /* how many */
    int64_t exponent;             /* cut beyond +-10000, where no double is */
} number;

static int64_t count_digits(const char *s)
{
    int64_t n = 0;
    while (is_digit(s[n])) n++;
    return n;
}

static bool scan_number(const char *s, number *out)
{
    number n = {0};
    n.negative = *s == '-';
    if (*s == '-' || *s == '+') s++;
    n.whole = s;
    n.n_whole = count_digits(s);
    s += n.n_whole;
    n.has_point = *s == '.';
    if (n.has_point) {
        s++;
        n.fraction = s;
        n.n_fraction = count_digits(s);
        s += n.n_fraction;
    }
    if (n.n_whole + n.n_fraction == 0) return false;
    if (n.n_whole > 1 && n.whole[0] == '0') return false; /* 010 is octal to some */

    if (*s == 'e' || *s == 'E') {
        n.has_exponent = true;
        s++;
        const bool minus = *s == '-';
        if (*s == '-' || *s == '+') s++;
        if (!is_digit(*s)) return false;
        for (; is_digit(*s); s++)
            if (n.exponent < 10000) n.exponent = 10 * n.exponent + (*s - '0');
        if (minus) n.exponent = -n.exponent;
    }
    *out = n;
    return *s == '\0';
}

static bool push_digits(const char *digits, int64_t n, int64_t *value, int64_t *zeros)
{
    for (int64_t i = 0; i < n; i++) {
        if (digits[i] == '0') {
            ++*zeros;
            continue;
        }
        for (int64_t z = *value ? *zeros : 0; z >= 0; z--)
            if (__builtin_mul_overflow(*value, 10, value)) return false;
        if (__builtin_add_overflow(*value, digits[i] - '0', value)) return false;
        *zeros = 0;
    }
    return true;
}

/* An exact integer: "1000", "1e3", "1.5e3"; not "1000.0", not "1.5". */
static bool read_integer(const char *text, int64_t *out)
{
    number n;
    if (!scan_number(text, &n)) return false;
    if (n.has_point && !n.has_exponent) return false;

    /* value * 10^zeros so far: zeros at the end wait until a digit follows. */
    int64_t value = 0, zeros = 0;
    if (!push_digits(n.whole, n.n_whole, &value, &zeros)) return false;
    if (!push_digits(n.fraction, n.n_fraction, &value, &zeros)) return false;
    if (value != 0) {
        int64_t shift = zeros + n.exponent - n.n_fraction;
        if (shift < 0) return false; /* the last digit of value is not 0 */
        for (; shift > 0; shift--)
            if (__builtin_mul_overflow(value, 10, &value)) return false;
    }
    *out = n.negative ? -value : value;
    return true;
}

static bool read_double(const char *text, double *out)
{
    number n;
    if (!scan_number(text, &n)) return false;
    *out = strtod(text, NULL) + 0.0; /* -0 becomes 0 */
    return isfinite(*out);
}

static bool read_bool(const char *text, bool *out)
{
    static const char *const words[2][3] = {{"false", "False", "FALSE"}, {"true", "True", "TRUE"}};
    for (int value = 0; value < 2; value++)
        for (int i = 0; i < 3; i++)
            if (strcmp(text, words[value][i]) == 0) {
                *out = value == 1;
                return true;
            }
    return false;
}

/* The place of a word in "a|b|c", or -1. */
static int find_choice(const char *choices, const char *word)
{
    const size_t n = strlen(word);
    int place = 0;
    for (const char *p = choices; p && n > 0; place++) {
        if (strcspn(p, "|") == n && strncmp(p, word, n) == 0) return place;
        p = strchr(p, '|');
        if (p) p++;
    }
    return -1;
}

/* "one of a, b" or "a", from "a|b" or "a". */
static void list_choices(char *out, size_t bytes, const char *choices)
{
    size_t n = strchr(choices, '|') ? (size_t)snprintf(out, bytes, "one of ") : 0;
    for (const char *p = choices; *p && n + 3 < bytes; p++) {
        out[n++] = *p == '|' ? ',' : *p;
        if (*p == '|') out[n++] = ' ';
    }
    out[n] = '\0';
}

/* What the key wants: "an integer from 0 to 7". */
static void say_expected(char *out, size_t bytes, const sel_key *k)
{
    switch (k->type) {
    case SEL_KEY_INT:
        if (k->min == k->max)
            snprintf(out, bytes, "the integer %.0f", k->min);
        else
            snprintf(out, bytes, "%s%san integer from %.0f to %.0f", k->zero_word ? k->zero_word : "",
                     k->zero_word ? " or " : "", k->min, k->max);
        break;
    case SEL_KEY_NUMBER:
        snprintf(out, bytes, "a number from %g to %s%g", k->min, k->below_max ? "below " : "", k->max);
        break;
    case SEL_KEY_BOOL:
        snprintf(out, bytes, "%s", k->later ? k->preset : "true or false");
        break;
    case SEL_KEY_TEXT:
        snprintf(out, bytes, "text of at most %zu bytes", k->bytes - 1);
        break;
    case SEL_KEY_CHOICE:
    case SEL_KEY_WORD:
        list_choices(out, bytes, k->choices);
        break;
    }
}

static sel_status fail_value(const sel_key *k, const char *value, sel_yaml_kind kind, const char *where)
{
    char expected[128], shown[SEL_SHOWN_MAX];
    say_expected(expected, sizeof expected, k);
    if (kind == SEL_YAML_LIST && k->no_list) return sel_fail(SEL_EUSER, "%s: %s, got a list", where, k->no_list);
    if (kind == SEL_YAML_LIST) return sel_fail(SEL_EUSER, "%s: expected %s, got a list", where, expected);
    if (kind == SEL_YAML_SECTION) return sel_fail(SEL_EUSER, "%s: expected %s, got a section", where, expected);
    if (k->type == SEL_KEY_TEXT && strlen(value) >= k->bytes)
        return sel_fail(SEL_EUSER, "%s: expected %s, got %zu", where, expected, strlen(value));
    if (kind == SEL_YAML_PLAIN && value[0] == '\0')
        return sel_fail(SEL_EUSER, "%s: expected %s, got nothing", where, expected);
    const bool quotes_matter = kind == SEL_YAML_QUOTED && k->type <= SEL_KEY_BOOL;
    return sel_fail(SEL_EUSER, "%s: expected %s, got %s\"%s\"", where, expected,
                    quotes_matter ? "text in quotes: " : "", sel_text_show(shown, value));
}

static sel_status fail_later(const sel_key *k, const char *value, const char *where)
{
    char expected[128], shown[SEL_SHOWN_MAX];
    say_expected(expected, sizeof expected, k);
    return sel_fail(SEL_EUSER, "%s: %s is not in this version; expected %s", where, sel_text_show(shown, value),
                    expected);
}

static sel_status set_integer(const sel_key *k, void *field, const char *value, const char *where)
{
    int64_t i;
    if (k->zero_word && strcmp(value, k->zero_word) == 0)
        i = 0;
    else if (!read_integer(value, &i))
        return fail_value(k, value, SEL_YAML_PLAIN, where);
    const int64_t min = (int64_t)k->min, max = (int64_t)k->max; /* exact: up to 2^53 */
    if (i < min || i > max) return fail_value(k, value, SEL_YAML_PLAIN, where);
    if (field) memcpy(field, &i, sizeof i);
    return SEL_OK;
}

static sel_status set_number(const sel_key *k, void *field, const char *value, const char *where)
{
    double x;
    const bool ok = read_double(value, &x) && x >= k->min && (k->below_max ? x < k->max : x <= k->max);
    if (!ok) return fail_value(k, value, SEL_YAML_PLAIN, where);
    memcpy(field, &x, sizeof x);
    return SEL_OK;
}

static sel_status set_bool(const sel_key *k, void *field, const char *value, const char *where)
{
    bool b;
    if (!read_bool(value, &b)) return fail_value(k, value, SEL_YAML_PLAIN, where);
    if (k->later && strcmp(b ? "true" : "false", k->preset) != 0) return fail_later(k, value, where);
    if (field) memcpy(field, &b, sizeof b);
    return SEL_OK;
}

static sel_status set_text(const sel_key *k, void *field, const char *value, sel_yaml_kind kind, const char *where)
{
    const size_t n = strlen(value);
    if (n >= k->bytes) return fail_value(k, value, kind, where);
    memset(field, 0, k->bytes); /* equal settings are equal bytes */
    memcpy(field, value, n);
    return SEL_OK;
}

static sel_status set_choice(const sel_key *k, void *field, const char *value, sel_yaml_kind kind, const char *where)
{
    const int place = find_choice(k->choices, value);
    if (find_choice(k->later, value) >= 0) return fail_later(k, value, where);
    if (place < 0) return fail_value(k, value, kind, where);
    if (!field) return SEL_OK;
    if (k->type == SEL_KEY_WORD) return set_text(k, field, value, kind, where);
    memcpy(field, &place, sizeof place);
    return SEL_OK;
}

sel_status sel_key_set(const sel_key *k, sel_config *c, const char *value, sel_yaml_kind kind, const char *where)
{
    void *field = k->bytes ? (char *)c + k->offset : NULL;
    if (kind == SEL_YAML_LIST || kind == SEL_YAML_SECTION) return fail_value(k, value, kind, where);
    /* YAML's ways to write nothing; the empty text is written "". */
    const bool nothing = kind == SEL_YAML_PLAIN && (!*value || strcmp(value, "~") == 0 || strcmp(value, "null") == 0);
    if (nothing) return fail_value(k, "", kind, where);

    switch (k->type) {
    case SEL_KEY_TEXT:
        return set_text(k, field, value, kind, where);
    case SEL_KEY_CHOICE:
    case SEL_KEY_WORD:
        return set_choice(k, field, value, kind, where);
    default:
        break;
    }
    if (kind == SEL_YAML_QUOTED) return fail_value(k, value, kind, where); /* text is never a number */
    if (k->type == SEL_KEY_INT) return set_integer(k, field, value, where);
    if (k->type == SEL_KEY_NUMBER) return set_number(k, field, value, where);
    return set_bool(k, field, value, where);
}

/* The shortest decimal that reads back to the same double, with a point, without
   which some YAML readers take 1e-08 for text. */
static void print_double(FILE *out, double x)
{
    char text[40];
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, x);
        if (strtod(text, NULL) == x) break;
    }
    const size_t mantissa = strcspn(text, "e");
    const bool point = strchr(text, '.') != NULL;
    fprintf(out, "%.*s%s%s", (int)mantissa, text, point ? "" : ".0", text + mantissa);
}

void sel_key_print(FILE *out, const sel_key *k, const sel_config *c)
{
    const char *field = (const char *)c + k->offset;
    int64_t i = 0;
    double x = 0;
    bool b = false;
    int place = 0;

    if (k->bytes == 0) {
        /* `off` without quotes is a boolean to some YAML readers. */
        fprintf(out, strcmp(k->preset, "off") == 0 ? "\"%s\"" : "%s", k->preset);
        return;
    }
    switch (k->type) {
    case SEL_KEY_INT:
        memcpy(&i, field, sizeof i);
        fprintf(out, "%lld", (long long)i);
        break;
    case SEL_KEY_NUMBER:
        memcpy(&x, field, sizeof x);
        print_double(out, x);
        break;
    case SEL_KEY_BOOL:
        memcpy(&b, field, sizeof b);
        fputs(b ? "true" : "false", out);
        break;
    case SEL_KEY_TEXT:
        sel_text_quote(out, field);
        break;
    case SEL_KEY_WORD:
        fputs(field, out);
        break;
    case SEL_KEY_CHOICE: {
        memcpy(&place, field, sizeof place);
        const char *word = k->choices;
        for (; place > 0; place--) word = strchr(word, '|') + 1;
        fprintf(out, "%.*s", (int)strcspn(word, "|"), word);
        break;
    }
    }
}
