/* core_config.c: what a configuration may say, and what is said to one that may not be. */
#include <stdint.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/config/config.h"
#include "core/config/schema.h"
#include "core/config/text.h"
#include "tests/check.h"

static sel_config config, other;

static sel_status parse(const char *text, const char *override)
{
    return sel_config_parse(&config, text, strlen(text), "run.yaml", &override, override ? 1 : 0);
}

/* The text is refused, with exactly this line. */
static void refused(const char *text, const char *override, const char *line)
{
    const sel_status rc = parse(text, override);
    CHECK(rc == SEL_EUSER, "%s: status %d", line, rc);
    CHECK(strcmp(sel_error(), line) == 0, "\n  said   %s\n  wanted %s", sel_error(), line);
}

/* The same, where libyaml's own words follow. */
static void refused_with(const char *text, const char *part)
{
    CHECK(parse(text, NULL) == SEL_EUSER, "%s: not refused", part);
    CHECK(strstr(sel_error(), part) == sel_error(), "\n  said   %s\n  wanted %s...", sel_error(), part);
}

static void test_defaults(void)
{
    CHECK_OK(parse("model.d: 4\n", NULL));
    const sel_config *c = &config;
    CHECK(c->model.width == 256 && c->model.layers == 4 && c->model.heads == 4 && c->model.kv_heads == 4, "sizes");
    CHECK(c->model.head_width == 64 && c->model.ffn_width == 682 && c->model.context == 512 && c->model.vocab == 0,
          "sizes");
    CHECK(c->attention.kind == SEL_KIND_SELECTIVE && c->attention.selection.relu &&
              c->attention.selection.protect_bos && c->attention.selection.protect_self && c->attention.selection.shift,
          "attention");
    CHECK(c->attention.memory_loss.epsilon == 0 && c->attention.memory_loss.tau == 1, "memory loss");
    CHECK(c->train.steps == 524288 && c->train.batch == 256 && c->train.micro_batch == 0 && c->train.lr == 0.005,
          "train");
    CHECK(c->train.warmup == 1000 && c->train.beta1 == 0.9 && c->train.beta2 == 0.999, "train");
    CHECK(c->train.adam_epsilon == 1e-8 && c->train.weight_decay == 1e-4 && c->train.clip == 1, "train");
    CHECK(c->train.log_every == 10 && c->train.validate_every == 1000 && c->train.validate_tokens == 0, "train");
    CHECK(c->checkpoint.every == 1000 && c->checkpoint.every_minutes == 0 && c->checkpoint.keep == 3, "checkpoint");
    CHECK(c->dist.mesh.data == 0 && c->dist.mesh.sequence == 1 && c->compute.threads == 0, "dist");
    CHECK(c->dist.shared_memory && c->dist.overlap && c->dist.zero == 0 && c->dist.virtual_ranks == 0, "dist");
    CHECK(c->compute.linear_backend == SEL_BACKEND_ONEDNN && strcmp(c->compute.cpu, "auto") == 0, "compute");
    CHECK(!c->run.dir[0] && !c->run.seed && !c->data.train[0] && !c->train.init_from[0], "empty");
}

