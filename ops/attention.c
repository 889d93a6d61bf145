/* attention.c: tiles, groups and scratch of an attention call (attention_plan.h); no arithmetic.
 *
 * The definition is attention.h, as a program tests/reference.c; portable: attention_{forward,backward,carry}_c.c;
 * AVX-512's attention_words*.h, installed by attention_avx512*.c, which also choose for each call.
 */
#include "core/base/error.h"
#include "ops/attention_plan.h"

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

static int64_t tiles_a_group(int64_t tiles) { return tiles > MOST_CARRIES ? ceil_div(tiles, MOST_CARRIES) : 1; }

/* Rows of a row tile where keys die (words_plan): the fewer, the sooner a key is left out, and the more carries. */
static int64_t live_height(int64_t rows) { return rows <= MOST_CARRIES * TILE / 2 ? TILE / 2 : TILE; }

int64_t sel_attention_carries(int64_t rows)
{
    const int64_t tiles = ceil_div(rows, live_height(rows));
    return tiles ? ceil_div(tiles, tiles_a_group(tiles)) : 0;
}

/* The most carries that a call of up to `rows` rows saves: not those of `rows` itself, which may be in larger groups.
 */
static int64_t most_carries(int64_t rows)
{
    const int64_t tiles = ceil_div(rows, TILE / 2);
    return tiles < MOST_CARRIES ? tiles : MOST_CARRIES;
}

int64_t sel_attention_saved_size(int64_t rows) { return most_carries(rows) * rows; }

/* Takes n floats at *end, on a cache line, and returns where they start. */
static int64_t take(int64_t *end, int64_t n)
{
    const int64_t at = *end;
    *end += round_up(n, LANES);
    return at;
}

attention_plan sel_attention_plan(const sel_attention *a, bool backward)
{
    attention_plan p = { 0 };
    const int64_t H = a->heads, dh = a->dh, square = TILE * TILE;
    const bool bilinear = attention_bilinear(a);
    int64_t end = 0;

    p.rows = a->i1 - a->i0;
    p.tiles = ceil_div(p.rows, TILE);
    p.columns = ceil_div(a->i1, TILE);
    p.group = tiles_a_group(p.tiles);
    p.groups = ceil_div(p.tiles, p.group);
    p.dhp = round_up(dh, LANES);
    p.copied = p.dhp != dh || a->bfloat16;

    if (!backward) {
        p.qt = take(&end, H * dh * TILE);
        p.ot = take(&end, H * dh * TILE);
        p.ml = take(&end, 2 * H * TILE);
        p.tile = take(&end, square);
        p.krows = take(&end, a->bfloat16 ? TILE * dh : 0);
        p.vrows = take(&end, a->bfloat16 ? TILE * dh : 0);
        if (a->selective) {
            p.f = take(&end, SUPER * square);
            p.carry = take(&end, a->i1);
            p.began = take(&end, a->dead_after ? a->i1 : 0);
            p.rowsum = take(&end, 2 * TILE);
        }
        p.sel_qt = take(&end, bilinear ? dh * TILE : 0);
    } else {
        p.p = take(&end, square);
        p.dz = take(&end, square);
        if (a->selective) {
            p.g = take(&end, square);
            p.l0 = take(&end, p.group * square);
            p.f = take(&end, p.group * square);
        }
        p.dk = take(&end, a->kv_heads * TILE * p.dhp);
        p.dv = take(&end, a->kv_heads * TILE * p.dhp);
        p.kcopy = take(&end, p.copied ? a->kv_heads * TILE * p.dhp : 0);
        p.vcopy = take(&end, p.copied ? a->kv_heads * TILE * p.dhp : 0);
        p.dq = take(&end, p.tiles * TILE * H * p.dhp);
        p.dsel_q = take(&end, bilinear ? p.tiles * TILE * p.dhp : 0);
        p.dsel_k = take(&end, bilinear ? TILE * p.dhp : 0);
        p.sel_kcopy = take(&end, bilinear && p.copied ? TILE * p.dhp : 0);
    }
    p.thread_size = end;
    end *= a->threads;

    if (!backward) {
        p.carries = take(&end, a->selective && !a->saved && a->B % a->threads ? most_carries(p.rows) * a->i1 : 0);
    } else {
        int64_t pack = 0;
        p.qt_all = take(&pack, p.tiles * H * dh * TILE);
        p.dot_all = take(&pack, p.tiles * H * dh * TILE);
        p.lse_all = take(&pack, p.tiles * H * TILE);
        p.delta_all = take(&pack, p.tiles * H * TILE);
        p.q_rows = take(&pack, p.copied ? p.rows * H * p.dhp : 0);
        p.dout_rows = take(&pack, p.copied ? p.rows * H * p.dhp : 0);
        p.sel_qt_all = take(&pack, bilinear ? p.tiles * dh * TILE : 0);
        p.sel_q_rows = take(&pack, bilinear && p.copied ? p.rows * p.dhp : 0);
        p.pack0 = end;
        p.pack_size = pack;
        end += pack * (a->B >= a->threads ? a->threads : 1);
    }
    p.total = end;
    return p;
}

