/* attention_words.h: fused selective attention for AVX-512: one text for float32 and bfloat16 operands.
 *
 * Included by attention_avx512.c (WORD_BF16 0) and attention_avx512bf16.c (WORD_BF16 1).  A "word" is 32 bits of
 * operand: one float, or a pair of bfloat16 that vdpbf16ps multiplies and adds at once.  All sums are float32.
 *
 * As in attention_tile.h queries lie in the lanes and every product is
 *     C[m][n] += sum over k of A[m,k] B[k][n]        A broadcast word by word, n in the lanes,
 * in blocks of 8 x 32 results.  What the portable kernel does in passes happens here on results that are still in
 * registers: a block of logits starts at -F - m instead of 0 and is exponentiated before it is stored.
 *
 * Units: logits, S, F and carries are raw here, q . k without 1 / sqrt(dh), so that bfloat16 operands are the inputs
 * themselves; exp(L - F - m) is exp2(c x - m) with c = log2(e) / sqrt(dh): one multiply-add.  m and lse are in units
 * of log2.  What crosses the interface is natural.
 *
 * The row maximum is lazy: m is the largest of a row's first 8 logits (column 0, whose F is 0, among them) and stays
 * until a tile's sum passes 2^30 or is not finite; then the tile is done again with its true maximum.  Any m gives the
 * exact softmax.
 */
#ifndef SEL_OPS_ATTENTION_WORDS_H
#define SEL_OPS_ATTENTION_WORDS_H

#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "ops/attention_plan.h"

#define LOG2E 1.44269504088896341
#define LN2   0.693147180559945309

#define INLINE static inline __attribute__((always_inline))

/* gcc (12) would take the products to where their sum is needed, past the exponentials: their factors, 80 vectors, then
   have to be kept in memory. */
#define HERE(x) __asm__ volatile("" : "+v"(x))
#define APART    static __attribute__((noinline))   /* inlined in one another they are short of registers, too */

enum {
    V16 = 16,                           /* floats of a vector */
    PAIR = WORD_BF16 ? 2 : 1,           /* operand values in a word */
    TILE_WORDS = TILE / PAIR            /* words that a tile's side takes where it is summed over */
};

typedef uint32_t word;

/* What the caller's arrays of operands hold. */
#if WORD_BF16
typedef uint16_t operand;
#else
typedef float operand;
#endif

INLINE const operand *operands(const void *x) { return x; }

INLINE __m512 dot(__m512 acc, __m512i a, __m512i b)
{
#if WORD_BF16
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc);
#endif
}

/* acc[r][v] += sum over k of A[r am + k ak] * B[k ldb + 16 v ..]; mr, nv constant where inlined. */
INLINE void block_sum(const int mr, const int nv, int64_t K, const word *A, int64_t am, int64_t ak, const word *B,
                      int64_t ldb, __m512 acc[8][2])
{
    for (int64_t k = 0; k < K; k++) {
        __m512i b[2];
        for (int v = 0; v < nv; v++) b[v] = _mm512_loadu_si512(B + k * ldb + v * V16);
        #pragma GCC unroll 8
        for (int r = 0; r < mr; r++) {
            const __m512i x = _mm512_set1_epi32((int)A[r * am + k * ak]);
            for (int v = 0; v < nv; v++) acc[r][v] = dot(acc[r][v], x, b[v]);
        }
    }
}

