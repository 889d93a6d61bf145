/* watchdog.c: the thread that watches, and how it ends a job.
 *
 * What it prints goes straight to stderr: there is nobody left to return an error to.
 */
#include "dist/watchdog.h"

#include <mpi.h>
#include <execinfo.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/process.h"
#include "core/base/pulse.h"
#include "dist/beacon.h"
#include "dist/comm_mpi.h"
#include "dist/host.h"

enum { NAME = 64, FRAMES = 48, SIGNAL_STACK = 128 << 10 };
#define SILENCE_SECONDS 15.0 /* networks that heal and machines that swap take less */
#define ROUND_SECONDS 0.25
#define LAUNCHER_SECONDS 5.0 /* for the launcher to end a job that has lost a rank */
#define STACK_SIGNAL (SIGRTMIN + 7)

/* A rank's part of the window. */
typedef struct {
    sel_pulse pulse;
    _Atomic uint64_t beat;    /* rounds of its watchdog thread */
    _Atomic int closed;       /* it no longer needs to be watched */
    _Atomic int ending;       /* of the host's first rank: the job is being ended, all write their stacks */
} part;

/* Something that grows while all is well, and for how long it has not. */
typedef struct {
    uint64_t seen;
    double still;
} growth;

typedef struct {
    char name[NAME];
    int first, ranks; /* the world ranks on it */
} host;

/* What host 0 knows of another host; what another knows of host 0. */
typedef struct {
    sel_beacon_news news;
    double silent;
    bool heard, complained;
} remote;

struct sel_watchdog {
    sel_comm *c;
    sel_host_window *window;
    part **parts;           /* [host_size] */
    growth *marks, *beats;  /* [host_size] */
    host *hosts;            /* [hosts] */
    remote *remotes;        /* [hosts] */
    sel_beacon *beacon;     /* the first rank of a host, where there are several hosts */
    double limit, silence, round, since_send;
    double dead;            /* seconds since the neighbour's process was found gone; 0: it is there */
    pid_t launcher;
    pthread_t main, thread;
    void *signal_stack;     /* the main thread's, for the handler that takes its stack */
    stack_t before;         /* what it had for signals */
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    bool closing;           /* under the mutex */
};

/* ---- saying */

__attribute__((format(printf, 2, 3))) static void say(const sel_watchdog *w, const char *format, ...)
{
    char line[1024];
    va_list args;

    int n = snprintf(line, sizeof line, "[rank %d] watchdog: ", w->c->rank);
    va_start(args, format);
    n += vsnprintf(line + n, sizeof line - (size_t)n - 1, format, args);
    va_end(args);
    if (n > (int)sizeof line - 2) n = (int)sizeof line - 2;
    line[n++] = '\n';
    (void)!write(STDERR_FILENO, line, (size_t)n); /* in one piece; the stream's lock may be held by who is stuck */
}

static bool in_collective(const sel_pulse_view *p)
{
    return p->position % 2 == 1;
}

/* Of a sequence group. */
static bool in_exchange(const sel_pulse_view *p)
{
    return p->exchange[0] != '\0';
}

static void describe(char out[160], const sel_pulse_view *p)
{
    const uint64_t n = p->position / 2;

    if (in_exchange(p))
        snprintf(out, 160, "in %s of step %" PRId64 ", in its sequence group's exchange of %s", p->phase, p->step,
                 p->exchange);
    else if (in_collective(p))
        snprintf(out, 160, "in %s of step %" PRId64 ", waiting in its collective %" PRIu64 ", %s", p->phase, p->step,
                 n + 1, p->collective);
    else if (n > 0)
        snprintf(out, 160, "in %s of step %" PRId64 ", after its collective %" PRIu64 ", %s", p->phase, p->step, n,
                 p->collective);
    else
        snprintf(out, 160, "in %s of step %" PRId64 ", before any collective", p->phase, p->step);
}

static const host *host_of(const sel_watchdog *w, int rank)
{
    int h = 0;
    while (h + 1 < w->c->hosts && w->hosts[h + 1].first <= rank) h++;
    return &w->hosts[h];
}

