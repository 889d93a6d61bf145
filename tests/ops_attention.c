/* The fused attention kernels, every level the processor has, against the reference in double precision.
 *
 * Bounds (specification, section 3): norm of the difference over norm of the reference under 2e-6 at unit-normal
 * inputs; where the reference is zero, 1e-6 of the norm of dO; without relu, F grows in both directions and the
 * bound with max |F|.  Inputs are drawn so that no selection logit lies within float's rounding of relu's kink.
 *
 * Everything is done twice, with float32 and with bfloat16 operands: arrays of that type.  For these inputs are drawn
 * as bfloat16 holds them, and what the rounding of P, dZ and out goes into may be 1e-2 off.  F does not: carry and the
 * memory loss keep float32's bound.
 */
#include "tests/attention_case.h"

static double farthest;   /* of two kernels from each other, over the bound */

/* With bfloat16 operands all kernels round the same values: they are nearer to each other than to the reference. */
static void check_agree(const problem *p, const sel_ops *ops, const outcome *o, const outcome *first)
{
    const float *const x[] = { o->out, o->dq, o->dk, o->dv, o->dsel_q, o->dsel_k };
    const float *const y[] = { first->out, first->dq, first->dk, first->dv, first->dsel_q, first->dsel_k };
    const int64_t counts[] = { q_count(p), q_count(p), k_count(p), k_count(p), sel_count(p), sel_count(p) };
    const double output = norm(p->dout, q_count(p));
    const bool alone = p->a.N == 1 || p->a.window == 1;   /* rows that see one key pass nothing on to q and k */
    for (int c = 0; c < 6; c++) {
        double difference = 0.0, size = 0.0;
        for (int64_t i = 0; i < counts[c]; i++) {
            difference += ((double)x[c][i] - (double)y[c][i]) * ((double)x[c][i] - (double)y[c][i]);
            size += (double)y[c][i] * (double)y[c][i];
        }
        const double bound = p->a.selective && !p->a.relu ? 2.0 * BOUND_BF16 : AGREE_BF16;
        const double limit = bound * sqrt(size) + EXP_BF16 * output * alone;
        CHECK(sqrt(difference) <= limit, "%s, %s: result %d is %.3g from that of %s", sel_cpu_level_name(ops->level),
              p->name, c, sqrt(difference / size), sel_cpu_level_name(tables[0].level));
        if (!alone && limit > 0.0) farthest = fmax(farthest, sqrt(difference) / limit);
    }
}

static void check_whole(const problem *p, int threads, arrangement how)
{
    char text[64];
    outcome first;
    snprintf(text, sizeof text, "%d threads, %s", threads, how == PACKED ? "packed" : "apart");
    for (int l = 0; l < levels; l++) {
        outcome o = run(p, &tables[l], threads, how, (const int64_t[]){ 0, p->a.N }, 1);
        check_outcome(p, &tables[l], text, &o);
        if (l == 0) {
            first = o;
            continue;
        }
        if (bfloat16) check_agree(p, &tables[l], &o, &first);
        outcome_free(&o);
    }
    outcome_free(&first);
}

/* Without selection nothing is the source of it. */
static bool has_source(int s, selection_source source) { return source == HEAD0 || switches[s].selective; }

/* Every length with every set of switches; the other sizes go round, so that all of them meet many others. */
static void check_grid(int thin, selection_source source)
{
    static const int64_t lengths[] = { 1, 2, 3, 17, 64, 65, 200, 513 };
    static const int64_t shapes[][2] = { { 3, 3 }, { 1, 1 }, { 12, 4 }, { 3, 1 }, { 12, 12 }, { 4, 2 }, { 12, 1 } };
    static const int64_t widths[] = { 64, 16, 64, 32, 64, 40, 64, 5, 64, 64, 64 };
    static const int64_t windows[] = { 0, 0, 1, 0, 64, 0, 3, 0, 100 };
    int c = 0;
    for (size_t n = 0; n < sizeof lengths / sizeof lengths[0]; n++)
        for (int s = 0; s < SWITCHES; s++, c++) {
            if (c % thin || !has_source(s, source)) continue;
            sel_ref_attention a = { .B = 1 + c % 3, .H = shapes[c % 7][0], .Hkv = shapes[c % 7][1], .N = lengths[n],
                                    .dh = widths[c % 11], .window = windows[c % 9], .tau = c % 2 ? 0.7 : 0.0 };
            if (a.N > 500) a.B = 1;
            problem p = problem_new(&a, s, source, 1.0, (uint64_t)c);
            check_whole(&p, 1 + c / 3 % 3, c / 2 % 2 ? PACKED : APART);
            problem_free(&p);
        }
}

