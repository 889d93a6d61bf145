/* linear_onednn.c: linear layers by oneDNN's matmul.
 *
 * A product (kind, sizes, strides) is a primitive with its memory objects, made once and kept by the engine for
 * all matrices of that shape; a call only sets the objects' pointers.  The weights of y = x W^T and dx = dy W are
 * reordered after each optimizer step into the layout that oneDNN likes best (blocks of columns), one layout a
 * kind and matrix shape, whatever the rows: all products of the shape share it.  Where oneDNN has no fast
 * product with that layout (on processors without AVX-512, or with rows further apart than their width), the
 * product reads the weights in place.
 */
#include "ops/linear_library.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "core/base/mem.h"
#include "ops/onednn_api.h"

typedef enum { FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, BACKWARD_WEIGHT_ADD, INNER_WEIGHT, KINDS } kind;

/* A product's key.  x_row and y_row: distance of the rows of x (or dx) and of y (or dy). */
typedef struct {
    kind kind;
    sel_dtype dx;                   /* of BACKWARD_INPUT's result; all others are float32 */
    int64_t rows, out, in, x_row, y_row;
} shape;

/* dst = src weights: x, W, y of FORWARD; dy, W, dx of BACKWARD_INPUT; dy, x, dw of BACKWARD_WEIGHT and, added to dw,
   of BACKWARD_WEIGHT_ADD.  INNER_WEIGHT is BACKWARD_WEIGHT by another primitive. */
typedef struct {
    shape shape;
    bool packed;                    /* reads the layout's packed weights, not w in place */
    bool inner;                     /* the primitive is an inner product: its arguments have other names */
    uint64_t used;                  /* the engine's clock at its latest use */
    dnnl_primitive_t primitive;
    dnnl_memory_t src, dst;
    dnnl_memory_t weights;          /* x of the weights' gradients; otherwise NULL: the matrix has it */
} product;

/* How the weights of one kind and matrix shape are packed. */
typedef struct layout {
    struct layout *next;
    shape shape;                    /* its kind, out and in */
    bool packed;                    /* false: oneDNN would rather read w in place */
    descs own;
    desc md;                        /* one of them */
    dnnl_primitive_t reorder;
} layout;

/* Training needs about 20 products.  Serving meets ever new row counts: the least recently used product goes. */
enum { MOST_PRODUCTS = 512 };

typedef struct {
    sel_linear_engine base;
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    layout *layouts;
    product *products;              /* [MOST_PRODUCTS] */
    int n_products;
    uint64_t clock;
    float *sum;                     /* [sum_floats] a gradient by INNER_WEIGHT before it is added */
    size_t sum_floats;              /* of the largest such matrix */
} onednn;

/* One direction's weights. */
typedef struct {
    const layout *layout;
    void *block;                    /* packed copy, NULL where read in place */
    dnnl_memory_t packed, plain;
} weights;

typedef struct {
    sel_linear base;
    weights weights[2];             /* FORWARD, BACKWARD_INPUT */
} matrix;

static const char *kind_name(kind k)
{
    static const char *const names[KINDS] = { "forward", "backward-input", "backward-weight", "backward-weight",
                                              "inner-product weight" };
    return names[k];
}

/* A oneDNN status as ours; the message names the call and the product. */
static sel_status checked(dnnl_status_t status, const char *call, const shape *s)
{
    if (status == dnnl_success) return SEL_OK;
    return sel_fail(status == dnnl_out_of_memory ? SEL_ENOMEM : SEL_EUSER,
                    "oneDNN: %s failed (%s) for the %s product of %" PRId64 " rows with a matrix %" PRId64
                    " x %" PRId64 " (row strides %" PRId64 ", %" PRId64 ")",
                    call, dnnl_status2str(status), kind_name(s->kind), s->rows, s->out, s->in, s->x_row, s->y_row);
}

static dnnl_data_type_t operand_type(sel_dtype dtype) { return dtype == SEL_BFLOAT16 ? dnnl_bf16 : dnnl_f32; }

