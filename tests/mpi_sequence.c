/* mpi_sequence.c: what ranks that share sequences tell each other, at 1 to 4 ranks: in a window, by messages, and, with
 * SELECTRA_HOSTS, over hosts.  Numbers are functions of where they belong, so each place says what must stand in it.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/pulse.h"
#include "core/base/rng.h"
#include "dist/comm.h"
#include "dist/sequence.h"
#include "tests/check.h"

static sel_comm *comm;
static sel_pulse pulse;
static int rank, size;

static float number(int64_t kind, int64_t a, int64_t b, int64_t c)
{
    return (float)(sel_rng_uniform(3, (uint64_t)(kind * 1000 + a), (uint64_t)(b * 100000 + c)) - 0.5);
}

/* A key's number, as bits of its type. */
static uint32_t key_bits(bool bfloat16, int64_t round, int64_t b, int64_t at, int64_t w)
{
    const float x = number(round, b, at, w);
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bfloat16 ? bits >> 16 : bits;
}

/* Ranks come late in turn. */
static void late(int round)
{
    const struct timespec t = {.tv_nsec = (rank * 7 + round * 5) % 4 * 3000000L};
    nanosleep(&t, NULL);
}

static void test_keys(sel_sequence *q, int64_t batch, int64_t width, bool bfloat16, int round)
{
    const sel_chunks *const c = sel_sequence_chunks(q);
    const int64_t last = (sel_chunk_place(c, c->rank, c->chunks - 1) + 1) * c->each;
    int64_t wrong = 0;

    uint32_t *const keys = sel_sequence_begin(q);
    uint16_t *const keys16 = (uint16_t *)keys;
    late(round);
    for (int k = 0; k < c->chunks; k++)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < c->each; i++)
                for (int64_t w = 0; w < width; w++) {
                    const int64_t at = sel_chunk_place(c, c->rank, k) * c->each + i;
                    const int64_t to = (b * c->tokens + at) * width + w;
                    if (bfloat16) keys16[to] = (uint16_t)key_bits(true, round, b, at, w);
                    else keys[to] = key_bits(false, round, b, at, w);
                }
    sel_sequence_share(q, batch);
    late(round + 1);
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < last; i++)
            for (int64_t w = 0; w < width; w++)
                wrong += (bfloat16 ? keys16[(b * c->tokens + i) * width + w]
                                   : keys[(b * c->tokens + i) * width + w]) != key_bits(bfloat16, round, b, i, w);
    CHECK(wrong == 0, "round %d: %lld wrong keys", round, (long long)wrong);
}

static float sum_number(int round, int place, int64_t b, int64_t j)
{
    return number(50 + round, place, b, j);
}

static void test_sums(sel_sequence *q, int64_t batch, int round)
{
    const sel_chunks *const c = sel_sequence_chunks(q);
    const int64_t row = sel_sequence_row(q);
    const int places = c->ranks * c->chunks;
    float *const y = calloc((size_t)(batch * row), sizeof *y);

    if (!y) abort();
    for (int k = 0; k < c->chunks; k++) {
        const int place = sel_chunk_place(c, c->rank, k);
        float *const sums = sel_sequence_sums(q, k);
        for (int64_t b = 0; b < batch; b++) {
            for (int64_t j = 0; j < (place + 1) * c->each; j++) sums[b * row + j] = sum_number(round, place, b, j);
            for (int64_t j = (place + 1) * c->each; j < c->tokens; j++) sums[b * row + j] = NAN;
            sums[b * row + c->tokens] = place == round % places ? 7.0f : -1.0f - (float)place;
        }
    }
    late(round);
    sel_sequence_share_sums(q, batch);
    for (int64_t b = 0; b < batch; b++)
        CHECK(sel_sequence_extra(q, b) == 7.0f, "extra %g", (double)sel_sequence_extra(q, b));
    for (int k = 0; k < c->chunks; k++) {
        const int place = sel_chunk_place(c, c->rank, k);
        for (int later = 0; later < 2; later++) {
            const int first = later ? place + 1 : 0, end = later ? places : place;
            const int64_t n = (place + later) * c->each;
            int64_t wrong = 0;
            sel_sequence_add(q, batch, first, end, n, y);
            for (int64_t b = 0; b < batch; b++)
                for (int64_t j = 0; j < n; j++) {
                    float sum = 0.0f;
                    for (int p = first; p < end; p++)
                        if (j < (p + 1) * c->each) sum += sum_number(round, p, b, j);
                    wrong += y[b * row + j] != sum;
                }
            CHECK(wrong == 0, "round %d, chunk %d, %s: %lld wrong sums", round, place, later ? "after" : "before",
                  (long long)wrong);
        }
    }
    free(y);
}

