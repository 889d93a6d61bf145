/* ops_memory.c: attention's memory grows with N, never with N x N: forward and backward in a process of their own for
 * each N, its peak resident memory beside what the inputs and results take.
 */
#include <stdint.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include "core/base/error.h"
#include "core/base/mem.h"
#include "ops/ops.h"
#include "tests/check.h"

enum { HEADS = 4, WIDTH = 64 };

static double peak_mib(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)u.ru_maxrss / 1024.0;
}

static float *array(int64_t n)
{
    float *x = sel_alloc((size_t)n * sizeof *x, "test");
    if (!x) exit(EXIT_FAILURE);
    for (int64_t i = 0; i < n; i++) x[i] = (float)((i * 7919) % 1009) / 504.0f - 1.0f;   /* touches every page */
    return x;
}

/* Forward and backward at N; returns MiB beyond q, k, v, out, dout, dq, dk, dv and lse. */
static double extra_memory(int64_t N)
{
    const int64_t n = N * HEADS * WIDTH, row = HEADS * WIDTH;
    sel_ops ops;
    sel_cpu_level level;
    if (sel_cpu_choose("auto", &level) != SEL_OK) exit(EXIT_FAILURE);
    sel_ops_init(&ops, level);

    float *const q = array(n), *const k = array(n), *const v = array(n), *const dout = array(n), *const out = array(n);
    float *const dq = array(n), *const dk = array(n), *const dv = array(n), *const lse = array(HEADS * N);
    const double before = peak_mib();
    sel_attention a = {.B = 1,
                       .heads = HEADS,
                       .kv_heads = HEADS,
                       .dh = WIDTH,
                       .i1 = N,
                       .selective = true,
                       .relu = true,
                       .protect_bos = true,
                       .protect_self = true,
                       .shift = true,
                       .q = q,
                       .k = k,
                       .v = v,
                       .out = out,
                       .q_seq = n,
                       .q_row = row,
                       .k_seq = n,
                       .k_row = row,
                       .v_seq = n,
                       .v_row = row,
                       .out_seq = n,
                       .out_row = row,
                       .lse = lse,
                       .threads = 1};
    a.saved = array(sel_attention_carries(N) * N);
    const size_t forward = sel_attention_workspace(&a, false), backward = sel_attention_workspace(&a, true);
    a.workspace = sel_alloc(forward > backward ? forward : backward, "workspace");
    const sel_attention_grad g = { .dout = dout, .dq = dq, .dk = dk, .dv = dv, .dq_seq = n, .dq_row = row, .dk_seq = n,
                                   .dk_row = row, .dv_seq = n, .dv_row = row };
    ops.attention_forward(&a);
    ops.attention_backward(&a, &g);
    return peak_mib() - before;
}

int main(void)
{
    const char *quick = getenv("SEL_TEST_QUICK");
    const int64_t most = quick && *quick ? 2048 : 8192;
    double first = 0.0;

    printf("%8s %16s %22s\n", "N", "extra MiB", "heads x N x N MiB");
    for (int64_t N = 512; N <= most; N *= 2) {
        int pipe_ends[2];
        double mib = -1.0;
        if (pipe(pipe_ends) != 0) return EXIT_FAILURE;
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            mib = extra_memory(N);
            _exit(write(pipe_ends[1], &mib, sizeof mib) == sizeof mib ? EXIT_SUCCESS : EXIT_FAILURE);
        }
        close(pipe_ends[1]);
        CHECK(read(pipe_ends[0], &mib, sizeof mib) == sizeof mib, "the process of N = %lld died", (long long)N);
        close(pipe_ends[0]);
        waitpid(child, NULL, 0);
        printf("%8lld %16.1f %22.1f\n", (long long)N, mib, (double)(HEADS * N * N) * 4.0 / 1048576.0);
        if (N == 512) first = mib;
        /* 4 MiB: what a process touches anyhow; the saved carries make the factor a little more than N's own. */
        CHECK(mib <= 1.35 * (double)N / 512.0 * first + 4.0, "N = %lld: %.1f MiB, N = 512: %.1f MiB", (long long)N, mib,
              first);
    }
    return check_verdict();
}
