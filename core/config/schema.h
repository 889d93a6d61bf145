/* schema.h: every key of the configuration: one row each, with type, range, default and help.
 *
 * A key that exists so far with one working value only needs no field in sel_config.  Rows of a section stand together
 * (emit writes a section once).  A choice's enum in config.h follows the order of its words.
 */
#ifndef SEL_CORE_CONFIG_SCHEMA_H
#define SEL_CORE_CONFIG_SCHEMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include "core/config/config.h"
#include "core/config/yaml.h"

#define SEL_KEYS_MAX 96   /* at least the number of rows */
#define SEL_HINT_MAX 160

typedef enum {
    SEL_KEY_INT,      /* int64_t */
    SEL_KEY_NUMBER,   /* double */
    SEL_KEY_BOOL,     /* bool */
    SEL_KEY_TEXT,     /* char[] */
    SEL_KEY_CHOICE,   /* an enum: the place of the word in `choices` */
    SEL_KEY_WORD,     /* char[]: the word itself, one of `choices` */
} sel_key_type;

typedef struct {
    const char *key;         /* dotted */
    sel_key_type type;
    size_t offset, bytes;    /* the field in sel_config; bytes 0: none */
    double min, max;         /* of integers (to 2^53) and numbers */
    bool below_max;          /* max itself is not allowed */
    const char *preset;      /* the default as text; NULL: it follows from other keys */
    const char *follows;     /* how it follows, for --help */
    const char *choices;     /* "a|b" */
    const char *later;       /* values that this version lacks: "c|d"; "*": all other values of the type */
    const char *zero_word;   /* a word that means 0 */
    const char *no_list;     /* what to say when a list is given */
    bool model;              /* may not differ between a checkpoint and the run that resumes it */
    const char *help;
} sel_key;

extern const sel_key sel_keys[];
extern const int sel_n_keys;

/* The row of a dotted key, or -1. */
int sel_key_find(const char *key);

/* Is it a section, that is, the beginning of longer keys? */
bool sel_key_is_section(const char *key);

/* What is wrong with an unknown key or section, and the nearest known one:
   "unknown key; did you mean model.context?" */
void sel_key_hint(char out[SEL_HINT_MAX], const char *key, bool section);

/* Sets the key's field, or checks the value of a key without a field.  `where` opens
   the message: "run.yaml:9: train.steps". */
sel_status sel_key_set(const sel_key *k, sel_config *c, const char *value, sel_yaml_kind kind, const char *where);

/* Writes the key's value as a YAML scalar. */
void sel_key_print(FILE *out, const sel_key *k, const sel_config *c);

/* Is the field the same in both? */
bool sel_key_equal(const sel_key *k, const sel_config *a, const sel_config *b);

#endif
