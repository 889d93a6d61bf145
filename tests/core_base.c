/* core_base.c: errors, memory, random numbers, files, time, faults. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/base/clock.h"
#include "core/base/error.h"
#include "core/base/fault.h"
#include "core/base/file.h"
#include "core/base/mem.h"
#include "core/base/pulse.h"
#include "core/base/rng.h"
#include "tests/check.h"

/* The latest error line holds a part. */
static bool says(const char *part)
{
    return strstr(sel_error(), part) != NULL;
}

static void *other_thread(void *arg)
{
    (void)arg;
    CHECK(says("no error"), "%s", sel_error());
    (void)!sel_fail(SEL_EIO, "of the other thread");
    return NULL;
}

static void test_error(void)
{
    char text[3000];
    CHECK(says("no error"), "%s", sel_error());
    errno = ENOENT;
    CHECK(sel_fail(SEL_EFILE, "%s: %d", "name", 7) == SEL_EFILE, "status");
    CHECK(errno == ENOENT, "errno %d", errno);
    CHECK(strcmp(sel_error(), "name: 7") == 0, "%s", sel_error());
    sel_fail(SEL_EUSER, "rank 3: %s", sel_error());
    CHECK(strcmp(sel_error(), "rank 3: name: 7") == 0, "%s", sel_error());

    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0, "thread");
    pthread_join(thread, NULL);
    CHECK(strcmp(sel_error(), "rank 3: name: 7") == 0, "%s", sel_error());

    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = '\0';
    sel_fail(SEL_EUSER, "%s", text);
    CHECK(strlen(sel_error()) == 1023, "length %zu", strlen(sel_error()));
    memcpy(text + 1021, "\xE2\x82\xAC", 3); /* a euro sign across the cut goes as a whole */
    sel_fail(SEL_EUSER, "%s", text);
    CHECK(strlen(sel_error()) == 1021, "length %zu", strlen(sel_error()));
    memcpy(text + 1019, "x\xE2\x82\xACx", 5); /* before the cut: stays */
    sel_fail(SEL_EUSER, "%s", text);
    CHECK(strlen(sel_error()) == 1023, "length %zu", strlen(sel_error()));

    CHECK(sel_exit_status(SEL_OK) == 0 && sel_exit_status(SEL_EUSER) == 2 && sel_exit_status(SEL_EFILE) == 1, "exit");
    CHECK(sel_exit_status(SEL_ENOMEM) == 1 && sel_exit_status(SEL_ECOMM) == 1 && sel_exit_status(SEL_EIO) == 1, "exit");
}

static void test_mem(void)
{
    static const size_t sizes[] = {
        0, 1, 63, 64, 65, 4096, ((size_t)4 << 20) - 1, (size_t)4 << 20, ((size_t)9 << 20) + 5};
    for (int again = 0; again < 2; again++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            const size_t n = sizes[s];
            unsigned char *p = sel_alloc(n, "a block");
            CHECK(p != NULL, "%zu bytes: %s", n, sel_error());
            if (!p) continue;
            const uintptr_t unit = n >= ((size_t)4 << 20) ? (uintptr_t)2 << 20 : 64;
            CHECK((uintptr_t)p % unit == 0, "%zu bytes at %p", n, (void *)p);
            size_t dirty = 0;
            for (size_t i = 0; i < n; i++) dirty += p[i] != 0;
            CHECK(dirty == 0, "%zu of %zu bytes are not zero", dirty, n);
            memset(p, 0xA5, n);
            sel_free(p);
        }
    sel_free(NULL);
    static const size_t impossible[] = {SIZE_MAX, SIZE_MAX - 63, SIZE_MAX / 2, (size_t)1 << 60};
    for (size_t i = 0; i < sizeof impossible / sizeof *impossible; i++) {
        CHECK(sel_alloc(impossible[i], "gradients") == NULL, "%zu bytes", impossible[i]);
        char size[32];
        snprintf(size, sizeof size, "%zu", impossible[i]);
        CHECK(says("gradients") && says(size), "%s", sel_error());
    }
}

