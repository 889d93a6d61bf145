/* cmd_launch.c: `selectra launch COMMAND...`: starts a job (mpirun, srun) and starts it again when it fails.
 *
 * A rank that is lost takes mpirun or srun with it, so whoever started that must start it anew; `train` then goes on
 * from its newest intact checkpoint.  This process does nothing else: it holds no state, and a job outlives it.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "core/base/clock.h"
#include "core/config/config.h"
#include "launcher/launcher.h"
#include "launcher/options.h"

extern char **environ;

enum { LONGEST_PAUSE = 60 };

/* What ends a job in good order, when it is sent to this process. */
static const int requests[] = { SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU };
enum { REQUESTS = sizeof requests / sizeof requests[0] };

typedef struct {
    char **command;
    int64_t restarts;
    char latest[SEL_PATH_MAX];   /* the run's link to its newest checkpoint; "": not known */
    sigset_t awaited;
    int requested;               /* so many requests to end have come */
} launch;

/* mpirun sees by TCP's keepalive alone that a host is gone, after 8 minutes if nobody tells it otherwise.  Here after
   16 to 18 s, a little later than the watchdog, which says more.  A user's own settings stay. */
static void set_keepalive(void)
{
    setenv("OMPI_MCA_oob_tcp_keepalive_time", "2", 0);
    setenv("OMPI_MCA_oob_tcp_keepalive_intvl", "4", 0);
    setenv("OMPI_MCA_oob_tcp_keepalive_probes", "4", 0);
}

/* "selectra train CONFIG key=value ..." in the command: its settings. */
static sel_status read_config(char **command, bool *found, sel_config *config)
{
    char *text = NULL;
    size_t bytes;
    int n = 0;

    *found = false;
    for (char **word = command; word[0] && word[1] && word[2]; word++) {
        const char *slash = strrchr(word[0], '/');
        if (strcmp(slash ? slash + 1 : word[0], "selectra") != 0 || strcmp(word[1], "train") != 0) continue;
        while (word[3 + n]) n++;
        SEL_TRY(sel_read_file(word[2], &text, &bytes));
        const sel_status rc = sel_config_parse(config, text, bytes, word[2], (const char *const *)(word + 3), n);
        free(text);
        *found = rc == SEL_OK;
        return rc;
    }
    return SEL_OK;
}

/* What the link to the newest checkpoint says: "step-00001000"; "" where there is none. */
static void newest(const launch *l, char out[64])
{
    const ssize_t n = l->latest[0] ? readlink(l->latest, out, 63) : -1;
    out[n > 0 ? n : 0] = '\0';
}

/* In a process group of its own: Ctrl-C comes to this process, which asks the job to save. */
static int start(const launch *l, pid_t *child)
{
    posix_spawnattr_t attributes;
    posix_spawn_file_actions_t files;
    sigset_t none;

    sigemptyset(&none);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK);
    posix_spawnattr_setpgroup(&attributes, 0);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    const int error = posix_spawnp(child, l->command[0], &files, &attributes, l->command, environ);
    posix_spawn_file_actions_destroy(&files);
    posix_spawnattr_destroy(&attributes);
    return error;
}

/* Waits so long for a signal; true: it was a request to end. */
static bool asked_to_end(launch *l, time_t seconds)
{
    const struct timespec limit = { .tv_sec = seconds };
    const int number = sigtimedwait(&l->awaited, NULL, &limit);

    if (number <= 0 || number == SIGCHLD) return false;
    l->requested++;
    return true;
}

/* The exit status of the job, as a shell has it.  The first request goes on as USR1, which mpirun and srun give to the
   ranks (at TERM they would end them); a further one as TERM. */
