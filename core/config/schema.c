/* schema.c: the table of keys, and what a row can do: find, hint, compare. */
#include "core/config/schema.h"

#include <stdint.h>
#include <string.h>

#include "core/config/text.h"

#define AT(field) offsetof(sel_config, field), sizeof(((sel_config *)NULL)->field)
#define NO_FIELD 0, 0

#define NAME_MAX_BYTES 64 /* room for the longest key */

#define SEED_MAX 0x1p53
#define STEPS_MAX 1e12
#define BATCH_MAX 0x1p24
#define NO_MIXTURE "expected one packed folder; mixtures are not in this version"

const sel_key sel_keys[] = {
    {"run.dir", SEL_KEY_TEXT, AT(run.dir), .preset = "", .help = "folder of the run; train needs it"},
    {"run.seed", SEL_KEY_INT, AT(run.seed), .max = SEED_MAX, .preset = "0",
     .help = "of initial weights and data order"},
    {"run.restarts", SEL_KEY_INT, AT(run.restarts), .max = 1e6, .preset = "3",
     .help = "how often `selectra launch` starts a failed job again"},

    {"model.d", SEL_KEY_INT, AT(model.d), .max = 1024, .preset = "0",
     .help = "size: sets the defaults of the other sizes; 0: each is given"},
    {"model.width", SEL_KEY_INT, AT(model.width), .min = 1, .max = 65536, .follows = "64 d", .model = true,
     .help = "width of the residual stream"},
    {"model.layers", SEL_KEY_INT, AT(model.layers), .min = 1, .max = 4096, .follows = "d", .model = true,
     .help = "number of layers"},
    {"model.heads", SEL_KEY_INT, AT(model.heads), .min = 1, .max = 4096, .follows = "d", .model = true,
     .help = "query heads a layer"},
    {"model.kv_heads", SEL_KEY_INT, AT(model.kv_heads), .min = 1, .max = 4096, .follows = "heads", .model = true,
     .help = "key and value heads a layer; divides heads"},
    {"model.head_width", SEL_KEY_INT, AT(model.head_width), .min = 1, .max = 1024, .preset = "64", .model = true,
     .help = "width of a head"},
    {"model.ffn_width", SEL_KEY_INT, AT(model.ffn_width), .min = 1, .max = 262144, .follows = "8 width / 3",
     .model = true, .help = "inner width of the feed-forward part, rounded down"},
    {"model.context", SEL_KEY_INT, AT(model.context), .min = 1, .max = 0x1p24, .preset = "512", .model = true,
     .help = "tokens of a sequence"},
    {"model.vocab", SEL_KEY_INT, AT(model.vocab), .max = 0x1p24, .preset = "0", .model = true,
     .help = "pieces of the vocabulary; 0: the tokenizer's"},

    {"attention.kind", SEL_KEY_CHOICE, AT(attention.kind), .preset = "selective", .choices = "selective|standard",
     .later = "local|local_global", .model = true, .help = "selective attention, or F = 0"},
    {"attention.selection.relu", SEL_KEY_BOOL, AT(attention.selection.relu), .preset = "true", .model = true,
     .help = "negative selection counts as 0"},
    {"attention.selection.protect_bos", SEL_KEY_BOOL, AT(attention.selection.protect_bos), .preset = "true",
     .model = true, .help = "token 0 is never masked"},
    {"attention.selection.protect_self", SEL_KEY_BOOL, AT(attention.selection.protect_self), .preset = "true",
     .model = true, .help = "a token does not mask itself"},
    {"attention.selection.shift", SEL_KEY_BOOL, AT(attention.selection.shift), .preset = "true", .model = true,
     .help = "masking acts on later rows only"},
    {"attention.selection.source", SEL_KEY_CHOICE, AT(attention.selection.source), .preset = "head0",
     .choices = "head0|bilinear", .model = true, .help = "what selects: head 0, or projections of its own"},
    {"attention.memory_loss.epsilon", SEL_KEY_NUMBER, AT(attention.memory_loss.epsilon), .max = 1e6, .preset = "0",
     .help = "weight of the memory loss; 0: none"},
    {"attention.memory_loss.tau", SEL_KEY_NUMBER, AT(attention.memory_loss.tau), .min = 1e-6, .max = 1e6, .preset = "1",
     .help = "F at which a token counts as fully masked"},
    {"attention.dead_keys", SEL_KEY_CHOICE, AT(attention.dead_keys), .preset = "rounding",
     .choices = "off|rounding|exact",
     .help = "keys masked beyond return are left out: once they are below the last "
             "bit of the sum, or exactly 0; off without relu"},

    {"data.train", SEL_KEY_TEXT, AT(data.train), .preset = "", .no_list = NO_MIXTURE, .help = "packed folder"},
    {"data.validation", SEL_KEY_TEXT, AT(data.validation), .preset = "", .no_list = NO_MIXTURE,
     .help = "packed folder; empty: no validation"},
    {"data.tokenizer", SEL_KEY_TEXT, AT(data.tokenizer), .preset = "", .help = "SentencePiece .model file"},

    {"train.steps", SEL_KEY_INT, AT(train.steps), .max = STEPS_MAX, .preset = "524288",
     .help = "optimizer steps; 0: save the initial weights and stop"},
    {"train.batch", SEL_KEY_INT, AT(train.batch), .min = 1, .max = BATCH_MAX, .preset = "256",
     .help = "sequences a step, over all ranks"},
    {"train.micro_batch", SEL_KEY_INT, AT(train.micro_batch), .max = BATCH_MAX, .preset = "0",
     .help = "sequences that a rank holds at once; 0: chosen"},
    {"train.lr", SEL_KEY_NUMBER, AT(train.lr), .max = 1000, .preset = "0.005", .help = "highest learning rate"},
    {"train.warmup", SEL_KEY_INT, AT(train.warmup), .max = STEPS_MAX, .preset = "1000",
     .help = "steps of linear warm-up; may exceed steps"},
    {"train.beta1", SEL_KEY_NUMBER, AT(train.beta1), .max = 1, .below_max = true, .preset = "0.9",
     .help = "AdamW: decay of the first moment"},
    {"train.beta2", SEL_KEY_NUMBER, AT(train.beta2), .max = 1, .below_max = true, .preset = "0.999",
     .help = "AdamW: decay of the second moment"},
    {"train.adam_epsilon", SEL_KEY_NUMBER, AT(train.adam_epsilon), .min = 1e-30, .max = 1, .preset = "1e-8",
     .help = "AdamW: added to the root of the second moment"},
    {"train.weight_decay", SEL_KEY_NUMBER, AT(train.weight_decay), .max = 1000, .preset = "1e-4",
     .help = "AdamW: of the matrices of linear layers"},
    {"train.clip", SEL_KEY_NUMBER, AT(train.clip), .max = 1e30, .preset = "1",
     .help = "largest global norm of the gradient; 0: off"},
    {"train.precision", SEL_KEY_CHOICE, AT(train.precision), .preset = "auto", .choices = "float32|bfloat16|auto",
     .help = "of the operands of matrix products; auto: the faster one, measured"},
    {"train.log_every", SEL_KEY_INT, AT(train.log_every), .min = 1, .max = STEPS_MAX, .preset = "10",
     .help = "steps from one row of metrics to the next"},
    {"train.validate_every", SEL_KEY_INT, AT(train.validate_every), .max = STEPS_MAX, .preset = "1000",
     .help = "steps from one validation to the next; 0: at the end only"},
    {"train.validate_tokens", SEL_KEY_INT, AT(train.validate_tokens), .max = SEED_MAX, .preset = "0",
     .help = "tokens of a validation; 0: the whole set"},
    {"train.init_from", SEL_KEY_TEXT, AT(train.init_from), .preset = "",
     .help = "checkpoint whose weights a new run starts from"},

    {"checkpoint.every", SEL_KEY_INT, AT(checkpoint.every), .max = STEPS_MAX, .preset = "1000",
     .help = "steps from one checkpoint to the next; 0: at the end only"},
    {"checkpoint.every_minutes", SEL_KEY_NUMBER, AT(checkpoint.every_minutes), .max = 1e6, .preset = "0",
     .help = "also after so many minutes; 0: off"},
    {"checkpoint.keep", SEL_KEY_INT, AT(checkpoint.keep), .min = 1, .max = 1e6, .preset = "3",
     .help = "newest checkpoints that stay"},
    {"checkpoint.async", SEL_KEY_BOOL, NO_FIELD, .preset = "false", .later = "*", .help = "save beside training"},

    {"dist.mesh.data", SEL_KEY_INT, AT(dist.mesh.data), .max = 0x1p20, .preset = "0", .zero_word = "auto",
     .help = "ranks of the data axis; 0 or auto: all"},
    {"dist.mesh.sequence", SEL_KEY_INT, AT(dist.mesh.sequence), .min = 1, .max = 1, .preset = "1", .later = "*",
     .help = "ranks that share a sequence"},
    {"dist.zero", SEL_KEY_INT, AT(dist.zero), .max = 1, .preset = "0",
     .help = "1: each rank keeps and updates its share of the optimizer state (ZeRO stage 1)"},
    {"dist.virtual_ranks", SEL_KEY_INT, AT(dist.virtual_ranks), .max = 65536, .preset = "0",
     .help = "same bits for any power of two of ranks up to this one; 0: off"},
    {"dist.shared_memory", SEL_KEY_BOOL, AT(dist.shared_memory), .preset = "true",
     .help = "ranks of a host reduce in shared memory; false: by MPI"},
    {"dist.overlap", SEL_KEY_BOOL, AT(dist.overlap), .preset = "true",
     .help = "gradients travel while backward still runs; false: after it, to see what that hides"},
    {"dist.wire", SEL_KEY_CHOICE, AT(dist.wire), .preset = "float32", .choices = "float32|bfloat16",
     .help = "of gradients between hosts; bfloat16: half the bytes, rounds each host's term by up to 2^-9"},
    {"dist.on_nan", SEL_KEY_CHOICE, AT(dist.on_nan), .preset = "stop", .choices = "stop|skip",
     .help = "when a loss or gradient is not finite: end, or leave the batch out"},
    {"dist.nan_rollback", SEL_KEY_INT, AT(dist.nan_rollback), .min = 1, .max = 1e6, .preset = "5",
     .help = "batches left out in a row that roll back to the last checkpoint"},
    {"dist.watchdog_seconds", SEL_KEY_INT, AT(dist.watchdog_seconds), .max = 1e6, .preset = "300",
     .help = "seconds without progress after which a stuck rank ends the job; 0: never"},

    {"compute.threads", SEL_KEY_INT, AT(compute.threads), .max = 4096, .preset = "0",
     .help = "threads a rank; 0: what the binding allows"},
    {"compute.linear_backend", SEL_KEY_CHOICE, AT(compute.linear_backend), .preset = "onednn",
     .choices = "onednn|openblas|auto",
     .help = "library of matrix products; auto: the fastest for each shape, measured"},
    {"compute.linear_choice", SEL_KEY_TEXT, AT(compute.linear_choice), .preset = "",
     .help = "with auto: who makes each product; empty: measured, and then written here"},
    {"compute.cpu", SEL_KEY_WORD, AT(compute.cpu), .preset = "auto", .choices = "auto|c|avx2|avx512|avx512bf16",
     .help = "instruction sets that kernels may use"},
};

