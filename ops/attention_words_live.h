/* attention_words_live.h: dead keys (spec, section 3.1) for the AVX-512 kernels; included once a kernel file.
 *
 * Where attention.h's `dead_after` is given, a row tile attends to a list of live keys: those before its group of row
 * tiles whose F had not passed the threshold when the group began, then the group's own.  The kernels know nothing
 * of it: K and V of a tile's 64 keys are gathered into the cache before each head, and a key's place in the list takes
 * the place of its position, so that the causal edge is again a diagonal (`off`).  F of a dead key stays as it was.
 *
 * Both passes make the same lists from the same carries.  Backward goes by row tiles, descending, since lists belong to
 * them; dK and dV are added where the keys lie.
 */
#ifndef SEL_OPS_ATTENTION_WORDS_LIVE_H
#define SEL_OPS_ATTENTION_WORDS_LIVE_H

#include "ops/attention_words_forward.h"
#include "ops/attention_words_backward.h"

/* The live keys of one group of row tiles. */
typedef struct {
    int32_t *keys;       /* positions: `old` ones before the group's first row, then the group's own, in order */
    int64_t old;
    int64_t row0;        /* position of the group's first row */
} live_keys;

/* The list of the group whose rows are positions [row0, row1), from the carries at its start; limit in their units. */
static live_keys list_live(int32_t *keys, const float *carry, float limit, int64_t row0, int64_t row1)
{
    const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t n = 0;
    for (int64_t j = 0; j < row0; j += V16) {
        const __mmask16 here = (__mmask16)(row0 - j < V16 ? 0xffff >> (V16 - (row0 - j)) : 0xffff);
        const __mmask16 live = _mm512_mask_cmp_ps_mask(here, _mm512_maskz_loadu_ps(here, carry + j),
                                                       _mm512_set1_ps(limit), _CMP_NGT_UQ);   /* NaN lives */
        _mm512_storeu_si512(keys + n,
                            _mm512_maskz_compress_epi32(live, _mm512_add_epi32(step, _mm512_set1_epi32((int)j))));
        n += __builtin_popcount(live);
    }
    const live_keys l = { .keys = keys, .old = n, .row0 = row0 };
    for (int64_t j = row0; j < row1; j++) keys[n++] = (int32_t)j;
    return l;
}

/* The threshold in raw units. */
static float dead_limit(const sel_attention *a, int64_t b)
{
    return a->dead_after[b] * (float)sqrt((double)a->dh);
}

/* Rows keys[0 .. cols) of an array of words, n words each (a multiple of 8), to `to` [TILE][n]; the rest zero. */
static void gather_rows(word *to, const word *from, int64_t stride, int64_t n, const int32_t *keys, int cols)
{
    for (int j = 0; j < cols; j++, to += n) {
        const word *const row = from + keys[j] * stride;
        int64_t d = 0;
        for (; d + 16 <= n; d += 16) _mm512_storeu_si512(to + d, _mm512_loadu_si512(row + d));
        if (d < n)
            _mm256_storeu_si256((__m256i *)(void *)(to + d),
                                _mm256_loadu_si256((const __m256i *)(const void *)(row + d)));
    }
    memset(to, 0, (size_t)((TILE - cols) * n) * sizeof *to);
}

/* Asks for such rows, so that they are near when they are gathered. */
static void fetch_keys_ahead(const word *from, int64_t stride, int64_t n, const int32_t *keys, int64_t cols)
{
    for (int64_t j = 0; j < cols; j++)
        for (int64_t d = 0; d < n; d += 16) _mm_prefetch((const char *)(from + keys[j] * stride + d), _MM_HINT_T1);
}

