/* process.c: one line of /proc, read without allocating: a watchdog asks while other threads may be stuck anywhere. */
#include "core/base/process.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

char sel_process_state(pid_t pid)
{
    char path[64], line[512];

    snprintf(path, sizeof path, "/proc/%ld/stat", (long)pid);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return '\0';
    const ssize_t n = read(fd, line, sizeof line - 1);
    close(fd);
    if (n <= 0) return '\0'; /* it went while we looked */
    line[n] = '\0';
    const char *const name_end = strrchr(line, ')'); /* the program's name may hold anything */
    return name_end && name_end[1] == ' ' ? name_end[2] : '\0';
}

const char *sel_process_state_text(char state)
{
    switch (state) {
    case '\0':
    case 'Z':
    case 'X': return "dead";
    case 'R': return "running";
    case 'S': return "waiting";
    case 'D': return "waiting for a device or a file system";
    case 'T': return "stopped by a signal";
    case 't': return "stopped by a debugger";
    default: return "in an unknown state";
    }
}
