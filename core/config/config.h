/* config.h: one run's settings: one plain struct, filled and checked by the schema,
 * read-only afterwards.  Each field is a key of the YAML file, declared in schema.c.
 */
#ifndef SEL_CORE_CONFIG_CONFIG_H
#define SEL_CORE_CONFIG_CONFIG_H

#include <stdbool.h>
#include <stdint.h>
#include "core/base/error.h"
#include "core/base/file.h"

typedef enum { SEL_KIND_SELECTIVE, SEL_KIND_STANDARD } sel_attention_kind;
typedef enum { SEL_SOURCE_HEAD0, SEL_SOURCE_BILINEAR } sel_selection_source;
typedef enum { SEL_BACKEND_ONEDNN, SEL_BACKEND_OPENBLAS, SEL_BACKEND_AUTO } sel_backend_name;
typedef enum { SEL_PRECISION_FLOAT32, SEL_PRECISION_BFLOAT16, SEL_PRECISION_AUTO } sel_precision;
typedef enum { SEL_WIRE_FLOAT32, SEL_WIRE_BFLOAT16 } sel_wire_type;
typedef enum { SEL_ON_NAN_STOP, SEL_ON_NAN_SKIP } sel_on_nan;
typedef enum { SEL_DEAD_KEYS_OFF, SEL_DEAD_KEYS_ROUNDING, SEL_DEAD_KEYS_EXACT } sel_dead_keys;

typedef struct sel_config {
    struct {
        char dir[SEL_PATH_MAX];
        int64_t seed, restarts;
    } run;
    struct {
        int64_t d, width, layers, heads, kv_heads, head_width, ffn_width, context;
        int64_t vocab;                        /* 0: the tokenizer's */
    } model;
    struct {
        sel_attention_kind kind;
        struct {
            bool relu, protect_bos, protect_self, shift;
            sel_selection_source source;
        } selection;
        struct { double epsilon, tau; } memory_loss;
        sel_dead_keys dead_keys;
    } attention;
    struct {
        char train[SEL_PATH_MAX], validation[SEL_PATH_MAX], tokenizer[SEL_PATH_MAX];
    } data;
    struct {
        int64_t steps, batch, micro_batch;    /* micro_batch 0: chosen */
        double lr;
        int64_t warmup;
        double beta1, beta2, adam_epsilon, weight_decay, clip;
        sel_precision precision;
        int64_t log_every, validate_every, validate_tokens;
        char init_from[SEL_PATH_MAX];
    } train;
    struct {
        int64_t every, keep;
        double every_minutes;
    } checkpoint;
    struct {
        struct { int64_t data, sequence; } mesh;   /* data 0: auto */
        int64_t zero, virtual_ranks;               /* virtual_ranks 0: off */
        bool shared_memory, overlap;
        sel_wire_type wire;
        sel_on_nan on_nan;
        int64_t nan_rollback, watchdog_seconds;   /* watchdog_seconds 0: off */
    } dist;
    struct {
        int64_t threads;                      /* 0: what the binding allows */
        sel_backend_name linear_backend;
        char linear_choice[128];              /* auto: what was measured (core/model/choice.h); empty: not yet */
        char cpu[16];
    } compute;
} sel_config;

/* Reads YAML text (`name` for messages), then overrides "key.path=value", fills
   defaults, resolves sizes that follow from others (model.d), checks everything.
   SEL_EUSER with file, line, key, what was expected and the nearest known key. */
sel_status sel_config_parse(sel_config *c, const char *text, size_t bytes, const char *name,
                            const char *const *overrides, int n_overrides);

/* The resolved settings as YAML that sel_config_parse reads back to the same struct;
   *text is freed by the caller. */
sel_status sel_config_emit(const sel_config *c, char **text);

/* One line a key, "key  type  default  help", for --help; *text is freed by the caller. */
sel_status sel_config_help(char **text);

/* The keys that may not change between a checkpoint and the run that resumes it (sizes of model.*,
   attention.* but for memory_loss; data and tokenizer are compared by hash): SEL_EUSER listing "key: old -> new" for
   each difference. */
sel_status sel_config_same_model(const sel_config *old, const sel_config *now);

/* SEL_EUSER listing "key: first -> mine" for each key of any kind that differs. */
sel_status sel_config_same(const sel_config *first, const sel_config *mine);

#endif
