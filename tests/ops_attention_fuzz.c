/* Attention on shapes and switches drawn at random, every level the processor has, both operand types, against the
 * reference in double precision with the bounds of tests/ops_attention.c; half of the cases that may have dead keys do.
 *
 * Rows from 4 on: in fewer P (dP - delta) may cancel to any smallness, so that no relative bound holds (the grid of
 * tests/ops_attention.c has them).
 *
 * A case is its number: what fails is found again by it.  SEL_TEST_FUZZ: how many cases (2,000; 150 with
 * SEL_TEST_QUICK).
 */
#include "tests/attention_case.h"

static int64_t between(int64_t least, int64_t most)
{
    return least + (int64_t)(random_uniform() * (double)(most - least + 1));
}

static int64_t one_of(const int64_t *list, int n)
{
    return list[between(0, n - 1)];
}

static void check_drawn(int number)
{
    static const int64_t widths[] = {3, 8, 16, 16, 24, 32, 32, 40, 48, 64, 64, 80, 96, 128};
    static const int64_t lengths[] = {15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 191, 193};
    random_seed(9000 + (uint64_t)number);
    bfloat16 = number % 2 == 1;
    const int s = (int)between(0, SWITCHES - 1);
    const selection_source source = switches[s].selective && between(0, 2) == 0 ? BILINEAR : HEAD0;
    sel_ref_attention a = {.B = between(1, 3), .Hkv = between(1, 3), .dh = one_of(widths, 14)};
    a.H = a.Hkv * between(1, 3);
    a.N = between(0, 1) ? one_of(lengths, 13) : between(4, 150);
    a.window = between(0, 3) ? 0 : between(1, a.N + 5);
    if (a.window && between(0, 1)) a.N += between(1, 250);   /* keys that rows of several tiles no longer see */
    a.tau = between(0, 1) ? 0.3 + random_uniform() : 0.0;
    const int threads = (const int[]){1, 2, 3, 6}[between(0, 3)];
    const arrangement how = between(0, 1) ? PACKED : APART;
    const int64_t first = between(0, a.N), second = between(first, a.N);
    const bool dead = switches[s].selective && switches[s].relu && !a.window && between(0, 1);
    /* rows in one call, or in up to three, of which none is empty */
    int64_t cuts[4] = {0};
    int n = 0;
    if (between(0, 1)) {
        if (first > 0 && first < a.N) cuts[++n] = first;
        if (second > cuts[n] && second < a.N) cuts[++n] = second;
    }
    cuts[++n] = a.N;

    problem p = problem_new(&a, s, source, 1.0, 90000 + (uint64_t)number);
    snprintf(p.name + strlen(p.name), sizeof p.name - strlen(p.name), ", case %d", number);
    if (!switches[s].relu) p.scale_bf16 = 6.0;   /* few keys: rows that are all but one key's (attention_case.h) */
    dead_margin = dead ? 17.0 + log((double)a.N) + 20.0 * random_uniform() : 0.0;
    for (int l = 0; l < levels; l++) {
        outcome o = run(&p, &tables[l], threads, how, cuts, n);
        check_outcome(&p, &tables[l], dead ? "dead keys" : "drawn", &o);
        outcome_free(&o);
    }
    dead_margin = 0.0;
    problem_free(&p);
}

int main(void)
{
    const char *const wanted = getenv("SEL_TEST_FUZZ");
    const int cases = wanted ? atoi(wanted) : getenv("SEL_TEST_QUICK") ? 150 : 2000;
    for (int level = SEL_CPU_C; level <= (int)sel_cpu_detect(); level++)
        sel_ops_init(&tables[levels++], (sel_cpu_level)level);
    for (int c = 0; c < cases; c++) check_drawn(c);
    printf("%d cases at %d levels, largest error %.2f of its bound; bfloat16 %.2f\n", cases, levels, worst[0],
           worst[1]);
    return check_verdict();
}
