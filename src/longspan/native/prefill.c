/* Attention of many query rows over runs of keys, at the speed of the arithmetic units.
 *
 * Holds one kernel for CPUs, in plain C with vector extensions (GCC 12 or newer, or clang). Must
 * not know Python, torch or pages. Called from longspan/native/kernels.py; `docs/decisions/0016-prefill-kernel.md` says
 * why it exists.
 *
 * Query heads of a KV head are rows of one matrix. Rows lie across lanes, ROWS of them at a time: queries are transposed
 * once, keys and values are read as they lie, one element for all lanes. So the softmax of a row goes down one lane, with
 * no sum or maximum across lanes, and is kept online: a row's state (`struct rows`) meets block after block of keys, of
 * any number of runs, and is divided by its denominator at the end.
 *
 *     scores [keys, rows] = K [keys, width] Q^T [width, rows]      tiles of SIDE keys x ROWS rows in registers
 *     state  [v_width, rows] += V^T [v_width, keys] exp(scores)    tiles of SIDE elements x ROWS rows in registers
 */

#include <stdlib.h>

#include "lanes.h"

#define SIDE (LANES < 16 ? 4 : 8) /* with 3 vectors of rows: 12 or 24 sums, 3 vectors and a broadcast in 16 or 32 registers */
#define MAX_VECTORS 3
#define ROWS (MAX_VECTORS * LANES)
#define MOST_QUERIES (1 << 29)
#define AHEAD 16         /* keys between one that is computed and one that memory is asked for; 8 to 24 are as fast */
#define PART 192         /* elements of queries that stay in the first-level cache while a block of keys meets them */
#define BLOCK 128        /* keys per block: the scores of ROWS rows take up to 24 KiB of the first-level cache */
#define STATE_BYTES (384 << 10) /* states of the rows that meet a block of keys while it is in the second-level cache */

/* A run of keys. Query i sees its keys j with i + lead - window < j <= i + lead. */
struct span {
    long row, num_keys, lead, window;
};

/* ROWS rows, in the order (query, head of the group). */
struct rows {
    float *queries; /* [width, ROWS], scaled for powers of 2 */
    float *values;  /* [v_width, ROWS] */
    float *top;     /* [ROWS] maximum of the scores so far, -inf before the first */
    float *sum;     /* [ROWS] */
    veci query[MAX_VECTORS]; /* index of the query */
    long first, last;        /* smallest and largest index */
};

/* Index of a query; no index comes near the ends. */
INLINE int near(long query) { return (int)(query < -MOST_QUERIES ? -MOST_QUERIES : query > MOST_QUERIES ? MOST_QUERIES : query); }
INLINE vec at(const float *base) { return load(base, 0, 0); }
INLINE vec choose(veci mask, vec a, vec b) { return (vec)(((veci)a & mask) | ((veci)b & ~mask)); }
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }

/* 2^x for x <= 0, relative error below 2e-7; 0 below -126, NaN for NaN. */
INLINE vec exp2_lanes(vec x)
{
    const vec shift = (vec){0} + 12582912.0f; /* 1.5 * 2^23 rounds to the nearest integer */
    const vec n = x + shift;
    const vec r = x - (n - shift);
    vec p = r * 1.535336188e-4f + 1.339887440e-3f;
    p = p * r + 9.618437357e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472028e-1f;
    p = p * r + 1.0f;
    return (vec)(((veci)p + ((veci)n << 23)) & ~(x <= -126.0f)); /* the low bits of n are an integer: added to the exponent */
}

/* Products of up to SIDE keys with queries over elements [from, to), added to what `scores` holds of the elements before.
 * After the last ones they are scores, which count for the maximum so far. Under a mask, queries [first, end) see the
 * first of the keys, and those one further on the next. `is_masked` and `vectors` are constants in every caller. */
