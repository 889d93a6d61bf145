/* launcher.h: the subcommands; each prints, and returns the program's exit status. */
#ifndef SEL_LAUNCHER_LAUNCHER_H
#define SEL_LAUNCHER_LAUNCHER_H

/* Exit statuses (spec, section 16). */
enum { SEL_EXIT_DONE = 0, SEL_EXIT_FAILURE = 1, SEL_EXIT_USER = 2, SEL_EXIT_WATCHDOG = 75, SEL_EXIT_SAVED = 85 };

#if defined(__clang__)
#define SEL_COMPILER "clang " __clang_version__
#else
#define SEL_COMPILER "gcc " __VERSION__
#endif

/* argv[0] is the subcommand's name. */
int sel_cmd_train(int argc, char **argv);
int sel_cmd_launch(int argc, char **argv);
int sel_cmd_eval(int argc, char **argv);
int sel_cmd_generate(int argc, char **argv);
int sel_cmd_inspect(int argc, char **argv);
int sel_cmd_tokenizer(int argc, char **argv);
int sel_cmd_data(int argc, char **argv);
int sel_cmd_bench(int argc, char **argv);
int sel_cmd_bench_mesh(int argc, char **argv);   /* argv[0]: "mesh" */
int sel_cmd_version(int argc, char **argv);

#endif