/* ---- descriptors ---- */

/* dst = src weights, or dst += src weights. */
static dnnl_status_t describe_matmul(dnnl_primitive_desc_t *pd, dnnl_engine_t engine, desc src, desc weights_md,
                                     desc dst, bool accumulate)
{
    dnnl_primitive_attr_t attr = NULL;
    dnnl_post_ops_t post_ops = NULL;
    dnnl_status_t rc = dnnl_primitive_attr_create(&attr);
    if (rc == dnnl_success && accumulate) {
        rc = dnnl_post_ops_create(&post_ops);
        if (rc == dnnl_success) rc = append_sum(post_ops);
        if (rc == dnnl_success) rc = dnnl_primitive_attr_set_post_ops(attr, post_ops);
        if (post_ops) dnnl_post_ops_destroy(post_ops);
    }
    if (rc == dnnl_success) rc = matmul_desc(pd, engine, src, weights_md, dst, attr);
    if (attr) dnnl_primitive_attr_destroy(attr);
    return rc;
}

/* dw [out][in] = dy^T x by the inner product's own backward pass, which cannot add; w: any descriptor of the weights.
 */
static dnnl_status_t describe_inner_weight(dnnl_primitive_desc_t *pd, dnnl_engine_t engine, desc x, desc dy, desc dw,
                                           desc w)
{
    dnnl_primitive_desc_t hint = NULL;
    dnnl_status_t rc = inner_forward_desc(&hint, engine, x, w, dy);
    if (rc == dnnl_success) rc = inner_weight_desc(pd, engine, x, dw, dy, hint);
    if (hint) dnnl_primitive_desc_destroy(hint);
    return rc;
}

/* The weights as the caller stores them, [out][in] of `type`: columns of W^T for FORWARD, W itself for
   BACKWARD_INPUT. */
static desc describe_plain_weights(descs *d, dnnl_data_type_t type, const shape *s)
{
    return s->kind == FORWARD ? describe(d, type, s->in, s->out, 1, s->in) : describe(d, type, s->out, s->in, s->in, 1);
}

/* The operand of `type` and the result. */
static void describe_ends(descs *d, const shape *s, dnnl_data_type_t type, desc *src, desc *dst)
{
    if (s->kind == FORWARD) {
        *src = describe(d, type, s->rows, s->in, s->x_row, 1);
        *dst = describe(d, dnnl_f32, s->rows, s->out, s->y_row, 1);
    } else if (s->kind == BACKWARD_INPUT) {
        *src = describe(d, type, s->rows, s->out, s->y_row, 1);
        *dst = describe(d, operand_type(s->dx), s->rows, s->in, s->x_row, 1);
    } else {
        *src = describe(d, type, s->out, s->rows, 1, s->y_row);   /* dy^T */
        *dst = describe(d, dnnl_f32, s->out, s->in, s->in, 1);
    }
}

static sel_status described(const descs *d, const shape *s) { return checked(d->status, "a memory descriptor", s); }

/* ---- products ---- */

/* oneDNN's last resort, a plain loop nest, calls itself "ref". */
static bool is_slow(const_dnnl_primitive_desc_t pd)
{
    const char *info = NULL;
    return dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, &info) != dnnl_success || !info ||
           strncmp(info, "ref", 3) == 0;
}

static void product_free(product *p)
{
    if (p->primitive) dnnl_primitive_destroy(p->primitive);
    if (p->src) dnnl_memory_destroy(p->src);
    if (p->dst) dnnl_memory_destroy(p->dst);
    if (p->weights) dnnl_memory_destroy(p->weights);
    *p = (product){ 0 };
}

