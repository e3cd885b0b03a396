/* Attention of a few query rows over many keys, at the speed of memory.
 *
 * Holds one kernel for CPUs, in plain C with vector extensions (GCC 12 or newer, or clang). Must not know Python, torch,
 * pages or masks: every row sees every key. Called from longspan/native/kernels.py.
 *
 * Decode multiplies a matrix of keys by 1 to 8 query rows per KV head. BLAS kernels need more rows to be fast: at 4 rows
 * they read keys at a quarter of the memory bandwidth. Here every key is read once and meets all rows, and softmax is
 * kept online per block of BLOCK keys:
 *
 *     scores [keys, rows]    tiles of several keys x all rows: sums in registers, transposed while their lanes are added
 *                            up, so that a tile ends as one vector of scores
 *     exp(scores)            whole vectors, whatever keys and rows they hold: lane i is of row i modulo the number of rows
 *     values [rows, width]   tiles of some rows x whole values, in registers over all keys of a block
 *
 * Values may be the first elements of keys, in the same memory: a block of them is in cache when it is read again.
 *
 * Rows are padded to 1, 2, 4 or 8.
 */

#include "lanes.h"

#define BLOCK 128        /* scores at a time: 128 keys of 1 row to 16 keys of 8; keys and values fit the first-level cache */
#define AHEAD 4096       /* bytes that are asked for before they are read */
#define MAX_ROWS 8
#define MAX_WIDTH 576   /* that of latent attention */


INLINE vec larger(vec a, vec b)
{
    const veci mask = a > b;
    return (vec)(((veci)a & mask) | ((veci)b & ~mask));
}

/* Keys or values of one KV head; stride in elements; kind is a constant in every kernel. */
struct matrix {
    const void *base;
    long stride;
    int kind;
};

INLINE vec part_of(struct matrix m, long row, long c) { return stored(m.base, row * m.stride + c, m.kind); }

/* Multiply what belongs to each key, values [keys, padded], by the scale of the key's row in m. */
INLINE void apply_scales(struct matrix m, long first, long keys, long padded, long width, float *values)
{
    if (m.kind < INT8)
        return;
    for (long s = 0; s < keys; s++) {
        const float scale = scale_behind(m.base, first + s, m.stride, width);
        for (long r = 0; r < padded; r++)
            values[s * padded + r] *= scale;
    }
}

/* Prefetch the memory AHEAD of `count` elements from (row, c) on: it is read next where rows follow each other. */
INLINE void prefetch(struct matrix m, long row, long c, long count)
{
    const long item = bytes_of(m.kind);
    const char *start = (const char *)m.base + (row * m.stride + c) * item + AHEAD;
    for (long byte = 0; byte < count * item; byte += 64)
        __builtin_prefetch(start + byte);
}

/* scores [keys, padded] of keys from `first` on; -inf up to a whole vector. */
INLINE void score(const float *q, struct matrix k, long first, long keys, long rows, long padded, long width,
                  float *scores)
{
    const long together = padded < TILE ? padded : TILE, step = TILE / together; /* rows and keys of a tile */
    long s = 0;
    for (; s + step <= keys; s += step)
        UNROLL
        for (long r = 0; r < padded; r += together) {
            if (r == 0)
                prefetch(k, first + s, 0, step * width);
            vec dot[TILE];
            UNROLL
            for (long i = 0; i < TILE; i++)
                dot[i] = (vec){0};
            for (long c = 0; c < width; c += LANES)
                UNROLL
                for (long i = 0; i < step; i++) {
                    const vec part = part_of(k, first + s + i, c);
                    UNROLL
                    for (long j = 0; j < (together < rows - r ? together : rows - r); j++)
                        dot[i * together + j] += part * load(q, (r + j) * width + c, 0);
                }
            put(scores + s * padded + r, sum_each(dot));
        }
    for (; s < keys; s++) /* fewer than a tile */
        for (long r = 0; r < padded; r++) {
            vec dot = {0};
            for (long c = 0; c < width && r < rows; c += LANES)
                dot += part_of(k, first + s, c) * load(q, r * width + c, 0);
            scores[s * padded + r] = sum_lanes(dot);
        }
    for (long i = keys * padded; i % LANES; i++)
        scores[i] = -__builtin_inff();
}