static void test_sizes(void)
{
    static const int64_t ffn[] = {170, 341, 512, 682, 853, 1024, 1194, 1365, 1536, 1706, 1877, 2048};
    for (int d = 1; d <= 12; d++) { /* floor(8 * 64 d / 3) */
        char text[32];
        snprintf(text, sizeof text, "model: {d: %d}", d);
        CHECK_OK(parse(text, NULL));
        CHECK(config.model.ffn_width == ffn[d - 1], "d %d: %lld", d, (long long)config.model.ffn_width);
    }
    CHECK_OK(parse("model: {d: 4, heads: 8, width: 100}", NULL));
    CHECK(config.model.heads == 8 && config.model.kv_heads == 8 && config.model.layers == 4, "given sizes win");
    CHECK(config.model.width == 100 && config.model.ffn_width == 266, "ffn %lld", (long long)config.model.ffn_width);
    CHECK_OK(parse("model: {width: 128, layers: 2, heads: 6, kv_heads: 2, head_width: 32, ffn_width: 9}", NULL));
    CHECK(config.model.kv_heads == 2 && config.model.head_width == 32 && config.model.ffn_width == 9, "given");

    refused("", NULL, "run.yaml: the model has no size: set model.d, or model.width, model.layers and model.heads");
    refused("# nothing\n", NULL,
            "run.yaml: the model has no size: set model.d, or model.width, model.layers and model.heads");
    refused("---\n", NULL,
            "run.yaml: the model has no size: set model.d, or model.width, model.layers and model.heads");
    CHECK_OK(parse("", "model.d=2"));
    CHECK_OK(parse("model:\n  # all from the command line\n", "model.d=2"));
    refused("model: {width: 64}", NULL, "run.yaml: missing: model.layers model.heads (or set model.d)");
    refused("model:\n  heads: 6\n  d: 3\n  kv_heads: 4\n", NULL,
            "run.yaml:4: model.heads (6) must be a multiple of model.kv_heads (4)");
    refused("model: {d: 4}", "model.kv_heads=3",
            "command line: model.heads (4) must be a multiple of model.kv_heads (3)");
    refused("model: {d: 4, kv_heads: 8}", NULL, "run.yaml:1: model.heads (4) must be a multiple of model.kv_heads (8)");
    refused("model: {d: 4}\nattention:\n  kind: standard\n  memory_loss: {epsilon: 0.1}\n", NULL,
            "run.yaml:4: attention.memory_loss.epsilon (0.1) needs attention.kind selective, not standard");
    refused("model: {d: 4}\nattention:\n  selection: {source: bilinear}\n  kind: standard\n", NULL,
            "run.yaml:4: attention.selection.source bilinear needs attention.kind selective, not standard");
    refused("model: {d: 4}", "attention.selection.source=head1",
            "command line: attention.selection.source=head1: expected one of head0, bilinear, got \"head1\"");
    refused(
        "model: {d: 4}\ntrain:\n  steps: 1e12\n  batch: 16000000\n", NULL,
        "run.yaml:4: train.steps (1000000000000) times train.batch (16000000) times model.context (512) is more than "
        "2^62 tokens");
}