static const char *host_ranks(char out[48], const host *h)
{
    if (h->ranks == 1) snprintf(out, 48, "rank %d", h->first);
    else snprintf(out, 48, "ranks %d to %d", h->first, h->first + h->ranks - 1);
    return out;
}

/* ---- stacks: the main thread is asked by a signal, this thread writes down what it left */

static void *frames[FRAMES];
static _Atomic int n_frames;

static void take_stack(int number)
{
    (void)number;
    atomic_store(&n_frames, backtrace(frames, FRAMES));
}

/* Every line with the rank before it.  Through a file in memory, since the formatting that needs none of the process's
   memory writes to files only. */
static void write_stack(const sel_watchdog *w)
{
    char text[16384], line[1100];
    const struct timespec millisecond = {.tv_nsec = 1000000};

    atomic_store(&n_frames, 0);
    if (pthread_kill(w->main, STACK_SIGNAL) != 0) return;
    for (int i = 0; i < 500 && !atomic_load(&n_frames); i++) nanosleep(&millisecond, NULL);
    const int n = atomic_load(&n_frames), fd = memfd_create("stack", MFD_CLOEXEC);
    if (n <= 2 || fd < 0) {
        say(w, "no stack: its main thread does not take signals");
        return;
    }
    backtrace_symbols_fd(frames + 2, n - 2, fd); /* without the handler and the system's call of it */
    const ssize_t bytes = pread(fd, text, sizeof text - 1, 0);
    close(fd);
    text[bytes > 0 ? bytes : 0] = '\0';
    for (char *at = text; *at;) {
        const size_t length = strcspn(at, "\n");
        const int m = snprintf(line, sizeof line, "[rank %d]     %.*s\n", w->c->rank, (int)length, at);
        (void)!write(STDERR_FILENO, line, (size_t)(m < (int)sizeof line ? m : (int)sizeof line - 1));
        at += length + (at[length] == '\n');
    }
}

/* ---- ending */

static void nap(double seconds)
{
    struct timespec t = {.tv_sec = (time_t)seconds, .tv_nsec = (long)(1e9 * (seconds - floor(seconds)))};
    while (nanosleep(&t, &t) != 0) continue;
}

/* True for the one rank of the host that is to do it. */
static bool claim(const sel_watchdog *w)
{
    int none = 0;
    return atomic_compare_exchange_strong(&w->parts[0]->ending, &none, 1);
}

/* The other ranks of the host see `ending` in their next round and write their stacks; another host hears it too. */
static _Noreturn void end(sel_watchdog *w)
{
    say(w, "ending the job with status %d; its last checkpoint remains", SEL_WATCHDOG_STATUS);
    write_stack(w);
    nap(4 * w->round);
    sel_comm_abort(SEL_WATCHDOG_STATUS);
}

/* Another rank of this host ends the job: this one says where it is, and does not wait for ever. */
static _Noreturn void follow(sel_watchdog *w)
{
    write_stack(w);
    nap(2 * LAUNCHER_SECONDS);
    _exit(SEL_WATCHDOG_STATUS);
}

/* Kills Open MPI's daemon of this host (mpirun, orted), if it still runs 6 s from now; to end ranks that do not take
   TERM takes it 2 to 3.  In a process and session of its own, since the daemon may end this one first.  Other launchers
   (slurmstepd) are left alone. */
static void doom_launcher(const sel_watchdog *w)
{
    char pid[24], script[] = "sleep 6; case $(cat /proc/$0/comm) in mpi*|orte*|prte*) kill -9 $0;; esac";
    char *const words[] = {(char[]){"sh"}, (char[]){"-c"}, script, pid, NULL};
    posix_spawnattr_t attributes;
    sigset_t none;
    pid_t child;

    snprintf(pid, sizeof pid, "%ld", (long)w->launcher);
    sigemptyset(&none);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK);
    posix_spawnattr_setsigmask(&attributes, &none);
    if (posix_spawn(&child, "/bin/sh", NULL, &attributes, words, environ) != 0) kill(w->launcher, SIGKILL);
    posix_spawnattr_destroy(&attributes);
}