#if WORD_BF16
/* The same rows (n values each) by pairs: word (j / 2, d) = (row j, row j + 1). */
static void gather_pairs(word *to, const word *from, int64_t stride, int64_t n, const int32_t *keys, int cols)
{
    for (int j = 0; j < TILE; j += 2)
        for (int64_t d = 0; d < n; d += 16) {
            __m512i low = _mm512_setzero_si512(), high = low;
            if (j < cols)
                low = _mm512_cvtepu16_epi32(
                    _mm256_loadu_si256((const __m256i *)(const void *)(from + keys[j] * stride + d / 2)));
            if (j + 1 < cols)
                high = _mm512_cvtepu16_epi32(
                    _mm256_loadu_si256((const __m256i *)(const void *)(from + keys[j + 1] * stride + d / 2)));
            _mm512_storeu_si512(to + j / 2 * n + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}
#endif

/* Where one head's words of x (a sequence's rows, x_row floats apart) lie by row: packed for bfloat16, head after head.
 */
INLINE const word *rows_by_head(const sel_attention *a, const float *x, int64_t x_row, const float *packed, int64_t head,
                                int64_t *stride)
{
    *stride = WORD_BF16 ? a->dh / 2 : x_row;
    return WORD_BF16 ? (const word *)packed + head * a->i1 * a->dh / 2 : (const word *)(x + head * a->dh);
}
INLINE const word *key_rows(const sel_attention *a, int64_t b, const float *pack, int64_t packed, int64_t kh,
                            int64_t *stride)
{
    return rows_by_head(a, a->k + b * a->k_seq, a->k_row, pack + packed, kh, stride);
}
INLINE const word *value_rows(const sel_attention *a, int64_t b, const float *pack, int64_t packed, int64_t kh,
                              int64_t *stride)
{
    return rows_by_head(a, a->v + b * a->v_seq, a->v_row, pack + packed, kh, stride);
}

/* Where the keys that S is made of lie, by row: head 0's, or sel_k. */
INLINE const word *selecting_key_rows(const sel_attention *a, const words_plan *p, int64_t b, const float *pack,
                                      int64_t *stride)
{
    if (!attention_bilinear(a)) return key_rows(a, b, pack, p->k, 0, stride);
#if WORD_BF16
    *stride = a->dh / 2;
    return (const word *)(pack + p->sel_k);
#else
    *stride = a->sel_k_row;
    return (const word *)(a->sel_k + b * a->sel_k_seq);
#endif
}

/* Keys (sel_k, too) and values of positions [j0, j1) by row, rounded; float32 needs none. */
static void pack_live(const sel_attention *a, const words_plan *p, int64_t b, float *pack, int64_t j0, int64_t j1)
{
#if WORD_BF16
    const int64_t n = a->dh, size = a->i1 * n / 2;
    for (int64_t j = j0; j < j1 && attention_bilinear(a); j++)
        row_words((word *)(pack + p->sel_k) + j * n / 2, a->sel_k + b * a->sel_k_seq + j * a->sel_k_row, n);
    for (int64_t j = j0; j < j1; j++)
        for (int64_t kh = 0; kh < a->kv_heads; kh++) {
            row_words((word *)(pack + p->k) + kh * size + j * n / 2, a->k + b * a->k_seq + j * a->k_row + kh * n, n);
            row_words((word *)(pack + p->v) + kh * size + j * n / 2, a->v + b * a->v_seq + j * a->v_row + kh * n, n);
        }
#else
    (void)a, (void)p, (void)b, (void)pack, (void)j0, (void)j1;
#endif
}

/* Forward: the tile's operands for query head h. */
static key_tile gather_forward(const forward_job *w, int64_t h, const int32_t *keys, int cols)
{
    const sel_attention *a = w->a;
    const int64_t kh = h * a->kv_heads / a->heads, dh = a->dh;
    word *const k = (word *)(w->scratch + w->p->kt), *const v = (word *)(w->scratch + w->p->vt);
    int64_t stride;
    const word *rows = key_rows(a, w->b, w->pack, w->p->k, kh, &stride);
    gather_rows(k, rows, stride, dh / PAIR, keys, cols);
    rows = value_rows(a, w->b, w->pack, w->p->v, kh, &stride);
#if WORD_BF16
    gather_pairs(v, rows, stride, dh, keys, cols);
#else
    gather_rows(v, rows, stride, dh, keys, cols);
#endif
    return (key_tile){ .k = k, .v = v, .k_row = dh / PAIR, .v_row = dh };
}

/* The keys that S is made of, without values, beside them. */
static key_tile gather_selecting(const forward_job *w, const int32_t *keys, int cols)
{
    const int64_t dh = w->a->dh;
    word *const k = (word *)(w->scratch + w->p->kt) + TILE * dh;
    int64_t stride;
    const word *const rows = selecting_key_rows(w->a, w->p, w->b, w->pack, &stride);
    gather_rows(k, rows, stride, dh / PAIR, keys, cols);
    return (key_tile){ .k = k, .k_row = dh / PAIR };
}

/* Asks for the next tile's, `left` keys from `keys` on. */
static void fetch_live(const forward_job *w, int64_t h, const int32_t *keys, int64_t left)
{
    const sel_attention *a = w->a;
    const int64_t kh = h * a->kv_heads / a->heads;
    int64_t stride;
    const word *rows = key_rows(a, w->b, w->pack, w->p->k, kh, &stride);
    fetch_keys_ahead(rows, stride, a->dh / PAIR, keys, left < TILE ? left : TILE);
    rows = value_rows(a, w->b, w->pack, w->p->v, kh, &stride);
    fetch_keys_ahead(rows, stride, a->dh / PAIR, keys, left < TILE ? left : TILE);
}

/* One row tile of the group, all heads; carry [i1] of the listed keys moves on past its rows. */
static void forward_tile_live(forward_job *w, int64_t I, const live_keys *live, float *carry)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const row_tile t = row_tile_of(w, I);
    const int64_t before = live->old + t.row0 - live->row0, count = before + t.rows, dead = live->row0 - live->old;
    float *const raw = w->scratch + p->raw, *const F = w->scratch + p->f;
    double rowsum[TILE] = { 0 };
    const bool memory = a->tau > 0.0, bilinear = attention_bilinear(a);
    word *const sel_qt = (word *)(w->scratch + p->sel_qt);

    if (bilinear) transpose_selecting(w, &t, sel_qt);
    for (int64_t block = 0; block < count; block += SUPER * TILE)
        for (int64_t h = 0; h < a->heads; h++) {
            const head_rows rows = rows_of(w, h);
            const int64_t end = block + SUPER * TILE < count ? block + SUPER * TILE : count;

            if (block == 0)
                transpose_words((word *)(w->scratch + p->qt) + slot(w, h) * a->dh / PAIR * TILE, q_of(w, &t, h),
                                a->q_row, t.rows, a->dh);
            w->room.next.n = 0;
            if (block == 0 && h + 1 < a->heads)
                fetch_rows(&w->room.next, q_of(w, &t, h + 1), a->q_row * 4, t.rows, a->dh * 4);
            for (int64_t col0 = block; col0 < end; col0 += TILE) {
                float *const NF = F + (col0 - block) * TILE;
                const int64_t off = before - col0;
                const tile_view view = view_of(off, 0, t.rows);
                const int cols = (int)(count - col0 < TILE ? count - col0 : TILE);
                const int32_t *const keys = live->keys + col0;
                const key_tile o = gather_forward(w, h, keys, cols);

                if (col0 + TILE < end) fetch_live(w, h, keys + TILE, end - col0 - TILE);
                else if (h + 1 < a->heads) fetch_live(w, h + 1, live->keys + block, end - block);
                if (h == 0) {
                    float here[TILE];
                    for (int j = 0; j < cols; j++) here[j] = carry[keys[j]];
                    const key_tile own = bilinear ? gather_selecting(w, keys, cols) : o;
                    raw_logits(&w->room, &own, bilinear ? sel_qt : rows.q, &view, raw);
                    select_words(a, raw, NF, here, t.rows, cols, view.lanes, col0, off);
                    for (int j = 0; j < cols; j++) carry[keys[j]] = here[j];
                    if (memory) add_forgotten(NF, t.rows, cols, off, a->tau * sqrt((double)a->dh), rowsum);
                    if (bilinear) raw_logits(&w->room, &o, rows.q, &view, raw);
                }
                attend_tile(&w->room, &o, &rows, &view, h == 0 ? raw : NULL, NF, col0 == 0);
            }
            if (end == count) finish_rows(w, &t, h);
        }
    for (int i = 0; i < t.rows; i++) {
        const double needed = (double)(t.row0 + i + 1 - dead) - rowsum[i];
        w->live += (double)(before + i + 1);
        if (memory && (needed > w->m_max || (needed == w->m_max && t.row0 + i < w->m_row))) {
            w->m_max = needed;
            w->m_row = t.row0 + i;
        }
    }
}

/* A group of row tiles from the carries at its start; they move on. */
static void forward_group_live(forward_job *w, int64_t group, float *carry)
{
    const sel_attention *a = w->a;
    const int64_t I0 = group * w->p->group, row0 = a->i0 + I0 * TILE, end = row0 + w->p->group * TILE;
    const int64_t row1 = end < a->i1 ? end : a->i1;
    const live_keys live = list_live((int32_t *)(void *)(w->scratch + w->p->list), carry, dead_limit(a, w->b), row0,
                                     row1);
    if (!w->packed) pack_live(a, w->p, w->b, w->pack, group ? row0 : 0, row1);
    for (int64_t I = I0; I < w->p->tiles && I < I0 + w->p->group; I++) forward_tile_live(w, I, &live, carry);
}

static void forward_sequence_live(forward_job *w)
{
    float *const carry = w->scratch + w->p->carry;

    start_carry(w, carry, 0, w->a->i1);
    for (int64_t g = 0; g < w->p->groups; g++) {
        if (w->a->saved) memcpy(group_carry(w, g), carry, (size_t)w->a->i1 * sizeof *carry);
        forward_group_live(w, g, carry);
    }
    end_carry(w, carry);
    store_memory(w);
    if (w->a->live) w->a->live[w->b] = w->live;
}

/* The carries of one column tile at the start of every group, from the selection alone. */
static void carry_column_live(const forward_job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t j0 = J * TILE, j1 = j0 + TILE < a->i1 ? j0 + TILE : a->i1;
    const float limit = dead_limit(a, w->b);
    float *const carry = w->scratch + p->carry, *const raw = w->scratch + p->raw, *const F = w->scratch + p->f;
    word *const Qt = (word *)(w->scratch + p->qt);
    int32_t keys[TILE] = { 0 };

    for (int64_t j = j0; j < j1; j++) keys[j - j0] = (int32_t)j;
    const key_tile o = gather_selecting(w, keys, (int)(j1 - j0));
    start_carry(w, carry, j0, j1);
    for (int64_t I = 0; I <= (p->groups - 1) * p->group; I++) {
        const row_tile t = row_tile_of(w, I);
        const int64_t off = t.row0 - j0;
        const tile_view view = view_of(off, 0, t.rows);
        const float *const began = group_carry(w, I / p->group);
        float here[TILE];
        int64_t alive = 0;

        if (I % p->group == 0) memcpy(group_carry(w, I / p->group) + j0, carry + j0, (size_t)(j1 - j0) * sizeof *carry);
        if (off + t.rows - 1 < 0 || I == (p->groups - 1) * p->group) continue;
        for (int64_t j = j0; j < j1; j++) {
            here[j - j0] = carry[j];
            alive += !(began[j] > limit);
        }
        if (!alive) continue;
        transpose_selecting(w, &t, Qt);
        raw_logits(&w->room, &o, Qt, &view, raw);
        select_words(a, raw, F, here, t.rows, (int)(j1 - j0), view.lanes, j0, off);
        for (int64_t j = j0; j < j1; j++)
            if (!(began[j] > limit)) carry[j] = here[j - j0];
    }
}

/* One sequence by all threads. */
static void forward_shared_live(const sel_attention *a, const words_plan *p, int64_t b)
{
    forward_job best = new_forward_job(a, p, b, 0, 0);
    #pragma omp parallel num_threads(a->threads)
    {
        forward_job w = new_forward_job(a, p, b, omp_get_thread_num(), 0);
        float *const carry = w.scratch + p->carry;

        #pragma omp for schedule(static)
        for (int64_t J = 0; J < p->columns; J++)
            pack_live(a, p, b, w.pack, J * TILE, (J + 1) * TILE < a->i1 ? (J + 1) * TILE : a->i1);
        w.packed = true;
        #pragma omp for schedule(dynamic, 1)
        for (int64_t J = 0; J < p->columns; J++) carry_column_live(&w, J);
        #pragma omp for schedule(dynamic, 1)
        for (int64_t k = 0; k < p->groups; k++) {
            const int64_t g = p->groups - 1 - k;
            memcpy(carry, group_carry(&w, g), (size_t)a->i1 * sizeof *carry);
            forward_group_live(&w, g, carry);
            if (g == p->groups - 1) end_carry(&w, carry);
        }
        #pragma omp critical(attention_memory)
        {
            best.live += w.live;      /* whole numbers below 2^53: exact in any order */
            if (w.m_max > best.m_max || (w.m_max == best.m_max && w.m_row < best.m_row)) {
                best.m_max = w.m_max;
                best.m_row = w.m_row;
            }
        }
    }
    store_memory(&best);
    if (a->live) a->live[b] = best.live;
}

static void forward_live(const sel_attention *a)
{
    const words_plan p = sel_attention_words_plan(a, false);
    const int64_t whole = attention_whole(a);

    #pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int64_t b = 0; b < whole; b++) {
        forward_job w = new_forward_job(a, &p, b, omp_get_thread_num(), omp_get_thread_num());
        forward_sequence_live(&w);
    }
    for (int64_t b = whole; b < a->B; b++) {
        if (p.groups > 1) {
            forward_shared_live(a, &p, b);
        } else {
            forward_job w = new_forward_job(a, &p, b, 0, 0);
            forward_sequence_live(&w);
        }
    }
}

