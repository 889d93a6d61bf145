/* documents.h: documents one after another out of text files, never a whole corpus in memory. */
#ifndef SEL_CORE_DATA_DOCUMENTS_H
#define SEL_CORE_DATA_DOCUMENTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "core/base/error.h"

typedef struct sel_documents sel_documents;

typedef struct {
    bool lines;           /* .txt: a document a line instead of a document a file */
    const char *field;    /* JSON lines: the text's field; NULL: "text" */
} sel_documents_options;

/* Files in the order given: NAME.txt[.gz], NAME.jsonl[.gz], NAME.json[.gz] (JSON lines too); anything else is
   read by content: gzip or not, as text.  All are opened once before the first is read, so that
   a missing one is known at once (SEL_EUSER).  Empty files, lines and texts are no documents. */
sel_status sel_documents_open(sel_documents **d, const char *const *paths, int n_paths,
                              const sel_documents_options *o);
void       sel_documents_close(sel_documents **d);

/* The next document: *text lives until the next call; *text NULL at the end.  Invalid
   UTF-8, a broken gzip stream or a bad JSON line: SEL_EFILE with file and line. */
sel_status sel_documents_next(sel_documents *d, const char **text, size_t *bytes);

/* The next part of a document (text.h), for documents too long to hold; *last: it ends its document.
   Not to be mixed with sel_documents_next within a document. */
sel_status sel_documents_part(sel_documents *d, const char **text, size_t *bytes, bool *last);

/* Where the next document starts, asked for at a document's end: the file's number and the lines before it;
   seek goes on from there. */
void       sel_documents_tell(const sel_documents *d, int *file, int64_t *line);
sel_status sel_documents_seek(sel_documents *d, int file, int64_t line);

/* What was opened: number of files, path and size of one of them, options (field never NULL). */
int                   sel_documents_files(const sel_documents *d);
const char           *sel_documents_file(const sel_documents *d, int i, int64_t *bytes);
sel_documents_options sel_documents_settings(const sel_documents *d);

/* Bytes of the input files (as stored) and how many of them have been read. */
void sel_documents_progress(const sel_documents *d, int64_t *done, int64_t *total);

#endif
