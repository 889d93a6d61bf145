/* buckets.c: buckets, parts, pieces. */
#include "dist/buckets.h"

#include "dist/mesh.h"

/* Large enough that meeting costs little beside moving, small enough that much of it happens while backward runs. */
enum { LEAST_BLOCKS = 16, MOST_BLOCKS = 256, WANTED_BUCKETS = 16 };

static int64_t blocks_of(int64_t floats)
{
    return (floats + SEL_BLOCK - 1) / SEL_BLOCK;
}

void sel_buckets_cut(sel_buckets *b, int64_t n, int parts, int pieces, int64_t bucket_floats)
{
    const int64_t owners = (int64_t)parts * pieces;
    int64_t each = blocks_of(bucket_floats);

    SEL_ASSERT(n >= 0 && parts > 0 && pieces > 0);
    if (each == 0) {
        each = blocks_of(n) / WANTED_BUCKETS;
        if (each < LEAST_BLOCKS) each = LEAST_BLOCKS;
        if (each > MOST_BLOCKS) each = MOST_BLOCKS;
        each = (each + owners - 1) / owners * owners; /* pieces of one size */
    }
    *b = (sel_buckets){.n = n, .bucket = each, .parts = parts, .pieces = pieces,
                       .buckets = (int)((blocks_of(n) + each - 1) / each)};
}

static void block_range(const sel_buckets *b, int k, int64_t *begin, int64_t *end)
{
    const int64_t blocks = blocks_of(b->n);

    SEL_ASSERT(k >= 0 && k < b->buckets);
    *end = blocks - k * b->bucket;
    *begin = *end > b->bucket ? *end - b->bucket : 0;
}

static void to_floats(const sel_buckets *b, int64_t *begin, int64_t *end)
{
    *begin *= SEL_BLOCK;
    *end *= SEL_BLOCK;
    if (*begin > b->n) *begin = b->n;
    if (*end > b->n) *end = b->n;
}

static void cut(int64_t *begin, int64_t *end, int which, int of)
{
    const int64_t first = *begin, blocks = *end - *begin;

    sel_mesh_share(blocks, which, of, begin, end);
    *begin += first;
    *end += first;
}

void sel_buckets_bucket(const sel_buckets *b, int k, int64_t *begin, int64_t *end)
{
    block_range(b, k, begin, end);
    to_floats(b, begin, end);
}

void sel_buckets_part(const sel_buckets *b, int k, int part, int64_t *begin, int64_t *end)
{
    block_range(b, k, begin, end);
    cut(begin, end, part, b->parts);
    to_floats(b, begin, end);
}

void sel_buckets_piece(const sel_buckets *b, int k, int part, int piece, int64_t *begin, int64_t *end)
{
    block_range(b, k, begin, end);
    cut(begin, end, part, b->parts);
    cut(begin, end, piece, b->pieces);
    to_floats(b, begin, end);
}
