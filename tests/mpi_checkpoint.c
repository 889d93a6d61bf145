/* mpi_checkpoint.c: checkpoints saved and loaded at 1 to 4 ranks.
 *
 * The system calls that make a save durable are counted by functions of the same names below.  So a save can be made
 * to fail, or its process to die, at each of them in turn.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>

#include "core/base/fault.h"
#include "core/base/rng.h"
#include "core/checkpoint/checkpoint.h"
#include "core/checkpoint/safetensors.h"
#include "dist/comm.h"
#include "tests/check.h"

/* ---- The calls that can be made to go wrong ---- */

static enum { NOTHING, FAIL, DIE } mishap;
static int calls_left; /* the call at which it happens, counted down */
static int reason;
static bool happened;

static bool goes_wrong(bool can_fail)
{
    if (mishap == NOTHING || (mishap == FAIL && !can_fail) || --calls_left != 0) return false;
    happened = true;
    if (mishap == DIE) kill(getpid(), SIGKILL);
    errno = reason;
    return true;
}

/* Nothing here cuts the power, so what is told to the disk need not be waited for. */
int fsync(int fd)
{
    return goes_wrong(true) || fcntl(fd, F_GETFD) < 0 ? -1 : 0;
}

int ftruncate(int fd, off_t n)
{
    return goes_wrong(true) ? -1 : (int)syscall(SYS_ftruncate, fd, n);
}

int fallocate(int fd, int mode, off_t at, off_t n)
{
    return goes_wrong(true) ? -1 : (int)syscall(SYS_fallocate, fd, mode, at, n);
}

ssize_t pwrite(int fd, const void *p, size_t n, off_t at)
{
    return goes_wrong(true) ? -1 : syscall(SYS_pwrite64, fd, p, n, at);
}

int symlink(const char *to, const char *path)
{
    return goes_wrong(true) ? -1 : (int)syscall(SYS_symlinkat, to, AT_FDCWD, path);
}

