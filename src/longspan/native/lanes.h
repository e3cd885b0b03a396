/* Sixteen floats at once: what the kernels share.
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

INLINE float sum_lanes(vec x)
{
    vec8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
             __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    vec4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
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
