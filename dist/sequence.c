/* sequence.c: keys, sums and gradients of a sequence group, in a window of its host or by messages. */
#include "dist/sequence.h"

#include <mpi.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/clock.h"
#include "core/base/fault.h"
#include "core/base/mem.h"
#include "core/base/pulse.h"
#include "dist/comm_mpi.h"
#include "dist/host.h"

enum { TAG_KEYS, TAG_SUMS, TAG_GRADIENTS };

struct sel_sequence {
    sel_comm *comm, *group;       /* comm not owned */
    sel_sequence_options opt;
    char note[512];
    int places;                   /* chunks of a sequence */
    int64_t row;                  /* of sums */
    size_t bytes;                 /* a rank, on average */
    sel_host_window *window;      /* NULL: `alone` */
    char *alone;

    sel_host_count **counts;      /* [ranks], window only: stages that each rank has come to */
    uint32_t stage, ended;        /* this rank's; that in which it last ended the use of keys */

    char *keys;                   /* the group's in a window, else this rank's */
    float **sums;                 /* [places] */
    float **gradients;            /* [places]; without a window only this rank's own */
    MPI_Request *requests;        /* [most] */
    MPI_Status *statuses;         /* [most], not looked at: gcc takes MPICH's "ignore" for an array of no bytes */
    int n_requests, most;
    int *hosts;                   /* [ranks] host of each */
    sel_wire wire;
};

static int64_t begin_of(const sel_sequence *q, int place)
{
    return place * q->opt.chunks.each;
}

static int64_t end_of(const sel_sequence *q, int place)
{
    return (place + 1) * q->opt.chunks.each;
}

static int place_of(const sel_sequence *q, int rank, int k)
{
    return sel_chunk_place(&q->opt.chunks, rank, k);
}

static int owner_of(const sel_sequence *q, int place)
{
    int k;
    return sel_chunk_owner(&q->opt.chunks, place, &k);
}

/* The last chunk of a rank, up to whose end it reads keys. */
static int last_place(const sel_sequence *q, int rank)
{
    return place_of(q, rank, q->opt.chunks.chunks - 1);
}

static int64_t gradient_floats(const sel_sequence *q, int place)
{
    return q->opt.batch * end_of(q, place) * q->opt.width;
}

/* Bytes of one number of a key. */
static int64_t key_bytes(const sel_sequence *q)
{
    return q->opt.bfloat16 ? (int64_t)sizeof(uint16_t) : (int64_t)sizeof(float);
}

/* The first key of a chunk. */
static void *key_at(const sel_sequence *q, int place)
{
    return q->keys + begin_of(q, place) * q->opt.width * key_bytes(q);
}

/* Blocks of gradients that others give to this rank's keys. */
static int blocks_given(const sel_sequence *q)
{
    int blocks = 0;
    for (int to = 0; to < q->places; to++)
        for (int from = to + 1; owner_of(q, to) == q->opt.chunks.rank && from < q->places; from++)
            blocks += owner_of(q, from) != q->opt.chunks.rank;
    return blocks;
}

/* Room for keys; without a window also for what is given to them, which arrives there once they have been read. */
static size_t keys_room(const sel_sequence *q, bool shared)
{
    const int64_t chunk = q->opt.batch * q->opt.chunks.each * q->opt.width;
    const int64_t keys = q->places * chunk * key_bytes(q), given = blocks_given(q) * chunk * (int64_t)sizeof(float);
    return (size_t)(shared || keys > given ? keys : given);
}

/* Walks a rank's memory: with base NULL to learn its size, then to set the pointers that are wanted. */
typedef struct {
    char *base;
    size_t used;
} place_taker;

static void *take(place_taker *t, size_t bytes)
{
    void *const at = t->base ? t->base + t->used : NULL;
    t->used += (bytes + 63) / 64 * 64;
    return at;
}

static float *take_floats(place_taker *t, int64_t n)
{
    return take(t, (size_t)n * sizeof(float));
}