/* Softmax of the keys so far. Lane i is of row i % padded. */
struct softmax {
    float top[LANES];
    float sum[LANES];    /* the sum of a row is that of its lanes */
    float shrink[LANES]; /* factor of the last block on weights of the blocks before */
};

/* scores [num] to weights. A function of its own, lest its constants take registers from the tiles around it. */
__attribute__((noinline)) static void soften(float *scores, long num, long padded, struct softmax *state)
{
    const vec before = load(state->top, 0, 0);
    vec top = before;
    for (long i = 0; i < num; i += LANES)
        top = larger(load(scores, i, 0), top);
    for (long n = LANES / 2; n >= padded; n /= 2) { /* across lanes of one row */
        float lane[LANES], other[LANES];
        put(lane, top);
        for (long i = 0; i < LANES; i++)
            other[i] = lane[(i + n) % LANES];
        top = larger(top, load(other, 0, 0));
    }
    const vec shrink = exp_lanes(before - top); /* first block: e^-inf, which is next to 0, of nothing */
    vec sum = load(state->sum, 0, 0) * shrink;
    for (long i = 0; i < num; i += LANES) {
        const vec weights = exp_lanes(load(scores, i, 0) - top);
        put(scores + i, weights);
        sum += weights;
    }
    put(state->top, top);
    put(state->sum, sum);
    put(state->shrink, shrink);
}

/* acc [rows, width] = acc * shrink + weights [keys, padded]^T V: `num_rows` rows from `row` on, `num` vectors from column
 * `c` on. */
INLINE void add_tile(struct matrix v, long first, long keys, long row, long num_rows, long padded, long width, long c,
                     long num, const float *weights, const float *shrink, float *acc)
{
    vec sum[TILE];
    acc += row * width + c;
    weights += row;
    UNROLL
    for (long r = 0; r < num_rows; r++)
        UNROLL
        for (long i = 0; i < num; i++)
            sum[r * num + i] = load(acc, r * width + i * LANES, 0) * shrink[row + r];
    for (long s = 0; s < keys; s++) {
        if (row == 0)
            prefetch(v, first + s, c, num * LANES);
        UNROLL
        for (long i = 0; i < num; i++) {
            const vec part = part_of(v, first + s, c + i * LANES);
            UNROLL
            for (long r = 0; r < num_rows; r++)
                sum[r * num + i] += part * weights[s * padded + r];
        }
    }
    UNROLL
    for (long r = 0; r < num_rows; r++)
        UNROLL
        for (long i = 0; i < num; i++)
            put(acc + r * width + i * LANES, sum[r * num + i]);
}

/* Update acc for all rows and columns. Whole rows of V first: memory is read as it lies, the next rows find it in
 * cache. */
INLINE void add_values(struct matrix v, long first, long keys, long rows, long padded, long width,
                       const float *weights, const float *shrink, float *acc)
{
    long c = 0;
#define COLUMNS(num)                                                                                                   \
    if (num <= TILE)                                                                                                   \
        for (const long most = TILE / num; c + num * LANES <= width; c += num * LANES) {                               \
            for (long row = 0; row + most <= rows; row += most)                                                        \
                add_tile(v, first, keys, row, most, padded, width, c, num, weights, shrink, acc);                      \
            if (rows % most)                                                                                           \
                add_tile(v, first, keys, rows - rows % most, rows % most, padded, width, c, num, weights, shrink, acc);\
        }
#if LANES >= 16
    COLUMNS(16)
#endif
#if LANES >= 8
    COLUMNS(8)
#endif
    COLUMNS(4)
    COLUMNS(2)
    COLUMNS(1)
}

