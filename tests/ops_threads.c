/* The number of threads: what OpenMP would not give is refused, and no setting of its environment changes a sum.
 *
 * OpenMP reads its environment when a program starts: each case is this program again, with the case's name as its
 * argument.
 */
#include "tests/check.h"
#include "tests/random.h"

#include "ops/cpu.h"
#include "ops/ops.h"

#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MANY = 7 };   /* threads; more than the processors of most machines that test */

/* The sum that `threads` threads find is that of one, to rounding: no part of the work was left out. */
static void check_sum(int threads)
{
    enum { COUNT = 1 << 16 };
    static float x[COUNT];
    sel_ops ops;
    double expected = 0.0;

    for (int i = 0; i < COUNT; i++) {
        x[i] = (float)random_normal();
        expected += (double)x[i] * (double)x[i];
    }
    sel_ops_init(&ops, sel_cpu_detect());
    const double sum = ops.sum_squares(x, COUNT, threads);
    CHECK(fabs(sum - expected) < 1e-6 * expected, "%d threads: sum %.9g, not %.9g", threads, sum, expected);
}

static void check_refused(int64_t threads, const char *part)
{
    const sel_status rc = sel_cpu_check_threads(threads);
    CHECK(rc == SEL_EUSER && strstr(sel_error(), part), "%lld threads: status %d: %s", (long long)threads, (int)rc,
          sel_error());
}

static void run_case(const char *name)
{
    if (strcmp(name, "limit") == 0) {
        CHECK(sel_cpu_threads() <= 2, "%d threads by default", sel_cpu_threads());
        CHECK_OK(sel_cpu_check_threads(2));
        check_refused(MANY, "OpenMP gives 2 of 7 threads here (OMP_THREAD_LIMIT=2)");
        check_sum(2);
    } else {
        CHECK_OK(sel_cpu_check_threads(MANY));
        check_sum(MANY);
    }
}

static void check_case(const char *program, const char *name, const char *variable, const char *value)
{
    int status = -1;
    const pid_t child = fork();
    if (child == 0) {
        setenv(variable, value, 1);
        execl(program, program, name, (char *)NULL);
        _exit(127);
    }
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s=%s: status %d", variable, value, status);
}

int main(int argc, char **argv)
{
    if (argc > 1) {
        run_case(argv[1]);
        return check_verdict();
    }
    check_refused(0, "0 threads: expected 1 to 4096");
    check_refused(-1, "-1 threads: expected 1 to 4096");
    check_refused(4097, "4097 threads: expected 1 to 4096");
    check_refused((INT64_C(1) << 32) + 1, "4294967297 threads: expected 1 to 4096");   /* 1, if cut to 32 bits */
    check_refused(INT64_MAX, "9223372036854775807 threads: expected 1 to 4096");
    check_case(argv[0], "limit", "OMP_THREAD_LIMIT", "2");
    check_case(argv[0], "dynamic", "OMP_DYNAMIC", "true");
    check_case(argv[0], "plain", "OMP_DYNAMIC", "false");
    return check_verdict();
}