/* What lies in the part of rank r of a window (shared), or in this rank's own memory. */
static size_t lay_out(sel_sequence *q, char *base, int r, bool shared)
{
    place_taker t = {.base = base};

    q->counts[r] = take(&t, sizeof **q->counts);
    for (int k = 0; k < q->opt.chunks.chunks; k++) {
        const int place = place_of(q, r, k);
        q->sums[place] = take_floats(&t, q->opt.batch * q->row);
        q->gradients[place] = take_floats(&t, gradient_floats(q, place));
    }
    if (!shared)
        for (int p = 0; p < q->places; p++)
            if (owner_of(q, p) != r) q->sums[p] = take_floats(&t, q->opt.batch * q->row);
    if (r == 0 || !shared) q->keys = take(&t, keys_room(q, shared));
    return t.used;
}

static sel_status make_tables(sel_sequence *q)
{
    const size_t ranks = (size_t)q->opt.chunks.ranks, places = (size_t)q->places;

    q->most = 2 * q->places * q->opt.chunks.ranks;
    q->counts = calloc(ranks, sizeof *q->counts);
    q->sums = calloc(places, sizeof *q->sums);
    q->gradients = calloc(places, sizeof *q->gradients);
    q->requests = calloc((size_t)q->most, sizeof *q->requests);
    q->statuses = calloc((size_t)q->most, sizeof *q->statuses);
    q->hosts = calloc(ranks, sizeof *q->hosts);
    if (!q->counts || !q->sums || !q->gradients || !q->requests || !q->statuses || !q->hosts)
        return sel_fail(SEL_ENOMEM, "no memory for the tables of a sequence group of %zu ranks", ranks);
    return SEL_OK;
}

/* [collective, all ranks of c] The arrays: in windows on all ranks, or on none. */
static sel_status make_arrays(sel_sequence *q)
{
    const int me = q->opt.chunks.rank, ranks = q->opt.chunks.ranks;
    static const char what[] = "keys of a shared sequence";
    double apart = sel_comm_hosts(q->group) > 1;
    sel_status rc;

    sel_comm_max_doubles(q->comm, &apart, 1);
    if (q->opt.no_window) {
        snprintf(q->note, sizeof q->note, "sequence groups exchange keys by MPI, as dist.shared_memory asks");
    } else if (apart > 0.0) {
        snprintf(q->note, sizeof q->note, "sequence groups reach over several hosts: they exchange keys by MPI");
    } else if (sel_host_window_new(&q->window, q->comm, q->group, lay_out(q, NULL, me, true), what) != SEL_OK) {
        snprintf(q->note, sizeof q->note, "sequence groups exchange keys by MPI, which is slower: %.400s", sel_error());
    }
    if (q->window) {
        size_t all = 0;
        for (int r = 0; r < ranks; r++) all += lay_out(q, sel_host_window_part(q->window, r), r, true);
        q->bytes = all / (size_t)ranks;
        return SEL_OK;
    }
    if (q->opt.batch * q->opt.chunks.each * q->opt.width > INT32_MAX)
        return sel_fail(SEL_EUSER, "the keys of %lld chunks of %lld tokens are too many for one message; a smaller "
                        "train.micro_batch, or more ranks a sequence, would work", (long long)q->opt.batch,
                        (long long)q->opt.chunks.each);
    q->bytes = lay_out(q, NULL, me, false);
    q->alone = sel_alloc(q->bytes, what);
    if ((rc = sel_comm_agree(q->comm, q->alone ? SEL_OK : SEL_ENOMEM)) != SEL_OK) return rc;
    lay_out(q, q->alone, me, false);
    return SEL_OK;
}

sel_status sel_sequence_new(sel_sequence **out, sel_comm *c, const sel_sequence_options *o)
{
    sel_sequence *q = calloc(1, sizeof *q);
    sel_status rc = sel_comm_agree(c, q ? SEL_OK : sel_fail(SEL_ENOMEM, "out of memory"));

    *out = NULL;
    if (rc != SEL_OK) {
        free(q);
        return rc;
    }
    q->comm = c;
    q->opt = *o;
    q->places = o->chunks.ranks * o->chunks.chunks;
    q->row = (o->chunks.tokens + 1 + 15) / 16 * 16;
    sel_comm_split(&q->group, c, o->group);
    SEL_ASSERT(sel_comm_size(q->group) == o->chunks.ranks && sel_comm_rank(q->group) == o->chunks.rank);
    rc = sel_comm_agree(c, make_tables(q));
    if (rc == SEL_OK) {
        CK(c, MPI_Allgather(&q->group->host_index, 1, MPI_INT, q->hosts, 1, MPI_INT, q->group->world));
        rc = make_arrays(q);
    }
    if (rc != SEL_OK) sel_sequence_free(&q);
    *out = q;
    return rc;
}

