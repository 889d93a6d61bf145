/* reduce.c: a bucket's way: announced by all ranks of the host -> added up, each rank its part -> between hosts ->
 * back to all ranks of the host.  Every step is taken when it can be, by whichever call comes next; only
 * sel_reducer_finish and sel_reducer_gather wait.
 */
#include "dist/reduce.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/clock.h"
#include "core/base/mem.h"
#include "core/base/pulse.h"
#include "dist/exchange.h"
#include "dist/host.h"
#include "dist/tree.h"

/* At the front of each rank's part of the window. */
typedef struct {
    sel_host_count ready;   /* buckets that this rank has announced */
    sel_host_count done;    /* buckets whose part it has brought to its end */
} meeting;

typedef enum { SUM, GATHER } sel_round;

struct sel_reducer {
    sel_comm *comm;             /* not owned */
    sel_reducer_options opt;
    sel_buckets cut;
    char note[512];
    int ranks, me;              /* of this group: a host, or a rank alone */
    int groups, group;
    int parts;                  /* ranks 0 .. parts - 1 of each group have a part; groups may differ in size */
    sel_host_window *window;    /* NULL: `alone` */
    char *alone;
    meeting **meetings;         /* [ranks] */
    float **grads, **params;    /* [ranks] arrays of the group's ranks; params NULL without zero */
    int *order;                 /* [ranks] ranks of the group, in the order of the tree */
    float **table;              /* [2 ranks] scratch */
    sel_exchange *exchange;     /* NULL: one group, or no part */

    sel_round round;
    uint32_t base;              /* the counters' value when the round began */
    int announced, folded, delivered;   /* buckets of this round */
    double first;               /* when its first bucket was announced */
    double own_floats;          /* of this rank's parts of all buckets */
    sel_wire wire;
};

static bool power_of_two(int n)
{
    return (n & (n - 1)) == 0;
}

static size_t array_bytes(int64_t n)
{
    return ((size_t)n * sizeof(float) + 63) / 64 * 64;
}

/* The place in the tree of a rank: with a fixed tree a sequence group's ranks are far apart in it, so that how many
   groups share the leaves of a batch changes nothing. */
static int in_tree(const sel_reducer *r, int rank)
{
    const int s = r->opt.fixed_tree && r->opt.sequence > 1 ? r->opt.sequence : 1;
    return rank % s * (sel_comm_size(r->comm) / s) + rank / s;
}

/* Groups are hosts, or, where that cannot be, single ranks. */
static void choose_groups(sel_reducer *r, bool hosts)
{
    sel_comm *const c = r->comm;

    r->ranks = hosts ? sel_comm_host_size(c) : 1;
    r->me = hosts ? sel_comm_host_rank(c) : 0;
    r->groups = hosts ? sel_comm_hosts(c) : sel_comm_size(c);
    r->group = hosts ? sel_comm_host_index(c) : in_tree(r, sel_comm_rank(c));
    r->parts = hosts ? sel_comm_host_least(c) : 1;
}

/* Whether the tree over hosts of trees over their ranks is the whole tree over all ranks. */
static bool hosts_fit(const sel_comm *c, int sequence)
{
    const int least = sel_comm_host_least(c);
    if (sequence > 1) return sel_comm_hosts(c) == 1;
    return power_of_two(least) && power_of_two(sel_comm_hosts(c)) && least * sel_comm_hosts(c) == sel_comm_size(c);
}