/* ---- backward ---- */

/* Tile c of the list, and row tile I; the operands' place is the `side`-th. */
static gradient_tile live_tile(const backward_job *w, const live_keys *live, int64_t I, int64_t c, int side)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t row0 = a->i0 + I * TILE, before = live->old + row0 - live->row0, col0 = c * TILE,
                  at = side * TILE * TILE;
    const int rows = (int)least(a->i1 - row0, TILE), cols = (int)least(before + rows - col0, TILE);
    return new_gradient_tile(before - col0, col0, rows, cols, (word *)(w->scratch + p->pi) + at,
                             (word *)(w->scratch + p->zi) + at, (word *)(w->scratch + p->zk) + at);
}

static gradient_keys gather_backward(const backward_job *w, int64_t kh, const int32_t *keys, int cols, int side)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t dh = a->dh, at = side * TILE * dh;
    word *const k = (word *)(w->scratch + p->kt) + at, *const v = (word *)(w->scratch + p->vt) + at;
    gradient_keys o = { .k = k, .v = v, .pairs = k, .dk = w->scratch + p->dk + at, .dv = w->scratch + p->dv + at };
    int64_t stride;
    const word *rows = key_rows(a, w->b, w->pack, p->k, kh, &stride);
    gather_rows(k, rows, stride, dh / PAIR, keys, cols);
