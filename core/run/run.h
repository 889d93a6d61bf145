/* run.h: the run folder: its lock, config.yaml, metrics.jsonl, provenance.json (spec, section 15).  Rank 0 only. */
#ifndef SEL_CORE_RUN_RUN_H
#define SEL_CORE_RUN_RUN_H

#include <stdbool.h>
#include <stdint.h>
#include "core/base/file.h"

typedef struct sel_run sel_run;

/* Opens the run folder, made if missing, and locks it against a second job (fcntl lock on
   RUN/lock; SEL_EUSER naming the process that holds it). */
sel_status sel_run_open(sel_run **r, const char *dir);
void       sel_run_close(sel_run **r);
const char *sel_run_dir(const sel_run *r);

/* Puts RUN/config.yaml in place. */
sel_status sel_run_write_config(sel_run *r, const char *yaml);

/* Cuts metrics.jsonl back to rows with step <= `step`; the cut rows (a torn last row too) are appended to
   metrics.cut.jsonl.  Then appends go on from there. */
sel_status sel_run_cut_metrics(sel_run *r, int64_t step);

/* One row.  val_tokens 0: no validation in it; event not NULL: a row with an event alone (and its step). */
typedef struct {
    int64_t step, tokens;
    double loss, memory_loss, lr, grad_norm, tokens_per_second, mfu, seconds;
    const double *live_keys;             /* [layers] shares of live keys in a micro-batch of rank 0; NULL: none */
    int64_t layers;
    bool has_memory_loss, has_train;     /* has_train false: a row of validation or an event only */
    bool has_wire;                       /* several ranks: what the sums over them cost, a step */
    double wire_bytes, wire_bytes_least, host_bytes;   /* between hosts, all ranks; the least; in hosts' memory */
    double wire_wait_seconds, wire_hidden;             /* a rank's mean; share of their time behind computing */
    double val_loss;
    int64_t val_tokens;
    const char *event;
} sel_metrics;

/* Appends the row, one write call a row, numbers with enough digits to read back the same. */
sel_status sel_run_metrics(sel_run *r, const sel_metrics *m);

/* What the program knows about itself and where it runs; one entry a start is appended to provenance.json
   (a JSON array, rewritten whole and durably). */
typedef struct {
    const char *program, *commit, *compiler, *build;   /* "selectra 0.1.0", git commit, gcc's name, build type */
    const char *mpi, *linear, *precision, *cpu, *cpu_level;
    int ranks, threads, hosts;
    const char *host_names;                             /* comma separated */
    const char *command;
    int64_t resumed_from;                               /* step; -1: fresh */
    uint32_t corpus_crc32, tokenizer_crc32;
    uint64_t seed;
} sel_provenance;
sel_status sel_run_provenance(sel_run *r, const sel_provenance *p);

#endif
