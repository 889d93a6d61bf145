/* attention_words_places.h: which keys are alive, and where a thread keeps their operands (attention_words_live.h).
 *
 * A list is a function of the carries alone, whoever makes it, in whatever order: forward has the same bits on any
 * number of threads.
 */
#ifndef SEL_OPS_ATTENTION_WORDS_PLACES_H
#define SEL_OPS_ATTENTION_WORDS_PLACES_H

#include "ops/attention_words_forward.h"
#include "ops/attention_words_backward.h"

/* The live keys of one group of row tiles. */
typedef struct {
    int32_t *keys;       /* positions: `old` ones before the group's first row, then the group's own, in order */
    int64_t old, count;  /* count - old own ones: all, or none where they are another thread's */
    int64_t row0;        /* position of the group's first row */
} live_list;

/* The keys that one of several threads takes: `size` in a row, counted from i0. */
typedef struct {
    int64_t size, i0;
    int thread, threads;
} key_share;

static key_share all_keys(const sel_attention *a, const words_plan *p)
{
    return (key_share){ .size = p->group * p->height, .i0 = a->i0, .threads = 1 };
}
static bool shares(const key_share *s, int64_t j)
{
    return s->threads == 1 || (j < s->i0 ? j : j - s->i0) / s->size % s->threads == s->thread;
}

/* The threshold in raw units. */
static float dead_limit(const sel_attention *a, int64_t b)
{
    return a->dead_after[b] * (float)sqrt((double)a->dh);
}

static int32_t *list_room(const words_plan *p, float *scratch, int64_t group)
{
    return (int32_t *)(void *)(scratch + p->lists) + group * p->list_size;
}

/* A group's list from that of the group before (NULL: the first) and the carries at its start.  The last keys take the
   places of the dead: position 0, if protected, stays first. */
static live_list next_list(const sel_attention *a, int64_t b, const live_list *from, int32_t *keys,
                           const float *carry, key_share share, int64_t group)
{
    const int64_t row0 = a->i0 + group * share.size, row1 = least(row0 + share.size, a->i1);
    const float limit = dead_limit(a, b);
    int64_t n = from ? from->count : 0;

    if (from) memcpy(keys, from->keys, (size_t)n * sizeof *keys);
    for (int64_t j = 0; !from && j < row0; j++)
        if (shares(&share, j)) keys[n++] = (int32_t)j;
    for (int64_t i = 0; i < n; i++) {
        if (!(carry[keys[i]] > limit)) continue;   /* NaN lives */
        while (n > i + 1 && carry[keys[n - 1]] > limit) n--;
        keys[i] = keys[--n];
    }
    live_list l = { .keys = keys, .old = n, .row0 = row0 };
    for (int64_t j = row0; j < row1 && shares(&share, j); j++) keys[n++] = (int32_t)j;
    l.count = n;
    return l;
}

/* One sequence's keys at their places, `places` of them a head. */
typedef struct {
    const sel_attention *a;
    int64_t b, places;
    int64_t high;              /* places below it have been written */
    bool gradients, around;    /* around: dk and dv go around the caches */
    int32_t *held;             /* [places]: the key there, or NOBODY */
    int32_t *where;            /* [i1]: the place of a key, or NOWHERE; forward: its last one, perhaps another's since;
                                  backward: or LEFT: its gradients are stored */
    /* By tiles of places: what is in use lies together, not in the same sets of the caches for each head. */
    word *k;                   /* [places / TILE][kv_heads][TILE][dh / PAIR] */
    word *v;                   /* backward: the same; forward by pairs of places: [..][kv_heads][TILE_WORDS][dh] */
    word *pairs;               /* backward: k by pairs of places; float32: k */
    word *sel_k, *sel_pairs;   /* the same of sel_k */
    float *dk, *dv, *dsel_k;   /* backward: [places / TILE][kv_heads][TILE][dh] */
} live_places;

enum { NOBODY = -1, NOWHERE = -1, LEFT = -2 };