#if WORD_BF16
    gather_pairs((word *)(w->scratch + p->pt) + at, rows, stride, dh, keys, cols);
    o.pairs = (const word *)(w->scratch + p->pt) + at;
#endif
    rows = value_rows(a, w->b, w->pack, p->v, kh, &stride);
    gather_rows(v, rows, stride, dh / PAIR, keys, cols);
    return o;
}

/* The same for what S is made of, where it has rows of its own: without values, and not by row. */
static gradient_keys gather_selecting_pairs(const backward_job *w, const int32_t *keys, int cols, int side)
{
    const sel_attention *a = w->a;
    const int64_t dh = a->dh, at = side * TILE * dh;
    word *const pairs = (word *)(w->scratch + w->p->pt) + at;
    int64_t stride;
    const word *const rows = selecting_key_rows(a, w->p, w->b, w->pack, &stride);
#if WORD_BF16
    gather_pairs(pairs, rows, stride, dh, keys, cols);
#else
    gather_rows(pairs, rows, stride, dh, keys, cols);
#endif
    return (gradient_keys){ .pairs = pairs, .dk = w->scratch + w->p->dk + at };
}

/* Rows keys[j] of `to` += scale * from [cols][n] */
static void scatter_add(float *to, int64_t stride, const float *from, int64_t n, float scale, const int32_t *keys,
                        int cols)
{
    const __m512 s = _mm512_set1_ps(scale);
    for (int j = 0; j < cols; j++) {
        float *const row = to + keys[j] * stride;
        for (int64_t d = 0; d < n; d += V16)
            _mm512_storeu_ps(row + d, _mm512_fmadd_ps(s, _mm512_loadu_ps(from + j * n + d), _mm512_loadu_ps(row + d)));
    }
}

