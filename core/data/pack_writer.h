/* pack_writer.h: the files of a packed corpus, written so that an interruption at any moment loses at most one shard.
 *
 * pack-state.json is put in place anew after every whole shard and says all that is needed to go on; index.json is
 * written last and makes the folder a corpus.
 */
#ifndef SEL_CORE_DATA_PACK_WRITER_H
#define SEL_CORE_DATA_PACK_WRITER_H

#include "core/data/documents.h"
#include "core/data/tokenizer.h"

typedef struct sel_pack_writer sel_pack_writer;

/* Makes the folder, or goes on where the same call was interrupted: d is moved to the first document that is not in a
   whole shard.  SEL_EUSER: a complete corpus, another's files, other inputs, or someone is writing there now. */
sel_status sel_pack_writer_open(sel_pack_writer **w, sel_documents *d, const sel_tokenizer *t, const char *output,
                                int64_t shard_tokens);
void       sel_pack_writer_close(sel_pack_writer **w);

/* Bytes of a token in the shards: 2 up to 65,536 pieces, else 4. */
int sel_pack_token_bytes(const sel_tokenizer *t);

/* Appends tokens (little-endian, as in the shard) to the current document. */
sel_status sel_pack_writer_add(sel_pack_writer *w, const unsigned char *tokens, int64_t n);

/* Ends the document of text_bytes; the next one starts at (file, line) of the inputs. */
sel_status sel_pack_writer_end_document(sel_pack_writer *w, int64_t text_bytes, int file, int64_t line);

/* Tokens of ended documents, those of earlier calls included. */
int64_t sel_pack_writer_tokens(const sel_pack_writer *w);

/* The last shard, tokenizer.model, documents.bin, index.json.  No document at all: SEL_EUSER and no folder. */
sel_status sel_pack_writer_finish(sel_pack_writer *w);

#endif
