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

/* 2^x: float32 operands deserve 1e-7, bfloat16 ones 8e-5 (minimax polynomials on [-1/2, 1/2]); -1e30 gives exactly 0.
 */
INLINE __m512 exp2_ps(__m512 x)
{
    const __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n);
#if WORD_BF16
    __m512 p = _mm512_set1_ps(0.0551716691f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.242611122f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693260985f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.999928074f));
#else
    __m512 p = _mm512_set1_ps(0.00132764722f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00967554133f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0555071327f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240221197f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693146967f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000007f));
#endif
    return _mm512_scalef_ps(p, n);
}

/* Transposes 16 x 16 words: row r of src (src_row words apart, `rows` of them, the rest zero) to column r of dst. */
INLINE void transpose_16(word *dst, int64_t dst_row, const word *src, int64_t src_row, int rows)
{
    __m512i a[16], b[16];
    for (int r = 0; r < 16; r++) a[r] = r < rows ? _mm512_loadu_si512(src + r * src_row) : _mm512_setzero_si512();
    #pragma GCC unroll 16
    for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
    #pragma GCC unroll 16
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
        _mm512_storeu_si512(dst + r * dst_row, _mm512_shuffle_i32x4(b[r], b[r + 8], 0x88));
        _mm512_storeu_si512(dst + (r + 4) * dst_row, _mm512_shuffle_i32x4(b[r + 4], b[r + 12], 0x88));
        _mm512_storeu_si512(dst + (r + 8) * dst_row, _mm512_shuffle_i32x4(b[r], b[r + 8], 0xdd));
        _mm512_storeu_si512(dst + (r + 12) * dst_row, _mm512_shuffle_i32x4(b[r + 4], b[r + 12], 0xdd));
    }
}

/* n values of x as n / PAIR words (n a multiple of 16). */
INLINE void row_words(word *w, const float *x, int64_t n)
{
#if WORD_BF16
    for (int64_t d = 0; d < n; d += 16)
        _mm256_storeu_si256((__m256i *)(void *)(w + d / 2),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + d)));
#else
    for (int64_t d = 0; d < n; d += 16)
        _mm512_storeu_ps((float *)w + d, _mm512_loadu_ps(x + d));
#endif
}

/* X [n / PAIR][TILE] words: words of `rows` rows of x (x_row floats apart, n values each), rows in the lanes. */
INLINE void transpose_words(word *X, const float *x, int64_t x_row, int rows, int64_t n)
{
    word line[16][16];
    for (int i = 0; i < TILE; i += 16)
        for (int64_t d = 0; d < n; d += 16 * PAIR) {
            const int here = rows - i < 16 ? (rows > i ? rows - i : 0) : 16;
            const int64_t width = n - d < 16 * PAIR ? n - d : 16 * PAIR;
            if (width < 16 * PAIR) memset(line, 0, sizeof line);
            for (int r = 0; r < here; r++) row_words(line[r], x + (i + r) * x_row + d, width);
            word turned[16][16];
            transpose_16(&turned[0][0], 16, &line[0][0], 16, here);
            for (int64_t k = 0; k < width / PAIR; k++)
                _mm512_storeu_si512(X + (d / PAIR + k) * TILE + i, _mm512_loadu_si512(turned[k]));
        }
}

#if WORD_BF16
/* Word (r / 2, d) = (x[r][d], x[r + 1][d]): n values (a multiple of 16) of two rows; b may be NULL: zeros. */
INLINE void pair_rows(word *w, const float *a, const float *b, int64_t n)
{
    for (int64_t d = 0; d < n; d += 16) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(a + d)));
        const __m512i high = b ? _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(b + d)))
                               : _mm512_setzero_si512();
        _mm512_storeu_si512(w + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}
#endif

/* Two rows j, j + 1 of 32 queries each become the words of a k-major operand at W and W + 16: one row a call for
   float32 (even rows at W, odd at W + TILE), a row of pairs for bfloat16, whose lanes come out in the order of
   `unweave`. */
INLINE void store_pair(word *W, const __m512 x[2], const __m512 y[2])
{
#if WORD_BF16
    const __m512i a = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]), b = (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]);
    _mm512_storeu_si512(W, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(W + V16, _mm512_unpackhi_epi16(a, b));
#else
    for (int v = 0; v < 2; v++) {
        _mm512_storeu_ps((float *)W + v * V16, x[v]);
        _mm512_storeu_ps((float *)W + TILE + v * V16, y[v]);
    }
#endif
}

/* Lanes of 32 results of a product whose B was stored by store_pair, back in the order of the queries. */
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

/* The opposite of unweave. */
INLINE void weave(__m512 x[2])
{
#if WORD_BF16
    const __m512i low = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13),
                  high = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
    const __m512d a = _mm512_castps_pd(x[0]), b = _mm512_castps_pd(x[1]);
    x[0] = _mm512_castpd_ps(_mm512_permutex2var_pd(a, low, b));
    x[1] = _mm512_castpd_ps(_mm512_permutex2var_pd(a, high, b));
#else
    (void)x;
#endif
}

/* Lanes v .. v + 15 that see key j: query lane i does where i + off >= j. */
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
INLINE float last_lane(__m512 x) { return _mm_cvtss_f32(_mm_permute_ps(_mm512_extractf32x4_ps(x, 3), 0xff)); }

/* Lanes of key j whose logit S takes: seen, a real row, not protected. */
INLINE __mmask16 selects(const sel_attention *a, int v, int j, int64_t col0, int64_t off, int rows)
{
    if (a->protect_bos && col0 + j == 0) return 0;
    __mmask16 lanes = sees(v, j, off);
    if (rows < v + V16) lanes &= (__mmask16)(rows <= v ? 0 : 0xffff >> (v + V16 - rows));
    const int64_t own = j - off - v;
    if (a->protect_self && own >= 0 && own < V16) lanes &= (__mmask16)~(1u << own);
    return lanes;
}

/* Selection of a tile: from head 0's logits [j][TILE] to -F; carry [cols] of its columns moves on past its rows. */
static void select_words(const sel_attention *a, const float *raw, float *NF, float *carry, int rows, int cols,
                         int lanes, int64_t col0, int64_t off)
{
    const __m512 zero = _mm512_setzero_ps();
    for (int j = 0; j < cols; j++) {
        float base = carry[j];
        for (int v = 0; v < lanes; v += V16) {
            const __m512 L = _mm512_loadu_ps(raw + j * TILE + v);
            const __m512 s =
                _mm512_maskz_mov_ps(selects(a, v, j, col0, off, rows), a->relu ? _mm512_max_ps(L, zero) : L);
            const __m512 sum = scan_up(s);
            const __m512 before =
                _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(sum), _mm512_setzero_si512(), 15));
            const __m512 f = _mm512_add_ps(a->shift ? before : sum, _mm512_set1_ps(base));
            _mm512_storeu_ps(NF + j * TILE + v, _mm512_sub_ps(zero, f));
            base += last_lane(sum);
        }
        carry[j] = base;
    }
    for (int j = cols; j < TILE; j++)   /* keys that do not exist: seen by lanes that are no rows only */
        for (int v = 0; v < lanes; v += V16) _mm512_storeu_ps(NF + j * TILE + v, zero);
}

#endif