/* Some tiles of a group's list that a thread takes together: tiles first, first + step, ..., `count` of them. */
typedef struct {
    const live_keys *live;
    int64_t group, first, step, count;
    bool opens;                   /* the thread's first ones: rows are packed, dQ starts */
    float *dcarry;                /* [i1], of the sequence */
} live_tiles;

/* What comes through F in tile t, the c-th of those, of row tile I: dZ at Z0 becomes words. */
static void select_gradients_live(const backward_job *w, const live_tiles *u, const gradient_tile *t, int64_t I,
                                  int64_t c, float *Z0)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int32_t *const list = u->live->keys + t->col0;
    const int64_t at = (c * p->group + I - u->group * p->group) * TILE * TILE;
    float *const G = w->scratch + p->g + c * TILE * TILE;
    float here[TILE];

    for (int j = 0; j < t->cols; j++) here[j] = u->dcarry[list[j]];
    if (a->tau > 0.0 && w->g->memory_coef != 0.0f) add_memory(w, t, a->i0 + I * TILE, w->scratch + p->f + at, G);
    selection_words(a, t, w->scratch + p->l0 + at, G, Z0, here);
    for (int j = 0; j < t->cols; j++) u->dcarry[list[j]] = here[j];
}

/* One head over one row tile and those tiles. */
static void live_head(backward_job *w, const live_tiles *u, int64_t I, int64_t h)
{
    const sel_attention *a = w->a;
    const sel_attention_grad *g = w->g;
    const words_plan *p = w->p;
    const int64_t square = TILE * TILE, dh = a->dh, kh = h * a->kv_heads / a->heads, I0 = u->group * p->group;
    const gradient_rows rows = rows_at(w, h, I), *const of_rows = &rows;
    const bool selecting = h == 0 && !attention_bilinear(a);
    float *const Z0 = w->scratch + p->raw;

    if (u->opens && h && !w->shared) pack_rows(w, h, I);
    for (int64_t c0 = 0; c0 < u->count; c0 += SIDE) {
        gradient_tile tiles[SIDE];
        gradient_keys keys[SIDE];
        const gradient_tile *t[SIDE];
        const gradient_keys *of[SIDE];
        int n = 0;

        for (int64_t c = c0; c < c0 + SIDE && c < u->count; c++) {
            tiles[n] = live_tile(w, u->live, I, u->first + c * u->step, n);
            if (tiles[n].cols <= 0) continue;
            const int32_t *const list = u->live->keys + tiles[n].col0;
            const int64_t at = (c * p->group + I - I0) * square;
            const float *const L0 = w->scratch + p->l0 + at, *const NF = w->scratch + p->f + at;
            float *const G = w->scratch + p->g + c * square;

            keys[n] = gather_backward(w, kh, list, tiles[n].cols, n);
            tile_gradients(&w->room, &tiles[n], &keys[n], &rows, selecting ? L0 : NULL, NF, G, h == 1 || a->heads == 1,
                           selecting ? Z0 : NULL);
            if (selecting) select_gradients_live(w, u, &tiles[n], I, c, Z0);
            t[n] = &tiles[n];
            of[n] = &keys[n];
            key_gradients(&w->room, 1, &t[n], &of_rows, &keys[n], true);
            scatter_add(g->dk + w->b * g->dk_seq + kh * dh, g->dk_row, keys[n].dk, dh, (float)(1.0 / sqrt((double)dh)),
                        list, tiles[n].cols);
            scatter_add(g->dv + w->b * g->dv_seq + kh * dh, g->dv_row, keys[n].dv, dh, 1.0f, list, tiles[n].cols);
            n++;
        }
        if (n) query_gradients(&w->room, n, t, of, rows.dq, u->opens && c0 == 0);
    }
}

