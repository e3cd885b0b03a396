/* Merging of partial attention by log-sum-exp.
 *
 * Holds one kernel for CPUs, in plain C. Must not know Python, torch, or where partials come from. Called from
 * longspan/native/kernels.py; the law is Note [The merge law] in longspan/attention/partial.py, which does the same with
 * some fifteen operations of torch where this does not apply.
 */

#include "lanes.h"

#define SERIAL (1 << 16) /* elements that one thread merges before others are woken up */

static void blend(float *acc, const float *out, float share, float rest, int width)
{
    if (share < 0.5f) /* the smaller share is what is rounded */
        for (int c = 0; c < width; c++)
            acc[c] += (out[c] - acc[c]) * share;
    else
        for (int c = 0; c < width; c++)
            acc[c] = out[c] - (out[c] - acc[c]) * rest;
}

/* acc_out [rows, width] and acc_lse [rows] take in out and lse of the same shapes; all are contiguous.
 *
 * lse: natural logarithm; -inf says that a row is empty, and may stand beside anything, NaN included. A row that is empty
 * in both becomes 0. Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_merge_rows(float *acc_out, float *acc_lse, const float *out, const float *lse, long rows, int width,
                        int num_threads)
{
    if (rows < 0 || width < 1 || num_threads < 1)
        return 1;
    const float empty = -__builtin_inff();
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows * width > SERIAL)
    for (long r = 0; r < rows; r++) {
        float *acc = acc_out + r * width;
        const float *part = out + r * width;
        if (acc_lse[r] == empty) {
            if (lse[r] == empty)
                memset(acc, 0, width * sizeof *acc);
            else
                memmove(acc, part, width * sizeof *acc);
            acc_lse[r] = lse[r];
        } else if (lse[r] != empty) {
            const float lead = lse[r] - acc_lse[r], smaller = __builtin_expf(-__builtin_fabsf(lead));
            const float low = smaller / (1.0f + smaller), high = 1.0f / (1.0f + smaller);
            blend(acc, part, lead < 0 ? low : high, lead < 0 ? high : low, width);
            acc_lse[r] = (lead < 0 ? acc_lse[r] : lse[r]) + __builtin_log1pf(smaller);
        }
    }
    return 0;
}