words_plan sel_attention_words_plan(const sel_attention *a, bool backward)
{
    words_plan p = { 0 };
    const int64_t H = a->heads, dh = a->dh, square = TILE * TILE, kv = a->kv_heads * dh;
    const int64_t sel = attention_bilinear(a) ? dh : 0;   /* width of the selection's own rows */
    const int64_t pair = a->bfloat16 ? 2 : 1;
    int64_t end = 0, pack = 0;

    p.rows = a->i1 - a->i0;
    p.height = a->dead_after ? live_height(p.rows) : TILE;
    p.tiles = ceil_div(p.rows, p.height);
    p.columns = ceil_div(a->i1, TILE);
    p.group = tiles_a_group(p.tiles);
    if (!a->dead_after && p.group < SIDE) p.group = SIDE;
    p.groups = ceil_div(p.tiles, p.group);
    /* With dead keys whole sequences go by groups of row tiles, whose rows need be kept no longer. */
    const int64_t kept = a->dead_after && a->B % a->threads == 0 ? p.group : p.tiles;

    if (!backward) {
        p.slots = p.columns > SUPER ? H : 1;
        p.qt = take(&end, (p.slots > 1 ? p.slots : 2) * dh * TILE);
        p.ot = take(&end, p.slots * dh * TILE);
        p.ml = take(&end, 2 * p.slots * TILE);
        p.raw = take(&end, square);
        p.redo = take(&end, square);
        p.p = take(&end, square);
        p.f = take(&end, SUPER * square);
        p.carry = take(&end, a->i1);
        p.sel_qt = take(&end, sel * TILE);
    } else {
        p.live_tiles = p.group < LIVE_SIDE ? LIVE_SIDE / p.group : 1;
        p.l0 = take(&end, p.group * (a->dead_after ? p.live_tiles : SIDE) * square);
        p.f = take(&end, p.group * (a->dead_after ? p.live_tiles : SIDE) * square);
        p.g = take(&end, SIDE * SIDE * square);
        p.pi = take(&end, SIDE * SIDE * square);
        p.zi = take(&end, SIDE * SIDE * square);
        p.zk = take(&end, SIDE * SIDE * square);
        p.raw = take(&end, square);
        p.dk = take(&end, SIDE * TILE * kv);
        p.dv = take(&end, SIDE * TILE * kv);
        p.dq = take(&end, kept * TILE * H * dh);
        p.dsel_q = take(&end, kept * TILE * sel);
        p.dsel_k = take(&end, SIDE * TILE * sel);
    }
    if (a->dead_after) {
        p.places = p.columns * TILE;
        p.list_size = a->i1;
        p.lists = take(&end, p.groups * p.list_size);
        p.held = take(&end, p.places);
        p.where = take(&end, a->i1);
        p.coming = take(&end, backward ? a->i1 : 0);
        p.live_k = take(&end, p.places * kv / pair);
        p.live_v = take(&end, p.places * kv / pair);
        p.live_pairs = take(&end, backward && a->bfloat16 ? p.places * kv / pair : 0);
        p.live_sel_k = take(&end, p.places * sel / pair);
        p.live_sel_pairs = take(&end, backward && a->bfloat16 ? p.places * sel / pair : 0);
        p.live_dk = take(&end, backward ? p.places * kv : 0);
        p.live_dv = take(&end, backward ? p.places * kv : 0);
        p.live_dsel_k = take(&end, backward ? p.places * sel : 0);
        p.dcarry = take(&pack, backward ? a->i1 : 0);
    }
    p.thread_size = end;
    end *= a->threads;

    if (!backward && !a->dead_after) {
        /* bfloat16 packs all keys and values, float32 the last, incomplete tile only. */
        const int64_t packed = a->bfloat16 ? p.columns * TILE / 2 : TILE;
        p.k = take(&pack, packed * kv);
        p.v = take(&pack, packed * kv);
        p.sel_k = take(&pack, packed * sel);
    }
    if (!backward) {
        p.carries = take(&end, a->selective && !a->saved && a->B % a->threads ? most_carries(p.rows) * a->i1 : 0);
    } else {
        const int64_t columns = a->dead_after ? 0 : p.columns * TILE, keys = columns * kv / pair,
                      queries = kept * TILE * H * dh / pair;
        p.k = take(&pack, keys);
        p.v = take(&pack, keys);
        p.k_pairs = take(&pack, a->bfloat16 ? keys : 0);
        p.qt_all = take(&pack, queries);
        p.dot_all = take(&pack, queries);
        p.q_rows = take(&pack, queries);
        p.dout_rows = take(&pack, queries);
        p.lse_all = take(&pack, kept * H * TILE);
        p.delta_all = take(&pack, kept * H * TILE);
        p.sel_k = take(&pack, columns * sel / pair);
        p.sel_k_pairs = take(&pack, a->bfloat16 ? columns * sel / pair : 0);
        p.sel_qt_all = take(&pack, kept * TILE * sel / pair);
        p.sel_q_rows = take(&pack, kept * TILE * sel / pair);
    }
    p.pack0 = end;
    p.pack_size = pack;
    p.packs = a->B >= a->threads || (!backward && a->threads <= MOST_PACKS) ? a->threads : 1;
    p.total = end + pack * p.packs;
    return p;
}

