/* tree.c: sums in a fixed tree, a block at a time that stays in the first-level cache. */
#include "dist/tree.h"

#include <string.h>

#include "core/base/error.h"

enum { BLOCK = 512, DEPTH = 12, CHUNK = 16384 };

static int left_size(int n)
{
    int left = 1;
    while (2 * left < n) left *= 2;
    return left;
}

static void add(float *restrict y, const float *restrict a, const float *restrict b, int64_t m)
{
    for (int64_t i = 0; i < m; i++) y[i] = a[i] + b[i];
}

static void add_to(float *restrict y, const float *restrict x, int64_t m)
{
    for (int64_t i = 0; i < m; i++) y[i] += x[i];
}

/* y [m] = the tree over in[0 .. n)[at .. at + m); scratch: a block for each level below. */
static void node(float *y, const float *const *in, int n, int64_t at, int64_t m, float (*scratch)[BLOCK])
{
    const int left = left_size(n);

    if (n == 1) {
        memcpy(y, in[0] + at, (size_t)m * sizeof *y);
    } else if (n == 2) {
        add(y, in[0] + at, in[1] + at, m);
    } else {
        node(y, in, left, at, m, scratch);
        if (n - left == 1) {
            add_to(y, in[left] + at, m);
        } else {
            node(scratch[0], in + left, n - left, at, m, scratch + 1);
            add_to(y, scratch[0], m);
        }
    }
}

static void sum_chunk(float *const *out, int n_out, const float *const *in, int n_in, int64_t begin, int64_t end)
{
    if (n_in == 1) {
        for (int j = 0; j < n_out; j++) memcpy(out[j] + begin, in[0] + begin, (size_t)(end - begin) * sizeof(float));
        return;
    }
    float y[BLOCK] __attribute__((aligned(64))), scratch[DEPTH][BLOCK] __attribute__((aligned(64)));

    for (int64_t at = begin; at < end; at += BLOCK) {
        const int64_t m = end - at < BLOCK ? end - at : BLOCK;
        node(y, in, n_in, at, m, scratch);
        for (int j = 0; j < n_out; j++) memcpy(out[j] + at, y, (size_t)m * sizeof *y);
    }
}

void sel_tree_sum(float *const *out, int n_out, const float *const *in, int n_in, int64_t count, int threads)
{
    const int64_t chunks = (count + CHUNK - 1) / CHUNK;

    SEL_ASSERT(n_in >= 1 && n_in <= 1 << DEPTH);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && chunks > 1)
    for (int64_t c = 0; c < chunks; c++)
        sum_chunk(out, n_out, in, n_in, c * CHUNK, (c + 1) * CHUNK < count ? (c + 1) * CHUNK : count);
}

double sel_tree_sum_doubles(const double *x, int n, int stride)
{
    if (n == 1) return x[0];
    const int left = left_size(n);
    return sel_tree_sum_doubles(x, left, stride) +
           sel_tree_sum_doubles(x + (int64_t)left * stride, n - left, stride);
}

/* Its bits are the upper 16. */
static inline uint32_t round_one(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    const uint32_t rounded = u + 0x7fff + (u >> 16 & 1), quiet = u | 0x400000;
    return (u & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
}

void sel_to_bfloat16(uint16_t *restrict y, const float *restrict x, int64_t n, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && n > CHUNK)
    for (int64_t i = 0; i < n; i++) y[i] = (uint16_t)(round_one(x[i]) >> 16);
}

void sel_from_bfloat16(float *restrict y, const uint16_t *restrict x, int64_t n, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && n > CHUNK)
    for (int64_t i = 0; i < n; i++) {
        const uint32_t u = (uint32_t)x[i] << 16;
        memcpy(&y[i], &u, sizeof u);
    }
}
