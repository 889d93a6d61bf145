/* attention_words_live.h: dead keys (spec, section 3.1) for the AVX-512 kernels; included once a kernel file.
 *
 * Where attention.h's `dead_after` is given, a row tile attends to a list of live keys: those before its group of row
 * tiles whose F had not passed the threshold when the group began, then the group's own.  The kernels know nothing
 * of it: a key's place in the list takes the place of its position, so that the causal edge is again a diagonal
 * (`off`).  F of a dead key stays as it was.
 *
 * A thread keeps the operands of the listed keys side by side, by place (attention_words_places.h).  From group to
 * group few places change: the list's last keys take the places of those that died, the group's own come after.  So
 * each key is copied a few times in all, not once for each row tile that sees it.  In backward, which goes by groups,
 * descending, the sums dK and dV lie at the same places and leave them when the key's own rows are done.
 *
 * Row tiles have fewer rows than elsewhere where that saves work: keys die soon, and a group's own are all alive.
 */
#ifndef SEL_OPS_ATTENTION_WORDS_LIVE_H
#define SEL_OPS_ATTENTION_WORDS_LIVE_H

#include "ops/attention_words_places.h"
#include "ops/levels.h"

/* Few products leave much of what comes next to be asked for after them. */
static void fetch_rest(fetch_queue *q)
{
    while (q->n) fetch_some(q);
}

/* ---- forward ---- */

static row_tile live_row_tile(const forward_job *w, int64_t I)
{
    const sel_attention *a = w->a;
    const int64_t row0 = a->i0 + I * w->p->height, rows = least(a->i1 - row0, w->p->height);
    return (row_tile){ .I = I, .row0 = row0, .rows = (int)rows };
}

/* Asks for what comes after this head of a row tile: the next one's rows, the lines its own results go to, and the keys
   that the next group brings. */
static void fetch_live(forward_job *w, const row_tile *t, const row_tile *next, int64_t h, bool new_keys)
{
    const sel_attention *a = w->a;
    const int64_t kh = h * a->kv_heads / a->heads, dh = a->dh;
    fetch_queue *const q = &w->room.next;

    q->n = 0;
    if (new_keys && next->rows && h % (a->heads / a->kv_heads) == 0) {
        fetch_operands(q, operands(a->v) + w->b * a->v_seq + next->row0 * a->v_row + kh * dh, a->v_row, next->rows, dh);
        fetch_operands(q, operands(a->k) + w->b * a->k_seq + next->row0 * a->k_row + kh * dh, a->k_row, next->rows, dh);
    }
    if (!w->around) fetch_operands(q, out_of(w, t, h), a->out_row, t->rows, dh);
    if (h + 1 < a->heads) fetch_operands(q, q_of(w, t, h + 1), a->q_row, t->rows, dh);
    else if (next->rows) fetch_operands(q, q_of(w, next, 0), a->q_row, next->rows, dh);
}