int mkdir(const char *path, mode_t mode)
{
    const bool there = faccessat(AT_FDCWD, path, F_OK, 0) == 0; /* then nobody minds what mkdir says */
    return !there && goes_wrong(true) ? -1 : (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}

int rename(const char *from, const char *to)
{
    return goes_wrong(true) ? -1 : (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

static bool no_exchange; /* as on NFS */

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags)
{
    if (goes_wrong(true)) return -1;
    if (no_exchange && flags) {
        errno = EINVAL;
        return -1;
    }
    return (int)syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
}

int remove(const char *path)
{
    if (goes_wrong(false)) return -1;
    if (syscall(SYS_unlinkat, AT_FDCWD, path, 0) == 0) return 0;
    return (int)syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR);
}

/* ---- A small model, and its states ---- */

static sel_comm *comm;
static int rank, size;
static char root[256]; /* of all folders of this test */

static sel_tensor tensors[] = {
    {.name = "tok_embed.weight", .rank = 2, .shape = {5, 3}},
    {.name = "layers.0.attn_norm.weight", .rank = 1, .shape = {7, 1}},
    {.name = "layers.0.empty.weight", .rank = 2, .shape = {0, 4}},
    {.name = "layers.0.ffn.gate_proj.weight", .rank = 2, .shape = {33, 17}},
    {.name = "layers.0.ffn.up_proj.weight", .rank = 2, .shape = {1, 1}},
    {.name = "final_norm.weight", .rank = 1, .shape = {1, 1}},
};
static sel_layout layout = {.n_tensors = sizeof tensors / sizeof *tensors, .tensors = tensors};

enum { TOTAL = 1024 };
typedef struct {
    float array[3][TOTAL]; /* params, exp_avg, exp_avg_sq */
} state;

static void place_tensors(void)
{
    for (int i = 0; i < layout.n_tensors; i++) {
        sel_tensor *t = &layout.tensors[i];
        t->count = t->shape[0] * t->shape[1];
        t->offset = layout.total;
        layout.total += (t->count + 15) / 16 * 16;
        layout.parameters += t->count;
    }
    CHECK(layout.total <= TOTAL, "the model is too large for the test");
}

/* Every bit pattern must survive, those of NaN too; gaps are not part of a state. */
static void make_state(state *s, int64_t step, int variant)
{
    static const uint32_t special[] = {0x80000000u, 0x7f800000u, 0x7fc01234u, 0xff812345u, 1u, 0x807fffffu};

    memset(s, 0, sizeof *s);
    for (uint64_t a = 0; a < 3; a++) {
        for (int i = 0; i < layout.n_tensors; i++) {
            const sel_tensor *t = &layout.tensors[i];
            for (int64_t k = 0; k < t->count; k++) {
                uint32_t bits[4];
                sel_philox(bits, (uint64_t)step, a + 3 * (uint64_t)variant, (uint64_t)(t->offset + k));
                if (k < 6) bits[0] = special[k];
                memcpy(&s->array[a][t->offset + k], bits, 4);
            }
        }
    }
}

static const char config[] = "model:\n  d: 1\n# \"quoted\", caf\xc3\xa9\n";
static const char tokenizer[] = "not really\0a model";

static sel_status save_variant(const char *dir, int64_t step, int64_t keep, int variant)
{
    static const int64_t skipped[] = {3, 70000000000, 70000000001};
    state s;
    const sel_checkpoint_info info = {.step = step,
                                      .tokens = step * 1000,
                                      .config = config,
                                      .corpus_crc32 = 0xabcdef01,
                                      .tokenizer = tokenizer,
                                      .tokenizer_bytes = sizeof tokenizer,
                                      .tokenizer_crc32 = 0x1234,
                                      .skipped = skipped,
                                      .n_skipped = 3};

    make_state(&s, step, variant);
    return sel_checkpoint_save(comm, dir, &layout, &info, s.array[0], s.array[1], s.array[2], keep);
}

static sel_status save(const char *dir, int64_t step, int64_t keep)
{
    return save_variant(dir, step, keep, 0);
}

static char warnings[16384];
static int n_warnings;

static void on_warning(void *ctx, const char *line)
{
    (void)ctx;
    n_warnings++;
    strncat(warnings, line, sizeof warnings - strlen(warnings) - 2);
    strcat(warnings, "\n");
}

static sel_status find(sel_manifest *m, const char *path)
{
    n_warnings = 0;
    warnings[0] = '\0';
    return sel_checkpoint_find(m, path, on_warning, NULL);
}

/* Whether what is found at PATH is of one of two steps, and loads as it was saved. */
static int64_t found_step(const char *path, int variant)
{
    sel_manifest m;
    state want, got;

    if (find(&m, path) != SEL_OK) return -1;
    const int64_t step = m.step;
    CHECK(m.tokens == step * 1000 && strcmp(m.config, config) == 0, "manifest of step %" PRId64, step);
    CHECK(m.n_skipped == 3 && m.skipped[0] == 3 && m.skipped[1] == 70000000000 && m.skipped[2] == 70000000001,
          "%d skipped steps", m.n_skipped);
    CHECK(m.corpus_crc32 == 0xabcdef01 && m.tokenizer_crc32 == 0x1234, "hashes of step %" PRId64, step);
    memset(&got, 0, sizeof got);
    CHECK_OK(sel_checkpoint_load(&m, &layout, got.array[0], got.array[1], got.array[2]));
    make_state(&want, step, variant);
    const bool same = memcmp(&want, &got, sizeof got) == 0;
    if (!same && variant == 1) { /* the caller does not mind which one */
        make_state(&want, step, 0);
        CHECK(memcmp(&want, &got, sizeof got) == 0, "step %" PRId64 " is neither the old nor the new one", step);
    } else {
        CHECK(same, "step %" PRId64 " loads other numbers", step);
    }
    sel_manifest_free(&m);
    return step;
}

/* ---- Files of the test ---- */

/* "DIR/NAME".  Each path is kept once, to the end of the test. */
static const char *path_of(const char *dir, const char *name)
{
    static char paths[256][1024];
    static int n;
    char path[1024];

    snprintf(path, sizeof path, "%.500s/%.500s", dir, name);
    for (int i = 0; i < n; i++)
        if (strcmp(paths[i], path) == 0) return paths[i];
    if (n == 256) abort();
    return strcpy(paths[n++], path);
}

static const char *step_file(const char *dir, int step, const char *name)
{
    char relative[512];

    snprintf(relative, sizeof relative, "step-%08d/%s", step, name);
    return path_of(dir, relative);
}

/* A fresh folder, known to all ranks. */
static const char *fresh(const char *name)
{
    const char *dir = path_of(root, name);

    if (rank == 0) CHECK_OK(sel_remove_tree(dir));
    sel_comm_barrier(comm);
    return dir;
}

static bool has_temporary(const char *dir)
{
    bool has = false;
    const struct dirent *entry;
    DIR *d = opendir(dir);

    while (d && (entry = readdir(d))) has |= strncmp(entry->d_name, ".tmp", 4) == 0;
    if (d) closedir(d);
    return has;
}

static bool has_step(const char *dir, int step)
{
    return sel_path_exists(step_file(dir, step, "manifest.json"));
}

static void put(const char *path, const char *data, size_t bytes)
{
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, bytes, f) == bytes && fclose(f) == 0, "%s", path);
}