static live_places new_places(const sel_attention *a, const words_plan *p, int64_t b, float *scratch, bool gradients)
{
    live_places l = { .a = a, .b = b, .places = p->places, .gradients = gradients,
                      .held = (int32_t *)(void *)(scratch + p->held),
                      .where = (int32_t *)(void *)(scratch + p->where),
                      .k = (word *)(scratch + p->live_k), .v = (word *)(scratch + p->live_v),
                      .sel_k = (word *)(scratch + p->live_sel_k), .dk = scratch + p->live_dk,
                      .dv = scratch + p->live_dv, .dsel_k = scratch + p->live_dsel_k };
    l.pairs = WORD_BF16 ? (word *)(scratch + p->live_pairs) : l.k;
    l.sel_pairs = WORD_BF16 ? (word *)(scratch + p->live_sel_pairs) : l.sel_k;
    for (int64_t j = 0; j < a->i1; j++) l.where[j] = NOWHERE;
    return l;
}

/* Where the tile of a kv-head that place s is in lies, in values. */
static int64_t tile_at(const live_places *l, int64_t kh, int64_t s)
{
    return (s / TILE * l->a->kv_heads + kh) * TILE * l->a->dh;
}

/* Tile of a kv-head from the place col0 on. */
static key_tile places_forward(const live_places *l, int64_t kh, int64_t col0)
{
    const int64_t dh = l->a->dh, at = tile_at(l, kh, col0) / PAIR;
    return (key_tile){ .k = l->k + at, .v = l->v + at, .k_row = dh / PAIR, .v_row = dh };
}
static gradient_keys places_backward(const live_places *l, int64_t kh, int64_t col0)
{
    const int64_t at = tile_at(l, kh, col0);
    return (gradient_keys){ .k = l->k + at / PAIR, .v = l->v + at / PAIR, .pairs = l->pairs + at / PAIR,
                            .dk = l->dk + at, .dv = l->dv + at };
}
static gradient_keys places_selecting(const live_places *l, int64_t col0)
{
    const int64_t dh = l->a->dh;
    return (gradient_keys){ .k = l->sel_k + col0 * dh / PAIR, .pairs = l->sel_pairs + col0 * dh / PAIR,
                            .dk = l->dsel_k + col0 * dh };
}

/* n values (a multiple of 16) of x to place s, or of x and y to places s and s + 1, s even, of an array by pairs; y may
   be NULL. */
INLINE void put_pair(word *to, int64_t s, const operand *x, const operand *y, int64_t n)
{
#if WORD_BF16
    word *const w = to + s / 2 * n;
    if (y) {
        pair_rows(w, x, y, n);
        return;
    }
    for (int64_t d = 0; d < n; d += 16) {
        const __m512i old = _mm512_loadu_si512(w + d),
                      one = _mm512_cvtepu16_epi32(load_half(x + d));
        _mm512_storeu_si512(w + d, s % 2 ? _mm512_mask_blend_epi16(0xaaaaaaaa, old, _mm512_slli_epi32(one, 16))
                                         : _mm512_mask_blend_epi16(0x55555555, old, one));
    }
#else
    row_words(to + s * n, x, n);
    if (y) row_words(to + (s + 1) * n, y, n);
#endif
}

/* Rows of one head to place s, or s and s + 1: by row, by pairs. */
INLINE void put_rows(word *rows, word *pairs, int64_t s, const operand *x, const operand *y, int64_t n)
{
    if (rows) row_words(rows + s * n / PAIR, x, n);
    if (rows && y) row_words(rows + (s + 1) * n / PAIR, y, n);
    if (pairs && (WORD_BF16 || !rows)) put_pair(pairs, s, x, y, n);
}

/* The operands of a key to place s, or of two keys to s and s + 1, s even. */
static void put_keys(live_places *l, int64_t s, const int32_t *keys, int n)
{
    const sel_attention *a = l->a;
    const int64_t dh = a->dh;
    const int64_t on = keys[n - 1] - keys[0];
    const operand *const k = operands(a->k) + l->b * a->k_seq + keys[0] * a->k_row, *const k1 = k + on * a->k_row;
    const operand *const v = operands(a->v) + l->b * a->v_seq + keys[0] * a->v_row, *const v1 = v + on * a->v_row;

    for (int64_t kh = 0; kh < a->kv_heads; kh++) {
        const int64_t at = tile_at(l, kh, s) / PAIR, in = s % TILE, d = kh * dh;
        put_rows(l->k + at, l->gradients ? l->pairs + at : NULL, in, k + d, n == 2 ? k1 + d : NULL, dh);
        put_rows(l->gradients ? l->v + at : NULL, l->gradients ? NULL : l->v + at, in, v + d, n == 2 ? v1 + d : NULL,
                 dh);
    }
    if (attention_bilinear(a)) {
        const operand *const x = operands(a->sel_k) + l->b * a->sel_k_seq;
        put_rows(l->sel_k, l->gradients ? l->sel_pairs : NULL, s, x + keys[0] * a->sel_k_row,
                 n == 2 ? x + keys[1] * a->sel_k_row : NULL, dh);
    }
    for (int i = 0; i < n; i++) {
        l->held[s + i] = keys[i];
        l->where[keys[i]] = (int32_t)(s + i);
    }
}

