// The threshold that top_k, top_p and min_p put under the logits of a row.
#pragma once

#include <cstdint>

#include "powerkernels/online_softmax.h"
#include "powerkernels/ops.h"

namespace powerkernels {

// What may be drawn are the entries >= the threshold, without those of -inf; a float for float
// logits. The row has a softmax; `slices` and `sums` are its own. Sorts nothing but the entries
// near the threshold: what cannot matter is passed over slice by slice.
double support_threshold(const char* row, int64_t vocab, const SliceStats* slices,
                         const RowSums& sums, const SliceKernels& kernels, const RowParams& params,
                         const SupportBounds& bounds);

}  // namespace powerkernels
