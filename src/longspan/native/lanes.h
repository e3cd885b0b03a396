/* Vectors of LANES floats, which all kernels use.
 *
 * Plain C with vector extensions (GCC 12 or newer, or clang). Must not know what a kernel computes.
 *
 * All kernels are compiled once per size of a CPU's registers, with LANES and the instructions for it (pyproject.toml), and
 * longspan/native/kernels.py loads the binary for the CPU that there is: a compiler takes larger vectors apart and keeps
 * them in memory.
 */

#ifndef LONGSPAN_LANES_H
#define LONGSPAN_LANES_H

#include <stdint.h>
#include <string.h>

#ifndef LANES
#define LANES 4
#endif
#if LANES != 4 && LANES != 8 && LANES != 16
#error "LANES is 4, 8 or 16"
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t veci __attribute__((vector_size(4 * LANES)));
typedef uint32_t vecu __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* The same in memory, at any address. Copying by memcpy would go through the stack. */
typedef float vec_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves_at __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint8_t bytes_at __attribute__((vector_size(LANES), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* Before a loop of constant length over vectors: without it they stay in memory. */
#define UNROLL _Pragma("GCC unroll 16")

/* A tile of sums: as many vectors as one has lanes, which fit the registers beside what is multiplied. */
#define TILE LANES

/* LANES elements as float32; is_bf16 is a constant in every caller. */
INLINE vec load(const void *base, long element, int is_bf16)
{
    if (is_bf16) {
        const halves raw = *(const halves_at *)((const uint16_t *)base + element);
        return (vec)(__builtin_convertvector(raw, vecu) << 16);
    }
    return *(const vec_at *)((const float *)base + element);
}

typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef uint8_t ubytes __attribute__((vector_size(LANES)));

#if LANES == 16 && defined(__AVX512BW__) && !defined(__clang__)
#define LOOKUP /* one instruction widens sixteen bytes, one looks sixteen numbers up */
#endif

/* LANES bytes as whole numbers; is_signed is a constant in every caller.
 *
 * In two steps, as GCC takes vectors apart where it should widen fourfold; with the largest registers by the instruction. */
INLINE veci widen(const uint8_t *data, int is_signed)
{
#ifdef LOOKUP
    veci numbers;
    if (is_signed)
        __asm__("vpmovsxbd %1, %0" : "=v"(numbers) : "m"(*(const bytes_at *)data));
    else
        __asm__("vpmovzxbd %1, %0" : "=v"(numbers) : "m"(*(const bytes_at *)data));
    return numbers;
#else
    const ubytes raw = *(const bytes_at *)data;
    if (is_signed)
        return __builtin_convertvector(__builtin_convertvector((bytes)raw, shorts), veci);
    return (veci)__builtin_convertvector(__builtin_convertvector(raw, halves), vecu);
#endif
}

/* Kinds of stored keys and values, in the order of kernels.py. Rows of the last two end with a float32 scale. */
enum { FLOAT32, BFLOAT16, INT8, FLOAT8 };

INLINE long bytes_of(int kind) { return kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1; }

/* LANES stored elements as float32, a scale not applied; kind is a constant in every caller. */
INLINE vec stored(const void *base, long element, int kind)
{
    if (kind < INT8)
        return load(base, element, kind == BFLOAT16);
    const uint8_t *data = (const uint8_t *)base + element;
    if (kind == INT8)
        return __builtin_convertvector(widen(data, 1), vec);
    /* Sign, 4 bits of exponent, 3 of fraction. As float32 the exponent moves by 120; a number without one is 2^-6 too
     * large when it gets the next. */
    const veci bits = widen(data, 0), low = (bits & 127) << 20, sign = (bits & 128) << 24;
    const veci is_small = low < (1 << 23);
    const vec number = (vec)(low + (((120 << 23) & ~is_small) | ((121 << 23) & is_small)));
    const vec shift = (vec)((veci)((vec){0} + 0.015625f) & is_small);
    return (vec)((veci)(number - shift) | sign);
}

/* Scale behind a row's `width` elements of one byte. */
INLINE float scale_behind(const void *base, long row, long stride, long width)
{
    float scale;
    memcpy(&scale, (const char *)base + row * stride + width, sizeof scale);
    return scale;
}

INLINE void put(float *base, vec value) { *(vec_at *)base = value; }

INLINE long smaller(long a, long b)
{
    return a < b ? a : b;
}

/* The lanes i, j, k, l of a and b together, and so on in every group of four lanes. */
#if LANES == 16
#define FOURS(a, b, i, j, k, l)                                                                                        \
    __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12,  \
                            k + 12, l + 12)
#elif LANES == 8
#define FOURS(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4)
#else
#define FOURS(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif

/* In every group of four lanes: the sums over it of x[0] to x[3]. Neighbours are added while they are transposed. */
INLINE vec sum_fours(const vec *x)
{
    const vec a = FOURS(x[0], x[1], 0, LANES, 1, LANES + 1) + FOURS(x[0], x[1], 2, LANES + 2, 3, LANES + 3);
    const vec b = FOURS(x[2], x[3], 0, LANES, 1, LANES + 1) + FOURS(x[2], x[3], 2, LANES + 2, 3, LANES + 3);
    return FOURS(a, b, 0, 1, LANES, LANES + 1) + FOURS(a, b, 2, 3, LANES + 2, LANES + 3);
}

/* Lane i: the lanes of x[i] added up, for LANES vectors. */
INLINE vec sum_each(const vec *x)
{
#if LANES == 16
#define QUARTERS(a, b, i, j)                                                                                           \
    __builtin_shufflevector(a, b, i, i + 1, i + 2, i + 3, j, j + 1, j + 2, j + 3, i + 16, i + 17, i + 18, i + 19,      \
                            j + 16, j + 17, j + 18, j + 19)
    const vec four[4] = {sum_fours(x), sum_fours(x + 4), sum_fours(x + 8), sum_fours(x + 12)};
    const vec a = QUARTERS(four[0], four[1], 0, 8) + QUARTERS(four[0], four[1], 4, 12);
    const vec b = QUARTERS(four[2], four[3], 0, 8) + QUARTERS(four[2], four[3], 4, 12);
    return QUARTERS(a, b, 0, 8) + QUARTERS(a, b, 4, 12);
#elif LANES == 8
    const vec a = sum_fours(x), b = sum_fours(x + 4);
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
#else
    return sum_fours(x);
#endif
}

typedef float vec4 __attribute__((vector_size(16)));
typedef float vec4_at __attribute__((vector_size(16), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32)));