void sel_sequence_free(sel_sequence **sequence)
{
    sel_sequence *q = *sequence;

    if (!q) return;
    sel_host_window_free(&q->window);
    sel_free(q->alone);
    sel_comm_close(&q->group);
    free(q->counts);
    free(q->sums);
    free(q->gradients);
    free(q->requests);
    free(q->statuses);
    free(q->hosts);
    free(q);
    *sequence = NULL;
}

const sel_chunks *sel_sequence_chunks(const sel_sequence *q)
{
    return &q->opt.chunks;
}

const char *sel_sequence_note(const sel_sequence *q)
{
    return q->note;
}

size_t sel_sequence_bytes(const sel_sequence *q)
{
    return q->bytes;
}

/* ---- waiting */

/* From here on it waits; the time now. */
static double wait_for(const char *what)
{
    sel_pulse_exchange(what);
    sel_fault_within(what);
    return sel_now();
}

static void waited(sel_sequence *q, double since)
{
    const double seconds = sel_now() - since;
    sel_pulse_exchange(NULL);
    q->wire.wait_seconds += seconds;
    q->wire.busy_seconds += seconds;
}

/* Window: this rank has come to its next stage. */
static void arrive(sel_sequence *q)
{
    sel_host_post(q->counts[q->opt.chunks.rank], ++q->stage);
}

/* Window: until all have come to a stage. */
static void await(sel_sequence *q, uint32_t stage, const char *what)
{
    const double begun = wait_for(what);
    for (int r = 0; r < q->opt.chunks.ranks; r++)
        for (sel_host_waiter w = {0}; !sel_host_reached(q->counts[r], stage);)
            sel_host_pause(q->comm, &w, q->counts[r], stage, false);
    waited(q, begun);
}

/* Messages: until all that has been started is done. */
static void complete(sel_sequence *q, const char *what)
{
    const double begun = wait_for(what);
    int done = 0;

    for (sel_host_waiter w = {0};;) {
        CK(q->comm, MPI_Testall(q->n_requests, q->requests, &done, q->statuses));
        if (done) break;
        sel_host_pause(q->comm, &w, NULL, 0, true);
    }
    q->n_requests = 0;
    waited(q, begun);
}

/* To or from another rank: `blocks` blocks of `count` numbers of `bytes` (float32 or bfloat16), `stride` apart. */
static void message(sel_sequence *q, bool sends, void *at, int64_t bytes, int64_t blocks, int64_t count,
                    int64_t stride, int peer, int tag)
{
    MPI_Comm const world = q->group->world;
    MPI_Datatype type, number = bytes == (int64_t)sizeof(float) ? MPI_FLOAT : MPI_UINT16_T;

    SEL_ASSERT(q->n_requests < q->most);
    MPI_Request *const r = &q->requests[q->n_requests++];
    CK(q->comm, MPI_Type_create_hvector((int)blocks, (int)count, (MPI_Aint)(stride * bytes), number, &type));
    CK(q->comm, MPI_Type_commit(&type));
    if (sends) CK(q->comm, MPI_Isend(at, 1, type, peer, tag, world, r));
    else CK(q->comm, MPI_Irecv(at, 1, type, peer, tag, world, r));
    CK(q->comm, MPI_Type_free(&type));
}

/* The same of `count` floats without gaps between blocks of them. */
static void message_floats(sel_sequence *q, bool sends, float *at, int64_t count, int peer, int tag)
{
    message(q, sends, at, sizeof *at, 1, count, count, peer, tag);
}

/* Counts `bytes` that go from this rank to those for which `wanted` says so: by the wire, where to other hosts, each of
   which must get it once. */
static void count_sent(sel_sequence *q, double bytes, const bool *wanted)
{
    const int me = q->opt.chunks.rank, ranks = q->opt.chunks.ranks;

    for (int r = 0; r < ranks; r++) {
        bool first = true;
        if (!wanted[r] || q->hosts[r] == q->hosts[me]) continue;
        for (int p = 0; p < r; p++) first = first && !(wanted[p] && q->hosts[p] == q->hosts[r]);
        q->wire.wire_bytes += bytes;
        if (first) q->wire.wire_least += bytes;
    }
}

