/* pack.h: documents to a packed corpus: a folder of token shards and index.json (spec, section 9). */
#ifndef SEL_CORE_DATA_PACK_H
#define SEL_CORE_DATA_PACK_H

#include "core/data/documents.h"
#include "core/data/tokenizer.h"

typedef struct {
    int threads;                 /* tokenizing threads */
    int64_t shard_tokens;        /* a shard is closed at the first document end past this */
    void (*progress)(void *ctx, int64_t done, int64_t total, int64_t tokens, double seconds);   /* may be NULL */
    void *ctx;
} sel_pack_options;

/* Writes OUTPUT (made if missing): shards, documents.bin, tokenizer.model, then index.json.  Interrupted, the
   same call goes on after the last whole shard.  A complete folder is refused (SEL_EUSER).
   Each document is its ids, then EOS. */
sel_status sel_pack(sel_documents *d, const sel_tokenizer *t, const char *output, const sel_pack_options *o);

#endif