const int sel_n_keys = (int)(sizeof sel_keys / sizeof *sel_keys);

_Static_assert(sizeof sel_keys / sizeof *sel_keys <= SEL_KEYS_MAX, "SEL_KEYS_MAX is too small");
_Static_assert(sizeof(sel_attention_kind) == sizeof(int) && sizeof(sel_selection_source) == sizeof(int) &&
                   sizeof(sel_backend_name) == sizeof(int) && sizeof(sel_precision) == sizeof(int) &&
                   sizeof(sel_on_nan) == sizeof(int) && sizeof(sel_wire_type) == sizeof(int) &&
                   sizeof(sel_dead_keys) == sizeof(int),
               "fields of choices are read and written as int");

int sel_key_find(const char *key)
{
    for (int i = 0; i < sel_n_keys; i++)
        if (strcmp(sel_keys[i].key, key) == 0) return i;
    return -1;
}

bool sel_key_is_section(const char *key)
{
    const size_t n = strlen(key);
    for (int i = 0; i < sel_n_keys; i++)
        if (strncmp(sel_keys[i].key, key, n) == 0 && sel_keys[i].key[n] == '.') return true;
    return false;
}

bool sel_key_equal(const sel_key *k, const sel_config *a, const sel_config *b)
{
    const char *pa = (const char *)a + k->offset, *pb = (const char *)b + k->offset;
    if (k->type == SEL_KEY_TEXT || k->type == SEL_KEY_WORD) return k->bytes == 0 || strcmp(pa, pb) == 0;
    return memcmp(pa, pb, k->bytes) == 0;
}