/* One row tile of the list's group, all heads; carry [i1] of the listed keys moves on past its rows. */
static void forward_tile_live(forward_job *w, int64_t I, const live_places *l, const live_list *live, float *carry)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const row_tile t = live_row_tile(w, I), next = I + 1 < p->tiles ? live_row_tile(w, I + 1) : (row_tile){ .rows = 0 };
    const int64_t before = live->old + t.row0 - live->row0, count = before + t.rows, dead = live->row0 - live->old;
    float *const raw = w->scratch + p->raw, *const F = w->scratch + p->f;
    double rowsum[TILE] = { 0 };
    const bool memory = a->tau > 0.0, bilinear = attention_bilinear(a);
    word *const sel_qt = (word *)(w->scratch + p->sel_qt);

    if (bilinear) transpose_selecting(w, &t, sel_qt);
    for (int64_t block = 0; block < count; block += SUPER * TILE)
        for (int64_t h = 0; h < a->heads; h++) {
            const head_rows rows = rows_of(w, h);
            const int64_t end = least(block + SUPER * TILE, count);

            if (block == 0)
                transpose_words((word *)(w->scratch + p->qt) + slot(w, h) * a->dh / PAIR * TILE, q_of(w, &t, h),
                                a->q_row, t.rows, a->dh);
            if (end == count) fetch_live(w, &t, &next, h, (I + 1) % p->group == 0);
            for (int64_t col0 = block; col0 < end; col0 += TILE) {
                float *const NF = F + (col0 - block) * TILE;
                const int64_t off = before - col0;
                const tile_view view = view_of(off, 0, t.rows);
                const int cols = (int)least(count - col0, TILE);
                const int32_t *const keys = live->keys + col0;
                const key_tile o = places_forward(l, h * a->kv_heads / a->heads, col0);

                if (h == 0) {
                    float here[TILE];
                    for (int j = 0; j < cols; j++) here[j] = carry[keys[j]];
                    const key_tile own = bilinear ? (key_tile){ .k = l->sel_k + col0 * o.k_row, .k_row = o.k_row } : o;
                    raw_logits(&w->room, &own, bilinear ? sel_qt : rows.q, &view, raw);
                    select_words(a, raw, NF, here, t.rows, cols, view.lanes, keys[0], off);
                    for (int j = 0; j < cols; j++) carry[keys[j]] = here[j];
                    if (memory) add_forgotten(NF, t.rows, cols, off, a->tau * sqrt((double)a->dh), rowsum);
                    if (bilinear) raw_logits(&w->room, &o, rows.q, &view, raw);
                }
                attend_tile(&w->room, &o, &rows, &view, h == 0 ? raw : NULL, NF, col0 == 0);
            }
            if (end < count) continue;
            fetch_rest(&w->room.next);
            finish_rows(w, &t, h);
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

/* A group of row tiles, its list's keys in their places, from the carries at its start; they move on. */
static void forward_group_live(forward_job *w, int64_t group, live_places *l, const live_list *live, float *carry)
{
    hold_keys(l, live);
    for (int64_t I = group * w->p->group; I < least((group + 1) * w->p->group, w->p->tiles); I++)
        forward_tile_live(w, I, l, live, carry);
}

static void forward_sequence_live(forward_job *w)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    float *const carry = w->scratch + p->carry;
    live_places places = new_places(a, p, w->b, w->scratch, false);
    live_list list;

    w->around = goes_around(a, a->out, a->out_seq, a->out_row, sizeof(operand));
    start_carry(w, carry, 0, a->i1);
    for (int64_t g = 0; g < p->groups; g++) {
        if (a->saved) memcpy(group_carry(w, g), carry, (size_t)a->i1 * sizeof *carry);
        list = next_list(a, w->b, g ? &list : NULL, list_room(p, w->scratch, g), carry, all_keys(a, p), g);
        forward_group_live(w, g, &places, &list, carry);
    }
    end_results(w->around);
    end_carry(w, carry);
    store_memory(w);
    if (a->live) a->live[w->b] = w->live;
}