/* Every set of switches with every window; the memory loss with half of those that have none. */
static void check_windows(int thin, selection_source source)
{
    static const int64_t windows[] = { 1, 3, 64, 100, 0 };
    int c = 0;
    for (int w = 0; w < 5; w++)
        for (int s = 0; s < SWITCHES; s++, c++) {
            if (c % thin || !has_source(s, source)) continue;
            const sel_ref_attention a = { .B = 1 + c % 2, .H = 3, .Hkv = c % 4 ? 1 : 3, .N = 150 + 11 * w, .dh = 16,
                                          .window = windows[w], .tau = (c + w) % 2 ? 1.0 : 0.0 };
            problem p = problem_new(&a, s, source, 1.0, 1000 + (uint64_t)c);
            check_whole(&p, 1 + c % 2, c % 3 ? APART : PACKED);
            problem_free(&p);
        }
}

/* Rows in several calls, carry handed on and dcarry handed back: sharding, prefill, decoding a token at a time. */
static void check_pieces(int thin, selection_source source)
{
    static const struct {
        int n;
        int64_t cuts[8];
    } ways[] = {
        { 3, { 0, 64, 128, 200 } },
        { 5, { 0, 1, 2, 77, 199, 200 } },
        { 2, { 0, 100, 200 } },
    };
    int64_t every[66];
    for (int i = 0; i < 66; i++) every[i] = i;
    int c = 0;
    for (int s = 0; s < SWITCHES; s++)
        for (int w = 0; w < 4; w++, c++) {
            if (c % thin || !has_source(s, source)) continue;
            const sel_ref_attention a = { .B = 2, .H = 3, .Hkv = c % 3 ? 3 : 1, .N = w < 3 ? 200 : 65, .dh = 32,
                                          .window = c % 5 ? 0 : 70, .tau = c % 2 ? 1.0 : 0.0 };
            problem p = problem_new(&a, s, source, 1.0, 2000 + (uint64_t)c);
            for (int l = 0; l < levels; l++) {
                outcome o = run(&p, &tables[l], 1 + c % 2, c % 4 ? APART : PACKED, w < 3 ? ways[w].cuts : every,
                                w < 3 ? ways[w].n : 65);
                check_outcome(&p, &tables[l], w < 3 ? "in pieces" : "row by row", &o);
                outcome_free(&o);
            }
            problem_free(&p);
        }
}

/* The product's own rows against each wrong implementation: they must be far apart, or the bound means little.  out,
   but for what is wrong in head 0's gradient alone: dq. */
static void check_wrongs(selection_source source)
{
    static const int64_t lengths[] = { 17, 65, 130 };
    for (int n = 0; n < 3; n++) {
        const sel_ref_attention a = { .B = 2, .H = 3, .Hkv = 3, .N = lengths[n], .dh = 64 };
        problem p = problem_new(&a, 1, source, 1.0, 3000 + (uint64_t)n);
        const int64_t count = q_count(&p);
        double *out = room(count * 8), *dq = room(count * 8), *dk = room(count * 8), *dv = room(count * 8);
        double *dsel_q = room(sel_count(&p) * 8), *dsel_k = room(sel_count(&p) * 8);
        for (sel_ref_wrong w = SEL_REF_RIGHT; w < SEL_REF_WRONG_END; w++) {
            sel_ref_attention mutant = p.a;
            mutant.wrong = w;
            mutant.restart = a.N / 2;
            if (source == HEAD0 && (w == SEL_REF_HEAD0_VOTES || w == SEL_REF_HEAD0_SHARES)) continue;
            sel_ref_attend(&mutant, p.q, p.k, p.v, &(sel_ref_results){ .out = out, .dout = p.dout, .dq = dq, .dk = dk,
                                                                       .dv = dv, .dsel_q = dsel_q, .dsel_k = dsel_k });
            const double *const wrong = w == SEL_REF_HEAD0_SHARES ? dq : out;
            for (int l = 0; l < levels; l++) {
                outcome o = run(&p, &tables[l], 1, APART, (const int64_t[]){ 0, a.N / 2, a.N }, 2);
                const float *const got = w == SEL_REF_HEAD0_SHARES ? o.dq : o.out;
                const double error = distance(got, wrong, count) / norm(wrong, count);
                CHECK(w == SEL_REF_RIGHT ? error < BOUND : error > 50.0 * BOUND, "%s, N %d, %s: distance %.3g",
                      sel_cpu_level_name(tables[l].level), (int)a.N, sel_ref_wrong_name(w), error);
                outcome_free(&o);
            }
        }
        double *const all[] = { out, dq, dk, dv, dsel_q, dsel_k };
        for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
        problem_free(&p);
    }
}

