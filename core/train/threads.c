/* threads.c: how many threads a rank takes. */
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "core/base/rng.h"
#include "core/train/trainer.h"

typedef struct {
    uint64_t host;
    cpu_set_t cpus;
} binding;

sel_status sel_threads_choose(sel_comm *c, int64_t wanted, int *threads)
{
    const int size = sel_comm_size(c);
    char host[256] = "";
    binding mine, *all;
    int alike = 0;

    memset(&mine, 0, sizeof mine);
    gethostname(host, sizeof host - 1);
    mine.host = sel_rng_stream(host);
    if (sched_getaffinity(0, sizeof mine.cpus, &mine.cpus) != 0) CPU_SET(0, &mine.cpus);

    /* Ranks of one host that may run on the same processors share them. */
    all = calloc((size_t)size, sizeof *all);
    if (!all) {
        sel_fail(SEL_ENOMEM, "no memory for the bindings of %d ranks", size);
        sel_comm_die(c, "start");
    }
    sel_comm_gather(c, &mine, sizeof mine, all, 0);
    sel_comm_bcast(c, all, (size_t)size * sizeof *all, 0);
    for (int r = 0; r < size; r++) alike += all[r].host == mine.host && CPU_EQUAL(&all[r].cpus, &mine.cpus);
    free(all);

    const int share = sel_cpu_threads() / alike;
    *threads = wanted > 0 ? (int)wanted : share > 0 ? share : 1;
    return sel_comm_agree(c, sel_cpu_check_threads(*threads));
}
