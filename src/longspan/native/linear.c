/* Up to MAX_ROWS rows times a weight matrix.
 *
 * Holds two kernels for CPUs. Must not know Python, torch or models. Called from longspan/native/kernels.py.
 *
 * A decode step multiplies every weight by one row per request. BLAS kernels rearrange all weights in every call, which
 * takes three times as long as to read them. Here they are read as they lie:
 *
 *     FEW_ROWS   weights are one stream, met with all rows in registers: the speed of memory
 *     more       a panel of weights stays in cache while rows after rows meet it, in tiles of TILE_ROWS x TILE_OUTPUTS,
 *                each tile's lanes added up together: the speed of arithmetic
 */

#include "linear.h"

#define AHEAD_BYTES 4096   /* prefetch distance; measured: 0 and 1024 are up to 15 % slower */
#define PANEL_BYTES (LANES < 16 ? 16384 : 32768) /* measured, with 32 and 48 KiB of nearest cache: others are slower */
#define TILE_OUTPUTS 4
#define TILE_ROWS (LANES < 16 ? 3 : 4) /* 12 sums, 3 rows and a weight are 16 registers */

/* One output of all rows: x [rows, width] times w [width]; several sums, because one would wait for itself. */
INLINE void dot(const float *x, const void *w, long width, int rows, int is_bf16, float *y, long y_stride)
{
    const int unroll = rows == 1 ? 4 : rows <= 4 ? 2 : 1; /* 8 to 16 sums fit the registers */
    const long item = is_bf16 ? 2 : 4;
    vec sums[4][FEW_ROWS];
    UNROLL
    for (int u = 0; u < unroll; u++)
        UNROLL
        for (int r = 0; r < rows; r++)
            sums[u][r] = (vec){0};
    long c = 0;
    for (; c + unroll * LANES <= width; c += unroll * LANES) {
        UNROLL
        for (int u = 0; u < unroll; u++) {
            const vec part = load(w, c + u * LANES, is_bf16);
            __builtin_prefetch((const char *)w + (c + u * LANES) * item + AHEAD_BYTES);
            UNROLL
            for (int r = 0; r < rows; r++)
                sums[u][r] += part * load(x, r * width + c + u * LANES, 0);
        }
    }
    for (; c < width; c += LANES)
        UNROLL
        for (int r = 0; r < rows; r++)
            sums[0][r] += load(w, c, is_bf16) * load(x, r * width + c, 0);
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
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
    static void name(const float *x, const void *w, long width, int rows, long first, long last,         \
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

/* y [rows, num] = x [rows, width] times w [num, width], with at most TILE_ROWS rows and num of 1 or TILE_OUTPUTS.
 * `ahead`: bytes from a weight to the one that is asked for meanwhile, or 0. */
INLINE void multiply_tile(const float *x, const float *w, long width, int rows, int num, long ahead, float *y,
                          long y_stride)
{
    vec sums[TILE_ROWS][TILE_OUTPUTS];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int i = 0; i < num; i++)
            sums[r][i] = (vec){0};
    for (long c = 0; c < width; c += LANES) {
        vec values[TILE_ROWS];
        UNROLL
        for (int r = 0; r < rows; r++)
            values[r] = load(x, r * width + c, 0);
        UNROLL
        for (int i = 0; i < num; i++) {
            const vec part = load(w, i * width + c, 0);
            if (ahead)
                __builtin_prefetch((const char *)(w + i * width + c) + ahead);
            UNROLL
            for (int r = 0; r < rows; r++)
                sums[r][i] += part * values[r];
        }
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        if (num == TILE_OUTPUTS)
            put4(y + r * y_stride, sum_four(sums[r]));
        else
            y[r * y_stride] = sum_lanes(sums[r][0]);
    }
}

/* A panel of weights and the rows of one tile. All passes over a panel together ask once for the panel behind it. */
INLINE void multiply_panel(const float *x, const float *w, long width, int rows, long num_out, long pass,
                           long num_passes, float *y, long y_stride)
{
    long out = 0;
    for (; out + TILE_OUTPUTS <= num_out; out += TILE_OUTPUTS)
        if (out / TILE_OUTPUTS % num_passes == pass)
            multiply_tile(x, w + out * width, width, rows, TILE_OUTPUTS, num_out * width * sizeof *w, y + out, y_stride);
        else
            multiply_tile(x, w + out * width, width, rows, TILE_OUTPUTS, 0, y + out, y_stride);
    for (; out < num_out; out++)
        multiply_tile(x, w + out * width, width, rows, 1, 0, y + out, y_stride);
}

#define PANEL(n)                                                                                                       \
    case n:                                                                                                            \
        multiply_panel(x + row * width, w + out * width, width, n, num, pass, num_passes, y + row * y_stride + out,    \
                       y_stride);                                                                                      \
        break;
static void panels(const float *x, const float *w, long width, int rows, long first, long last, float *y, long y_stride)
{
    const long num_passes = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const long fitting = PANEL_BYTES / (width * (long)sizeof *w) / TILE_OUTPUTS * TILE_OUTPUTS;
    const long most = fitting ? fitting : TILE_OUTPUTS;
    for (long out = first; out < last; out += most) {
        const long num = last - out < most ? last - out : most;
        for (long pass = 0; pass < num_passes; pass++) {
            const long row = rows * pass / num_passes;
            switch (rows * (pass + 1) / num_passes - row) {
                PANEL(1)
                PANEL(2)
                PANEL(3)
#if LANES == 16
                PANEL(4)
#endif
            }
        }
    }
}

void longspan_outputs(const float *x, const void *w, long width, int rows, long first, long last, int is_bf16, float *y,
                      long y_stride)
{
    if (rows > FEW_ROWS)
        panels(x, w, width, rows, first, last, y, y_stride);
    else
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
    if (num_threads < 1 || rows < 1 || rows > (is_bf16 ? FEW_ROWS : MAX_ROWS) || width < LANES || width % LANES || num_out < 1)
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
