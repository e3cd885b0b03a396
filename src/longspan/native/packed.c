/* Up to MAX_ROWS rows times a weight matrix of 8 or 4 bits.
 *
 * Holds the product and the unpacking for CPUs. Must not know Python, torch or models. Called from
 * longspan/native/packed.py, which documents the format.
 *
 * Every weight is unpacked to exactly the float32 that the dequantised matrix holds, and products are added up in the
 * order of `dot` in linear.c: the result is the same to the last bit, and only the bytes that are read are fewer. More
 * than FEW_ROWS rows take turns.
 *
 *     32 weights of 4 bits are 16 bytes:    byte i holds weight i in its low half and weight 16 + i in its high half
 */

#include "linear.h"

#define BLOCK 32         /* weights that are unpacked together; a group is a multiple */
#define AHEAD_BYTES 2048 /* prefetch distance; measured: 512 is 30 % slower, 4096 about the same */

/* Values of the sixteen numbers of four bits in one group. */
INLINE vec table_of(float scale, float zero)
{
    const vec numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (numbers - zero) * scale;
}

/* One block of weights; bits and wide are constants in every caller. */
INLINE void unpack(const uint8_t *data, int bits, int wide, float scale, float zero, vec table, vec *low, vec *high)
{
    if (bits == 8) {
        *low = __builtin_convertvector(widen(data, 1, wide), vec) * scale;
        *high = __builtin_convertvector(widen(data + LANES, 1, wide), vec) * scale;
        return;
    }
    const vecu both = (vecu)widen(data, 0, wide);
#ifdef LOOKUP
    if (wide) { /* one instruction looks sixteen numbers up, by their lowest four bits */
        *low = __builtin_shuffle(table, (veci)both);
        *high = __builtin_shuffle(table, (veci)(both >> 4));
        return;
    }
#endif
    *low = (__builtin_convertvector(both & 15, vec) - zero) * scale;
    *high = (__builtin_convertvector(both >> 4, vec) - zero) * scale;
}

/* A walk over the blocks of one output, which knows the group of the next one. */
typedef struct {
    const uint8_t *data;
    const float *scale;
    const uint8_t *zero;
    long left; /* blocks of this group */
    float scale_now, zero_now;
    vec table;
} walk;

INLINE walk start(const longspan_matrix *w, long width, long out, int bits)
{
    const long groups = width / w->group;
    walk at = {.data = (const uint8_t *)w->data + out * width * bits / 8, .scale = w->scale + out * groups};
    if (bits == 4)
        at.zero = w->zero + out * groups;
    return at;
}

INLINE void next(walk *at, long group, int bits, int wide, vec *low, vec *high)
{
    if (!at->left) {
        at->left = group / BLOCK;
        at->scale_now = *at->scale++;
        if (bits == 4) {
            at->zero_now = *at->zero++;
            if (wide)
                at->table = table_of(at->scale_now, at->zero_now);
        }
    }
    at->left--;
    __builtin_prefetch(at->data + AHEAD_BYTES);
    unpack(at->data, bits, wide, at->scale_now, at->zero_now, at->table, low, high);
    at->data += BLOCK * bits / 8;
}

/* One output of all rows, as `dot` in linear.c: x [rows, width] times one row of the matrix. */
INLINE void dot(const float *x, const longspan_matrix *w, long width, long out, int rows, int bits, int wide, float *y,
                long y_stride)
{
    const int unroll = rows == 1 ? 4 : rows <= 4 ? 2 : 1;
    const long blocks = width / BLOCK;
    walk at = start(w, width, out, bits);
    vec sums[4][FEW_ROWS], low, high;
    for (int u = 0; u < unroll; u++)
        for (int r = 0; r < rows; r++)
            sums[u][r] = (vec){0};
    long b = 0;
    for (; b + 2 <= blocks; b += 2)
        for (int half = 0; half < 2; half++) {
            next(&at, w->group, bits, wide, &low, &high);
            const long c = (b + half) * BLOCK;
            for (int r = 0; r < rows; r++) {
                sums[2 * half % unroll][r] += low * load(x, r * width + c, 0);
                sums[(2 * half + 1) % unroll][r] += high * load(x, r * width + c + LANES, 0);
            }
        }
    if (b < blocks) {
        next(&at, w->group, bits, wide, &low, &high);
        for (int r = 0; r < rows; r++) {
            sums[0][r] += low * load(x, r * width + b * BLOCK, 0);
            sums[unroll == 2][r] += high * load(x, r * width + b * BLOCK + LANES, 0);
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int u = 1; u < unroll; u++)
            sums[0][r] += sums[u][r];
        y[r * y_stride] = sum_lanes(sums[0][r]);
    }
}

/* Constants for rows let the compiler keep the sums in registers. */
#define ROWS(n, bits, wide)                                                                                            \
    case n:                                                                                                            \
        for (long out = first; out < last; out++)                                                                      \
            dot(x, w, width, out, n, bits, wide, y + out, y_stride);                                                        \
        break;

