// Runs the slice kernels over rows and threads: shared by scoring and sampling, so that both see
// the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "powerkernels/online_softmax.h"
#include "powerkernels/ops.h"
#include "powerkernels/parallel.h"

namespace powerkernels {

inline const char* row_at(const LogitRows& logits, int64_t row, DType dtype) {
  const int64_t offset =
      row / logits.inner * logits.outer_stride + row % logits.inner * logits.inner_stride;
  return static_cast<const char*>(logits.data) + offset * element_size(dtype);
}

// Calls finish(row, slices of the row) for every row, from any thread.
template <typename Finish>
void for_each_row(const LogitRows& logits, const RowParams& params, int num_threads,
                  const Finish& finish) {
  // Below this many logits a thread team costs more than it gives.
  constexpr int64_t kParallelThreshold = 16384;
  // With fewer rows than this per thread, rows are cut so that no thread idles at the end.
  constexpr int64_t kRowsPerThread = 4;
  constexpr int64_t kSlicesPerTask = 8;

  const SliceKernels& kernels = slice_kernels(params);
  const int64_t count = num_slices(logits.vocab);
  if (logits.num_rows * logits.vocab < kParallelThreshold) num_threads = 1;
  if (num_threads <= 1 || logits.num_rows >= kRowsPerThread * num_threads) {
    parallel_for(logits.num_rows, num_threads, [&](int64_t r) {
      static thread_local std::vector<SliceStats> slices;
      if (static_cast<int64_t>(slices.size()) < count) slices.resize(static_cast<size_t>(count));
      kernels.stats(row_at(logits, r, params.dtype), logits.vocab, 0, count, params, slices.data());
      finish(r, slices.data());
    });
    return;
  }
  std::vector<SliceStats> slices(static_cast<size_t>(logits.num_rows * count));
  const int64_t tasks_per_row = (count + kSlicesPerTask - 1) / kSlicesPerTask;
  parallel_for(logits.num_rows * tasks_per_row, num_threads, [&](int64_t task) {
    const int64_t r = task / tasks_per_row, first = task % tasks_per_row * kSlicesPerTask;
    kernels.stats(row_at(logits, r, params.dtype), logits.vocab, first,
                  std::min(first + kSlicesPerTask, count), params, slices.data() + r * count);
  });
  parallel_for(logits.num_rows, num_threads,
               [&](int64_t r) { finish(r, slices.data() + r * count); });
}

inline void write_score(void* out, DType dtype, int64_t row, double value) {
  if (dtype == DType::float64) {
    static_cast<double*>(out)[row] = value;
  } else {
    static_cast<float*>(out)[row] = static_cast<float>(value);
  }
}

inline void write_scores(const ScoreOutputs& outputs, const RowParams& params, int64_t row,
                         double log_prob, double log_z, double entropy) {
  write_score(outputs.log_prob, params.dtype, row, log_prob);
  write_score(outputs.log_z, params.dtype, row, log_z);
  if (params.entropy) write_score(outputs.entropy, params.dtype, row, entropy);
}

}  // namespace powerkernels
