/* Short causal convolutions per channel, for many tokens and for single ones that go on from a state.
 *
 * Holds two kernels for CPUs. Must not know Python, torch, models or requests. Called from longspan/native/recurrence.py.
 */

#include "gate.h"

#define TOKENS 64    /* of a thread's task */
#define CHANNELS 256 /* whose factors stay in the first-level cache */
#define SERIAL 4096  /* products that one thread computes before others are woken up */

INLINE vec finished(vec sum, long is_silu) { return is_silu ? sum * sigmoid(sum) : sum; }

/* Output of tokens [from, to) of one request; x and out are its first rows. */
static void convolve(const float *x, long x_stride, const float *weight, const float *bias, long channels,
                                  long taps, long is_silu, long from, long to, float *out)
{
    for (long block = 0; block < channels; block += CHANNELS)
        for (long t = from; t < to; t++)
            for (long c = block; c < smaller(block + CHANNELS, channels); c += LANES) {
                vec sum = bias ? load(bias, c, 0) : (vec){0};
                for (long j = t < taps - 1 ? taps - 1 - t : 0; j < taps; j++)
                    sum += load(x, (t - taps + 1 + j) * x_stride + c, 0) * load(weight, j * channels + c, 0);
                sum = finished(sum, is_silu);
                put(out + t * channels + c, sum);
            }
}

/* x [batch, tokens, channels] to out of the same shape, contiguous; zeros stand before the first token.
 *
 * weight [taps, channels]: the last tap is the token's own; bias [channels] or null; strides in elements.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_convolve(const float *x, long batch_stride, long token_stride, const float *weight, const float *bias,
                      long batch, long tokens, long channels, long taps, long is_silu, int num_threads, float *out)
{
    if (num_threads < 1 || batch < 1 || tokens < 1 || taps < 1 || channels < LANES || channels % LANES)
        return 1;
    const long tasks = (tokens + TOKENS - 1) / TOKENS;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (batch * tokens * channels > SERIAL)
    for (long task = 0; task < batch * tasks; task++) {
        const long request = task / tasks, from = task % tasks * TOKENS;
        convolve(x + request * batch_stride, token_stride, weight, bias, channels, taps, is_silu, from,
                 smaller(from + TOKENS, tokens), out + request * tokens * channels);
    }
    return 0;
}

static void step(const float *x, float *state, const float *weight, const float *bias, long taps,
                              long is_silu, float *out)
{
    float sums[LANES];
    for (int c = 0; c < LANES; c++) {
        float *kept = state + c * taps, sum = bias ? bias[c] : 0.0f;
        for (long j = 0; j < taps - 1; j++) {
            kept[j] = kept[j + 1];
            sum += kept[j] * weight[c * taps + j];
        }
        kept[taps - 1] = x[c];
        sums[c] = sum + x[c] * weight[c * taps + taps - 1];
    }
    const vec value = finished(load(sums, 0, 0), is_silu);
    put(out, value);
}

/* One token x [batch, channels] of each request, behind the inputs in state [batch, channels, taps], which takes it in.
 *
 * weight [channels, taps], bias [channels] or null, out [batch, channels]; all are contiguous.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_convolve_step(const float *x, float *state, const float *weight, const float *bias, long batch, long channels,
                           long taps, long is_silu, int num_threads, float *out)
{
    if (num_threads < 1 || batch < 1 || taps < 1 || channels < LANES || channels % LANES)
        return 1;
    const long blocks = channels / LANES;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (batch * channels > SERIAL)
    for (long task = 0; task < batch * blocks; task++) {
        const long row = task / blocks * channels, c = task % blocks * LANES;
        step(x + row + c, state + (row + c) * taps, weight + c * taps, bias ? bias + c : 0, taps, is_silu, out + row + c);
    }
    return 0;
}