/* Attention of one KV head's rows over runs of consecutive keys. out [rows, v_width] and lse [rows] are float32. */
INLINE void attend(const float *q, struct matrix k, struct matrix v, const long *starts, const long *lengths,
                   long num_runs, long rows, long width, long v_width, float *out, float *lse)
{
    const long padded = rows <= 2 ? rows : rows <= 4 ? 4 : 8, most = BLOCK / padded; /* keys at a time */
    float scores[BLOCK] __attribute__((aligned(64)));
    float acc[MAX_ROWS * MAX_WIDTH] __attribute__((aligned(64)));
    struct softmax state;
    put(state.top, (vec){0} - __builtin_inff());
    put(state.sum, (vec){0});
    for (long i = 0; i < rows * v_width; i++)
        acc[i] = 0.0f;
    for (long run = 0, start = 0; run < num_runs;) {
        const long first = starts[run] + start, left = lengths[run] - start, keys = left < most ? left : most;
        start = left > most ? start + most : 0;
        run += left <= most;
        score(q, k, first, keys, rows, padded, width, scores);
        apply_scales(k, first, keys, padded, width, scores);
        soften(scores, keys * padded, padded, &state);
        apply_scales(v, first, keys, padded, v_width, scores);
        add_values(v, first, keys, rows, padded, v_width, scores, state.shrink, acc);
    }
    for (long r = 0; r < rows; r++) {
        float total = 0.0f;
        for (long i = r; i < LANES; i += padded)
            total += state.sum[i];
        const float inverse = 1.0f / total;
        for (long c = 0; c < v_width; c += LANES)
            put(out + r * v_width + c, load(acc, r * v_width + c, 0) * inverse);
        lse[r] = state.top[r] + __builtin_logf(total);
    }
}

/* A constant number of rows lets the compiler keep tiles in registers. */
#define ROWS(n)                                                                                                        \
    case n:                                                                                                            \
        attend(q, k, v, starts, lengths, num_runs, n < LANES ? n : LANES, width, v_width, out, lse);                   \
        break;
#define HEAD(name, stored_kind)                                                                                        \
    static void name(const float *q, struct matrix k, struct matrix v, const long *starts, const long *lengths,        \
                     long num_runs, int rows, int width, int v_width, float *out, float *lse)                          \
    {                                                                                                                  \
        k.kind = v.kind = stored_kind;                                                                                 \
        for (; rows > LANES; rows -= LANES) { /* keys are read again: a lane is of one row */                          \
            attend(q, k, v, starts, lengths, num_runs, LANES, width, v_width, out, lse);                               \
            q += LANES * width;                                                                                        \
            out += LANES * v_width;                                                                                    \
            lse += LANES;                                                                                              \
        }                                                                                                              \
        switch (rows) {                                                                                                \
            ROWS(1)                                                                                                    \
            ROWS(2)                                                                                                    \
            ROWS(3)                                                                                                    \
            ROWS(4)                                                                                                    \
            ROWS(5)                                                                                                    \
            ROWS(6)                                                                                                    \
            ROWS(7)                                                                                                    \
            ROWS(8)                                                                                                    \
        }                                                                                                              \
    }

typedef void head(const float *, struct matrix, struct matrix, const long *, const long *, long, int, int, int,
                  float *, float *);

HEAD(attend_float32, FLOAT32)
HEAD(attend_bfloat16, BFLOAT16)
HEAD(attend_int8, INT8)
HEAD(attend_float8, FLOAT8)

/* The kernel for a kind; NULL if there is none. */
static head *head_for(int kind)
{
    head *const kernels[] = {attend_float32, attend_bfloat16, attend_int8, attend_float8};
    return kind >= FLOAT32 && kind <= FLOAT8 ? kernels[kind] : NULL;
}

static int is_width(int width) { return width >= LANES && width <= MAX_WIDTH && width % LANES == 0; }

