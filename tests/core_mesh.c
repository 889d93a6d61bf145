/* core_mesh.c: the arithmetic of the mesh, for any number of ranks in one process. */
#include <string.h>

#include "dist/buckets.h"
#include "dist/mesh.h"
#include "tests/check.h"

static void test_init(void)
{
    sel_mesh m;

    for (int size = 1; size <= 9; size++) {
        for (int rank = 0; rank < size; rank++) {
            CHECK_OK(sel_mesh_init(&m, rank, size, 0, 1));
            CHECK(m.data == size && m.sequence == 1 && m.data_rank == rank && m.sequence_rank == 0, "size %d rank %d",
                  size, rank);
            CHECK_OK(sel_mesh_init(&m, rank, size, size, 1));
            CHECK(m.data == size && m.data_rank == rank, "size %d rank %d", size, rank);
        }
        CHECK(sel_mesh_init(&m, 0, size, size + 1, 1) == SEL_EUSER, "data %d of %d", size + 1, size);
        CHECK(sel_mesh_init(&m, 0, size, 1, 1) == (size == 1 ? SEL_OK : SEL_EUSER), "data 1 of %d", size);
    }
    CHECK(sel_mesh_init(&m, 0, 4, 3, 1) == SEL_EUSER && strstr(sel_error(), "data 4"), "%s", sel_error());
    for (int rank = 0; rank < 6; rank++) {
        CHECK_OK(sel_mesh_init(&m, rank, 6, 0, 3));
        CHECK(m.data == 2 && m.sequence == 3 && m.data_rank == rank / 3 && m.sequence_rank == rank % 3, "rank %d",
              rank);
    }
    CHECK_OK(sel_mesh_init(&m, 5, 6, 1, 6));
    CHECK(sel_mesh_init(&m, 0, 6, 3, 3) == SEL_EUSER && strstr(sel_error(), "data 2"), "%s", sel_error());
    CHECK(sel_mesh_init(&m, 0, 6, 0, 4) == SEL_EUSER && strstr(sel_error(), "3 or 6"), "%s", sel_error());
    CHECK(sel_mesh_init(&m, 0, 6, 0, 7) == SEL_EUSER && strstr(sel_error(), "6 would"), "%s", sel_error());
    CHECK(sel_mesh_init(&m, 0, 6, 0, INT64_MAX) == SEL_EUSER && strstr(sel_error(), "6 would"), "%s", sel_error());
    CHECK(sel_mesh_init(&m, 0, 6, 0, -1) == SEL_EUSER && strstr(sel_error(), "1 would"), "%s", sel_error());
    CHECK(sel_mesh_init(&m, 0, 4, 0, 0) == SEL_EUSER, "sequence 0");
    CHECK(sel_mesh_init(&m, 0, 4, -4, 1) == SEL_EUSER, "data -4");
    CHECK(sel_mesh_init(&m, 0, 4, INT64_MAX, 1) == SEL_EUSER, "huge data");
    CHECK(sel_mesh_init(&m, 0, 4, 4 + ((int64_t)1 << 32), 1) == SEL_EUSER, "data that is 4 in 32 bits");
}

/* Every token belongs to one chunk of one rank; zigzag gives all ranks the same number of (query, key) pairs. */
static void test_chunks(void)
{
    for (int size = 1; size <= 8; size++)
        for (int64_t each = 1; each <= 3; each++)
            for (int zigzag = 0; zigzag < 2; zigzag++) {
                const int64_t n = each * size * (zigzag && size > 1 ? 2 : 1);
                int seen[64] = { 0 };
                int64_t first_pairs = 0;
                for (int rank = 0; rank < size; rank++) {
                    sel_mesh m;
                    sel_chunks c;
                    int64_t pairs = 0;
                    CHECK_OK(sel_mesh_init(&m, rank, size, 1, size));
                    CHECK_OK(sel_mesh_chunks(&m, n, zigzag ? SEL_CUT_ZIGZAG : SEL_CUT_CONTIGUOUS, &c));
                    CHECK(c.each == each && c.tokens == n && c.ranks == size && c.rank == rank, "%d of %d", rank, size);
                    for (int k = 0; k < c.chunks; k++) {
                        const int place = sel_chunk_place(&c, rank, k);
                        int back;
                        CHECK(sel_chunk_owner(&c, place, &back) == rank && back == k, "chunk %d", place);
                        CHECK(k == 0 || place > sel_chunk_place(&c, rank, k - 1), "chunks of a rank ascend");
                        for (int64_t i = place * each; i < (place + 1) * each; i++) {
                            seen[i]++;
                            pairs += i + 1;
                        }
                    }
                    if (rank == 0) first_pairs = pairs;
                    CHECK(!zigzag || pairs == first_pairs, "rank %d has %lld pairs", rank, (long long)pairs);
                }
                for (int64_t i = 0; i < n; i++) CHECK(seen[i] == 1, "token %d: %d owners", (int)i, seen[i]);
            }

    sel_mesh m;
    sel_chunks c;
    CHECK_OK(sel_mesh_init(&m, 0, 3, 0, 3));
    CHECK_OK(sel_mesh_chunks(&m, 12, SEL_CUT_AUTO, &c));
    CHECK(c.chunks == 2 && c.each == 2, "auto of 12");
    CHECK_OK(sel_mesh_chunks(&m, 9, SEL_CUT_AUTO, &c));
    CHECK(c.chunks == 1 && c.each == 3, "auto of 9");
    CHECK(sel_mesh_chunks(&m, 100, SEL_CUT_AUTO, &c) == SEL_EUSER && strstr(sel_error(), "99 or 102") &&
              strstr(sel_error(), "sequence 2"), "%s", sel_error());
    CHECK(sel_mesh_chunks(&m, 9, SEL_CUT_ZIGZAG, &c) == SEL_EUSER && strstr(sel_error(), "6 or 12") &&
              strstr(sel_error(), "contiguous"), "%s", sel_error());
    CHECK(sel_mesh_chunks(&m, 2, SEL_CUT_AUTO, &c) == SEL_EUSER && strstr(sel_error(), "context 3 would"), "%s",
          sel_error());
}

