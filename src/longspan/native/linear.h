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

#endif