INLINE void product_block(const int mr, const int nv, int64_t K, const word *A, int64_t am, int64_t ak, const word *B,
                          int64_t ldb, float *C, int64_t ldc, bool fresh)
{
    __m512 acc[8][2];
    #pragma GCC unroll 8
    for (int r = 0; r < mr; r++)
        for (int v = 0; v < nv; v++) acc[r][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(C + r * ldc + v * V16);
    block_sum(mr, nv, K, A, am, ak, B, ldb, acc);
    #pragma GCC unroll 8
    for (int r = 0; r < mr; r++)
        for (int v = 0; v < nv; v++) _mm512_storeu_ps(C + r * ldc + v * V16, acc[r][v]);
}

/* C [M][32] (+)= A B over words k in [0, K) */
INLINE void product_32(int64_t M, int64_t K, const word *A, int64_t am, int64_t ak, const word *B, int64_t ldb,
                       float *C, int64_t ldc, bool fresh)
{
    int64_t m = 0;
    for (; m + 8 <= M; m += 8) product_block(8, 2, K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, fresh);
    for (; m < M; m++) product_block(1, 2, K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, fresh);
}

#if WORD_BF16
/* 2^x to 2.4e-4, where rounding to bfloat16 costs 3.9e-3: x = k / 16 + f, |f| <= 1/32, and 2^(k / 16) (1 + ln 2 f) from
   tables.  Half as many multiply-adds as a polynomial takes, and those are what products need, too.  The last bits of
   x + 3/2 2^19 are k; where they are not, 2^x is 0 or infinite.  2^0 = 1: a row that sees one key gives its value
   exactly; -1e30 and -inf give exactly 0. */
INLINE __m512 exp2_ps(__m512 x)
{
    static const float value[16] __attribute__((aligned(64))) = {
        1.0f,        1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
        1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f
    };
    static const float slope[16] __attribute__((aligned(64))) = {
        0.693201363f, 0.723892033f, 0.755941451f, 0.789409876f, 0.824360013f, 0.860857546f, 0.898970962f, 0.938771844f,
        0.980334818f, 1.02373791f, 1.06906271f, 1.11639416f, 1.16582108f, 1.21743643f, 1.27133691f, 1.32762384f
    };
    const __m512 shift = _mm512_set1_ps(0x1.8p19f), y = _mm512_add_ps(x, shift), n = _mm512_sub_ps(y, shift);
    const __m512i k = _mm512_castps_si512(y);
    const __m512 a = _mm512_permutexvar_ps(k, _mm512_load_ps(value));
    const __m512 b = _mm512_permutexvar_ps(k, _mm512_load_ps(slope));
    return _mm512_scalef_ps(_mm512_fmadd_ps(_mm512_sub_ps(x, n), b, a), n);
}
#else
/* 2^x by the polynomial on [-1/2, 1/2] that is least wrong among those with p(0) = 1: a row that sees one key gives its
   value exactly.  Relative error 1.6e-7, within 2 units in the last place; -1e30 and -inf give exactly 0. */
INLINE __m512 exp2_ps(__m512 x)
{
    const __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(0.00131972539f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00967125814f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0555094989f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240222474f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693146835f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}
#endif

/* Transposes 16 x 16 words in registers: row r of a becomes column r. */
INLINE void transpose_registers(__m512i a[16])
{
    __m512i b[16];
    #pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
    #pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
        a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
        a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
        a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
        a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
    #pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        b[r] = _mm512_shuffle_i32x4(a[r], a[r + 4], 0x88);
        b[r + 4] = _mm512_shuffle_i32x4(a[r], a[r + 4], 0xdd);
        b[r + 8] = _mm512_shuffle_i32x4(a[r + 8], a[r + 12], 0x88);
        b[r + 12] = _mm512_shuffle_i32x4(a[r + 8], a[r + 12], 0xdd);
    }
    #pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        a[r] = _mm512_shuffle_i32x4(b[r], b[r + 8], 0x88);
        a[r + 4] = _mm512_shuffle_i32x4(b[r + 4], b[r + 12], 0x88);
        a[r + 8] = _mm512_shuffle_i32x4(b[r], b[r + 8], 0xdd);
        a[r + 12] = _mm512_shuffle_i32x4(b[r + 4], b[r + 12], 0xdd);
    }
}

INLINE __m256i load_half(const void *x) { return _mm256_loadu_si256((const __m256i *)x); }

/* 16 words of x, or 8 and zeros where there is no more. */
INLINE __m512i words_16(const operand *x, bool half)
{
    return half ? _mm512_zextsi256_si512(load_half(x)) : _mm512_loadu_si512(x);
}