/* [collective] The arrays, in a window if there can be one. */
static sel_status make_arrays(sel_reducer *r)
{
    const size_t each = array_bytes(r->opt.n), bytes = sizeof(meeting) + each * (r->opt.zero ? 2 : 1);
    const char *const what = r->opt.zero ? "gradients and parameters" : "gradients";
    bool hosts = false;
    sel_status rc;

    if (sel_comm_hosts(r->comm) == sel_comm_size(r->comm)) {
        ; /* one rank a host: a window would have nobody to share it with */
    } else if (r->opt.no_window) {
        snprintf(r->note, sizeof r->note, "ranks of a host reduce by MPI, as dist.shared_memory asks");
    } else if (r->opt.fixed_tree && !hosts_fit(r->comm, r->opt.sequence)) {
        snprintf(r->note, sizeof r->note, "dist.virtual_ranks: %s; all ranks reduce by MPI",
                 r->opt.sequence > 1 ? "sequence groups on several hosts do not fit into the fixed tree"
                                     : "hosts with unlike numbers of ranks, or not powers of two, do not fit into the "
                                       "fixed tree");
    } else if ((rc = sel_host_window_new(&r->window, r->comm, r->comm, bytes, what)) == SEL_OK) {
        hosts = true;
    } else {
        snprintf(r->note, sizeof r->note, "ranks of a host reduce by MPI, which is slower: %.400s", sel_error());
    }
    choose_groups(r, hosts);

    rc = SEL_OK;
    if (!hosts && !(r->alone = sel_alloc(bytes, what))) rc = SEL_ENOMEM;
    r->meetings = calloc((size_t)r->ranks, sizeof *r->meetings);
    r->grads = calloc((size_t)r->ranks, sizeof *r->grads);
    r->params = calloc((size_t)r->ranks, sizeof *r->params);
    r->table = calloc(2 * (size_t)r->ranks, sizeof *r->table);
    r->order = calloc((size_t)r->ranks, sizeof *r->order);
    if (rc == SEL_OK && (!r->order || !r->meetings || !r->grads || !r->params || !r->table))
        rc = sel_fail(SEL_ENOMEM, "out of memory");
    SEL_TRY(sel_comm_agree(r->comm, rc));
    for (int p = 0; p < r->ranks; p++) {
        char *const part = hosts ? sel_host_window_part(r->window, p) : r->alone;
        r->meetings[p] = (meeting *)(void *)part;
        r->grads[p] = (float *)(void *)(part + sizeof(meeting));
        r->params[p] = r->opt.zero ? (float *)(void *)(part + sizeof(meeting) + each) : NULL;
        /* in_tree() is of all ranks: more than one of them are here only where this host has them all, or they are in
           order */
        r->order[r->ranks > 1 && sel_comm_hosts(r->comm) == 1 ? in_tree(r, p) : p] = p;
    }
    return SEL_OK;
}

sel_status sel_reducer_new(sel_reducer **out, sel_comm *c, const sel_reducer_options *o)
{
    sel_reducer *r = calloc(1, sizeof *r);
    sel_status rc = sel_comm_agree(c, r ? SEL_OK : sel_fail(SEL_ENOMEM, "out of memory"));

    *out = NULL;
    if (rc != SEL_OK) {
        free(r);
        return rc;
    }
    SEL_ASSERT(!o->fixed_tree || power_of_two(sel_comm_size(c) / (o->sequence > 1 ? o->sequence : 1)));
    r->comm = c;
    r->opt = *o;
    rc = make_arrays(r);
    if (rc == SEL_OK) {
        sel_buckets_cut(&r->cut, o->n, r->parts, r->groups, o->bucket_floats);
        for (int k = 0; k < r->cut.buckets && r->me < r->parts; k++) {
            int64_t begin, end;
            sel_buckets_part(&r->cut, k, r->me, &begin, &end);
            r->own_floats += (double)(end - begin);
        }
        if (r->groups > 1)
            rc = sel_exchange_new(&r->exchange, c, &r->cut, r->me < r->parts ? r->me : -1, r->group, o->bfloat16,
                                  o->threads);
    }
    if (rc != SEL_OK) sel_reducer_free(&r);
    *out = r;
    return rc;
}

void sel_reducer_free(sel_reducer **reducer)
{
    sel_reducer *r = *reducer;

    if (!r) return;
    sel_exchange_free(&r->exchange);
    sel_host_window_free(&r->window);
    sel_free(r->alone);
    free(r->meetings);
    free(r->grads);
    free(r->params);
    free(r->table);
    free(r->order);
    free(r);
    *reducer = NULL;
}

float *sel_reducer_grads(const sel_reducer *r)
{
    return r->grads[r->me];
}

float *sel_reducer_params(const sel_reducer *r)
{
    return r->params[r->me];
}

