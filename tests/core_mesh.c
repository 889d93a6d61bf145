/* core_mesh.c: the arithmetic of the mesh, for any number of ranks in one process. */
#include <string.h>

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
    CHECK(sel_mesh_init(&m, 0, 4, 2, 2) == SEL_EUSER && strstr(sel_error(), "dist.mesh.sequence"), "%s", sel_error());
    CHECK(sel_mesh_init(&m, 0, 4, 0, 0) == SEL_EUSER, "sequence 0");
    CHECK(sel_mesh_init(&m, 0, 4, -4, 1) == SEL_EUSER, "data -4");
    CHECK(sel_mesh_init(&m, 0, 4, INT64_MAX, 1) == SEL_EUSER, "huge data");
    CHECK(sel_mesh_init(&m, 0, 4, 4 + ((int64_t)1 << 32), 1) == SEL_EUSER, "data that is 4 in 32 bits");
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

int main(void)
{
    test_init();
    test_samples();
    test_share();
    return check_verdict();
}
