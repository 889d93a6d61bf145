/* score.c: windows in batches through the model; sums in stream order within a rank. */
#include "core/infer/score.h"

#include <stdlib.h>
#include <string.h>

/* Where windows come from: a packed corpus, or ids in memory. */
typedef struct {
    const sel_corpus *corpus;
    const int32_t *ids;
    int64_t n_ids, N;
    int32_t bos;
} stream;

/* BOS and the targets of window w into out[N + 1]; *targets is their count. */
static sel_status read_window(const stream *s, int64_t w, int32_t *out, int64_t *targets)
{
    if (s->corpus) return sel_corpus_window(s->corpus, s->N, w, out, targets);
    const int64_t begin = w * s->N, n = s->n_ids - begin < s->N ? s->n_ids - begin : s->N;
    out[0] = s->bos;
    memcpy(out + 1, s->ids + begin, (size_t)n * sizeof *out);
    *targets = n;
    return SEL_OK;
}

/* Scores `count` windows of n targets each that start at window w; rows of tokens are n + 1 apart. */
static sel_status score_batch(const sel_score_job *job, int64_t w, int64_t count, int64_t n, const int32_t *tokens,
                              double *logp, sel_batch_stats *sum)
{
    sel_batch_stats s;
    SEL_TRY(sel_model_score(job->model, job->params, tokens, count, n, logp, NULL, &s));
    sum->loss += s.loss;
    sum->memory += s.memory;
    sum->tokens += s.tokens;
    sum->correct += s.correct;
    for (int64_t i = 0; job->each && i < count; i++)
        SEL_TRY(job->each(job->ctx, w + i, tokens + i * (n + 1), logp + i * n, n));
    return SEL_OK;
}

/* Windows [begin, end); the last of the stream may be shorter and then goes alone. */
static sel_status score_range(const sel_score_job *job, const stream *s, int64_t begin, int64_t end,
                              sel_batch_stats *sum)
{
    const int64_t N = job->N;
    const bool shared = job->sequence > 1;
    int32_t *const tokens = malloc((size_t)(job->batch * (N + 1)) * sizeof *tokens);
    double *const logp = malloc((size_t)(job->batch * N) * sizeof *logp);
    sel_status rc = SEL_OK;

    if (!tokens || !logp) rc = sel_fail(SEL_ENOMEM, "no memory for a batch of %lld windows", (long long)job->batch);
    for (int64_t w = begin; rc == SEL_OK && w < end;) {
        int64_t count = 0, n = N;
        while (rc == SEL_OK && count < job->batch && w + count < end) {
            rc = read_window(s, w + count, tokens + count * (N + 1), &n);
            if (n < N) break;
            count++;
        }
        if (rc == SEL_OK && count) rc = score_batch(job, w, count, N, tokens, logp, sum);
        w += count;
        if (rc == SEL_OK && n < N && n > 0) rc = read_window(s, w, tokens, &n);
        if (rc == SEL_OK && n < N && n > 0) {
            for (int64_t i = n + 1; i <= N; i++) tokens[i] = -1;
            rc = score_batch(job, w, 1, shared ? N : n, tokens, logp, sum);   /* chunks are those of a whole one */
        }
        if (n < N) w++;
        if (job->progress) job->progress(job->ctx, w - begin, end - begin);
    }
    free(tokens);
    free(logp);
    return rc;
}

static sel_status score(const sel_score_job *job, const stream *s, int64_t windows, sel_batch_stats *sum)
{
    memset(sum, 0, sizeof *sum);
    if (job->max_windows && windows > job->max_windows) windows = job->max_windows;
    if (!job->comm) return score_range(job, s, 0, windows, sum);

    const int sequence = job->sequence > 1 ? job->sequence : 1;
    const int64_t share = sel_comm_rank(job->comm) / sequence, shares = sel_comm_size(job->comm) / sequence;
    const sel_status rc = score_range(job, s, windows * share / shares, windows * (share + 1) / shares, sum);
    if (rc != SEL_OK && sequence > 1) sel_comm_die(job->comm, "scoring");   /* others are in the middle of a layer */
    SEL_TRY(sel_comm_agree(job->comm, rc));
    double all[4] = { sum->loss, sum->memory, (double)sum->tokens, (double)sum->correct };
    sel_comm_sum_doubles(job->comm, all, 4);
    *sum = (sel_batch_stats){ .loss = all[0], .memory = all[1], .tokens = (int64_t)all[2], .correct = (int64_t)all[3] };
    return SEL_OK;
}

sel_status sel_score_corpus(const sel_score_job *job, const sel_corpus *corpus, sel_batch_stats *sum)
{
    const stream s = { .corpus = corpus, .N = job->N };
    return score(job, &s, sel_corpus_windows(corpus, job->N) + (sel_corpus_tail(corpus, job->N) > 0), sum);
}

sel_status sel_score_ids(const sel_score_job *job, const int32_t *ids, int64_t n, int32_t bos, sel_batch_stats *sum)
{
    const stream s = { .ids = ids, .n_ids = n, .N = job->N, .bos = bos };
    return score(job, &s, (n + job->N - 1) / job->N, sum);
}