static void flip(const char *path, int64_t byte, int bit)
{
    char *data;
    size_t bytes;

    CHECK_OK(sel_read_file(path, &data, &bytes));
    data[byte < 0 ? (int64_t)bytes + byte : byte] ^= (char)(1 << bit);
    put(path, data, bytes);
    free(data);
}

/* ---- Tests; the first ones are of all ranks ---- */

static void check_data(const char *path, float *const *arrays, const char *const *prefixes, int n)
{
    sel_st_index ix;
    char *file, name[128];
    size_t bytes;

    CHECK_OK(sel_read_file(path, &file, &bytes));
    CHECK_OK(sel_st_read(&ix, path));
    CHECK(ix.n == n * layout.n_tensors && ix.header_bytes % 64 == 0, "%d tensors, header %" PRId64, ix.n,
          ix.header_bytes);
    CHECK(ix.data_bytes == 4 * n * layout.parameters, "%" PRId64 " bytes of data", ix.data_bytes);
    for (int i = 0; i < ix.n; i++) {
        const sel_tensor *t = &layout.tensors[i % layout.n_tensors];
        const sel_st_entry *e = &ix.entries[i];
        snprintf(name, sizeof name, "%s%s", prefixes[i / layout.n_tensors], t->name);
        CHECK(t->count == 0 || strcmp(e->name, name) == 0, "tensor %d is %s, should be %s", i, e->name, name);
        if (t->count == 0) continue;
        CHECK(e->end - e->begin == 4 * t->count && e->rank == t->rank, "tensor %s", name);
        CHECK(memcmp(file + ix.header_bytes + e->begin, arrays[i / layout.n_tensors] + t->offset,
                     (size_t)t->count * 4) == 0,
              "bytes of %s", name);
    }
    sel_st_free(&ix);
    free(file);
}

static void test_round_trip(void)
{
    const char *run = fresh("round"), *dir = path_of(run, "checkpoints");
    static const char *const model[] = {""}, *const optimizer[] = {"exp_avg.", "exp_avg_sq."};

    CHECK_OK(save(dir, 0, 0));
    CHECK_OK(save(dir, 10, 0));
    CHECK(found_step(run, 0) == 10 && n_warnings == 0, "%s", sel_error());
    CHECK(found_step(dir, 0) == 10, "%s", sel_error());
    CHECK(found_step(path_of(dir, "latest"), 0) == 10, "%s", sel_error());
    CHECK(found_step(path_of(dir, "step-00000000/"), 0) == 0, "%s", sel_error());
    sel_comm_barrier(comm);
    if (rank != 0) return;

    state s;
    char *manifest, link[64] = "", want[64];
    size_t bytes;
    make_state(&s, 10, 0);
    check_data(step_file(dir, 10, "model.safetensors"), (float *[]){s.array[0]}, model, 1);
    check_data(step_file(dir, 10, "optimizer.safetensors"), (float *[]){s.array[1], s.array[2]}, optimizer, 2);
    CHECK(readlink(path_of(dir, "latest"), link, sizeof link - 1) == 13 && !strcmp(link, "step-00000010"), "latest: %s",
          link);
    CHECK(!has_temporary(dir), "something temporary is left");
    CHECK_OK(sel_read_file(step_file(dir, 10, "manifest.json"), &manifest, &bytes));
    static const char *const names[] = {"model.safetensors", "optimizer.safetensors", "tokenizer.model"};
    for (int i = 0; i < 3; i++) {
        uint32_t crc;
        int64_t n;
        CHECK_OK(sel_file_crc32(step_file(dir, 10, names[i]), &crc, &n));
        snprintf(want, sizeof want, "\"%08" PRIx32 "\"", crc);
        CHECK(strstr(manifest, want) && strstr(manifest, names[i]), "%s not in %s", want, manifest);
    }
    free(manifest);

    /* Another model: what differs is named. */
    sel_manifest m;
    sel_layout other = layout;
    sel_tensor changed[sizeof tensors / sizeof *tensors];
    CHECK_OK(find(&m, run));
    memcpy(changed, tensors, sizeof tensors);
    other.tensors = changed;
    changed[3].shape[0] = 17;
    changed[3].shape[1] = 33;
    CHECK(sel_checkpoint_load(&m, &other, s.array[0], NULL, NULL) == SEL_EFILE, "another shape");
    CHECK(strstr(sel_error(), "gate_proj") && strstr(sel_error(), "[33, 17]") && strstr(sel_error(), "[17, 33]"), "%s",
          sel_error());
    memcpy(changed, tensors, sizeof tensors);
    strcpy(changed[1].name, "layers.0.other.weight");
    CHECK(sel_checkpoint_load(&m, &other, s.array[0], NULL, NULL) == SEL_EFILE, "a missing tensor");
    CHECK(strstr(sel_error(), "layers.0.other.weight is missing"), "%s", sel_error());
    memcpy(changed, tensors, sizeof tensors);
    other.n_tensors--;
    CHECK(sel_checkpoint_load(&m, &other, s.array[0], NULL, NULL) == SEL_EFILE, "a tensor too many");
    CHECK(strstr(sel_error(), "final_norm.weight is not part"), "%s", sel_error());
    sel_manifest_free(&m);
}