/* A host is lost.  The launcher, if TCP's keepalive has told it, ends the job in good order.  If not, an abort may make
   Open MPI's daemons send to the lost one and wait for its answer, a quarter of an hour and more: then they are
   killed. */
static _Noreturn void end_alone(sel_watchdog *w)
{
    say(w, "the job ends; its last checkpoint remains");
    nap(LAUNCHER_SECONDS);
    say(w, "the launcher has not ended the job: ending it here, with status %d", SEL_WATCHDOG_STATUS);
    doom_launcher(w);
    sel_comm_abort(SEL_WATCHDOG_STATUS);
}

/* ---- watching */

static void grow(growth *g, uint64_t now, double seconds)
{
    g->still = now == g->seen ? g->still + seconds : 0.0;
    g->seen = now;
}

/* Whether a is further behind than b: in the order of collectives; before one rather than in it, since who is in it
   waits; likewise with the exchanges of sequence groups; then who stopped first, which the clock of a host tells to the
   microsecond. */
static bool is_behind(const sel_beacon_news *a, const sel_beacon_news *b)
{
    if (a->pulse.position != b->pulse.position) return a->pulse.position < b->pulse.position;
    if (in_exchange(&a->pulse) != in_exchange(&b->pulse)) return in_exchange(&b->pulse);
    if (a->host == b->host) return a->pulse.when < b->pulse.when;
    return a->stale_ms > b->stale_ms;
}

/* Of this host's ranks, the one that is furthest behind; rank -1 where all have closed. */
static sel_beacon_news find_behind(const sel_watchdog *w)
{
    sel_beacon_news worst = {.host = w->c->host_index, .rank = -1};

    for (int r = 0; r < w->c->host_size; r++) {
        sel_beacon_news n = {.host = w->c->host_index, .rank = w->c->rank - w->c->host_rank + r};
        if (atomic_load(&w->parts[r]->closed)) continue;
        sel_pulse_read(&w->parts[r]->pulse, &n.pulse);
        n.stale_ms = (int32_t)(1000.0 * w->marks[r].still);
        if (worst.rank < 0 || is_behind(&n, &worst)) worst = n;
    }
    return worst;
}

static char state_of(const sel_watchdog *w, int host_rank)
{
    return w->c->pids ? sel_process_state(w->c->pids[host_rank]) : '?';
}

/* A thread of this host that gives no sign of life, though its rank has not closed. */
static void check_beats(sel_watchdog *w, double seconds)
{
    for (int r = 0; r < w->c->host_size; r++) {
        part *p = w->parts[r];
        grow(&w->marks[r], atomic_load(&p->pulse.marks), seconds);
        grow(&w->beats[r], atomic_load(&p->beat), seconds);
        if (r == w->c->host_rank || atomic_load(&p->closed) || w->beats[r].still < w->silence || !claim(w)) continue;
        sel_pulse_view view;
        char where[160];
        sel_pulse_read(&p->pulse, &view);
        describe(where, &view);
        say(w, "rank %d has given no sign of life for %.0f s: %s; its process is %s",
            w->c->rank - w->c->host_rank + r, w->beats[r].still, where, sel_process_state_text(state_of(w, r)));
        end(w);
    }
}

/* The next rank of the host, and the launcher.  That a process has died is said at once. */
static void check_processes(sel_watchdog *w, double seconds)
{
    const int r = (w->c->host_rank + 1) % w->c->host_size;
    part *p = w->parts[r];

    if (w->c->size > 1 && getppid() != w->launcher && claim(w)) {
        say(w, "the process that started this rank (%ld) is gone", (long)w->launcher);
        end(w);
    }
    if (r == w->c->host_rank || !w->c->pids || atomic_load(&p->closed)) return;
    const char state = state_of(w, r);
    if (state && state != 'Z' && state != 'X') return;
    if (w->dead <= 0.0) {
        sel_pulse_view view;
        char where[160];
        sel_pulse_read(&p->pulse, &view);
        describe(where, &view);
        say(w, "rank %d (process %ld) has died: it was %s", w->c->rank - w->c->host_rank + r, (long)w->c->pids[r],
            where);
    }
    w->dead += seconds;
    if (w->dead > LAUNCHER_SECONDS && claim(w)) {
        say(w, "the launcher has not ended the job");
        end(w);
    }
}

