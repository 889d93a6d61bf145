/* onednn_api.h: what differs between oneDNN 2 and 3: memory descriptors (values there, objects here) and how
 * primitive descriptors are made.  Only linear_onednn.c includes it.
 */
#ifndef SEL_OPS_ONEDNN_API_H
#define SEL_OPS_ONEDNN_API_H

#include <dnnl.h>
#include <dnnl_debug.h>
#include <stdbool.h>
#include <stdint.h>

/* Descriptors that are freed together; the first failure to make one is kept. */
enum { MOST_DESCS = 4 };
typedef struct {
    dnnl_memory_desc_t at[MOST_DESCS];
    int n;
    dnnl_status_t status;
} descs;

#if DNNL_VERSION_MAJOR == 2

typedef const dnnl_memory_desc_t *desc;

static inline void descs_free(descs *d) { d->n = 0; }
static inline desc descs_made(descs *d, dnnl_status_t rc)
{
    if (rc != dnnl_success) d->status = rc;
    return &d->at[d->n++];
}

/* rows x columns of a type, `row` and `column` elements apart */
static inline desc describe(descs *d, dnnl_data_type_t type, int64_t rows, int64_t columns, int64_t row, int64_t column)
{
    const dnnl_dims_t dims = { rows, columns }, strides = { row, column };
    return descs_made(d, dnnl_memory_desc_init_by_strides(&d->at[d->n], 2, dims, type, strides));
}

static inline desc describe_any(descs *d, dnnl_data_type_t type, int64_t rows, int64_t columns)
{
    const dnnl_dims_t dims = { rows, columns };
    return descs_made(d, dnnl_memory_desc_init_by_tag(&d->at[d->n], 2, dims, type, dnnl_format_tag_any));
}

static inline desc describe_again(descs *d, desc of)
{
    d->at[d->n] = *of;
    return descs_made(d, dnnl_success);
}

static inline bool is_plain(desc md)
{
    return md->format_kind == dnnl_blocked && md->format_desc.blocking.inner_nblks == 0;
}

static inline dnnl_status_t append_sum(dnnl_post_ops_t ops) { return dnnl_post_ops_append_sum(ops, 1.0f); }

static inline dnnl_status_t matmul_desc(dnnl_primitive_desc_t *pd, dnnl_engine_t engine, desc src, desc weights,
                                        desc dst, const_dnnl_primitive_attr_t attr)
{
    dnnl_matmul_desc_t m;
    const dnnl_status_t rc = dnnl_matmul_desc_init(&m, src, weights, NULL, dst);
    return rc == dnnl_success ? dnnl_primitive_desc_create(pd, &m, attr, engine, NULL) : rc;
}

static inline dnnl_status_t inner_forward_desc(dnnl_primitive_desc_t *pd, dnnl_engine_t engine, desc src, desc weights,
                                               desc dst)
{
    dnnl_inner_product_desc_t f;
    const dnnl_status_t rc = dnnl_inner_product_forward_desc_init(&f, dnnl_forward_training, src, weights, NULL, dst);
    return rc == dnnl_success ? dnnl_primitive_desc_create(pd, &f, NULL, engine, NULL) : rc;
}

static inline dnnl_status_t inner_weight_desc(dnnl_primitive_desc_t *pd, dnnl_engine_t engine, desc src, desc dw,
                                              desc ddst, const_dnnl_primitive_desc_t hint)
{
    dnnl_inner_product_desc_t b;
    const dnnl_status_t rc = dnnl_inner_product_backward_weights_desc_init(&b, src, dw, NULL, ddst);
    return rc == dnnl_success ? dnnl_primitive_desc_create(pd, &b, NULL, engine, hint) : rc;
}

#elif DNNL_VERSION_MAJOR == 3

typedef const_dnnl_memory_desc_t desc;

static inline void descs_free(descs *d)
{
    while (d->n > 0) dnnl_memory_desc_destroy(d->at[--d->n]);
}

static inline desc descs_made(descs *d, dnnl_status_t rc)
{
    if (rc == dnnl_success) return d->at[d->n++];
    d->status = rc;
    return NULL;
}

static inline desc describe(descs *d, dnnl_data_type_t type, int64_t rows, int64_t columns, int64_t row, int64_t column)
{
    const dnnl_dims_t dims = { rows, columns }, strides = { row, column };
    return descs_made(d, dnnl_memory_desc_create_with_strides(&d->at[d->n], 2, dims, type, strides));
}

static inline desc describe_any(descs *d, dnnl_data_type_t type, int64_t rows, int64_t columns)
{
    const dnnl_dims_t dims = { rows, columns };
    return descs_made(d, dnnl_memory_desc_create_with_tag(&d->at[d->n], 2, dims, type, dnnl_format_tag_any));
}

static inline desc describe_again(descs *d, desc of) { return descs_made(d, dnnl_memory_desc_clone(&d->at[d->n], of)); }

static inline bool is_plain(desc md)
{
    dnnl_format_kind_t format;
    int blocks;
    return dnnl_memory_desc_query(md, dnnl_query_format_kind, &format) == dnnl_success && format == dnnl_blocked &&
           dnnl_memory_desc_query(md, dnnl_query_inner_nblks_s32, &blocks) == dnnl_success && blocks == 0;
}

static inline dnnl_status_t append_sum(dnnl_post_ops_t ops)
{
    return dnnl_post_ops_append_sum(ops, 1.0f, 0, dnnl_data_type_undef);
}

static inline dnnl_status_t matmul_desc(dnnl_primitive_desc_t *pd, dnnl_engine_t engine, desc src, desc weights,
                                        desc dst, const_dnnl_primitive_attr_t attr)
{
    return dnnl_matmul_primitive_desc_create(pd, engine, src, weights, NULL, dst, attr);
}

static inline dnnl_status_t inner_forward_desc(dnnl_primitive_desc_t *pd, dnnl_engine_t engine, desc src, desc weights,
                                               desc dst)
{
    return dnnl_inner_product_forward_primitive_desc_create(pd, engine, dnnl_forward_training, src, weights, NULL, dst,
                                                            NULL);
}

static inline dnnl_status_t inner_weight_desc(dnnl_primitive_desc_t *pd, dnnl_engine_t engine, desc src, desc dw,
                                              desc ddst, const_dnnl_primitive_desc_t hint)
{
    return dnnl_inner_product_backward_weights_primitive_desc_create(pd, engine, src, dw, NULL, ddst, hint, NULL);
}

#else
#error "linear layers are written for oneDNN 2 and 3"
#endif

#endif