static bool same_bits(const float *x, const float *y, int64_t n)
{
    return memcmp(x, y, (size_t)n * 4) == 0;
}

static bool same_gradients(const problem *p, const outcome *x, const outcome *y)
{
    return same_bits(x->dq, y->dq, q_count(p)) && same_bits(x->dk, y->dk, k_count(p)) &&
           same_bits(x->dv, y->dv, k_count(p)) && same_bits(x->dsel_q, y->dsel_q, sel_count(p)) &&
           same_bits(x->dsel_k, y->dsel_k, sel_count(p));
}

/* Forward is the same to the bit on any number of threads, backward on the same number. */
static void check_threads(void)
{
    static const int64_t shapes[][4] = { { 1, 3, 1, 513 }, { 3, 3, 3, 200 }, { 2, 1, 1, 321 }, { 1, 2, 1, 400 } };
    for (int c = 0; c < 4; c++) {
        const sel_ref_attention a = { .B = shapes[c][0], .H = shapes[c][1], .Hkv = shapes[c][2], .N = shapes[c][3],
                                      .dh = 64, .tau = 1.0 };
        problem p = problem_new(&a, 1, c == 3 ? BILINEAR : HEAD0, 1.0, 4000 + (uint64_t)c);
        const int64_t whole[] = { 0, a.N };
        for (int l = 0; l < levels; l++) {
            outcome one = run(&p, &tables[l], 1, APART, whole, 1);
            for (int t = 1; t <= 5; t += t < 3 ? 1 : 2) {
                outcome x = run(&p, &tables[l], t, APART, whole, 1), y = run(&p, &tables[l], t, APART, whole, 1);
                CHECK(same_bits(one.out, x.out, q_count(&p)) && same_bits(one.lse, x.lse, a.B * a.H * a.N) &&
                          same_bits(one.carry, x.carry, a.B * a.N) && !memcmp(one.m_max, x.m_max, (size_t)a.B * 8),
                      "%s, %s: forward on %d threads has other bits", sel_cpu_level_name(tables[l].level), p.name, t);
                CHECK(same_bits(x.out, y.out, q_count(&p)) && same_gradients(&p, &x, &y),
                      "%s, %s: two runs on %d threads differ", sel_cpu_level_name(tables[l].level), p.name, t);
                check_outcome(&p, &tables[l], "threads", &x);
                outcome_free(&x);
                outcome_free(&y);
            }
            outcome_free(&one);
        }
        problem_free(&p);
    }
}

/* Where no selection logit is positive, selective attention is standard attention, to the bit. */
static void check_standard_bits(void)
{
    static const int64_t shapes[][5] = { { 2, 3, 3, 200, 64 }, { 1, 12, 4, 65, 64 }, { 1, 1, 1, 130, 32 },
                                         { 2, 4, 2, 1, 64 },   { 1, 3, 1, 321, 40 } };
    for (int c = 0; c < 5; c++) {
        const sel_ref_attention a = { .B = shapes[c][0], .H = shapes[c][1], .Hkv = shapes[c][2], .N = shapes[c][3],
                                      .dh = shapes[c][4], .window = c == 4 ? 100 : 0 };
        problem p = problem_new(&a, 0, HEAD0, 1.0, 5000 + (uint64_t)c);
        for (int64_t row = 0; row < a.B * a.N; row++)
            for (int64_t d = 0; d < a.dh; d++) {
                double *q = p.q + row * a.H * a.dh + d, *k = p.k + row * a.Hkv * a.dh + d;
                *q = fabs(*q);
                *k = -fabs(*k);
            }
        problem selective = p, bilinear;
        selective.a.selective = selective.a.relu = selective.a.protect_bos = true;
        selective.a.protect_self = selective.a.shift = true;
        bilinear = selective;
        bilinear.sel_q = float_normals(a.B * a.N * a.dh, 1.0);
        bilinear.sel_k = float_normals(a.B * a.N * a.dh, 1.0);
        for (int64_t i = 0; i < a.B * a.N * a.dh; i++) {
            bilinear.sel_q[i] = fabs(bilinear.sel_q[i]);
            bilinear.sel_k[i] = -fabs(bilinear.sel_k[i]);
        }
        for (int l = 0; l < levels; l++)
            for (int t = 1; t <= 4; t++) {
                const int64_t whole[] = { 0, a.N };
                const problem *const other = t <= 2 ? &selective : &bilinear;
                outcome x = run(&p, &tables[l], 1 + t % 2, APART, whole, 1);
                outcome y = run(other, &tables[l], 1 + t % 2, APART, whole, 1);
                CHECK(same_bits(x.out, y.out, q_count(&p)) && same_bits(x.lse, y.lse, a.B * a.H * a.N),
                      "%s, %s, way %d: forward: F = 0 is not standard attention to the bit",
                      sel_cpu_level_name(tables[l].level), p.name, t);
                CHECK(same_gradients(&p, &x, &y),
                      "%s, %s, way %d: backward: F = 0 is not standard attention to the bit",
                      sel_cpu_level_name(tables[l].level), p.name, t);
                int64_t selected = 0;
                for (int64_t i = 0; i < sel_count(other); i++) selected += y.dsel_q[i] != 0.0f || y.dsel_k[i] != 0.0f;
                CHECK(selected == 0, "%s, %s: a gradient where nothing is selected",
                      sel_cpu_level_name(tables[l].level), p.name);
                outcome_free(&x);
                outcome_free(&y);
            }
        free(bilinear.sel_q);
        free(bilinear.sel_k);
        problem_free(&p);
    }
}