static const char *last_part(const char *key)
{
    const char *dot = strrchr(key, '.');
    return dot ? dot + 1 : key;
}

/* How far a known name is from what was written: as a whole, or, one dearer, by its last part. */
static size_t name_distance(const char *written, const char *known)
{
    const size_t whole = sel_text_distance(written, known);
    const size_t part = sel_text_distance(last_part(written), last_part(known)) + 1;
    return whole < part ? whole : part;
}

/* A slip of the fingers, or a shorter or longer form of the same word? */
static bool is_near(const char *written, const char *known, size_t distance)
{
    const char *a = last_part(written), *b = last_part(known);
    const size_t shorter = strlen(a) < strlen(b) ? strlen(a) : strlen(b);
    return distance <= (strlen(a) + 2) / 3 || (shorter >= 3 && strncmp(a, b, shorter) == 0);
}

/* Keeps `known` when it is nearer than the best so far, in doubt as a whole. */
static void take_nearer(const char *written, const char *known, char best[NAME_MAX_BYTES], size_t *least)
{
    const size_t distance = name_distance(written, known);
    const bool as_near = distance == *least && sel_text_distance(written, known) < sel_text_distance(written, best);
    if (distance >= *least && !as_near) return;
    *least = distance;
    snprintf(best, NAME_MAX_BYTES, "%s", known);
}