/* Ways to write the same thing, and the values of numbers. */
static void test_forms(void)
{
    CHECK_OK(
        parse("\xEF\xBB\xBFmodel.d: 4\nattention.selection: {relu: false}\nattention:\n  memory_loss.tau: .5\n", NULL));
    CHECK(!config.attention.selection.relu && config.attention.memory_loss.tau == 0.5, "dotted keys and a BOM");
    CHECK_OK(parse("model.d: 4\r\ntrain:\r\n  steps: 7\r\n", NULL));
    CHECK(config.train.steps == 7, "CRLF");
    CHECK_OK(parse("model.d: 4\ndata: {train: 2024, validation: 'a: b', tokenizer: \"\\u00e9\\n\"}\nrun.dir: \"12\"\n",
                   NULL));
    CHECK(strcmp(config.data.train, "2024") == 0 && strcmp(config.run.dir, "12") == 0, "text that looks like a number");
    CHECK(strcmp(config.data.validation, "a: b") == 0 && strcmp(config.data.tokenizer, "\xC3\xA9\n") == 0, "quotes");
    CHECK_OK(parse("model.d: 4\n", "run.dir=a=b \"c\""));
    CHECK(strcmp(config.run.dir, "a=b \"c\"") == 0, "%s", config.run.dir);
    CHECK_OK(parse("model.d: 4\nrun.dir: x\n", "run.dir="));
    CHECK(config.run.dir[0] == '\0', "%s", config.run.dir);
    CHECK_OK(parse("model.d: 4\ndist.mesh.data: 5\n", "dist.mesh.data=auto"));
    CHECK(config.dist.mesh.data == 0, "auto");
    CHECK_OK(parse("model.d: 4\nattention: {kind: \"standard\", dead_keys: off}\ntrain.warmup: 1e9\n", NULL));
    CHECK(config.attention.kind == SEL_KIND_STANDARD, "a choice in quotes");

    const char *const twice[] = {"train.steps=5", "train.steps=6"};
    CHECK_OK(sel_config_parse(&config, "model.d: 1", 10, "run.yaml", twice, 2));
    CHECK(config.train.steps == 6, "the last override wins");

    static const struct {
        const char *text;
        long long value; /* -1: refused */
    } integers[] = {{"0", 0},
                    {"-0", 0},
                    {"+7", 7},
                    {"1e6", 1000000},
                    {"1E3", 1000},
                    {"1.5e3", 1500},
                    {".5e1", 5},
                    {"100e-2", 1},
                    {"1e0", 1},
                    {"0e9", 0},
                    {"1.50000000000000000000000e3", 1500},
                    {"1e12", 1000000000000},
                    {"1e13", -1},
                    {"1.5", -1},
                    {"1.0", -1},
                    {"15e-1", -1},
                    {"1e-1", -1},
                    {"1e", -1},
                    {"e3", -1},
                    {"4k", -1},
                    {"0x10", -1},
                    {"010", -1},
                    {"1_000", -1},
                    {"-1", -1},
                    {"", -1},
                    {" 1", -1},
                    {"1 ", -1},
                    {"--1", -1},
                    {"1e99999999999", -1},
                    {"9223372036854775808", -1},
                    {"99999999999999999999999", -1},
                    {"nan", -1},
                    {".inf", -1},
                    {".", -1},
                    {"true", -1}};
    for (size_t i = 0; i < sizeof integers / sizeof *integers; i++) {
        char override[64];
        snprintf(override, sizeof override, "train.steps=%s", integers[i].text);
        const sel_status rc = parse("model.d: 1", override);
        CHECK((rc == SEL_OK) == (integers[i].value >= 0), "%s: %d %s", override, rc, sel_error());
        CHECK(rc != SEL_OK || config.train.steps == integers[i].value, "%s: %lld", override,
              (long long)config.train.steps);
    }
    static const struct {
        const char *text;
        double value; /* -1: refused */
    } numbers[] = {{"0", 0},         {"-0.0", 0},     {"1", 1},       {".5", .5},     {"5.", 5},     {"1e-4", 1e-4},
                   {"0.0001", 1e-4}, {"+1E-4", 1e-4}, {"1000", 1000}, {"1000.1", -1}, {"-1e-9", -1}, {"nan", -1},
                   {"inf", -1},      {".inf", -1},    {".nan", -1},   {"1e999", -1},  {"0x1p3", -1}, {"1e-4x", -1},
                   {"1,5", -1},      {".", -1},       {"-", -1},      {"1e+", -1},    {"1e-999", 0}, {"infinity", -1}};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        char override[64];
        snprintf(override, sizeof override, "train.lr=%s", numbers[i].text);
        const sel_status rc = parse("model.d: 1", override);
        CHECK((rc == SEL_OK) == (numbers[i].value >= 0), "%s: %d %s", override, rc, sel_error());
        CHECK(rc != SEL_OK || config.train.lr == numbers[i].value, "%s: %g", override, config.train.lr);
    }
    static const char *const words[] = {"true", "True", "TRUE", "false", "False", "FALSE"};
    for (int i = 0; i < 6; i++) {
        char text[64];
        snprintf(text, sizeof text, "model.d: 1\nattention.selection.shift: %s\n", words[i]);
        CHECK_OK(parse(text, NULL));
        CHECK(config.attention.selection.shift == (i < 3), "%s", words[i]);
    }
}

static void test_unknown(void)
{
    refused("model:\n  d: 4\n  contxt: 9\n", NULL,
            "run.yaml:3: model.contxt: unknown key; did you mean model.context?");
    refused("model.contxt:\n  4\n", NULL, "run.yaml:1: model.contxt: unknown key; did you mean model.context?");
    refused("train:\n  btach: 4\n", NULL, "run.yaml:2: train.btach: unknown key; did you mean train.batch?");
    refused("model: {steps: 4}\n", NULL, "run.yaml:1: model.steps: unknown key; did you mean train.steps?");
    refused("lr: 4\n", NULL, "run.yaml:1: lr: unknown key; did you mean train.lr?");
    refused("train: {wd: 1}\n", NULL, "run.yaml:1: train.wd: unknown key; the nearest known key is train.lr");
    refused("\ntrian:\n  steps: 4\n", NULL, "run.yaml:2: trian: unknown section; did you mean train?");
    refused("attention:\n  select:\n    relu: true\n", NULL,
            "run.yaml:2: attention.select: unknown section; did you mean attention.selection?");
    refused("optimizer: {name: adam}\n", NULL,
            "run.yaml:1: optimizer: unknown section; the sections are run, model, attention, data, train, checkpoint, "
            "dist, "
            "compute");
    refused("trian.steps: 4\n", NULL, "run.yaml:1: trian.steps: unknown section trian; did you mean train.steps?");
    refused("optim.lr: 4\n", NULL, "run.yaml:1: optim.lr: unknown section optim; did you mean train.lr?");
    refused("", "model.contxt=4", "command line: model.contxt=4: unknown key; did you mean model.context?");
    refused("\"a\\nb\": 4\n", NULL, "run.yaml:1: a?b: unknown key; the nearest known key is run.dir");
    refused("<<: {train.steps: 4}\n", NULL,
            "run.yaml:1: <<: unknown section; the sections are run, model, attention, data, train, checkpoint, dist, "
            "compute");

    refused("model: 4\n", NULL, "run.yaml:1: model: is a section: expected keys below it, such as model.d");
    refused("dist:\n  mesh: [1, 2]\n", NULL,
            "run.yaml:2: dist.mesh: is a section: expected keys below it, such as dist.mesh.data");
    refused("", "model=4", "command line: model=4: is a section: expected keys below it, such as model.d");
    refused("", "train.steps", "command line: train.steps: expected key=value, such as train.steps=1000");
    refused("", "=4", "command line: =4: expected key=value, such as train.steps=1000");
    refused("", "", "command line: : expected key=value, such as train.steps=1000");
    refused("", "run.dir=\xFF", "command line: run.dir=?: expected text in UTF-8");
}

