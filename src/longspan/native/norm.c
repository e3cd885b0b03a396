/* Norms of rows by their root mean square, gated if wanted.
 *
 * Holds one kernel for CPUs. Must not know Python, torch or models. Called from longspan/native/norm.py.
 */

#include "gate.h"

#define SERIAL (1 << 14) /* elements that one thread computes before others are woken up */

enum { UNGATED, BY_SILU, BY_SIGMOID };

/* One row; gated is a constant in every caller. */
INLINE void norm_row(const float *x, const float *weight, const float *gate, long width, float epsilon, int gated, float *y)
{
    vec squares = {0};
    for (long c = 0; c < width; c += LANES) {
        const vec value = load(x, c, 0);
        squares += value * value;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / width + epsilon);
    for (long c = 0; c < width; c += LANES) {
        vec value = load(x, c, 0) * scale * load(weight, c, 0);
        if (gated != UNGATED) {
            const vec z = load(gate, c, 0);
            value *= gated == BY_SILU ? z * sigmoid(z) : sigmoid(z);
        }
        put(y + c, value);
    }
}

static void norm_rows(const float *x, const float *weight, const float *gate, long rows, long width,
                                   float epsilon, long gated, float *y)
{
    for (long r = 0; r < rows; r++, x += width, y += width) {
        if (gated == UNGATED)
            norm_row(x, weight, 0, width, epsilon, UNGATED, y);
        else if (gated == BY_SILU)
            norm_row(x, weight, gate + r * width, width, epsilon, BY_SILU, y);
        else
            norm_row(x, weight, gate + r * width, width, epsilon, BY_SIGMOID, y);
    }
}

/* x, gate and y [rows, width], weight [width]; all contiguous. y = x / rms(x) * weight * activation(gate).
 *
 * gated: whether there is a gate, and its activation. width a multiple of LANES.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_rms_norm(const float *x, const float *weight, const float *gate, long rows, long width, double epsilon,
                      long gated, int num_threads, float *y)
{
    if (num_threads < 1 || rows < 0 || width < LANES || width % LANES || gated < UNGATED || gated > BY_SIGMOID)
        return 1;
    const long share = (rows + num_threads - 1) / num_threads;
#pragma omp parallel for schedule(static, 1) num_threads(num_threads) if (rows * width > SERIAL)
    for (int part = 0; part < num_threads; part++) {
        const long from = smaller(part * share, rows), to = smaller(from + share, rows);
        norm_rows(x + from * width, weight, gate ? gate + from * width : 0, to - from, width, (float)epsilon, gated,
                  y + from * width);
    }
    return 0;
}