/* Every row of q over every key, once per run of keys, runs and KV heads in parallel.
 *
 * q [heads, rows, width] float32, contiguous and already scaled. k [.., width] and v [.., v_width] of one kind, with scales
 * behind rows where it has them; strides in elements; the last dimension contiguous. Keys are cut into num_runs equal runs (the last one shorter).
 * out [num_runs, heads, rows, v_width] and lse [num_runs, heads, rows]: float32, contiguous; natural logarithm.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_decode(const float *q, const void *k, const void *v, long k_head_stride, long k_stride, long v_head_stride,
                    long v_stride, int heads, int rows, long num_keys, int width, int v_width, int kind,
                    int num_runs, int num_threads, float *out, float *lse)
{
    head *const attend_head = head_for(kind);
    if (!attend_head || num_threads < 1 || rows < 1 || rows > MAX_ROWS || !is_width(width) || !is_width(v_width) || num_runs < 1)
        return 1;
    const long run_len = (num_keys + num_runs - 1) / num_runs;
    if (run_len * (num_runs - 1) >= num_keys)
        return 1; /* a run would be empty */
    const long item = bytes_of(kind);
#pragma omp parallel for collapse(2) schedule(static, 1) num_threads(num_threads)
    for (int run = 0; run < num_runs; run++) {
        for (int h = 0; h < heads; h++) {
            const long first = run * run_len;
            const long count = num_keys - first < run_len ? num_keys - first : run_len;
            const struct matrix keys = {(const char *)k + h * k_head_stride * item, k_stride};
            const struct matrix values = {(const char *)v + h * v_head_stride * item, v_stride};
            const long row = ((long)run * heads + h) * rows;
            attend_head(q + (long)h * rows * width, keys, values, &first, &count, 1, rows, width, v_width,
                        out + row * v_width, lse + row);
        }
    }
    return 0;
}

/* Many queries at once, each over its own runs of keys: the decode of a batch. Queries and KV heads in parallel.
 *
 * q [T, heads, rows, width] float32 or bfloat16, contiguous; scaled here. k and v as above. Query i is row query_rows[i] of q,
 * out and lse, and sees runs[offsets[i]] up to runs[offsets[i + 1]]: keys [starts[j], starts[j] + lengths[j]), no run
 * empty. out [T, heads, rows, v_width] and lse [T, heads, rows]: float32, contiguous; other rows are left alone.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_decode_batch(const void *q, const void *k, const void *v, long k_head_stride, long k_stride,
                          long v_head_stride, long v_stride, int heads, int rows, int width, int v_width, int is_q_bf16, int kind,
                          float scale, long num_queries, const long *query_rows, const long *offsets,
                          const long *starts, const long *lengths, int num_threads, float *out, float *lse)
{
    head *const attend_head = head_for(kind);
    if (!attend_head || num_threads < 1 || rows < 1 || rows > MAX_ROWS || !is_width(width) || !is_width(v_width))
        return 1;
    for (long i = 0; i < num_queries; i++)
        if (offsets[i] == offsets[i + 1])
            return 1;
    const long item = bytes_of(kind);
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(num_threads)
    for (long i = 0; i < num_queries; i++) {
        for (int h = 0; h < heads; h++) {
            float scaled[MAX_ROWS * MAX_WIDTH] __attribute__((aligned(64)));
            const long row = (query_rows[i] * heads + h) * rows;
            for (long c = 0; c < (long)rows * width; c += LANES) {
                const vec value = load(q, row * width + c, is_q_bf16) * scale;
                put(scaled + c, value);
            }
            const struct matrix keys = {(const char *)k + h * k_head_stride * item, k_stride};
            const struct matrix values = {(const char *)v + h * v_head_stride * item, v_stride};
            attend_head(scaled, keys, values, starts + offsets[i], lengths + offsets[i], offsets[i + 1] - offsets[i],
                        rows, width, v_width, out + row * v_width, lse + row);
        }
    }
    return 0;
}
