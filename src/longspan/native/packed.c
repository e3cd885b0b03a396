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
#define PARTS (BLOCK / LANES)
#define AHEAD_BYTES 2048 /* prefetch distance; measured: 512 is 30 % slower, 4096 about the same */

#ifdef LOOKUP
/* Values of the sixteen numbers of four bits in one group. */
INLINE vec table_of(float scale, float zero)
{
    const vec numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (numbers - zero) * scale;
}
#endif

/* One block of weights, in order; bits is a constant in every caller. */
INLINE void unpack(const uint8_t *data, int bits, float scale, float zero, vec table, vec *parts)
{
    if (bits == 8) {
        UNROLL
        for (int i = 0; i < PARTS; i++)
            parts[i] = __builtin_convertvector(widen(data + i * LANES, 1), vec) * scale;
        return;
    }
    UNROLL
    for (int i = 0; i < PARTS / 2; i++) {
        const vecu both = (vecu)widen(data + i * LANES, 0);
#ifdef LOOKUP /* by the lowest four bits */
        parts[i] = __builtin_shuffle(table, (veci)both);
        parts[PARTS / 2 + i] = __builtin_shuffle(table, (veci)(both >> 4));
#else
        parts[i] = (__builtin_convertvector((veci)(both & 15), vec) - zero) * scale;
        parts[PARTS / 2 + i] = (__builtin_convertvector((veci)(both >> 4), vec) - zero) * scale;
#endif
    }
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

INLINE void next(walk *at, long group, int bits, vec *parts)
{
    if (!at->left) {
        at->left = group / BLOCK;
        at->scale_now = *at->scale++;
        if (bits == 4) {
            at->zero_now = *at->zero++;
#ifdef LOOKUP
            at->table = table_of(at->scale_now, at->zero_now);
#endif
        }
    }
    at->left--;
    __builtin_prefetch(at->data + AHEAD_BYTES);
    unpack(at->data, bits, at->scale_now, at->zero_now, at->table, parts);
    at->data += BLOCK * bits / 8;
}

/* One output of all rows, as `dot` in linear.c: x [rows, width] times one row of the matrix. */
INLINE void dot(const float *x, const longspan_matrix *w, long width, long out, int rows, int bits, float *y,
                long y_stride)
{
    const int unroll = rows == 1 ? 4 : rows <= 4 ? 2 : 1;
    const long blocks = width / BLOCK;
    walk at = start(w, width, out, bits);
    vec sums[4][FEW_ROWS], parts[PARTS];
    UNROLL
    for (int u = 0; u < unroll; u++)
        UNROLL
        for (int r = 0; r < rows; r++)
            sums[u][r] = (vec){0};
    long b = 0;
    for (; b + 2 <= blocks; b += 2)
        UNROLL
        for (int half = 0; half < 2; half++) {
            next(&at, w->group, bits, parts);
            UNROLL
            for (int r = 0; r < rows; r++)
                UNROLL
                for (int i = 0; i < PARTS; i++)
                    sums[(half * PARTS + i) % unroll][r] += parts[i] * load(x, r * width + (b + half) * BLOCK + i * LANES, 0);
        }
    if (b < blocks) {
        next(&at, w->group, bits, parts);
        UNROLL
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < PARTS; i++) /* `dot` there takes what is left of an unrolled step one by one */
                sums[unroll <= PARTS ? i % unroll : 0][r] += parts[i] * load(x, r * width + b * BLOCK + i * LANES, 0);
    }
    UNROLL
    for (int r = 0; r < rows; r++) {
        UNROLL
        for (int u = 1; u < unroll; u++)
            sums[0][r] += sums[u][r];
        y[r * y_stride] = sum_lanes(sums[0][r]);
    }
}

/* Constants for rows let the compiler keep the sums in registers. */
#define ROWS(n, bits)                                                                                                  \
    case n:                                                                                                            \
        for (long out = first; out < last; out++)                                                                      \
            dot(x, w, width, out, n, bits, y + out, y_stride);                                                         \
        break;

#define OUTPUTS(name, bits)                                                                                            \
    static void name(const float *x, const longspan_matrix *w, long width, int rows, long first, long last, float *y,  \
                     long y_stride)                                                                                    \
    {                                                                                                                  \
        switch (rows) {                                                                                                \
            ROWS(1, bits)                                                                                              \
            ROWS(2, bits)                                                                                              \
            ROWS(3, bits)                                                                                              \
            ROWS(4, bits)                                                                                              \
            ROWS(5, bits)                                                                                              \
            ROWS(6, bits)                                                                                              \
            ROWS(7, bits)                                                                                              \
            ROWS(8, bits)                                                                                              \
        }                                                                                                              \
    }

/* Rows of the matrix as float32 [last - first, width]. */
#define WEIGHTS(name, bits)                                                                                            \
    static void name(const longspan_matrix *w, long width, long first, long last, float *y)                            \
    {                                                                                                                  \
        for (long out = first; out < last; out++) {                                                                    \
            walk at = start(w, width, out, bits);                                                                      \
            for (long c = 0; c < width; c += BLOCK, y += BLOCK) {                                                      \
                vec parts[PARTS];                                                                                      \
                next(&at, w->group, bits, parts);                                                                      \
                for (int i = 0; i < PARTS; i++)                                                                        \
                    put(y + i * LANES, parts[i]);                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

OUTPUTS(outputs_8, 8)
OUTPUTS(outputs_4, 4)
WEIGHTS(weights_8, 8)
WEIGHTS(weights_4, 4)

void longspan_matrix_outputs(const float *x, const longspan_matrix *w, long width, int rows, long first, long last,
                             float *y, long y_stride)
{
    if (w->bits == 32) {
        longspan_outputs(x, w->data, width, rows, first, last, 0, y, y_stride);
        return;
    }
    for (int r = 0; r < rows; r += FEW_ROWS)
        (w->bits == 8 ? outputs_8 : outputs_4)(x + r * width, w, width, rows - r < FEW_ROWS ? rows - r : FEW_ROWS, first,
                                               last, y + r * y_stride, y_stride);
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
            (bits == 8 ? weights_8 : weights_4)(&w, width, first, last, y + first * width);
    }
    return 0;
}