/* The primitive and the memory objects of *p, the latter without their pointers yet; weights_md may be NULL. */
static sel_status product_finish(product *p, onednn *e, const_dnnl_primitive_desc_t pd, desc src, desc weights_md,
                                 desc dst)
{
    const shape *s = &p->shape;
    SEL_TRY(checked(dnnl_primitive_create(&p->primitive, pd), "dnnl_primitive_create", s));
    SEL_TRY(checked(dnnl_memory_create(&p->src, src, e->engine, DNNL_MEMORY_NONE), "dnnl_memory_create", s));
    SEL_TRY(checked(dnnl_memory_create(&p->dst, dst, e->engine, DNNL_MEMORY_NONE), "dnnl_memory_create", s));
    if (!weights_md) return SEL_OK;
    return checked(dnnl_memory_create(&p->weights, weights_md, e->engine, DNNL_MEMORY_NONE), "dnnl_memory_create", s);
}

/* An INNER_WEIGHT where oneDNN has a fast one: its src is dy, its weights are x.  *pd stays NULL where it has not. */
static sel_status describe_inner(descs *d, dnnl_primitive_desc_t *pd, onednn *e, const shape *s, desc *dy, desc *x,
                                 desc *dw)
{
    const dnnl_data_type_t type = operand_type(e->base.dtype);
    *x = describe(d, type, s->rows, s->in, s->x_row, 1);
    *dy = describe(d, type, s->rows, s->out, s->y_row, 1);
    *dw = describe(d, dnnl_f32, s->out, s->in, s->in, 1);
    const desc w = describe_any(d, type, s->out, s->in);
    SEL_TRY(described(d, s));
    if (describe_inner_weight(pd, e->engine, *x, *dy, *dw, w) == dnnl_success && is_slow(*pd)) {
        dnnl_primitive_desc_destroy(*pd);
        *pd = NULL;
    }
    return SEL_OK;
}

/* A matmul; packing says how the weights may be packed (NULL for the weights' gradients), p->packed whether they are.
   *w is NULL where the matrix has the weights' memory. */
static sel_status describe_product(descs *d, product *p, dnnl_primitive_desc_t *pd, onednn *e, const layout *packing,
                                   desc *src, desc *w, desc *dst)
{
    const shape *s = &p->shape;
    const bool gradient = s->kind >= BACKWARD_WEIGHT;
    const dnnl_data_type_t type = operand_type(e->base.dtype);

    describe_ends(d, s, type, src, dst);
    SEL_TRY(described(d, s));
    if (packing && packing->packed) {
        const dnnl_status_t got = describe_matmul(pd, e->engine, *src, packing->md, *dst, false);
        p->packed = got == dnnl_success && (!is_slow(*pd) || type != dnnl_f32);
        if (p->packed) return SEL_OK;
        if (got == dnnl_success) dnnl_primitive_desc_destroy(*pd);
        *pd = NULL;
    }
    if (!gradient && type != dnnl_f32)   /* there is no float32 matrix that it could read in place */
        return checked(dnnl_unimplemented, "dnnl_primitive_desc_create", s);
    const desc plain = gradient ? describe(d, type, s->rows, s->in, s->x_row, 1) : describe_plain_weights(d, type, s);
    SEL_TRY(described(d, s));
    if (gradient) *w = plain;
    return checked(describe_matmul(pd, e->engine, *src, plain, *dst, s->kind == BACKWARD_WEIGHT_ADD),
                   "dnnl_primitive_desc_create", s);
}

/* Fills *p for s. */
static sel_status product_make(product *p, onednn *e, const shape *s, const layout *packing)
{
    descs d = { .n = 0 }, other = { .n = 0 };
    desc src = NULL, w = NULL, dst = NULL;
    dnnl_primitive_desc_t pd = NULL;
    sel_status rc = SEL_OK;

    *p = (product){ .shape = *s };
    if (s->kind == INNER_WEIGHT) rc = describe_inner(&d, &pd, e, s, &src, &w, &dst);
    p->inner = pd != NULL;
    if (rc == SEL_OK && !pd) rc = describe_product(&other, p, &pd, e, packing, &src, &w, &dst);
    if (rc == SEL_OK) rc = product_finish(p, e, pd, src, w, dst);
    if (pd) dnnl_primitive_desc_destroy(pd);
    descs_free(&d);
    descs_free(&other);
    if (rc != SEL_OK) product_free(p);
    return rc;
}