static void test_gradients(sel_sequence *q, int64_t batch, int64_t width, int round)
{
    const sel_chunks *const c = sel_sequence_chunks(q);
    const int places = c->ranks * c->chunks;
    int64_t wrong = 0;

    for (int k = 0; k < c->chunks; k++) {
        const int place = sel_chunk_place(c, c->rank, k);
        float *const g = sel_sequence_gradients(q, k);
        for (int64_t b = 0; b < batch; b++)
            for (int64_t x = 0; x < (place + 1) * c->each * width; x++)
                g[b * sel_sequence_gradients_seq(q, k) + x] = number(100 + round, place, b, x);
    }
    late(round);
    sel_sequence_sum_gradients(q, batch);
    for (int k = 0; k < c->chunks; k++) {
        const int place = sel_chunk_place(c, c->rank, k);
        const float *const own = sel_sequence_own_gradients(q, k);
        for (int64_t b = 0; b < batch; b++)
            for (int64_t x = 0; x < c->each * width; x++) {
                float sum = number(100 + round, place, b, place * c->each * width + x);
                for (int p = place + 1; p < places; p++) sum += number(100 + round, p, b, place * c->each * width + x);
                wrong += own[b * sel_sequence_gradients_seq(q, k) + x] != sum;
            }
    }
    CHECK(wrong == 0, "round %d: %lld wrong gradients", round, (long long)wrong);
}

/* What must go to other hosts, by messages alone, if each host's ranks wanted it once. */
static void test_wire(sel_sequence *q, bool forward_only)
{
    sel_wire w;
    sel_sequence_wire(q, &w);
    CHECK(w.wire_bytes >= w.wire_least && w.wait_seconds >= 0.0, "%g bytes, %g least", w.wire_bytes, w.wire_least);
    CHECK((w.wire_bytes > 0.0) == (sel_comm_hosts(comm) > 1), "%g bytes between %d hosts (%d)", w.wire_bytes,
          sel_comm_hosts(comm), forward_only);
    sel_sequence_wire(q, &w);
    CHECK(w.wire_bytes == 0.0 && w.host_bytes == 0.0 && w.wait_seconds == 0.0, "counted twice");
}

/* Returns the bytes that this rank's keys of one round have taken between hosts. */
static double test_all(int64_t each, int64_t batch, int64_t width, sel_cut cut, bool no_window, bool bfloat16)
{
    sel_mesh m;
    sel_sequence *q;
    sel_sequence_options o = {
        .batch = batch, .width = width, .no_window = no_window, .bfloat16 = bfloat16, .threads = 1};
    sel_wire first;
    int all[8];

    CHECK_OK(sel_mesh_init(&m, rank, size, 1, size));
    CHECK_OK(sel_mesh_chunks(&m, each * size * (cut == SEL_CUT_ZIGZAG && size > 1 ? 2 : 1), cut, &o.chunks));
    CHECK_OK(sel_sequence_new(&q, comm, &o));
    if (!q) return 0.0;
    const bool windowless = no_window || sel_comm_hosts(comm) > 1;
    CHECK((sel_sequence_note(q)[0] != '\0') == windowless, "note: %s", sel_sequence_note(q));
    sel_pulse_view before, after;
    sel_pulse_read(&pulse, &before);
    test_keys(q, batch, width, bfloat16, 0);
    sel_sequence_end(q);
    sel_sequence_wire(q, &first);
    for (int round = 0; round < 6; round++) {
        const int64_t here = round % 3 == 2 ? 1 : batch;
        test_keys(q, here, width, bfloat16, round);
        test_sums(q, here, round);
        if (round % 2) test_gradients(q, here, width, round);
        else sel_sequence_end(q);
    }
    test_wire(q, false);
    const int mine = rank * rank;
    sel_sequence_gather(q, &mine, sizeof mine, all);
    for (int r = 0; r < size; r++) CHECK(all[r] == r * r, "%d of rank %d", all[r], r);
    sel_pulse_read(&pulse, &after);
    CHECK(after.position == before.position && after.marks > before.marks,
          "a group's exchanges count as the whole job's: ranks of other groups would seem to be behind");
    sel_sequence_free(&q);
    CHECK(!q, "freed");
    return first.wire_bytes;
}

static void test_both(int64_t each, int64_t batch, int64_t width, sel_cut cut, bool no_window)
{
    const double all = test_all(each, batch, width, cut, no_window, false);
    const double half = test_all(each, batch, width, cut, no_window, true);
    CHECK(2.0 * half == all, "%g bytes of keys in bfloat16, %g in float32", half, all);
}

int main(int argc, char **argv)
{
    if (sel_comm_open(&comm, &argc, &argv) != SEL_OK) {
        fprintf(stderr, "%s\n", sel_error());
        return EXIT_FAILURE;
    }
    rank = sel_comm_rank(comm);
    size = sel_comm_size(comm);
    sel_pulse_move(&pulse);
    for (int way = 0; way < 4; way++) {
        const sel_cut cut = way % 2 ? SEL_CUT_ZIGZAG : SEL_CUT_CONTIGUOUS;
        test_both(1, 1, 1, cut, way / 2);
        test_both(5, 2, 3, cut, way / 2);
        test_both(37, 3, 24, cut, way / 2);
    }
    const int verdict = check_verdict();
    sel_comm_close(&comm);
    return verdict;
}