/* n values of x as n / PAIR words (n a multiple of 16). */
INLINE void row_words(word *w, const operand *x, int64_t n)
{
    int64_t d = 0;
    for (; d + 16 * PAIR <= n; d += 16 * PAIR) _mm512_storeu_si512(w + d / PAIR, _mm512_loadu_si512(x + d));
    if (d < n) _mm256_storeu_si256((__m256i *)(void *)(w + d / PAIR), load_half(x + d));
}

/* 16 lanes, from i on, of X [n / PAIR][TILE]: words of `rows` rows of x (x_row values apart, n of them each), rows in
   the lanes, zeros in those beyond. */
INLINE void transpose_lanes(word *X, const operand *x, int64_t x_row, int i, int rows, int64_t n)
{
    for (int64_t d = 0; d < n; d += 16 * PAIR) {
        const bool half = n - d < 16 * PAIR;
        __m512i a[16];
        #pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            a[r] = i + r < rows ? words_16(x + (i + r) * x_row + d, half) : _mm512_setzero_si512();
        transpose_registers(a);
        #pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            if (r < 8 || !half) _mm512_storeu_si512(X + (d / PAIR + r) * TILE + i, a[r]);
    }
}

/* All lanes; of at most 32 rows no more than 32. */
INLINE void transpose_words(word *X, const operand *x, int64_t x_row, int rows, int64_t n)
{
    for (int i = 0; i < (rows > 32 ? TILE : 32); i += 16) transpose_lanes(X, x, x_row, i, rows, n);
}

#if WORD_BF16
/* Two rows of bfloat16 in one vector, low half and high half, woven: word l = (low[l], high[l]). */
INLINE __m512i weave_halves(__m512i x)
{
    return _mm512_permutexvar_epi16(
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                         3, 18, 2, 17, 1, 16, 0), x);
}

/* Word (r / 2, d) = (x[r][d], x[r + 1][d]): n values (a multiple of 16) of two rows; b may be NULL: zeros. */
INLINE void pair_rows(word *w, const operand *a, const operand *b, int64_t n)
{
    for (int64_t d = 0; d < n; d += 16) {
        const __m512i low = _mm512_castsi256_si512(load_half(a + d));
        const __m256i high = b ? load_half(b + d) : _mm256_setzero_si256();
        _mm512_storeu_si512(w + d, weave_halves(_mm512_inserti64x4(low, high, 1)));
    }
}
#endif

/* ---- which queries see which keys ---- */

/* Query lane i < lanes (32 or 64) sees the keys i + low <= j <= i + off of a tile: low and off beyond +-TILE say no
   more than +-TILE. */
typedef struct {
    int low, off, lanes;
} tile_view;

INLINE int within_tile(int64_t x) { return x < -TILE ? -TILE : x > TILE ? TILE : (int)x; }

INLINE tile_view view_of(int64_t off, int64_t window, int rows)
{
    return (tile_view){ .off = within_tile(off), .low = window ? within_tile(off - window + 1) : -TILE,
                        .lanes = rows > 32 ? 64 : 32 };
}