/* Known answers of the authors' library (Random123, kat_vectors: philox4x32 10). */
static void test_philox(void)
{
    static const struct {
        uint64_t index, stream, seed;
        uint32_t want[4];
    } known[] = {
        {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {UINT64_MAX, UINT64_MAX, UINT64_MAX, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {0x85a308d3243f6a88, 0x0370734413198a2e, 0x299f31d0a4093822, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        uint32_t got[4];
        sel_philox(got, known[i].seed, known[i].stream, known[i].index);
        CHECK(memcmp(got, known[i].want, sizeof got) == 0, "vector %zu: %08x %08x %08x %08x", i, got[0], got[1], got[2],
              got[3]);
    }

    const int n = 100000;
    double sum = 0, squares = 0;
    for (int i = 0; i < n; i++) {
        const double u = sel_rng_uniform(1, 2, (uint64_t)i);
        CHECK(u > 0 && u < 1, "%g", u);
        sum += u;
        squares += (u - 0.5) * (u - 0.5);
    }
    /* Mean 1/2 and variance 1/12, within five standard errors. */
    CHECK(fabs(sum / n - 0.5) < 5 * sqrt(1.0 / 12 / n), "mean %g", sum / n);
    CHECK(fabs(squares / n - 1.0 / 12) < 5 * sqrt(1.0 / 180 / n), "variance %g", squares / n);
    CHECK(sel_rng_uniform(1, 2, 3) == sel_rng_uniform(1, 2, 3), "pure");

    /* FNV-1a's published values. */
    CHECK(sel_rng_stream("") == 0xcbf29ce484222325, "empty");
    CHECK(sel_rng_stream("a") == 0xaf63dc4c8601ec8c, "a");
    CHECK(sel_rng_stream("foobar") == 0x85944171f73967e8, "foobar");
}

static void test_permutation(void)
{
    static const uint64_t sizes[] = {1, 2, 3, 4, 5, 16, 17, 1000, 65537};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        const uint64_t n = sizes[s];
        unsigned char *seen = sel_alloc(n, "seen");
        uint64_t outside = 0, twice = 0, moved = 0, by_seed = 0, by_stream = 0;
        for (uint64_t i = 0; i < n; i++) {
            const uint64_t to = sel_rng_permute(7, 1, n, i);
            if (to >= n) {
                outside++;
                continue;
            }
            twice += seen[to]++ != 0;
            moved += to != i;
            by_seed += to != sel_rng_permute(8, 1, n, i);
            by_stream += to != sel_rng_permute(7, 2, n, i);
        }
        CHECK(outside == 0 && twice == 0, "n %llu: %llu outside, %llu twice", (unsigned long long)n,
              (unsigned long long)outside, (unsigned long long)twice);
        if (n >= 16)
            CHECK(moved > n / 2 && by_seed > n / 2 && by_stream > n / 2, "n %llu: moved %llu, seed %llu, stream %llu",
                  (unsigned long long)n, (unsigned long long)moved, (unsigned long long)by_seed,
                  (unsigned long long)by_stream);
        sel_free(seen);
    }

    /* All six orders of three things are about equally likely: 1000 each, standard deviation 29. */
    int orders[27] = {0};
    for (uint64_t seed = 0; seed < 6000; seed++)
        orders[9 * sel_rng_permute(seed, 0, 3, 0) + 3 * sel_rng_permute(seed, 0, 3, 1) +
               sel_rng_permute(seed, 0, 3, 2)]++;
    static const int valid[] = {5, 7, 11, 15, 19, 21}; /* 012 021 102 120 201 210 in base 3 */
    for (int i = 0; i < 6; i++) CHECK(abs(orders[valid[i]] - 1000) < 150, "order %d: %d", valid[i], orders[valid[i]]);

    const uint64_t huge = UINT64_MAX; /* a domain of all 64 bits */
    CHECK(sel_rng_permute(1, 1, huge, 5) != sel_rng_permute(1, 1, huge, 6), "huge");
}

static void test_paths(const char *dir)
{
    char path[SEL_PATH_MAX], other[SEL_PATH_MAX], name[SEL_PATH_MAX];
    CHECK_OK(sel_path_join(path, "a/b", "c"));
    CHECK(strcmp(path, "a/b/c") == 0, "%s", path);
    CHECK_OK(sel_path_join(path, "a/", "c"));
    CHECK(strcmp(path, "a/c") == 0, "%s", path);
    CHECK_OK(sel_path_join(path, path, "d"));
    CHECK(strcmp(path, "a/c/d") == 0, "%s", path);
    memset(name, 'n', sizeof name);
    name[SEL_PATH_MAX - 3] = '\0';
    CHECK_OK(sel_path_join(path, "a", name)); /* 4095 bytes: just fits */
    CHECK(strlen(path) == SEL_PATH_MAX - 1, "%zu", strlen(path));
    CHECK(sel_path_join(path, "ab", name) == SEL_EUSER && says("longer than 4095"), "%s", sel_error());

    sel_path_join(path, dir, "x/y//z/");
    CHECK_OK(sel_make_dirs(path));
    CHECK_OK(sel_make_dirs(path));
    CHECK(sel_path_is_dir(path), "%s", path);
    sel_path_join(path, dir, "x/file");
    CHECK_OK(sel_write_file(path, "text", 4));
    CHECK(sel_path_exists(path) && !sel_path_is_dir(path), "%s", path);
    CHECK(sel_make_dirs(path) == SEL_EUSER && says("x/file") && says("in the way"), "%s", sel_error());
    sel_path_join(other, path, "below");
    CHECK(sel_make_dirs(other) == SEL_EUSER && says("x/file"), "%s", sel_error());
    CHECK(sel_make_dirs("") == SEL_EUSER, "%s", sel_error());

    /* A tree goes; what a symbolic link in it points at stays. */
    sel_path_join(path, dir, "stays");
    CHECK_OK(sel_make_dirs(path));
    sel_path_join(path, path, "file");
    CHECK_OK(sel_write_file(path, "x", 1));
    sel_path_join(other, dir, "x/y/link");
    CHECK(symlink("../../stays", other) == 0, "symlink");
    sel_path_join(other, dir, "x");
    CHECK_OK(sel_remove_tree(other));
    CHECK(!sel_path_exists(other) && sel_path_exists(path), "%s, %s", other, path);
    CHECK_OK(sel_remove_tree(other));
    CHECK_OK(sel_remove_tree(path));
    CHECK(!sel_path_exists(path), "%s", path);
    sel_path_join(path, dir, "stays");
    CHECK_OK(sel_remove_tree(path));
}

static void test_files(const char *dir)
{
    char path[SEL_PATH_MAX], tmp[SEL_PATH_MAX], *data = NULL;
    size_t bytes;

    sel_path_join(path, dir, "missing");
    CHECK(sel_read_file(path, &data, &bytes) == SEL_EUSER && says(path) && says("no such file"), "%s", sel_error());
    CHECK(sel_read_file(dir, &data, &bytes) == SEL_EUSER && says(dir) && says("is a folder"), "%s", sel_error());

    /* Contents with a NUL, sizes around the first guess; an empty file. */
    static const size_t sizes[] = {0, 1, 4095, 4096, 4097, 100000};
    char *text = malloc(100000);
    for (size_t i = 0; i < 100000; i++) text[i] = (char)(i * 31 % 251);
    sel_path_join(path, dir, "file");
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        CHECK_OK(sel_write_file(path, text, sizes[s]));
        CHECK_OK(sel_read_file(path, &data, &bytes));
        CHECK(bytes == sizes[s] && memcmp(data, text, bytes) == 0 && data[bytes] == '\0', "%zu of %zu", bytes,
              sizes[s]);
        free(data);
    }
    CHECK_OK(sel_read_file("/proc/self/status", &data, &bytes)); /* says that its size is 0 */
    CHECK(bytes > 100, "%zu", bytes);
    free(data);

    snprintf(tmp, sizeof tmp, "%.4000s.tmp", path);
    CHECK(!sel_path_exists(tmp), "%s is left", tmp);
    sel_path_join(path, dir, "folder");
    CHECK_OK(sel_make_dirs(path));
    CHECK(sel_write_file(path, "x", 1) == SEL_EIO && says(path), "%s", sel_error()); /* the rename fails */
    snprintf(tmp, sizeof tmp, "%.4000s.tmp", path);
    CHECK(!sel_path_exists(tmp) && sel_path_is_dir(path), "%s is left", tmp);
    sel_path_join(path, dir, "none/file");
    CHECK(sel_write_file(path, "x", 1) == SEL_EIO && says(path), "%s", sel_error());

    /* A write that fails half way leaves the old file and no other. */
    struct rlimit before;
    getrlimit(RLIMIT_FSIZE, &before);
    const struct rlimit small = {.rlim_cur = 50000, .rlim_max = before.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    sel_path_join(path, dir, "old");
    CHECK_OK(sel_write_file(path, "old", 3));
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0, "limit");
    CHECK(sel_write_file(path, text, 100000) == SEL_EIO && says(path) && says("too large"), "%s", sel_error());
    setrlimit(RLIMIT_FSIZE, &before);
    snprintf(tmp, sizeof tmp, "%.4000s.tmp", path);
    CHECK(!sel_path_exists(tmp), "%s is left", tmp);
    CHECK_OK(sel_read_file(path, &data, &bytes));
    CHECK(bytes == 3 && memcmp(data, "old", 3) == 0, "%s", data);
    free(data);

    /* A full disk, as the kernel has it ready: all writes to /dev/full fail with ENOSPC. */
    const int full = open("/dev/full", O_WRONLY);
    CHECK(sel_write_all(full, "x", 1, "/dev/full") == SEL_EIO && says("/dev/full") && says("No space"), "%s",
          sel_error());
    close(full);

    sel_path_join(path, dir, "places");
    const int fd = open(path, O_RDWR | O_CREAT, 0666);
    char back[8] = "";
    CHECK_OK(sel_pwrite_all(fd, "world", 5, 5, path));
    CHECK_OK(sel_pwrite_all(fd, "hello", 5, 0, path));
    CHECK_OK(sel_pread_all(fd, back, 4, 3, path));
    CHECK(strcmp(back, "lowo") == 0, "%s", back);
    CHECK(sel_pread_all(fd, back, 4, 8, path) == SEL_EFILE && says(path) && says("short"), "%s", sel_error());
    close(fd);
    CHECK(sel_pread_all(-1, back, 1, 0, path) == SEL_EIO && says(path), "%s", sel_error());
    free(text);
}

static void test_crc(const char *dir)
{
    char path[SEL_PATH_MAX];
    uint32_t crc = 0;
    int64_t bytes = 0;
    sel_path_join(path, dir, "crc");
    CHECK_OK(sel_write_file(path, "123456789", 9));
    CHECK_OK(sel_file_crc32(path, &crc, &bytes));
    CHECK(crc == 0xCBF43926 && bytes == 9, "%08x of %lld", crc, (long long)bytes); /* the standard's check value */
    CHECK_OK(sel_write_file(path, "", 0));
    CHECK_OK(sel_file_crc32(path, &crc, &bytes));
    CHECK(crc == 0 && bytes == 0, "%08x of %lld", crc, (long long)bytes);

    /* Several reads: sizes at and around 1 MiB, compared with a plain bitwise CRC. */
    const size_t most = ((size_t)2 << 20) + 1;
    unsigned char *text = calloc(most, 1);
    for (size_t i = 0; i < most; i++) text[i] = (unsigned char)(i ^ i >> 8);
    const size_t sizes[] = {(size_t)1 << 20, ((size_t)1 << 20) + 1, most - 1, most};
    for (size_t s = 0; s < 4; s++) {
        uint32_t want = UINT32_MAX;
        for (size_t i = 0; i < sizes[s]; i++) {
            want ^= text[i];
            for (int bit = 0; bit < 8; bit++) want = want >> 1 ^ (want & 1 ? 0xEDB88320U : 0);
        }
        want = ~want;
        CHECK_OK(sel_write_file(path, text, sizes[s]));
        CHECK_OK(sel_file_crc32(path, &crc, &bytes));
        CHECK(crc == want && bytes == (int64_t)sizes[s], "%08x of %lld, not %08x", crc, (long long)bytes, want);
    }
    free(text);
    CHECK(sel_file_crc32(dir, &crc, &bytes) == SEL_EUSER && says("is a folder"), "%s", sel_error());
}

static void test_clock(void)
{
    static const struct {
        double seconds;
        const char *text;
    } durations[] = {{0, "0s"},         {42, "42s"},     {59.7, "1m00s"},   {190, "3m10s"},      {3599.4, "59m59s"},
                     {3599.5, "1h00m"}, {7500, "2h05m"}, {86399, "23h59m"}, {86400, "1d00h"},    {273600, "3d04h"},
                     {-1, "-"},         {NAN, "-"},      {INFINITY, "-"},   {1e300, ">9999999d"}};
    char out[32];
    for (size_t i = 0; i < sizeof durations / sizeof *durations; i++) {
        sel_format_duration(out, durations[i].seconds);
        CHECK(strcmp(out, durations[i].text) == 0, "%g: %s, not %s", durations[i].seconds, out, durations[i].text);
    }
    static const struct {
        double n;
        const char *text;
    } counts[] = {{0, "0"},           {7, "7"},           {256, "256"},   {999, "999"},      {999.6, "1k"},
                  {12345, "12.3k"},   {999499, "999k"},   {999500, "1M"}, {4.56e6, "4.56M"}, {7.8e9, "7.8G"},
                  {-12345, "-12.3k"}, {1e300, "1e+282E"}, {NAN, "-"},     {0.5, "0.5"}};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        sel_format_count(out, counts[i].n);
        CHECK(strcmp(out, counts[i].text) == 0, "%g: %s, not %s", counts[i].n, out, counts[i].text);
    }
    sel_utc(out);
    CHECK(strlen(out) == 20 && out[4] == '-' && out[10] == 'T' && out[19] == 'Z', "%s", out);
    const double start = sel_now();
    usleep(2000);
    CHECK(sel_now() - start >= 0.0019, "%g", sel_now() - start);
}

