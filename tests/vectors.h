/* vectors.h: what the tests of the table's operations share: arrays with rims, bounds, values that bfloat16 holds.
 *
 * u = 2^-24 is the rounding of one float32 operation.  Each bound is k u times the sum of the absolute terms; k counts
 * the roundings on the way, as the comment beside it says.  A float32 sum of n values in 2 VL lanes of at least 4 has at
 * most n / 8 + 6 roundings on any path: DEPTH(n).
 */
#ifndef SEL_TESTS_VECTORS_H
#define SEL_TESTS_VECTORS_H

#include "tests/check.h"
#include "tests/random.h"

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>
#include "ops/ops.h"
#define SEL_LEVEL c
#include "ops/vec.h"

#define U 0x1p-24
#define DEPTH(n) ((double)(n) / 8.0 + 6.0)

static const int64_t SIZES[] = { 1, 2, 15, 16, 17, 31, 33, 127, 257 };
#define COUNT(a) ((int)(sizeof(a) / sizeof *(a)))

static sel_ops ops;
static char place[160];   /* what is being tested, for messages */

#define AT(...) snprintf(place, sizeof place, __VA_ARGS__)

/* ---- data ---- */

/* 0 .. n - 1 */
static inline int32_t pick(int64_t n) { return (int32_t)(random_uniform() * (double)n); }

static float uniform(float size) { return size * (float)(2.0 * random_uniform() - 1.0); }

/* Arrays start 4 bytes past a multiple of 16 and have a rim of 17 floats on both sides. */
enum { RIM = 17, MOST_ARRAYS = 64 };
static const float RIM_VALUE = 7.25f;   /* any write changes it */
static struct { float *at; int64_t n; } arrays[MOST_ARRAYS];
static int n_arrays;

static float *array(int64_t n)
{
    float *block = malloc((size_t)(n + 2 * RIM) * sizeof *block);
    if (!block || n_arrays == MOST_ARRAYS) abort();
    for (int64_t i = 0; i < n + 2 * RIM; i++) block[i] = RIM_VALUE;
    arrays[n_arrays].at = block;
    arrays[n_arrays++].n = n;
    return block + RIM;
}

static float *noise(int64_t n, float size)
{
    float *x = array(n);
    for (int64_t i = 0; i < n; i++) x[i] = uniform(size);
    return x;
}

static inline float *integers(int64_t n)
{
    float *x = array(n);
    for (int64_t i = 0; i < n; i++) x[i] = (float)(pick(17) - 8);
    return x;
}

static inline float *copy(const float *x, int64_t n)
{
    float *y = array(n);
    memcpy(y, x, (size_t)n * sizeof *y);
    return y;
}

/* bfloat16 values; the last one touches the rim. */
static uint16_t *halves(int64_t n)
{
    return (uint16_t *)(void *)array((n + 1) / 2) + n % 2;
}

/* Checks the rims of all arrays and frees them. */
static void arrays_end(void)
{
    for (int a = 0; a < n_arrays; a++) {
        for (int64_t i = 0; i < RIM; i++)
            CHECK(arrays[a].at[i] == RIM_VALUE && arrays[a].at[RIM + arrays[a].n + i] == RIM_VALUE,
                  "%s: array %d of %" PRId64 ": rim written", place, a, arrays[a].n);
        free(arrays[a].at);
    }
    n_arrays = 0;
}

static bool same(const float *a, const float *b, int64_t n) { return memcmp(a, b, (size_t)n * sizeof *a) == 0; }

#define NEAR(got, want, bound, what, i)                                                                     \
    CHECK(fabs((double)(got) - (want)) <= (bound), "%s: %s[%" PRId64 "] = %.9g, not %.9g (bound %.3g)", place, \
          what, (int64_t)(i), (double)(got), (double)(want), (double)(bound))

/* x rounded to 8 significant bits, 2^-133 at the finest; past the largest finite value infinity. */
static double to_8_bits(double x)
{
    int power;
    if (!isfinite(x) || x == 0.0) return x;
    frexp(x, &power);
    const double unit = ldexp(1.0, (power > -125 ? power : -125) - 8), y = rint(x / unit) * unit;
    return fabs(y) < 0x1p128 ? y : x * INFINITY;
}

static float bf16_value(uint16_t y)
{
    const uint32_t bits = (uint32_t)y << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Whether each y is x rounded, signs of zeros included. */
static bool rounded(const uint16_t *y, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        const float got = bf16_value(y[i]), want = (float)to_8_bits((double)x[i]);
        if (isnan(want) ? !isnan(got) : got != want || signbit(got) != signbit(want)) return false;
    }
    return true;
}

#endif
