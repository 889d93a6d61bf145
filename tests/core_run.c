/* core_run.c: the run folder: lock, settings, metrics, provenance. */
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/run/run.h"
#include "tests/folder.h"

static const char config[] = "model:\n  d: 1\n# \"quoted\", caf\xc3\xa9\n";

/* What another process gets when it opens the run folder. */
static int open_elsewhere(const char *dir, const char *expected)
{
    const pid_t child = fork();
    if (child == 0) {
        sel_run *r;
        const sel_status rc = sel_run_open(&r, dir);
        _exit(rc == SEL_OK ? 0 : rc == SEL_EUSER && strstr(sel_error(), expected) ? 1 : 2);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void test_run_folder(void)
{
    const char *dir = in_folder("run/of/mine");
    char who[64], *text;
    size_t bytes;
    sel_run *r;

    CHECK_OK(sel_run_open(&r, dir));
    snprintf(who, sizeof who, "process %ld on host ", (long)getpid());
    CHECK(open_elsewhere(dir, who) == 1, "the lock of the first is not seen");
    sel_run_close(&r);
    CHECK(!r && open_elsewhere(dir, who) == 0, "the lock is still there");
    CHECK_OK(sel_run_open(&r, dir));
    CHECK_OK(sel_run_write_config(r, "a: 1\n"));
    CHECK_OK(sel_run_write_config(r, config));
    CHECK_OK(sel_read_file(in_folder("run/of/mine/config.yaml"), &text, &bytes));
    CHECK(strcmp(text, config) == 0, "%s", text);
    free(text);

    /* Rows as they are in the file. */
    CHECK_OK(sel_run_cut_metrics(r, 0)); /* nothing there yet */
    sel_metrics m = {.step = 1,
                     .tokens = 512,
                     .loss = 0.1,
                     .lr = 1e-5,
                     .grad_norm = 1.0 / 3,
                     .tokens_per_second = 1234.5,
                     .mfu = NAN,
                     .seconds = 2,
                     .has_train = true};
    CHECK_OK(sel_run_metrics(r, &m));
    m = (sel_metrics){.step = 2,
                      .tokens = 1024,
                      .loss = INFINITY,
                      .memory_loss = -0.0,
                      .has_memory_loss = true,
                      .has_train = true,
                      .lr = 5e20,
                      .grad_norm = 4.9e-324,
                      .tokens_per_second = 1,
                      .mfu = 0.5,
                      .seconds = 1e-3,
                      .val_loss = 3.25,
                      .val_tokens = 99};
    CHECK_OK(sel_run_metrics(r, &m));
    CHECK_OK(sel_run_metrics(r, &(sel_metrics){.step = 3, .tokens = 7, .val_loss = 2.5, .val_tokens = 1}));
    CHECK_OK(sel_run_metrics(r, &(sel_metrics){.step = 4, .event = "saved \"x\"\n"}));
    static const char rows[] =
        "{\"step\":1,\"loss\":0.1,\"lr\":1e-05,\"grad_norm\":0.3333333333333333,\"tokens\":512,\"tokens_per_second\":"
        "1234.5,"
        "\"mfu\":null,\"seconds\":2}\n"
        "{\"step\":2,\"loss\":null,\"memory_loss\":-0,\"lr\":5e+20,\"grad_norm\":5e-324,\"tokens\":1024,"
        "\"tokens_per_second\":1,\"mfu\":0.5,\"seconds\":0.001,\"val_loss\":3.25,\"val_tokens\":99}\n"
        "{\"step\":3,\"tokens\":7,\"val_loss\":2.5,\"val_tokens\":1}\n"
        "{\"step\":4,\"event\":\"saved \\\"x\\\"\\n\"}\n";
    const char *metrics = in_folder("run/of/mine/metrics.jsonl"), *cut = in_folder("run/of/mine/metrics.cut.jsonl");
    CHECK_OK(sel_read_file(metrics, &text, &bytes));
    CHECK(strcmp(text, rows) == 0, "%s", text);
    free(text);

    /* A job died within a row; the next one goes on from step 2. */
    const int fd = open(metrics, O_WRONLY | O_APPEND);
    CHECK(write(fd, "{\"step\":1,\"lo", 13) == 13 && close(fd) == 0, "write");
    CHECK_OK(sel_run_cut_metrics(r, 2));
    CHECK_OK(sel_run_metrics(r, &(sel_metrics){.step = 2, .event = "resumed"}));
    CHECK_OK(sel_read_file(metrics, &text, &bytes));
    const size_t two = (size_t)(strstr(rows, "{\"step\":3") - rows);
    CHECK(strncmp(text, rows, two) == 0 && strcmp(text + two, "{\"step\":2,\"event\":\"resumed\"}\n") == 0, "%s", text);
    free(text);
    CHECK_OK(sel_read_file(cut, &text, &bytes));
    CHECK(strncmp(text, rows + two, strlen(rows + two)) == 0 &&
              strcmp(text + strlen(rows + two), "{\"step\":1,\"lo\n") == 0,
          "%s", text);
    free(text);
    CHECK_OK(sel_run_cut_metrics(r, -1));
    CHECK_OK(sel_read_file(metrics, &text, &bytes));
    CHECK(bytes == 0, "%s", text);
    free(text);

    /* Provenance: an entry a start; a damaged file is kept aside. */
    const sel_provenance p = {.program = "selectra 1",
                              .commit = "abc",
                              .compiler = "gcc",
                              .build = "Debug",
                              .mpi = "MPI",
                              .linear = "onednn",
                              .cpu = "a \xff processor",
                              .cpu_level = "c",
                              .ranks = 2,
                              .threads = 3,
                              .hosts = 2,
                              .host_names = "h1,h2",
                              .command = "selectra train",
                              .resumed_from = -1,
                              .corpus_crc32 = 0xfeed,
                              .seed = UINT64_MAX};
    setenv("OMP_NUM_THREADS", "1", 1);
    setenv("SLURM_JWT", "hidden-credential", 1);
    setenv("OTHER_SETTING", "unrelated-value", 1);
    const char *path = in_folder("run/of/mine/provenance.json");
    CHECK_OK(sel_run_provenance(r, &p));
    CHECK_OK(sel_run_provenance(r, &p));
    CHECK_OK(sel_read_file(path, &text, &bytes));
    const char *first = strstr(text, "\"time\"");
    CHECK(text[0] == '[' && first && strstr(first + 1, "\"time\"") &&
              !strstr(strstr(first + 1, "\"time\"") + 1, "\"time\""),
          "%s", text);
    CHECK(strstr(text, "\"OMP_NUM_THREADS\": \"1\"") && strstr(text, "\"0000feed\"") &&
              strstr(text, "18446744073709551615"),
          "%s", text);
    CHECK(!strstr(text, "hidden-credential") && !strstr(text, "unrelated-value"), "%s", text);
    put(path, text, bytes / 2);
    free(text);
    CHECK_OK(sel_run_provenance(r, &p));
    CHECK(sel_path_exists(in_folder("run/of/mine/provenance.json.damaged")), "the damaged one is gone");
    CHECK_OK(sel_read_file(path, &text, &bytes));
    first = strstr(text, "\"time\"");
    CHECK(first && !strstr(first + 1, "\"time\""), "%s", text);
    free(text);
    sel_run_close(&r);
}

int main(void)
{
    make_folder();
    test_run_folder();
    CHECK_OK(sel_remove_tree(folder));
    return check_verdict();
}
