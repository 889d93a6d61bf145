/* switches.h: the sets of switches of selection (specification, section 2) that tests go through. */
#ifndef SEL_TESTS_SWITCHES_H
#define SEL_TESTS_SWITCHES_H

#include "tests/reference.h"

static const struct {
    const char *name;
    bool selective, relu, protect_bos, protect_self, shift;
} switches[] = {
    { "standard", false, true, true, true, true },
    { "selective", true, true, true, true, true },
    { "no relu", true, false, true, true, true },
    { "no bos", true, true, false, true, true },
    { "no self", true, true, true, false, true },
    { "no shift", true, true, true, true, false },
    { "no self, no shift", true, true, true, false, false },
    { "none", true, false, false, false, false },
};
#define SWITCHES ((int)(sizeof switches / sizeof switches[0]))

static inline void switches_set(sel_ref_attention *a, int s)
{
    a->selective = switches[s].selective;
    a->relu = switches[s].relu;
    a->protect_bos = switches[s].protect_bos;
    a->protect_self = switches[s].protect_self;
    a->shift = switches[s].shift;
}

#endif
