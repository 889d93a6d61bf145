/* vec.h: the vectors of the portable kernels: as wide as the level that a file is compiled for.
 *
 * GCC's and clang's generic vectors: arithmetic, comparison and shuffles without a
 * word of any instruction set, but for exp (vec_avx512.h).  A kernel file includes this, writes its functions as
 * SEL_FN(name), and is compiled once a level.
 */
#ifndef SEL_OPS_VEC_H
#define SEL_OPS_VEC_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define SEL_PASTE_(a, b) a##_##b
#define SEL_PASTE(a, b) SEL_PASTE_(a, b)
#define SEL_FN(name) SEL_PASTE(name, SEL_LEVEL)   /* sel_add -> sel_add_avx2 */

#if defined(__AVX512F__)
#include "ops/vec_avx512.h"
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4
#endif

typedef float   vf __attribute__((vector_size(4 * VL), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * VL), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * VL), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * VL), may_alias));
typedef float   vf_u __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef uint16_t vh_u __attribute__((vector_size(2 * VL), aligned(2), may_alias));

static inline vf vload(const float *p) { return *(const vf_u *)p; }
static inline void vstore(float *p, vf x) { *(vf_u *)p = x; }

/* Asks for what a walk along x comes to 2 KiB later: the processor's own prefetching stops at the end of each page. */
static inline void vfetch(const float *x) { __builtin_prefetch(x + 512); }

/* The first n of them where n < VL; the other lanes are 0, or not stored. */
static inline vf vload_n(const float *p, int64_t n)
{
    if (n >= VL) return vload(p);
    float lane[VL] = { 0 };
    for (int64_t i = 0; i < n; i++) lane[i] = p[i];
    return vload(lane);
}

static inline void vstore_n(float *p, vf x, int64_t n)
{
    if (n >= VL) {
        vstore(p, x);
        return;
    }
    float lane[VL];
    vstore(lane, x);
    for (int64_t i = 0; i < n; i++) p[i] = lane[i];
}

static inline vf vset1(float x) { return x - (vf){ 0 }; }

/* a where the mask's lanes are all ones, b where they are zero. */
static inline vf vselect(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
static inline vf vmax(vf a, vf b) { return vselect(a > b, a, b); }
static inline vf vmin(vf a, vf b) { return vselect(a < b, a, b); }

/* Lanes rounded to bfloat16, to nearest even: float32 whose 16 low bits are 0.  NaN stays NaN, and quiet. */
static inline vf vround_bf16(vf x)
{
    const vu bits = (vu)x, rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    const vf y = vselect(x == x, (vf)rounded, (vf)(bits | 0x400000u));
    return (vf)((vu)y & 0xffff0000u);
}

/* The first n lanes (at most all) as bfloat16. */
static inline void vstore_bf16(uint16_t *p, vf x, int64_t n)
{
    const vh y = __builtin_convertvector((vu)vround_bf16(x) >> 16, vh);
    if (n >= VL) memcpy(p, &y, sizeof y);
    else memcpy(p, &y, (size_t)n * sizeof *p);
}

/* VL values of bfloat16 as float32, of which they are the upper halves. */
static inline vf vload_bf16(const uint16_t *p)
{
#if VL == 16   /* wide vectors: one shuffle with zeros, where a conversion would be made in halves */
    return (vf)__builtin_shufflevector((vh){ 0 }, *(const vh_u *)p, 0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21, 0, 22, 0,
                                       23, 0, 24, 0, 25, 0, 26, 0, 27, 0, 28, 0, 29, 0, 30, 0, 31);
#elif VL == 8
    return (vf)__builtin_shufflevector((vh){ 0 }, *(const vh_u *)p, 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0,
                                       15);
#else
    return (vf)(__builtin_convertvector(*(const vh_u *)p, vu) << 16);
#endif
}

/* The first n of them where n < VL; the other lanes are 0. */
static inline vf vload_bf16_n(const uint16_t *p, int64_t n)
{
    if (n >= VL) return vload_bf16(p);
    uint16_t lane[VL] = { 0 };
    for (int64_t i = 0; i < n; i++) lane[i] = p[i];
    return vload_bf16(lane);
}

/* The first n lanes (at most all) from element `at` on of an array that is bfloat16 or float32: as for vstore_as. */
static inline vf vload_as(bool bfloat16, const void *p, int64_t at, int64_t n)
{
    return bfloat16 ? vload_bf16_n((const uint16_t *)p + at, n) : vload_n((const float *)p + at, n);
}

/* The first n lanes to element `at` of an array that is bfloat16 or float32: `bfloat16` is constant where inlined. */
static inline void vstore_as(bool bfloat16, void *p, int64_t at, vf x, int64_t n)
{
    if (bfloat16) vstore_bf16((uint16_t *)p + at, x, n);
    else vstore_n((float *)p + at, x, n);
}

static inline vf vsqrt(vf x)
{
    float lane[VL];
    vstore(lane, x);
    for (int i = 0; i < VL; i++) lane[i] = sqrtf(lane[i]);   /* one instruction with -fno-math-errno */
    return vload(lane);
}

static inline float vsum(vf x)
{
    typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
    float lane[VL];
    vstore(lane, x);
    v4 s = *(const v4 *)lane;                            /* by fours: all lanes in a row would wait for each other */
    for (int i = 4; i < VL; i += 4) s += *(const v4 *)(lane + i);
    return (s[0] + s[2]) + (s[1] + s[3]);
}

/* exp(x) within 2 ulp for x in [-87.3, 88.7]; below that exactly 0, -inf included;
   above it +inf; NaN gives NaN.  x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts. */
static inline vf vexp(vf x)
{
#if VL == 16
    return (vf)sel_exp_avx512((__m512)x);
#else
    const vf lo = vset1(-87.33654f), hi = vset1(88.72284f), magic = vset1(12582912.0f);
    const vf xc = vmin(vmax(x, lo), hi);                 /* NaN goes to lo here, restored below */
    const vf t = xc * 1.44269504f + magic;               /* n in the low bits */
    const vf n = t - magic;
    const vf r = (xc - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = vset1(1.9875691500e-4f);                      /* Cephes expf's polynomial */
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    /* 2^n in two factors, so that n = 128 does not overflow the exponent's field */
    const vi e = (vi)t - (vi)magic;
    const vi e1 = e >> 1, e2 = e - e1;
    vf y = p * (vf)((e1 + 127) << 23) * (vf)((e2 + 127) << 23);
    y = vselect(x < lo, vset1(0.0f), y);
    y = vselect(x > hi, vset1(__builtin_inff()), y);
    return vselect(x != x, x, y);
#endif
}

#endif
