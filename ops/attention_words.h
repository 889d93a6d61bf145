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
 * Units: logits, S, F and carries are raw here, q . k without 1 / sqrt(dh), so that bfloat16 operands are the inputs'
 * own roundings; exp(L - F - m) is exp2(c x - m) with c = log2(e) / sqrt(dh): one multiply-add.  m and lse are in units
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

enum {
    V16 = 16,                           /* floats of a vector */
    PAIR = WORD_BF16 ? 2 : 1,           /* operand values in a word */
    TILE_WORDS = TILE / PAIR            /* words that a tile's side takes where it is summed over */
};

typedef uint32_t word;

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

/* 2^x by polynomials on [-1/2, 1/2] that are least wrong among those with p(0) = 1: a row that sees one key gives its
   value exactly.  Relative error 1.6e-7 (within 2 units in the last place) for float32 operands, 1.1e-4 for bfloat16
   ones, whose own rounding is 3.9e-3; -1e30 and -inf give exactly 0. */
INLINE __m512 exp2_ps(__m512 x)
{
    const __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n);
#if WORD_BF16
    __m512 p = _mm512_set1_ps(0.0550089313f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24221096f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693282927f));
#else
    __m512 p = _mm512_set1_ps(0.00131972539f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00967125814f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0555094989f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240222474f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693146835f));
#endif
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

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

/* Row r of src (src_row words apart, `rows` of them, the rest zero) to column r of dst. */
INLINE void transpose_16(word *dst, int64_t dst_row, const word *src, int64_t src_row, int rows)
{
    __m512i a[16];
    for (int r = 0; r < 16; r++) a[r] = r < rows ? _mm512_loadu_si512(src + r * src_row) : _mm512_setzero_si512();
    transpose_registers(a);
    for (int r = 0; r < 16; r++) _mm512_storeu_si512(dst + r * dst_row, a[r]);
}

/* 16 words of x; bfloat16: of 32 values, or of 16 and zeros where there is no more. */
INLINE __m512i words_16(const float *x, bool half)
{
#if WORD_BF16
    return (__m512i)_mm512_cvtne2ps_pbh(half ? _mm512_setzero_ps() : _mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
#else
    (void)half;
    return _mm512_loadu_si512(x);
#endif
}

/* n values of x as n / PAIR words (n a multiple of 16). */
INLINE void row_words(word *w, const float *x, int64_t n)
{
    int64_t d = 0;
    for (; d + 16 * PAIR <= n; d += 16 * PAIR) _mm512_storeu_si512(w + d / PAIR, words_16(x + d, false));
    if (d < n) _mm256_storeu_si256((__m256i *)(void *)(w + d / PAIR), _mm512_castsi512_si256(words_16(x + d, true)));
}

/* X [n / PAIR][TILE] words: words of `rows` rows of x (x_row floats apart, n values each), rows in the lanes; of at
   most 32 rows no more lanes than 32. */
INLINE void transpose_words(word *X, const float *x, int64_t x_row, int rows, int64_t n)
{
    for (int i = 0; i < (rows > 32 ? TILE : 32); i += 16)
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

#if WORD_BF16
/* Two rows of bfloat16 in one vector, low half and high half, woven: word l = (low[l], high[l]). */
INLINE __m512i weave_halves(__m512i x)
{
    return _mm512_permutexvar_epi16(
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                         3, 18, 2, 17, 1, 16, 0), x);
}

/* Word (r / 2, d) = (x[r][d], x[r + 1][d]): n values (a multiple of 16) of two rows; b may be NULL: zeros. */
INLINE void pair_rows(word *w, const float *a, const float *b, int64_t n)
{
    for (int64_t d = 0; d < n; d += 16) {
        const __m512 low = _mm512_loadu_ps(a + d), high = b ? _mm512_loadu_ps(b + d) : _mm512_setzero_ps();
        _mm512_storeu_si512(w + d, weave_halves((__m512i)_mm512_cvtne2ps_pbh(high, low)));
    }
}
#endif

/* Lanes of 32 results of a product whose B was woven by unpacklo and unpackhi, back in the order of the queries. */
INLINE void unweave(__m512 x[2])
{
#if WORD_BF16
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512d a = _mm512_castps_pd(x[0]), b = _mm512_castps_pd(x[1]);
    x[0] = _mm512_castpd_ps(_mm512_permutex2var_pd(a, low, b));
    x[1] = _mm512_castpd_ps(_mm512_permutex2var_pd(a, high, b));
#else
    (void)x;
#endif
}

/* ---- which queries see which keys ---- */

/* Query lane i < lanes (32 or 64) sees the keys i + low <= j <= i + off. */
typedef struct {
    int64_t low, off;
    int lanes;
} tile_view;

INLINE tile_view view_of(int64_t off, int64_t window, int rows)
{
    return (tile_view){ .off = off, .low = window ? off - window + 1 : INT64_MIN / 2, .lanes = rows > 32 ? 64 : 32 };
}

/* Lanes v .. v + 15 that see key j. */
INLINE __mmask16 in_view(const tile_view *view, int v, int j)
{
    const int64_t first = j - view->off - v, last = j - view->low - v;
    const unsigned late = first <= 0 ? 0xffffu : first > 15 ? 0 : 0xffffu << first;
    const unsigned early = last >= 15 ? 0xffffu : last < 0 ? 0 : 0xffffu >> (15 - last);
    return (__mmask16)(late & early);
}

/* Blocks of 8 keys, [first, end), that hold all keys which the lanes v .. v + 15 see. */
INLINE int first_block(const tile_view *view, int v)
{
    const int64_t first = v + view->low;
    return first <= 0 ? 0 : first >= TILE ? TILE / 8 : (int)(first / 8);
}
INLINE int end_block(const tile_view *view, int v)
{
    const int64_t end = v + V16 + view->off;
    return end >= TILE ? TILE / 8 : end <= 0 ? 0 : (int)((end + 7) / 8);
}

/* Lanes v .. v + 15 that see key j where there is no window: query lane i does where i + off >= j. */
INLINE __mmask16 sees(int v, int j, int64_t off)
{
    const int64_t first = j - off - v;   /* the first lane that does */
    return (__mmask16)(first <= 0 ? 0xffff : first > 15 ? 0 : 0xffff << first);
}

/* Keys of a tile that some of the 32 queries from lane v0 on sees, rounded up to whole blocks of 8, in blocks. */
INLINE int seen_blocks(int v0, int64_t off)
{
    const int64_t seen = v0 + 32 + off;
    return seen >= TILE ? TILE / 8 : seen <= 0 ? 0 : (int)((seen + 7) / 8);
}

#define HIDDEN (-1e30f)

INLINE void hide(__m512 x[8][2], int v0, int j0, int64_t off)
{
    const __m512 hidden = _mm512_set1_ps(HIDDEN);
    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++)
        for (int v = 0; v < 2; v++) x[r][v] = _mm512_mask_blend_ps(sees(v0 + v * V16, j0 + r, off), hidden, x[r][v]);
}

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