static void test_values(void)
{
    refused("model:\n  d: 4\ntrain:\n  # ten steps\n  steps: ten\n", NULL,
            "run.yaml:5: train.steps: expected an integer from 0 to 1000000000000, got \"ten\"");
    refused("train.steps:\n  ten\n", NULL,
            "run.yaml:2: train.steps: expected an integer from 0 to 1000000000000, got \"ten\"");
    refused("train.steps: \"10\"\n", NULL,
            "run.yaml:1: train.steps: expected an integer from 0 to 1000000000000, got text in quotes: \"10\"");
    refused("", "train.steps=ten",
            "command line: train.steps=ten: expected an integer from 0 to 1000000000000, got \"ten\"");
    refused("train.batch: 0\n", NULL, "run.yaml:1: train.batch: expected an integer from 1 to 16777216, got \"0\"");
    refused("model.layers: 0\n", NULL, "run.yaml:1: model.layers: expected an integer from 1 to 4096, got \"0\"");
    refused("train.steps: [1]\n", NULL,
            "run.yaml:1: train.steps: expected an integer from 0 to 1000000000000, got a list");
    refused("train.lr: {a: 1}\n", NULL, "run.yaml:1: train.lr: expected a number from 0 to 1000, got a section");
    refused("train.lr:\n", NULL, "run.yaml:1: train.lr: expected a number from 0 to 1000, got nothing");
    refused("train.lr: 'x'\n", NULL,
            "run.yaml:1: train.lr: expected a number from 0 to 1000, got text in quotes: \"x\"");
    refused("run.dir: ~\n", NULL, "run.yaml:1: run.dir: expected text of at most 4095 bytes, got nothing");
    refused("train.beta2: 1.0\n", NULL, "run.yaml:1: train.beta2: expected a number from 0 to below 1, got \"1.0\"");
    refused("attention.memory_loss.tau: 0\n", NULL,
            "run.yaml:1: attention.memory_loss.tau: expected a number from 1e-06 to 1e+06, got \"0\"");
    refused("run.seed: 9007199254740993\n", NULL,
            "run.yaml:1: run.seed: expected an integer from 0 to 9007199254740992, got \"9007199254740993\"");
    refused("attention.selection.relu: yes\n", NULL,
            "run.yaml:1: attention.selection.relu: expected true or false, got \"yes\"");
    refused("attention.selection.relu: 'true'\n", NULL,
            "run.yaml:1: attention.selection.relu: expected true or false, got text in quotes: \"true\"");
    refused("attention.kind: Selective\n", NULL,
            "run.yaml:1: attention.kind: expected one of selective, standard, got \"Selective\"");
    refused("attention.kind: ''\n", NULL, "run.yaml:1: attention.kind: expected one of selective, standard, got \"\"");
    refused("dist.mesh.data: all\n", NULL,
            "run.yaml:1: dist.mesh.data: expected auto or an integer from 0 to 1048576, got \"all\"");
    refused("dist.mesh.sequence: 0\n", NULL, "run.yaml:1: dist.mesh.sequence: expected the integer 1, got \"0\"");
    refused("data:\n  train:\n    - a\n    - {path: b, weight: 2}\n", NULL,
            "run.yaml:3: data.train: expected one packed folder; mixtures are not in this version, got a list");
    refused("data.validation: [a]\n", NULL,
            "run.yaml:1: data.validation: expected one packed folder; mixtures are not in this version, got a list");

    char text[5000] = "run.dir: ";
    memset(text + 9, 'x', 4095);
    strcpy(text + 9 + 4095, "\nmodel.d: 1\n");
    CHECK_OK(parse(text, NULL));
    CHECK(strlen(config.run.dir) == 4095, "%zu", strlen(config.run.dir));
    memset(text + 9, 'x', 4096);
    strcpy(text + 9 + 4096, "\n");
    refused(text, NULL, "run.yaml:1: run.dir: expected text of at most 4095 bytes, got 4096");

    static const struct {
        const char *setting, *expected;
    } later[] = {
        {"attention.kind=local", "one of selective, standard"},
        {"attention.kind=local_global", "one of selective, standard"},
        {"checkpoint.async=true", "false"},
        {"dist.mesh.sequence=2", "the integer 1"},
    };
    for (size_t i = 0; i < sizeof later / sizeof *later; i++) {
        char line[256];
        snprintf(line, sizeof line, "command line: %s: %s is not in this version; expected %s", later[i].setting,
                 strchr(later[i].setting, '=') + 1, later[i].expected);
        refused("model.d: 4", later[i].setting, line);
    }
}