/* sel_q and sel_k with head 0's own values are head 0 selecting: the same out, lse and carry to the bit, and what head
   0's gradient lacks is in theirs. */
static void check_selecting_head(void)
{
    static const int64_t shapes[][6] = { { 2, 3, 3, 200, 64, 0 }, { 1, 4, 2, 130, 64, 0 }, { 3, 2, 1, 65, 16, 0 },
                                         { 1, 3, 1, 321, 40, 100 }, { 1, 2, 2, 513, 32, 0 } };
    for (int c = 0; c < 5; c++) {
        const sel_ref_attention a = { .B = shapes[c][0], .H = shapes[c][1], .Hkv = shapes[c][2], .N = shapes[c][3],
                                      .dh = shapes[c][4], .window = shapes[c][5], .tau = c % 2 ? 0.0 : 0.7 };
        const int64_t whole[] = { 0, a.N }, dh = a.dh, rows = a.B * a.N;
        problem p = problem_new(&a, 1, HEAD0, 1.0, 9500 + (uint64_t)c), own = p;
        own.sel_q = room(rows * dh * 8);
        own.sel_k = room(rows * dh * 8);
        for (int64_t row = 0; row < rows; row++) {
            memcpy(own.sel_q + row * dh, p.q + row * a.H * dh, (size_t)dh * 8);
            memcpy(own.sel_k + row * dh, p.k + row * a.Hkv * dh, (size_t)dh * 8);
        }
        for (int l = 0; l < levels; l++)
            for (int t = 1; t <= 2; t++) {
                outcome x = run(&p, &tables[l], t, APART, whole, 1), y = run(&own, &tables[l], t, PACKED, whole, 1);
                const char *const level = sel_cpu_level_name(tables[l].level);
                CHECK(same_bits(x.out, y.out, q_count(&p)) && same_bits(x.lse, y.lse, rows * a.H) &&
                          same_bits(x.carry, y.carry, rows),
                      "%s, %s, %d threads: head 0's values as sel_q and sel_k: forward has other bits", level, p.name,
                      t);
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t d = 0; d < dh; d++) {
                        y.dq[row * a.H * dh + d] += y.dsel_q[row * dh + d];
                        y.dk[row * a.Hkv * dh + d] += y.dsel_k[row * dh + d];
                    }
                check_near(&p, &tables[l], "dq + dsel_q", "dq", PRODUCT, y.dq, p.r.dq, q_count(&p));
                check_near(&p, &tables[l], "dk + dsel_k", "dk", PRODUCT, y.dk, p.r.dk, k_count(&p));
                outcome_free(&x);
                outcome_free(&y);
            }
        free(own.sel_q);
        free(own.sel_k);
        problem_free(&p);
    }
}

/* P is rounded to bfloat16 operands, forward and backward: without it out would be the reference's, rounded, but for
   values at the border of two, and dv nearer to the reference. */
static void check_rounding(void)
{
    static const int64_t shapes[][2] = { { 64, 0 }, { 16, 0 }, { 40, 0 }, { 64, 70 } };
    for (int c = 0; c < 4; c++) {
        const sel_ref_attention a = { .B = 1, .H = 4, .Hkv = 2, .N = 200, .dh = shapes[c][0], .window = shapes[c][1] };
        problem p = problem_new(&a, 1, HEAD0, 1.0, 9000 + (uint64_t)c);
        for (int l = 0; l < levels; l++)
            for (int t = 1; t <= 2; t++) {
                outcome o = run(&p, &tables[l], t, APART, (const int64_t[]){ 0, a.N }, 1);
                const double dv = distance(o.dv, p.r.dv, k_count(&p)) / norm(p.r.dv, k_count(&p));
                int64_t other = 0;
                for (int64_t i = 0; i < q_count(&p); i++) other += (double)o.out[i] != operand(p.r.out[i]);
                const double share = (double)other / (double)q_count(&p);
                CHECK(share > 0.05 && dv > 3e-4, "%s, %s, %d threads: P is not rounded: %.3g of out's values are not "
                      "the reference's; dv %.3g off", sel_cpu_level_name(tables[l].level), p.name, t, share, dv);
                outcome_free(&o);
            }
        problem_free(&p);
    }
}

