/* Which window a sample of a run reads: a pure function, so any rank finds its own and resuming is free. */
#include "core/base/rng.h"
#include "core/data/corpus.h"

int64_t sel_sample_window(uint64_t seed, int64_t step, int64_t index, int64_t batch, int64_t windows)
{
    SEL_ASSERT(step >= 1 && index >= 0 && index < batch && windows >= 1);
    const int64_t g = (step - 1) * batch + index;   /* the run's g-th sample */
    const int64_t epoch = g / windows;
    const uint64_t stream = sel_rng_stream("data.sample") + (uint64_t)epoch;

    return (int64_t)sel_rng_permute(seed, stream, (uint64_t)windows, (uint64_t)(g % windows));
}
