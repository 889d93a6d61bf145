/* buckets.h: how an array that ranks reduce together is cut; arithmetic without MPI.
 *
 *     array = buckets, from its end to its beginning (the order in which backward finishes it)
 *     bucket = `parts`, one for each rank of a host that folds
 *     part = `pieces`, one for each host
 *
 * All cuts lie between blocks of SEL_BLOCK floats, counted from the array's beginning.
 */
#ifndef SEL_DIST_BUCKETS_H
#define SEL_DIST_BUCKETS_H

#include <stdint.h>

/* Norms are summed over these blocks too, so that a norm's bits do not depend on who owns which piece. */
#define SEL_BLOCK 4096

typedef struct {
    int64_t n;             /* floats */
    int64_t bucket;        /* blocks of a bucket; the last one may have fewer */
    int buckets, parts, pieces;
} sel_buckets;

/* bucket_floats 0: chosen. */
void sel_buckets_cut(sel_buckets *b, int64_t n, int parts, int pieces, int64_t bucket_floats);

/* Floats [*begin, *end) of a bucket, of a part of it, of a piece of that; may be empty. */
void sel_buckets_bucket(const sel_buckets *b, int k, int64_t *begin, int64_t *end);
void sel_buckets_part(const sel_buckets *b, int k, int part, int64_t *begin, int64_t *end);
void sel_buckets_piece(const sel_buckets *b, int k, int part, int piece, int64_t *begin, int64_t *end);

#endif