/* Fewer bytes than ranks. */
static void test_tiny(void)
{
    const char *dir = fresh("tiny");
    sel_tensor one = {.name = "one", .rank = 1, .shape = {1, 1}, .count = 1};
    const sel_layout tiny = {.n_tensors = 1, .tensors = &one, .total = 16, .parameters = 1};
    const float a[16] = {1.5f}, b[16] = {-2}, c[16] = {3};
    float got[3] = {0};
    const sel_checkpoint_info info = {.step = 123456789, .config = ""};
    sel_manifest m;

    CHECK_OK(sel_checkpoint_save(comm, dir, &tiny, &info, a, b, c, 1));
    CHECK_OK(find(&m, dir));
    CHECK(m.step == 123456789 && m.corpus_crc32 == 0 && m.tokenizer_crc32 == 0, "step %" PRId64, m.step);
    CHECK_OK(sel_checkpoint_load(&m, &tiny, &got[0], &got[1], &got[2]));
    CHECK((int)(got[0] * 2) == 3 && (int)got[1] == -2 && (int)got[2] == 3, "%g %g %g", (double)got[0], (double)got[1],
          (double)got[2]);
    sel_manifest_free(&m);
}

static void test_keep(void)
{
    const char *dir = fresh("keep");

    for (int step = 10; step <= 40; step += 10) CHECK_OK(save(dir, step, 2));
    CHECK(!has_step(dir, 10) && !has_step(dir, 20) && has_step(dir, 30) && has_step(dir, 40), "keep 2");
    sel_comm_barrier(comm);

    /* A damaged one does not count. */
    if (rank == 0) flip(step_file(dir, 40, "optimizer.safetensors"), -3, 6);
    sel_comm_barrier(comm);
    CHECK_OK(save(dir, 50, 2));
    CHECK(has_step(dir, 30) && has_step(dir, 40) && has_step(dir, 50), "30 is one of the two newest intact ones");
    CHECK_OK(save(dir, 60, 2));
    CHECK(!has_step(dir, 30) && !has_step(dir, 40) && has_step(dir, 50) && has_step(dir, 60),
          "the damaged one goes in its turn");
    sel_comm_barrier(comm);

    /* All older ones damaged, one even without a manifest: the new one is kept, they do not hinder. */
    if (rank == 0) {
        flip(step_file(dir, 50, "model.safetensors"), 3, 0);
        CHECK(unlink(step_file(dir, 60, "manifest.json")) == 0, "unlink");
    }
    sel_comm_barrier(comm);
    CHECK_OK(save(dir, 70, 1));
    CHECK(found_step(dir, 0) == 70 && n_warnings == 0, "%s", warnings);
    sel_comm_barrier(comm);

    /* The same step again, over an intact one and over a damaged one, with and without an exchange of names. */
    for (int round = 0; round < 4; round++) {
        no_exchange = round >= 2;
        if (rank == 0 && round % 2) CHECK(truncate(step_file(dir, 70, "manifest.json"), 5) == 0, "truncate");
        sel_comm_barrier(comm);
        CHECK_OK(save(dir, 70, 3));
        CHECK(found_step(dir, 0) == 70 && n_warnings == 0, "%s", warnings);
        CHECK(!has_temporary(dir), "the replaced one is left, round %d", round);
        sel_comm_barrier(comm);
    }
    no_exchange = false;
}