/* Place `from` of a tile to place `to` of another, by row and by pairs, as put_rows; n values a place. */
INLINE void move_row(word *x, const word *old, int64_t to, int64_t from, int64_t n)
{
    for (int64_t i = 0; i < n / PAIR; i += 8)
        _mm256_storeu_si256((__m256i *)(void *)(x + to * n / PAIR + i),
                            _mm256_loadu_si256((const __m256i *)(const void *)(old + from * n / PAIR + i)));
}
INLINE void move_pair(word *x, const word *old, int64_t to, int64_t from, int64_t n)
{
#if WORD_BF16
    word *const now = x + to / 2 * n;
    for (int64_t d = 0; d < n; d += V16) {
        __m512i w = _mm512_loadu_si512(old + from / 2 * n + d);
        if (from % 2 != to % 2) w = _mm512_rol_epi32(w, 16);
        _mm512_storeu_si512(now + d, _mm512_mask_blend_epi16(to % 2 ? 0xaaaaaaaa : 0x55555555,
                                                             _mm512_loadu_si512(now + d), w));
    }
#else
    move_row(x, old, to, from, n);
#endif
}

/* A key's operands from one place to another: its rows may have left the cache long ago. */
static void move_key(live_places *l, int64_t to, int64_t from)
{
    const int64_t dh = l->a->dh;

    for (int64_t kh = 0; kh < l->a->kv_heads; kh++) {
        const int64_t at = tile_at(l, kh, to) / PAIR, old = tile_at(l, kh, from) / PAIR;
        move_row(l->k + at, l->k + old, to % TILE, from % TILE, dh);
        if (l->gradients) move_row(l->v + at, l->v + old, to % TILE, from % TILE, dh);
        else move_pair(l->v + at, l->v + old, to % TILE, from % TILE, dh);
        if (WORD_BF16 && l->gradients) move_pair(l->pairs + at, l->pairs + old, to % TILE, from % TILE, dh);
    }
    if (attention_bilinear(l->a)) {
        move_row(l->sel_k, l->sel_k, to, from, dh);
        if (WORD_BF16 && l->gradients) move_pair(l->sel_pairs, l->sel_pairs, to, from, dh);
    }
    l->held[to] = l->held[from];
    l->where[l->held[to]] = (int32_t)to;
}

/* Places up to the end of the tile of the last one hold something: numbers, if nobody. */
static void open_places(live_places *l, int64_t count)
{
    const sel_attention *a = l->a;
    const int64_t end = (count + TILE - 1) / TILE * TILE, n = a->dh / PAIR, bytes = (end - l->high) * n * 4;
    if (end <= l->high) return;
    const int64_t at = l->high * a->kv_heads * n;
    const size_t all = (size_t)(bytes * a->kv_heads);
    memset(l->k + at, 0, all);
    memset(l->v + at, 0, all);
    if (WORD_BF16 && l->gradients) memset(l->pairs + at, 0, all);
    if (attention_bilinear(a)) {
        memset(l->sel_k + l->high * n, 0, (size_t)bytes);
        if (WORD_BF16 && l->gradients) memset(l->sel_pairs + l->high * n, 0, (size_t)bytes);
    }
    for (int64_t s = l->high; s < end; s++) l->held[s] = NOBODY;
    l->high = end;
}

/* Forward: a list's keys, at their places. */
static void hold_keys(live_places *l, const live_list *list)
{
    open_places(l, list->count);
    for (int64_t s = 0; s < list->count; s++) {
        const int64_t from = l->where[list->keys[s]];
        if (l->held[s] == list->keys[s]) continue;
        if (from != NOWHERE && l->held[from] == list->keys[s]) {
            move_key(l, s, from);
            continue;
        }
        const bool two = s % 2 == 0 && s + 1 < list->count && l->held[s + 1] != list->keys[s + 1];
        put_keys(l, s, list->keys + s, two ? 2 : 1);
        s += two;
    }
}

/* ---- backward: gradients gather at the keys' places ---- */

