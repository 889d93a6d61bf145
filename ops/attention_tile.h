/* attention_tile.h: the pieces that forward and backward of the portable kernel share.
 *
 * A tile is kept with its queries in the vector lanes: T[j][i], j a key of the column
 * tile, i a query of the row tile, TILE floats from one j to the next.  Then maxima,
 * sums and scans run along lanes without any horizontal step but the scan's own, keys
 * and values are read as they lie (broadcast), and every product has one form:
 *     C[m][n] (+)= sum over k of A[m,k] B[k][n]        n in the lanes.
 *
 * bfloat16 operands are widened to float32 beforehand, P and dZ rounded to values of it: a product of two is exact in
 * float32.  This is the definition of the processors' own bfloat16 products, not a fast way to them.
 */
#ifndef SEL_OPS_ATTENTION_TILE_H
#define SEL_OPS_ATTENTION_TILE_H

#include "ops/attention_plan.h"
#include "ops/vec.h"

#define MASKED (-1e30f)     /* logit of a key that a row does not see; exp of it is exactly 0 */
#define LEAST  (-1e29f)     /* where a row's maximum starts: above MASKED, below any logit */

#define INLINE static inline __attribute__((always_inline))

/* One block of the product: mr rows of A by nv vectors, both constants where it is inlined. */
INLINE void product_block(const int mr, const int nv, int64_t K, const float *A, int64_t am, int64_t ak,
                          const float *B, int64_t ldb, float *C, int64_t ldc, bool accumulate)
{
    vf acc[8][2];
    for (int r = 0; r < mr; r++)
        for (int v = 0; v < nv; v++) acc[r][v] = accumulate ? vload(C + r * ldc + v * VL) : vset1(0.0f);
    for (int64_t k = 0; k < K; k++) {
        vf b[2];
        for (int v = 0; v < nv; v++) b[v] = vload(B + k * ldb + v * VL);
        for (int r = 0; r < mr; r++) {
            const vf x = vset1(A[r * am + k * ak]);
            for (int v = 0; v < nv; v++) acc[r][v] += x * b[v];
        }
    }
    for (int r = 0; r < mr; r++)
        for (int v = 0; v < nv; v++) vstore(C + r * ldc + v * VL, acc[r][v]);
}

enum { BLOCK_ROWS = VL == 16 ? 8 : 4 };

/* C [M][N] (+)= A B; A[m,k] = A[m am + k ak], B [K][N] and C with rows ldb and ldc apart; N a multiple of VL.
   accumulate false: C is not read. */
static inline void product(int64_t M, int64_t N, int64_t K, const float *A, int64_t am, int64_t ak, const float *B,
                    int64_t ldb, float *C, int64_t ldc, bool accumulate)
{
    for (int64_t n = 0; n < N; n += 2 * VL) {
        const bool two = n + VL < N;
        int64_t m = 0;
        for (; two && m + BLOCK_ROWS <= M; m += BLOCK_ROWS)
            product_block(BLOCK_ROWS, 2, K, A + m * am, am, ak, B + n, ldb, C + m * ldc + n, ldc, accumulate);
        for (; !two && m + BLOCK_ROWS <= M; m += BLOCK_ROWS)
            product_block(BLOCK_ROWS, 1, K, A + m * am, am, ak, B + n, ldb, C + m * ldc + n, ldc, accumulate);
        for (; m < M; m++) {
            if (two) product_block(1, 2, K, A + m * am, am, ak, B + n, ldb, C + m * ldc + n, ldc, accumulate);
            else product_block(1, 1, K, A + m * am, am, ak, B + n, ldb, C + m * ldc + n, ldc, accumulate);
        }
    }
}

/* One tile of the (query, key) plane. */
typedef struct {
    int64_t row0, col0;     /* positions of its first query and key */
    int rows, cols;         /* real ones, at most TILE */
    int lanes;              /* rows, rounded up to whole vectors */
    int64_t window;         /* keys a row sees; a large number for all */
    bool masked;            /* some (i, j) in it must not be seen */
} tile_place;

