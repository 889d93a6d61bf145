/* random.h: test data that are the same on every machine and compiler: xorshift64*, one state a program. */
#ifndef SEL_TESTS_RANDOM_H
#define SEL_TESTS_RANDOM_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

static uint64_t random_state = 1;

/* seed >= 0; nearby seeds give unrelated numbers. */
static inline void random_seed(uint64_t seed)
{
    random_state = (seed + 1) * 0x9e3779b97f4a7c15u;
}

/* In (0, 1). */
static inline double random_uniform(void)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return ((double)((random_state * 0x2545f4914f6cdd1du) >> 11) + 0.5) / 9007199254740992.0;
}

static inline double random_normal(void)
{
    const double r = sqrt(-2.0 * log(random_uniform()));
    return r * cos(6.283185307179586 * random_uniform());
}

static inline double *random_normals(int64_t n)
{
    double *x = malloc((size_t)(n > 0 ? n : 1) * sizeof *x);
    if (!x) abort();
    for (int64_t i = 0; i < n; i++) x[i] = random_normal();
    return x;
}

#endif
