/* cpu.c: instruction sets and the processor's name. */
#include <omp.h>
#include <sched.h>
#include "ops/cpu.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#ifdef SEL_X86
#include <cpuid.h>
#endif

static const char *const level_names[] = { "c", "avx2", "avx512", "avx512bf16" };
#define LEVELS ((int)(sizeof level_names / sizeof level_names[0]))

/* The compiler's run-time support also asks the operating system (XGETBV) whether it saves the wide
   registers.  The features named are those that ops/CMakeLists.txt compiles each level for. */
sel_cpu_level sel_cpu_detect(void)
{
#ifdef SEL_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return SEL_CPU_C;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq"))
        return SEL_CPU_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? SEL_CPU_AVX512BF16 : SEL_CPU_AVX512;
#else
    return SEL_CPU_C;
#endif
}

/* Lowers *level to the one that `word` names; `key` is where the word was written. */
static sel_status apply_mask(const char *key, const char *word, sel_cpu_level *level)
{
    if (strcmp(word, "auto") == 0) return SEL_OK;
    for (int i = 0; i < LEVELS; i++)
        if (strcmp(word, level_names[i]) == 0) {
            if (i < (int)*level) *level = (sel_cpu_level)i;
            return SEL_OK;
        }
    return sel_fail(SEL_EUSER, "%s: \"%s\" is none of auto, c, avx2, avx512, avx512bf16", key, word);
}

sel_status sel_cpu_choose(const char *mask, sel_cpu_level *out)
{
    sel_cpu_level level = sel_cpu_detect();
    const char *env = getenv("SELECTRA_CPU");
    SEL_TRY(apply_mask("compute.cpu", mask, &level));
    if (env && *env) SEL_TRY(apply_mask("SELECTRA_CPU", env, &level));
    *out = level;
    return SEL_OK;
}

const char *sel_cpu_level_name(sel_cpu_level level)
{
    return level_names[level];
}

static char cpu_name[128];

/* Copies s without blanks at its ends; false where nothing is left. */
static bool keep_name(const char *s)
{
    s += strspn(s, " \t");
    size_t n = strcspn(s, "\n");
    while (n > 0 && (s[n - 1] == ' ' || s[n - 1] == '\t')) n--;
    if (n >= sizeof cpu_name) n = sizeof cpu_name - 1;
    memcpy(cpu_name, s, n);
    cpu_name[n] = '\0';
    return n > 0;
}

static bool name_from_proc(void)
{
    FILE *f = fopen("/proc/cpuinfo", "r");
    if (!f) return false;
    char line[512];
    bool found = false;
    while (!found && fgets(line, sizeof line, f)) {
        const char *colon = strchr(line, ':');
        found = strncmp(line, "model name", 10) == 0 && colon && keep_name(colon + 1);
    }
    fclose(f);
    return found;
}

/* CPUID leaves 0x80000002 to 0x80000004: 48 characters. */
static bool name_from_cpuid(void)
{
#ifdef SEL_X86
    unsigned brand[13] = { 0 };
    for (unsigned i = 0; i < 3; i++)
        if (!__get_cpuid(0x80000002u + i, &brand[4 * i], &brand[4 * i + 1], &brand[4 * i + 2], &brand[4 * i + 3]))
            return false;
    return keep_name((const char *)brand);
#else
    return false;
#endif
}

static void find_name(void)
{
    struct utsname system;
    if (name_from_proc() || name_from_cpuid()) return;
    if (uname(&system) == 0 && keep_name(system.machine)) return;
    keep_name("unknown");
}

const char *sel_cpu_name(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, find_name);
    return cpu_name;
}

int sel_cpu_threads(void)
{
    cpu_set_t set;
    const int own = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1, limit = omp_get_thread_limit();
    return own < limit ? own : limit;
}

sel_status sel_cpu_check_threads(int64_t threads)
{
    enum { MOST = 4096 };
    int given = 0;

    if (threads < 1 || threads > MOST)
        return sel_fail(SEL_EUSER, "%lld threads: expected 1 to %d", (long long)threads, MOST);
    omp_set_dynamic(0);   /* work is dealt to a number of threads: fewer would leave parts undone */
    #pragma omp parallel num_threads((int)threads)
    {
        #pragma omp single
        given = omp_get_num_threads();
    }
    if (given == threads) return SEL_OK;
    return sel_fail(SEL_EUSER, "OpenMP gives %d of %lld threads here (OMP_THREAD_LIMIT=%d)", given, (long long)threads,
                    omp_get_thread_limit());
}