/* A selection with rows of its own, after all heads: what comes through F, to dsel_q and dsel_k alone. */
static void live_selection(backward_job *w, const live_tiles *u, int64_t I)
{
    const sel_attention_grad *g = w->g;
    const int64_t dh = w->a->dh;
    const gradient_rows rows = selecting_rows_at(w, I), *const of_rows = &rows;
    float *const Z0 = w->scratch + w->p->raw;

    for (int64_t c = 0; c < u->count; c++) {
        const gradient_tile tile = live_tile(w, u->live, I, u->first + c * u->step, 0), *const t = &tile;
        if (tile.cols <= 0) continue;
        const int32_t *const list = u->live->keys + tile.col0;
        const gradient_keys keys = gather_selecting_pairs(w, list, tile.cols, 0), *const of = &keys;

        memset(Z0, 0, TILE * TILE * sizeof *Z0);
        select_gradients_live(w, u, t, I, c, Z0);
        key_gradients(&w->room, 1, &t, &of_rows, &keys, true);
        scatter_add(g->dsel_k + w->b * g->dsel_k_seq, g->dsel_k_row, keys.dk, dh, (float)(1.0 / sqrt((double)dh)), list,
                    tile.cols);
        query_gradients(&w->room, 1, &t, &of, rows.dq, u->opens && c == 0);
    }
}

