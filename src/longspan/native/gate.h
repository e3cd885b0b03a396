/* Gated activations, for kernels that hold an MLP or an expert. */

#ifndef LONGSPAN_GATE_H
#define LONGSPAN_GATE_H

#include "lanes.h"

enum { SILU = 0, GELU_TANH = 1 };

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
static void gated(float *gate, const float *up, long width, long activation)
{
    for (long c = 0; c < width; c += LANES) {
        const vec x = load(gate, c, 0);
        /* gelu: x / 2 * (1 + tanh(z)) with z = sqrt(2 / pi) * (x + 0.044715 x^3), and 1 + tanh(z) = 2 * sigmoid(2 z) */
        const vec z = activation == SILU ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
        const vec value = x * sigmoid(z) * load(up, c, 0);
        put(gate + c, value);
    }
}

#endif
