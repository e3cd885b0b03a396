/* The gated delta rule: attention with a state of fixed size in place of keys and values.
 *
 * Holds one kernel for CPUs. Must not know Python, torch, models or requests. Called from longspan/native/recurrence.py.
 *
 * A head carries a matrix S [width, v_width] from token to token. With key k, query q, decay a per row of S, and rate b:
 *
 *     S = diag(a) S;  d = b (v - k^T S);  S = S + k d^T;  out = q^T S
 *
 * Columns of S are independent, so a block of them stays in the first-level cache while it meets many tokens. Tokens meet
 * it GROUP at a time, which is exact: read with all their keys and queries first, each decayed by what is before it in the
 * group, then correct each by the tokens before it, by products of keys with keys and with queries; then write once:
 *
 *     m_i = k_i^T A_i S,  o_i = q_i^T A_i S        A_i: product of the decays up to token i;  A_ij: of those behind j
 *     d_i = b_i (v_i - m_i - sum_{j < i} (k_i^T A_ij k_j) d_j)
 *     out_i = o_i + sum_{j <= i} (q_i^T A_ij k_j) d_j
 *     S = A_n S + sum_j A_nj k_j d_j^T
 *
 * With 4 tokens that is 13 multiply-adds per element of S, less than 16 for one by one, and a quarter of the traffic.
 */

#include "lanes.h"

#define GROUP 4
#define PIECE 32      /* tokens between two copies of a block of columns */
#define MOST_WIDTH 256
#define ROW (MOST_WIDTH + LANES) /* of what is read in columns: no power of 2 */
#define VECTORS 2     /* of columns in a block: 16 sums, 2 of S and a factor fit 32 registers */
#define COLUMNS (VECTORS * LANES)

typedef struct {
    const float *q, *k, *v, *gate, *rate;
    float *state, *out; /* [batch, v_heads, width, v_width], [batch, tokens, v_heads, v_width], contiguous */
    long q_strides[3], k_strides[3], v_strides[3], gate_strides[3], rate_strides[3]; /* batch, token, head */
    long batch, tokens, heads, v_heads, width, v_width;
    long has_channel_gates; /* gate [batch, tokens, v_heads, width] in place of [batch, tokens, v_heads] */
    long is_normed;         /* queries and keys are divided by their length first */
} longspan_delta;

/* One group of tokens, made once for all columns. */
struct group {
    float key[GROUP][ROW], query[GROUP][ROW]; /* decayed by what is before them in the group, and themselves */
    float write[GROUP][ROW];                  /* keys, decayed by what is behind them */
    float decay[ROW];
    float keys[GROUP][GROUP], queries[GROUP][GROUP]; /* products with keys before, and for queries with their own */
};

INLINE vec at(const float *base) { return load(base, 0, 0); }

INLINE float inverse_length(const float *row, long width)
{
    vec sum = {0};
    for (long d = 0; d < width; d += LANES)
        sum += at(row + d) * at(row + d);
    return 1.0f / __builtin_sqrtf(sum_lanes(sum) + 1e-6f);
}