/* The carries of one column tile at the start of every group, from the selection alone. */
static void carry_column_live(const forward_job *w, int64_t J)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t j0 = J * TILE, j1 = least(j0 + TILE, a->i1), kw = a->dh / PAIR;
    const float limit = dead_limit(a, w->b);
    float *const carry = w->scratch + p->carry, *const raw = w->scratch + p->raw, *const F = w->scratch + p->f;
    word *const Qt = (word *)(w->scratch + p->qt), *const k = (word *)(w->scratch + p->live_k);
    const selection_source from = attention_selection(a);
    const operand *const selecting = operands(from.k) + w->b * from.k_seq;
    const key_tile o = { .k = k, .k_row = kw };

    for (int64_t j = j0; j < j1; j++) row_words(k + (j - j0) * kw, selecting + j * from.k_row, a->dh);
    memset(k + (j1 - j0) * kw, 0, (size_t)((TILE - (j1 - j0)) * kw) * sizeof *k);
    start_carry(w, carry, j0, j1);
    for (int64_t I = 0; I <= (p->groups - 1) * p->group; I++) {
        const row_tile t = live_row_tile(w, I);
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

/* One sequence by all threads: the carries, then each thread makes all lists and takes groups. */
static void forward_shared_live(const sel_attention *a, const words_plan *p, int64_t b)
{
    forward_job best = new_forward_job(a, p, b, 0, 0);
    #pragma omp parallel num_threads(a->threads)
    {
        forward_job w = new_forward_job(a, p, b, omp_get_thread_num(), 0);
        float *const carry = w.scratch + p->carry;
        live_list lists[MOST_CARRIES];

        w.around = goes_around(a, a->out, a->out_seq, a->out_row, sizeof(operand));
        #pragma omp for schedule(dynamic, 1)
        for (int64_t J = 0; J < p->columns; J++) carry_column_live(&w, J);
        live_places places = new_places(a, p, b, w.scratch, false);
        for (int64_t g = 0; g < p->groups; g++)
            lists[g] = next_list(a, b, g ? &lists[g - 1] : NULL, list_room(p, w.scratch, g), group_carry(&w, g),
                                 all_keys(a, p), g);
        #pragma omp for schedule(dynamic, 1)
        for (int64_t k = 0; k < p->groups; k++) {   /* later groups see more keys: the dearest first */
            const int64_t g = p->groups - 1 - k;
            memcpy(carry, group_carry(&w, g), (size_t)a->i1 * sizeof *carry);
            forward_group_live(&w, g, &places, &lists[g], carry);
            if (g == p->groups - 1) end_carry(&w, carry);
        }
        end_results(w.around);
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

    #pragma omp parallel for num_threads(a->threads) schedule(dynamic, 1)   /* few keys live in some */
    for (int64_t b = 0; b < whole; b++) {
        forward_job w = new_forward_job(a, &p, b, omp_get_thread_num(), omp_get_thread_num());
        sel_attention_find_dead_avx512(a, b, 1);
        forward_sequence_live(&w);
    }
    for (int64_t b = whole; b < a->B; b++) {
        sel_attention_find_dead_avx512(a, b, a->threads);
        if (p.groups > 1) {
            forward_shared_live(a, &p, b);
        } else {
            forward_job w = new_forward_job(a, &p, b, 0, 0);
            forward_sequence_live(&w);
        }
    }
}

/* ---- backward ---- */

/* Tile c of the list, and row tile I; its P and dZ are the `side`-th.  cols 0 or less: none of its keys is seen. */
static gradient_tile live_tile(const backward_job *w, const live_list *live, int64_t I, int64_t c, int side)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t row0 = a->i0 + I * p->height, rows = least(a->i1 - row0, p->height), col0 = c * TILE,
                  before = live->old + row0 - live->row0, at = side * TILE * TILE;
    const int64_t cols = least(least(before + rows, live->count) - col0, TILE);
    return new_gradient_tile(before - col0, cols > 0 ? live->keys[col0] : 0, (int)rows, (int)cols,
                             (word *)(w->scratch + p->pi) + at, (word *)(w->scratch + p->zi) + at,
                             (word *)(w->scratch + p->zk) + at);
}

/* Some tiles of a group's list that go together: [first, first + count). */
typedef struct {
    const live_places *places;
    const live_list *live;
    int64_t group, first, count;
    bool opens;                   /* the first ones: rows are packed, dQ starts */
    float *dcarry;                /* [i1], of the sequence */
} live_tiles;

/* Where the rows of row tile I lie: all of the sequence's where threads share it, else the group's. */
static int64_t place_of(const backward_job *w, int64_t I) { return w->shared ? I : I % w->p->group; }

/* What comes through F in tile t, the c-th of those, of row tile I: dZ at Z0 becomes words. */
static void select_gradients_live(const backward_job *w, const live_tiles *u, const gradient_tile *t, int64_t I,
                                  int64_t c, float *Z0)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int32_t *const list = u->live->keys + (u->first + c) * TILE;
    const int64_t at = (c * p->group + I - u->group * p->group) * TILE * TILE;
    float *const G = w->scratch + p->g + c * TILE * TILE;
    float here[TILE];

    for (int j = 0; j < t->cols; j++) here[j] = u->dcarry[list[j]];
    if (a->tau > 0.0 && w->g->memory_coef != 0.0f)
        add_memory(w, t, a->i0 + I * p->height, w->scratch + p->f + at, G);
    selection_words(a, t, w->scratch + p->l0 + at, G, Z0, here);
    for (int j = 0; j < t->cols; j++) u->dcarry[list[j]] = here[j];
}

