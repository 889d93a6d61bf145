/* cmd_train.c: `selectra train CONFIG [key=value ...]`: reads the configuration, trains, shows progress. */
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "core/base/clock.h"
#include "core/config/config.h"
#include "core/train/train.h"
#include "launcher/launcher.h"
#include "launcher/options.h"
#include "sel_version.h"

/* Signals that ask the run to end are not handled on a stack that computes: they are blocked in every thread, and one
   that does nothing else waits for them.  Code that oneDNN 2.6 generates keeps data below the stack pointer, beyond
   what the ABI protects: the frame of a handler would overwrite it.  The handler is for threads that libraries made
   before main (OpenBLAS built on pthreads): they block nothing, and without it the signal would end the process. */
static sigset_t requests;
static _Atomic int signal_seen;

static void note_signal(int number)
{
    if (number == SIGINT && signal_seen == SIGINT) _exit(130);   /* a second Ctrl-C does not wait for the save */
    signal_seen = number;
}

static void *listen_for_requests(void *unused)
{
    int number;

    (void)unused;
    for (;;)
        if (sigwait(&requests, &number) == 0) note_signal(number);
    return NULL;
}

/* To any rank: finish the step, save, exit 85.  Before there is another thread of this program. */
static sel_status catch_signals(void)
{
    static const int numbers[] = { SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGHUP, SIGXCPU };
    struct sigaction a, before;
    pthread_t listener;

    memset(&a, 0, sizeof a);
    a.sa_handler = note_signal;
    a.sa_flags = SA_RESTART;
    sigemptyset(&requests);
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        const bool nohup = numbers[i] == SIGHUP && sigaction(SIGHUP, NULL, &before) == 0 &&
                           before.sa_handler == SIG_IGN;
        if (!nohup) sigaddset(&requests, numbers[i]);
    }
    pthread_sigmask(SIG_BLOCK, &requests, NULL);
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (sigismember(&requests, numbers[i]) == 1) sigaction(numbers[i], &a, NULL);
    signal(SIGPIPE, SIG_IGN);   /* a reader of our output that goes away must not end the run */
    const int error = pthread_create(&listener, NULL, listen_for_requests, NULL);
    return error ? sel_fail(SEL_EIO, "no thread to listen for signals: %s", strerror(error)) : SEL_OK;
}

typedef struct {
    bool terminal, open_line;   /* progress is rewritten in place; such a line stands there now */
} screen;

static void end_line(screen *s)
{
    if (s->open_line) putchar('\n');
    s->open_line = false;
}

static void show_start(void *ctx, const sel_train_start *s)
{
    char params[32], tokens[32];
    end_line(ctx);
    sel_format_count(params, (double)s->parameters);
    sel_format_count(tokens, (double)s->train_tokens);
    printf("selectra %s: %d rank%s on %d host%s, %d thread%s each; %s (%s), %s in %s, %s\n", SEL_VERSION, s->ranks,
           s->ranks == 1 ? "" : "s", s->hosts, s->hosts == 1 ? "" : "s", s->threads, s->threads == 1 ? "" : "s", s->cpu,
           s->level, s->linear, s->precision, s->mpi);
    printf("%s\n", s->binding);
    printf("%s parameters, %.0f MiB a rank; %s training tokens in %" PRId64 " windows; %" PRId64
           " sequences a %s in micro-batches of %" PRId64 "; matrix-product peak %.0f GFLOP/s a rank\n",
           params, (double)s->memory_bytes / 1048576.0, tokens, s->windows, s->local_batch,
           s->sequence > 1 ? "group" : "rank", s->micro_batch,
           s->peak_gflops);
    if (s->sequence > 1)
        printf("%d ranks share each sequence, %s; %d sequence groups\n", s->sequence,
               s->zigzag ? "an early and a late chunk each (zigzag)" : "one chunk each (contiguous)",
               s->ranks / s->sequence);
    if (s->resumed_from >= 0) printf("resuming from step %" PRId64 "\n", s->resumed_from);
    fflush(stdout);
}

static void show_progress(void *ctx, const sel_train_progress *p)
{
    screen *s = ctx;
    const sel_metrics *m = &p->row;
    char rate[32], eta[32];

    if (m->has_train) {
        sel_format_count(rate, m->tokens_per_second);
        sel_format_duration(eta, p->eta_seconds);
        if (s->terminal) printf("\r\033[K");
        printf("step %" PRId64 "/%" PRId64 "  loss %.4f", m->step, p->steps, m->loss);
        if (m->has_memory_loss) printf("  memory %.4f", m->memory_loss);
        if (m->live_keys) {
            double live = 0.0;
            for (int64_t l = 0; l < m->layers; l++) live += m->live_keys[l] / (double)m->layers;
            printf("  live %.0f%%", 100.0 * live);
        }
        printf("  norm %.2f  lr %.2e  %s tokens/s  %.0f%% of peak  eta %s", m->grad_norm, m->lr, rate, 100.0 * m->mfu,
               eta);
        s->open_line = s->terminal;
        if (!s->terminal) putchar('\n');
    }
    if (m->val_tokens) {
        end_line(s);
        printf("step %" PRId64 "/%" PRId64 "  validation loss %.4f  perplexity %.2f  (%" PRId64 " tokens)\n", m->step,
               p->steps, m->val_loss, exp(m->val_loss), m->val_tokens);
    }
    fflush(stdout);
}

static void show_message(void *ctx, const char *line)
{
    end_line(ctx);
    fflush(stdout);
    fprintf(stderr, "selectra train: %s\n", line);
}