const char *sel_reducer_note(const sel_reducer *r)
{
    return r->note;
}

/* ---- a bucket's steps */

/* This rank's part of the bucket: from `n_in` of the group's arrays to others. */
static void move(sel_reducer *r, float **arrays, int k, bool fold, bool to_all)
{
    int64_t begin, end;
    float **const in = r->table, **const out = r->table + r->ranks;
    int n_in = 0, n_out = 0;

    sel_buckets_part(&r->cut, k, r->me, &begin, &end);
    for (int i = 0; i < r->ranks; i++) {
        const int p = r->order[i];
        if (fold || p == r->me) in[n_in++] = arrays[p] + begin;
        if (fold ? to_all || p == r->me : p != r->me) out[n_out++] = arrays[p] + begin;
    }
    if (n_out == 0 || (n_in == 1 && out[0] == in[0])) return;
    sel_tree_sum(out, n_out, (const float *const *)in, n_in, end - begin, r->opt.threads);
    const int foreign = (fold ? n_in - 1 : 0) + (fold ? n_out - 1 : n_out);
    r->wire.host_bytes += (double)foreign * (double)(end - begin) * sizeof(float);
}

static float **arrays_of(const sel_reducer *r)
{
    return r->round == SUM ? r->grads : r->params;
}

/* Sums stay with their owners. */
static bool stays(const sel_reducer *r)
{
    return r->round == SUM && r->opt.zero;
}

static void deliver(sel_reducer *r)
{
    /* Between hosts it came to this rank's array alone. */
    if ((r->exchange && !stays(r)) || r->round == GATHER) move(r, arrays_of(r), r->delivered, false, true);
    r->delivered++;
    sel_host_post(&r->meetings[r->me]->done, r->base + (uint32_t)r->delivered);
}

/* The rank whose announcement bucket k waits for; -1: none. */
static int late(const sel_reducer *r, int k)
{
    const uint32_t value = r->base + (uint32_t)k + 1;

    if (r->round == GATHER) return r->announced > k ? -1 : r->me;
    for (int p = 0; p < r->ranks; p++)
        if (!sel_host_reached(&r->meetings[p]->ready, value)) return p;
    return -1;
}

static void begin_bucket(sel_reducer *r, int k)
{
    if (r->round == SUM) move(r, r->grads, k, true, !r->exchange && !r->opt.zero);
    if (r->exchange) {
        const sel_exchange_kind kind = r->round == GATHER ? SEL_EXCHANGE_SPREAD
                                       : r->opt.zero      ? SEL_EXCHANGE_SUM
                                                          : SEL_EXCHANGE_SUM_SPREAD;
        sel_exchange_start(r->exchange, kind, arrays_of(r)[r->me], k);
    }
    r->folded++;
    if (!r->exchange) deliver(r);
}

/* Does one thing that can be done now; false: there is none. */
static bool advance(sel_reducer *r)
{
    bool moved = false;

    if (r->me >= r->parts) return false;
    if (r->exchange) {
        moved = sel_exchange_advance(r->exchange);
        for (int n = sel_exchange_completed(r->exchange); n > 0; n--) deliver(r);
    }
    if (r->folded < r->cut.buckets && (!r->exchange || sel_exchange_room(r->exchange)) && late(r, r->folded) < 0) {
        begin_bucket(r, r->folded);
        moved = true;
    }
    return moved;
}

static void announce(sel_reducer *r, int buckets)
{
    if (buckets <= r->announced) return;
    if (r->announced == 0) r->first = sel_now();
    r->announced = buckets;
    if (r->round == SUM) sel_host_post(&r->meetings[r->me]->ready, r->base + (uint32_t)buckets);
}

/* The rank of the group whose part is not yet at its end; -1: none. */
static int unfinished(const sel_reducer *r)
{
    for (int p = 0; p < r->parts; p++)
        if (!sel_host_reached(&r->meetings[p]->done, r->base + (uint32_t)r->cut.buckets)) return p;
    return -1;
}

