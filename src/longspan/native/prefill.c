/* Attention of many query rows over many keys, at the speed of the vector units.
 *
 * Holds one kernel for CPUs with 32 vector registers of 16 floats. Must not know Python, torch or pages. Called from
 * longspan/native/kernels.py.
 *
 * The query heads of one KV head become rows of one matrix. A unit of work is one KV head and TILE_ROWS of its rows;
 * keys pass by in blocks of BLOCK, whatever runs of memory they lie in, with the softmax kept online (2205.14135). Scores
 * are products of ROWS x KEYS in registers, keys transposed once per unit and block; outputs ROWS x 64.
 *
 *     scores  ROWS rows of q (broadcast)  x  64 keys (4 vectors)      24 sums, 4 keys, 1 query in registers
 *     output  ROWS rows of scores (broadcast)  x  64 of v's columns   likewise
 */

#include <stdlib.h>

#include "lanes.h"

#define ROWS 6          /* query rows of one product in registers */
#define VECS 4          /* vectors beside them */
#define KEYS (VECS * LANES)
#define BLOCK 256       /* keys per block: their transpose and their values stay in the second-level cache */
#define TILE_ROWS 384   /* query rows of a unit: their outputs stay there, too */
#define LEAST_TILE_ROWS 24
#define LOG2_E 1.44269504088896340736f
#define LN_2 0.693147180559945309417f

/* 2^x for x <= 0; relative error below 2e-7; under -126 it is 0 to float32's eyes. */
INLINE vec exp2_lanes(vec x)
{
    const vec zero = {0};
    const veci low = x < -126.0f;
    const vec clamped = (vec)(((veci)(zero - 126.0f) & low) | ((veci)x & ~low));
    vec n = clamped + 12582912.0f; /* 1.5 * 2^23 rounds to the nearest integer */
    const veci exponent = (veci)n - (veci)(zero + 12582912.0f);
    const vec r = clamped - (n - 12582912.0f);
    vec p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.0f;
    return (vec)((veci)p + (exponent << 23));
}