INLINE tile_place place_tile(const sel_attention *a, int64_t row_tile, int64_t column_tile)
{
    tile_place t;
    t.row0 = a->i0 + row_tile * TILE;
    t.col0 = column_tile * TILE;
    t.rows = (int)(a->i1 - t.row0 < TILE ? a->i1 - t.row0 : TILE);
    t.cols = (int)(a->i1 - t.col0 < TILE ? a->i1 - t.col0 : TILE);
    t.lanes = (t.rows + VL - 1) / VL * VL;
    t.window = a->window ? a->window : INT64_MAX / 2;
    t.masked = t.col0 + t.cols - 1 > t.row0 || t.col0 < t.row0 + t.rows - t.window;
    return t;
}

/* Column tiles [*first, *end) that some row of the row tile sees. */
INLINE void seen_columns(const sel_attention *a, int64_t row_tile, int64_t *first, int64_t *end)
{
    const tile_place t = place_tile(a, row_tile, 0);
    const int64_t lowest = t.row0 - t.window + 1;
    *first = lowest > 0 ? lowest / TILE : 0;
    *end = (t.row0 + t.rows - 1) / TILE + 1;
}

/* Lanes [lo, hi) of the tile's queries that see key j of the tile. */
INLINE void seen_lanes(const tile_place *t, int j, int *lo, int *hi)
{
    const int64_t key = t->col0 + j - t->row0;          /* the lane that is the key's own row */
    const int64_t last = key + t->window;
    *lo = key < 0 ? 0 : key > t->lanes ? t->lanes : (int)key;
    *hi = last < *lo ? *lo : last > t->rows ? t->rows : (int)last;
    if (*hi < *lo) *hi = *lo;
}

/* -1 in lanes first + l with lo <= lane < hi, else 0 */
INLINE vi lanes_between(int first, int lo, int hi)
{
    static const int32_t count[16] = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 };
    vi lane;
    memcpy(&lane, count, sizeof lane);
    lane += first;
    return (lane >= lo) & (lane < hi);
}

#if VL == 16
#define SHUFFLE(a, b, s)                                                                                              \
    __builtin_shufflevector(a, b, (s), (s) + 1, (s) + 2, (s) + 3, (s) + 4, (s) + 5, (s) + 6, (s) + 7, (s) + 8,       \
                            (s) + 9, (s) + 10, (s) + 11, (s) + 12, (s) + 13, (s) + 14, (s) + 15)
#elif VL == 8
#define SHUFFLE(a, b, s) \
    __builtin_shufflevector(a, b, (s), (s) + 1, (s) + 2, (s) + 3, (s) + 4, (s) + 5, (s) + 6, (s) + 7)
#else
#define SHUFFLE(a, b, s) __builtin_shufflevector(a, b, (s), (s) + 1, (s) + 2, (s) + 3)
#endif

/* y[l] = sum of x[0 .. l] */
INLINE vf scan_up(vf x)
{
    const vf zero = { 0 };
    x += SHUFFLE(zero, x, VL - 1);
    x += SHUFFLE(zero, x, VL - 2);
#if VL >= 8
    x += SHUFFLE(zero, x, VL - 4);
#endif
#if VL >= 16
    x += SHUFFLE(zero, x, VL - 8);
#endif
    return x;
}

/* y[l] = sum of x[l .. VL-1] */
INLINE vf scan_down(vf x)
{
    const vf zero = { 0 };
    x += SHUFFLE(x, zero, 1);
    x += SHUFFLE(x, zero, 2);
#if VL >= 8
    x += SHUFFLE(x, zero, 4);
#endif
#if VL >= 16
    x += SHUFFLE(x, zero, 8);
#endif
    return x;
}

/* Selection of one tile (equations of attention.h): from head 0's logits to F, the carry of its columns
   moved on past its rows.  F is 0 where a row does not see the key. */
