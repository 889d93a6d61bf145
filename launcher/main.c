/* main.c: the program: finds the subcommand, in the manner of git. */
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include "launcher/launcher.h"
#include "launcher/options.h"

static const struct {
    const char *name, *help;
    int (*run)(int argc, char **argv);
} commands[] = {
    { "train", "train a model; under mpirun or srun, or alone; resumes by itself", sel_cmd_train },
    { "launch", "start a job, and again when it fails", sel_cmd_launch },
    { "eval", "loss, perplexity, token log-probabilities of a checkpoint", sel_cmd_eval },
    { "generate", "text from a checkpoint", sel_cmd_generate },
    { "inspect", "what a checkpoint holds", sel_cmd_inspect },
    { "tokenizer", "train, encode, decode (SentencePiece)", sel_cmd_tokenizer },
    { "data", "pack text into a corpus; look at it and at batches", sel_cmd_data },
    { "bench", "the kernels beside the machine's peak", sel_cmd_bench },
    { "version", "the program, its libraries, the processor", sel_cmd_version },
};
enum { COMMANDS = sizeof commands / sizeof commands[0] };

static void usage(FILE *to)
{
    if (!sel_options_speaks()) return;
    fprintf(to, "usage: selectra COMMAND [ARGUMENTS]\n\n");
    for (int i = 0; i < COMMANDS; i++) fprintf(to, "  %-10s %s\n", commands[i].name, commands[i].help);
    fprintf(to,
            "\n`selectra COMMAND --help` tells the rest.\n"
            "exit status: 0 done; 1 failure; 2 a mistake in what was asked;\n"
            "75 ended by the watchdog; 85 saved on request, to be continued\n");
}

/* What was printed must have arrived: a full disk behind a redirection is a failure. */
static int finish(const char *command, int status)
{
    const bool failed = fflush(stdout) != 0 || ferror(stdout);
    if (!failed || status != SEL_EXIT_DONE) return status;
    fprintf(stderr, "selectra %s: standard output cannot be written: %s\n", command, strerror(errno));
    return SEL_EXIT_FAILURE;
}

int main(int argc, char **argv)
{
    const char *names[COMMANDS];

    if (argc < 2) {
        usage(stderr);
        return SEL_EXIT_USER;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
        usage(stdout);
        return finish(argv[1], SEL_EXIT_DONE);
    }
    if (strcmp(argv[1], "--version") == 0) return finish(argv[1], sel_cmd_version(argc - 1, argv + 1));
    for (int i = 0; i < COMMANDS; i++) {
        if (strcmp(argv[1], commands[i].name) == 0) return finish(argv[1], commands[i].run(argc - 1, argv + 1));
        names[i] = commands[i].name;
    }
    const char *near = sel_options_nearest(argv[1], names, COMMANDS);
    return sel_options_refuse("selectra", "%s: no such command%s%s%s (selectra --help lists them)", argv[1],
                              near ? "; did you mean " : "", near ? near : "", near ? "?" : "");
}
