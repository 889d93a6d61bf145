/* rng.h: random numbers as pure functions of (seed, stream, index).
 *
 * Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
 * SC 2011): a counter goes in, random words come out, no state.  Hence values
 * that do not depend on ranks, threads or order.
 */
#ifndef SEL_CORE_BASE_RNG_H
#define SEL_CORE_BASE_RNG_H

#include <stdint.h>

/* 128 random bits of (seed, stream, index). */
void sel_philox(uint32_t out[4], uint64_t seed, uint64_t stream, uint64_t index);

/* One uniform number in (0, 1), 53 random bits, of (seed, stream, index). */
double sel_rng_uniform(uint64_t seed, uint64_t stream, uint64_t index);

/* 64-bit FNV-1a of a name, to make a stream of a tensor's name. */
uint64_t sel_rng_stream(const char *name);

/* A permutation of 0 .. n-1 that needs no memory: where `i` goes under (seed,
   stream).  n >= 1, i < n.  (Feistel network over the next even power of two,
   walked until it falls below n: expected under four rounds.) */
uint64_t sel_rng_permute(uint64_t seed, uint64_t stream, uint64_t n, uint64_t i);

#endif