/* Make a group of `count` tokens from `token` on, count a constant in every caller. */
INLINE void make_group(const longspan_delta *c, long batch, long head, long token, int count, struct group *to)
{
    const long k_head = head / (c->v_heads / c->heads);
    const float *q[GROUP], *k[GROUP], *gate[GROUP];
    float q_scale[GROUP], k_scale[GROUP];
    vec all[GROUP], keys[GROUP][GROUP], queries[GROUP][GROUP];
    for (int i = 0; i < count; i++) {
        q[i] = c->q + batch * c->q_strides[0] + (token + i) * c->q_strides[1] + k_head * c->q_strides[2];
        k[i] = c->k + batch * c->k_strides[0] + (token + i) * c->k_strides[1] + k_head * c->k_strides[2];
        gate[i] = c->gate + batch * c->gate_strides[0] + (token + i) * c->gate_strides[1] + head * c->gate_strides[2];
        q_scale[i] = (c->is_normed ? inverse_length(q[i], c->width) : 1.0f) / __builtin_sqrtf((float)c->width);
        k_scale[i] = c->is_normed ? inverse_length(k[i], c->width) : 1.0f;
        if (!c->has_channel_gates)
            all[i] = (vec){0} + __builtin_expf(*gate[i]);
        for (int j = 0; j <= i; j++)
            keys[i][j] = queries[i][j] = (vec){0};
    }
    for (long d = 0; d < c->width; d += LANES) {
        vec before = (vec){0} + 1.0f, behind[GROUP];
        for (int i = 0; i < count; i++) {
            const vec decay = c->has_channel_gates ? exp_lanes(at(gate[i] + d)) : all[i];
            const vec query = at(q[i] + d) * q_scale[i], key = at(k[i] + d) * k_scale[i];
            before *= decay;
            put(to->key[i] + d, key * before);
            put(to->query[i] + d, query * before);
            for (int j = 0; j < i; j++) {
                behind[j] *= decay;
                keys[i][j] += key * behind[j];
                queries[i][j] += query * behind[j];
            }
            behind[i] = key;
            queries[i][i] += query * key;
        }
        put(to->decay + d, before);
        for (int i = 0; i < count; i++)
            put(to->write[i] + d, behind[i]);
    }
    for (int i = 0; i < count; i++)
        for (int j = 0; j <= i; j++) {
            to->keys[i][j] = sum_lanes(keys[i][j]);
            to->queries[i][j] = sum_lanes(queries[i][j]);
        }
}

/* `count` tokens of a group meet a block [width, vectors] of columns; both are constants in every caller. */
INLINE void meet(const struct group *group, float *block, const float *v, long v_stride, const float *rate,
                 long rate_stride, float *out, long out_stride, long width, int count, int vectors)
{
    vec memory[GROUP][VECTORS], delta[GROUP][VECTORS], read[GROUP][VECTORS];
    for (int i = 0; i < count; i++)
        for (int x = 0; x < vectors; x++)
            memory[i][x] = read[i][x] = (vec){0};
    for (long d = 0; d < width; d++)
        for (int x = 0; x < vectors; x++) {
            const vec s = at(block + d * COLUMNS + x * LANES);
            for (int i = 0; i < count; i++) {
                memory[i][x] += s * group->key[i][d];
                read[i][x] += s * group->query[i][d];
            }
        }
    for (int i = 0; i < count; i++)
        for (int x = 0; x < vectors; x++) {
            vec m = memory[i][x], o = read[i][x];
            for (int j = 0; j < i; j++) {
                m += delta[j][x] * group->keys[i][j];
                o += delta[j][x] * group->queries[i][j];
            }
            delta[i][x] = (at(v + i * v_stride + x * LANES) - m) * rate[i * rate_stride];
            put(out + i * out_stride + x * LANES, o + delta[i][x] * group->queries[i][i]);
        }
    for (long d = 0; d < width; d++)
        for (int x = 0; x < vectors; x++) {
            vec s = at(block + d * COLUMNS + x * LANES) * group->decay[d];
            for (int i = 0; i < count; i++)
                s += delta[i][x] * group->write[i][d];
            put(block + d * COLUMNS + x * LANES, s);
        }
}