static bool same_shape(const shape *a, const shape *b)
{
    return a->kind == b->kind && a->dx == b->dx && a->rows == b->rows && a->out == b->out && a->in == b->in &&
           a->x_row == b->x_row && a->y_row == b->y_row;
}

/* The engine's product of that shape, made where it is missing. */
static sel_status product_get(product **out, onednn *e, const shape *s, const layout *packing)
{
    product *oldest = e->products;
    for (int i = 0; i < e->n_products; i++) {
        product *p = &e->products[i];
        if (same_shape(&p->shape, s)) {
            p->used = ++e->clock;
            *out = p;
            return SEL_OK;
        }
        if (p->used < oldest->used) oldest = p;
    }
    product made;
    SEL_TRY(product_make(&made, e, s, packing));
    product *place = oldest;
    if (e->n_products < MOST_PRODUCTS) place = &e->products[e->n_products++];
    else product_free(oldest);
    made.used = ++e->clock;
    *place = made;
    *out = place;
    return SEL_OK;
}

static sel_status execute(onednn *e, dnnl_primitive_t primitive, int n, const dnnl_exec_arg_t *args, const shape *s)
{
    SEL_TRY(checked(dnnl_primitive_execute(primitive, e->stream, n, args), "dnnl_primitive_execute", s));
    return checked(dnnl_stream_wait(e->stream), "dnnl_stream_wait", s);
}

/* oneDNN takes pointers without const, also to what it only reads. */
static sel_status point(dnnl_memory_t memory, const void *data, const shape *s)
{
    return checked(dnnl_memory_set_data_handle(memory, (void *)(uintptr_t)data), "dnnl_memory_set_data_handle", s);
}

static sel_status product_run(onednn *e, product *p, const void *src, dnnl_memory_t weights_memory, void *dst)
{
    SEL_TRY(point(p->src, src, &p->shape));
    SEL_TRY(point(p->dst, dst, &p->shape));
    const bool inner = p->inner;
    const dnnl_exec_arg_t args[] = {
        { inner ? DNNL_ARG_DIFF_DST : DNNL_ARG_SRC, p->src },
        { inner ? DNNL_ARG_SRC : DNNL_ARG_WEIGHTS, weights_memory },
        { inner ? DNNL_ARG_DIFF_WEIGHTS : DNNL_ARG_DST, p->dst },
    };
    return execute(e, p->primitive, 3, args, &p->shape);
}

/* ---- layouts ---- */

/* The layout that oneDNN wants for many rows without gaps, into made->md; NULL: w as it is.  Rows play no part in its
   choice of blocks, so any count serves. */
static sel_status layout_describe(layout *made, onednn *e, descs *d)
{
    const shape *s = &made->shape;
    const dnnl_data_type_t type = operand_type(e->base.dtype);
    dnnl_primitive_desc_t pd = NULL;
    desc src, dst;

    describe_ends(d, s, type, &src, &dst);
    const desc any =
        s->kind == FORWARD ? describe_any(d, type, s->in, s->out) : describe_any(d, type, s->out, s->in);
    SEL_TRY(described(d, s));
    SEL_TRY(checked(describe_matmul(&pd, e->engine, src, any, dst, false), "dnnl_primitive_desc_create", s));
    const desc wanted = dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0);
    if (wanted && !is_plain(wanted) && !is_slow(pd)) made->md = describe_again(&made->own, wanted);
    dnnl_primitive_desc_destroy(pd);
    /* float32 weights cannot be read in place where operands are bfloat16: a plain copy of the type */
    if (!made->md && type != dnnl_f32) made->md = describe_plain_weights(&made->own, type, s);
    return described(&made->own, s);
}

