/* pulse.c: marks as relaxed atomics: a reader may see one name a moment earlier than another, never an invalid one. */
#include "core/base/pulse.h"

#include <string.h>
#include <time.h>

static sel_pulse own;
static sel_pulse *pulse = &own;

enum { WORDS = SEL_PULSE_NAME / 8 };

static uint64_t get(const _Atomic uint64_t *x)
{
    return atomic_load_explicit(x, memory_order_relaxed);
}

static void set(_Atomic uint64_t *x, uint64_t value)
{
    atomic_store_explicit(x, value, memory_order_relaxed);
}

static void set_name(_Atomic uint64_t *words, const char *name)
{
    uint64_t text[WORDS] = {0};

    memcpy(text, name, strnlen(name, SEL_PULSE_NAME - 1));
    for (int i = 0; i < WORDS; i++) set(&words[i], text[i]);
}

static void get_name(const _Atomic uint64_t *words, char name[SEL_PULSE_NAME])
{
    uint64_t text[WORDS];

    for (int i = 0; i < WORDS; i++) text[i] = get(&words[i]);
    memcpy(name, text, SEL_PULSE_NAME);
    name[SEL_PULSE_NAME - 1] = '\0';
}

void sel_pulse_move(sel_pulse *to)
{
    sel_pulse_view now;

    sel_pulse_read(pulse, &now);
    pulse = to ? to : &own;
    set(&pulse->position, now.position);
    set_name(pulse->collective, now.collective);
    set_name(pulse->exchange, now.exchange);
    sel_pulse_phase(now.phase, now.step);
}

void sel_pulse_tick(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    set(&pulse->when, (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec);
    atomic_fetch_add_explicit(&pulse->marks, 1, memory_order_relaxed);
}

void sel_pulse_phase(const char *phase, int64_t step)
{
    set_name(pulse->phase, phase);
    if (step >= 0) atomic_store_explicit(&pulse->step, step, memory_order_relaxed);
    sel_pulse_tick();
}

void sel_pulse_enter(const char *collective)
{
    set_name(pulse->collective, collective);
    set(&pulse->position, get(&pulse->position) | 1);
    sel_pulse_tick();
}

void sel_pulse_leave(void)
{
    set(&pulse->position, (get(&pulse->position) | 1) + 1);
    sel_pulse_tick();
}

void sel_pulse_exchange(const char *what)
{
    set_name(pulse->exchange, what ? what : "");
    sel_pulse_tick();
}

void sel_pulse_read(const sel_pulse *p, sel_pulse_view *view)
{
    view->marks = get(&p->marks);
    view->position = get(&p->position);
    view->step = atomic_load_explicit(&p->step, memory_order_relaxed);
    view->when = get(&p->when);
    get_name(p->phase, view->phase);
    get_name(p->collective, view->collective);
    get_name(p->exchange, view->exchange);
}
