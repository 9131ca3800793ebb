// The CPU ops: raw pointers, sizes and strides (in elements). Outputs are contiguous.
#pragma once

#include <cstdint>

#include "powerkernels/vocab_slice.h"

namespace powerkernels {

// Row r begins at element (r / inner) * outer_stride + (r % inner) * inner_stride.
struct RowLayout {
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;

  int64_t offset(int64_t row) const {
    return row / inner * outer_stride + row % inner * inner_stride;
  }
};

struct LogitRows {
  const void* data;
  int64_t num_rows;
  int64_t vocab;
  RowLayout layout;
};

// Rows whose target is ignore_index are ignored: their scores and their gradient are zeros.
struct TargetRows {
  const void* data;  // int32 or int64 [num_rows]
  bool are_int64;
  int64_t ignore_index;

  int64_t at(int64_t row) const {
    return are_int64 ? static_cast<const int64_t*>(data)[row]
                     : static_cast<const int32_t*>(data)[row];
  }
  bool is_ignored(int64_t row) const { return at(row) == ignore_index; }
};

struct RowSettings {
  RowParams params;
  const double* temperatures;  // [num_rows], instead of params.temperature; may be null

  RowParams at(int64_t row) const {
    RowParams own = params;
    if (temperatures != nullptr) own.temperature = temperatures[row];
    return own;
  }
};

// [num_rows] each: float32, or float64 for float64 logits.
struct ScoreOutputs {
  void* log_prob;
  void* log_z;
  void* entropy;  // unused unless params.entropy
  void* row_max;  // the largest logit after softcap; may be null
  void* log_sum;  // log sum e^((x - row_max)/temperature); may be null
};

constexpr int64_t kAllTargetsValid = -1;

// Returns the first row whose target is neither in [0, vocab) nor ignore_index (the outputs are
// then not written), or kAllTargetsValid.
int64_t score_tokens(const LogitRows& logits, const TargetRows& targets,
                     const RowSettings& settings, const ScoreOutputs& outputs, int num_threads);

// out: float64 [5, num_rows], what shards and chunks of a vocabulary are merged from: max, sum,
// pow_sum, dot (see RowSums), and the target's logit, -inf where the target is not in [0, vocab).
void row_sums(const LogitRows& logits, const TargetRows& targets, const RowSettings& settings,
              double* out, int num_threads);

// As ScoreOutputs.
struct SavedScores {
  const void* log_prob;
  const void* log_z;
  const void* entropy;  // null without a gradient of it
  const void* row_max;
  const void* log_sum;
};

// As ScoreOutputs; null: zeros.
struct ScoreGradients {
  const void* log_prob;
  const void* log_z;
  const void* entropy;
};

// As many rows as the logits, as wide and of the same dtype; may be the logits themselves.
struct GradientRows {
  void* data;
  RowLayout layout;
};

// The logits may be one shard of the vocabulary: the saved scores are then of all of it, and a
// target outside [0, vocab) is on another shard.
void score_tokens_bwd(const LogitRows& logits, const TargetRows& targets,
                      const RowSettings& settings, const SavedScores& saved,
                      const ScoreGradients& gradients, const GradientRows& dlogits,
                      int num_threads);

// What may be drawn: a row's entries at or above the largest of three thresholds.
struct SupportBounds {
  int64_t top_k;  // in [1, vocab]; vocab: no bound
  double top_p;   // in (0, 1]; 1: no bound
  double min_p;   // in [0, 1]; 0: no bound

  bool keep_all(int64_t vocab) const { return top_k == vocab && top_p == 1.0 && min_p == 0.0; }
};

// counters: int64 [rows, 4]; banned: int64 [rows], -1 for none, or null.
void sample_tokens(const LogitRows& logits, uint64_t seed, const int64_t* counters,
                   const int64_t* banned, const RowParams& params, const SupportBounds& bounds,
                   int64_t* token, const ScoreOutputs& outputs, int num_threads);

// out: float64 [rows], the threshold of each row; NaN where it has no softmax.
void support_thresholds(const LogitRows& logits, const RowParams& params,
                        const SupportBounds& bounds, double* out, int num_threads);

// counters, out: int64 [count, 4].
void philox4x32_many(const int64_t* counters, uint64_t seed, int64_t count, int64_t* out);

// log_prob: [rows, length] with a row stride, or flat with cu_seqlens [rows + 1]; mask: bool bytes
// [rows, length] or null. out: float64 [rows].
void sequence_log_likelihood(const void* log_prob, DType dtype, int64_t rows, int64_t length,
                             int64_t row_stride, const uint8_t* mask, const int64_t* cu_seqlens,
                             double alpha, double* out, int num_threads);

}  // namespace powerkernels