carry_plan sel_attention_carry_plan(const sel_attention *a, bool backward)
{
    carry_plan p = { 0 };
    const int64_t dh = a->dh, pair = a->bfloat16 ? 2 : 1, square = TILE * TILE;
    int64_t end = 0, pack = 0;

    p.rows = a->i1 - a->i0;
    p.height = backward && a->dead_after ? live_height(p.rows) : TILE;   /* keys die where row tiles of forward begin */
    p.tiles = ceil_div(p.rows, p.height);
    p.columns = ceil_div(a->i1, TILE);
    p.group = tiles_a_group(p.tiles);
    p.groups = ceil_div(p.tiles, p.group);
    p.qt = take(&pack, p.tiles * TILE * dh / pair);
    if (!backward) {
        p.kt = take(&end, TILE * dh / pair);
    } else {
        p.z = take(&end, SIDE * SIDE * square / pair);
        p.zk = take(&end, a->bfloat16 ? SIDE * SIDE * square / pair : 0);
        p.dk = take(&end, SIDE * TILE * dh);
        p.dq = take(&end, p.tiles * TILE * dh);
        p.q_rows = take(&pack, p.tiles * TILE * dh / pair);
        p.k = take(&pack, p.columns * TILE * dh / pair);
        p.k_pairs = take(&pack, a->bfloat16 ? p.columns * TILE * dh / pair : 0);
        p.list = take(&pack, p.columns * TILE);
        p.dcarry = take(&pack, p.columns * TILE);
    }
    p.thread_size = end;
    p.pack0 = end * a->threads;
    p.pack_size = pack;
    p.total = p.pack0 + pack * (a->B >= a->threads ? a->threads : 1);
    return p;
}

size_t sel_attention_workspace(const sel_attention *a, bool backward)
{
    SEL_ASSERT(a->heads % a->kv_heads == 0 && (a->window == 0 || a->tau <= 0.0) && !a->sel_q == !a->sel_k);
    SEL_ASSERT(!a->dead_after || (a->selective && a->relu && a->window == 0));
    int64_t most = sel_attention_plan(a, backward).total;
    if (attention_fits_words(a)) {
        const int64_t words = sel_attention_words_plan(a, backward).total;
        const int64_t carry = a->selective && a->window == 0 ? sel_attention_carry_plan(a, backward).total : 0;
        if (words > most) most = words;
        if (carry > most) most = carry;
    }
    return (size_t)most * sizeof(float);
}
