/* core_safetensors.c: headers made, read back, and damaged in every way. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/checkpoint/safetensors.h"
#include "tests/folder.h"

/* Random damage to the header: an error, or an index that adds up; never a crash. */
static void test_header_fuzz(void)
{
    const char *path = in_folder("fuzz.safetensors");
    sel_st_entry entries[] = {{.name = "a", .rank = 2, .shape = {3, 5}},
                              {.name = "b\"\\\xc3\xa9", .rank = 1, .shape = {2}},
                              {.name = "c", .rank = 0}};
    sel_st_index ix = {.entries = entries, .n = 3}, got;
    char *header;
    size_t bytes;
    int refused = 0;
    enum { ROUNDS = 4000 };

    CHECK_OK(sel_st_make(&ix, &header, &bytes));
    const size_t total = bytes + (size_t)ix.data_bytes;
    CHECK(ix.data_bytes == 4 * (15 + 2 + 1) && bytes % 64 == 0, "%" PRId64 " bytes", ix.data_bytes);
    char *file = calloc(total, 1), *bad = malloc(total);
    memcpy(file, header, bytes);
    put(path, file, total);
    CHECK_OK(sel_st_read(&got, path));
    CHECK(got.n == 3 && strcmp(got.entries[1].name, entries[1].name) == 0 && got.entries[2].rank == 0, "%d entries",
          got.n);
    sel_st_free(&got);

    for (uint64_t round = 0; round < ROUNDS; round++) {
        uint32_t r[4];
        sel_philox(r, 11, 0, round);
        size_t n = total;
        memcpy(bad, file, total);
        if (round % 4 == 0) n = r[3] % total; /* cut */
        if (round % 4 == 1) bad[r[0] % bytes] ^= (char)(1 << r[1] % 8);
        if (round % 4 == 2) bad[r[0] % 8] = (char)r[1]; /* the length */
        if (round % 4 == 3) memmove(bad + 8 + r[0] % 64, bad + 8 + r[1] % 64, r[2] % (bytes - 80));
        put(path, bad, n);
        const sel_status rc = sel_st_read(&got, path);
        CHECK(rc == SEL_OK || rc == SEL_EFILE, "status %d: %s", (int)rc, sel_error());
        refused += rc == SEL_EFILE;
        if (rc == SEL_OK) {
            int64_t at = 0;
            for (int i = 0; i < got.n; i++) {
                CHECK(got.entries[i].begin == at, "a gap at %" PRId64, at);
                at = got.entries[i].end;
            }
            CHECK(at == got.data_bytes && got.header_bytes + at == (int64_t)n, "ends at %" PRId64, at);
        }
        sel_st_free(&got);
    }
    CHECK(refused > ROUNDS / 2, "%d refused", refused);

    /* Headers that are well-formed and wrong. */
    static const char *const wrong[] = {
        "[]",
        "{",
        "",
        "{\"a\":1}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}} x",
        "{\"a\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[4,0]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_"
        "offsets\":[4,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_"
        "offsets\":[0,4]}}",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}",
        " {\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char text[512] = {0};
        const uint64_t length = strlen(wrong[i]);
        memcpy(text, &length, 8);
        memcpy(text + 8, wrong[i], length);
        put(path, text, 8 + length + 4);
        CHECK(sel_st_read(&got, path) == SEL_EFILE && strstr(sel_error(), "fuzz.safetensors"), "%s: %s", wrong[i],
              sel_error());
    }
    CHECK(sel_st_read(&got, in_folder("none")) == SEL_EUSER, "%s", sel_error());
    CHECK(sel_st_read(&got, folder) != SEL_OK, "a folder");

    sel_st_index twice = {.entries = (sel_st_entry[]){{.name = "a", .rank = 0}, {.name = "a", .rank = 0}}, .n = 2};
    char *none = NULL;
    CHECK(sel_st_make(&twice, &none, &bytes) == SEL_EUSER && !none, "%s", sel_error());
    free(bad);
    free(file);
    free(header);
}

int main(void)
{
    make_folder();
    test_header_fuzz();
    CHECK_OK(sel_remove_tree(folder));
    return check_verdict();
}