/* The system refuses the k-th call on one rank: all ranks say the same, and no checkpoint is lost. */
static void test_failures(void)
{
    const char *dir = fresh("failures");
    bool last = false;

    CHECK_OK(save(dir, 5, 0));
    for (int victim = 0; victim < size; victim++) {
        last = false;
        for (int k = 1; !last; k++) {
            happened = false;
            calls_left = k;
            reason = k % 2 ? ENOSPC : EIO;
            mishap = rank == victim ? FAIL : NOTHING;
            const sel_status rc = save(dir, 6, 0);
            mishap = NOTHING;

            double hit = happened;
            sel_comm_max_doubles(comm, &hit, 1);
            last = hit < 0.5;
            CHECK(sel_comm_same(comm, (uint64_t)(int64_t)rc), "rank %d has its own status %d", rank, (int)rc);
            CHECK((rc == SEL_OK) == last, "call %d of rank %d: status %d: %s", k, victim, (int)rc, sel_error());
            if (rc != SEL_OK) {
                const char *why = sel_error();
                CHECK(sel_comm_same(comm, crc32(0, (const Bytef *)why, (uInt)strlen(why))),
                      "rank %d has its own line: %s", rank, why);
                CHECK(strstr(why, strerror(reason)) || rank != victim, "no reason: %s", why);
            }
            const int64_t found = found_step(dir, 0);
            CHECK((found == 5 || found == 6) && n_warnings == 0, "found %" PRId64 " after call %d of rank %d: %s",
                  found, k, victim, warnings);
            CHECK(found != 5 || !has_temporary(dir), "the attempt is left after call %d of rank %d", k, victim);
            CHECK(!last || found == 6, "no failure, but step %" PRId64, found);
            CHECK(k < 200, "endless");
            sel_comm_barrier(comm);
            if (rank == 0) CHECK_OK(sel_remove_tree(path_of(dir, "step-00000006")));
            sel_comm_barrier(comm);
        }
    }
}

/* A disk that is full on one rank. */
static void test_enospc(void)
{
    const char *dir = fresh("enospc");
    char fault[64];

    CHECK_OK(save(dir, 70, 1));
    snprintf(fault, sizeof fault, "%d:save:77:enospc", size - 1);
    setenv("SELECTRA_FAULT", fault, 1);
    CHECK_OK(sel_fault_init(rank));
    CHECK(save(dir, 77, 1) == SEL_EIO && strstr(sel_error(), "No space left"), "%s", sel_error());
    unsetenv("SELECTRA_FAULT");
    CHECK_OK(sel_fault_init(rank));
    CHECK(found_step(dir, 0) == 70 && n_warnings == 0 && !has_temporary(dir), "%s", warnings);
    sel_comm_barrier(comm);
    CHECK_OK(save(dir, 77, 1));
    CHECK(found_step(dir, 0) == 77 && !has_step(dir, 70), "the next one");

    /* A folder that cannot be: a file is in its place. */
    const char *file = fresh("file");
    if (rank == 0) put(file, "x", 1);
    sel_comm_barrier(comm);
    CHECK(save(path_of(file, "checkpoints"), 1, 1) != SEL_OK && strstr(sel_error(), "file"), "%s", sel_error());
}

