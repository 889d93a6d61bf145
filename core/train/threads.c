/* threads.c: how many threads a rank takes, where they run, and whether ranks get in each other's way. */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "core/base/rng.h"
#include "core/train/trainer.h"

/* What each rank tells of itself. */
typedef struct {
    uint64_t host;
    char name[64];
    cpu_set_t cpus;
    int threads;
    int sockets, caches;   /* that its processors lie in; 0: unknown */
} binding;

/* Different values that a file of sysfs has for the processors of a set; 0 where a processor has none. */
static int count_different(const cpu_set_t *cpus, const char *file)
{
    enum { MOST = 256 };
    int seen[MOST], n = 0;

    for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        char path[128];
        int value, k = 0;
        if (!CPU_ISSET(cpu, cpus)) continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%zu/%s", cpu, file);
        FILE *const f = fopen(path, "r");
        const bool read = f && fscanf(f, "%d", &value) == 1;
        if (f) fclose(f);
        if (!read) return 0;
        while (k < n && seen[k] != value) k++;
        if (k == n && n < MOST) seen[n++] = value;
    }
    return n;
}

/* "0-3,8" into out. */
static void list_cpus(char *out, size_t bytes, const cpu_set_t *cpus)
{
    size_t n = 0;

    out[0] = '\0';
    for (size_t i = 0; i < CPU_SETSIZE && n + 16 < bytes; i++) {
        if (!CPU_ISSET(i, cpus)) continue;
        size_t last = i;
        while (last + 1 < CPU_SETSIZE && CPU_ISSET(last + 1, cpus)) last++;
        n += (size_t)snprintf(out + n, bytes - n, last > i ? "%s%zu-%zu" : "%s%zu", n ? "," : "", i, last);
        i = last;
    }
}

static void add_span(char *out, size_t bytes, int n, const char *what)
{
    const size_t used = strlen(out);
    if (n > 0) snprintf(out + used, bytes - used, ", %d %s%s", n, what, n == 1 ? "" : "s");
}

/* One line on where the first host's ranks run, and how many hosts are like it; a warning where threads outnumber
   processors on any host. */
static void describe(const binding *all, int size, sel_binding *b)
{
    const binding *const first = &all[0];
    int alike = 0, hosts = 0, ranks_here = 0;
    bool apart = true;
    char cpus[96];

    memset(b, 0, sizeof *b);
    for (int r = 0; r < size; r++) {
        bool known = false;
        for (int q = 0; q < r && !known; q++) known = all[q].host == all[r].host;
        if (known) continue;
        cpu_set_t together;
        int ranks = 0, threads = 0;
        CPU_ZERO(&together);
        for (int q = r; q < size; q++) {
            cpu_set_t shared;
            if (all[q].host != all[r].host) continue;
            CPU_AND(&shared, &together, &all[q].cpus);
            if (r == 0 && CPU_COUNT(&shared) > 0) apart = false;
            CPU_OR(&together, &together, &all[q].cpus);
            ranks++;
            threads += all[q].threads;
        }
        hosts++;
        if (r == 0) ranks_here = ranks;
        alike += ranks == ranks_here && all[r].threads == first->threads &&
                 CPU_COUNT(&all[r].cpus) == CPU_COUNT(&first->cpus);
        if (threads > CPU_COUNT(&together) && !b->warning[0])
            snprintf(b->warning, sizeof b->warning,
                     "ranks share cores: on host %s %d rank%s with %d thread%s in all run on "
                     "%d processor%s; fewer ranks, or compute.threads, or a wider binding (mpirun --map-by "
                     "socket:PE=N --bind-to core) would be faster",
                     all[r].name, ranks, ranks == 1 ? "" : "s", threads, threads == 1 ? "" : "s", CPU_COUNT(&together),
                     CPU_COUNT(&together) == 1 ? "" : "s");
    }
    list_cpus(cpus, sizeof cpus, &first->cpus);
    snprintf(b->line, sizeof b->line, "%d rank%s on host %s, %d thread%s each, %s; rank 0 on processors %s", ranks_here,
             ranks_here == 1 ? "" : "s", first->name, first->threads, first->threads == 1 ? "" : "s",
             ranks_here == 1 ? "alone" : apart ? "bound apart" : "on the same processors", cpus);
    add_span(b->line, sizeof b->line, first->sockets, "socket");
    add_span(b->line, sizeof b->line, first->caches, "last-level cache");
    const size_t used = strlen(b->line);
    if (hosts > 1) snprintf(b->line + used, sizeof b->line - used, "; %d of %d hosts like this", alike, hosts);
}

sel_status sel_threads_choose(sel_comm *c, int64_t wanted, int *threads, sel_binding *b)
{
    const int size = sel_comm_size(c);
    binding mine, *all;
    int alike = 0;

    memset(&mine, 0, sizeof mine);
    gethostname(mine.name, sizeof mine.name - 1);
    mine.host = sel_rng_stream(mine.name);
    if (sched_getaffinity(0, sizeof mine.cpus, &mine.cpus) != 0) CPU_SET(0, &mine.cpus);
    mine.sockets = count_different(&mine.cpus, "topology/physical_package_id");
    mine.caches = count_different(&mine.cpus, "cache/index3/id");

    /* Ranks of one host that may run on the same processors share them. */
    all = calloc((size_t)size, sizeof *all);
    if (!all) {
        sel_fail(SEL_ENOMEM, "no memory for the bindings of %d ranks", size);
        sel_comm_die(c, "start");
    }
    sel_comm_gather(c, &mine, sizeof mine, all, 0);
    sel_comm_bcast(c, all, (size_t)size * sizeof *all, 0);
    for (int r = 0; r < size; r++) alike += all[r].host == mine.host && CPU_EQUAL(&all[r].cpus, &mine.cpus);

    const int share = sel_cpu_threads() / alike;
    *threads = wanted > 0 ? (int)wanted : share > 0 ? share : 1;
    mine.threads = *threads;
    sel_comm_gather(c, &mine, sizeof mine, all, 0);
    if (sel_comm_rank(c) == 0) describe(all, size, b);
    free(all);
    return sel_comm_agree(c, sel_cpu_check_threads(*threads));
}
