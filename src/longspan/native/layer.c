/* A decoder layer around its attention: all of it for up to MAX_ROWS rows, what lies between its products for more.
 *
 * Holds two kernels for CPUs that take up to MAX_ROWS rows: the part before attention (norm, projections, rotary
 * embedding) and the part behind it (projection, residual, norm, gated MLP, residual). For more rows, whose products a
 * BLAS computes faster, it holds the five steps between the products. Must not know Python, torch or attention. Called
 * from longspan/native/layer.py.
 *
 * A decode step spends more time between its operators than in them: some forty small ones a layer, at 5 us each. Here
 * they are two calls. Everything is float32 but packed weights. Norms are root mean square norms; a weight that a layer lacks is NULL.
 */

#include "gate.h"
#include "linear.h"

typedef struct {
    const float *before_attention;           /* [hidden] norm */
    longspan_matrix q, k, v;                 /* [heads * width, hidden], [kv_heads * width, hidden] twice */
    const float *q_bias, *k_bias, *v_bias;
    const float *q_norm, *k_norm;            /* [width], per head */
    longspan_matrix o;                       /* [hidden, heads * width] */
    const float *o_bias;                     /* [hidden] */
    const float *behind_attention;           /* [hidden] norm of what attention adds, or NULL */
    const float *before_mlp;                 /* [hidden] norm */
    longspan_matrix gate, up, down;          /* [inner, hidden] twice, [hidden, inner]; unset where inner is 0 */
    const float *behind_mlp;                 /* [hidden] norm of what the MLP adds, or NULL */
    long hidden, inner, heads, kv_heads, width;
    long has_rope, activation;
    double epsilon, head_epsilon;            /* of the norms over hidden, and per head */
} longspan_layer;

/* y = x * weight / sqrt(mean(x^2) + epsilon); x and y may be one. */
static void rms_norm(const float *x, const float *weight, long width, double epsilon, float *y)
{
    vec squares = {0};
    for (long c = 0; c < width; c += LANES) {
        const vec part = load(x, c, 0);
        squares += part * part;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)width + (float)epsilon);
    for (long c = 0; c < width; c += LANES) {
        const vec value = load(x, c, 0) * factor * load(weight, c, 0);
        put(y + c, value);
    }
}

/* y = a + b; y and b may be one. */
static void add(const float *a, const float *b, long width, float *y)
{
    for (long c = 0; c < width; c += LANES) {
        const vec value = load(a, c, 0) + load(b, c, 0);
        put(y + c, value);
    }
}