/* Host 0: the rank of the job that is furthest behind. */
static sel_beacon_news behind_of_all(const sel_watchdog *w)
{
    sel_beacon_news worst = find_behind(w);

    for (int h = 1; h < w->c->hosts; h++) {
        const remote *o = &w->remotes[h];
        if (o->heard && o->news.rank >= 0 && (worst.rank < 0 || is_behind(&o->news, &worst))) worst = o->news;
    }
    return worst;
}

/* On its host: names it, with what its process does. */
static void name_stuck(const sel_watchdog *w, const sel_beacon_news *n)
{
    const host *const on = host_of(w, n->rank);
    char where[160], process[128] = "";

    describe(where, &n->pulse);
    if (n->host == w->c->host_index && w->c->pids) {
        const int r = n->rank - on->first;
        snprintf(process, sizeof process, "; its process (%ld) is %s", (long)w->c->pids[r],
                 sel_process_state_text(state_of(w, r)));
    }
    say(w, "rank %d on host %s has made no progress for %.0f s: %s%s", n->rank, on->name, n->stale_ms / 1000.0, where,
        process);
    if (in_collective(&n->pulse) || in_exchange(&n->pulse))
        say(w, "no rank is known to be behind it: the communication itself may be stuck");
}

/* Between hosts, by the first rank of each.  What this host knows is sent about ten times in the time that counts as
   silence. */
static void exchange(sel_watchdog *w, double seconds)
{
    const bool center = w->c->host_index == 0;
    bool met = false;
    sel_beacon_news n;

    for (int h = 0; h < w->c->hosts; h++) w->remotes[h].silent += seconds;
    while (sel_beacon_receive(w->beacon, &n)) {
        remote *o = &w->remotes[center ? n.host : 0];
        met |= !o->heard;
        o->news = n;
        o->silent = 0.0;
        o->heard = true;
    }
    w->since_send += seconds;
    /* A host that is heard for the first time is answered at once: only who has heard the first host knows when it is
       cut off from it. */
    if (w->since_send < w->silence / 10 && !(center && met)) return;
    w->since_send = 0.0;
    n = center ? behind_of_all(w) : find_behind(w);
    n.ending = atomic_load(&w->parts[0]->ending);
    n.host = w->c->host_index;
    for (int h = 1; center && h < w->c->hosts; h++)
        if (w->remotes[h].heard) sel_beacon_send(w->beacon, h, &n);
    if (!center) sel_beacon_send(w->beacon, 0, &n);
}

static void check_hosts(sel_watchdog *w)
{
    const bool center = w->c->host_index == 0;
    char ranks[48];

    for (int h = center ? 1 : 0; h < (center ? w->c->hosts : 1); h++) {
        remote *o = &w->remotes[h];
        if (o->silent < w->silence) continue;
        if (o->heard && o->news.rank >= 0 && claim(w)) {
            say(w, "host %s (%s) has not been heard for %.0f s: it is down or stopped, or %s is cut off from it",
                w->hosts[h].name, host_ranks(ranks, &w->hosts[h]), o->silent, w->hosts[w->c->host_index].name);
            end_alone(w);
        }
        if (!o->heard && center && !o->complained) {
            say(w, "host %s (%s) has not been heard by UDP: that it is lost would be noticed by the launcher alone",
                w->hosts[h].name, host_ranks(ranks, &w->hosts[h]));
            o->complained = true;
        }
    }
}

