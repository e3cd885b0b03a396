/* A few rows times a weight matrix, at the speed of memory.
 *
 * Holds one kernel for CPUs. Must not know Python, torch or models. Called from longspan/native/kernels.py.
 *
 * A decode step multiplies every weight by one row per request. BLAS kernels read weights at a third of the memory
 * bandwidth then. Here weights are one stream, met with all rows in registers.
 */

#include "linear.h"

#define AHEAD_BYTES 4096 /* prefetch distance; measured: 0 and 1024 are up to 15 % slower */

/* One output of all rows: x [rows, width] times w [width]; several sums, because one would wait for itself. */
INLINE void dot(const float *x, const void *w, long width, int rows, int is_bf16, float *y, long y_stride)
{
    const int unroll = rows == 1 ? 4 : rows <= 4 ? 2 : 1; /* 8 to 16 sums fit the registers */
    const long item = is_bf16 ? 2 : 4;
    vec sums[4][MAX_ROWS];
    for (int u = 0; u < unroll; u++)
        for (int r = 0; r < rows; r++)
            sums[u][r] = (vec){0};
    long c = 0;
    for (; c + unroll * LANES <= width; c += unroll * LANES) {
        for (int u = 0; u < unroll; u++) {
            const vec part = load(w, c + u * LANES, is_bf16);
            __builtin_prefetch((const char *)w + (c + u * LANES) * item + AHEAD_BYTES);
            for (int r = 0; r < rows; r++)
                sums[u][r] += part * load(x, r * width + c + u * LANES, 0);
        }
    }
    for (; c < width; c += LANES)
        for (int r = 0; r < rows; r++)
            sums[0][r] += load(w, c, is_bf16) * load(x, r * width + c, 0);
    for (int r = 0; r < rows; r++) {
        for (int u = 1; u < unroll; u++)
            sums[0][r] += sums[u][r];
        y[r * y_stride] = sum_lanes(sums[0][r]);
    }
}

/* Constants for rows let the compiler keep the sums in registers. */
#define ROWS(n, is_bf16)                                                                                               \
    case n:                                                                                                            \
        for (long out = first; out < last; out++)                                                                      \
            dot(x, (const char *)w + out * width * ((is_bf16) ? 2 : 4), width, n, is_bf16, y + out, num_out);          \
        break;

#define OUTPUTS(name, is_bf16)                                                                                         \
    MULTIVERSION static void name(const float *x, const void *w, long width, int rows, long first, long last,         \
                                  float *y, long num_out)                                                             \
    {                                                                                                                  \
        switch (rows) {                                                                                                \
            ROWS(1, is_bf16)                                                                                           \
            ROWS(2, is_bf16)                                                                                           \
            ROWS(3, is_bf16)                                                                                           \
            ROWS(4, is_bf16)                                                                                           \
            ROWS(5, is_bf16)                                                                                           \
            ROWS(6, is_bf16)                                                                                           \
            ROWS(7, is_bf16)                                                                                           \
            ROWS(8, is_bf16)                                                                                           \
        }                                                                                                              \
    }

OUTPUTS(outputs_float32, 0)
OUTPUTS(outputs_bfloat16, 1)

void longspan_outputs(const float *x, const void *w, long width, int rows, long first, long last, int is_bf16, float *y,
                      long y_stride)
{
    (is_bf16 ? outputs_bfloat16 : outputs_float32)(x, w, width, rows, first, last, y, y_stride);
}

/* y [rows, num_out] = x [rows, width] times the transpose of w [num_out, width]; outputs in parallel.
 *
 * x and y float32, w float32 or bfloat16; all contiguous.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_linear(const float *x, const void *w, long width, int rows, long num_out, int is_bf16, int num_threads,
                    float *y)
{
    if (num_threads < 1 || rows < 1 || rows > MAX_ROWS || width < LANES || width % LANES || num_out < 1)
        return 1;
    const long share = (num_out + num_threads - 1) / num_threads;
#pragma omp parallel for schedule(static, 1) num_threads(num_threads)
    for (int part = 0; part < num_threads; part++) {
        const long first = part * share;
        const long last = first + share < num_out ? first + share : num_out;
        longspan_outputs(x, w, width, rows, first, last, is_bf16, y, num_out);
    }
    return 0;
}
