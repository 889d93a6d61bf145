/* options.c: option parsing over a table. */
#include "launcher/options.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "launcher/launcher.h"

enum { WORD = 64 };

/* Edits (insert, delete, change, swap neighbours) that turn a into b; words beyond WORD letters are never near. */
static int distance(const char *a, const char *b)
{
    const size_t n = strlen(a), m = strlen(b);
    int d[WORD + 1][WORD + 1];
    if (n > WORD || m > WORD) return WORD;
    for (size_t i = 0; i <= n; i++) d[i][0] = (int)i;
    for (size_t j = 0; j <= m; j++) d[0][j] = (int)j;
    for (size_t i = 1; i <= n; i++)
        for (size_t j = 1; j <= m; j++) {
            int best = d[i - 1][j - 1] + (a[i - 1] != b[j - 1]);
            if (d[i - 1][j] + 1 < best) best = d[i - 1][j] + 1;
            if (d[i][j - 1] + 1 < best) best = d[i][j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && d[i - 2][j - 2] + 1 < best)
                best = d[i - 2][j - 2] + 1;
            d[i][j] = best;
        }
    return d[n][m];
}

const char *sel_options_nearest(const char *word, const char *const *names, int n)
{
    const char *near = NULL;
    int least = (int)strlen(word) / 2 + 1;   /* more edits than half its letters is another word */
    for (int i = 0; i < n; i++) {
        const int d = distance(word, names[i]);
        if (d < least) {
            least = d;
            near = names[i];
        }
    }
    return near;
}

bool sel_options_speaks(void)
{
    static const char *const ranks[] = { "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK" };
    for (size_t i = 0; i < sizeof ranks / sizeof ranks[0]; i++) {
        const char *rank = getenv(ranks[i]);
        if (rank) return strcmp(rank, "0") == 0;
    }
    return true;
}

static void usage(const sel_command *c)
{
    if (!sel_options_speaks()) return;
    printf("usage: %s %s\n", c->command, c->arguments);
    if (c->about) printf("\n%s\n", c->about);
    if (c->n_options) printf("\n");
    for (int i = 0; i < c->n_options; i++) {
        const sel_option *o = &c->options[i];
        char left[WORD];
        snprintf(left, sizeof left, "--%s%s%s", o->name, o->word ? " " : "", o->word ? o->word : "");
        printf("  %-24s %s\n", left, o->help);
    }
}

/* In one write, so that nothing gets between. */
static int refuse(const char *command, const char *fmt, va_list args)
{
    char line[4096];
    const struct timespec moment = { .tv_nsec = 500000000 };

    if (!sel_options_speaks()) {
        nanosleep(&moment, NULL);   /* mpirun ends all when one has failed: the first rank shall have spoken by then */
        return SEL_EXIT_USER;
    }
    vsnprintf(line, sizeof line, fmt, args);
    fprintf(stderr, "%s: %s\n", command, line);
    return SEL_EXIT_USER;
}

int sel_options_refuse(const char *command, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    const int status = refuse(command, fmt, args);
    va_end(args);
    return status;
}

int sel_options_mistake(const sel_command *c, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    const int status = refuse(c->command, fmt, args);
    va_end(args);
    return status;
}

/* Reads text into the option; false, with a message, when it is not what the type wants. */
static bool store(const sel_command *c, const sel_option *o, const char *text)
{
    char *end;
    errno = 0;
    switch (o->type) {
    case SEL_OPT_FLAG:
        *(bool *)o->value = true;
        return true;
    case SEL_OPT_TEXT:
        *(const char **)o->value = text;
        return true;
    case SEL_OPT_INTEGER: {
        const long long n = strtoll(text, &end, 10);
        if (end != text && !*end && !errno && (double)n >= o->least) {
            *(int64_t *)o->value = n;
            return true;
        }
        sel_options_mistake(c, "--%s: expected an integer from %.0f, got \"%s\"", o->name, o->least, text);
        return false;
    }
    case SEL_OPT_NUMBER: {
        const double x = strtod(text, &end);
        if (end != text && !*end && isfinite(x) && x >= o->least) {
            *(double *)o->value = x;
            return true;
        }
        sel_options_mistake(c, "--%s: expected a number from %g, got \"%s\"", o->name, o->least, text);
        return false;
    }
    }
    return false;
}

static const sel_option *find(const sel_command *c, const char *name, size_t length)
{
    for (int i = 0; i < c->n_options; i++)
        if (strlen(c->options[i].name) == length && strncmp(c->options[i].name, name, length) == 0)
            return &c->options[i];
    return NULL;
}

static sel_parsed unknown(const sel_command *c, const char *argument)
{
    const char *names[WORD];
    char word[WORD];
    int n = 0;
    for (; n < c->n_options && n < WORD; n++) names[n] = c->options[n].name;
    snprintf(word, sizeof word, "%.*s", (int)strcspn(argument + 2, "="), argument + 2);
    const char *near = argument[1] == '-' ? sel_options_nearest(word, names, n) : NULL;
    sel_options_mistake(c, "%s: no such option%s%s%s", argument, near ? "; did you mean --" : "", near ? near : "",
                        near ? "?" : " (--help lists them)");
    return SEL_PARSED_WRONG;
}

sel_parsed sel_options_parse(const sel_command *c, int argc, char **argv, int *n_positional)
{
    bool options = true;
    *n_positional = 0;
    for (int i = 1; i < argc; i++) {
        char *const arg = argv[i];
        if (!options || arg[0] != '-' || !arg[1]) {   /* "-" alone is an argument: standard input */
            argv[1 + (*n_positional)++] = arg;
            continue;
        }
        if (strcmp(arg, "--") == 0) {
            options = false;
            continue;
        }
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            usage(c);
            return SEL_PARSED_HELP;
        }
        if (arg[1] != '-') return unknown(c, arg);
        const size_t length = strcspn(arg + 2, "=");
        const sel_option *o = find(c, arg + 2, length);
        const char *text = arg[2 + length] ? arg + 3 + length : NULL;
        if (!o) return unknown(c, arg);
        if (o->type == SEL_OPT_FLAG) {
            if (text) {
                sel_options_mistake(c, "--%s: takes no value", o->name);
                return SEL_PARSED_WRONG;
            }
        } else if (!text) {
            if (i + 1 == argc) {
                sel_options_mistake(c, "--%s: its value (%s) is missing", o->name, o->word);
                return SEL_PARSED_WRONG;
            }
            text = argv[++i];
        }
        if (!store(c, o, text)) return SEL_PARSED_WRONG;
    }
    return SEL_PARSED;
}

int sel_options_begin(const sel_command *c, int argc, char **argv, int least, int most, int *n_positional)
{
    switch (sel_options_parse(c, argc, argv, n_positional)) {
    case SEL_PARSED_HELP: return SEL_EXIT_DONE;
    case SEL_PARSED_WRONG: return SEL_EXIT_USER;
    case SEL_PARSED: break;
    }
    if (*n_positional < least)
        return sel_options_mistake(c, "too few arguments; usage: %s %s", c->command, c->arguments);
    if (most >= 0 && *n_positional > most) return sel_options_mistake(c, "unexpected argument \"%s\"", argv[1 + most]);
    return -1;
}

int sel_options_failed(const sel_command *c, sel_status rc)
{
    sel_options_mistake(c, "%s", sel_error());
    return sel_exit_status(rc);
}