/* The selecting logits and -F of the c-th of some tiles in all row tiles of a group, upwards from the saved carry. */
static void rebuild_live(const backward_job *w, const live_tiles *u, int64_t c)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t kw = a->dh / PAIR, I0 = u->group * p->group, I1 = least(I0 + p->group, p->tiles),
                  tile = u->first + c * u->step;
    const float *const saved = a->saved + (w->b * sel_attention_carries(p->rows) + u->group) * a->i1;
    const int32_t *const keys = u->live->keys + tile * TILE;
    const int most = live_tile(w, u->live, I1 - 1, tile, 0).cols;
    float carry[TILE];
    int64_t stride;
    word *const k = (word *)(w->scratch + p->kt);
    const word *const rows = selecting_key_rows(a, p, w->b, w->pack, &stride);

    gather_rows(k, rows, stride, kw, keys, most);
    for (int j = 0; j < most; j++) carry[j] = saved[keys[j]];
    for (int64_t I = I0; I < I1; I++) {
        const gradient_tile t = live_tile(w, u->live, I, tile, 0);
        const int64_t at = (c * p->group + I - I0) * TILE * TILE;
        float *const L0 = w->scratch + p->l0 + at;
        if (t.cols <= 0) continue;
        for (int v0 = 0; v0 < t.view.lanes; v0 += 32)
            product_32(end_block(&t.view, v0 + V16) * 8, kw, k, kw, 1, selecting_rows_at(w, I).qt + v0, TILE, L0 + v0,
                       TILE, true);
        select_words(a, L0, w->scratch + p->f + at, carry, t.rows, t.cols, t.view.lanes, t.col0, t.view.off);
    }
}

/* The tiles of a group's list that this thread takes, every threads-th, some at a time. */
static void backward_group_live(backward_job *w, int64_t group, int thread, int threads, float *dcarry)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t I0 = group * p->group, I1 = least(I0 + p->group, p->tiles), row0 = a->i0 + I0 * TILE,
                  row1 = least(a->i0 + I1 * TILE, a->i1), head = TILE * a->dh;
    const float *const saved = a->saved + (w->b * sel_attention_carries(p->rows) + group) * a->i1;
    const live_keys live = list_live((int32_t *)(void *)(w->scratch + p->list), saved, dead_limit(a, w->b), row0, row1);
    const int64_t tiles = (live.old + row1 - row0 + TILE - 1) / TILE;

    for (int64_t I = I0; I < I1; I++) {
        if (!w->shared) pack_rows(w, 0, I);
        /* A row tile may see none of the tiles that come first, or this thread's. */
        if (!w->shared && p->group == 1) continue;
        memset(rows_at(w, 0, I).dq, 0, (size_t)(a->heads * head) * sizeof(float));
        if (attention_bilinear(a)) memset(selecting_rows_at(w, I).dq, 0, (size_t)head * sizeof(float));
    }
    for (int64_t first = thread; first < tiles; first += p->live_tiles * threads) {
        const int64_t left = (tiles - first + threads - 1) / threads;
        const live_tiles u = { .live = &live, .group = group, .first = first, .step = threads,
                               .count = least(left, p->live_tiles), .opens = first == thread, .dcarry = dcarry };
        for (int64_t c = 0; c < u.count; c++) rebuild_live(w, &u, c);
        for (int64_t I = I1 - 1; I >= I0; I--) {
            for (int64_t n = 1; n <= a->heads; n++) {   /* head 0 last: its dF needs the other heads' */
                const int64_t h = n % a->heads, next = (n + 1) % a->heads;
                w->room.next.n = 0;
                if (u.opens && next && !w->shared) {
                    const int64_t real = least(p->rows - I * TILE, TILE);
                    fetch_rows(&w->room.next, a->out + row_place(w, a->out_seq, a->out_row, next, I), a->out_row * 4,
                               real, a->dh * 4);
                    fetch_rows(&w->room.next, w->g->dout + row_place(w, a->out_seq, a->out_row, next, I),
                               a->out_row * 4, real, a->dh * 4);
                    fetch_rows(&w->room.next, a->q + row_place(w, a->q_seq, a->q_row, next, I), a->q_row * 4, real,
                               a->dh * 4);
                }
                live_head(w, &u, I, h);
            }
            if (attention_bilinear(a)) live_selection(w, &u, I);
        }
    }
    for (int64_t I = I0; I < I1 && !w->shared; I++) {
        for (int64_t h = 0; h < a->heads; h++) store_dq(w, h, I, 1);
        if (attention_bilinear(a)) store_dsel_q(w, I, 1);
    }
}

