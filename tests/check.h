/* check.h: the least that a test needs: say what failed and where, count, and make the exit status the verdict. */
#ifndef SEL_TESTS_CHECK_H
#define SEL_TESTS_CHECK_H

#include <stdio.h>
#include <stdlib.h>

static int check_failed, check_done;

/* CHECK(condition, printf arguments that say the values). */
#define CHECK(cond, ...)                                                            \
    do {                                                                            \
        check_done++;                                                               \
        if (!(cond)) {                                                              \
            check_failed++;                                                         \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond);              \
            fprintf(stderr, __VA_ARGS__);                                           \
            fputc('\n', stderr);                                                    \
        }                                                                           \
    } while (0)

/* CHECK_OK(call): the call must return SEL_OK, else its error line is shown. */
#define CHECK_OK(call)                                                              \
    do {                                                                            \
        const sel_status check_rc_ = (call);                                        \
        CHECK(check_rc_ == SEL_OK, "%s", sel_error());                              \
    } while (0)

/* At the end of main: the verdict.  A test that checked nothing has failed. */
static inline int check_verdict(void)
{
    printf("%d checks, %d failed\n", check_done, check_failed);
    return check_failed || !check_done ? EXIT_FAILURE : EXIT_SUCCESS;
}

#endif
