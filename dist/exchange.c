/* exchange.c: a few exchanges in flight, each a row of messages that MPI moves whenever it is asked. */
#include "dist/exchange.h"

#include <mpi.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/mem.h"
#include "dist/comm_mpi.h"
#include "dist/tree.h"

/* Exchanges in flight: while a rank computes, MPI is asked so rarely, and a message takes so many answers (request,
   clearance, data), that this number, not the link, limits what goes over a fast one. */
enum { SLOTS = 8, TAG_SUM = 0, TAG_SPREAD = SLOTS };

typedef struct {
    enum { IDLE, SUMMING, SPREADING, COMPLETE } state;
    sel_exchange_kind kind;
    float *array;
    int k;
    MPI_Request *requests;    /* [2 members] */
    MPI_Status *statuses;     /* [2 members], not looked at: gcc takes MPICH's "ignore" for an array of no bytes */
    int n_requests;
    float *received;          /* [members][piece] */
    uint16_t *out16, *in16;   /* [part] and [members][piece], bfloat16 only */
} slot;

struct sel_exchange {
    sel_comm *comm;
    MPI_Comm rail;
    sel_buckets cut;
    int part, member, members, threads;
    bool bfloat16;
    int64_t piece;            /* floats of the largest */
    slot slots[SLOTS];
    unsigned started, moved, told;   /* exchanges; slot of the i-th is i % SLOTS */
    double sent;
    float **arrays;           /* [members] */
};

static void free_slot(slot *s)
{
    free(s->requests);
    free(s->statuses);
    sel_free(s->received);
    sel_free(s->out16);
    sel_free(s->in16);
}

static sel_status make_slot(sel_exchange *x, slot *s)
{
    const size_t floats = (size_t)x->members * (size_t)x->piece;

    s->requests = calloc(2 * (size_t)x->members, sizeof *s->requests);
    s->statuses = calloc(2 * (size_t)x->members, sizeof *s->statuses);
    s->received = sel_alloc(floats * sizeof(float), "what other hosts send");
    if (!s->requests || !s->statuses || !s->received)
        return sel_fail(SEL_ENOMEM, "no memory for what other hosts send");
    if (!x->bfloat16) return SEL_OK;
    s->out16 = sel_alloc(floats * sizeof(uint16_t), "what goes to other hosts");
    s->in16 = sel_alloc(floats * sizeof(uint16_t), "what other hosts send");
    return s->out16 && s->in16 ? SEL_OK : SEL_ENOMEM;
}

sel_status sel_exchange_new(sel_exchange **out, sel_comm *c, const sel_buckets *cut, int rail, int member,
                            bool bfloat16, int threads)
{
    sel_exchange *x = NULL;
    sel_status rc = SEL_OK;
    MPI_Comm comm;

    *out = NULL;
    CK(c, MPI_Comm_split(c->world, rail < 0 ? MPI_UNDEFINED : rail, member, &comm));
    if (rail >= 0) {
        CK(c, MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN));
        if (!(x = calloc(1, sizeof *x))) {
            sel_fail(SEL_ENOMEM, "out of memory");
            sel_comm_die(c, "start");
        }
        *x = (sel_exchange){.comm = c, .rail = comm, .cut = *cut, .part = rail, .member = member,
                            .members = cut->pieces, .threads = threads, .bfloat16 = bfloat16};
        for (int k = 0; k < cut->buckets; k++)
            for (int m = 0; m < cut->pieces; m++) {
                int64_t begin, end;
                sel_buckets_piece(cut, k, rail, m, &begin, &end);
                if (end - begin > x->piece) x->piece = end - begin;
            }
        x->arrays = calloc((size_t)x->members, sizeof *x->arrays);
        if (!x->arrays) rc = sel_fail(SEL_ENOMEM, "out of memory");
        for (int i = 0; i < SLOTS && rc == SEL_OK; i++) rc = make_slot(x, &x->slots[i]);
    }
    if ((rc = sel_comm_agree(c, rc)) != SEL_OK) sel_exchange_free(&x);
    *out = x;
    return rc;
}

void sel_exchange_free(sel_exchange **exchange)
{
    sel_exchange *x = *exchange;
    int over;

    if (!x) return;
    MPI_Finalized(&over);
    if (!over) CK(x->comm, MPI_Comm_free(&x->rail));
    for (int i = 0; i < SLOTS; i++) free_slot(&x->slots[i]);
    free(x->arrays);
    free(x);
    *exchange = NULL;
}

bool sel_exchange_room(const sel_exchange *x)
{
    return x->started - x->told < SLOTS;
}

/* Exchanges overtake each other, those of one slot do not: its messages have a tag of their own. */
static int tag_of(const sel_exchange *x, const slot *s, int tag)
{
    return tag + (int)(s - x->slots);
}

/* Piece `m` of the slot's part, in floats of the array. */
static int64_t piece(const sel_exchange *x, const slot *s, int m, int64_t *begin)
{
    int64_t end;
    sel_buckets_piece(&x->cut, s->k, x->part, m, begin, &end);
    return end - *begin;
}

static void send(sel_exchange *x, slot *s, const void *data, int64_t n, MPI_Datatype type, int to, int tag)
{
    if (n == 0) return;
    CK(x->comm, MPI_Isend(data, (int)n, type, to, tag_of(x, s, tag), x->rail, &s->requests[s->n_requests++]));
    x->sent += (double)n * (type == MPI_FLOAT ? sizeof(float) : sizeof(uint16_t));
}

