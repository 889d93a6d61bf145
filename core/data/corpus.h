/* corpus.h: a packed corpus, read by mmap, and the samples of a training run.
 *
 * Window w of the stream is BOS, then stream[w N .. w N + N - 1]: its first N tokens
 * are the input, its last N the targets.
 */
#ifndef SEL_CORE_DATA_CORPUS_H
#define SEL_CORE_DATA_CORPUS_H

#include <stddef.h>
#include <stdint.h>
#include "core/base/error.h"

typedef struct sel_corpus sel_corpus;

/* Opens and checks a packed folder: index, shard sizes, ids' width.  SEL_EUSER when it is missing or not a
   packed corpus, SEL_EFILE when damaged. */
sel_status sel_corpus_open(sel_corpus **c, const char *dir);
void       sel_corpus_close(sel_corpus **c);

/* Reads every shard and compares checksums: SEL_EFILE names the first that differs. */
sel_status sel_corpus_verify(const sel_corpus *c);

int64_t     sel_corpus_tokens(const sel_corpus *c);
int64_t     sel_corpus_documents(const sel_corpus *c);
int64_t     sel_corpus_bytes(const sel_corpus *c);            /* of text */
int64_t     sel_corpus_vocab(const sel_corpus *c);            /* pieces of its tokenizer */
int32_t     sel_corpus_bos(const sel_corpus *c);
int32_t     sel_corpus_eos(const sel_corpus *c);
uint32_t    sel_corpus_crc32(const sel_corpus *c);            /* of index.json: names the corpus */
uint32_t    sel_corpus_tokenizer_crc32(const sel_corpus *c);
const char *sel_corpus_dir(const sel_corpus *c);
int64_t     sel_corpus_shards(const sel_corpus *c);

/* Whole windows of context N; the last, incomplete one has sel_corpus_tail tokens (0: none). */
int64_t sel_corpus_windows(const sel_corpus *c, int64_t N);
int64_t sel_corpus_tail(const sel_corpus *c, int64_t N);

/* BOS and the window's tokens into out[N + 1]; *targets (may be NULL) says how many it has: N, or the tail's count for
   window index == sel_corpus_windows (the rest of out is filled with -1).  SEL_EFILE names the shard and the place of
   an id outside the vocabulary. */
sel_status sel_corpus_window(const sel_corpus *c, int64_t N, int64_t w, int32_t *out, int64_t *targets);

/* The window that sample (seed, step, index) of a run reads: step from 1, index in [0, batch); a seeded
   permutation of the windows per epoch.  windows >= 1. */
int64_t sel_sample_window(uint64_t seed, int64_t step, int64_t index, int64_t batch, int64_t windows);

#endif