static inline void select_tile(const sel_attention *a, const tile_place *t, const float *logits, float *F, float *carry)
{
    const vf zero = { 0 };
    for (int j = 0; j < t->cols; j++) {
        const float *L = logits + j * TILE;
        float *f = F + j * TILE, base = carry[t->col0 + j];
        int lo, hi;
        seen_lanes(t, j, &lo, &hi);
        const bool never = a->protect_bos && t->col0 + j == 0;
        const int64_t key = t->col0 + j - t->row0;
        const int own = a->protect_self && key >= 0 && key < TILE ? (int)key : -1;   /* the lane that S leaves out */
        for (int v = 0; v < t->lanes; v += VL) {
            const vi seen = lanes_between(v, lo, hi);
            vf s = a->relu ? vmax(vload(L + v), zero) : vload(L + v);
            s = vselect(seen & ~lanes_between(v, own, own + 1), s, zero);
            if (never) s = zero;
            const vf sum = scan_up(s);
            vstore(f + v, vselect(seen, (a->shift ? (vf)SHUFFLE(zero, sum, VL - 1) : sum) + base, zero));
            base += sum[VL - 1];
        }
        carry[t->col0 + j] = base;
    }
}

/* Dead keys: whether those of column tile J all are, by the carries with which a group of row tiles began. */
static inline bool all_dead(const sel_attention *a, int64_t b, const float *began, int64_t J)
{
    for (int64_t j = J * TILE; j < (J + 1) * TILE && j < a->i1; j++)
        if (!(began[j] > a->dead_after[b])) return false;
    return true;
}

/* Pairs of a row and a live key (itself and later rows' keys of the group among them) in rows from position row0. */
static inline double live_pairs(const sel_attention *a, int64_t b, const float *began, int64_t row0, int rows)
{
    int64_t n = 0;
    for (int64_t j = 0; j < row0; j++) n += !(began[j] > a->dead_after[b]);
    return (double)(n * rows + (int64_t)rows * (rows + 1) / 2);
}

/* Rounds n values to bfloat16, in place. */
static inline void round_values(float *x, int64_t n)
{
    int64_t i = 0;
    for (; i + VL <= n; i += VL) vstore(x + i, vround_bf16(vload(x + i)));
    if (i < n) vstore_n(x + i, vround_bf16(vload_n(x + i, n - i)), n - i);
}

/* Value i of an operand array. */
INLINE float operand(bool bfloat16, const void *x, int64_t i)
{
    if (!bfloat16) return ((const float *)x)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* Makes it y, which its type holds exactly. */
INLINE void set_operand(bool bfloat16, void *x, int64_t i, float y)
{
    uint32_t bits;
    memcpy(&bits, &y, sizeof bits);
    if (bfloat16) ((uint16_t *)x)[i] = (uint16_t)(bits >> 16);
    else ((float *)x)[i] = y;
}

/* n values of a row of operands, as float32, then zeros up to `padded`. */
static inline void copy_padded(float *to, const void *from, int64_t n, int64_t padded, bool bfloat16)
{
    int64_t d = 0;
    for (; d + VL <= n; d += VL) vstore(to + d, vload_as(bfloat16, from, d, VL));
    for (; d < n; d++) to[d] = operand(bfloat16, from, d);
    for (; d < padded; d++) to[d] = 0.0f;
}

/* What q^T is multiplied by: the logits' 1 / sqrt(dh), unless that would make values that bfloat16 does not hold. */
static inline float query_scale(const sel_attention *a)
{
    return a->bfloat16 ? 1.0f : (float)(1.0 / sqrt((double)a->dh));
}

/* Logits X [cols][TILE] of a tile from keys K, rows k_row apart, and q^T (transpose_rows with query_scale). */
static inline void logits_tile(const sel_attention *a, const tile_place *t, const float *K, int64_t k_row,
                               const float *Qt, float *X)
{
    const float scale = (float)(1.0 / sqrt((double)a->dh));
    product(t->cols, t->lanes, a->dh, K, k_row, 1, Qt, TILE, X, TILE, false);
    for (int j = 0; a->bfloat16 && j < t->cols; j++)
        for (int v = 0; v < t->lanes; v += VL) vstore(X + j * TILE + v, vload(X + j * TILE + v) * scale);
}

/* X[d][i] = scale * x[i][d]: `rows` rows of operands, n values each, lanes beyond them zero. */
static inline void transpose_rows(float *X, const void *x, int64_t stride, int rows, int64_t n, float scale,
                                  bool bfloat16)
{
    for (int64_t d = 0; d < n; d++) {
        for (int i = 0; i < rows; i++) X[d * TILE + i] = scale * operand(bfloat16, x, i * stride + d);
        for (int i = rows; i < TILE; i++) X[d * TILE + i] = 0.0f;
    }
}

#endif