static void show_profile(void *ctx, const sel_profile *p, int64_t steps, double peak_gflops)
{
    double total = 0.0;
    end_line(ctx);
    for (int i = 0; i < SEL_N_PARTS; i++) total += p->parts[i].seconds;
    printf("%" PRId64 " steps on rank 0, %.3f s each:\n", steps, total / (double)steps);
    for (int i = 0; i < SEL_N_PARTS; i++) {
        const sel_part_sum *const s = &p->parts[i];
        if (s->laps == 0) continue;
        printf("  %-14s %-15s %9.3f ms %5.1f%%", sel_part_name((sel_part)i), sel_part_pass((sel_part)i),
               1e3 * s->seconds / (double)steps, 100.0 * s->seconds / total);
        if (s->flops > 0.0)
            printf("  %7.1f GFLOP/s %5.1f%% of peak", 1e-9 * s->flops / s->seconds,
                   1e-7 * s->flops / s->seconds / peak_gflops);
        else if (s->bytes > 0.0) printf("  %7.1f GB/s", 1e-9 * s->bytes / s->seconds);
        putchar('\n');
    }
    fflush(stdout);
}

static void usage(void)
{
    char *keys = NULL;
    printf("usage: selectra train CONFIG [key=value ...] [--profile]\n\n"
           "Trains to train.steps under mpirun or srun, or alone.  When run.dir holds checkpoints it goes on from the\n"
           "newest intact one.  TERM, INT, HUP, USR1, USR2 or XCPU to any rank: the step is finished and saved, exit "
           "status\n"
           "85.  `selectra launch` starts it again after a failure.\n"
           "--profile: where rank 0's time went, by part, in a table at the end and in an event of metrics.jsonl.\n\n"
           "Keys of CONFIG (YAML), each also as key=value:\n\n");
    if (sel_config_help(&keys) == SEL_OK) fputs(keys, stdout);
    free(keys);
}

/* [collective] Rank 0 reads the file; all ranks parse the same bytes. */
static sel_status read_config(sel_comm *c, const char *path, const char *const *overrides, int n, sel_config *config)
{
    char *text = NULL;
    size_t bytes = 0;
    sel_status rc = sel_comm_rank(c) == 0 ? sel_read_file(path, &text, &bytes) : SEL_OK;

    SEL_TRY(sel_comm_agree(c, rc));
    sel_comm_bcast(c, &bytes, sizeof bytes, 0);
    if (!text && !(text = malloc(bytes + 1))) rc = sel_fail(SEL_ENOMEM, "%s: no memory to read it", path);
    rc = sel_comm_agree(c, rc);
    if (rc == SEL_OK) {
        sel_comm_bcast(c, text, bytes, 0);
        rc = sel_comm_agree(c, sel_config_parse(config, text, bytes, path, overrides, n));
    }
    free(text);
    return rc;
}

static char *join(int argc, char **argv)
{
    size_t bytes = sizeof "selectra";
    for (int i = 0; i < argc; i++) bytes += strlen(argv[i]) + 1;
    char *line = malloc(bytes);
    if (!line) return NULL;
    char *end = stpcpy(line, "selectra");
    for (int i = 0; i < argc; i++) end = stpcpy(stpcpy(end, " "), argv[i]);
    return line;
}

int sel_cmd_train(int argc, char **argv)
{
    /* mpirun gives its ranks a terminal for stdout even where it writes to a file itself; stderr tells */
    screen s = { .terminal = isatty(STDOUT_FILENO) && isatty(STDERR_FILENO) };
    const sel_train_watcher watcher = { .ctx = &s, .start = show_start, .progress = show_progress,
                                        .message = show_message, .profile = show_profile };
    sel_comm *c = NULL;
    sel_config config;
    sel_train_result result = { 0 };

    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            usage();
            return SEL_EXIT_DONE;
        }
    if (argc < 2)
        return sel_options_refuse("selectra train", "CONFIG is missing (usage: selectra train CONFIG [key=value ...])");
    /* Signals also while MPI starts. */
    if (catch_signals() != SEL_OK || sel_comm_open(&c, &argc, &argv) != SEL_OK) {
        fprintf(stderr, "selectra train: %s\n", sel_error());
        return SEL_EXIT_FAILURE;
    }

    char *const command = join(argc, argv);
    bool profile = false;
    int n = 1;
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--profile") == 0) profile = true;
        else argv[n++] = argv[i];
    argv[argc = n] = NULL;
    const sel_train_job job = { .config = &config, .comm = c, .watcher = &watcher, .profile = profile,
                                .signal = &signal_seen,
                                .command = command ? command : "", .program = "selectra " SEL_VERSION,
                                .commit = SEL_COMMIT, .compiler = SEL_COMPILER, .build = SEL_BUILD_TYPE };
    sel_status rc = argc > 1 ? read_config(c, argv[1], (const char *const *)argv + 2, argc - 2, &config)
                             : sel_fail(SEL_EUSER, "CONFIG is missing (usage: selectra train CONFIG [key=value ...])");
    if (rc == SEL_OK) rc = sel_train(&job, &result);

    const bool first = sel_comm_rank(c) == 0;
    int status = sel_exit_status(rc);
    if (first) {
        end_line(&s);
        fflush(stdout);
        if (rc != SEL_OK) {
            fprintf(stderr, "selectra train: %s\n", sel_error());
        } else if (result.signal) {
            printf("saved at step %" PRId64 " of %" PRId64
                   " on request (signal); the same command goes on from there\n",
                   result.step, config.train.steps);
        } else {
            printf("done: step %" PRId64 " of %" PRId64 ", all saved in %s\n", result.step, config.train.steps,
                   config.run.dir);
        }
    }
    if (rc == SEL_OK && result.signal) status = SEL_EXIT_SAVED;
    free(command);
    sel_comm_close(&c);
    return status;
}