/* ---- keys */

void *sel_sequence_begin(sel_sequence *q)
{
    if (q->window) await(q, q->ended, "the room for keys");
    return q->keys;
}

static bool reads(const sel_sequence *q, int rank, int place)
{
    return place <= last_place(q, rank);
}

/* The keys of a chunk, to or from another rank. */
static void key_message(sel_sequence *q, bool sends, int place, int64_t batch, int peer)
{
    message(q, sends, key_at(q, place), key_bytes(q), batch, q->opt.chunks.each * q->opt.width,
            q->opt.chunks.tokens * q->opt.width, peer, TAG_KEYS);
}

void sel_sequence_share(sel_sequence *q, int64_t batch)
{
    const sel_chunks *const c = &q->opt.chunks;
    const double bytes = (double)(batch * c->each * q->opt.width * key_bytes(q));   /* of a chunk */

    SEL_ASSERT(batch <= q->opt.batch);
    if (q->window) {
        arrive(q);
        await(q, q->stage, "keys");
        q->wire.host_bytes += bytes * (last_place(q, c->rank) + 1 - c->chunks);
        return;
    }
    bool wanted[c->ranks];
    for (int p = 0; p < q->places; p++) {
        const int owner = owner_of(q, p);
        if (owner != c->rank) {
            if (reads(q, c->rank, p)) key_message(q, false, p, batch, owner);
            continue;
        }
        for (int r = 0; r < c->ranks; r++) {
            wanted[r] = r != c->rank && reads(q, r, p);
            if (wanted[r]) key_message(q, true, p, batch, r);
        }
        count_sent(q, bytes, wanted);
    }
    complete(q, "keys");
}

void sel_sequence_end(sel_sequence *q)
{
    if (!q->window) return;
    arrive(q);
    q->ended = q->stage;
}

/* ---- sums over columns */

int64_t sel_sequence_row(const sel_sequence *q)
{
    return q->row;
}

float *sel_sequence_sums(const sel_sequence *q, int k)
{
    return q->sums[place_of(q, q->opt.chunks.rank, k)];
}

void sel_sequence_share_sums(sel_sequence *q, int64_t batch)
{
    const sel_chunks *const c = &q->opt.chunks;
    const int64_t count = batch * q->row;

    if (q->window) {
        arrive(q);
        await(q, q->stage, "sums");
        q->wire.host_bytes += 4.0 * (double)count * (q->places - c->chunks);
        return;
    }
    bool wanted[c->ranks];
    for (int r = 0; r < c->ranks; r++) wanted[r] = r != c->rank;
    for (int p = 0; p < q->places; p++) {
        const int owner = owner_of(q, p);
        if (owner != c->rank) {
            message_floats(q, false, q->sums[p], count, owner, TAG_SUMS);
            continue;
        }
        for (int r = 0; r < c->ranks; r++)
            if (wanted[r]) message_floats(q, true, q->sums[p], count, r, TAG_SUMS);
        count_sent(q, 4.0 * (double)count, wanted);
    }
    complete(q, "sums");
}

static void add_row(float *restrict y, const float *restrict x, int64_t n)
{
    for (int64_t j = 0; j < n; j++) y[j] += x[j];
}

void sel_sequence_add(sel_sequence *q, int64_t batch, int first, int last, int64_t n, float *y)
{
    for (int64_t b = 0; b < batch; b++) {
        memset(y + b * q->row, 0, (size_t)n * sizeof *y);
        for (int p = first; p < last; p++) {
            /* A chunk has sums of the keys up to its end only. */
            const int64_t here = n < end_of(q, p) ? n : end_of(q, p);
            add_row(y + b * q->row, q->sums[p] + b * q->row, here);
        }
    }
}

float sel_sequence_extra(const sel_sequence *q, int64_t b)
{
    float most = -INFINITY;
    for (int p = 0; p < q->places; p++) {
        const float x = q->sums[p][b * q->row + q->opt.chunks.tokens];
        if (!(x <= most)) most = x;   /* NaN stays: no number compares with it */
        if (most != most) break;
    }
    return most;
}