/* A tile of tokens meets one block of a head's columns. */
INLINE void run_block(const longspan_delta *c, long batch, long head, long token, long count, long column, int vectors,
                      const struct group *groups, float *block)
{
    float *state = c->state + (batch * c->v_heads + head) * c->width * c->v_width + column;
    const float *v = c->v + batch * c->v_strides[0] + token * c->v_strides[1] + head * c->v_strides[2] + column;
    const float *rate = c->rate + batch * c->rate_strides[0] + token * c->rate_strides[1] + head * c->rate_strides[2];
    const long out_stride = c->v_heads * c->v_width;
    float *out = c->out + (batch * c->tokens + token) * out_stride + head * c->v_width + column;
    for (long d = 0; d < c->width; d++)
        for (int x = 0; x < vectors; x++)
            put(block + d * COLUMNS + x * LANES, at(state + d * c->v_width + x * LANES));
    const long v_stride = c->v_strides[1], rate_stride = c->rate_strides[1];
    for (long t = 0; t < count; groups++) {
        const float *values = v + t * v_stride, *rates = rate + t * rate_stride;
        float *outs = out + t * out_stride;
        if (count - t >= GROUP) {
            meet(groups, block, values, v_stride, rates, rate_stride, outs, out_stride, c->width, GROUP, vectors);
            t += GROUP;
        } else {
            meet(groups, block, values, v_stride, rates, rate_stride, outs, out_stride, c->width, 1, vectors);
            t++;
        }
    }
    for (long d = 0; d < c->width; d++)
        for (int x = 0; x < vectors; x++)
            put(state + d * c->v_width + x * LANES, at(block + d * COLUMNS + x * LANES));
}

/* All tokens of one head of one request meet the columns [first_column, end_column) of its state. */
static void run_head(const longspan_delta *c, long batch, long head, long first_column, long end_column, float *scratch)
{
    struct group *groups = (struct group *)scratch;
    float *block = (float *)(groups + PIECE / GROUP + GROUP);
    for (long token = 0; token < c->tokens; token += PIECE) {
        const long count = smaller(PIECE, c->tokens - token), whole = count / GROUP;
        for (long g = 0; g < whole; g++)
            make_group(c, batch, head, token + g * GROUP, GROUP, groups + g);
        for (long t = whole * GROUP; t < count; t++)
            make_group(c, batch, head, token + t, 1, groups + whole + t - whole * GROUP);
        long column = first_column;
        for (; column + COLUMNS <= end_column; column += COLUMNS)
            run_block(c, batch, head, token, count, column, VECTORS, groups, block);
        for (; column < end_column; column += LANES)
            run_block(c, batch, head, token, count, column, 1, groups, block);
    }
}

/* Floats of scratch per thread. */
long longspan_delta_scratch(void)
{
    return sizeof(struct group) / sizeof(float) * (PIECE / GROUP + GROUP) + MOST_WIDTH * COLUMNS;
}

/* Changes the state of the heads [first_head, end_head) to that behind the last token, and writes their outputs; at least
 * one token and one head.
 *
 * scratch: longspan_delta_scratch() floats per thread. width and v_width are multiples of LANES, width at most MOST_WIDTH.
 * Where there are more threads than heads, several share a head's columns, and each makes the groups of tokens for itself.
 * Returns 0, or 1 when a size is not supported (nothing is written then).
 */
int longspan_delta_rule(const longspan_delta *c, long first_head, long end_head, int num_threads, float *scratch)
{
    if (num_threads < 1 || c->batch < 1 || c->tokens < 1 || c->heads < 1 || c->v_heads % c->heads || c->width < LANES ||
        c->width % LANES || c->width > MOST_WIDTH || c->v_width < LANES || c->v_width % LANES || first_head < 0 ||
        first_head >= end_head || end_head > c->v_heads)
        return 1;
    const long num_heads = end_head - first_head, whole = c->batch * num_heads;
    const long blocks = (c->v_width + COLUMNS - 1) / COLUMNS;
    const long cuts = smaller(blocks, (num_threads + whole - 1) / whole), tasks = whole * cuts;
    const int parts = (int)smaller(num_threads, tasks);
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
    for (int part = 0; part < parts; part++)
        for (long task = part; task < tasks; task += parts) {
            const long head = task / cuts, cut = task % cuts;
            const long first = blocks * cut / cuts * COLUMNS;
            const long end = smaller(blocks * (cut + 1) / cuts * COLUMNS, c->v_width);
            run_head(c, head / num_heads, first_head + head % num_heads, first, end,
                     scratch + part * longspan_delta_scratch());
        }
    return 0;
}
