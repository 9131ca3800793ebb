// log_prob, log_z and entropy of given tokens from one read of the logits.
#include "powerkernels/row_slices.h"

namespace powerkernels {

int64_t score_tokens(const LogitRows& logits, const TargetRows& targets,
                     const RowSettings& settings, const ScoreOutputs& outputs, int num_threads) {
  for (int64_t row = 0; row < logits.num_rows; ++row) {
    const int64_t y = targets.at(row);
    if ((y < 0 || y >= logits.vocab) && !targets.is_ignored(row)) return row;
  }
  for_each_row(
      logits, settings, num_threads, [&](int64_t row) { return targets.is_ignored(row); },
      [&](int64_t row, const RowParams& params, const SliceStats* slices) {
        if (slices == nullptr) {
          write_scores(outputs, params, row, 0.0, {0.0, 0.0, 0.0, 0.0});
          return;
        }
        const RowSums sums = merge_slices(slices, num_slices(logits.vocab), params);
        const RowStats stats = finish_row(sums, params);
        const char* x = row_at(logits, row, params.dtype);
        write_scores(outputs, params, row, log_prob_at(x, targets.at(row), stats, params), stats);
      });
  return kAllTargetsValid;
}

}  // namespace powerkernels
