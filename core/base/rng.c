/* rng.c: Philox4x32-10, and a permutation built on it. */
#include "core/base/rng.h"

#include "core/base/error.h"

#define ROUNDS 10
#define FEISTEL_ROUNDS 8 /* 4 suffice for wide halves; halves of few bits mix slowly */

void sel_philox(uint32_t out[4], uint64_t seed, uint64_t stream, uint64_t index)
{
    /* Counter (index, stream), key (seed), low words first. */
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32);
    uint32_t c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);

    for (int round = 0; round < ROUNDS; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53U * c0;
        const uint64_t p1 = (uint64_t)0xCD9E8D57U * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        /* The key's Weyl sequence: the golden ratio and sqrt(3) - 1. */
        k0 += 0x9E3779B9U;
        k1 += 0xBB67AE85U;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

double sel_rng_uniform(uint64_t seed, uint64_t stream, uint64_t index)
{
    uint32_t words[4];
    sel_philox(words, seed, stream, index);
    const uint64_t bits = ((uint64_t)words[0] << 32 | words[1]) >> 11;
    /* Multiples of 2^-53; zero itself is moved to the middle of its interval. */
    return bits ? (double)bits * 0x1p-53 : 0x1p-54;
}

uint64_t sel_rng_stream(const char *name)
{
    uint64_t hash = 0xCBF29CE484222325ULL;
    for (const char *p = name; *p; p++) {
        hash ^= (unsigned char)*p;
        hash *= 0x100000001B3ULL;
    }
    return hash;
}

/* One pass of the network over 2 * half bits: (l, r) -> (r, l ^ f(round, r)). */
static uint64_t feistel(uint64_t seed, uint64_t stream, int half, uint64_t x)
{
    const uint64_t mask = ((uint64_t)1 << half) - 1;
    uint64_t left = x >> half, right = x & mask;

    for (uint64_t round = 0; round < FEISTEL_ROUNDS; round++) {
        uint32_t words[4];
        sel_philox(words, seed, stream, round << 32 | right);
        const uint64_t next = left ^ (words[0] & mask);
        left = right;
        right = next;
    }
    return left << half | right;
}

uint64_t sel_rng_permute(uint64_t seed, uint64_t stream, uint64_t n, uint64_t i)
{
    SEL_ASSERT(n >= 1 && i < n);
    if (n == 1) return 0;

    int half = 1; /* 4^half >= n */
    while (half < 32 && ((uint64_t)1 << (2 * half)) < n) half++;

    /* Walking along the cycle from below n to below n again is itself a permutation. */
    uint64_t x = i;
    do x = feistel(seed, stream, half, x);
    while (x >= n);
    return x;
}
