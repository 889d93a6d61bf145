/* stepdir.h: what a step folder holds, in the words that save, find and load share.  Private to this room. */
#ifndef SEL_CORE_CHECKPOINT_STEPDIR_H
#define SEL_CORE_CHECKPOINT_STEPDIR_H

#include "core/checkpoint/checkpoint.h"
#include "core/checkpoint/safetensors.h"

#define SEL_STEP_MODEL     "model.safetensors"
#define SEL_STEP_OPTIMIZER "optimizer.safetensors"
#define SEL_STEP_TOKENIZER "tokenizer.model"
#define SEL_STEP_MANIFEST  "manifest.json"
#define SEL_STEP_FILES 8    /* at most, in a manifest */

/* A file as the manifest names it. */
typedef struct {
    char name[64];
    int64_t bytes;
    uint32_t crc32;
} sel_step_file;

/* The tensors of a file, in file order: every tensor of the layout for prefixes[0], then for prefixes[1], ...
   Tensor i is layout->tensors[i % n_tensors] of array i / n_tensors.  Offsets are not assigned; sel_st_free. */
sel_status sel_step_index(sel_st_index *ix, const sel_layout *layout, const char *const *prefixes, int n);

/* "step-00001000" into out. */
void sel_step_name(char out[32], int64_t step);

/* The step of such a name, -1 when it is none. */
int64_t sel_step_of_name(const char *name);

/* The steps that have a folder in dir, newest first; *steps is freed by the caller with free. */
sel_status sel_step_list(const char *dir, int64_t **steps, int *n);

/* Writes FOLDER/manifest.json durably.  It carries a checksum of itself, or a flipped bit in its settings would
   pass. */
sel_status sel_step_write_manifest(const char *folder, const sel_checkpoint_info *info, const sel_step_file *files,
                                   int n);

/* Reads and checks it; m->path is the folder.  SEL_EFILE, naming the file, when it is missing or damaged. */
sel_status sel_step_read_manifest(sel_manifest *m, sel_step_file files[SEL_STEP_FILES], int *n, const char *folder);

/* CRC-32 of bytes [begin, end) of FOLDER/file->name, which must have the size that the manifest says. */
sel_status sel_step_crc32(const char *folder, const sel_step_file *file, int64_t begin, int64_t end, uint32_t *crc);

/* SEL_EFILE, naming the file, when the checksum of the whole file is not the manifest's. */
sel_status sel_step_compare(const char *folder, const sel_step_file *file, uint32_t crc);

#endif