/* One head over one row tile and those tiles. */
static void live_head(backward_job *w, const live_tiles *u, int64_t I, int64_t h)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t square = TILE * TILE, kh = h * a->kv_heads / a->heads, I0 = u->group * p->group;
    const gradient_rows rows = rows_at(w, h, place_of(w, I)), *const of_rows = &rows;
    const bool selecting = h == 0 && !attention_bilinear(a);
    float *const Z0 = w->scratch + p->raw;

    if (u->opens && h && !w->shared) pack_rows_at(w, h, I, place_of(w, I));
    for (int64_t c0 = 0; c0 < u->count; c0 += SIDE) {
        gradient_tile tiles[SIDE];
        gradient_keys keys[SIDE];
        const gradient_tile *t[SIDE];
        const gradient_keys *of[SIDE];
        int n = 0;

        for (int64_t c = c0; c < c0 + SIDE && c < u->count; c++) {
            tiles[n] = live_tile(w, u->live, I, u->first + c, n);
            if (tiles[n].cols <= 0) continue;
            const int64_t at = (c * p->group + I - I0) * square;
            const float *const L0 = w->scratch + p->l0 + at, *const NF = w->scratch + p->f + at;
            float *const G = w->scratch + p->g + c * square;

            keys[n] = places_backward(u->places, kh, (u->first + c) * TILE);
            tile_gradients(&w->room, &tiles[n], &keys[n], &rows, selecting ? L0 : NULL, NF, G, h == 1 || a->heads == 1,
                           selecting ? Z0 : NULL);
            if (selecting) select_gradients_live(w, u, &tiles[n], I, c, Z0);
            t[n] = &tiles[n];
            of[n] = &keys[n];
            key_gradients(&w->room, 1, &t[n], &of_rows, &keys[n], false);
            n++;
        }
        if (n) query_gradients(&w->room, n, t, of, rows.dq, u->opens && c0 == 0);
    }
}

/* A selection with rows of its own, after all heads: what comes through F, to dsel_q and dsel_k alone. */
static void live_selection(backward_job *w, const live_tiles *u, int64_t I)
{
    const gradient_rows rows = selecting_rows_at(w, place_of(w, I)), *const of_rows = &rows;
    float *const Z0 = w->scratch + w->p->raw;

    for (int64_t c = 0; c < u->count; c++) {
        const gradient_tile tile = live_tile(w, u->live, I, u->first + c, 0), *const t = &tile;
        if (tile.cols <= 0) continue;
        const gradient_keys keys = places_selecting(u->places, (u->first + c) * TILE), *const of = &keys;

        memset(Z0, 0, TILE * TILE * sizeof *Z0);
        select_gradients_live(w, u, t, I, c, Z0);
        key_gradients(&w->room, 1, &t, &of_rows, &keys, false);
        query_gradients(&w->room, 1, &t, &of, rows.dq, u->opens && c == 0);
    }
}

/* The selecting logits and -F of the c-th of some tiles in all row tiles of a group, upwards from the saved carry. */
static void rebuild_live(const backward_job *w, const live_tiles *u, int64_t c)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t kw = a->dh / PAIR, I0 = u->group * p->group, I1 = least(I0 + p->group, p->tiles),
                  tile = u->first + c;
    const float *const saved = a->saved + (w->b * sel_attention_carries(p->rows) + u->group) * a->i1;
    const int32_t *const keys = u->live->keys + tile * TILE;
    const int most = live_tile(w, u->live, I1 - 1, tile, 0).cols;
    const word *const k = attention_bilinear(a) ? places_selecting(u->places, tile * TILE).k
                                                : places_backward(u->places, 0, tile * TILE).k;
    float carry[TILE];

    for (int j = 0; j < most; j++) carry[j] = saved[keys[j]];
    for (int64_t I = I0; I < I1; I++) {
        const gradient_tile t = live_tile(w, u->live, I, tile, 0);
        const int64_t at = (c * p->group + I - I0) * TILE * TILE;
        float *const L0 = w->scratch + p->l0 + at;
        if (t.cols <= 0) continue;
        for (int v0 = 0; v0 < t.view.lanes; v0 += 32)
            product_32(end_block(&t.view, v0 + V16) * 8, kw, k, kw, 1, selecting_rows_at(w, place_of(w, I)).qt + v0,
                       TILE, L0 + v0, TILE, true);
        select_words(a, L0, w->scratch + p->f + at, carry, t.rows, t.cols, t.view.lanes, t.col0, t.view.off);
    }
}

/* Asks for the places that a head's gradients of row tile I go to. */
static void fetch_live_gradients(backward_job *w, int64_t h, int64_t I)
{
    const sel_attention *a = w->a;
    const sel_attention_grad *g = w->g;
    const int64_t height = w->p->height, real = least(w->p->rows - I * height, height), width = a->dh * 4,
                  kh = h * a->kv_heads / a->heads, j0 = a->i0 + I * height;
    fetch_queue *const q = &w->room.next;

    if (w->around) return;
    fetch_rows(q, g->dq + row_place(w, g->dq_seq, g->dq_row, h, I), g->dq_row * 4, real, width);
    if (h % (a->heads / a->kv_heads)) return;
    fetch_rows(q, g->dk + w->b * g->dk_seq + j0 * g->dk_row + kh * a->dh, g->dk_row * 4, real, width);
    fetch_rows(q, g->dv + w->b * g->dv_seq + j0 * g->dv_row + kh * a->dh, g->dv_row * 4, real, width);
}

