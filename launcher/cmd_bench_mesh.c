/* cmd_bench_mesh.c: `selectra bench mesh`: what the ranks of a job can move, under mpirun or srun. */
#include <inttypes.h>
#include <stdio.h>
#include "core/bench/bench.h"
#include "launcher/launcher.h"
#include "launcher/options.h"

static void print_table(const sel_bench_results *r)
{
    for (int i = 0; i < r->results.n; i++) {
        const sel_bench_result *x = &r->results.rows[i];
        if (x->bytes <= (int64_t)sizeof(float))
            printf("%-20s %10" PRId64 " B  %10.1f us\n", x->name, x->bytes, 1e6 * x->seconds_median);
        else
            printf("%-20s %10" PRId64 " B  %10.3f ms  %6.2f GB/s  %5.2f of memcpy\n", x->name, x->bytes,
                   1e3 * x->seconds_median, x->gbytes_per_second, x->share_of_copy);
    }
}

static void print_json(const sel_bench_results *r, sel_comm *c, int threads)
{
    printf("{\"cpu\": \"%s\", \"threads\": %d, \"ranks\": %d, \"hosts\": %d, \"results\": [", sel_cpu_name(), threads,
           sel_comm_size(c), sel_comm_hosts(c));
    for (int i = 0; i < r->results.n; i++) {
        const sel_bench_result *x = &r->results.rows[i];
        printf("%s\n {\"name\": \"%s\", \"bytes\": %" PRId64
               ", \"threads\": %d, \"seconds_median\": %.6g, \"runs\": %d, "
               "\"gbytes_per_second\": %.6g, \"share_of_copy\": %.6g}",
               i ? "," : "", x->name, x->bytes, x->threads, x->seconds_median, x->runs, x->gbytes_per_second,
               x->share_of_copy);
    }
    printf("]}\n");
}

int sel_cmd_bench_mesh(int argc, char **argv)
{
    int64_t bytes = 100000000, runs = 11, threads = 1;
    bool json = false;
    const sel_option options[] = {
        {"bytes", SEL_OPT_INTEGER, &bytes, 4, "B", "of the array that each rank brings (100,000,000)"},
        {"runs", SEL_OPT_INTEGER, &runs, 1, "N", "rounds that the medians are taken of (11)"},
        {"threads", SEL_OPT_INTEGER, &threads, 1, "T", "threads of a rank that add up and copy (1)"},
        {"json", SEL_OPT_FLAG, &json, 0, NULL, "one JSON object"},
    };
    const sel_command command = {"selectra bench mesh", "[options]",
                                 "Sums, shares and copies of arrays between the ranks of a job (start it under mpirun "
                                 "or srun), beside MPI's own\n"
                                 "and beside copies of memory by all ranks at once.  GB/s: bytes of one array over the "
                                 "time of the slowest rank.",
                                 options, sizeof options / sizeof options[0]};
    sel_bench_results out = { 0 };
    sel_comm *c = NULL;
    int n;

    const int status = sel_options_begin(&command, argc, argv, 0, 0, &n);
    if (status >= 0) return status;
    sel_status rc = sel_comm_open(&c, &argc, &argv);
    if (rc != SEL_OK) return sel_options_failed(&command, rc);
    rc = sel_comm_agree(c, sel_cpu_check_threads(threads));
    if (rc == SEL_OK) rc = sel_bench_mesh(c, bytes, (int)runs, (int)threads, &out);
    if (sel_comm_rank(c) == 0) {
        if (rc != SEL_OK) {
            sel_options_failed(&command, rc);
        } else if (json) {
            print_json(&out, c, (int)threads);
        } else {
            printf("%d rank%s on %d host%s, %s, %s\n", sel_comm_size(c), sel_comm_size(c) == 1 ? "" : "s",
                   sel_comm_hosts(c), sel_comm_hosts(c) == 1 ? "" : "s", sel_cpu_name(), sel_comm_library());
            print_table(&out);
        }
    }
    sel_bench_free(&out);
    sel_comm_close(&c);
    return sel_exit_status(rc);
}