static void test_yaml(void)
{
    refused("model:\n  d: 4\nmodel.d: 5\n", NULL, "run.yaml:3: model.d: key appears twice, first at run.yaml:2");
    refused("train: {lr: 1}\nmodel.d: 1\ntrain:\n  clip: 1\n", NULL,
            "run.yaml:3: train: section appears twice, first at run.yaml:1");
    refused("model.d: &size 4\n", NULL, "run.yaml:1: anchors (&name) are not supported");
    refused("model: &m\n  d: 4\n", NULL, "run.yaml:1: anchors (&name) are not supported");
    refused("model.d: 4\ntrain.steps: *size\n", NULL,
            "run.yaml:2: aliases (*name) are not supported: write the value out");
    refused("data.train: [a, &b c]\n", NULL, "run.yaml:1: anchors (&name) are not supported");
    refused("model.d: !!int 4\n", NULL, "run.yaml:1: tags (!name) are not supported");
    refused("model.d: 4\n---\nmodel.d: 5\n", NULL, "run.yaml:2: a second document: one file is one run");
    refused("- model\n", NULL, "run.yaml:1: expected keys and values, such as \"model:\" and below it \"  d: 4\"");
    refused("\n4\n", NULL, "run.yaml:2: expected keys and values, such as \"model:\" and below it \"  d: 4\"");
    refused("model:\n\td: 4\n", NULL, "run.yaml:2: a tab cannot indent in YAML: use spaces");
    refused("? [a]\n: 4\n", NULL, "run.yaml:1: a key must be a word, not a list or a mapping");
    refused("'': 4\n", NULL, "run.yaml:1: a key is missing before \":\"");
    refused("run.dir: \"a\\0b\"\n", NULL, "run.yaml:1: a text may not contain a NUL byte");
    refused_with("model.d: 4\ntrain: {lr: 1\n", "run.yaml:3: not valid YAML: ");
    refused_with("model.d: 4\n  train: 5\n", "run.yaml:2: not valid YAML: ");
    refused_with("model.d: 4\nrun.dir: 'a\n", "run.yaml:3: not valid YAML: ");
    refused_with("model.d: 4\nrun.dir: a\xFFz\n", "run.yaml:2: not plain text in UTF-8: ");
    refused_with("model.d: 4\n\nrun.dir: a\x01z\n", "run.yaml:3: not plain text in UTF-8: ");
    CHECK(sel_config_parse(&config, "run.dir: a\0b", 12, "run.yaml", NULL, 0) == SEL_EUSER &&
              strstr(sel_error(), "run.yaml:1: not plain text"),
          "%s", sel_error());

    /* Depth that could exhaust a stack. */
    char deep[8200] = "";
    for (int i = 0; i < 2000; i++) memcpy(deep + 4 * i, "{a: ", 4);
    refused(deep, NULL, "run.yaml:1: the dotted key that ends in a is longer than 254 bytes");
    strcpy(deep, "data.train: ");
    memset(deep + 12, '[', 8000);
    CHECK(parse(deep, NULL) == SEL_EUSER, "%s", sel_error());
    char wide[500];
    memset(wide, 'k', sizeof wide);
    memcpy(wide + 490, ": 1\n", 5);
    CHECK(parse(wide, NULL) == SEL_EUSER && strstr(sel_error(), "run.yaml:1: the dotted key that ends in kkkk") &&
              strstr(sel_error(), "longer than 254"),
          "%s", sel_error());
}

