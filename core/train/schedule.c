/* schedule.c: linear warm-up, then cosine decay to zero. */
#include "core/train/schedule.h"

#include <math.h>

double sel_learning_rate(double lr, int64_t warmup, int64_t steps, int64_t t)
{
    if (t <= warmup) return lr * (double)t / (double)warmup;
    return lr * 0.5 * (1.0 + cos(acos(-1.0) * (double)(t - warmup) / (double)(steps - warmup)));
}
