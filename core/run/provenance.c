/* provenance.c: what ran, where and how: one entry in RUN/provenance.json a start. */
#include <gnu/libc-version.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <sys/utsname.h>
#include <unistd.h>
#include <zlib.h>

#include "core/base/clock.h"
#include "core/run/run.h"

/* A string for JSON; bytes of text that is not UTF-8 (a path, a setting) become '?'. */
static json_t *text(const char *s)
{
    if (!s) return json_null();
    json_t *value = json_string(s);
    if (value) return value;

    char *copy = strdup(s);
    if (!copy) return NULL;
    for (char *p = copy; *p; p++)
        if ((unsigned char)*p >= 0x80) *p = '?';
    value = json_string(copy);
    free(copy);
    return value;
}

static json_t *hash(uint32_t crc)
{
    char hex[16];

    if (!crc) return json_null();
    snprintf(hex, sizeof hex, "%08" PRIx32, crc);
    return json_string(hex);
}

/* "a,b,c" as a list. */
static json_t *list(const char *names)
{
    json_t *array = json_array();
    char *copy = strdup(names ? names : "");

    for (char *rest = copy, *name; copy && (name = strsep(&rest, ","));)
        if (*name) json_array_append_new(array, text(name));
    free(copy);
    return array;
}

/* Settings of the environment that change how a job runs.  Slurm may put credentials beside its own. */
static bool matters(const char *setting)
{
    static const char *const prefixes[] = {"OMP_",   "OMPI_MCA_", "GOMP_",     "KMP_",  "I_MPI_",
                                           "SLURM_", "SELECTRA_", "OPENBLAS_", "DNNL_", "ONEDNN_"};
    static const char *const secrets[] = {"JWT", "TOKEN", "SECRET", "PASS", "KEY", "CRED"};
    const size_t name = strcspn(setting, "=");
    bool found = false;

    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++)
        found |= strncmp(setting, prefixes[i], strlen(prefixes[i])) == 0;
    for (size_t i = 0; i < sizeof secrets / sizeof *secrets; i++) {
        const char *at = strstr(setting, secrets[i]);
        if (at && at < setting + name) return false;
    }
    return found;
}

static json_t *environment(void)
{
    json_t *object = json_object();

    for (char **e = environ; *e; e++) {
        if (!matters(*e) || !strchr(*e, '=')) continue;
        char *name = strndup(*e, strcspn(*e, "="));
        if (name) json_object_set_new(object, name, text(strchr(*e, '=') + 1));
        free(name);
    }
    return object;
}

static json_t *make_entry(const sel_provenance *p)
{
    char now[32], kernel[256] = "unknown";
    struct utsname u;

    sel_utc(now);
    if (uname(&u) == 0) snprintf(kernel, sizeof kernel, "%.60s %.80s %.60s", u.sysname, u.release, u.machine);
    json_t *libraries = json_pack("{s:o, s:o, s:s, s:s, s:s}", "mpi", text(p->mpi), "linear", text(p->linear), "zlib",
                                  zlibVersion(), "jansson", jansson_version_str(), "libc", gnu_get_libc_version());
    json_t *seed = p->seed <= INT64_MAX ? json_integer((json_int_t)p->seed) : NULL;
    if (!seed) {
        char digits[32];
        snprintf(digits, sizeof digits, "%" PRIu64, p->seed);
        seed = json_string(digits);
    }
    return json_pack("{s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:i, s:i, s:i, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o,"
                     " s:o}",
                     "time", now, "program", text(p->program), "commit", text(p->commit), "compiler", text(p->compiler),
                     "build", text(p->build), "command", text(p->command), "libraries", libraries, "precision",
                     text(p->precision), "ranks", p->ranks, "threads", p->threads, "hosts", p->hosts, "host_names",
                     list(p->host_names), "processor", text(p->cpu), "processor_level", text(p->cpu_level), "kernel",
                     text(kernel), "environment", environment(), "seed", seed, "resumed_from",
                     p->resumed_from < 0 ? json_null() : json_integer(p->resumed_from), "corpus_crc32",
                     hash(p->corpus_crc32), "tokenizer_crc32", hash(p->tokenizer_crc32));
}

/* The entries so far.  A damaged file is kept as provenance.json.damaged, and a new one begun. */
static sel_status read_entries(json_t **entries, const char *path)
{
    char aside[SEL_PATH_MAX], *data = NULL;
    size_t bytes = 0;
    json_error_t why;

    *entries = NULL;
    if (sel_path_exists(path)) {
        SEL_TRY(sel_read_file(path, &data, &bytes));
        *entries = json_loadb(data, bytes, 0, &why);
        free(data);
        if (json_is_array(*entries)) return SEL_OK;
        json_decref(*entries);
        *entries = NULL;
        if (snprintf(aside, sizeof aside, "%s.damaged", path) >= (int)sizeof aside)
            return sel_fail(SEL_EUSER, "%.200s...: the path is too long", path);
        if (rename(path, aside) != 0)
            return sel_fail(SEL_EIO, "%s: cannot keep the damaged file aside: %s", path, strerror(errno));
    }
    *entries = json_array();
    return *entries ? SEL_OK : sel_fail(SEL_ENOMEM, "out of memory for %s", path);
}

sel_status sel_run_provenance(sel_run *r, const sel_provenance *p)
{
    char path[SEL_PATH_MAX];
    json_t *entries;
    char *data = NULL;

    SEL_TRY(sel_path_join(path, sel_run_dir(r), "provenance.json"));
    SEL_TRY(read_entries(&entries, path));
    if (json_array_append_new(entries, make_entry(p)) == 0) data = json_dumps(entries, JSON_INDENT(2));
    const sel_status rc =
        data ? sel_write_file(path, data, strlen(data)) : sel_fail(SEL_ENOMEM, "out of memory for %s", path);
    free(data);
    json_decref(entries);
    return rc;
}