static void receive(sel_exchange *x, slot *s, void *data, int64_t n, MPI_Datatype type, int from, int tag)
{
    if (n == 0) return;
    CK(x->comm, MPI_Irecv(data, (int)n, type, from, tag_of(x, s, tag), x->rail, &s->requests[s->n_requests++]));
}

/* Every piece to its owner. */
static void start_sum(sel_exchange *x, slot *s)
{
    int64_t own, begin;
    const int64_t n = piece(x, s, x->member, &own);

    s->state = SUMMING;
    for (int i = 1; i < x->members; i++) {   /* each member begins with another one, so that none is flooded */
        const int to = (x->member + i) % x->members, from = (x->member - i + x->members) % x->members;
        const int64_t out = piece(x, s, to, &begin);
        const int64_t at = from * x->piece;

        if (x->bfloat16) {
            receive(x, s, s->in16 + at, n, MPI_UINT16_T, from, TAG_SUM);
            sel_to_bfloat16(s->out16 + to * x->piece, s->array + begin, out, x->threads);
            send(x, s, s->out16 + to * x->piece, out, MPI_UINT16_T, to, TAG_SUM);
        } else {
            receive(x, s, s->received + at, n, MPI_FLOAT, from, TAG_SUM);
            send(x, s, s->array + begin, out, MPI_FLOAT, to, TAG_SUM);
        }
    }
}

/* Own piece = the tree over all members' versions of it. */
static void add_up(sel_exchange *x, slot *s)
{
    int64_t begin;
    const int64_t n = piece(x, s, x->member, &begin);
    float *const own = s->array + begin;

    for (int m = 0; m < x->members; m++) {
        x->arrays[m] = m == x->member ? own : s->received + m * x->piece;
        if (x->bfloat16 && m != x->member)
            sel_from_bfloat16(x->arrays[m], s->in16 + m * x->piece, n, x->threads);
    }
    sel_tree_sum(&own, 1, (const float *const *)x->arrays, x->members, n, x->threads);
}

/* Own piece to all. */
static void start_spread(sel_exchange *x, slot *s)
{
    const bool rounded = x->bfloat16 && s->kind == SEL_EXCHANGE_SUM_SPREAD;
    int64_t own, begin;
    const int64_t n = piece(x, s, x->member, &own);
    uint16_t *const own16 = rounded ? s->out16 + x->member * x->piece : NULL;

    s->state = SPREADING;
    if (rounded) {
        sel_to_bfloat16(own16, s->array + own, n, x->threads);
        sel_from_bfloat16(s->array + own, own16, n, x->threads);
    }
    for (int i = 1; i < x->members; i++) {
        const int to = (x->member + i) % x->members, from = (x->member - i + x->members) % x->members;
        const int64_t in = piece(x, s, from, &begin);

        if (rounded) {
            receive(x, s, s->in16 + from * x->piece, in, MPI_UINT16_T, from, TAG_SPREAD);
            send(x, s, own16, n, MPI_UINT16_T, to, TAG_SPREAD);
        } else {
            receive(x, s, s->array + begin, in, MPI_FLOAT, from, TAG_SPREAD);
            send(x, s, s->array + own, n, MPI_FLOAT, to, TAG_SPREAD);
        }
    }
}

static void end_spread(sel_exchange *x, slot *s)
{
    int64_t begin;

    s->state = COMPLETE;
    if (!x->bfloat16 || s->kind != SEL_EXCHANGE_SUM_SPREAD) return;
    for (int m = 0; m < x->members; m++) {
        const int64_t n = piece(x, s, m, &begin);
        if (m != x->member) sel_from_bfloat16(s->array + begin, s->in16 + m * x->piece, n, x->threads);
    }
}

void sel_exchange_start(sel_exchange *x, sel_exchange_kind kind, float *array, int k)
{
    slot *const s = &x->slots[x->started++ % SLOTS];

    SEL_ASSERT(s->state == IDLE);
    s->kind = kind;
    s->array = array;
    s->k = k;
    if (kind == SEL_EXCHANGE_SPREAD)
        start_spread(x, s);
    else
        start_sum(x, s);
}

static bool arrived(sel_exchange *x, slot *s)
{
    int all;

    CK(x->comm, MPI_Testall(s->n_requests, s->requests, &all, s->statuses));
    if (all) s->n_requests = 0;
    return all;
}

bool sel_exchange_advance(sel_exchange *x)
{
    bool moved = false;

    for (unsigned i = x->moved; i != x->started; i++) {
        slot *const s = &x->slots[i % SLOTS];
        if (s->state == COMPLETE || !arrived(x, s)) continue;
        moved = true;
        if (s->state == SPREADING) {
            end_spread(x, s);
        } else {
            add_up(x, s);
            if (s->kind == SEL_EXCHANGE_SUM_SPREAD)
                start_spread(x, s);
            else
                s->state = COMPLETE;
        }
    }
    while (x->moved != x->started && x->slots[x->moved % SLOTS].state == COMPLETE) x->moved++;
    return moved;
}

int sel_exchange_completed(sel_exchange *x)
{
    int n = 0;

    for (; x->told != x->moved; x->told++, n++) x->slots[x->told % SLOTS].state = IDLE;
    return n;
}

double sel_exchange_sent(sel_exchange *x)
{
    const double sent = x->sent;
    x->sent = 0;
    return sent;
}
