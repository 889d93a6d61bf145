/* Packing as a pipeline: one thread reads documents into batches, N threads tokenize them, the caller's thread writes
 * them in order.  Batches live in a ring, so memory does not depend on the corpus; a long document goes through it in
 * parts (text.h), so several threads share it.  What is written does not depend on the number of threads.
 */
#include "core/data/pack.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/clock.h"
#include "core/data/pack_writer.h"
#include "core/data/text.h"

enum { BATCH_PARTS = 256, BATCHES_A_THREAD = 4 };

/* A part of a document. */
typedef struct {
    size_t text_end;       /* in the batch's text; it starts where the part before ends */
    size_t tokens_end;     /* in the batch's tokens */
    bool start, last;      /* of its document */
    int file;              /* last: where the next document starts */
    int64_t line;
} part;

typedef struct {
    char *text;                     /* [2 SEL_TEXT_PART]: less than a part, then one more */
    size_t text_bytes;
    part parts[BATCH_PARTS];
    int n_parts;
    unsigned char *tokens;          /* little-endian, as in the shard */
    size_t n_tokens, tokens_capacity;
    int64_t input_bytes;            /* of the inputs, read so far */
    bool end;                       /* nothing follows */
    bool done;                      /* tokenized, to be written */
    sel_status rc;
    char error[1024];
} batch;

typedef struct {
    sel_documents *documents;
    const sel_tokenizer *tokenizer;
    int token_bytes;
    int32_t eos;

    batch *ring;
    int n_batches;
    pthread_mutex_t mutex;
    pthread_cond_t changed;         /* any of what follows, or a batch's done */
    int64_t read, taken, written;   /* batches so far: written <= taken <= read <= written + n_batches */
    bool closed;                    /* no batch will follow those read */
    bool stop;                      /* the writer has failed */
} pipeline;

static batch *slot(pipeline *p, int64_t i) { return &p->ring[i % p->n_batches]; }

static void batch_fail(batch *b, sel_status rc)
{
    b->rc = rc;
    snprintf(b->error, sizeof b->error, "%s", sel_error());
}

/* --- reading ---------------------------------------------------------------------------------------------- */

static sel_status fill_batch(pipeline *p, batch *b, bool *inside)
{
    int64_t total;

    while (b->n_parts < BATCH_PARTS && b->text_bytes < SEL_TEXT_PART) {
        const char *text;
        size_t bytes;
        part *q = &b->parts[b->n_parts];
        SEL_TRY(sel_documents_part(p->documents, &text, &bytes, &q->last));
        if (!text) {
            b->end = true;
            break;
        }
        memcpy(b->text + b->text_bytes, text, bytes);
        b->text_bytes += bytes;
        q->text_end = b->text_bytes;
        q->start = !*inside;
        *inside = !q->last;
        if (q->last) sel_documents_tell(p->documents, &q->file, &q->line);
        b->n_parts++;
    }
    sel_documents_progress(p->documents, &b->input_bytes, &total);
    return SEL_OK;
}

static void *reader(void *arg)
{
    pipeline *p = arg;
    bool inside = false;

    for (;;) {
        pthread_mutex_lock(&p->mutex);
        while (!p->stop && p->read - p->written == p->n_batches) pthread_cond_wait(&p->changed, &p->mutex);
        const bool stop = p->stop;
        batch *b = slot(p, p->read);
        pthread_mutex_unlock(&p->mutex);
        if (stop) return NULL;

        b->text_bytes = b->n_tokens = 0;
        b->n_parts = 0;
        b->end = b->done = false;
        b->rc = SEL_OK;
        const sel_status rc = fill_batch(p, b, &inside);
        if (rc != SEL_OK) batch_fail(b, rc);

        pthread_mutex_lock(&p->mutex);
        p->read++;
        p->closed = b->end || rc != SEL_OK;
        const bool closed = p->closed;
        pthread_cond_broadcast(&p->changed);
        pthread_mutex_unlock(&p->mutex);
        if (closed) return NULL;
    }
}

/* --- tokenizing ------------------------------------------------------------------------------------------- */

static void put_token(const pipeline *p, batch *b, int32_t id)
{
    unsigned char *at = b->tokens + b->n_tokens++ * (size_t)p->token_bytes;

    for (int i = 0; i < p->token_bytes; i++) at[i] = (unsigned char)((uint32_t)id >> (8 * i));
}

typedef struct {
    int32_t *ids;
    size_t capacity;
} scratch;

static sel_status tokenize(const pipeline *p, batch *b, scratch *s)
{
    size_t from = 0, n;

    for (int i = 0; i < b->n_parts; i++) {
        part *q = &b->parts[i];
        SEL_TRY(sel_tokenizer_encode_part(p->tokenizer, b->text + from, q->text_end - from, q->start, &s->ids, &n,
                                          &s->capacity));
        from = q->text_end;

        const size_t room = b->n_tokens + n + 1;
        if (room > b->tokens_capacity) {
            const size_t grown = room > 2 * b->tokens_capacity ? room : 2 * b->tokens_capacity;
            unsigned char *tokens = realloc(b->tokens, grown * (size_t)p->token_bytes);
            if (!tokens) return sel_fail(SEL_ENOMEM, "no memory for %zu tokens", grown);
            b->tokens = tokens;
            b->tokens_capacity = grown;
        }
        for (size_t j = 0; j < n; j++) put_token(p, b, s->ids[j]);
        if (q->last) put_token(p, b, p->eos);
        q->tokens_end = b->n_tokens;
    }
    return SEL_OK;
}