/* v .. v + 15 */
INLINE __m512i lanes_from(int v)
{
    return _mm512_add_epi32(_mm512_set1_epi32(v),
                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

/* Lanes v .. v + 15 that see key j. */
INLINE __mmask16 in_view(const tile_view *view, int v, int j)
{
    const __m512i i = lanes_from(v);
    return _mm512_mask_cmple_epi32_mask(_mm512_cmpge_epi32_mask(i, _mm512_set1_epi32(j - view->off)), i,
                                        _mm512_set1_epi32(j - view->low));
}

/* Lanes v .. v + 15 that see key j where there is no window: query lane i does where i + off >= j. */
INLINE __mmask16 sees(int v, int64_t j, int64_t off)
{
    return _mm512_cmpge_epi32_mask(lanes_from(v), _mm512_set1_epi32(within_tile(j - off)));
}

/* Blocks of 8 keys, [first, end), that hold all keys which the lanes v .. v + 15 see. */
INLINE int first_block(const tile_view *view, int v)
{
    const int first = v + view->low;
    return first <= 0 ? 0 : first >= TILE ? TILE / 8 : first / 8;
}
INLINE int end_block(const tile_view *view, int v)
{
    const int end = v + V16 + view->off;
    return end >= TILE ? TILE / 8 : end <= 0 ? 0 : (end + 7) / 8;
}

#define HIDDEN (-1e30f)

/* y[l] = sum of x[0 .. l], or of x[l .. 15] */
INLINE __m512 scan_up(__m512 x)
{
    const __m512i zero = _mm512_setzero_si512();
    x = _mm512_add_ps(x, _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(x), zero, 15)));
    x = _mm512_add_ps(x, _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(x), zero, 14)));
    x = _mm512_add_ps(x, _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(x), zero, 12)));
    return _mm512_add_ps(x, _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(x), zero, 8)));
}
INLINE __m512 scan_down(__m512 x)
{
    const __m512i zero = _mm512_setzero_si512();
    x = _mm512_add_ps(x, _mm512_castsi512_ps(_mm512_alignr_epi32(zero, _mm512_castps_si512(x), 1)));
    x = _mm512_add_ps(x, _mm512_castsi512_ps(_mm512_alignr_epi32(zero, _mm512_castps_si512(x), 2)));
    x = _mm512_add_ps(x, _mm512_castsi512_ps(_mm512_alignr_epi32(zero, _mm512_castps_si512(x), 4)));
    return _mm512_add_ps(x, _mm512_castsi512_ps(_mm512_alignr_epi32(zero, _mm512_castps_si512(x), 8)));
}

/* Lanes v .. v + 15 whose logit of key j S takes: seen, a real row, not protected. */
INLINE __mmask16 selects(const sel_attention *a, const tile_view *view, int v, int j, int64_t col0, int rows)
{
    const __m512i i = lanes_from(v);
    if (a->protect_bos && col0 + j == 0) return 0;
    const __mmask16 seen = _mm512_mask_cmplt_epi32_mask(in_view(view, v, j), i, _mm512_set1_epi32(rows));
    return a->protect_self ? _mm512_mask_cmpneq_epi32_mask(seen, i, _mm512_set1_epi32(j - view->off)) : seen;
}

/* Selection of a tile: from what it is made of, logits [j][TILE], to -F; carry [cols] of its columns moves on past its
 * rows. */
static void select_words(const sel_attention *a, const float *raw, float *NF, float *carry, int rows, int cols,
                         int lanes, int64_t col0, int64_t off)
{
    const __m512 zero = _mm512_setzero_ps();
    const bool relu = a->relu, shift = a->shift;
    const tile_view view = view_of(off, a->window, rows);
    /* keys before `whole` are seen by all rows and are none of them */
    const int64_t whole = rows == lanes && (a->window == 0 || off + TILE <= a->window) ? off : 0;
    for (int j = 0; j < cols; j++) {
        const bool all = j < whole && (col0 + j > 0 || !a->protect_bos);
        __m512 base = _mm512_set1_ps(-carry[j]);
        for (int v = 0; v < lanes; v += V16) {
            __m512 s = _mm512_loadu_ps(raw + j * TILE + v);
            if (relu) s = _mm512_max_ps(s, zero);
            if (!all) s = _mm512_maskz_mov_ps(selects(a, &view, v, j, col0, rows), s);
            const __m512 sum = scan_up(s);
            const __m512 before =
                _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(sum), _mm512_setzero_si512(), 15));
            _mm512_storeu_ps(NF + j * TILE + v, _mm512_sub_ps(base, shift ? before : sum));
            base = _mm512_sub_ps(base, _mm512_permutexvar_ps(_mm512_set1_epi32(15), sum));
        }
        carry[j] = -_mm512_cvtss_f32(base);
    }
    for (int j = cols; j < TILE; j++)   /* keys that do not exist */
        for (int v = 0; v < lanes; v += V16) _mm512_storeu_ps(NF + j * TILE + v, _mm512_set1_ps(HIDDEN));
}

#endif