static size_t nearest_key(const char *written, char best[NAME_MAX_BYTES])
{
    size_t least = SIZE_MAX;
    for (int i = 0; i < sel_n_keys; i++) take_nearer(written, sel_keys[i].key, best, &least);
    return least;
}

/* The sections are what keys are without their last part, or their last two. */
static size_t nearest_section(const char *written, char best[NAME_MAX_BYTES])
{
    size_t least = SIZE_MAX;
    for (int i = 0; i < sel_n_keys; i++) {
        char section[NAME_MAX_BYTES];
        snprintf(section, sizeof section, "%s", sel_keys[i].key);
        for (char *dot; (dot = strrchr(section, '.'));) {
            *dot = '\0';
            take_nearer(written, section, best, &least);
        }
    }
    return least;
}

/* "run, model, ...": the first parts of all keys. */
static void list_sections(char *out, size_t bytes)
{
    size_t n = 0;
    out[0] = '\0';
    for (int i = 0; i < sel_n_keys; i++) {
        const char *key = sel_keys[i].key;
        const size_t length = strcspn(key, ".");
        if (i > 0 && strncmp(sel_keys[i - 1].key, key, length + 1) == 0) continue;
        if (n + length + 3 > bytes) return;
        n += (size_t)snprintf(out + n, bytes - n, "%s%.*s", n ? ", " : "", (int)length, key);
    }
}

void sel_key_hint(char out[SEL_HINT_MAX], const char *key, bool section)
{
    char best[NAME_MAX_BYTES] = "", sections[SEL_HINT_MAX - 40], what[64] = "unknown key", shown[SEL_SHOWN_MAX];
    if (section) {
        const size_t least = nearest_section(key, best);
        list_sections(sections, sizeof sections);
        if (is_near(key, best, least))
            snprintf(out, SEL_HINT_MAX, "unknown section; did you mean %s?", best);
        else
            snprintf(out, SEL_HINT_MAX, "unknown section; the sections are %s", sections);
        return;
    }

    /* A dotted key may name a section that does not exist. */
    const size_t length = strcspn(key, ".");
    char first[SEL_YAML_KEY_MAX] = "";
    if (key[length] == '.' && length < sizeof first) {
        memcpy(first, key, length);
        if (!sel_key_is_section(first))
            snprintf(what, sizeof what, "unknown section %.40s", sel_text_show(shown, first));
    }
    const size_t least = nearest_key(key, best);
    if (is_near(key, best, least))
        snprintf(out, SEL_HINT_MAX, "%s; did you mean %s?", what, best);
    else
        snprintf(out, SEL_HINT_MAX, "%s; the nearest known key is %s", what, best);
}