static void store_values(uint16_t *to, const double *from, int n)
{
    for (int i = 0; i < n; i++) store_value(to, true, i, (float)from[i]);
}

/* Backward of one row and key with out = 0, so that delta = 0:
       P = exp(-lse), dZ = P (dout . v), dv = P dout, dq = dZ k / 8
   Where each is rounded to bfloat16 shows in the bits; its spacing is 2^-7 above 1, 1 below 256, 2 above. */
static void check_rounding_points(void)
{
    static const struct {
        double P, v[2], dq, dv;
    } cases[] = {
        { 1.0, { 256.0, 0.5 }, 256.0 / 8.0, 1.0 },              /* dZ = 256.5 is rounded */
        { 1.0 + 0x1.8p-9, { 256.0, 0.5 }, 258.0 / 8.0, 1.0 },   /* dZ = 257.25, of P unrounded; dv of P rounded */
    };
    enum { DH = 64 };
    for (int c = 0; c < 2; c++)
        for (int l = 0; l < levels; l++) {
            const uint16_t q[DH] = { 0 };
            uint16_t k[DH] = { 0 }, v[DH] = { 0 }, dout[DH] = { 0 }, out[DH] = { 0 };
            float lse = (float)-log(cases[c].P), dq[DH], dk[DH], dv[DH];
            sel_attention a = { .B = 1, .heads = 1, .kv_heads = 1, .dh = DH, .i1 = 1, .q = q, .k = k, .v = v,
                                .out = out, .lse = &lse, .bfloat16 = true, .threads = 1 };
            const sel_attention_grad g = { .dout = dout, .dq = dq, .dk = dk, .dv = dv };
            store_values(k, (const double[]){ 1.0 }, 1);
            store_values(v, cases[c].v, 2);
            store_values(dout, (const double[]){ 1.0, 1.0 }, 2);
            a.q_seq = a.q_row = a.k_seq = a.k_row = a.v_seq = a.v_row = a.out_seq = a.out_row = DH;
            a.workspace = workspace_new(&a, true);
            tables[l].attention_backward(&a, &g);
            free(a.workspace);
            const double got_dq = (double)dq[0], got_dv = (double)dv[0];
            CHECK(got_dq == cases[c].dq && got_dv == cases[c].dv, "%s, case %d: dq %.9g, not %.9g; dv %.9g, not %.9g",
                  sel_cpu_level_name(tables[l].level), c, got_dq, cases[c].dq, got_dv, cases[c].dv);
        }
}

/* delta = rowsum(dO o out) is made of out as it is: backward of one row and key, out given, P = 1:
       dZ = dout . v - dout . out = 3 - out[0], dq = dZ k / 8 */
static void check_delta(void)
{
    enum { DH = 64 };
    for (int l = 0; l < levels; l++) {
        const uint16_t q[DH] = { 0 };
        uint16_t k[DH] = { 0 }, v[DH] = { 0 }, dout[DH] = { 0 }, out[DH] = { 0 };
        float lse = 0.0f, dq[DH], dk[DH], dv[DH];
        sel_attention a = { .B = 1, .heads = 1, .kv_heads = 1, .dh = DH, .i1 = 1, .q = q, .k = k, .v = v,
                            .out = out, .lse = &lse, .bfloat16 = true, .threads = 1 };
        const sel_attention_grad g = { .dout = dout, .dq = dq, .dk = dk, .dv = dv };
        store_values(k, (const double[]){ 1.0 }, 1);
        store_values(v, (const double[]){ 3.0 }, 1);
        store_values(dout, (const double[]){ 1.0 }, 1);
        store_values(out, (const double[]){ 1.0 + 0x1p-7, 5.0 }, 2);
        a.q_seq = a.q_row = a.k_seq = a.k_row = a.v_seq = a.v_row = a.out_seq = a.out_row = DH;
        a.workspace = workspace_new(&a, true);
        tables[l].attention_backward(&a, &g);
        free(a.workspace);
        const double expected = (2.0 - 0x1p-7) / 8.0;
        CHECK((double)dq[0] == expected, "%s: dq %.9g, not %.9g", sel_cpu_level_name(tables[l].level), (double)dq[0],
              expected);
    }
}

