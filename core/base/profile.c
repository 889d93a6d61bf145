/* profile.c: laps. */
#include "core/base/profile.h"

#include <stddef.h>
#include "core/base/clock.h"

static const struct { const char *name, *pass; } names[] = {
#define SEL_PART_ROW(id, name, pass) { name, pass },
    SEL_PARTS(SEL_PART_ROW)
#undef SEL_PART_ROW
};

const char *sel_part_name(sel_part p) { return names[p].name; }
const char *sel_part_pass(sel_part p) { return names[p].pass; }

void sel_profile_start(sel_profile *p)
{
    if (p) p->mark = sel_now();
}

void sel_profile_lap(sel_profile *p, sel_part part, double flops, double bytes)
{
    if (!p) return;
    const double now = sel_now();
    sel_part_sum *const s = &p->parts[part];
    s->seconds += now - p->mark;
    s->flops += flops;
    s->bytes += bytes;
    s->laps++;
    p->mark = now;
}