/* A job of as many ranks loses one by SIGKILL in the middle of saving. */
static void test_killed_job(const char *self)
{
    const char *dir = fresh("killed");

    CHECK_OK(save(dir, 10, 0));
    if (rank == 0) {
        const pid_t child = fork();
        if (child == 0) {
            char script[SEL_PATH_MAX], ranks[16], fault[64], path[SEL_PATH_MAX], asan[512];
            snprintf(script, sizeof script, "%s/mpirun.sh", TESTS);
            snprintf(ranks, sizeof ranks, "%d", size);
            snprintf(fault, sizeof fault, "SELECTRA_FAULT=%d:save:20:kill", size - 1);
            snprintf(path, sizeof path, "PATH=%s", getenv("PATH"));
            snprintf(asan, sizeof asan, "ASAN_OPTIONS=%s", getenv("ASAN_OPTIONS") ? getenv("ASAN_OPTIONS") : "");
            const int null = open("/dev/null", O_WRONLY);
            dup2(null, 1);
            dup2(null, 2);
            execve(
                "/bin/bash",
                (char *[]){"bash", script, "-n", ranks, (char *)(uintptr_t)self, "--die", (char *)(uintptr_t)dir, NULL},
                (char *[]){fault, path, asan, NULL}); /* a job of its own: nothing of this one's environment */
            _exit(127);
        }
        int status = 0;
        CHECK(child > 0 && waitpid(child, &status, 0) == child, "no child");
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 128 + SIGKILL, "the job ended with status %x",
              (unsigned)status);
        CHECK(has_temporary(dir), "it died too early");
    }
    sel_comm_barrier(comm);
    CHECK(found_step(dir, 0) == 10 && n_warnings == 0, "%s", warnings);
    sel_comm_barrier(comm);
    CHECK_OK(save(dir, 20, 2));
    CHECK(found_step(dir, 0) == 20 && has_step(dir, 10) && !has_temporary(dir), "the next save");
}

/* One process: it dies at the k-th call.  variant 1 replaces the step that is there by another state. */
static void test_deaths(int step, int variant, int64_t keep)
{
    const char *dir = fresh("deaths");
    bool last = false;

    CHECK_OK(save(dir, 4, 0));
    CHECK_OK(save(dir, 5, 0));
    for (int k = 1; !last; k++) {
        const pid_t child = fork();
        if (child == 0) {
            mishap = DIE;
            calls_left = k;
            _exit(save_variant(dir, step, keep, variant) == SEL_OK ? 0 : 1);
        }
        int status = 0;
        CHECK(child > 0 && waitpid(child, &status, 0) == child, "no child");
        last = WIFEXITED(status);
        CHECK(last ? WEXITSTATUS(status) == 0 : WTERMSIG(status) == SIGKILL, "child ended with status %x",
              (unsigned)status);

        const int64_t found = found_step(dir, variant);
        const bool lost_for_now = no_exchange && found == 4; /* between two renames only the older one is there */
        CHECK(found == 5 || found == step || lost_for_now, "found %" PRId64 " after dying at call %d", found, k);
        CHECK(n_warnings == 0, "after dying at call %d: %s", k, warnings);
        CHECK(!last || found == step, "no death, but step %" PRId64, found);
        CHECK(k < 200, "endless");
        if (last) break;

        /* The next job saves as if nothing had been. */
        CHECK_OK(save(dir, step, 0));
        CHECK(found_step(dir, 0) == step && !has_temporary(dir), "after dying at call %d", k);
        if (step != 5) CHECK_OK(sel_remove_tree(step_file(dir, step, "")));
        CHECK_OK(save(dir, 4, 0));
        CHECK_OK(save(dir, 5, 0));
    }
}

/* ---- Tests of rank 0 alone, on checkpoints that all have saved ---- */

static void check_refused(const char *dir, const char *file, const char *what)
{
    sel_manifest m;

    CHECK(found_step(dir, 0) == 10 && n_warnings == 2, "%s %s: warnings %s", what, file, warnings);
    CHECK(strstr(warnings, step_file(dir, 20, file)), "%s %s: %s", what, file, warnings);
    CHECK(strcmp(what, "one bit") != 0 || strstr(file, "manifest") || strstr(warnings, ": checksum differs (manifest "),
          "%s %s: %s", what, file, warnings);
    CHECK(find(&m, path_of(dir, "step-00000020")) == SEL_EFILE && strstr(sel_error(), file), "%s %s: %s", what, file,
          sel_error());
    CHECK(find(&m, path_of(dir, "latest")) == SEL_EFILE, "latest");
}