/* Asks for a head's rows of row tile I, which are to be packed. */
static void fetch_live_rows(backward_job *w, int64_t h, int64_t I)
{
    const sel_attention *a = w->a;
    const int64_t height = w->p->height, real = least(w->p->rows - I * height, height);
    fetch_queue *const q = &w->room.next;

    fetch_block(q, a->lse + (w->b * a->heads + h) * w->p->rows + I * height, real * 4 < CHUNK ? CHUNK : real * 4);
    fetch_operands(q, operands(a->out) + row_place(w, a->out_seq, a->out_row, h, I), a->out_row, real, a->dh);
    fetch_operands(q, operands(w->g->dout) + row_place(w, a->out_seq, a->out_row, h, I), a->out_row, real, a->dh);
    fetch_operands(q, operands(a->q) + row_place(w, a->q_seq, a->q_row, h, I), a->q_row, real, a->dh);
}

/* Asks for what head h needs of the keys of those tiles: where more places are in use than a cache holds. */
static void fetch_live_keys(backward_job *w, const live_tiles *u, int64_t h)
{
    const sel_attention *a = w->a;
    const int64_t words = TILE * a->dh * 4 / PAIR, sums = TILE * a->dh * 4;
    fetch_queue *const q = &w->room.next;

    for (int64_t c = u->count - 1; c >= 0; c--) {
        const gradient_keys keys = places_backward(u->places, h * a->kv_heads / a->heads, (u->first + c) * TILE);
        if (WORD_BF16) fetch_block(q, keys.pairs, words);
        fetch_block(q, keys.dk, sums);
        fetch_block(q, keys.dv, sums);
        fetch_block(q, keys.v, words);
        fetch_block(q, keys.k, words);
    }
}

/* The keys of the group before that have no place yet: how many, listed at `coming`. */
static int64_t find_coming(const live_places *l, const live_list *before, int32_t *coming)
{
    int64_t n = 0;
    for (int64_t s = 0; before && s < before->count; s++)
        if (l->where[before->keys[s]] == NOWHERE) coming[n++] = before->keys[s];
    return n;
}

/* Asks for the rows of keys [i0, i1) of those, all heads. */
static void fetch_coming(backward_job *w, const int32_t *coming, int64_t i0, int64_t i1)
{
    const sel_attention *a = w->a;
    const int64_t n = a->kv_heads * a->dh;

    for (int64_t i = i0; i < i1; i++) {
        fetch_operands(&w->room.next, operands(a->k) + w->b * a->k_seq + coming[i] * a->k_row, 0, 1, n);
        fetch_operands(&w->room.next, operands(a->v) + w->b * a->v_seq + coming[i] * a->v_row, 0, 1, n);
    }
}

enum { CACHED = 1 << 22 };   /* bytes of keys that a core finds in cache again, in time, from row tile to row tile */

