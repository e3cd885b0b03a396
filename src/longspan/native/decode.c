/* Attention of a few query rows over many keys, at the speed of memory.
 *
 * Holds one kernel for CPUs, in plain C with vector extensions (GCC 12 or newer, or clang). Must not know Python, torch,
 * pages or masks: every row sees every key. Called from longspan/native/kernels.py.
 *
 * Decode multiplies a matrix of keys by 1 to 8 query rows per KV head. BLAS kernels need more rows to be fast: at 4 rows
 * they read keys at a quarter of the memory bandwidth. Here every key is read once, met with all rows in registers,
 * and softmax is kept online per block of BLOCK keys.
 */

#include "lanes.h"

#define BLOCK 128    /* keys per block: scores of all rows stay in the first-level cache */
#define MAX_ROWS 8
#define MAX_WIDTH 256

/* One KV head: rows x the keys of all runs, a run being consecutive keys. out [rows, width] and lse [rows] are float32. */
INLINE void attend(const float *q, const void *k, const void *v, long k_stride, long v_stride, const long *starts,
                   const long *lengths, long num_runs, int rows, int width, int is_bf16, float *out, float *lse)
{
    float scores[MAX_ROWS][BLOCK] __attribute__((aligned(64)));
    float top[MAX_ROWS], sum[MAX_ROWS];
    vec acc[MAX_ROWS][MAX_WIDTH / LANES];
    const int chunks = width / LANES;

    for (int r = 0; r < rows; r++) {
        top[r] = -__builtin_inff();
        sum[r] = 0.0f;
        for (int c = 0; c < chunks; c++)
            acc[r][c] = (vec){0};
    }
    for (long run = 0, start = 0; run < num_runs; start += BLOCK) {
        const long first = starts[run] + start, left = lengths[run] - start;
        const int keys = left < BLOCK ? (int)left : BLOCK;
        if (left <= BLOCK) {
            run++;
            start = -BLOCK;
        }
        for (int s = 0; s < keys; s++) {
            const long key = (first + s) * k_stride;
            vec dot[MAX_ROWS];
            for (int r = 0; r < rows; r++)
                dot[r] = (vec){0};
            for (int c = 0; c < chunks; c++) {
                const vec part = load(k, key + c * LANES, is_bf16);
                for (int r = 0; r < rows; r++)
                    dot[r] += part * load(q, (long)r * width + c * LANES, 0);
            }
            for (int r = 0; r < rows; r++)
                scores[r][s] = sum_lanes(dot[r]);
        }
        const int padded = (keys + LANES - 1) / LANES * LANES;
        for (int r = 0; r < rows; r++) {
            float block_top = top[r];
            for (int s = 0; s < keys; s++)
                block_top = scores[r][s] > block_top ? scores[r][s] : block_top;
            for (int s = keys; s < padded; s++)
                scores[r][s] = -__builtin_inff();
            const vec decay = exp_lanes((vec){0} + (top[r] - block_top)); /* first block: e^-inf, which is next to 0 */
            const float shrink = top[r] == -__builtin_inff() ? 0.0f : decay[0];
            vec total = {0};
            for (int s = 0; s < padded; s += LANES) {
                vec x;
                memcpy(&x, &scores[r][s], sizeof x);
                x = exp_lanes(x - block_top);
                if (s + LANES > keys)
                    for (int i = keys - s; i < LANES; i++)
                        x[i] = 0.0f;
                memcpy(&scores[r][s], &x, sizeof x);
                total += x;
            }
            sum[r] = sum[r] * shrink + sum_lanes(total);
            top[r] = block_top;
            for (int c = 0; c < chunks; c++)
                acc[r][c] *= shrink;
        }
        for (int s = 0; s < keys; s++) {
            const long key = (first + s) * v_stride;
            for (int c = 0; c < chunks; c++) {
                const vec part = load(v, key + c * LANES, is_bf16);
                for (int r = 0; r < rows; r++)
                    acc[r][c] += part * scores[r][s];
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        const float inverse = 1.0f / sum[r];
        for (int c = 0; c < chunks; c++) {
            const vec value = acc[r][c] * inverse;
            memcpy(out + (long)r * width + c * LANES, &value, sizeof value);
        }
        lse[r] = top[r] + __builtin_logf(sum[r]);
    }
}

/* Constants for rows and width let the compiler keep queries and sums in registers. */
#define ROWS(n, width, is_bf16)                                                                                        \
    case n:                                                                                                            \
        attend(q, k, v, k_stride, v_stride, starts, lengths, num_runs, n, width, is_bf16, out, lse);                   \
        break;
#define ALL_ROWS(width, is_bf16)                                                                                       \
    switch (rows) {                                                                                                    \
        ROWS(1, width, is_bf16)                                                                                        \
        ROWS(2, width, is_bf16)                                                                                        \
        ROWS(3, width, is_bf16)                                                                                        \
        ROWS(4, width, is_bf16)                                                                                        \
    default:                                                                                                           \
        attend(q, k, v, k_stride, v_stride, starts, lengths, num_runs, rows, width, is_bf16, out, lse);                \
    }

#define HEAD(name, is_bf16)                                                                                            \
    MULTIVERSION static void name(const float *q, const void *k, const void *v, long k_stride, long v_stride,         \
                                  const long *starts, const long *lengths, long num_runs, int rows, int width,        \
                                  float *out, float *lse)                                                             \
    {                                                                                                                  \
        if (width == 64) {                                                                                             \
            ALL_ROWS(64, is_bf16)                                                                                      \
        } else if (width == 128) {                                                                                     \
            ALL_ROWS(128, is_bf16)                                                                                     \
        } else                                                                                                         \
            attend(q, k, v, k_stride, v_stride, starts, lengths, num_runs, rows, width, is_bf16, out, lse);            \
    }

HEAD(head_float32, 0)
HEAD(head_bfloat16, 1)

/* Every row of q over every key, once per run of keys, runs and KV heads in parallel.
 *
 * q [heads, rows, width] float32, contiguous and already scaled. k and v: float32 or bfloat16; strides in elements; the
 * last dimension contiguous. Keys are cut into num_runs equal runs (the last one shorter). out [num_runs, heads, rows,
 * width] and lse [num_runs, heads, rows]: float32, contiguous; natural logarithm.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_decode(const float *q, const void *k, const void *v, long k_head_stride, long k_stride, long v_head_stride,
                    long v_stride, int heads, int rows, long num_keys, int width, int is_bf16, int num_runs,
                    int num_threads, float *out, float *lse)
{
    if (num_threads < 1 || rows < 1 || rows > MAX_ROWS || width < LANES || width > MAX_WIDTH || width % LANES || num_runs < 1)
        return 1;
    const long run_len = (num_keys + num_runs - 1) / num_runs;
    if (run_len * (num_runs - 1) >= num_keys)
        return 1; /* a run would be empty */
    const long item = is_bf16 ? 2 : 4;
#pragma omp parallel for collapse(2) schedule(static, 1) num_threads(num_threads)
    for (int run = 0; run < num_runs; run++) {
        for (int head = 0; head < heads; head++) {
            const long first = run * run_len;
            const long count = num_keys - first < run_len ? num_keys - first : run_len;
            const char *keys = (const char *)k + (head * k_head_stride + first * k_stride) * item;
            const char *values = (const char *)v + (head * v_head_stride + first * v_stride) * item;
            const long row = ((long)run * heads + head) * rows;
            const long start = 0;
            (is_bf16 ? head_bfloat16 : head_float32)(q + (long)head * rows * width, keys, values, k_stride, v_stride,
                                                     &start, &count, 1, rows, width, out + row * width, lse + row);
        }
    }
    return 0;
}

/* Many queries at once, each over its own runs of keys: the decode of a batch. Queries and KV heads in parallel.
 *
 * q [T, heads, rows, width] of k's dtype, contiguous; scaled here. k and v as above. Query i is row query_rows[i] of q,
 * out and lse, and sees runs[offsets[i]] up to runs[offsets[i + 1]]: keys [starts[j], starts[j] + lengths[j]), no run
 * empty. out [T, heads, rows, width] and lse [T, heads, rows]: float32, contiguous; other rows are left alone.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_decode_batch(const void *q, const void *k, const void *v, long k_head_stride, long k_stride,
                          long v_head_stride, long v_stride, int heads, int rows, int width, int is_bf16, float scale,
                          long num_queries, const long *query_rows, const long *offsets, const long *starts,
                          const long *lengths, int num_threads, float *out, float *lse)
{
    if (num_threads < 1 || rows < 1 || rows > MAX_ROWS || width < LANES || width > MAX_WIDTH || width % LANES)
        return 1;
    for (long i = 0; i < num_queries; i++)
        if (offsets[i] == offsets[i + 1])
            return 1;
    const long item = is_bf16 ? 2 : 4;
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(num_threads)
    for (long i = 0; i < num_queries; i++) {
        for (int head = 0; head < heads; head++) {
            float scaled[MAX_ROWS * MAX_WIDTH] __attribute__((aligned(64)));
            const long row = (query_rows[i] * heads + head) * rows;
            for (long c = 0; c < (long)rows * width; c += LANES) {
                const vec value = load(q, row * width + c, is_bf16) * scale;
                memcpy(scaled + c, &value, sizeof value);
            }
            (is_bf16 ? head_bfloat16 : head_float32)(scaled, (const char *)k + head * k_head_stride * item,
                                                     (const char *)v + head * v_head_stride * item, k_stride, v_stride,
                                                     starts + offsets[i], lengths + offsets[i],
                                                     offsets[i + 1] - offsets[i], rows, width, out + row * width,
                                                     lse + row);
        }
    }
    return 0;
}