/* The first rank of a host; that of host 0 decides for the job. */
static void check_progress(sel_watchdog *w)
{
    if (w->c->host_index != 0) {
        const remote *o = &w->remotes[0];
        if (!o->heard || !o->news.ending || !claim(w)) return;
        /* Host 0 has said why.  What it cannot see is said here. */
        if (o->news.rank >= 0 && host_of(w, o->news.rank) == &w->hosts[w->c->host_index]) {
            sel_beacon_news n = find_behind(w);
            if (n.rank >= 0) name_stuck(w, &n);
        }
        follow(w);
    }
    const sel_beacon_news n = behind_of_all(w);
    if (n.rank < 0 || n.stale_ms < 1000.0 * w->limit || !claim(w)) return;
    name_stuck(w, &n);
    for (int h = 1; h < w->c->hosts; h++) {
        sel_beacon_news ending = n;
        ending.host = 0;
        ending.ending = 1;
        if (w->remotes[h].heard) sel_beacon_send(w->beacon, h, &ending);
    }
    end(w);
}

static void *watch(void *arg)
{
    sel_watchdog *w = arg;
    part *mine = w->parts[w->c->host_rank];
    double last = sel_now();

    for (;;) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += (long)(1e9 * w->round);
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_mutex_lock(&w->mutex);
        while (!w->closing && pthread_cond_timedwait(&w->wake, &w->mutex, &until) == 0) continue;
        const bool closing = w->closing;
        pthread_mutex_unlock(&w->mutex);
        if (closing) return NULL;

        const double now = sel_now(), seconds = fmin(now - last, 2.0 * w->round);
        last = now;
        atomic_fetch_add(&mine->beat, 1);
        if (atomic_load(&w->parts[0]->ending)) follow(w);
        check_beats(w, seconds);
        check_processes(w, seconds);
        if (w->c->host_rank != 0) continue;
        if (w->beacon) {
            exchange(w, seconds);
            check_hosts(w);
        }
        check_progress(w);
    }
}

/* ---- opening and closing */

/* [collective] Names and ranks of all hosts, on every rank. */
static void know_hosts(sel_watchdog *w)
{
    sel_comm *c = w->c;
    host mine = {.first = c->rank - c->host_rank, .ranks = c->host_size};
    MPI_Comm leaders;

    gethostname(mine.name, sizeof mine.name - 1);
    CK(c, MPI_Comm_split(c->world, c->host_rank == 0 ? 0 : MPI_UNDEFINED, c->rank, &leaders));
    if (c->host_rank == 0) {
        CK(c, MPI_Allgather(&mine, sizeof mine, MPI_BYTE, w->hosts, sizeof mine, MPI_BYTE, leaders));
        CK(c, MPI_Comm_free(&leaders));
    }
    CK(c, MPI_Bcast(w->hosts, c->hosts * (int)sizeof *w->hosts, MPI_BYTE, 0, c->host));
}

/* [collective] */
static sel_status open_beacon(sel_watchdog *w)
{
    sel_comm *c = w->c;
    sel_beacon_card card;
    sel_status rc = SEL_OK;

    if (c->hosts == 1) return SEL_OK;
    memset(&card, 0, sizeof card);
    if (c->rank == 0) rc = sel_beacon_center(&w->beacon, c->hosts, &card);
    SEL_TRY(sel_comm_agree(c, rc));
    sel_comm_bcast(c, &card, sizeof card, 0);
    if (c->host_rank == 0 && c->rank != 0) rc = sel_beacon_leaf(&w->beacon, &card);
    return sel_comm_agree(c, rc);
}