/* What a child does at (forward, 3): its wait status. */
static int child_status(const char *setting, bool wait_for_stop)
{
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        setenv("SELECTRA_FAULT", setting, 1);
        if (sel_fault_init(1) != SEL_OK) _exit(90);
        if (sel_fault("forward", 2, NULL) || sel_fault("backward", 3, NULL)) _exit(91);
        (void)sel_fault("forward", 3, NULL);
        sel_fault_within("keys");
        _exit(sel_fault("forward", 3, NULL) ? 92 : 0);
    }
    int status = 0;
    waitpid(child, &status, wait_for_stop ? WUNTRACED : 0);
    if (WIFSTOPPED(status)) {
        int after;
        kill(child, SIGKILL);
        waitpid(child, &after, 0);
    }
    return status;
}

static void test_fault(void)
{
    static const struct {
        const char *setting, *part;
    } bad[] = {
        {"1:forward:3", "1:forward:3: expected rank:phase:step:kind"},
        {"1:forward:3:nan:x", "expected rank:phase:step:kind"},
        {"x:forward:3:nan", "rank: expected a number from 0, got \"x\""},
        {"-1:forward:3:nan", "got \"-1\""},
        {"1:sideways:3:nan", "phase: expected data, forward"},
        {"1:forward:3k:nan", "step: expected a number from 0, got \"3k\""},
        {"1:forward:99999999999999999999:nan", "step: expected"},
        {"1:forward:3:explode", "kind: expected kill, stop"},
        {"0:forward:3:nan,", "expected rank:phase:step:kind"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        setenv("SELECTRA_FAULT", bad[i].setting, 1);
        CHECK(sel_fault_init(0) == SEL_EUSER && says("SELECTRA_FAULT") && says(bad[i].part), "%s: %s", bad[i].setting,
              sel_error());
    }

    setenv("SELECTRA_FAULT", "1:forward:3:nan,0:save:2:enospc,1:save:2:enospc", 1);
    CHECK_OK(sel_fault_init(1));
    CHECK(!sel_fault("forward", 3, "enospc") && !sel_fault("forward", 3, NULL) && !sel_fault("forward", 2, "nan"),
          "early");
    CHECK(sel_fault("forward", 3, "nan"), "due");
    CHECK(sel_fault("forward", 3, "nan"), "a number that is not one comes again when its step does");
    CHECK(sel_fault("save", 2, "enospc") && !sel_fault("save", 2, "enospc"), "once");
    CHECK_OK(sel_fault_init(2));
    CHECK(!sel_fault("save", 2, "enospc"), "of another rank");
    unsetenv("SELECTRA_FAULT");
    CHECK_OK(sel_fault_init(1));
    CHECK(!sel_fault("save", 2, "enospc"), "none set");

    int status = child_status("1:forward:3:kill", false);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %x", (unsigned)status);
    status = child_status("1:forward:3:term", false);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM, "status %x", (unsigned)status);
    status = child_status("1:forward:3:stop", true);
    CHECK(WIFSTOPPED(status) && WSTOPSIG(status) == SIGSTOP, "status %x", (unsigned)status);
    status = child_status("1:keys:3:kill", false);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %x", (unsigned)status);
    status = child_status("1:sums:3:kill,1:keys:4:kill", false);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "elsewhere: status %x", (unsigned)status);
    status = child_status("0:forward:3:kill", false);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %x", (unsigned)status);
}

