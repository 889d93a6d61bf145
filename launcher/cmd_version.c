/* cmd_version.c: `selectra version`: what is running, for reports of faults. */
#include <stdio.h>
#include <string.h>
#include "dist/comm.h"
#include "launcher/launcher.h"
#include "ops/cpu.h"
#include "ops/linear.h"
#include "sel_version.h"

int sel_cmd_version(int argc, char **argv)
{
    sel_linear_engine *e = NULL;
    sel_cpu_level level;

    if (argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0)) {
        printf("usage: selectra version\n");
        return SEL_EXIT_DONE;
    }
    printf("selectra %s (%s), %s, %s\n", SEL_VERSION, SEL_COMMIT, SEL_COMPILER, SEL_BUILD_TYPE);
    printf("%s\n", sel_comm_library());
    for (int backend = SEL_LINEAR_ONEDNN; backend <= SEL_LINEAR_OPENBLAS; backend++) {
        if (sel_linear_open(&e, (sel_linear_backend)backend, SEL_FLOAT32, 1) != SEL_OK) {
            fprintf(stderr, "selectra version: %s\n", sel_error());
            return SEL_EXIT_FAILURE;
        }
        printf("%s\n", sel_linear_library(e));
        sel_linear_close(&e);
    }
    if (sel_cpu_choose("auto", &level) != SEL_OK) {
        fprintf(stderr, "selectra version: %s\n", sel_error());
        return SEL_EXIT_USER;
    }
    printf("%s: kernels for %s\n", sel_cpu_name(), sel_cpu_level_name(level));
    return SEL_EXIT_DONE;
}