static sel_status make(sel_watchdog *w, double seconds)
{
    const size_t ranks = (size_t)w->c->host_size, hosts = (size_t)w->c->hosts;
    pthread_condattr_t attributes;

    w->limit = seconds;
    w->silence = fmin(seconds, SILENCE_SECONDS);
    w->round = fmin(ROUND_SECONDS, seconds / 10);
    w->since_send = w->silence;   /* the first round sends */
    w->launcher = getppid();
    w->main = pthread_self();
    pthread_mutex_init(&w->mutex, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&w->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    w->parts = calloc(ranks, sizeof *w->parts);
    w->marks = calloc(ranks, sizeof *w->marks);
    w->beats = calloc(ranks, sizeof *w->beats);
    w->hosts = calloc(hosts, sizeof *w->hosts);
    w->remotes = calloc(hosts, sizeof *w->remotes);
    w->signal_stack = malloc(SIGNAL_STACK);
    if (!w->parts || !w->marks || !w->beats || !w->hosts || !w->remotes || !w->signal_stack)
        return sel_fail(SEL_ENOMEM, "out of memory for the watchdog");
    return SEL_OK;
}

/* The handler has a stack of its own: generated code of oneDNN keeps data below the stack pointer.  The watchdog's
   thread takes no signals. */
static sel_status start_thread(sel_watchdog *w)
{
    const struct sigaction handler = {.sa_handler = take_stack, .sa_flags = SA_RESTART | SA_ONSTACK};
    const stack_t stack = {.ss_sp = w->signal_stack, .ss_size = SIGNAL_STACK};
    sigset_t all, before;

    (void)backtrace(frames, 1); /* loads what it needs now, not in the handler */
    if (sigaltstack(&stack, &w->before) != 0 || sigaction(STACK_SIGNAL, &handler, NULL) != 0)
        return sel_fail(SEL_EIO, "watchdog: no signal for stacks");
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int error = pthread_create(&w->thread, NULL, watch, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error ? sel_fail(SEL_EIO, "watchdog: no thread: %s", strerror(error)) : SEL_OK;
}

static void release(sel_watchdog **w)
{
    sel_beacon_close(&(*w)->beacon);
    sel_host_window_free(&(*w)->window);
    pthread_cond_destroy(&(*w)->wake);
    pthread_mutex_destroy(&(*w)->mutex);
    free((*w)->parts);
    free((*w)->marks);
    free((*w)->beats);
    free((*w)->hosts);
    free((*w)->remotes);
    free((*w)->signal_stack);
    free(*w);
    *w = NULL;
}

sel_status sel_watchdog_open(sel_watchdog **out, sel_comm *c, double seconds)
{
    *out = NULL;
    if (seconds <= 0.0) return SEL_OK;
    sel_watchdog *w = calloc(1, sizeof *w);
    SEL_TRY(sel_comm_agree(c, w ? SEL_OK : sel_fail(SEL_ENOMEM, "out of memory for the watchdog")));
    w->c = c;
    sel_status rc = sel_comm_agree(c, make(w, seconds));
    if (rc == SEL_OK && (rc = sel_host_window_new(&w->window, c, c, sizeof(part), "the watchdog")) != SEL_OK) {
        char why[512];
        snprintf(why, sizeof why, "%s", sel_error());
        sel_fail(rc, "%s; dist.watchdog_seconds: 0 does without", why);
    }
    if (rc == SEL_OK) {
        for (int r = 0; r < c->host_size; r++) w->parts[r] = sel_host_window_part(w->window, r);
        know_hosts(w);
        rc = open_beacon(w);
    }
    if (rc != SEL_OK) {
        release(&w);
        return rc;
    }
    sel_pulse_move(&w->parts[c->host_rank]->pulse);
    sel_comm_barrier(c); /* everyone's part is in use before anyone looks */
    if (start_thread(w) != SEL_OK) sel_comm_die(c, "sel_watchdog_open");
    *out = w;
    return SEL_OK;
}

void sel_watchdog_close(sel_watchdog **out)
{
    sel_watchdog *w = *out;

    if (!w) return;
    sel_comm_barrier(w->c); /* watched to here: whoever does not come is named */
    atomic_store(&w->parts[w->c->host_rank]->closed, 1);
    pthread_mutex_lock(&w->mutex);
    w->closing = true;
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->mutex);
    pthread_join(w->thread, NULL);
    signal(STACK_SIGNAL, SIG_IGN);
    sigaltstack(&w->before, NULL);
    sel_pulse_move(NULL);
    release(out);
}