/* The row tiles of a group against its list, or a thread's part of it; before: the list that comes next, or NULL. */
static void backward_group_live(backward_job *w, int64_t group, const live_places *places, const live_list *live,
                                const live_list *before, float *dcarry)
{
    const sel_attention *a = w->a;
    const words_plan *p = w->p;
    const int64_t I0 = group * p->group, I1 = least(I0 + p->group, p->tiles), head = TILE * a->dh;
    const int64_t tiles = (live->count + TILE - 1) / TILE;
    int32_t *const coming = (int32_t *)(void *)(w->scratch + p->coming);
    const int64_t n_coming = find_coming(places, before, coming);
    const bool many = tiles * TILE * a->kv_heads * a->dh * 4 * (WORD_BF16 ? 7 : 8) / 2 > CACHED;

    for (int64_t I = I0; I < I1; I++) {
        if (!w->shared) pack_rows_at(w, 0, I, place_of(w, I));
        /* A row tile may see none of the tiles that come first, or of this thread's. */
        if (!w->shared && p->group == 1) continue;
        memset(rows_at(w, 0, place_of(w, I)).dq, 0, (size_t)(a->heads * head) * sizeof(float));
        if (attention_bilinear(a))
            memset(selecting_rows_at(w, place_of(w, I)).dq, 0, (size_t)head * sizeof(float));
    }
    for (int64_t first = 0; first < tiles; first += p->live_tiles) {
        const live_tiles u = { .places = places, .live = live, .group = group, .first = first,
                               .count = least(tiles - first, p->live_tiles), .opens = first == 0, .dcarry = dcarry };
        for (int64_t c = 0; c < u.count; c++) rebuild_live(w, &u, c);
        for (int64_t I = I1 - 1; I >= I0; I--) {
            for (int64_t n = 1; n <= a->heads; n++) {   /* head 0 last: its dF needs the other heads' */
                const int64_t h = n % a->heads, next = (n + 1) % a->heads, after = n + 1 < a->heads ? I : I - 1;
                w->room.next.n = 0;
                if (many && n < a->heads) fetch_live_keys(w, &u, next);
                if (u.opens && !w->shared) fetch_live_gradients(w, h, I);
                if (u.opens && I == I0) fetch_coming(w, coming, (n - 1) * n_coming / a->heads, n * n_coming / a->heads);
                if (u.opens && !w->shared && after >= 0) fetch_live_rows(w, next, after);
                live_head(w, &u, I, h);
                fetch_rest(&w->room.next);
            }
            if (attention_bilinear(a)) live_selection(w, &u, I);
        }
    }
    for (int64_t I = I0; I < I1 && !w->shared; I++) {
        const sel_attention_grad *g = w->g;
        for (int64_t h = 0; h < a->heads; h++)
            store_rows(w, g->dq + row_place(w, g->dq_seq, g->dq_row, h, I), g->dq_row,
                       rows_at(w, h, place_of(w, I)).dq, I, 1);
        if (attention_bilinear(a))
            store_rows(w, g->dsel_q + row_place(w, g->dsel_q_seq, g->dsel_q_row, 0, I), g->dsel_q_row,
                       selecting_rows_at(w, place_of(w, I)).dq, I, 1);
    }
}

/* Backward of a sequence: whole by one thread (threads 1), or one of several threads that share it, each with keys of
   its own. */
static void backward_sequence_live(backward_job *w, int thread, int threads)
{
    const sel_attention *a = w->a;
    const sel_attention_grad *g = w->g;
    const words_plan *p = w->p;
    const key_share share = { .size = p->group * p->height, .i0 = a->i0, .thread = thread, .threads = threads };
    float *const dcarry = w->pack + p->dcarry;
    live_places places = new_places(a, p, w->b, w->scratch, true);
    live_list lists[MOST_CARRIES];

    w->shared = threads > 1;
    w->around = places.around = gradients_go_around(a, g);
    for (int64_t I = thread; w->shared && I < p->tiles; I += threads)
        for (int64_t h = 0; h < a->heads; h++) pack_rows(w, h, I);
    for (int64_t j = 0; j < a->i1; j++)
        if (shares(&share, j)) dcarry[j] = g->dcarry_in ? g->dcarry_in[w->b * a->carry_seq + j] : 0.0f;
    for (int64_t k = 0; k < p->groups; k++)
        lists[k] = next_list(a, w->b, k ? &lists[k - 1] : NULL, list_room(p, w->scratch, k),
                             a->saved + (w->b * sel_attention_carries(p->rows) + k) * a->i1, share, k);
    if (w->shared) {
        #pragma omp barrier
    }
    for (int64_t k = p->groups - 1; k >= 0; k--) {
        hold_gradients(&places, g, k + 1 < p->groups ? &lists[k + 1] : NULL, &lists[k]);
        backward_group_live(w, k, &places, &lists[k], k ? &lists[k - 1] : NULL, dcarry);
    }
    release_gradients(&places, g, &lists[0], 0);
    for (int64_t j = 0; j < a->i0; j++)   /* that were dead before the first row */
        if (shares(&share, j) && places.where[j] != LEFT) clear_gradients(&places, g, j);
    if (w->shared) {
        #pragma omp barrier
        const backward_job zero = new_backward_job(a, g, p, w->b, 0, 0);
        for (int64_t I = thread; I < p->tiles; I += threads) {
            for (int64_t h = 0; h < a->heads; h++) store_dq(&zero, h, I, threads);
            if (attention_bilinear(a)) store_dsel_q(&zero, I, threads);
        }
    }
    end_results(w->around);
    for (int64_t j = 0; g->dcarry_out && j < a->i1; j++)
        if (shares(&share, j)) g->dcarry_out[w->b * a->carry_seq + j] = dcarry[j];
}

static void backward_live(const sel_attention *a, const sel_attention_grad *g)
{
    const words_plan p = sel_attention_words_plan(a, true);
    const int64_t whole = attention_whole(a);

    #pragma omp parallel for num_threads(a->threads) schedule(dynamic, 1)   /* few keys live in some */
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
