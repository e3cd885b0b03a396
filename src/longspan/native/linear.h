/* Product of rows with some rows of a weight matrix, for kernels that hold several linear layers. */

#ifndef LONGSPAN_LINEAR_H
#define LONGSPAN_LINEAR_H

#include "lanes.h"

#define FEW_ROWS 8
#define MAX_ROWS 128 /* more than FEW_ROWS: float32 only */

/* y[r * y_stride + i] = x [rows, width] times row i of w [.., width], for i from first up to last; on this thread alone.
 *
 * x and y float32, w float32 or bfloat16; width a multiple of LANES; 1 to MAX_ROWS rows.
 */
void longspan_outputs(const float *x, const void *w, long width, int rows, long first, long last, int is_bf16, float *y,
                      long y_stride);

/* Number of num_out outputs that each of num_threads threads computes, in whole vectors. */
INLINE long share_of(long num_out, int num_threads)
{
    return ((num_out + num_threads - 1) / num_threads + LANES - 1) / LANES * LANES;
}

/* Weight matrix [num_out, width] of any kind: bits is 32 for float32, else 8 or 4; packed.py documents those. */
typedef struct {
    const void *data;
    const float *scale;  /* [num_out, width / group], not for 32 */
    const uint8_t *zero; /* likewise, for 4 */
    long group, bits;
} longspan_matrix;

/* As longspan_outputs, with a matrix of any kind. A packed one takes a group that is a multiple of 32. */
void longspan_matrix_outputs(const float *x, const longspan_matrix *w, long width, int rows, long first, long last,
                             float *y, long y_stride);

#endif
