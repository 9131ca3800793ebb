// log_prob, log_z and entropy of given tokens from one read of the logits.
#include "powerkernels/row_slices.h"

namespace powerkernels {

int64_t score_tokens(const LogitRows& logits, const void* targets, bool targets_are_int64,
                     int64_t ignore_index, const RowParams& params, const ScoreOutputs& outputs,
                     int num_threads) {
  const auto target_at = [&](int64_t row) -> int64_t {
    return targets_are_int64 ? static_cast<const int64_t*>(targets)[row]
                             : static_cast<const int32_t*>(targets)[row];
  };
  for (int64_t row = 0; row < logits.num_rows; ++row) {
    const int64_t y = target_at(row);
    if ((y < 0 || y >= logits.vocab) && y != ignore_index) return row;
  }
  for_each_row(logits, params, num_threads, [&](int64_t row, const SliceStats* slices) {
    const int64_t y = target_at(row);
    if (y == ignore_index) {
      write_scores(outputs, params, row, 0.0, 0.0, 0.0);
      return;
    }
    const RowStats stats = merge_slices(slices, num_slices(logits.vocab), params);
    const double log_prob = log_prob_at(row_at(logits, row, params.dtype), y, stats, params);
    write_scores(outputs, params, row, log_prob, stats.log_z, stats.entropy);
  });
  return kAllTargetsValid;
}

}  // namespace powerkernels