static sel_status layout_reorder(layout *made, onednn *e, descs *d)
{
    const shape *s = &made->shape;
    dnnl_primitive_desc_t pd = NULL;
    const desc plain = describe_plain_weights(d, dnnl_f32, s);
    SEL_TRY(described(d, s));
    SEL_TRY(checked(dnnl_reorder_primitive_desc_create(&pd, plain, e->engine, made->md, e->engine, NULL),
                    "dnnl_reorder_primitive_desc_create", s));
    const sel_status rc = checked(dnnl_primitive_create(&made->reorder, pd), "dnnl_primitive_create", s);
    dnnl_primitive_desc_destroy(pd);
    return rc;
}

static sel_status layout_make(layout *made, onednn *e)
{
    descs d = { .n = 0 };
    sel_status rc = layout_describe(made, e, &d);
    made->packed = made->md != NULL;
    if (rc == SEL_OK && made->packed) rc = layout_reorder(made, e, &d);
    descs_free(&d);
    return rc;
}

static void layout_free(layout *gone)
{
    if (gone->reorder) dnnl_primitive_destroy(gone->reorder);
    descs_free(&gone->own);
    free(gone);
}

static sel_status layout_get(const layout **out, onednn *e, kind k, int64_t n_out, int64_t n_in)
{
    const shape s = { .kind = k, .rows = 512, .out = n_out, .in = n_in, .x_row = n_in, .y_row = n_out };
    for (layout *at = e->layouts; at; at = at->next)
        if (same_shape(&at->shape, &s)) {
            *out = at;
            return SEL_OK;
        }
    layout *made = calloc(1, sizeof *made);
    if (!made) return sel_fail(SEL_ENOMEM, "oneDNN: no memory for a layout of %" PRId64 " x %" PRId64, n_out, n_in);
    made->shape = s;
    const sel_status rc = layout_make(made, e);
    if (rc != SEL_OK) {
        layout_free(made);
        return rc;
    }
    made->next = e->layouts;
    e->layouts = made;
    *out = made;
    return SEL_OK;
}

static sel_status weights_make(weights *w, onednn *e, kind k, int64_t n_out, int64_t n_in, size_t *counted)
{
    SEL_TRY(layout_get(&w->layout, e, k, n_out, n_in));
    const shape *s = &w->layout->shape;
    descs d = { .n = 0 };
    const desc plain = describe_plain_weights(&d, dnnl_f32, s);
    sel_status rc = described(&d, s);
    if (rc == SEL_OK)
        rc = checked(dnnl_memory_create(&w->plain, plain, e->engine, DNNL_MEMORY_NONE), "dnnl_memory_create", s);
    descs_free(&d);
    if (rc != SEL_OK || !w->layout->packed) return rc;
    const size_t bytes = dnnl_memory_desc_get_size(w->layout->md);
    w->block = sel_alloc(bytes, "the packed weights of a linear layer");
    if (!w->block) return SEL_ENOMEM;
    *counted += bytes;
    return checked(dnnl_memory_create(&w->packed, w->layout->md, e->engine, w->block), "dnnl_memory_create", s);
}

static void weights_free(weights *w)
{
    if (w->packed) dnnl_memory_destroy(w->packed);
    if (w->plain) dnnl_memory_destroy(w->plain);
    sel_free(w->block);
}

static sel_status weights_pack(weights *w, onednn *e, const float *data)
{
    const shape *s = &w->layout->shape;
    SEL_TRY(point(w->plain, data, s));
    if (!w->layout->packed) return SEL_OK;
    const dnnl_exec_arg_t args[] = { { DNNL_ARG_FROM, w->plain }, { DNNL_ARG_TO, w->packed } };
    return execute(e, w->layout->reorder, 2, args, s);
}

/* ---- the library's calls ---- */