static void clear_rows(float *x, int64_t row, int64_t n, int64_t j0, int64_t j1)
{
    for (int64_t j = j0; j < j1; j++) memset(x + j * row, 0, (size_t)n * sizeof *x);
}

/* Backward of a sequence: whole by one thread (threads 1), or one of several threads that share it. */
static void backward_sequence_live(backward_job *w, int thread, int threads)
{
    const sel_attention *a = w->a;
    const sel_attention_grad *g = w->g;
    const words_plan *p = w->p;
    const int64_t width = a->kv_heads * a->dh;
    float *const dcarry = w->pack + p->dcarry;

    w->shared = threads > 1;
    for (int64_t J = thread; J < p->columns; J += threads) {
        const int64_t j0 = J * TILE, j1 = least(j0 + TILE, a->i1);
        pack_live(a, p, w->b, w->pack, j0, j1);
        clear_rows(g->dk + w->b * g->dk_seq, g->dk_row, width, j0, j1);
        clear_rows(g->dv + w->b * g->dv_seq, g->dv_row, width, j0, j1);
        if (attention_bilinear(a)) clear_rows(g->dsel_k + w->b * g->dsel_k_seq, g->dsel_k_row, a->dh, j0, j1);
        for (int64_t j = j0; j < j1; j++) dcarry[j] = g->dcarry_in ? g->dcarry_in[w->b * a->carry_seq + j] : 0.0f;
    }
    for (int64_t I = thread; w->shared && I < p->tiles; I += threads)
        for (int64_t h = 0; h < a->heads; h++) pack_rows(w, h, I);
    for (int64_t group = p->groups - 1; group >= 0; group--) {
        if (w->shared) {
            #pragma omp barrier
        }
        backward_group_live(w, group, thread, threads, dcarry);
    }
    if (w->shared) {
        #pragma omp barrier
        const backward_job zero = new_backward_job(a, g, p, w->b, 0, 0);
        for (int64_t I = thread; I < p->tiles; I += threads) {
            for (int64_t h = 0; h < a->heads; h++) store_dq(&zero, h, I, threads);
            if (attention_bilinear(a)) store_dsel_q(&zero, I, threads);
        }
    }
    for (int64_t j = thread; g->dcarry_out && j < a->i1; j += threads)
        g->dcarry_out[w->b * a->carry_seq + j] = dcarry[j];
}

static void backward_live(const sel_attention *a, const sel_attention_grad *g)
{
    const words_plan p = sel_attention_words_plan(a, true);
    const int64_t whole = attention_whole(a);

    #pragma omp parallel for num_threads(a->threads) schedule(static, 1)
    for (int64_t b = 0; b < whole; b++) {
        backward_job w = new_backward_job(a, g, &p, b, omp_get_thread_num(), omp_get_thread_num());
        backward_sequence_live(&w, 0, 1);
    }
    for (int64_t b = whole; b < a->B; b++) {
        #pragma omp parallel num_threads(a->threads)
        {
            backward_job w = new_backward_job(a, g, &p, b, omp_get_thread_num(), 0);
            backward_sequence_live(&w, omp_get_thread_num(), a->threads);
        }
    }
}

#endif
