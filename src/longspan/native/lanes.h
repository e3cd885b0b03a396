/* Vectors of sixteen floats, which all kernels use.
 *
 * Plain C with vector extensions (GCC 12 or newer, or clang). Must not know what a kernel computes.
 */

#ifndef LONGSPAN_LANES_H
#define LONGSPAN_LANES_H

#include <stdint.h>
#include <string.h>

#define LANES 16

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t veci __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vecu __attribute__((vector_size(64), aligned(4)));
typedef uint16_t half16 __attribute__((vector_size(32), aligned(2)));
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif

/* A tile of sums takes so many vectors: they fit the registers, beside what is multiplied. */
#if defined(__x86_64__) && defined(__GNUC__)
#define WIDE __attribute__((target("arch=x86-64-v4")))
#endif
#define WIDE_TILE 16  /* of 32 registers of 512 bits */
#define NARROW_TILE 4 /* of 16 registers of 256 bits */

int longspan_has_wide_registers(void); /* prefill.c */

/* 16 elements as float32; is_bf16 is a constant in every caller. */
INLINE vec load(const void *base, long element, int is_bf16)
{
    if (is_bf16) {
        half16 raw;
        memcpy(&raw, (const uint16_t *)base + element, sizeof raw);
        vecu wide = __builtin_convertvector(raw, vecu) << 16;
        return (vec)wide;
    }
    vec value;
    memcpy(&value, (const float *)base + element, sizeof value);
    return value;
}

typedef int16_t shorts16 __attribute__((vector_size(32), aligned(2)));
typedef int8_t bytes16 __attribute__((vector_size(16), aligned(1)));
typedef uint8_t ubytes16 __attribute__((vector_size(16), aligned(1)));

#if defined(WIDE) && !defined(__clang__)
#define LOOKUP
#endif

/* Sixteen bytes as whole numbers; is_signed and wide are constants in every caller.
 *
 * In two steps, as GCC takes vectors apart where it should widen fourfold; with wide registers by the one instruction. */
INLINE veci widen(const uint8_t *data, int is_signed, int wide)
{
#ifdef LOOKUP
    if (wide) {
        veci numbers;
        if (is_signed)
            __asm__("vpmovsxbd %1, %0" : "=v"(numbers) : "m"(*(const bytes16 *)data));
        else
            __asm__("vpmovzxbd %1, %0" : "=v"(numbers) : "m"(*(const bytes16 *)data));
        return numbers;
    }
#endif
    bytes16 raw;
    memcpy(&raw, data, sizeof raw);
    if (is_signed)
        return __builtin_convertvector(__builtin_convertvector(raw, shorts16), veci);
    return (veci)__builtin_convertvector(__builtin_convertvector((ubytes16)raw, half16), vecu);
}

/* Kinds of stored keys and values, in the order of kernels.py. Rows of the last two end with a float32 scale. */
enum { FLOAT32, BFLOAT16, INT8, FLOAT8 };

INLINE long bytes_of(int kind) { return kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1; }

/* 16 stored elements as float32, a scale not applied; kind and wide are constants in every caller. */
INLINE vec stored(const void *base, long element, int kind, int wide)
{
    if (kind < INT8)
        return load(base, element, kind == BFLOAT16);
    const uint8_t *data = (const uint8_t *)base + element;
    if (kind == INT8)
        return __builtin_convertvector(widen(data, 1, wide), vec);
    /* Sign, 4 bits of exponent, 3 of fraction. As float32 the exponent moves by 120; a number without one is 2^-6 too
     * large when it gets the next. */
    const veci bits = widen(data, 0, wide), low = (bits & 127) << 20, sign = (bits & 128) << 24;
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

INLINE long smaller(long a, long b)
{
    return a < b ? a : b;
}

INLINE float sum_lanes(vec x)
{
    vec8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
             __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    vec4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

/* Lane i: the lanes of x[i] added up. Neighbours are added while they are transposed: 15 additions for 16 sums. */
#define HALVES(a, b, i, j, k, l)                                                                                       \
    __builtin_shufflevector(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12,  \
                            k + 12, l + 12)
#define QUARTERS(a, b, i, j)                                                                                           \
    __builtin_shufflevector(a, b, i, i + 1, i + 2, i + 3, j, j + 1, j + 2, j + 3, i + 16, i + 17, i + 18, i + 19,      \
                            j + 16, j + 17, j + 18, j + 19)
INLINE vec sum_16(const vec *x)
{
    vec four[4]; /* in every quarter: sums over it of x[4 i] .. x[4 i + 3] */
    for (int i = 0; i < 4; i++) {
        const vec *y = x + 4 * i;
        const vec a = HALVES(y[0], y[1], 0, 16, 1, 17) + HALVES(y[0], y[1], 2, 18, 3, 19);
        const vec b = HALVES(y[2], y[3], 0, 16, 1, 17) + HALVES(y[2], y[3], 2, 18, 3, 19);
        four[i] = HALVES(a, b, 0, 1, 16, 17) + HALVES(a, b, 2, 3, 18, 19);
    }
    const vec a = QUARTERS(four[0], four[1], 0, 8) + QUARTERS(four[0], four[1], 4, 12);
    const vec b = QUARTERS(four[2], four[3], 0, 8) + QUARTERS(four[2], four[3], 4, 12);
    return QUARTERS(a, b, 0, 8) + QUARTERS(a, b, 4, 12);
}

INLINE vec4 quarter(vec x)
{
    vec8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
             __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
}

/* Lane i: the lanes of x[i] added up, for 4 vectors. */
INLINE vec4 sum_4(const vec *x)
{
    const vec4 y[4] = {quarter(x[0]), quarter(x[1]), quarter(x[2]), quarter(x[3])};
    const vec4 a = __builtin_shufflevector(y[0], y[1], 0, 4, 1, 5) + __builtin_shufflevector(y[0], y[1], 2, 6, 3, 7);
    const vec4 b = __builtin_shufflevector(y[2], y[3], 0, 4, 1, 5) + __builtin_shufflevector(y[2], y[3], 2, 6, 3, 7);
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
}

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
