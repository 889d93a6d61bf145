/* fault.c: faults on purpose.  Called by the main thread only. */
#include "core/base/fault.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/base/pulse.h"

#define MAX_FAULTS 32
#define FORM "expected rank:phase:step:kind[,...]"

typedef struct {
    const char *phase, *kind;
    int64_t step;
    bool done;
} fault;

static const char *const phases[] = {"data",     "forward", "backward", "reduce",    "optimizer",
                                     "validate", "save",    "keys",     "sums",      "gradients", NULL};
static const char *const kinds[] = {"kill", "stop", "sleep", "term", "nan", "enospc", NULL};

static fault faults[MAX_FAULTS]; /* those of this rank */
static int n_faults;
static int64_t now = -1; /* the step of the phase that the rank is in */

/* The word of the list, or NULL. */
static const char *find_word(const char *const *words, const char *word)
{
    for (; *words; words++)
        if (strcmp(*words, word) == 0) return *words;
    return NULL;
}

static bool read_count(const char *text, int64_t *out)
{
    char *end;
    if (*text < '0' || *text > '9') return false; /* no sign, no space, not empty */
    errno = 0;
    const long long value = strtoll(text, &end, 10);
    *out = value;
    return errno == 0 && *end == '\0';
}

/* One "rank:phase:step:kind"; cuts the text up. */
static sel_status read_fault(char *text, int rank)
{
    char shown[128], *field[4];
    strncpy(shown, text, sizeof shown - 1);
    shown[sizeof shown - 1] = '\0';

    int n = 0;
    for (char *rest = text, *part; (part = strsep(&rest, ":"));) {
        if (n == 4) return sel_fail(SEL_EUSER, "SELECTRA_FAULT: %s: " FORM, shown);
        field[n++] = part;
    }
    if (n != 4) return sel_fail(SEL_EUSER, "SELECTRA_FAULT: %s: " FORM, shown);

    int64_t at_rank, step;
    const char *phase = find_word(phases, field[1]), *kind = find_word(kinds, field[3]);
    if (!read_count(field[0], &at_rank))
        return sel_fail(SEL_EUSER, "SELECTRA_FAULT: %s: rank: expected a number from 0, got \"%s\"", shown, field[0]);
    if (!phase)
        return sel_fail(SEL_EUSER,
                        "SELECTRA_FAULT: %s: phase: expected data, forward, backward, reduce, optimizer, validate, "
                        "save, keys, sums or gradients, got \"%s\"",
                        shown, field[1]);
    if (!read_count(field[2], &step))
        return sel_fail(SEL_EUSER, "SELECTRA_FAULT: %s: step: expected a number from 0, got \"%s\"", shown, field[2]);
    if (!kind)
        return sel_fail(SEL_EUSER,
                        "SELECTRA_FAULT: %s: kind: expected kill, stop, sleep, term, nan or enospc, got \"%s\"", shown,
                        field[3]);

    if (at_rank != rank) return SEL_OK;
    if (n_faults == MAX_FAULTS)
        return sel_fail(SEL_EUSER, "SELECTRA_FAULT: more than %d faults for a rank", MAX_FAULTS);
    faults[n_faults++] = (fault){.phase = phase, .kind = kind, .step = step};
    return SEL_OK;
}

sel_status sel_fault_init(int rank)
{
    n_faults = 0;
    now = -1;
    const char *setting = getenv("SELECTRA_FAULT");
    if (!setting || !*setting) return SEL_OK;

    char *copy = strdup(setting);
    if (!copy) return sel_fail(SEL_ENOMEM, "out of memory: SELECTRA_FAULT");

    sel_status rc = SEL_OK;
    for (char *rest = copy, *part; rc == SEL_OK && (part = strsep(&rest, ","));) rc = read_fault(part, rank);
    free(copy);
    return rc;
}

static void sleep_ms(int64_t ms)
{
    struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    while (nanosleep(&left, &left) != 0 && errno == EINTR) continue;
}

/* Whether one that the caller acts out itself is due. */
static bool act(const char *phase, int64_t step, const char *kind)
{
    bool due = false;

    for (int i = 0; i < n_faults; i++) {
        fault *f = &faults[i];
        if (f->done || f->step != step || strcmp(f->phase, phase) != 0) continue;

        const bool callers = strcmp(f->kind, "nan") == 0 || strcmp(f->kind, "enospc") == 0;
        if (callers && !(kind && strcmp(f->kind, kind) == 0)) continue; /* for another call at this place */
        /* Once in the life of a process; but a number that is not one comes again whenever its step is computed. */
        f->done = strcmp(f->kind, "nan") != 0;
        if (callers) due = true;
        if (strcmp(f->kind, "kill") == 0) kill(getpid(), SIGKILL);
        if (strcmp(f->kind, "stop") == 0) kill(getpid(), SIGSTOP);
        if (strcmp(f->kind, "term") == 0) {
            kill(getpid(), SIGTERM);
            sleep_ms(50); /* another thread takes it */
        }
        if (strcmp(f->kind, "sleep") == 0) sleep_ms(30000);
    }
    return due;
}

bool sel_fault(const char *phase, int64_t step, const char *kind)
{
    SEL_ASSERT(find_word(phases, phase));
    now = step;
    sel_pulse_phase(phase, step);
    return act(phase, step, kind);
}

void sel_fault_within(const char *phase)
{
    (void)act(phase, now, NULL);
}