static sel_status onednn_open(sel_linear_engine *base)
{
    onednn *e = (onednn *)base;
    const dnnl_version_t *v = dnnl_version();
    snprintf(base->version, sizeof base->version, "oneDNN %d.%d.%d", v->major, v->minor, v->patch);
    if (v->major != DNNL_VERSION_MAJOR)
        return sel_fail(SEL_EUSER, "%s is loaded, but this program was built for oneDNN %d", base->version,
                        DNNL_VERSION_MAJOR);
    if (v->cpu_runtime != DNNL_RUNTIME_OMP && !(v->cpu_runtime == DNNL_RUNTIME_SEQ && base->threads == 1))
        return sel_fail(SEL_EUSER, "%s was built without OpenMP and cannot be given %d threads; use one that was, or "
                        "compute.linear_backend: openblas", base->version, base->threads);
    e->products = calloc(MOST_PRODUCTS, sizeof *e->products);
    if (!e->products) return sel_fail(SEL_ENOMEM, "oneDNN: no memory for the table of products");
    dnnl_status_t rc = dnnl_engine_create(&e->engine, dnnl_cpu, 0);
    if (rc == dnnl_success) rc = dnnl_stream_create(&e->stream, e->engine, dnnl_stream_default_flags);
    if (rc == dnnl_success) return SEL_OK;
    return sel_fail(rc == dnnl_out_of_memory ? SEL_ENOMEM : SEL_EUSER, "%s: no CPU engine (%s)", base->version,
                    dnnl_status2str(rc));
}

static void onednn_close(sel_linear_engine *base)
{
    onednn *e = (onednn *)base;
    for (int i = 0; i < e->n_products; i++) product_free(&e->products[i]);
    free(e->products);
    sel_free(e->sum);
    while (e->layouts) {
        layout *gone = e->layouts;
        e->layouts = gone->next;
        layout_free(gone);
    }
    if (e->stream) dnnl_stream_destroy(e->stream);
    if (e->engine) dnnl_engine_destroy(e->engine);
}

static bool packs(const sel_linear *base, kind k)
{
    return base->by[k == FORWARD ? SEL_LINEAR_FORWARD : SEL_LINEAR_INPUT] != SEL_BY_BLAS &&
           (k == FORWARD || base->backward);
}

/* Room to make a gradient apart before it is added. */
static sel_status reserve_sum(onednn *e, size_t floats)
{
    if (floats <= e->sum_floats) return SEL_OK;
    sel_free(e->sum);
    e->sum_floats = 0;
    e->sum = sel_alloc(floats * sizeof *e->sum, "the gradient of a linear layer");
    if (!e->sum) return SEL_ENOMEM;
    e->sum_floats = floats;
    return SEL_OK;
}

static sel_status onednn_make(sel_linear *base)
{
    matrix *m = (matrix *)base;
    onednn *e = (onednn *)base->engine;
    for (int k = FORWARD; k <= BACKWARD_INPUT; k++)
        if (packs(base, (kind)k))
            SEL_TRY(weights_make(&m->weights[k], e, (kind)k, base->out, base->in, &base->bytes));
    if (!base->backward || base->by[SEL_LINEAR_WEIGHT] != SEL_BY_INNER) return SEL_OK;
    return reserve_sum(e, (size_t)(base->out * base->in));
}

static void onednn_drop(sel_linear *base)
{
    matrix *m = (matrix *)base;
    weights_free(&m->weights[FORWARD]);
    weights_free(&m->weights[BACKWARD_INPUT]);
}

static sel_status onednn_pack(sel_linear *base, const float *w)
{
    matrix *m = (matrix *)base;
    for (int k = FORWARD; k <= BACKWARD_INPUT; k++)
        if (packs(base, (kind)k)) SEL_TRY(weights_pack(&m->weights[k], (onednn *)base->engine, w));
    return SEL_OK;
}

/* The matrix's product of that kind and shape; dx is float32 but for BACKWARD_INPUT. */
static sel_status product_of(product **p, const sel_linear *base, kind k, sel_dtype dx, int64_t rows, int64_t x_row,
                             int64_t y_row)
{
    const matrix *m = (const matrix *)base;
    const shape s = { .kind = k, .dx = dx, .rows = rows, .out = base->out, .in = base->in, .x_row = x_row,
                      .y_row = y_row };
    return product_get(p, (onednn *)base->engine, &s, k >= BACKWARD_WEIGHT ? NULL : m->weights[k].layout);
}

