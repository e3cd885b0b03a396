/* A decoder layer around its attention, for a few rows, at the speed of memory.
 *
 * Holds two kernels for CPUs: what comes before attention (norm, projections, rotary embedding) and what comes behind it
 * (projection, residual, norm, gated MLP, residual). Must not know Python, torch or attention. Called from
 * longspan/native/layer.py.
 *
 * A decode step spends more time between its operators than in them: some forty small ones a layer, at 5 us each. Here
 * they are two calls. Everything is float32. Norms are root mean square norms; a weight that a layer lacks is NULL.
 */

#include "linear.h"

enum { SILU = 0, GELU_TANH = 1 };

typedef struct {
    const float *before_attention;           /* [hidden] norm */
    const float *q, *k, *v;                  /* [heads * width, hidden], [kv_heads * width, hidden] twice */
    const float *q_bias, *k_bias, *v_bias;
    const float *q_norm, *k_norm;            /* [width], per head */
    const float *o, *o_bias;                 /* [hidden, heads * width], [hidden] */
    const float *behind_attention;           /* [hidden] norm of what attention adds, or NULL */
    const float *before_mlp;                 /* [hidden] norm */
    const float *gate, *up, *down;           /* [inner, hidden] twice, [hidden, inner] */
    const float *behind_mlp;                 /* [hidden] norm of what the MLP adds, or NULL */
    long hidden, inner, heads, kv_heads, width;
    long has_rope, activation;
    double epsilon, head_epsilon;            /* of the norms over hidden, and per head */
} longspan_layer;

/* y = x * weight / sqrt(mean(x^2) + epsilon); x and y may be one. */
MULTIVERSION static void rms_norm(const float *x, const float *weight, long width, double epsilon, float *y)
{
    vec squares = {0};
    for (long c = 0; c < width; c += LANES) {
        const vec part = load(x, c, 0);
        squares += part * part;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)width + (float)epsilon);
    for (long c = 0; c < width; c += LANES) {
        const vec value = load(x, c, 0) * factor * load(weight, c, 0);
        memcpy(y + c, &value, sizeof value);
    }
}

/* y += x */
MULTIVERSION static void add(const float *x, long width, float *y)
{
    for (long c = 0; c < width; c += LANES) {
        const vec value = load(y, c, 0) + load(x, c, 0);
        memcpy(y + c, &value, sizeof value);
    }
}

INLINE vec pick(veci condition, vec yes, vec no)
{
    return (vec)((condition & (veci)yes) | (~condition & (veci)no));
}

/* 1 / (1 + e^-x) without overflow */
INLINE vec sigmoid(vec x)
{
    const vec zero = {0};
    const veci positive = x > zero;
    const vec small = exp_lanes(pick(positive, -x, x));
    return pick(positive, zero + 1.0f, small) / (1.0f + small);
}

/* gate = activation(gate) * up */
MULTIVERSION static void gated(float *gate, const float *up, long width, long activation)
{
    for (long c = 0; c < width; c += LANES) {
        const vec x = load(gate, c, 0);
        /* gelu: x / 2 * (1 + tanh(z)) with z = sqrt(2 / pi) * (x + 0.044715 x^3), and 1 + tanh(z) = 2 * sigmoid(2 z) */
        const vec z = activation == SILU ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
        const vec value = x * sigmoid(z) * load(up, c, 0);
        memcpy(gate + c, &value, sizeof value);
    }
}

