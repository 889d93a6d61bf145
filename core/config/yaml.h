/* yaml.h: a YAML file as a flat list of dotted keys, in the order of the file.
 *
 * Only what a file of settings needs: one document of nested mappings with scalars.
 * Anchors, aliases, tags and further documents are refused.
 */
#ifndef SEL_CORE_CONFIG_YAML_H
#define SEL_CORE_CONFIG_YAML_H

#include <stddef.h>
#include "core/base/error.h"

#define SEL_YAML_KEY_MAX 256

typedef enum {
    SEL_YAML_PLAIN,     /* a word without quotes: may be a number, a boolean, nothing ("", ~, null) or text */
    SEL_YAML_QUOTED,    /* text, whatever it looks like */
    SEL_YAML_LIST,      /* its elements are not kept */
    SEL_YAML_SECTION,   /* a mapping; its keys follow as entries of their own */
} sel_yaml_kind;

typedef struct {
    char *key;             /* dotted: "train.steps", from nested mappings or written so */
    char *value;           /* NULL for lists and sections */
    sel_yaml_kind kind;
    int key_line, line;    /* of the key and of the value, from 1 */
} sel_yaml_entry;

typedef struct {
    sel_yaml_entry *entries;
    size_t n;
} sel_yaml;

/* SEL_EUSER with "name:line: ..." for what is not YAML or not such a file.  An empty
   file gives no entries.  y is to be freed only after success. */
sel_status sel_yaml_parse(sel_yaml *y, const char *text, size_t bytes, const char *name);
void sel_yaml_free(sel_yaml *y);

#endif
