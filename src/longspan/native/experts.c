/* Experts of a mixture, computed for the few tokens that chose them.
 *
 * Holds one kernel for CPUs. Must not know Python, torch or routers. Called from longspan/native/experts.py.
 *
 * A decode step meets some experts of many, each with one token or few. A matrix product per expert spends its time
 * between the products, and one that gathers the chosen weights copies them. Here each thread takes the same share of
 * the outputs of every chosen expert, and reads its weights once, as they lie, for all tokens that chose it:
 *
 *     inner [pairs, inner]  = activation(gate x) * up x     a pair is a token and an expert that it chose
 *     each [pairs, hidden]  = down inner
 *     y [tokens, hidden]    = the sum of a token's pairs, scaled by its scores, in the order of its choices
 */

#include "gate.h"
#include "linear.h"

typedef struct {
    longspan_matrix gate_up;   /* [experts * 2 * inner, hidden]: an expert's gate, then its up */
    longspan_matrix down;      /* [experts * hidden, inner] */
    long experts, hidden, inner, activation;
} longspan_mixture;

/* Rows of a matrix from `row` on, as a matrix. */
INLINE longspan_matrix rows_from(const longspan_matrix *w, long width, long row)
{
    const long groups = w->bits == 32 ? 0 : width / w->group;
    const longspan_matrix rows = {(const char *)w->data + row * width * w->bits / 8, w->scale ? w->scale + row * groups : 0,
                                  w->zero ? w->zero + row * groups : 0, w->group, w->bits};
    return rows;
}

/* Pairs by expert: place[pair] of a pair among the sorted ones, first[expert] of an expert's; 0, or 1 for a number that
 * is no expert. */
static int sort_pairs(const int64_t *chosen, long pairs, long experts, int64_t *first, int64_t *place)
{
    for (long e = 0; e <= experts; e++)
        first[e] = 0;
    for (long p = 0; p < pairs; p++) {
        if (chosen[p] < 0 || chosen[p] >= experts)
            return 1;
        first[chosen[p] + 1]++;
    }
    for (long e = 0; e < experts; e++)
        first[e + 1] += first[e];
    for (long p = 0; p < pairs; p++)
        place[p] = first[chosen[p]]++;
    for (long e = experts; e > 0; e--)
        first[e] = first[e - 1];
    first[0] = 0;
    return 0;
}

/* Some elements of a token's sum over its pairs. */
static void add_pairs(const float *each, const int64_t *place, const float *scores, long chosen, long hidden,
                                   long from, long to, float *y)
{
    for (long c = from; c < to; c += LANES) {
        vec sum = {0};
        for (long k = 0; k < chosen; k++)
            sum += scores[k] * load(each, place[k] * hidden + c, 0);
        put(y + c, sum);
    }
}

/* x [tokens, hidden], chosen and scores [tokens, num_chosen] to y [tokens, hidden].
 *
 * numbers: experts + 1 + pairs of them, for scratch; scratch: pairs * 2 * (hidden + inner) floats, where pairs is tokens *
 * num_chosen. At most MAX_ROWS tokens. All contiguous.
 * Returns 0, or 1 when a size is not supported or an expert does not exist (y is not written then).
 */
int longspan_experts(const longspan_mixture *m, const float *x, const int64_t *chosen, const float *scores, int tokens,
                     int num_chosen, int num_threads, int64_t *numbers, float *scratch, float *y)
{
    const long hidden = m->hidden, inner = m->inner, pairs = (long)tokens * num_chosen;
    if (num_threads < 1 || tokens < 1 || tokens > MAX_ROWS || num_chosen < 1 || hidden < LANES || hidden % LANES ||
        inner < LANES || inner % LANES || m->experts < 1)
        return 1;
    int64_t *first = numbers, *place = numbers + m->experts + 1;
    if (sort_pairs(chosen, pairs, m->experts, first, place))
        return 1;
    float *rows = scratch, *each = rows + pairs * hidden, *gate = each + pairs * hidden, *up = gate + pairs * inner;
    for (long p = 0; p < pairs; p++)
        memcpy(rows + place[p] * hidden, x + p / num_chosen * hidden, hidden * sizeof *x);
    const long inner_share = share_of(inner, num_threads), share = share_of(hidden, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(static, 1)
        for (int part = 0; part < num_threads; part++) {
            const long from = part * inner_share, to = smaller(from + inner_share, inner);
            for (long e = 0; e < m->experts && from < to; e++) {
                const long row = first[e], num = first[e + 1] - row;
                if (!num)
                    continue;
                const longspan_matrix gates = rows_from(&m->gate_up, hidden, e * 2 * inner);
                const longspan_matrix ups = rows_from(&m->gate_up, hidden, (e * 2 + 1) * inner);
                longspan_matrix_outputs(rows + row * hidden, &gates, hidden, num, from, to, gate + row * inner, inner);
                longspan_matrix_outputs(rows + row * hidden, &ups, hidden, num, from, to, up + row * inner, inner);
                for (long r = row; r < row + num; r++)
                    gated(gate + r * inner + from, up + r * inner + from, to - from, m->activation);
            }
        }
#pragma omp for schedule(static, 1)
        for (int part = 0; part < num_threads; part++) {
            const long from = part * share, to = smaller(from + share, hidden);
            if (from >= to)
                continue;
            for (long e = 0; e < m->experts; e++) {
                const long row = first[e], num = first[e + 1] - row;
                const longspan_matrix down = rows_from(&m->down, inner, e * hidden);
                if (num)
                    longspan_matrix_outputs(gate + row * inner, &down, inner, num, from, to, each + row * hidden, hidden);
            }
            for (long t = 0; t < tokens; t++)
                add_pairs(each, place + t * num_chosen, scores + t * num_chosen, num_chosen, hidden, from, to,
                          y + t * hidden);
        }
    }
    return 0;
}