/* parse(emit(c)) is c, byte for byte. */
static void same_again(const char *what)
{
    char *text = NULL;
    CHECK_OK(sel_config_emit(&config, &text));
    if (!text) return;
    memset(&other, 0xA5, sizeof other); /* parse owes us every byte */
    CHECK(sel_config_parse(&other, text, strlen(text), "emitted", NULL, 0) == SEL_OK, "%s: %s\n%s", what, sel_error(),
          text);
    CHECK(memcmp(&config, &other, sizeof config) == 0, "%s: another struct from\n%s", what, text);
    free(text);
}

static const char full_file[] =
    "# every section, block and flow\n"
    "run: {dir: runs/a, seed: 17}\n"
    "model:\n  d: 6\n  kv_heads: 2\n  context: 256\n  vocab: 8192\n"
    "attention:\n  kind: selective\n  selection: {relu: true, protect_bos: false, protect_self: true, shift: false}\n"
    "  memory_loss:\n    epsilon: 0.1\n    tau: 2\n"
    "data:\n  train: \"packed/train\"\n  validation: 'packed/val'\n  tokenizer: c4.model\n"
    "train: {steps: 1e4, batch: 64, micro_batch: 8, lr: 3e-3, warmup: 100, beta1: 0.95, beta2: 0.99,\n"
    "        adam_epsilon: 1e-9, weight_decay: .01, clip: 0, precision: float32, log_every: 1}\n"
    "checkpoint: {every: 500, every_minutes: 7.5, keep: 2, async: false}\n"
    "dist:\n  mesh: {data: auto, sequence: 1}\n  on_nan: skip\n  nan_rollback: 7\n  watchdog_seconds: 20\n"
    "compute: {threads: 2, linear_backend: openblas, cpu: avx2}\n";