/* Lanes of key j whose logit S takes: seen, a real row, not protected. */
INLINE __mmask16 selects(const sel_attention *a, int v, int j, int64_t col0, int64_t off, int rows)
{
    if (a->protect_bos && col0 + j == 0) return 0;
    const tile_view view = view_of(off, a->window, rows);
    __mmask16 lanes = in_view(&view, v, j);
    if (rows < v + V16) lanes &= (__mmask16)(rows <= v ? 0 : 0xffff >> (v + V16 - rows));
    const int64_t own = j - off - v;
    if (a->protect_self && own >= 0 && own < V16) lanes &= (__mmask16)~(1u << own);
    return lanes;
}

/* Selection of a tile: from what it is made of, logits [j][TILE], to -F; carry [cols] of its columns moves on past its
 * rows. */
static void select_words(const sel_attention *a, const float *raw, float *NF, float *carry, int rows, int cols,
                         int lanes, int64_t col0, int64_t off)
{
    const __m512 zero = _mm512_setzero_ps();
    const bool relu = a->relu, shift = a->shift;
    /* keys before `whole` are seen by all rows and are none of them */
    const int64_t whole = rows == lanes && (a->window == 0 || off + TILE <= a->window) ? off : 0;
    for (int j = 0; j < cols; j++) {
        const bool all = j < whole && (col0 + j > 0 || !a->protect_bos);
        __m512 base = _mm512_set1_ps(carry[j]);
        for (int v = 0; v < lanes; v += V16) {
            __m512 s = _mm512_loadu_ps(raw + j * TILE + v);
            if (relu) s = _mm512_max_ps(s, zero);
            if (!all) s = _mm512_maskz_mov_ps(selects(a, v, j, col0, off, rows), s);
            const __m512 sum = scan_up(s);
            const __m512 before =
                _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(sum), _mm512_setzero_si512(), 15));
            const __m512 f = _mm512_add_ps(shift ? before : sum, base);
            _mm512_storeu_ps(NF + j * TILE + v, _mm512_sub_ps(zero, f));
            base = _mm512_add_ps(base, _mm512_permutexvar_ps(_mm512_set1_epi32(15), sum));
        }
        carry[j] = _mm512_cvtss_f32(base);
    }
    for (int j = cols; j < TILE; j++)   /* keys that do not exist */
        for (int v = 0; v < lanes; v += V16) _mm512_storeu_ps(NF + j * TILE + v, _mm512_set1_ps(HIDDEN));
}

#endif