static void test_damage(void)
{
    static const char *const names[] = {"model.safetensors", "optimizer.safetensors", "tokenizer.model",
                                        "manifest.json"};
    const char *dir = fresh("damage");
    sel_manifest m;

    CHECK_OK(save(dir, 10, 0));
    CHECK_OK(save(dir, 20, 0));
    sel_comm_barrier(comm);
    if (rank != 0) return;
    CHECK(found_step(dir, 0) == 20 && n_warnings == 0, "%s", warnings);

    for (int i = 0; i < 4; i++) {
        const char *path = step_file(dir, 20, names[i]);
        char *data;
        size_t bytes;
        CHECK_OK(sel_read_file(path, &data, &bytes));

        flip(path, (int64_t)bytes / 2, 2);
        check_refused(dir, names[i], "one bit");
        put(path, data, bytes);
        CHECK(truncate(path, (off_t)bytes - 1) == 0, "truncate");
        if (i < 3) check_refused(dir, names[i], "truncated");
        CHECK(truncate(path, (off_t)bytes / 2) == 0, "truncate");
        check_refused(dir, names[i], "half");
        CHECK(truncate(path, 0) == 0, "truncate");
        check_refused(dir, names[i], "empty");
        CHECK(unlink(path) == 0, "unlink");
        check_refused(dir, names[i], "missing");
        put(path, data, bytes);
        CHECK(found_step(dir, 0) == 20 && n_warnings == 0, "%s", warnings);
        free(data);
    }

    /* Any one bit of the manifest: refused, or (in white space, in the name of its own checksum) without effect. */
    const char *path = step_file(dir, 20, "manifest.json");
    char *data;
    size_t bytes, refused = 0;
    CHECK_OK(sel_read_file(path, &data, &bytes));
    for (size_t i = 0; i < bytes; i++) {
        data[i] ^= (char)(1 << (i % 8));
        put(path, data, bytes);
        data[i] ^= (char)(1 << (i % 8));
        refused += found_step(dir, 0) == 10; /* checks what it finds */
    }
    CHECK(refused > bytes / 2 && refused < bytes, "%zu of %zu", refused, bytes);
    put(path, data, bytes);
    free(data);

    /* A step under the name of another one; then both damaged; then nothing. */
    CHECK(rename(path_of(dir, "step-00000020"), path_of(dir, "step-00000030")) == 0, "rename");
    CHECK(found_step(dir, 0) == 10 && strstr(warnings, "is of step 20"), "%s", warnings);
    flip(step_file(dir, 10, "model.safetensors"), -1, 0);
    CHECK(find(&m, dir) == SEL_EFILE && n_warnings == 2 && strstr(sel_error(), "none of its 2"), "%s", sel_error());
    CHECK(find(&m, path_of(dir, "nothing")) == SEL_EUSER, "%s", sel_error());
    CHECK(find(&m, step_file(dir, 10, "model.safetensors")) == SEL_EUSER, "%s", sel_error());
    CHECK(find(&m, root) == SEL_EUSER, "%s", sel_error());
    CHECK(find(&m, "") == SEL_EUSER, "%s", sel_error());
}

/* Makes the folder of this test at rank 0 and tells the others. */
static void make_root(void)
{
    if (rank == 0) {
        const char *tmp = getenv("TMPDIR");
        snprintf(root, sizeof root, "%.200s/selectra-test-XXXXXX", tmp ? tmp : "/tmp");
        CHECK(mkdtemp(root) != NULL, "%s", root);
    }
    sel_comm_bcast(comm, root, sizeof root, 0);
}

int main(int argc, char **argv)
{
    if (sel_comm_open(&comm, &argc, &argv) != SEL_OK) {
        fprintf(stderr, "%s\n", sel_error());
        return EXIT_FAILURE;
    }
    rank = sel_comm_rank(comm);
    size = sel_comm_size(comm);
    place_tensors();
    if (argc == 3 && strcmp(argv[1], "--die") == 0) {
        if (sel_fault_init(rank) != SEL_OK || save(argv[2], 20, 0) != SEL_OK) return 3;
        sel_comm_close(&comm);
        return EXIT_SUCCESS;
    }

    make_root();
    test_round_trip();
    test_tiny();
    test_keep();
    test_failures();
    test_enospc();
    test_killed_job(argv[0]);
    test_damage();
    if (size == 1) {
        test_deaths(6, 0, 0);
        test_deaths(6, 0, 1);
        test_deaths(5, 1, 0);
        no_exchange = true;
        test_deaths(5, 1, 0);
        no_exchange = false;
    }
    sel_comm_barrier(comm);
    if (rank == 0) CHECK_OK(sel_remove_tree(root));

    const int verdict = check_verdict();
    sel_comm_close(&comm);
    return verdict;
}