static void *worker(void *arg)
{
    pipeline *p = arg;
    scratch s = {0};

    for (;;) {
        pthread_mutex_lock(&p->mutex);
        while (!p->stop && p->taken == p->read && !p->closed) pthread_cond_wait(&p->changed, &p->mutex);
        const bool leave = p->stop || p->taken == p->read;
        batch *b = slot(p, p->taken);
        if (!leave) p->taken++;
        pthread_mutex_unlock(&p->mutex);
        if (leave) break;

        if (b->rc == SEL_OK) {
            const sel_status rc = tokenize(p, b, &s);
            if (rc != SEL_OK) batch_fail(b, rc);
        }

        pthread_mutex_lock(&p->mutex);
        b->done = true;
        pthread_cond_broadcast(&p->changed);
        pthread_mutex_unlock(&p->mutex);
    }
    free(s.ids);
    return NULL;
}

/* --- writing ---------------------------------------------------------------------------------------------- */

static sel_status write_batch(const pipeline *p, const batch *b, sel_pack_writer *w, int64_t *document_bytes)
{
    size_t text = 0, tokens = 0;

    if (b->rc != SEL_OK) return sel_fail(b->rc, "%s", b->error);
    for (int i = 0; i < b->n_parts; i++) {
        const part *q = &b->parts[i];
        SEL_TRY(sel_pack_writer_add(w, b->tokens + tokens * (size_t)p->token_bytes, (int64_t)(q->tokens_end - tokens)));
        *document_bytes += (int64_t)(q->text_end - text);
        text = q->text_end;
        tokens = q->tokens_end;
        if (q->last) {
            SEL_TRY(sel_pack_writer_end_document(w, *document_bytes, q->file, q->line));
            *document_bytes = 0;
        }
    }
    return SEL_OK;
}

static sel_status write_all(pipeline *p, sel_pack_writer *w, const sel_pack_options *o, int64_t total)
{
    const double started = sel_now();
    int64_t document_bytes = 0;

    for (bool end = false; !end;) {
        pthread_mutex_lock(&p->mutex);
        batch *b = slot(p, p->written);
        while (p->written == p->read || !b->done) pthread_cond_wait(&p->changed, &p->mutex);
        pthread_mutex_unlock(&p->mutex);

        SEL_TRY(write_batch(p, b, w, &document_bytes));
        end = b->end;
        if (o->progress) o->progress(o->ctx, b->input_bytes, total, sel_pack_writer_tokens(w), sel_now() - started);

        pthread_mutex_lock(&p->mutex);
        p->written++;
        pthread_cond_broadcast(&p->changed);
        pthread_mutex_unlock(&p->mutex);
    }
    return sel_pack_writer_finish(w);
}

/* Starts the threads, writes what they make, ends them. */
static sel_status run(pipeline *p, sel_pack_writer *w, const sel_pack_options *o, pthread_t *threads, int64_t total)
{
    sel_status rc = SEL_OK;
    int started = 0;

    for (; started < o->threads + 1 && rc == SEL_OK; started++) {
        const int e = pthread_create(&threads[started], NULL, started == 0 ? reader : worker, p);
        if (e != 0) {
            rc = sel_fail(SEL_EIO, "cannot start thread %d of %d: %s", started + 1, o->threads + 1, strerror(e));
            break;
        }
    }
    if (rc == SEL_OK) rc = write_all(p, w, o, total);

    pthread_mutex_lock(&p->mutex);
    p->stop = true;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->mutex);
    for (int i = 0; i < started; i++) pthread_join(threads[i], NULL);
    return rc;
}

sel_status sel_pack(sel_documents *d, const sel_tokenizer *t, const char *output, const sel_pack_options *o)
{
    pipeline p = {.documents = d, .tokenizer = t, .token_bytes = sel_pack_token_bytes(t), .eos = sel_tokenizer_eos(t)};
    sel_pack_writer *w = NULL;
    int64_t done, total;

    if (p.eos < 0 || sel_tokenizer_bos(t) < 0)
        return sel_fail(SEL_EUSER, "the tokenizer has no %s: documents end with EOS and windows begin with BOS",
                        p.eos < 0 ? "EOS" : "BOS");
    if (o->threads < 1 || o->threads > 4096)
        return sel_fail(SEL_EUSER, "%d tokenizing threads: expected 1 to 4096", o->threads);
    if (o->shard_tokens < 1)
        return sel_fail(SEL_EUSER, "%lld tokens a shard: expected 1 or more", (long long)o->shard_tokens);
    sel_documents_progress(d, &done, &total);
    SEL_TRY(sel_pack_writer_open(&w, d, t, output, o->shard_tokens));

    p.n_batches = o->threads * BATCHES_A_THREAD;
    p.ring = calloc((size_t)p.n_batches, sizeof *p.ring);
    pthread_t *threads = calloc((size_t)o->threads + 1, sizeof *threads);
    bool memory = p.ring && threads;
    for (int i = 0; memory && i < p.n_batches; i++) memory = (p.ring[i].text = malloc(2 * SEL_TEXT_PART));
    pthread_mutex_init(&p.mutex, NULL);
    pthread_cond_init(&p.changed, NULL);
    const sel_status rc = memory ? run(&p, w, o, threads, total)
                                 : sel_fail(SEL_ENOMEM, "no memory for %d batches of text", p.n_batches);

    for (int i = 0; p.ring && i < p.n_batches; i++) {
        free(p.ring[i].text);
        free(p.ring[i].tokens);
    }
    free(p.ring);
    free(threads);
    pthread_cond_destroy(&p.changed);
    pthread_mutex_destroy(&p.mutex);
    sel_pack_writer_close(&w);
    return rc;
}