/* Forward rounds P but not its sum: row 1 sees key 0 with P = 1 and key 1 with P = exp(-177/256) = 0.50087, which goes
   into the product as 0.5.  out's first value cancels to 0, its second is 0.5 / 1.50087 by bfloat16 (0.33314 to
   171/512; if the sum had 0.5: 1/3 to 171/512, so it is lse that tells). */
static void check_rounding_forward(void)
{
    enum { DH = 16 };
    for (int l = 0; l < levels; l++) {
        uint16_t q[2 * DH] = { 0 }, k[2 * DH] = { 0 }, v[2 * DH] = { 0 }, out[2 * DH] = { 0 };
        float lse[2];
        sel_attention a = { .B = 1, .heads = 1, .kv_heads = 1, .dh = DH, .i1 = 2, .q = q, .k = k, .v = v,
                            .out = out, .lse = lse, .bfloat16 = true, .threads = 1 };
        store_values(q + DH, (const double[]){ 4.0 }, 1);
        store_values(k + DH, (const double[]){ -177.0 / 256.0 }, 1);
        store_values(v, (const double[]){ -1.0, 0.0 }, 2);
        store_values(v + DH, (const double[]){ 2.0, 1.0 }, 2);
        a.q_seq = a.k_seq = a.v_seq = a.out_seq = 2 * DH;
        a.q_row = a.k_row = a.v_row = a.out_row = DH;
        a.workspace = workspace_new(&a, false);
        tables[l].attention_forward(&a);
        free(a.workspace);
        const double first = (double)load_value(out, true, DH), second = (double)load_value(out, true, DH + 1);
        const double sum = (double)lse[1] - log(1.0 + exp(-177.0 / 256.0));
        CHECK(first == 0.0 && second == 171.0 / 512.0 && fabs(sum) < 1e-4, "%s: out %.9g, %.9g; lse %.3g off",
              sel_cpu_level_name(tables[l].level), first, second, sum);
    }
}

/* Logits of 512 and 256 make softmax pick one key, exactly.  Head 1 picks key 5 until row r has masked it by 1024,
   then key 3: out is a row of v, to the bit of the operands' type, and the row where it changes is r + 1 (r without
   shift). */
static void check_exact_pick(void)
{
    static const int64_t rows[] = { 6, 31, 32, 63, 64, 65, 127, 128, 150 };
    for (int c = 0; c < 2 * 9; c++) {
        const int64_t r = rows[c / 2], N = 200, dh = 16;
        problem p = { .a = { .B = 1, .H = 2, .Hkv = 2, .N = N, .dh = dh, .selective = true, .relu = true,
                             .protect_bos = true, .protect_self = true, .shift = c % 2 == 0 } };
        p.q = room(N * 2 * dh * 8);
        p.k = room(N * 2 * dh * 8);
        p.v = float_normals(N * 2 * dh, 1.0);
        p.dout = float_normals(N * 2 * dh, 1.0);
        memset(p.q, 0, (size_t)(N * 2 * dh) * 8);
        memset(p.k, 0, (size_t)(N * 2 * dh) * 8);
        p.q[r * 2 * dh] = p.k[5 * 2 * dh] = 64.0;                       /* head 0: 64 * 64 / sqrt(16) = 1024 */
        for (int64_t i = 0; i < N; i++) p.q[(i * 2 + 1) * dh] = 64.0;   /* head 1 */
        p.k[(5 * 2 + 1) * dh] = 32.0;
        p.k[(3 * 2 + 1) * dh] = 16.0;
        for (int l = 0; l < levels; l++) {
            outcome o = run(&p, &tables[l], 1, APART, (const int64_t[]){ 0, N }, 1);
            int64_t wrong = 0;
            for (int64_t i = 5; i < N; i++) {
                const int64_t key = i <= r - !p.a.shift ? 5 : 3;
                for (int64_t d = 0; d < dh; d++)
                    wrong += operand((double)o.out[(i * 2 + 1) * dh + d]) != p.v[(key * 2 + 1) * dh + d];
            }
            CHECK(wrong == 0, "%s, row %d, shift %d: %d values differ", sel_cpu_level_name(tables[l].level), (int)r,
                  (int)p.a.shift, (int)wrong);
            outcome_free(&o);
        }
        free(p.q);
        free(p.k);
        free(p.v);
        free(p.dout);
    }
}

/* Every row i >= 2 masks key i - 1 by far more than tau, so M[i] = 3 for all of them: the smallest row wins, whether a
   thread has a sequence for itself or its tiles are dealt to several. */
