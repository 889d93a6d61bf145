/* error.h: how a function says that it failed.
 *
 * A function that can fail returns SEL_OK or a negative status and leaves one
 * line in sel_error().  It prints nothing and ends no process: launcher/ does.
 * A function that cannot fail returns void and asserts its arguments.
 */
#ifndef SEL_CORE_BASE_ERROR_H
#define SEL_CORE_BASE_ERROR_H

/* Name, value, exit status of the program, meaning.  Lower values win when
   ranks agree on a common outcome (dist/comm.h). */
#define SEL_STATUSES(X)                                                    \
    X(SEL_OK,      0, 0, "no error")                                       \
    X(SEL_EUSER,  -1, 2, "a mistake of the user: setting, argument, path") \
    X(SEL_EFILE,  -2, 1, "a file is short, damaged or of another format")  \
    X(SEL_EIO,    -3, 1, "the system refused a file operation")            \
    X(SEL_ENOMEM, -4, 1, "out of memory")                                  \
    X(SEL_ENUM,   -5, 1, "a number that must be finite is not")            \
    X(SEL_ECOMM,  -6, 1, "ranks disagree or communication failed")

typedef enum {
#define SEL_STATUS_ENUM(name, code, exit_status, text) name = (code),
    SEL_STATUSES(SEL_STATUS_ENUM)
#undef SEL_STATUS_ENUM
} sel_status;

/* Records the line (per thread, cut at 1023 bytes) and returns code, so that a
   failure is one statement:
       return sel_fail(SEL_EFILE, "%s: bad magic", path);                    */
__attribute__((format(printf, 2, 3)))
sel_status sel_fail(sel_status code, const char *fmt, ...);

/* The calling thread's latest line; never NULL. */
const char *sel_error(void);

/* The program's exit status for a status (spec, section 16): 0, 1 or 2. */
int sel_exit_status(sel_status code);

/* The only macro that hides a return.  With something to clean up,
   write `if ((rc = f()) != SEL_OK) goto out;` instead. */
#define SEL_TRY(call)                              \
    do {                                           \
        const sel_status try_rc_ = (call);         \
        if (try_rc_ != SEL_OK) return try_rc_;     \
    } while (0)

/* A broken contract between functions, never a mistake of the user: says where
   and aborts.  Compiled out of release builds (NDEBUG). */
_Noreturn void sel_assert_fail(const char *what, const char *file, int line);
#ifdef NDEBUG
#define SEL_ASSERT(cond) ((void)sizeof(cond))
#else
#define SEL_ASSERT(cond) \
    ((cond) ? (void)0 : sel_assert_fail(#cond, __FILE__, __LINE__))
#endif

#endif
