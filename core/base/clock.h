/* clock.h: time, and how people read it. */
#ifndef SEL_CORE_BASE_CLOCK_H
#define SEL_CORE_BASE_CLOCK_H

#include <stddef.h>

/* Seconds of the monotonic clock. */
double sel_now(void);

/* "2026-03-01T12:00:00Z" of the wall clock into out. */
void sel_utc(char out[32]);

/* "42s", "3m10s", "2h05m", "3d04h" into out; unknown (negative, not finite) gives "-". */
void sel_format_duration(char out[32], double seconds);

/* "12.3k", "4.56M", "7.8G": three significant digits and a decimal unit. */
void sel_format_count(char out[32], double n);

#endif