INLINE void scale_row(float *to, const float *from, float scale, int64_t n, bool around)
{
    for (int64_t d = 0; d < n; d += V16)
        store_result(to + d, _mm512_mul_ps(_mm512_loadu_ps(from + d), _mm512_set1_ps(scale)), around);
}

/* The places of a list from s0 on: their sums are the gradients. */
static void release_gradients(live_places *l, const sel_attention_grad *g, const live_list *list, int64_t s0)
{
    const sel_attention *a = l->a;
    const int64_t dh = a->dh;
    const float scale = (float)(1.0 / sqrt((double)dh));

    for (int64_t s = s0; s < list->count; s++) {
        const int64_t j = list->keys[s];
        for (int64_t kh = 0; kh < a->kv_heads; kh++) {
            const int64_t at = tile_at(l, kh, s) + s % TILE * dh;
            scale_row(g->dk + l->b * g->dk_seq + j * g->dk_row + kh * dh, l->dk + at, scale, dh, l->around);
            scale_row(g->dv + l->b * g->dv_seq + j * g->dv_row + kh * dh, l->dv + at, 1.0f, dh, l->around);
        }
        if (attention_bilinear(a))
            scale_row(g->dsel_k + l->b * g->dsel_k_seq + j * g->dsel_k_row, l->dsel_k + s * dh, scale, dh,
                      false);
        l->held[s] = NOBODY;
        l->where[j] = LEFT;
    }
}

/* No gradient for key j. */
static void clear_gradients(const live_places *l, const sel_attention_grad *g, int64_t j)
{
    const sel_attention *a = l->a;
    const size_t bytes = (size_t)(a->kv_heads * a->dh) * sizeof(float);
    memset(g->dk + l->b * g->dk_seq + j * g->dk_row, 0, bytes);
    memset(g->dv + l->b * g->dv_seq + j * g->dv_row, 0, bytes);
    if (attention_bilinear(a))
        memset(g->dsel_k + l->b * g->dsel_k_seq + j * g->dsel_k_row, 0, (size_t)a->dh * sizeof(float));
}

INLINE void clear_row(float *to, int64_t n)
{
    for (int64_t d = 0; d < n; d += V16) _mm512_storeu_ps(to + d, _mm512_setzero_ps());
}

/* The sums at place s: zero. */
static void start_sums(live_places *l, int64_t s)
{
    const int64_t dh = l->a->dh;
    for (int64_t kh = 0; kh < l->a->kv_heads; kh++) {
        const int64_t at = tile_at(l, kh, s) + s % TILE * dh;
        clear_row(l->dk + at, dh);
        clear_row(l->dv + at, dh);
    }
    if (attention_bilinear(l->a)) clear_row(l->dsel_k + s * dh, dh);
}

/* Those of place `from`. */
static void move_sums(live_places *l, int64_t s, int64_t from)
{
    const int64_t dh = l->a->dh;
    for (int64_t kh = 0; kh < l->a->kv_heads; kh++) {
        const int64_t at = tile_at(l, kh, s) + s % TILE * dh, old = tile_at(l, kh, from) + from % TILE * dh;
        scale_row(l->dk + at, l->dk + old, 1.0f, dh, false);
        scale_row(l->dv + at, l->dv + old, 1.0f, dh, false);
    }
    if (attention_bilinear(l->a)) scale_row(l->dsel_k + s * dh, l->dsel_k + from * dh, 1.0f, dh, false);
}

/* From the list of the group after (NULL: none) to a group's: what the later group's own keys gathered is stored; then
   those that had taken the place of another go back, all to places of that group's own, and those others come. */
static void hold_gradients(live_places *l, const sel_attention_grad *g, const live_list *after, const live_list *list)
{
    if (after) release_gradients(l, g, after, after->old);
    open_places(l, list->count);
    for (int64_t s = after ? after->old : 0; s < list->count; s++) {
        const int64_t from = l->where[list->keys[s]];
        if (l->held[s] == list->keys[s] || from == NOWHERE) continue;
        move_key(l, s, from);
        move_sums(l, s, from);
        l->held[from] = NOBODY;
    }
    for (int64_t s = 0; s < list->count; s++) {
        if (l->held[s] == list->keys[s]) continue;
        const bool two = s % 2 == 0 && s + 1 < list->count && l->held[s + 1] != list->keys[s + 1];
        put_keys(l, s, list->keys + s, two ? 2 : 1);
        start_sums(l, s);
        if (two) start_sums(l, ++s);
    }
}

#endif