INLINE void score_tile(const struct rows *rows, const float *k, long k_stride, int from, int to, int width,
                            long count, int first, int end, int is_first, int is_masked, int vectors, float *scores,
                            vec *top)
{
    const vec unseen = (vec){0} - __builtin_inff();
    const float *keys[SIDE];
    vec acc[SIDE][MAX_VECTORS];
    UNROLL
    for (int i = 0; i < SIDE; i++) {
        keys[i] = k + (i < count ? i : count - 1) * k_stride; /* a short tile repeats its last key */
        UNROLL
        for (int v = 0; v < vectors; v++)
            acc[i][v] = from ? at(scores + i * ROWS + v * LANES) : (vec){0};
    }
    const int part = (to - from) / SIDE;
    for (int s = 0; s < SIDE; s++) {
        const float *next = k + (AHEAD + s) * k_stride + from;
        for (int d = from + s * part; d < from + (s + 1) * part; d += 2) {
            if (is_first) /* a row ahead is asked for bit by bit, while this one is computed */
                __builtin_prefetch(next, 0, 2);
            next += LANES;
            UNROLL
            for (int e = d; e < d + 2; e++) {
                vec q[MAX_VECTORS];
                UNROLL
                for (int v = 0; v < vectors; v++)
                    q[v] = at(rows->queries + e * ROWS + v * LANES);
                UNROLL
                for (int i = 0; i < SIDE; i++)
                    UNROLL
                    for (int v = 0; v < vectors; v++)
                        acc[i][v] += q[v] * keys[i][e];
            }
        }
    }
    UNROLL
    for (int i = 0; i < SIDE; i++) {
        const int key = i < count ? i : (int)count - 1;
        UNROLL
        for (int v = 0; v < vectors; v++) {
            if (to == width) {
                if (is_masked) {
                    const veci is_seen = (rows->query[v] >= first + key) & (rows->query[v] < end + key);
                    acc[i][v] = choose(is_seen, acc[i][v], unseen);
                }
                top[v] = larger(acc[i][v], top[v]);
            }
            put(scores + i * ROWS + v * LANES, acc[i][v]);
        }
    }
}

/* Ask for a row of the next block: hardware does not foresee rows that are read in columns. */
INLINE void prefetch(const float *row, int width)
{
    for (int d = 0; d < width; d += LANES)
        __builtin_prefetch(row + d, 0, 2);
}

/* One state meets up to BLOCK keys, of which it sees some; the first to do so asks for the next block. */
INLINE void meet(struct rows *rows, const float *k, long k_stride, const float *v, long v_stride, int width,
                 int v_width, long key, long count, const struct span *span, int is_first, int is_masked, int vectors, float *scores)
{
    const int first = near(key - span->lead), end = near(key - span->lead + span->window);
    vec top[MAX_VECTORS], decay[MAX_VECTORS], sum[MAX_VECTORS];
    UNROLL
    for (int x = 0; x < vectors; x++)
        top[x] = at(rows->top + x * LANES);
    const int most = vectors == MAX_VECTORS ? PART : width; /* fewer rows leave the first-level cache to keys */
    for (int from = 0; from < width; from += most) {
        const int to = from + most < width ? from + most : width;
        for (int j = 0; j < count; j += SIDE) {
            if (is_first && from == 0 && v != k) /* else values are the first elements of keys */
                for (int i = j + BLOCK; i < j + BLOCK + SIDE; i++)
                    prefetch(v + i * v_stride, v_width);
            score_tile(rows, k + j * k_stride, k_stride, from, to, width, count - j, first + j, end + j, is_first,
                       is_masked, vectors, scores + j * ROWS, top);
        }
    }
    UNROLL
    for (int x = 0; x < vectors; x++) {
        const vec before = at(rows->top + x * LANES);
        put(rows->top + x * LANES, top[x]);
        if (is_masked) /* a row that has seen nothing yet */
            top[x] = choose(top[x] > -__builtin_inff(), top[x], (vec){0});
        decay[x] = exp2_lanes(before - top[x]);
        sum[x] = at(rows->sum + x * LANES) * decay[x];
    }
    for (long j = 0; j < count; j++)
        UNROLL
        for (int x = 0; x < vectors; x++) {
            float *place = scores + j * ROWS + x * LANES;
            const vec weight = exp2_lanes(at(place) - top[x]);
            sum[x] += weight;
            put(place, weight);
        }
    UNROLL
    for (int x = 0; x < vectors; x++)
        put(rows->sum + x * LANES, sum[x]);
    for (int d = 0; d < v_width; d += SIDE) {
        vec acc[SIDE][MAX_VECTORS];
        UNROLL
        for (int i = 0; i < SIDE; i++)
            UNROLL
            for (int x = 0; x < vectors; x++)
                acc[i][x] = at(rows->values + (d + i) * ROWS + x * LANES) * decay[x];
        for (long j = 0; j < count; j++) {
            vec weight[MAX_VECTORS];
            UNROLL
            for (int x = 0; x < vectors; x++)
                weight[x] = at(scores + j * ROWS + x * LANES);
            UNROLL
            for (int i = 0; i < SIDE; i++)
                UNROLL
                for (int x = 0; x < vectors; x++)
                    acc[i][x] += weight[x] * v[j * v_stride + d + i];
        }
        UNROLL
        for (int i = 0; i < SIDE; i++)
            UNROLL
            for (int x = 0; x < vectors; x++)
                put(rows->values + (d + i) * ROWS + x * LANES, acc[i][x]);
    }
}

