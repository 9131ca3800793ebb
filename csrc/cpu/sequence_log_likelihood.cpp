// alpha * sum of log_prob over each sequence, summed in double in order of position.
#include <limits>

#include "powerkernels/ops.h"
#include "powerkernels/parallel.h"

namespace powerkernels {

void sequence_log_likelihood(const void* log_prob, DType dtype, int64_t rows, int64_t length,
                             int64_t row_stride, const uint8_t* mask, const int64_t* cu_seqlens,
                             double alpha, double* out, int num_threads) {
  constexpr int64_t kParallelThreshold = 65536;
  const int64_t total = cu_seqlens == nullptr ? rows * length : cu_seqlens[rows];
  parallel_for(rows, total < kParallelThreshold ? 1 : num_threads, [&](int64_t row) {
    const int64_t first = cu_seqlens == nullptr ? row * row_stride : cu_seqlens[row];
    const int64_t n = cu_seqlens == nullptr ? length : cu_seqlens[row + 1] - first;
    double sum = 0.0;
    for (int64_t t = 0; t < n; ++t) {
      if (mask != nullptr && mask[row * length + t] == 0) continue;
      sum += load_as_double(log_prob, dtype, first + t);
    }
    // An impossible sequence stays impossible at alpha = 0.
    out[row] = sum == -std::numeric_limits<double>::infinity() ? sum : alpha * sum;
  });
}

}  // namespace powerkernels
