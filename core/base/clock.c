/* clock.c: time, and how people read it. */
#include "core/base/clock.h"

#include <math.h>
#include <stdio.h>
#include <time.h>

double sel_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void sel_utc(char out[32])
{
    const time_t now = time(NULL);
    struct tm utc;
    gmtime_r(&now, &utc);
    strftime(out, 32, "%Y-%m-%dT%H:%M:%SZ", &utc);
}

void sel_format_duration(char out[32], double seconds)
{
    if (!isfinite(seconds) || seconds < 0) {
        snprintf(out, 32, "-");
        return;
    }
    if (seconds > 1e12) { /* 30,000 years */
        snprintf(out, 32, ">9999999d");
        return;
    }
    const long long s = llround(seconds), minute = 60, hour = 3600, day = 86400;
    if (s < minute)
        snprintf(out, 32, "%llds", s);
    else if (s < hour)
        snprintf(out, 32, "%lldm%02llds", s / minute, s % minute);
    else if (s < day)
        snprintf(out, 32, "%lldh%02lldm", s / hour, s % hour / minute);
    else
        snprintf(out, 32, "%lldd%02lldh", s / day, s % day / hour);
}

void sel_format_count(char out[32], double n)
{
    static const char *const units[] = {"", "k", "M", "G", "T", "P", "E"};
    const size_t last = sizeof units / sizeof *units - 1;
    if (!isfinite(n)) {
        snprintf(out, 32, "-");
        return;
    }
    /* 999.5 and above would round to a fourth digit. */
    size_t unit = 0;
    while (unit < last && fabs(n) >= 999.5) {
        n /= 1000;
        unit++;
    }
    snprintf(out, 32, "%.3g%s", n, units[unit]);
}