static void test_samples(void)
{
    for (int size = 1; size <= 8; size++) {
        for (int64_t batch = 1; batch <= 40; batch++) {
            int64_t next = 0;
            for (int rank = 0; rank < size; rank++) {
                sel_mesh m;
                int64_t first, count;
                CHECK_OK(sel_mesh_init(&m, rank, size, 0, 1));
                const sel_status rc = sel_mesh_samples(&m, batch, &first, &count);
                CHECK(rc == (batch % size ? SEL_EUSER : SEL_OK), "batch %lld over %d", (long long)batch, size);
                if (rc != SEL_OK) continue;
                CHECK(first == next && count == batch / size, "batch %lld rank %d of %d", (long long)batch, rank, size);
                next = first + count;
            }
            CHECK(next == (batch % size ? 0 : batch), "batch %lld over %d ends at %lld", (long long)batch, size,
                  (long long)next);
        }
    }

    sel_mesh m;
    int64_t first, count;
    CHECK_OK(sel_mesh_init(&m, 0, 4, 0, 1));
    CHECK(sel_mesh_samples(&m, 10, &first, &count) == SEL_EUSER && strstr(sel_error(), "8 or 12"), "%s", sel_error());
    CHECK(sel_mesh_samples(&m, 3, &first, &count) == SEL_EUSER && strstr(sel_error(), "; 4 would"), "%s", sel_error());
    CHECK(sel_mesh_samples(&m, 0, &first, &count) == SEL_EUSER, "batch 0");
    CHECK(sel_mesh_samples(&m, -4, &first, &count) == SEL_EUSER, "batch -4");
}

static void test_share(void)
{
    static const int64_t sizes[] = {0, 1, 2, 3, 7, 64, 1000, 4097, ((int64_t)1 << 31) + 5, INT64_MAX};

    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (int size = 1; size <= 17; size++) {
            int64_t next = 0;
            for (int rank = 0; rank < size; rank++) {
                int64_t begin, end;
                sel_mesh_share(sizes[i], rank, size, &begin, &end);
                const int64_t n = end - begin;
                CHECK(begin == next, "%lld bytes, rank %d of %d begins at %lld", (long long)sizes[i], rank, size,
                      (long long)begin);
                CHECK(n == sizes[i] / size || n == sizes[i] / size + 1, "rank %d of %d has %lld", rank, size,
                      (long long)n);
                next = end;
            }
            CHECK(next == sizes[i], "%lld bytes over %d end at %lld", (long long)sizes[i], size, (long long)next);
        }
    }
}

/* Buckets go from the end to the beginning, parts and pieces of each go up in it; all meet, and cut between blocks. */
static void test_buckets(void)
{
    static const int64_t lengths[] = {0, 1, 4095, 4096, 4097, 100000, 3000001, ((int64_t)1 << 31) + 77};
    static const int64_t sizes[] = {0, 1, 8192, 1 << 20};

    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
            for (int parts = 1; parts <= 5; parts += 2)
                for (int pieces = 1; pieces <= 4; pieces++) {
                    const int64_t n = lengths[i];
                    sel_buckets b;
                    int64_t below = n;
                    if (n > 1 << 30 && sizes[s] && sizes[s] < 1 << 20) continue;   /* very many */
                    sel_buckets_cut(&b, n, parts, pieces, sizes[s]);
                    for (int k = 0; k < b.buckets; k++) {
                        int64_t begin, end, part_begin, part_end, at, stop, next;
                        sel_buckets_bucket(&b, k, &begin, &end);
                        CHECK(end == below && begin < end && begin % SEL_BLOCK == 0, "bucket %d of %lld: %lld to %lld",
                              k, (long long)n, (long long)begin, (long long)end);
                        below = next = begin;
                        for (int p = 0; p < parts; p++) {
                            sel_buckets_part(&b, k, p, &part_begin, &part_end);
                            int64_t met = part_begin;
                            for (int q = 0; q < pieces; q++) {
                                sel_buckets_piece(&b, k, p, q, &at, &stop);
                                if (at != met || stop < at || (at % SEL_BLOCK && at != n))
                                    CHECK(0, "piece %d of part %d: %lld to %lld", q, p, (long long)at, (long long)stop);
                                met = stop;
                            }
                            if (part_begin != next || met != part_end)
                                CHECK(0, "part %d of bucket %d: %lld to %lld", p, k, (long long)part_begin,
                                      (long long)part_end);
                            next = part_end;
                        }
                        CHECK(next == end, "parts of bucket %d end at %lld", k, (long long)next);
                    }
                    CHECK(below == 0, "buckets of %lld end at %lld", (long long)n, (long long)below);
                }
}

int main(void)
{
    test_buckets();
    test_init();
    test_chunks();
    test_samples();
    test_share();
    return check_verdict();
}