static void test_emit(void)
{
    CHECK_OK(parse("model.d: 4\n", NULL));
    same_again("defaults");
    CHECK_OK(parse(full_file, NULL));
    CHECK(config.train.lr == 3e-3 && config.train.clip == 0 && config.checkpoint.every_minutes == 7.5, "numbers");
    CHECK(config.compute.linear_backend == SEL_BACKEND_OPENBLAS && strcmp(config.compute.cpu, "avx2") == 0, "choices");
    CHECK(config.dist.on_nan == SEL_ON_NAN_SKIP && config.dist.nan_rollback == 7 &&
              config.dist.watchdog_seconds == 20 && config.run.restarts == 3,
          "failures");
    same_again("full file");
    CHECK_OK(parse("model.d: 4\ncompute: {linear_backend: auto, linear_choice: 'qkv=mmi,o_proj=mbm'}\n", NULL));
    CHECK(config.compute.linear_backend == SEL_BACKEND_AUTO &&
              strcmp(config.compute.linear_choice, "qkv=mmi,o_proj=mbm") == 0, "auto and its choice");
    same_again("auto");
    CHECK_OK(parse(full_file, NULL));
    char *text = NULL;
    CHECK_OK(sel_config_emit(&config, &text));
    CHECK(text &&
              strstr(text, "\nattention:\n  kind: selective\n  selection:\n    relu: true\n    protect_bos: false\n"),
          "%s", text);
    CHECK(text && strstr(text, "  memory_loss:\n    epsilon: 0.1\n    tau: 2.0\n  dead_keys: rounding\n"), "%s", text);
    CHECK(text && strstr(text, "  adam_epsilon: 1.0e-09\n") && strstr(text, "  ffn_width: 1024\n"), "%s", text);
    int lines = 0, sections = 0;
    for (const char *p = text; p && *p; p++) {
        lines += *p == '\n';
        sections += *p == '\n' && p[-1] == ':';
    }
    CHECK(lines - sections == sel_n_keys, "%d keys of %d", lines - sections, sel_n_keys);
    free(text);

    /* Text of every kind: control characters, quotes, what looks like something else, all of Unicode's corners. */
    static const char *const texts[] = {"",
                                        "a b",
                                        "true",
                                        "12",
                                        "~",
                                        "null",
                                        "\"",
                                        "\\",
                                        "\\n",
                                        "a\nb\r\tc\x01\x1b\x7f",
                                        " x ",
                                        "- a",
                                        "#no",
                                        "{a}",
                                        "'",
                                        ": ",
                                        "\xC2\x80\xC2\x85\xC2\xA0",
                                        "\xE2\x80\xA8\xE2\x80\xA9",
                                        "\xEF\xBB\xBF",
                                        "\xEF\xBF\xBD\xEF\xBF\xBE\xEF\xBF\xBF",
                                        "\xED\x9F\xBF\xEE\x80\x80",
                                        "\xF0\x90\x80\x80",
                                        "\xF4\x8F\xBF\xBF",
                                        "\xF0\x9F\xBF\xBE",
                                        "\xC3\xA9\xE6\xBC\xA2\xF0\x9F\x98\x80",
                                        "%d%s"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        char override[64];
        snprintf(override, sizeof override, "data.train=%s", texts[i]);
        CHECK_OK(parse("model.d: 4\n", override));
        CHECK(strcmp(config.data.train, texts[i]) == 0, "%s", config.data.train);
        same_again(texts[i]);
    }
    for (uint64_t i = 0; i < 500; i++) { /* numbers with all their digits */
        CHECK_OK(parse("model.d: 4\n", NULL));
        config.train.lr = sel_rng_uniform(1, 1, i);
        config.attention.memory_loss.tau = 1e-5 + 1e5 * sel_rng_uniform(1, 2, i);
        config.train.adam_epsilon = 1e-30 + 1e-20 * sel_rng_uniform(1, 3, i);
        config.run.seed = (int64_t)(0x1p53 * sel_rng_uniform(1, 4, i));
        config.model.layers = 1 + (int64_t)(4000 * sel_rng_uniform(1, 5, i));
        same_again("random numbers");
    }
    CHECK_OK(parse("model.d: 4\n", NULL));
    strcpy(config.run.dir, "\xC0\xAF");
    CHECK(sel_config_emit(&config, &text) == SEL_EUSER && strcmp(sel_error(), "run.dir: expected text in UTF-8") == 0,
          "%s", sel_error());
}

static void test_help(void)
{
    char *text = NULL;
    CHECK_OK(sel_config_help(&text));
    if (!text) return;
    int lines = 0;
    for (const char *p = text; *p; p++) lines += *p == '\n';
    CHECK(lines == sel_n_keys, "%d lines, %d keys", lines, sel_n_keys);
    for (int i = 0; i < sel_n_keys; i++) {
        const sel_key *k = &sel_keys[i];
        CHECK(strstr(text, k->key) && k->help && *k->help, "%s", k->key);
        CHECK(k->preset || k->follows, "%s: neither a default nor what it follows from", k->key);
        CHECK(sel_key_find(k->key) == i, "%s: twice in the table", k->key);
    }
    free(text);
}