/* Ends the round: everything is announced, now wait. */
static void complete(sel_reducer *r)
{
    sel_host_waiter waiter = {0};

    announce(r, r->cut.buckets);
    const double begun = sel_now();
    sel_pulse_enter(r->round == SUM ? "reduce" : "gather");
    for (int p; (p = unfinished(r)) >= 0;) {
        if (advance(r)) {
            sel_pulse_tick();
            waiter = (sel_host_waiter){0};
            continue;
        }
        const bool in_flight = r->exchange && r->folded > r->delivered;
        const bool own = r->me < r->parts && r->folded < r->cut.buckets;
        const int peer = own ? late(r, r->folded) : p;
        if (own && peer >= 0)
            sel_host_pause(r->comm, &waiter, &r->meetings[peer]->ready, r->base + (uint32_t)r->folded + 1, in_flight);
        else if (p == r->me)
            sel_host_pause(r->comm, &waiter, NULL, 0, true);
        else
            sel_host_pause(r->comm, &waiter, &r->meetings[p]->done, r->base + (uint32_t)r->cut.buckets, in_flight);
    }
    sel_pulse_leave();
    r->base += (uint32_t)r->cut.buckets;
    const double now = sel_now();
    if (r->cut.buckets > 0) {
        r->wire.wait_seconds += now - begun;
        r->wire.busy_seconds += now - r->first;
    }
    r->announced = r->folded = r->delivered = 0;

    /* A sum passes each float between the hosts (hosts - 1) / hosts times on its way to its owner, and as
       often back. */
    const double ways = r->round == SUM && !r->opt.zero ? 2 : 1;
    const double bytes = r->round == SUM && r->opt.bfloat16 ? sizeof(uint16_t) : sizeof(float);
    r->wire.wire_least += ways * (r->groups - 1) / r->groups * r->own_floats * bytes;
    if (r->exchange) r->wire.wire_bytes += sel_exchange_sent(r->exchange);
}

void sel_reducer_ready(sel_reducer *r, int64_t begin)
{
    int64_t from, to;
    int k = r->announced;

    SEL_ASSERT(r->round == SUM && begin >= 0 && begin <= r->opt.n);
    if (r->opt.no_overlap) return;
    for (; k < r->cut.buckets; k++) {
        sel_buckets_bucket(&r->cut, k, &from, &to);
        if (from < begin) break;
    }
    announce(r, k);
    sel_reducer_poll(r);
}

void sel_reducer_poll(sel_reducer *r)
{
    if (r->announced == 0) return;
    while (advance(r)) continue;
}

void sel_reducer_finish(sel_reducer *r)
{
    complete(r);
    if (r->opt.zero) r->round = GATHER;
}

int sel_reducer_pieces(const sel_reducer *r)
{
    return r->opt.zero ? r->cut.buckets : 1;
}

void sel_reducer_piece(const sel_reducer *r, int i, int64_t *begin, int64_t *end)
{
    *begin = 0;
    *end = r->opt.n;
    if (!r->opt.zero) return;
    if (r->me < r->parts)
        sel_buckets_piece(&r->cut, i, r->me, r->group, begin, end);
    else
        *end = 0;
}

int64_t sel_reducer_stretch(const sel_reducer *r)
{
    return r->opt.zero ? r->cut.bucket * SEL_BLOCK : r->opt.n;
}

void sel_reducer_updated(sel_reducer *r, int i)
{
    if (!r->opt.zero) return;
    SEL_ASSERT(r->round == GATHER && i >= 0 && i < r->cut.buckets);
    if (r->opt.no_overlap) return;
    announce(r, i + 1);
    sel_reducer_poll(r);
}

void sel_reducer_gather(sel_reducer *r)
{
    if (!r->opt.zero) return;
    complete(r);
    r->round = SUM;
}

void sel_reducer_wire(sel_reducer *r, sel_wire *w)
{
    *w = r->wire;
    r->wire = (sel_wire){0};
}

void sel_wire_add(sel_wire *sum, const sel_wire *w)
{
    sum->wire_bytes += w->wire_bytes;
    sum->wire_least += w->wire_least;
    sum->host_bytes += w->host_bytes;
    sum->wait_seconds += w->wait_seconds;
    sum->busy_seconds += w->busy_seconds;
}