static int wait_for(launch *l, pid_t child)
{
    int status;

    for (;;) {
        const pid_t ended = waitpid(child, &status, WNOHANG);
        if (ended == child) break;
        if (ended < 0 && errno != EINTR) return SEL_EXIT_FAILURE;
        if (!asked_to_end(l, 60)) continue;
        fprintf(stderr, l->requested == 1 ? "selectra launch: asking the job to save and end\n"
                                          : "selectra launch: ending the job now\n");
        kill(child, l->requested == 1 ? SIGUSR1 : SIGTERM);
    }
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static const char *meaning(int status)
{
    if (status == SEL_EXIT_WATCHDOG) return " (by the watchdog)";
    if (status == 128 + SIGKILL) return " (killed)";
    return "";
}

static int run(launch *l)
{
    char before[64], now[64], lasted[32];
    time_t pause = 1;

    newest(l, before);
    for (int64_t restart = 0;; restart++) {
        const double begun = sel_now();
        pid_t child;
        const int error = start(l, &child);
        if (error) {
            fprintf(stderr, "selectra launch: %s: cannot be started: %s\n", l->command[0], strerror(error));
            return SEL_EXIT_USER;
        }
        const int status = wait_for(l, child);
        /* A mistake stays one; but what worked once is none, such as a run folder that a dying job still holds. */
        if (status == SEL_EXIT_DONE || status == SEL_EXIT_SAVED || (status == SEL_EXIT_USER && restart == 0))
            return status;
        sel_format_duration(lasted, sel_now() - begun);
        if (l->requested || restart == l->restarts) {
            fprintf(stderr, "selectra launch: the job ended with status %d%s after %s; %s\n", status, meaning(status),
                    lasted, l->requested ? "it was asked to end" : "it is not started again");
            return status;
        }
        newest(l, now);
        pause = strcmp(before, now) != 0 ? 1 : 2 * pause < LONGEST_PAUSE ? 2 * pause : LONGEST_PAUSE;
        memcpy(before, now, sizeof before);
        fprintf(stderr, "selectra launch: the job ended with status %d%s after %s; restart %lld of %lld%s%s\n", status,
                meaning(status), lasted, (long long)restart + 1, (long long)l->restarts, now[0] ? " from " : "", now);
        const double until = sel_now() + (double)pause;
        while (sel_now() < until)
            if (asked_to_end(l, 1)) return SEL_EXIT_SAVED;   /* nothing runs, and the last checkpoint is there */
    }
}

int sel_cmd_launch(int argc, char **argv)
{
    static sel_config config;
    launch l = { .restarts = -1 };
    const sel_option options[] = {
        { "restarts", SEL_OPT_INTEGER, &l.restarts, 0, "N", "how often at most; default: run.restarts of CONFIG" },
    };
    const sel_command c = {
        "selectra launch", "[--restarts N --] mpirun ... selectra train CONFIG [key=value ...]",
        "Starts a job, and starts it again when it fails (any status but 0, 2 and 85): `train` goes\n"
        "on from its newest intact checkpoint.  TERM, INT, HUP, USR1, USR2 or XCPU: the job saves\n"
        "and ends with status 85; a second signal ends it at once.",
        options, 1};
    int options_end = 1, n;
    bool found;

    /* The command has options of its own: without options before it, it needs no "--". */
    if (argc > 1 && argv[1][0] == '-')
        while (options_end < argc && strcmp(argv[options_end], "--") != 0) options_end++;
    const int status = sel_options_begin(&c, options_end, argv, 0, 0, &n);
    if (status >= 0) return status;
    l.command = argv + options_end + (options_end < argc && strcmp(argv[options_end], "--") == 0);
    if (!l.command[0]) return sel_options_mistake(&c, "the command is missing; usage: %s %s", c.command, c.arguments);

    const sel_status rc = read_config(l.command, &found, &config);
    if (rc != SEL_OK) return sel_options_failed(&c, rc);
    if (l.restarts < 0 && !found)
        return sel_options_mistake(&c, "no `selectra train CONFIG` in the command: how often? (--restarts N)");
    if (l.restarts < 0) l.restarts = config.run.restarts;
    if (found && config.run.dir[0] && sel_path_join(l.latest, config.run.dir, "checkpoints/latest") != SEL_OK)
        return sel_options_failed(&c, SEL_EUSER);

    set_keepalive();
    sigemptyset(&l.awaited);
    sigaddset(&l.awaited, SIGCHLD);
    for (int i = 0; i < REQUESTS; i++) sigaddset(&l.awaited, requests[i]);
    struct sigaction hangup;
    if (sigaction(SIGHUP, NULL, &hangup) == 0 && hangup.sa_handler == SIG_IGN)
        sigdelset(&l.awaited, SIGHUP);   /* nohup */
    sigprocmask(SIG_BLOCK, &l.awaited, NULL);
    return run(&l);
}
