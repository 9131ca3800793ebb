// The CPU ops: raw pointers, sizes and strides (in elements). Outputs are contiguous.
#pragma once

#include <cstdint>

#include "powerkernels/vocab_slice.h"

namespace powerkernels {

// Rows of logits: row r is at data + ((r / inner) * outer_stride + (r % inner) * inner_stride).
struct LogitRows {
  const void* data;
  int64_t num_rows;
  int64_t vocab;
  int64_t inner;
  int64_t outer_stride;
  int64_t inner_stride;
};

struct ScoreOutputs {
  void* log_prob;  // float32, or float64 for float64 logits
  void* log_z;
  void* entropy;  // unused unless params.entropy
};

constexpr int64_t kAllTargetsValid = -1;

// Returns the first row whose target is neither in [0, vocab) nor ignore_index (the outputs are
// then not written), or kAllTargetsValid.
int64_t score_tokens(const LogitRows& logits, const void* targets, bool targets_are_int64,
                     int64_t ignore_index, const RowParams& params, const ScoreOutputs& outputs,
                     int num_threads);

// counters: int64 [rows, 4]; banned: int64 [rows], -1 for none, or null.
void sample_tokens(const LogitRows& logits, uint64_t seed, const int64_t* counters,
                   const int64_t* banned, const RowParams& params, int64_t* token,
                   const ScoreOutputs& outputs, int num_threads);

// counters, out: int64 [count, 4].
void philox4x32_many(const int64_t* counters, uint64_t seed, int64_t count, int64_t* out);

// log_prob: [rows, length] with a row stride, or flat with cu_seqlens [rows + 1]; mask: bool bytes
// [rows, length] or null. out: float64 [rows].
void sequence_log_likelihood(const void* log_prob, DType dtype, int64_t rows, int64_t length,
                             int64_t row_stride, const uint8_t* mask, const int64_t* cu_seqlens,
                             double alpha, double* out, int num_threads);

}  // namespace powerkernels