/* One head of one row: bias, norm and rotary embedding, from x to y. */
MULTIVERSION static void finish_head(const float *x, const float *bias, const float *norm, double epsilon,
                                     const float *cos, const float *sin, long width, float *y)
{
    memcpy(y, x, width * sizeof *y);
    if (bias)
        add(bias, width, y);
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

static int is_supported(const longspan_layer *l, int rows, int num_threads)
{
    return num_threads >= 1 && rows >= 1 && rows <= MAX_ROWS && l->hidden > 0 && l->hidden % LANES == 0 &&
           l->inner > 0 && l->inner % LANES == 0 && l->width > 0 && l->width % LANES == 0;
}

/* The outputs of one matrix that lie in [first, last) of several put behind each other, this one's from `offset`. */
static void some_outputs(const float *x, const float *w, long width, int rows, long offset, long num_out, long first,
                         long last, float *y, long y_stride)
{
    const long from = first > offset ? first - offset : 0;
    const long to = last - offset < num_out ? last - offset : num_out;
    if (from < to)
        longspan_outputs(x, w, width, rows, from, to, 0, y + offset, y_stride);
}

/* How many of num_out outputs each of num_threads threads computes: whole vectors. */
static long share_of(long num_out, int num_threads)
{
    return ((num_out + num_threads - 1) / num_threads + LANES - 1) / LANES * LANES;
}

/* x [rows, hidden] to q [rows, heads, width], k and v [kv_heads, rows, width]; cos and sin [rows, width].
 *
 * scratch: rows * (hidden + (heads + 2 * kv_heads) * width) floats. All contiguous.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_before_attention(const longspan_layer *l, const float *x, const float *cos, const float *sin, int rows,
                              int num_threads, float *scratch, float *q, float *k, float *v)
{
    if (!is_supported(l, rows, num_threads))
        return 1;
    const long q_out = l->heads * l->width, kv_out = l->kv_heads * l->width, all = q_out + 2 * kv_out;
    const long heads = l->heads + 2 * l->kv_heads, share = share_of(all, num_threads);
    float *normed = scratch, *y = scratch + rows * l->hidden;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static, 1)
        for (int r = 0; r < rows; r++)
            rms_norm(x + r * l->hidden, l->before_attention, l->hidden, l->epsilon, normed + r * l->hidden);
#pragma omp for schedule(static, 1)
        for (int part = 0; part < num_threads; part++) {
            const long first = part * share, last = first + share < all ? first + share : all;
            some_outputs(normed, l->q, l->hidden, rows, 0, q_out, first, last, y, all);
            some_outputs(normed, l->k, l->hidden, rows, q_out, kv_out, first, last, y, all);
            some_outputs(normed, l->v, l->hidden, rows, q_out + kv_out, kv_out, first, last, y, all);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < rows * heads; i++) {
            const long r = i / heads, head = i % heads, width = l->width;
            const float *from = y + r * all + head * width;
            const float *row_cos = l->has_rope ? cos + r * width : NULL, *row_sin = l->has_rope ? sin + r * width : NULL;
            if (head < l->heads) {
                finish_head(from, l->q_bias ? l->q_bias + head * width : NULL, l->q_norm, l->head_epsilon, row_cos,
                            row_sin, width, q + (r * l->heads + head) * width);
            } else if (head < l->heads + l->kv_heads) {
                const long own = head - l->heads;
                finish_head(from, l->k_bias ? l->k_bias + own * width : NULL, l->k_norm, l->head_epsilon, row_cos,
                            row_sin, width, k + (own * rows + r) * width);
            } else {
                const long own = head - l->heads - l->kv_heads;
                finish_head(from, l->v_bias ? l->v_bias + own * width : NULL, NULL, 0.0, NULL, NULL, width,
                            v + (own * rows + r) * width);
            }
        }
    }
    return 0;
}

/* attended [rows, heads * width] and x [rows, hidden], what the layer was given, to y [rows, hidden].
 *
 * scratch: rows * (2 * hidden + 2 * inner) floats. All contiguous.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_behind_attention(const longspan_layer *l, const float *attended, const float *x, int rows, int num_threads,
                              float *scratch, float *y)
{
    if (!is_supported(l, rows, num_threads))
        return 1;
    const long hidden = l->hidden, inner = l->inner;
    const long share = share_of(hidden, num_threads), inner_share = share_of(inner, num_threads);
    float *added = scratch, *normed = added + rows * hidden, *gate = normed + rows * hidden, *up = gate + rows * inner;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static, 1)
        for (int part = 0; part < num_threads; part++) {
            const long first = part * share, last = first + share < hidden ? first + share : hidden;
            longspan_outputs(attended, l->o, l->heads * l->width, rows, first, last, 0, added, hidden);
        }
#pragma omp for schedule(static, 1)
        for (int r = 0; r < rows; r++) {
            float *sum = added + r * hidden;
            if (l->o_bias)
                add(l->o_bias, hidden, sum);
            if (l->behind_attention)
                rms_norm(sum, l->behind_attention, hidden, l->epsilon, sum);
            add(x + r * hidden, hidden, sum);
            rms_norm(sum, l->before_mlp, hidden, l->epsilon, normed + r * hidden);
        }
#pragma omp for schedule(static, 1)
        for (int part = 0; part < num_threads; part++) {
            const long first = part * inner_share, last = first + inner_share < inner ? first + inner_share : inner;
            if (first < last) {
                longspan_outputs(normed, l->gate, hidden, rows, first, last, 0, gate, inner);
                longspan_outputs(normed, l->up, hidden, rows, first, last, 0, up, inner);
                for (int r = 0; r < rows; r++)
                    gated(gate + r * inner + first, up + r * inner + first, last - first, l->activation);
            }
        }
#pragma omp for schedule(static, 1)
        for (int part = 0; part < num_threads; part++) {
            const long first = part * share, last = first + share < hidden ? first + share : hidden;
            longspan_outputs(gate, l->down, inner, rows, first, last, 0, y, hidden);
        }
#pragma omp for schedule(static, 1)
        for (int r = 0; r < rows; r++) {
            if (l->behind_mlp)
                rms_norm(y + r * hidden, l->behind_mlp, hidden, l->epsilon, y + r * hidden);
            add(added + r * hidden, hidden, y + r * hidden);
        }
    }
    return 0;
}
