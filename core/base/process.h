/* process.h: what the system says about another process of this host. */
#ifndef SEL_CORE_BASE_PROCESS_H
#define SEL_CORE_BASE_PROCESS_H

#include <sys/types.h>

/* The state letter of /proc/PID/stat ('R' running, 'S' and 'D' waiting, 'T' stopped, 'Z' dead, ...); '\0': there is no
   such process (or no /proc to ask). */
char sel_process_state(pid_t pid);

/* The state in words, for people: "stopped by a signal". */
const char *sel_process_state_text(char state);

#endif