/* Constants for widths and the number of vectors let the compiler keep sums in registers. */
#define MEET(w, vw, is_masked, vectors)                                                                                   \
    meet(rows, k, k_stride, v, v_stride, w, vw, key, count, span, is_first, is_masked, vectors, scores)
#define MEET_ALL(name, is_masked)                                                                                         \
    static void name(struct rows *rows, const float *k, long k_stride, const float *v, long v_stride, int width,  \
                          int v_width, long key, long count, const struct span *span, int is_first, int vectors, float *scores)  \
    {                                                                                                                  \
        if (vectors == 1)                                                                                              \
            MEET(width, v_width, is_masked, 1);                                                                           \
        else if (vectors == 2)                                                                                         \
            MEET(width, v_width, is_masked, 2);                                                                           \
        else                                                                                                           \
            MEET(width, v_width, is_masked, 3);                                                                           \
    }
MEET_ALL(meet_masked, 1)
MEET_ALL(meet_full, 0)

struct call {
    const void *q, *k, *v;
    long q_stride, q_head_stride, k_head_stride, k_stride, v_head_stride, v_stride; /* in elements */
    int heads, group, width, v_width, is_q_bf16, kind;
    const struct span *spans;
    long num_spans, num_runs;
    float scale;
};

static float element(const void *base, long i, int is_bf16)
{
    if (!is_bf16)
        return ((const float *)base)[i];
    const uint32_t wide = (uint32_t)((const uint16_t *)base)[i] << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* [count, width] rows of a kind as float32, contiguous. */
#define CONVERT(name, kind)                                                                                            \
    static void name(const void *base, long stride, long count, int width, float *out)                            \
    {                                                                                                                  \
        for (long j = 0; j < count; j++) {                                                                             \
            const float scale = kind < INT8 ? 1.0f : scale_behind(base, j, stride, width);                             \
            for (int d = 0; d < width; d += LANES)                                                                     \
                put(out + j * width + d, stored(base, j * stride + d, kind) * scale);                               \
        }                                                                                                              \
    }
CONVERT(convert_bfloat16, BFLOAT16)
CONVERT(convert_int8, INT8)
CONVERT(convert_float8, FLOAT8)

static void convert(const void *base, int kind, long stride, long count, int width, float *out)
{
    (kind == BFLOAT16 ? convert_bfloat16 : kind == INT8 ? convert_int8 : convert_float8)(base, stride, count, width, out);
}

/* A new state of `count` rows from `row` of a head's matrix of queries. */
static void read_rows(const struct call *c, int head, long row, long count, struct rows *rows)
{
    const float scale = c->scale * 1.44269504f; /* for powers of 2 */
    memset(rows->queries, 0, sizeof(float) * c->width * ROWS);
    memset(rows->values, 0, sizeof(float) * c->v_width * ROWS);
    for (int lane = 0; lane < ROWS; lane++) {
        rows->top[lane] = -__builtin_inff();
        rows->sum[lane] = 0.0f;
        const long r = row + smaller(lane, count - 1), query = r / c->group;
        rows->query[lane / LANES][lane % LANES] = (int)query;
        if (lane >= count)
            continue;
        const long start = query * c->q_stride + (head * c->group + r % c->group) * c->q_head_stride;
        for (int d = 0; d < c->width; d++)
            rows->queries[d * ROWS + lane] = element(c->q, start + d, c->is_q_bf16) * scale;
    }
    rows->first = row / c->group;
    rows->last = (row + count - 1) / c->group;
}

static void write_rows(const struct call *c, int head, long row, long count, const struct rows *rows, float *out,
                            float *lse)
{
    for (int lane = 0; lane < count; lane++) {
        const long r = row + lane;
        const long place = (r / c->group * c->heads + head) * c->group + r % c->group;
        const int is_empty = rows->sum[lane] == 0.0f; /* else it is 1 at least, or NaN */
        const float inverse = is_empty ? 0.0f : 1.0f / rows->sum[lane];
        for (int d = 0; d < c->v_width; d++)
            out[place * c->v_width + d] = rows->values[d * ROWS + lane] * inverse;
        lse[place] =
            is_empty ? -__builtin_inff() : rows->top[lane] * 0.693147181f + __builtin_logf(rows->sum[lane]);
    }
}

static long state_floats(const struct call *c) { return (c->width + c->v_width + 2) * ROWS; }
static long block_floats(const struct call *c) { return BLOCK * (ROWS + (c->kind != FLOAT32 ? c->width + c->v_width : 0)); }

/* Rows [first, first + num_rows) of a KV head's matrix of queries, over one run of every span's keys. */
static void run_task(const struct call *c, int head, long first, long num_rows, long run, float *out, float *lse,
                          float *scratch)
{
    const long num_states = (num_rows + ROWS - 1) / ROWS, item = bytes_of(c->kind);
    float *scores = scratch, *wide_k = scores + BLOCK * ROWS, *wide_v = wide_k + BLOCK * c->width;
    struct rows states[num_states];
    for (long s = 0; s < num_states; s++) {
        float *place = scratch + block_floats(c) + s * state_floats(c);
        states[s].queries = place;
        states[s].values = place += c->width * ROWS;
        states[s].top = place += c->v_width * ROWS;
        states[s].sum = place + ROWS;
        read_rows(c, head, first + s * ROWS, smaller(num_rows - s * ROWS, ROWS), &states[s]);
    }
    for (const struct span *span = c->spans; span < c->spans + c->num_spans; span++) {
        const char *head_k = (const char *)c->k + (head * c->k_head_stride + span->row * c->k_stride) * item;
        const char *head_v = (const char *)c->v + (head * c->v_head_stride + span->row * c->v_stride) * item;
        const long oldest = states[0].first + span->lead - span->window + 1;
        const long begin = span->num_keys * run / c->num_runs, stop = span->num_keys * (run + 1) / c->num_runs;
        const long newest = smaller(stop, states[num_states - 1].last + span->lead + 1);
        for (long key = oldest > begin ? oldest : begin; key < newest; key += BLOCK) {
            const long end = smaller(key + BLOCK, newest);
            long k_stride = c->k_stride, v_stride = c->v_stride;
            const float *k = (const float *)(head_k + key * k_stride * item);
            const float *v = (const float *)(head_v + key * v_stride * item);
            if (c->kind != FLOAT32) {
                const int is_one = k == v && k_stride == v_stride; /* values are the first elements of keys */
                convert(k, c->kind, k_stride, end - key, c->width, wide_k);
                if (!is_one)
                    convert(v, c->kind, v_stride, end - key, c->v_width, wide_v);
                k = wide_k, v = is_one ? wide_k : wide_v, k_stride = c->width, v_stride = is_one ? c->width : c->v_width;
            }
            for (long s = 0; s < num_states; s++) {
                struct rows *rows = &states[s];
                const long left = num_rows - s * ROWS, past = rows->first + span->lead - span->window + 1;
                const int vectors = (int)((smaller(left, ROWS) + LANES - 1) / LANES);
                const long from = past > key ? past : key, to = smaller(rows->last + span->lead + 1, end);
                if (from >= to)
                    continue;
                const int is_masked =
                    to > rows->first + span->lead + 1 || from < rows->last + span->lead - span->window + 1;
                (is_masked ? meet_masked : meet_full)(rows, k + (from - key) * k_stride, k_stride,
                                                      v + (from - key) * v_stride, v_stride, c->width, c->v_width,
                                                      from, to - from, span, s == 0, vectors, scores);
            }
        }
    }
    for (long s = 0; s < num_states; s++)
        write_rows(c, head, first + s * ROWS, smaller(num_rows - s * ROWS, ROWS), &states[s], out, lse);
}
/* Number of the kernels' signatures, INTERFACE of kernels.py: a binary of other ones must not be called. */
int longspan_interface(void) { return 9; }

/* Most lanes that this CPU has registers and instructions for; the binary for the fewest is asked. */
int longspan_lanes(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        return 8;
#endif
    return 4;
}

/* LANES and ROWS, for kernels.py. */
int longspan_own_lanes(void) { return LANES; }
int longspan_state_rows(void) { return ROWS; }

/* Consecutive queries over spans of keys.
 *
 * q [num_queries, heads * group, width] float32 or bfloat16; k [heads, rows, width] and v [heads, rows, v_width] of one
 * kind, with scales behind rows where it has them; strides in elements, contiguous in the last dimension. The keys of every span are cut into num_runs equal runs, each with a
 * partial of its own. out [num_runs, num_queries, heads * group, v_width] and lse [num_runs, num_queries, heads * group]:
 * float32, contiguous, natural logarithm; 0 and -inf for a query that sees nothing of a run.
 * Returns 0, or 1 when a size is not supported or memory is short (nothing is written then).
 */
int longspan_prefill(const void *q, const void *k, const void *v, long q_stride, long q_head_stride, long k_head_stride,
                     long k_stride, long v_head_stride, long v_stride, int heads, int group, int width, int v_width,
                     int is_q_bf16, int kind, long num_queries, const struct span *spans, long num_spans, float scale,
                     long num_runs, int num_threads, float *out, float *lse)
{
    if (num_threads < 1 || heads < 1 || group < 1 || width < LANES || width % LANES || v_width < LANES ||
        v_width % LANES || kind < FLOAT32 || kind > FLOAT8 || num_queries < 1 || num_queries > MOST_QUERIES || num_runs < 1)
        return 1;
    const struct call call = {q,       k,        v,       q_stride, q_head_stride, k_head_stride, k_stride,
                              v_head_stride, v_stride, heads, group, width, v_width, is_q_bf16, kind,
                              spans, num_spans, num_runs, scale};
    const long num_rows = num_queries * group;
    long task_rows = STATE_BYTES / (long)sizeof(float) / state_floats(&call) * ROWS;
    if (task_rows < ROWS)
        task_rows = ROWS;
    while (task_rows > ROWS && num_runs * heads * (num_rows / task_rows) < 4 * num_threads)
        task_rows = (task_rows / ROWS + 1) / 2 * ROWS; /* more tasks, so that threads end together */
    if (num_runs * heads * ((num_rows + task_rows - 1) / task_rows) < num_threads)
        task_rows = LANES; /* slower, but on every thread */
    const long num_states = (task_rows + ROWS - 1) / ROWS, tasks = (num_rows + task_rows - 1) / task_rows;
    const long scratch_bytes = (block_floats(&call) + num_states * state_floats(&call)) * (long)sizeof(float);
    const long share = (scratch_bytes + 4095) / 4096 * 4096;
    char *scratch = aligned_alloc(4096, share * num_threads);
    if (!scratch)
        return 1;
    long next = tasks * heads * num_runs; /* the last first: under causality they see the most */
#pragma omp parallel for schedule(static, 1) num_threads(num_threads)
    for (int thread = 0; thread < num_threads; thread++)
        for (long i; (i = __atomic_sub_fetch(&next, 1, __ATOMIC_RELAXED)) >= 0;) {
            const long first = i / heads / num_runs * task_rows, run = i / heads % num_runs;
            const long place = run * num_queries * heads * group;
            run_task(&call, (int)(i % heads), first, smaller(num_rows - first, task_rows), run, out + place * v_width,
                     lse + place, (float *)(scratch + thread * share));
        }
    free(scratch);
    return 0;
}
