/* schedule.h: the learning rate of each update (spec, section 8). */
#ifndef SEL_CORE_TRAIN_SCHEDULE_H
#define SEL_CORE_TRAIN_SCHEDULE_H

#include <stdint.h>

/* Update t = 1, 2, ..., of `steps`: lr t / warmup up to t = warmup, then half a cosine down to 0 at t = steps. */
double sel_learning_rate(double lr, int64_t warmup, int64_t steps, int64_t t);

#endif
