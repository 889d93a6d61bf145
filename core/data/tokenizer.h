/* tokenizer.h: SentencePiece behind a C interface (spm.cc is the only C++ file).
 *
 * Text is UTF-8; ids are the pieces' numbers.  Encoding is safe from several threads at
 * once; so is decoding.
 */
#ifndef SEL_CORE_DATA_TOKENIZER_H
#define SEL_CORE_DATA_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "core/base/error.h"

typedef struct sel_tokenizer sel_tokenizer;

/* Loads a .model; missing: SEL_EUSER, not a model: SEL_EFILE. */
sel_status sel_tokenizer_open(sel_tokenizer **t, const char *path);
void       sel_tokenizer_close(sel_tokenizer **t);

int64_t  sel_tokenizer_size(const sel_tokenizer *t);   /* pieces */
int32_t  sel_tokenizer_bos(const sel_tokenizer *t);    /* -1: none */
int32_t  sel_tokenizer_eos(const sel_tokenizer *t);
uint32_t sel_tokenizer_crc32(const sel_tokenizer *t);  /* of the .model's bytes */

/* The .model's bytes, owned by t. */
const char *sel_tokenizer_bytes(const sel_tokenizer *t, size_t *bytes);

/* Ids of text[0 .. bytes), no BOS or EOS added.  *ids [*n] grows as needed: start with
   NULL and capacity 0, reuse between calls, free with free().  Bytes that are not UTF-8 become byte pieces;
   where the model has none: SEL_EFILE. */
sel_status sel_tokenizer_encode(const sel_tokenizer *t, const char *text, size_t bytes,
                                int32_t **ids, size_t *n, size_t *capacity);

/* The same for one part of a longer text (text.h); start: it is the first.  A text's ids are
   those of its parts, one after another. */
sel_status sel_tokenizer_encode_part(const sel_tokenizer *t, const char *text, size_t bytes, bool start,
                                     int32_t **ids, size_t *n, size_t *capacity);

/* Text of ids[0 .. n), NUL-terminated, freed by the caller; ids out of range: SEL_EUSER.
   BOS and EOS give no text.  Byte pieces give their bytes, so ids that do not come from a text may
   give text that is not UTF-8. */
sel_status sel_tokenizer_decode(const sel_tokenizer *t, const int32_t *ids, size_t n,
                                char **text, size_t *bytes);

typedef struct {
    int64_t vocab;             /* pieces, specials and 256 bytes included */
    const char *kind;          /* "unigram" or "bpe" */
    int64_t sample_bytes;      /* text to train on, at most */
    uint64_t seed;
    int threads;
} sel_tokenizer_options;

/* Trains on the texts that next() yields (1: text and its length, the pointer lives until the next call; 0: the
   end; a negative sel_status ends the training with it) and writes OUTPUT (.model) whole or not at all.
   Of a corpus larger than sample_bytes a pseudo-random choice of its lines is used, spread evenly over all.
   ids: unk 0, BOS 1, EOS 2; byte fallback; identity normalisation; no white space
   removed or added: decode(encode(x)) = x for any UTF-8 text (spec, section 9). */
typedef int sel_sentence_fn(void *ctx, const char **text, size_t *bytes);
sel_status sel_tokenizer_train(const sel_tokenizer_options *o, sel_sentence_fn *next, void *ctx, const char *output);

#ifdef __cplusplus
}
#endif
#endif