#define OUTPUTS(attributes, name, bits, wide)                                                                          \
    attributes static void name(const float *x, const longspan_matrix *w, long width, int rows, long first, long last, \
                                float *y, long y_stride)                                                               \
    {                                                                                                                  \
        switch (rows) {                                                                                                \
            ROWS(1, bits, wide)                                                                                        \
            ROWS(2, bits, wide)                                                                                        \
            ROWS(3, bits, wide)                                                                                        \
            ROWS(4, bits, wide)                                                                                        \
            ROWS(5, bits, wide)                                                                                        \
            ROWS(6, bits, wide)                                                                                        \
            ROWS(7, bits, wide)                                                                                        \
            ROWS(8, bits, wide)                                                                                        \
        }                                                                                                              \
    }

/* Rows of the matrix as float32 [last - first, width]. */
#define WEIGHTS(attributes, name, bits, wide)                                                                          \
    attributes static void name(const longspan_matrix *w, long width, long first, long last, float *y)                 \
    {                                                                                                                  \
        for (long out = first; out < last; out++) {                                                                    \
            walk at = start(w, width, out, bits);                                                                      \
            for (long c = 0; c < width; c += BLOCK, y += BLOCK) {                                                      \
                vec both[2];                                                                                           \
                next(&at, w->group, bits, wide, &both[0], &both[1]);                                                   \
                memcpy(y, both, sizeof both);                                                                          \
            }                                                                                                          \
        }                                                                                                              \
    }

OUTPUTS(MULTIVERSION, narrow_outputs_8, 8, 0)
OUTPUTS(MULTIVERSION, narrow_outputs_4, 4, 0)
WEIGHTS(MULTIVERSION, narrow_weights_8, 8, 0)
WEIGHTS(MULTIVERSION, narrow_weights_4, 4, 0)
#ifdef LOOKUP
OUTPUTS(WIDE, wide_outputs_8, 8, 1)
OUTPUTS(WIDE, wide_outputs_4, 4, 1)
WEIGHTS(WIDE, wide_weights_8, 8, 1)
WEIGHTS(WIDE, wide_weights_4, 4, 1)
#endif

static void outputs(const float *x, const longspan_matrix *w, long width, int rows, long first, long last, float *y,
                    long y_stride)
{
#ifdef LOOKUP
    if (longspan_has_wide_registers()) {
        (w->bits == 8 ? wide_outputs_8 : wide_outputs_4)(x, w, width, rows, first, last, y, y_stride);
        return;
    }
#endif
    (w->bits == 8 ? narrow_outputs_8 : narrow_outputs_4)(x, w, width, rows, first, last, y, y_stride);
}

static void weights(const longspan_matrix *w, long width, long first, long last, float *y)
{
#ifdef LOOKUP
    if (longspan_has_wide_registers()) {
        (w->bits == 8 ? wide_weights_8 : wide_weights_4)(w, width, first, last, y);
        return;
    }
#endif
    (w->bits == 8 ? narrow_weights_8 : narrow_weights_4)(w, width, first, last, y);
}

void longspan_matrix_outputs(const float *x, const longspan_matrix *w, long width, int rows, long first, long last,
                             float *y, long y_stride)
{
    if (w->bits == 32) {
        longspan_outputs(x, w->data, width, rows, first, last, 0, y, y_stride);
        return;
    }
    for (int r = 0; r < rows; r += FEW_ROWS)
        outputs(x + r * width, w, width, rows - r < FEW_ROWS ? rows - r : FEW_ROWS, first, last, y + r * y_stride,
                y_stride);
}

static int is_legal(long width, long group, int bits, long num_out, int num_threads)
{
    return num_threads >= 1 && num_out >= 1 && (bits == 8 || bits == 4) && group >= BLOCK && group % BLOCK == 0 &&
           width >= group && width % group == 0;
}

/* y [rows, num_out] = x [rows, width] times the transpose of a packed matrix [num_out, width]; outputs in parallel.
 *
 * x and y float32, all contiguous; zero is not read for 8 bits.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_packed_linear(const float *x, const void *data, const float *scale, const void *zero, long width,
                           long group, int bits, int rows, long num_out, int num_threads, float *y)
{
    if (!is_legal(width, group, bits, num_out, num_threads) || rows < 1 || rows > MAX_ROWS)
        return 1;
    const longspan_matrix w = {data, scale, zero, group, bits};
    const long share = (num_out + num_threads - 1) / num_threads;
#pragma omp parallel for schedule(static, 1) num_threads(num_threads)
    for (int part = 0; part < num_threads; part++) {
        const long first = part * share;
        const long last = first + share < num_out ? first + share : num_out;
        longspan_matrix_outputs(x, &w, width, rows, first, last, y, num_out);
    }
    return 0;
}

/* y [num_out, width] = a packed matrix as float32; the rest as above. */
int longspan_unpack(const void *data, const float *scale, const void *zero, long width, long group, int bits,
                    long num_out, int num_threads, float *y)
{
    if (!is_legal(width, group, bits, num_out, num_threads))
        return 1;
    const longspan_matrix w = {data, scale, zero, group, bits};
    const long share = (num_out + num_threads - 1) / num_threads;
#pragma omp parallel for schedule(static, 1) num_threads(num_threads)
    for (int part = 0; part < num_threads; part++) {
        const long first = part * share;
        const long last = first + share < num_out ? first + share : num_out;
        if (first < last)
            weights(&w, width, first, last, y + first * width);
    }
    return 0;
}
