/* options.h: a subcommand's options, from one table: parsed, checked, explained. */
#ifndef SEL_LAUNCHER_OPTIONS_H
#define SEL_LAUNCHER_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>
#include "core/base/error.h"

typedef enum {
    SEL_OPT_FLAG,       /* --name            bool */
    SEL_OPT_INTEGER,    /* --name 12         int64_t, from `least` on */
    SEL_OPT_NUMBER,     /* --name 0.5        double, finite, from `least` on */
    SEL_OPT_TEXT        /* --name WORD       const char *, the argument itself */
} sel_option_type;

typedef struct {
    const char *name;        /* without the dashes */
    sel_option_type type;
    void *value;             /* holds the default before */
    double least;            /* smallest number allowed */
    const char *word;        /* what stands for the value in the usage; NULL for flags */
    const char *help;
} sel_option;

typedef struct {
    const char *command;     /* "selectra data pack", for messages */
    const char *arguments;   /* "--output DIR INPUT...", for the usage line */
    const char *about;       /* a sentence or more; may be NULL */
    const sel_option *options;
    int n_options;
} sel_command;

typedef enum { SEL_PARSED, SEL_PARSED_HELP, SEL_PARSED_WRONG } sel_parsed;

/* Reads argv[1 ..]: `--name value`, `--name=value`, `--` ends options.  The other arguments are moved, in order, to
   the front of argv from argv[1] on; *n_positional counts them.  --help and -h print the usage to stdout (HELP: exit
   with 0); a mistake is said in one line on stderr (WRONG: exit with 2). */
sel_parsed sel_options_parse(const sel_command *c, int argc, char **argv, int *n_positional);

/* Whether this process speaks for its job: before MPI starts the launcher's environment tells the rank, and a mistake
   that all ranks see is said by the first. */
bool sel_options_speaks(void);

/* One line on stderr, "COMMAND: ...", from the first rank; the others give it a moment.  Returns exit status 2.  For
   mistakes that all ranks find before MPI starts. */
__attribute__((format(printf, 2, 3)))
int sel_options_refuse(const char *command, const char *fmt, ...);

/* The same, of a command of this table. */
__attribute__((format(printf, 2, 3)))
int sel_options_mistake(const sel_command *c, const char *fmt, ...);

/* Parses, and counts the other arguments: at least `least`, at most `most` (-1: any number).  -1 to go on, else the
   exit status of a mistake, which has been said, or of --help. */
int sel_options_begin(const sel_command *c, int argc, char **argv, int least, int most, int *n_positional);

/* Says the line of a failure, as sel_options_mistake does; returns the exit status for it. */
int sel_options_failed(const sel_command *c, sel_status rc);

/* The name most like `word`, or NULL when none is near. */
const char *sel_options_nearest(const char *word, const char *const *names, int n);

#endif