static void check_memory_tie(int64_t B, int64_t N)
{
    const int64_t dh = 64;
    problem p = { .a = { .B = B, .H = 1, .Hkv = 1, .N = N, .dh = dh, .selective = true, .relu = true,
                         .protect_bos = true, .protect_self = true, .shift = true, .tau = 1.0, .memory_coef = 0.5 } };
    p.v = float_normals(B * N * dh, 1.0);
    p.dout = float_normals(B * N * dh, 1.0);
    p.q = room(B * N * dh * 8);
    p.k = room(B * N * dh * 8);
    memset(p.q, 0, (size_t)(B * N * dh) * 8);
    memset(p.k, 0, (size_t)(B * N * dh) * 8);
    for (int64_t i = 0; i < B * N; i++) {
        p.k[i * dh + i % N % dh] = 8.0;
        if (i % N > 0) p.q[i * dh + (i % N - 1) % dh] = 8.0;
    }
    problem_solve(&p);
    p.scale = 1.0;
    snprintf(p.name, sizeof p.name, "tied memory");
    for (int64_t b = 0; b < B; b++)
        CHECK(p.r.m_row[b] == 2 && p.r.m_max[b] == 3.0, "reference: M[%d] = %g", (int)p.r.m_row[b], p.r.m_max[b]);
    arrays in = arrays_new(&p, APART, 0, N, NAN, RIM, bfloat16);
    tensor_write(&in.q, p.q);
    tensor_write(&in.k, p.k);
    tensor_write(&in.v, p.v);
    for (int l = 0; l < levels; l++)
        for (int round = 0; round < (l < 2 ? 8 : 24); round++) {   /* which thread comes first is chance */
            const int threads = 1 + round % 4;
            outcome o = outcome_new(&p);
            piece c = piece_forward(&p, &tables[l], &in, threads, 0, N, &o);
            for (int64_t b = 0; b < B; b++)
                CHECK(o.m_row[b] == 2 && o.m_max[b] == 3.0, "%s, sequence %d of %d, %d threads: M[%d] = %.17g, not "
                      "M[2] = 3", sel_cpu_level_name(tables[l].level), (int)b, (int)B, threads, (int)o.m_row[b],
                      o.m_max[b]);
            piece_free(&c);
            outcome_free(&o);
        }
    arrays_free(&in);
    problem_free(&p);
}

/* Logits of deviation 16 and more: exp would overflow without the running maximum.  A logit x is rounded to
   x 2^-24, and so is the result: the bound grows with the logits.  With bfloat16 operands rows that are all but one
   key's cancel dP - delta, and what is left is mostly out's rounding, in delta: dq and dk are 1.3e-2 off. */
static void check_large_logits(void)
{
    const sel_ref_attention a = { .B = 1, .H = 3, .Hkv = 3, .N = 130, .dh = 64 };
    for (int s = 0; s < 2; s++) {
        problem p = problem_new(&a, s, HEAD0, 60.0, 6000);
        p.scale = 60.0;
        p.scale_bf16 = 2.0;
        check_whole(&p, 1, APART);
        problem_free(&p);
    }
}

static void check_long(int64_t N, selection_source source)
{
    const sel_ref_attention a = { .B = 1, .H = 2, .Hkv = 2, .N = N, .dh = 64, .tau = 1.0 };
    problem p = problem_new(&a, 1, source, 1.0, 7000);
    check_whole(&p, 2, PACKED);
    problem_free(&p);
}

/* Above 4,096 rows forward saves fewer carries than there are row tiles and backward rebuilds the others: one call
   against several short ones, which save them all (the reference's matrices would not fit). */