/* 16 rows of 16 floats, from rows `stride` apart, to columns `out_stride` apart. */
INLINE void transpose(const float *from, long stride, float *to, long out_stride)
{
    vec a[LANES], b[LANES];
    for (int i = 0; i < LANES; i++)
        a[i] = load(from, i * stride, 0);
    for (int i = 0; i < 8; i++) {
        b[i] = __builtin_shufflevector(a[i], a[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        b[i + 8] = __builtin_shufflevector(a[i], a[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int j = 0; j < LANES; j += 8)
        for (int i = j; i < j + 4; i++) {
            a[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
            a[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        }
    for (int j = 0; j < LANES; j += 4)
        for (int i = j; i < j + 2; i++) {
            b[i] = __builtin_shufflevector(a[i], a[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            b[i + 2] = __builtin_shufflevector(a[i], a[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    for (int i = 0; i < LANES; i += 2) {
        a[i] = __builtin_shufflevector(b[i], b[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        a[i + 1] = __builtin_shufflevector(b[i], b[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
    for (int i = 0; i < LANES; i++)
        memcpy(to + i * out_stride, &a[i], sizeof a[i]);
}

/* keys [num, width], `stride` apart, to tiles of [width, KEYS]; zeros behind the last key. */
INLINE void pack_keys(const float *k, long stride, int num, int width, float *packed)
{
    for (int first = 0; first < num; first += LANES) {
        float *tile = packed + first / KEYS * KEYS * width + first % KEYS;
        if (first + LANES <= num) {
            for (int c = 0; c < width; c += LANES)
                transpose(k + first * stride + c, stride, tile + (long)c * KEYS, KEYS);
            continue;
        }
        for (int c = 0; c < width; c++)
            for (int i = 0; i < LANES; i++)
                tile[(long)c * KEYS + i] = first + i < num ? k[(first + i) * stride + c] : 0.0f;
    }
    const int end = (num + LANES - 1) / LANES * LANES, full = (num + KEYS - 1) / KEYS * KEYS;
    for (int first = end; first < full; first += LANES)
        for (int c = 0; c < width; c++)
            memset(packed + first / KEYS * KEYS * width + first % KEYS + (long)c * KEYS, 0, LANES * sizeof *packed);
}

/* scores [ROWS, KEYS], rows BLOCK apart = q [ROWS, width] times a tile of keys. */
INLINE void score_tile(const float *q, const float *keys, int width, float *scores)
{
    vec sums[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECS; c++)
            sums[r][c] = (vec){0};
    for (int d = 0; d < width; d++) {
        vec part[VECS];
        for (int c = 0; c < VECS; c++)
            part[c] = load(keys, (long)d * KEYS + c * LANES, 0);
        for (int r = 0; r < ROWS; r++) {
            const float value = q[r * width + d];
            for (int c = 0; c < VECS; c++)
                sums[r][c] += part[c] * value;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VECS; c++)
            memcpy(scores + r * BLOCK + c * LANES, &sums[r][c], sizeof sums[r][c]);
}

/* out [ROWS, width], columns [first, first + vecs * LANES) = decay * out + weights [ROWS, num], rows BLOCK apart, times v. */
INLINE void output_tile(const float *weights, const float *v, long stride, int num, const float *decay, int width,
                        int first, int vecs, float *out)
{
    vec sums[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < vecs; c++)
            sums[r][c] = load(out, (long)r * width + first + c * LANES, 0) * decay[r];
    for (int s = 0; s < num; s++) {
        vec part[VECS];
        for (int c = 0; c < vecs; c++)
            part[c] = load(v, s * stride + first + c * LANES, 0);
        for (int r = 0; r < ROWS; r++) {
            const float value = weights[r * BLOCK + s];
            for (int c = 0; c < vecs; c++)
                sums[r][c] += part[c] * value;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < vecs; c++)
            memcpy(out + (long)r * width + first + c * LANES, &sums[r][c], sizeof sums[r][c]);
}

INLINE float top_lane(vec x)
{
    float top = x[0];
    for (int i = 1; i < LANES; i++)
        top = x[i] > top ? x[i] : top;
    return top;
}

/* One row's scores become weights relative to its highest score so far; only keys [low, high) count, others get 0.
 *
 * `end` is where the weights that anybody reads end. Returns by what earlier sums and outputs are to be multiplied.
 */
INLINE float weigh(float *scores, int low, int high, int end, float *top, float *sum)
{
    const vec zero = {0}, least = zero - __builtin_inff();
    veci lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    if (low >= high) {
        memset(scores, 0, end * sizeof *scores);
        return 1.0f;
    }
    for (int s = low / LANES * LANES; s < high; s += LANES) {
        if (s >= low && s + LANES <= high)
            continue;
        const veci seen = (lane + s >= low) & (lane + s < high);
        const vec x = (vec)(((veci)load(scores, s, 0) & seen) | ((veci)least & ~seen));
        memcpy(scores + s, &x, sizeof x);
    }
    vec tops = least;
    for (int s = low / LANES * LANES; s < high; s += LANES) {
        const vec x = load(scores, s, 0);
        const veci higher = x > tops;
        tops = (vec)(((veci)x & higher) | ((veci)tops & ~higher));
    }
    const float block_top = top_lane(tops), new_top = block_top > *top ? block_top : *top;
    const float decay = *top == -__builtin_inff() ? 0.0f : exp2_lanes(zero + (*top - new_top))[0];
    vec total = zero;
    memset(scores, 0, low / LANES * LANES * sizeof *scores);
    int s = low / LANES * LANES;
    for (; s < high; s += LANES) {
        const vec x = load(scores, s, 0);
        vec weight = exp2_lanes(x - new_top);
        if (s < low || s + LANES > high) /* not e^-126, but nothing */
            weight = (vec)((veci)weight & (lane + s >= low) & (lane + s < high));
        memcpy(scores + s, &weight, sizeof weight);
        total += weight;
    }
    if (s < end)
        memset(scores + s, 0, (end - s) * sizeof *scores);
    *sum = *sum * decay + sum_lanes(total);
    *top = new_top;
    return decay;
}

typedef struct {
    const float *q, *k, *v;
    long q_stride, k_head_stride, k_stride, v_head_stride, v_stride;
    int heads, group, width;
    long num_queries;
    const long *starts, *lengths, *leads, *spans;
    long num_runs;
    float scale;
    float *out, *lse;
} work;

static long clamped(long x, long low, long high)
{
    return x < low ? low : x > high ? high : x;
}

/* Floats that a unit needs. */
static long scratch_of(int width)
{
    return (long)2 * TILE_ROWS * width + (long)BLOCK * width + ROWS * BLOCK + 2 * TILE_ROWS + 64;
}

/* One KV head and the rows [first, first + num) of its matrix of queries. */
INLINE void unit(const work *w, int head, long first, int num, float *scratch, int width)
{
    const int group = w->group, padded = (num + ROWS - 1) / ROWS * ROWS;
    float *q = scratch, *out = q + (long)TILE_ROWS * width, *keys = out + (long)TILE_ROWS * width;
    float *scores = keys + (long)BLOCK * width, *top = scores + ROWS * BLOCK, *sum = top + TILE_ROWS;
    const float *head_k = w->k + head * w->k_head_stride, *head_v = w->v + head * w->v_head_stride;

    memset(q, 0, (long)padded * width * sizeof *q);
    memset(out, 0, (long)padded * width * sizeof *out);
    for (int r = 0; r < padded; r++) {
        top[r] = -__builtin_inff();
        sum[r] = 0.0f;
    }
    for (int r = 0; r < num; r++) {
        const long query = (first + r) / group, of_group = (first + r) % group;
        const float *row = w->q + query * w->q_stride + (head * group + of_group) * (long)width;
        for (int c = 0; c < width; c += LANES) {
            const vec value = load(row, c, 0) * (w->scale * LOG2_E);
            memcpy(q + (long)r * width + c, &value, sizeof value);
        }
    }
    const long first_query = first / group, last_query = (first + num - 1) / group;
    for (long run = 0; run < w->num_runs; run++) {
        const long length = w->lengths[run], lead = w->leads[run], span = w->spans[run];
        /* Query i sees keys [i + lead - span + 1, i + lead] of the run. */
        const long run_low = clamped(first_query + lead - span + 1, 0, length);
        const long run_high = clamped(last_query + lead + 1, 0, length);
        for (long start = run_low; start < run_high; start += BLOCK) {
            const int block = run_high - start < BLOCK ? (int)(run_high - start) : BLOCK;
            const float *block_v = head_v + (w->starts[run] + start) * w->v_stride;
            pack_keys(head_k + (w->starts[run] + start) * w->k_stride, w->k_stride, block, width, keys);
            for (int r = 0; r < padded; r += ROWS) {
                int low[ROWS], high[ROWS], least = block, end = 0;
                float decay[ROWS];
                for (int i = 0; i < ROWS; i++) {
                    const long query = (first + r + i) / group;
                    high[i] = r + i < num ? (int)clamped(query + lead + 1 - start, 0, block) : 0;
                    low[i] = r + i < num ? (int)clamped(query + lead - span + 1 - start, 0, block) : 0;
                    if (low[i] < high[i]) {
                        end = high[i] > end ? high[i] : end;
                        least = low[i] < least ? low[i] : least;
                    }
                }
                if (least >= end)
                    continue;
                for (int tile = least / KEYS; tile * KEYS < end; tile++)
                    score_tile(q + (long)r * width, keys + (long)tile * KEYS * width, width, scores + tile * KEYS);
                for (int i = 0; i < ROWS; i++)
                    decay[i] = weigh(scores + i * BLOCK, low[i], high[i], end, top + r + i, sum + r + i);
                const float *seen_v = block_v + least * w->v_stride;
                int column = 0;
                for (; column + KEYS <= width; column += KEYS)
                    output_tile(scores + least, seen_v, w->v_stride, end - least, decay, width, column, VECS,
                                out + (long)r * width);
                for (; column < width; column += LANES)
                    output_tile(scores + least, seen_v, w->v_stride, end - least, decay, width, column, 1,
                                out + (long)r * width);
            }
        }
    }
    for (int r = 0; r < num; r++) {
        const long row = (first + r) / group * (w->heads * group) + head * group + (first + r) % group;
        const float inverse = sum[r] > 0.0f || sum[r] != sum[r] ? 1.0f / sum[r] : 0.0f;
        for (int c = 0; c < width; c += LANES) {
            const vec value = load(out, (long)r * width + c, 0) * inverse;
            memcpy(w->out + row * width + c, &value, sizeof value);
        }
        w->lse[row] = sum[r] == 0.0f ? -__builtin_inff() : top[r] * LN_2 + __builtin_logf(sum[r]);
    }
}

/* A constant width lets the compiler unroll. */
MULTIVERSION static void any_unit(const work *w, int head, long first, int num, float *scratch)
{
    if (w->width == 64)
        unit(w, head, first, num, scratch, 64);
    else if (w->width == 128)
        unit(w, head, first, num, scratch, 128);
    else
        unit(w, head, first, num, scratch, w->width);
}

/* Whether this CPU has the registers that the kernel is made for; without them it is right, and slow. */
int longspan_has_wide_registers(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return 0;
#endif
}

/* Consecutive queries over runs of keys.
 *
 * q [num_queries, heads * group, width], queries q_stride apart, heads contiguous; k and v: strides in elements, the last
 * dimension contiguous. Run j has lengths[j] keys from row starts[j]; query i sees its keys i + leads[j] - spans[j] + 1 up to
 * i + leads[j], as far as there are such. out [num_queries, heads * group, width] and lse [num_queries, heads * group],
 * contiguous, natural logarithm; -inf (and 0) for a query that sees nothing. All float32.
 * Returns 0, or 1 when a size is not supported or there is no memory (what is written then means nothing).
 */
int longspan_prefill(const float *q, const float *k, const float *v, long q_stride, long k_head_stride, long k_stride,
                     long v_head_stride, long v_stride, int heads, int group, int width, long num_queries,
                     const long *starts, const long *lengths, const long *leads, const long *spans, long num_runs,
                     float scale, int num_threads, float *out, float *lse)
{
    if (num_threads < 1 || width < LANES || width % LANES || heads < 1 || group < 1 || num_queries < 1)
        return 1;
    const work w = {q,     k,       v,      q_stride, k_head_stride, k_stride, v_head_stride, v_stride, heads, group,
                    width, num_queries, starts, lengths,  leads,         spans,    num_runs,      scale,    out,   lse};
    /* Three units a thread at least: they are not equally long. */
    const long rows = num_queries * group, even = (rows * heads / (3 * num_threads) + ROWS - 1) / ROWS * ROWS;
    const long tile_rows = clamped(even, LEAST_TILE_ROWS, TILE_ROWS);
    const long tiles = (rows + tile_rows - 1) / tile_rows, units = tiles * heads;
    int has_failed = 0;
#pragma omp parallel num_threads(num_threads)
    {
        float *scratch = aligned_alloc(64, (scratch_of(width) * sizeof *scratch + 63) / 64 * 64);
        if (!scratch)
            has_failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < units; i++) {
            const long tile = tiles - 1 - i / heads, first = tile * tile_rows; /* the last rows see most */
            if (scratch)
                any_unit(&w, (int)(i % heads), first, (int)(rows - first < tile_rows ? rows - first : tile_rows), scratch);
        }
        free(scratch);
    }
    return has_failed;
}