/* Its groups of four lanes added up. */
INLINE vec4 add_fours(vec x)
{
#if LANES == 16
    const vec8 half = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#elif LANES == 8
    const vec8 half = x;
#endif
#if LANES > 4
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#else
    return x;
#endif
}

INLINE float sum_lanes(vec x)
{
    const vec4 four = add_fours(x);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* Lane i: the lanes of x[i] added up, for four vectors. */
INLINE vec4 sum_four(const vec *x) { return add_fours(sum_fours(x)); }

INLINE void put4(float *base, vec4 value) { *(vec4_at *)base = value; }

/* e^x for x <= 0: 2^n * e^r with |r| <= ln(2) / 2; relative error below 2e-7. Under -87 it is 0 to float32's eyes. */
INLINE vec exp_lanes(vec x)
{
    const vec zero = {0};
    const veci low = x < -87.0f; /* lanes of ones where true */
    vec clamped = (vec)(((veci)(zero - 87.0f) & low) | ((veci)x & ~low));
    vec n = clamped * 1.44269504f + 12582912.0f; /* 1.5 * 2^23 rounds to the nearest integer */
    veci exponent = (veci)n - (veci)(zero + 12582912.0f);
    n -= 12582912.0f;
    vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((exponent + 127) << 23);
}

#endif