static sel_status onednn_prepare(sel_linear *base, int64_t rows, int64_t x_row, int64_t y_row, sel_dtype dx)
{
    const char by = base->by[SEL_LINEAR_WEIGHT];
    product *p;
    if (packs(base, FORWARD)) SEL_TRY(product_of(&p, base, FORWARD, SEL_FLOAT32, rows, x_row, y_row));
    if (packs(base, BACKWARD_INPUT)) SEL_TRY(product_of(&p, base, BACKWARD_INPUT, dx, rows, x_row, y_row));
    if (!base->backward || by == SEL_BY_BLAS) return SEL_OK;
    if (by == SEL_BY_INNER) return product_of(&p, base, INNER_WEIGHT, SEL_FLOAT32, rows, x_row, y_row);
    SEL_TRY(product_of(&p, base, BACKWARD_WEIGHT, SEL_FLOAT32, rows, x_row, y_row));
    return product_of(&p, base, BACKWARD_WEIGHT_ADD, SEL_FLOAT32, rows, x_row, y_row);
}

/* dst = src times the matrix in the direction of the kind */
static sel_status multiply(sel_linear *base, kind k, sel_dtype dx, int64_t rows, int64_t x_row, int64_t y_row,
                           const void *src, void *dst)
{
    const weights *w = &((const matrix *)base)->weights[k];
    product *p;
    SEL_TRY(product_of(&p, base, k, dx, rows, x_row, y_row));
    return product_run((onednn *)base->engine, p, src, p->packed ? w->packed : w->plain, dst);
}

static sel_status onednn_forward(sel_linear *base, int64_t rows, const void *x, int64_t x_row, float *y,
                                 int64_t y_row)
{
    return multiply(base, FORWARD, SEL_FLOAT32, rows, x_row, y_row, x, y);
}

static sel_status onednn_backward_input(sel_linear *base, int64_t rows, const void *dy, int64_t dy_row, void *dx,
                                        sel_dtype type, int64_t dx_row)
{
    return multiply(base, BACKWARD_INPUT, type, rows, dx_row, dy_row, dy, dx);
}

static sel_status onednn_backward_weight(sel_linear *base, int64_t rows, const void *dy, int64_t dy_row,
                                         const void *x, int64_t x_row, float *dw, bool add)
{
    onednn *e = (onednn *)base->engine;
    const bool inner = base->by[SEL_LINEAR_WEIGHT] == SEL_BY_INNER;
    const int64_t n = base->out * base->in;
    product *p;
    SEL_TRY(product_of(&p, base, inner ? INNER_WEIGHT : add ? BACKWARD_WEIGHT_ADD : BACKWARD_WEIGHT, SEL_FLOAT32, rows,
                       x_row, dy_row));
    SEL_TRY(point(p->weights, x, &p->shape));
    if (!inner || !add) return product_run(e, p, dy, p->weights, dw);
    SEL_TRY(product_run(e, p, dy, p->weights, e->sum));
    const float *const sum = e->sum;
    #pragma omp parallel for simd num_threads(base->engine->threads) schedule(static)
    for (int64_t i = 0; i < n; i++) dw[i] += sum[i];
    return SEL_OK;
}

const sel_linear_library_calls sel_linear_onednn_calls = {
    .engine_bytes = sizeof(onednn),
    .matrix_bytes = sizeof(matrix),
    .open = onednn_open,
    .close = onednn_close,
    .make = onednn_make,
    .drop = onednn_drop,
    .pack = onednn_pack,
    .prepare = onednn_prepare,
    .forward = onednn_forward,
    .backward_input = onednn_backward_input,
    .backward_weight = onednn_backward_weight,
};
