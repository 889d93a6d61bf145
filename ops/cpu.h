/* cpu.h: which instruction sets this process may use. */
#ifndef SEL_OPS_CPU_H
#define SEL_OPS_CPU_H

#include <stdint.h>
#include "core/base/error.h"

/* Rising levels; each includes the ones before. */
typedef enum { SEL_CPU_C, SEL_CPU_AVX2, SEL_CPU_AVX512, SEL_CPU_AVX512BF16 } sel_cpu_level;

/* What the processor and the system offer. */
sel_cpu_level sel_cpu_detect(void);

/* The level to use: the lowest of what the processor offers, the mask
   ("auto", "c", "avx2", "avx512", "avx512bf16") and SELECTRA_CPU.  SEL_EUSER for another word. */
sel_status sel_cpu_choose(const char *mask, sel_cpu_level *out);

const char *sel_cpu_level_name(sel_cpu_level level);

/* Processors that this process may run on, at most OpenMP's own limit (OMP_THREAD_LIMIT); at least 1. */
int sel_cpu_threads(void);

/* SEL_EUSER where OpenMP does not give that many threads (1 to 4096): kernels and libraries deal their work to them and
   would leave parts undone, or wait for ever.  Turns OpenMP's dynamic adjustment off. */
sel_status sel_cpu_check_threads(int64_t threads);

/* The processor's name as it reports it, for figures and provenance. */
const char *sel_cpu_name(void);

#endif