/* One head of one row: bias, norm and rotary embedding, from x to y. */
static void finish_head(const float *x, const float *bias, const float *norm, double epsilon,
                                     const float *cos, const float *sin, long width, float *y)
{
    memcpy(y, x, width * sizeof *y);
    if (bias)
        add(bias, y, width, y);
    if (norm)
        rms_norm(y, norm, width, epsilon, y);
    if (!cos)
        return;
    const long half = width / 2;
    for (long i = 0; i < half; i++) {
        const float a = y[i], b = y[i + half];
        y[i] = a * cos[i] - b * sin[i];
        y[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* Products of rows with q, k and v; a stride is from row to row. */
typedef struct {
    const float *q, *k, *v;
    long q_stride, kv_stride;
} projected_rows;

/* The head-th of a row's heads (those of q, then k, then v) to q [.., heads, width], k and v [kv_heads, .., width], whose
 * heads are kv_head_stride apart. */
static void finish_one(const longspan_layer *l, const projected_rows *from, long r, long head, const float *cos,
                       const float *sin, float *q, float *k, float *v, long kv_head_stride)
{
    const long width = l->width, own = head < l->heads ? head : (head - l->heads) % l->kv_heads;
    const float *row_cos = l->has_rope ? cos + r * width : NULL, *row_sin = l->has_rope ? sin + r * width : NULL;
    if (head < l->heads)
        finish_head(from->q + r * from->q_stride + own * width, l->q_bias ? l->q_bias + own * width : NULL, l->q_norm,
                    l->head_epsilon, row_cos, row_sin, width, q + (r * l->heads + own) * width);
    else if (head < l->heads + l->kv_heads)
        finish_head(from->k + r * from->kv_stride + own * width, l->k_bias ? l->k_bias + own * width : NULL, l->k_norm,
                    l->head_epsilon, row_cos, row_sin, width, k + own * kv_head_stride + r * width);
    else
        finish_head(from->v + r * from->kv_stride + own * width, l->v_bias ? l->v_bias + own * width : NULL, NULL, 0.0,
                    NULL, NULL, width, v + own * kv_head_stride + r * width);
}

/* sum: the projection of a row's attention on entry, with the residual on return; normed: the MLP's input. */
static void add_attention(const longspan_layer *l, const float *x, float *sum, float *normed)
{
    if (l->o_bias)
        add(l->o_bias, sum, l->hidden, sum);
    if (l->behind_attention)
        rms_norm(sum, l->behind_attention, l->hidden, l->epsilon, sum);
    add(x, sum, l->hidden, sum);
    rms_norm(sum, l->before_mlp, l->hidden, l->epsilon, normed);
}

/* From the MLP's output of a row to the layer's output y, which may be the same memory. */
static void add_mlp(const longspan_layer *l, const float *mlp, const float *added, float *y)
{
    if (l->behind_mlp)
        rms_norm(mlp, l->behind_mlp, l->hidden, l->epsilon, y);
    add(added, l->behind_mlp ? y : mlp, l->hidden, y);
}

static int is_supported(const longspan_layer *l, long rows, int num_threads)
{
    return num_threads >= 1 && rows >= 1 && l->hidden > 0 && l->hidden % LANES == 0 &&
           l->inner >= 0 && l->inner % LANES == 0 && l->width > 0 && l->width % LANES == 0;
}

/* Outputs of one matrix in [first, last) of the outputs of several matrices, where this one's begin at `offset`. */
static void some_outputs(const float *x, const longspan_matrix *w, long width, int rows, long offset, long num_out, long first,
                         long last, float *y, long y_stride)
{
    const long from = first > offset ? first - offset : 0;
    const long to = last - offset < num_out ? last - offset : num_out;
    if (from < to)
        longspan_matrix_outputs(x, w, width, rows, from, to, y + offset, y_stride);
}

/* x [rows, hidden] to q [rows, heads, width], k and v [kv_heads, rows, width]; cos and sin [rows, width].
 *
 * scratch: rows * (hidden + (heads + 2 * kv_heads) * width) floats. All contiguous.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_before_attention(const longspan_layer *l, const float *x, const float *cos, const float *sin, int rows,
                              int num_threads, float *scratch, float *q, float *k, float *v)
{
    if (!is_supported(l, rows, num_threads) || rows > MAX_ROWS)
        return 1;
    const long q_out = l->heads * l->width, kv_out = l->kv_heads * l->width, all = q_out + 2 * kv_out;
    const long heads = l->heads + 2 * l->kv_heads, share = share_of(all, num_threads);
    float *normed = scratch, *y = scratch + rows * l->hidden;
    const projected_rows projected = {y, y + q_out, y + q_out + kv_out, all, all};
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static, 1)
        for (int r = 0; r < rows; r++)
            rms_norm(x + r * l->hidden, l->before_attention, l->hidden, l->epsilon, normed + r * l->hidden);
#pragma omp for schedule(static, 1)
        for (int part = 0; part < num_threads; part++) {
            const long first = part * share, last = first + share < all ? first + share : all;
            some_outputs(normed, &l->q, l->hidden, rows, 0, q_out, first, last, y, all);
            some_outputs(normed, &l->k, l->hidden, rows, q_out, kv_out, first, last, y, all);
            some_outputs(normed, &l->v, l->hidden, rows, q_out + kv_out, kv_out, first, last, y, all);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < rows * heads; i++)
            finish_one(l, &projected, i / heads, i % heads, cos, sin, q, k, v, rows * l->width);
    }
    return 0;
}

/* Output projection, residual and the norm before the MLP, for all threads of a parallel region. */
static void project_attention(const longspan_layer *l, const float *attended, const float *x, int rows, int num_threads,
                              float *added, float *normed)
{
    const long hidden = l->hidden, share = share_of(hidden, num_threads);
#pragma omp for schedule(static, 1)
    for (int part = 0; part < num_threads; part++) {
        const long first = part * share, last = first + share < hidden ? first + share : hidden;
        longspan_matrix_outputs(attended, &l->o, l->heads * l->width, rows, first, last, added, hidden);
    }
#pragma omp for schedule(static, 1)
    for (int r = 0; r < rows; r++)
        add_attention(l, x + r * hidden, added + r * hidden, normed + r * hidden);
}

/* First half of longspan_behind_attention, for a layer whose MLP is computed elsewhere: added and normed [rows, hidden],
 * the sum with the residual and the MLP's input. Returns 0, or 1 when a size is not supported. */
int longspan_project_attention(const longspan_layer *l, const float *attended, const float *x, int rows, int num_threads,
                               float *added, float *normed)
{
    if (!is_supported(l, rows, num_threads) || rows > MAX_ROWS)
        return 1;
#pragma omp parallel num_threads(num_threads)
    project_attention(l, attended, x, rows, num_threads, added, normed);
    return 0;
}

/* From attended [rows, heads * width] and the layer's input x [rows, hidden] to y [rows, hidden].
 *
 * scratch: rows * (2 * hidden + 2 * inner) floats. All contiguous.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_behind_attention(const longspan_layer *l, const float *attended, const float *x, int rows, int num_threads,
                              float *scratch, float *y)
{
    if (!is_supported(l, rows, num_threads) || rows > MAX_ROWS || !l->inner)
        return 1;
    const long hidden = l->hidden, inner = l->inner;
    const long share = share_of(hidden, num_threads), inner_share = share_of(inner, num_threads);
    float *added = scratch, *normed = added + rows * hidden, *gate = normed + rows * hidden, *up = gate + rows * inner;
#pragma omp parallel num_threads(num_threads)
    {
        project_attention(l, attended, x, rows, num_threads, added, normed);
#pragma omp for schedule(static, 1)
        for (int part = 0; part < num_threads; part++) {
            const long first = part * inner_share, last = first + inner_share < inner ? first + inner_share : inner;
            if (first < last) {
                longspan_matrix_outputs(normed, &l->gate, hidden, rows, first, last, gate, inner);
                longspan_matrix_outputs(normed, &l->up, hidden, rows, first, last, up, inner);
                for (int r = 0; r < rows; r++)
                    gated(gate + r * inner + first, up + r * inner + first, last - first, l->activation);
            }
        }
#pragma omp for schedule(static, 1)
        for (int part = 0; part < num_threads; part++) {
            const long first = part * share, last = first + share < hidden ? first + share : hidden;
            longspan_matrix_outputs(gate, &l->down, inner, rows, first, last, y, hidden);
        }
#pragma omp for schedule(static, 1)
        for (int r = 0; r < rows; r++)
            add_mlp(l, y + r * hidden, added + r * hidden, y + r * hidden);
    }
    return 0;
}

/* Steps between the products of many rows follow. x, normed, projected, mlp, added and y are [rows, hidden], gate and
 * up [rows, inner], all contiguous. They return 0, or 1 when a size is not supported. */

/* Step before the products with q, k and v: the norm. */
int longspan_norm_rows(const longspan_layer *l, const float *x, long rows, int num_threads, float *normed)
{
    if (!is_supported(l, rows, num_threads))
        return 1;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long r = 0; r < rows; r++)
        rms_norm(x + r * l->hidden, l->before_attention, l->hidden, l->epsilon, normed + r * l->hidden);
    return 0;
}

/* Step after the products with q, k and v: products [rows, heads * width] and twice [rows, kv_heads * width] to q
 * [rows, heads, width], k and v [kv_heads, rows, width], whose heads are kv_head_stride apart. cos and sin are
 * [rows, width]. */
int longspan_finish_rows(const longspan_layer *l, const float *q_product, const float *k_product, const float *v_product,
                         const float *cos, const float *sin, long rows, int num_threads, float *q, float *k, float *v,
                         long kv_head_stride)
{
    if (!is_supported(l, rows, num_threads))
        return 1;
    const long heads = l->heads + 2 * l->kv_heads;
    const projected_rows products = {q_product, k_product, v_product, l->heads * l->width, l->kv_heads * l->width};
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long r = 0; r < rows; r++)
        for (long head = 0; head < heads; head++)
            finish_one(l, &products, r, head, cos, sin, q, k, v, kv_head_stride);
    return 0;
}

/* Step after the output projection: adds the residual in place; normed: the MLP's input. */
int longspan_add_attention_rows(const longspan_layer *l, const float *x, long rows, int num_threads, float *projected,
                                float *normed)
{
    if (!is_supported(l, rows, num_threads))
        return 1;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long r = 0; r < rows; r++)
        add_attention(l, x + r * l->hidden, projected + r * l->hidden, normed + r * l->hidden);
    return 0;
}

/* gate = activation(gate) * up */
int longspan_gate_rows(const longspan_layer *l, const float *up, long rows, int num_threads, float *gate)
{
    if (!is_supported(l, rows, num_threads) || !l->inner)
        return 1;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long r = 0; r < rows; r++)
        gated(gate + r * l->inner, up + r * l->inner, l->inner, l->activation);
    return 0;
}

/* Step after the MLP: adds its output to the residual, into the layer's output y. */
int longspan_add_mlp_rows(const longspan_layer *l, const float *mlp, const float *added, long rows, int num_threads,
                          float *y)
{
    if (!is_supported(l, rows, num_threads))
        return 1;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long r = 0; r < rows; r++)
        add_mlp(l, mlp + r * l->hidden, added + r * l->hidden, y + r * l->hidden);
    return 0;
}