static void test_same_model(void)
{
    CHECK_OK(parse(full_file, NULL));
    other = config;
    CHECK_OK(sel_config_same_model(&config, &other));
    CHECK_OK(parse(full_file, "attention.memory_loss.epsilon=0"));
    CHECK_OK(sel_config_same_model(&config, &other));
    CHECK_OK(parse(full_file, "train.lr=1"));
    CHECK_OK(sel_config_same_model(&config, &other));

    CHECK_OK(parse(full_file, "model.layers=4"));
    CHECK(sel_config_same_model(&config, &other) == SEL_EUSER, "layers");
    CHECK(strcmp(sel_error(), "the model is not the checkpoint's: model.layers: 4 -> 6") == 0, "%s", sel_error());
    const char *const overrides[] = {"attention.kind=standard", "attention.selection.shift=true",
                                     "attention.memory_loss.epsilon=0", "model.context=128"};
    CHECK_OK(sel_config_parse(&config, full_file, strlen(full_file), "run.yaml", overrides, 4));
    CHECK(sel_config_same_model(&other, &config) == SEL_EUSER, "attention");
    CHECK(strcmp(sel_error(),
                 "the model is not the checkpoint's: model.context: 256 -> 128, attention.kind: selective -> "
                 "standard, attention.selection.shift: false -> true") == 0,
          "%s", sel_error());

    /* d only sets the sizes: the same sizes written out are the same model. */
    CHECK_OK(parse("model.d: 2", NULL));
    other = config;
    CHECK_OK(parse("model: {width: 128, layers: 2, heads: 2}", NULL));
    CHECK_OK(sel_config_same_model(&other, &config));

    CHECK(config.attention.selection.source == SEL_SOURCE_HEAD0, "head 0 selects unless told otherwise");
    CHECK_OK(parse("model.d: 2", "attention.selection.source=bilinear"));
    CHECK(config.attention.selection.source == SEL_SOURCE_BILINEAR, "bilinear");
    CHECK(sel_config_same_model(&other, &config) == SEL_EUSER, "source");
    CHECK(strcmp(sel_error(), "the model is not the checkpoint's: attention.selection.source: head0 -> bilinear") == 0,
          "%s", sel_error());
}

static void test_distance(void)
{
    CHECK(sel_text_distance("", "abc") == 3 && sel_text_distance("abc", "") == 3 &&
              sel_text_distance("abc", "abc") == 0,
          "ends");
    CHECK(sel_text_distance("kitten", "sitting") == 3, "%zu", sel_text_distance("kitten", "sitting"));
    CHECK(sel_text_distance("abcd", "abdc") == 1 && sel_text_distance("ba", "ab") == 1, "swap");
}

/* Damaged files: whatever comes, parse returns, with a line that says where or with a valid struct. */
static void test_fuzz(void)
{
    static const char pool[] =
        ":{}[],&*!|>'\"%@`#-? \t\n\r.0123456789eE+~<\\\x00\x01\x7f\x80\xc3\xa9\xe2\xff\xef\xbb\xbf";
    char text[2 * sizeof full_file];
    uint64_t n = 0;
    int accepted = 0;
    for (int round = 0; round < 6000; round++) {
        size_t length = sizeof full_file - 1;
        memcpy(text, full_file, length);
        uint32_t r[4];
        sel_philox(r, 99, 0, n++);
        for (uint32_t edits = 1 + r[0] % 4; edits > 0; edits--) {
            sel_philox(r, 99, 0, n++);
            const size_t at = r[0] % length, other_at = r[1] % length;
            size_t run = 1 + r[2] % 24;
            switch (r[3] % 5) {
            case 0: /* another byte */
                text[at] = pool[r[1] % (sizeof pool - 1)];
                break;
            case 1: /* one byte more */
                memmove(text + at + 1, text + at, length - at);
                text[at] = pool[r[1] % (sizeof pool - 1)];
                length++;
                break;
            case 2: /* some bytes fewer */
                if (run > length - at) run = length - at;
                memmove(text + at, text + at + run, length - at - run);
                length -= run;
                break;
            case 3: /* a stretch from elsewhere */
                if (run > length - other_at) run = length - other_at;
                if (run > length - at) run = length - at;
                memmove(text + at, text + other_at, run);
                break;
            default: /* cut */
                if (r[1] % 8 == 0) length = at + 1;
            }
        }
        /* A copy of exactly this size, so that a sanitizer sees a read beyond it. */
        char *copy = malloc(length);
        memcpy(copy, text, length);
        const sel_status rc = sel_config_parse(&config, copy, length, "run.yaml", NULL, 0);
        free(copy);
        CHECK(rc == SEL_OK || rc == SEL_EUSER, "status %d: %s", rc, sel_error());
        CHECK(rc == SEL_OK || (strncmp(sel_error(), "run.yaml:", 9) == 0 && !strchr(sel_error(), '\n')), "%s",
              sel_error());
        accepted += rc == SEL_OK;
        if (rc == SEL_OK) same_again("damaged file");
    }
    CHECK(accepted > 100 && accepted < 5900, "%d of 6000 accepted: the damage is not of the right size", accepted);
}

int main(void)
{
    test_defaults();
    test_sizes();
    test_forms();
    test_unknown();
    test_values();
    test_yaml();
    test_emit();
    test_help();
    test_same_model();
    test_distance();
    test_fuzz();
    return check_verdict();
}