static void check_saved_groups(int64_t N)
{
    problem p = { .a = { .B = 1, .H = 2, .Hkv = 1, .N = N, .dh = 8, .selective = true, .relu = true,
                         .protect_bos = true, .protect_self = true, .shift = true } };
    random_seed(8000);
    p.q = float_normals(q_count(&p), 1.0);
    p.k = float_normals(k_count(&p), 1.0);
    p.v = float_normals(k_count(&p), 1.0);
    p.dout = float_normals(q_count(&p), 1.0);
    avoid_kinks(&p);
    for (int64_t i = 0; i < q_count(&p); i++) p.q[i] /= 64.0;   /* so that F stays small and old keys count */
    const int64_t cuts[] = { 0, N / 3, N / 3 + 1500, N }, counts[] = { q_count(&p), k_count(&p), k_count(&p) };
    CHECK(sel_attention_carries(N) < N / 64, "%d rows save %d carries", (int)N, (int)sel_attention_carries(N));
    for (int l = 0; l < levels; l++) {
        outcome x = run(&p, &tables[l], 2, APART, cuts, 3);
        outcome y = run(&p, &tables[l], 2, APART, (const int64_t[]){ 0, N }, 1);
        const float *const pieces[] = { x.dq, x.dk, x.dv }, *const whole[] = { y.dq, y.dk, y.dv };
        for (int g = 0; g < 3; g++) {
            double difference = 0.0, size = 0.0;
            for (int64_t i = 0; i < counts[g]; i++) {
                const double u = (double)pieces[g][i], v = (double)whole[g][i];
                difference += (u - v) * (u - v);
                size += u * u;
            }
            const double bound = bfloat16 ? AGREE_BF16 : BOUND;
            CHECK(sqrt(difference) <= bound * sqrt(size), "%s, N %d: d%c: relative error %.3g",
                  sel_cpu_level_name(tables[l].level), (int)N, "qkv"[g], sqrt(difference / size));
        }
        outcome_free(&x);
        outcome_free(&y);
    }
    free(p.q);
    free(p.k);
    free(p.v);
    free(p.dout);
}

/* Buffers are planned for the longest call.  A shorter one may save more carries than the longest (4,100 rows: 33,
   4,096 rows: 64): it too must stay within what sel_attention_saved_size says. */
static void check_saved_size(int64_t planned, int64_t used)
{
    enum { DH = 8 };
#ifdef __SANITIZE_ADDRESS__
    const int64_t guard = 0;   /* the sanitizer watches the end itself */
#else
    const int64_t guard = 64 * used;
#endif
    const int64_t size = sel_attention_saved_size(planned);
    float *const guarded = room((size + guard) * 4);
    float *const x = room(used * DH * 4), *const out = room(used * DH * 4), *const lse = room(used * 4);

    CHECK(sel_attention_carries(used) > sel_attention_carries(planned), "%d rows save fewer carries", (int)used);
    random_seed(8500);
    for (int64_t i = 0; i < used * DH; i++) x[i] = (float)random_normal() / 8.0f;
    for (int l = 0; l < levels; l++)
        for (int threads = 1; threads <= 2; threads++) {
            for (int64_t i = 0; i < size + guard; i++) guarded[i] = RIM;
            sel_attention a = { .B = 1, .heads = 1, .kv_heads = 1, .dh = DH, .i1 = used, .selective = true,
                                .relu = true, .protect_bos = true, .protect_self = true, .shift = true,
                                .bfloat16 = bfloat16, .q = x, .k = x, .v = x, .out = out, .lse = lse,
                                .saved = guarded, .threads = threads };
            a.q_seq = a.k_seq = a.v_seq = a.out_seq = used * DH;
            a.q_row = a.k_row = a.v_row = a.out_row = DH;
            a.workspace = workspace_new(&a, false);
            tables[l].attention_forward(&a);
            int64_t outside = 0;
            for (int64_t i = size; i < size + guard; i++) outside += guarded[i] != RIM;
            CHECK(outside == 0, "%s, %d threads: %d rows in a buffer for %d: %d values beyond its end",
                  sel_cpu_level_name(tables[l].level), threads, (int)used, (int)planned, (int)outside);
            free(a.workspace);
        }
    free(guarded);
    free(x);
    free(out);
    free(lse);
}

int main(void)
{
    const bool quick = getenv("SEL_TEST_QUICK") != NULL;
    for (int level = SEL_CPU_C; level <= (int)sel_cpu_detect(); level++)
        sel_ops_init(&tables[levels++], (sel_cpu_level)level);

    for (int type = 0; type < 2; type++) {
        bfloat16 = type == 1;
        check_exact_pick();
        check_memory_tie(1, 1000);
        check_memory_tie(2, 200);
        for (selection_source source = HEAD0; source <= BILINEAR; source++) {
            check_grid(quick ? 3 : 1, source);
            check_windows(quick ? 3 : 1, source);
            check_pieces(quick ? 3 : 1, source);
            if (!bfloat16) check_wrongs(source);
            check_long(quick ? 700 : 2048, source);
        }
        if (bfloat16) {
            check_rounding_points();
            check_rounding_forward();
            check_delta();
            check_rounding();
        }
        check_threads();
        check_standard_bits();
        check_selecting_head();
        check_large_logits();
        check_saved_groups(4200);
        if (!quick) check_saved_groups(8300);
    }
    bfloat16 = false;   /* no matter to carries */
    check_saved_size(4100, 4096);
    check_saved_size(8300, 8192);
    printf("%d levels, largest error %.2f of its bound; bfloat16 %.2f, kernels apart %.2f\n", levels, worst[0],
           worst[1], farthest);
    return check_verdict();
}