/* ---- gradients of the keys */

float *sel_sequence_gradients(const sel_sequence *q, int k)
{
    return q->gradients[place_of(q, q->opt.chunks.rank, k)];
}

int64_t sel_sequence_gradients_seq(const sel_sequence *q, int k)
{
    return end_of(q, place_of(q, q->opt.chunks.rank, k)) * q->opt.width;
}

/* What chunk `from` gives to the keys of chunk `to`: [batch] blocks of each * width, a sequence of `from` apart. */
static float *gives(const sel_sequence *q, int from, int to)
{
    return q->gradients[from] + begin_of(q, to) * q->opt.width;
}

/* Messages: where what others give arrives, in the room for keys (keys_room): they have been read by now. */
static float *landing(const sel_sequence *q, int64_t batch, int *used)
{
    return (float *)(void *)q->keys + (*used)++ * batch * q->opt.chunks.each * q->opt.width;
}

static void exchange_gradients(sel_sequence *q, int64_t batch)
{
    const sel_chunks *const c = &q->opt.chunks;
    const int64_t count = c->each * q->opt.width;
    bool wanted[c->ranks];
    int used = 0;

    for (int to = 0; to < q->places; to++)
        for (int from = to + 1; from < q->places; from++) {
            const int giver = owner_of(q, from), owner = owner_of(q, to);
            if (giver == owner || (giver != c->rank && owner != c->rank)) continue;
            if (owner == c->rank) {
                message_floats(q, false, landing(q, batch, &used), batch * count, giver, TAG_GRADIENTS + from);
                continue;
            }
            message(q, true, gives(q, from, to), sizeof(float), batch, count, end_of(q, from) * q->opt.width, owner,
                    TAG_GRADIENTS + from);
            for (int r = 0; r < c->ranks; r++) wanted[r] = r == owner;
            count_sent(q, 4.0 * (double)(batch * count), wanted);
        }
    complete(q, "gradients");
}

/* y += x, `rows` floats of each of `batch` sequences. */
static void add_block(const sel_sequence *q, float *y, int64_t y_seq, const float *x, int64_t x_seq, int64_t batch,
                      int64_t n)
{
    enum { PIECE = 4096 };
    const int64_t pieces = (n + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(q->opt.threads) schedule(static) if (q->opt.threads > 1)
    for (int64_t i = 0; i < batch * pieces; i++) {
        const int64_t at = i % pieces * PIECE, left = n - at;
        add_row(y + i / pieces * y_seq + at, x + i / pieces * x_seq + at, left < PIECE ? left : PIECE);
    }
}

void sel_sequence_sum_gradients(sel_sequence *q, int64_t batch)
{
    const sel_chunks *const c = &q->opt.chunks;
    const int64_t count = c->each * q->opt.width;
    int used = 0;

    if (q->window) {
        sel_sequence_end(q);
        await(q, q->stage, "gradients");
    } else {
        exchange_gradients(q, batch);
    }
    for (int to = 0; to < q->places; to++) {
        if (owner_of(q, to) != c->rank) continue;
        float *const y = gives(q, to, to);
        const int64_t y_seq = end_of(q, to) * q->opt.width;
        for (int from = to + 1; from < q->places; from++) {
            const bool own = owner_of(q, from) == c->rank;
            const bool direct = own || q->window;
            const float *const x = direct ? gives(q, from, to) : landing(q, batch, &used);
            add_block(q, y, y_seq, x, direct ? end_of(q, from) * q->opt.width : count, batch, count);
            if (!own && q->window) q->wire.host_bytes += 4.0 * (double)(batch * count);
        }
    }
}

const float *sel_sequence_own_gradients(const sel_sequence *q, int k)
{
    const int place = place_of(q, q->opt.chunks.rank, k);
    return gives(q, place, place);
}

/* ---- small things */

void sel_sequence_gather(sel_sequence *q, const void *mine, size_t bytes, void *all)
{
    SEL_ASSERT(bytes <= INT32_MAX);
    const double begun = wait_for("findings");
    CK(q->comm, MPI_Allgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, q->group->world));
    waited(q, begun);
}

void sel_sequence_wire(sel_sequence *q, sel_wire *w)
{
    *w = q->wire;
    q->wire = (sel_wire){0};
}