static void test_pulse(void)
{
    static sel_pulse shared; /* zero */
    sel_pulse_view before, now;

    sel_pulse_phase("forward", 7);
    sel_pulse_enter("agree");
    sel_pulse_move(&shared);
    sel_pulse_read(&shared, &before);
    CHECK(strcmp(before.phase, "forward") == 0 && before.step == 7 && strcmp(before.collective, "agree") == 0 &&
          before.position % 2 == 1, "what was marked before goes along: %s %s", before.phase, before.collective);
    sel_pulse_leave();
    sel_pulse_read(&shared, &now);
    CHECK(now.position == before.position + 1 && now.marks > before.marks && now.when >= before.when, "left");
    sel_pulse_exchange("keys");
    sel_pulse_read(&shared, &before);
    CHECK(strcmp(before.exchange, "keys") == 0 && strcmp(before.collective, "agree") == 0 &&
          before.position == now.position && before.marks > now.marks, "in an exchange of some: %s", before.exchange);
    sel_pulse_exchange(NULL);
    sel_pulse_read(&shared, &before);
    CHECK(!before.exchange[0] && before.marks > now.marks + 1, "no longer in %s", before.exchange);
    before = now;
    before.position--;
    sel_pulse_leave(); /* without an enter it counts as one more */
    sel_pulse_enter("a collective of a very long name");
    sel_pulse_phase("backward", -1);
    sel_pulse_read(&shared, &now);
    CHECK(now.position == before.position + 4 && now.step == 7 && strcmp(now.phase, "backward") == 0, "%s", now.phase);
    CHECK(strcmp(now.collective, "a collective of a very ") == 0, "%s", now.collective);
    sel_pulse_move(NULL);
    sel_pulse_tick();
    sel_pulse_read(&shared, &before);
    CHECK(before.marks == now.marks, "the old place is no longer written");
}

int main(void)
{
    char dir[] = "core_base.XXXXXX";
    if (!mkdtemp(dir)) {
        perror(dir);
        return EXIT_FAILURE;
    }
    test_error();
    test_mem();
    test_philox();
    test_permutation();
    test_paths(dir);
    test_files(dir);
    test_crc(dir);
    test_clock();
    test_fault();
    test_pulse();
    CHECK_OK(sel_remove_tree(dir));
    CHECK(!sel_path_exists(dir), "%s is left", dir);
    return check_verdict();
}
