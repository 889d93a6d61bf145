/* checkpoint.h: states of a run on disk: whole, checked, durable (spec, section 15).
 *
 *     DIR/step-00001000/   model.safetensors optimizer.safetensors tokenizer.model manifest.json (last)
 *     DIR/latest           relative symbolic link to the newest complete one
 *
 * Knows nothing of training: named float arrays go in and come out.
 */
#ifndef SEL_CORE_CHECKPOINT_CHECKPOINT_H
#define SEL_CORE_CHECKPOINT_CHECKPOINT_H

#include <stdint.h>
#include "core/base/file.h"
#include "core/model/layout.h"
#include "dist/comm.h"

/* What is saved beside the arrays. */
typedef struct {
    int64_t step, tokens;
    const char *config;              /* resolved YAML */
    uint32_t corpus_crc32;           /* names the training corpus; 0: none */
    const char *tokenizer;           /* bytes of the .model */
    size_t tokenizer_bytes;
    uint32_t tokenizer_crc32;
    const int64_t *skipped;          /* [n_skipped], ascending: steps whose batches are left out */
    int n_skipped;
} sel_checkpoint_info;

/* [collective] Saves params, and exp_avg and exp_avg_sq (all [layout total], the same on all ranks), every rank
   its byte range; moves `latest`; then deletes the oldest beyond `keep` (0: keeps all; never before the
   new one is verified by size and, read back, by checksum).  All ranks return the same.  A failure leaves the older
   ones untouched and removes the attempt; once the new one is in place, a failure of what follows (`latest`,
   deleting) is told too, and the new one stays.  One that exists for the step is replaced. */
sel_status sel_checkpoint_save(sel_comm *c, const char *dir, const sel_layout *layout, const sel_checkpoint_info *info,
                               const float *params, const float *exp_avg, const float *exp_avg_sq, int64_t keep);

/* What rank `rank` of `size` writes of array 0 (exp_avg) or 1 (exp_avg_sq): floats [*begin, *end) of the layout's
   array. sel_checkpoint_save reads no others of them. */
sel_status sel_checkpoint_share(const sel_layout *layout, int rank, int size, int array, int64_t *begin, int64_t *end);

/* What a manifest says; strings and the list are owned by it. */
typedef struct {
    char path[SEL_PATH_MAX];         /* the step folder */
    int64_t step, tokens;
    char *config;
    uint32_t corpus_crc32, tokenizer_crc32;
    int64_t *skipped;                /* [n_skipped], ascending */
    int n_skipped;
} sel_manifest;
void sel_manifest_free(sel_manifest *m);

/* Rank-local.  Finds a checkpoint: PATH is a step folder, a run folder or a folder of step folders; of
   several the newest intact one (files, sizes, checksums), older ones when newer are damaged: each damaged one
   is told to warn(ctx, line).  SEL_EUSER when there is none at PATH, SEL_EFILE when there are some but none is
   intact. */
sel_status sel_checkpoint_find(sel_manifest *m, const char *path, void (*warn)(void *ctx, const char *line), void *ctx);

/* Rank-local.  Loads the tensors of `layout` from a found checkpoint; exp_avg and exp_avg_sq may be NULL.  A tensor
   that is missing, extra or of another shape: SEL_EFILE naming it. */
sel_status sel_checkpoint_load(const sel_manifest *m, const sel_layout *layout, float *params, float *exp_avg,
                               float *exp_avg_sq);

/* A stretch of the layout's array. */
typedef struct {
    int64_t begin, end;
} sel_stretch;

/* Rank-local.  Moments of these stretches alone, one after another in exp_avg and exp_avg_sq; gaps between tensors are
   left as they are. */
sel_status sel_checkpoint_load_moments(const sel_manifest *m, const sel_layout *layout, const sel_stretch *stretches,
                                       int n, float *exp_avg, float *exp_avg_sq);

#endif
