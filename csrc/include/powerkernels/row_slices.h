// Runs the slice kernels over rows and threads: shared by scoring and sampling, so that both see
// the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "powerkernels/online_softmax.h"
#include "powerkernels/ops.h"
#include "powerkernels/parallel.h"

namespace powerkernels {

inline const char* row_at(const LogitRows& logits, int64_t row, DType dtype) {
  return static_cast<const char*>(logits.data) + logits.layout.offset(row) * element_size(dtype);
}

// How rows are spread over threads: a task is a row, or some slices of one where rows are few.
class RowTasks {
 public:
  RowTasks(const LogitRows& logits, int num_threads)
      : num_rows_(logits.num_rows),
        num_slices_(num_slices(logits.vocab)),
        num_threads_(num_threads) {
    // Below this many logits a thread team costs more than it gives.
    constexpr int64_t kParallelThreshold = 16384;
    // With fewer rows than this per thread, rows are cut so that no thread idles at the end.
    constexpr int64_t kRowsPerThread = 4;
    constexpr int64_t kSlicesPerTask = 8;
    if (logits.num_rows * logits.vocab < kParallelThreshold) num_threads_ = 1;
    const bool cut = num_threads_ > 1 && num_rows_ < kRowsPerThread * num_threads_;
    slices_per_task_ = cut ? kSlicesPerTask : std::max<int64_t>(num_slices_, 1);
  }

  int num_threads() const { return num_threads_; }
  bool are_whole_rows() const { return slices_per_task_ >= num_slices_; }

  // Calls work(row, first slice, last slice + 1) for every task, from any thread.
  template <typename Work>
  void run(const Work& work) const {
    const int64_t per_row =
        std::max<int64_t>((num_slices_ + slices_per_task_ - 1) / slices_per_task_, 1);
    parallel_for(num_rows_ * per_row, num_threads_, [&](int64_t task) {
      const int64_t first = task % per_row * slices_per_task_;
      work(task / per_row, first, std::min(first + slices_per_task_, num_slices_));
    });
  }

 private:
  int64_t num_rows_, num_slices_, slices_per_task_;
  int num_threads_;
};

// Calls finish(row, its parameters, its slices) for every row, from any thread. Rows that skip(row)
// are not read; their slices are null.
template <typename Skip, typename Finish>
void for_each_row(const LogitRows& logits, const RowSettings& settings, int num_threads,
                  const Skip& skip, const Finish& finish) {
  const int64_t count = num_slices(logits.vocab);
  const RowTasks tasks(logits, num_threads);
  const auto fill = [&](int64_t r, int64_t first, int64_t last, SliceStats* slices) {
    if (skip(r)) return;
    const RowParams params = settings.at(r);
    slice_kernels(params).stats(row_at(logits, r, params.dtype), logits.vocab, first, last, params,
                                slices);
  };
  const auto finish_from = [&](int64_t r, const SliceStats* slices) {
    finish(r, settings.at(r), skip(r) ? nullptr : slices);
  };
  if (tasks.are_whole_rows()) {
    tasks.run([&](int64_t r, int64_t first, int64_t last) {
      static thread_local std::vector<SliceStats> slices;
      if (static_cast<int64_t>(slices.size()) < count) slices.resize(static_cast<size_t>(count));
      fill(r, first, last, slices.data());
      finish_from(r, slices.data());
    });
    return;
  }
  std::vector<SliceStats> slices(static_cast<size_t>(logits.num_rows * count));
  tasks.run([&](int64_t r, int64_t first, int64_t last) {
    fill(r, first, last, slices.data() + r * count);
  });
  parallel_for(logits.num_rows, tasks.num_threads(),
               [&](int64_t r) { finish_from(r, slices.data() + r * count); });
}

inline void write_score(void* out, DType dtype, int64_t row, double value) {
  if (dtype == DType::float64) {
    static_cast<double*>(out)[row] = value;
  } else {
    static_cast<float*>(out)[row] = static_cast<float>(value);
  }
}

inline void write_scores(const ScoreOutputs& outputs, const RowParams& params, int64_t row,
                         double log_prob, const RowStats& stats) {
  write_score(outputs.log_prob, params.dtype, row, log_prob);
  write_score(outputs.log_z, params.dtype, row, stats.log_z);
  if (params.entropy) write_score(outputs.entropy, params.dtype, row, stats.entropy);
  if (outputs.row_max != nullptr) write_score(outputs.row_max, params.dtype, row, stats.max);
  if (outputs.log_sum != nullptr) write_score(outputs.log_sum, params.dtype, row, stats.log_sum);
}

}  // namespace powerkernels
