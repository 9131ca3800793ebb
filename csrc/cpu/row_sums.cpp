// The sums that shards and chunks of a vocabulary are merged from.
#include "powerkernels/row_slices.h"

namespace powerkernels {

void row_sums(const LogitRows& logits, const TargetRows& targets, const RowSettings& settings,
              double* out, int num_threads) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto write = [&](int64_t row, const RowSums& sums, double target_logit) {
    const double values[] = {sums.max, sums.sum, sums.pow_sum, sums.dot, target_logit};
    for (int plane = 0; plane < 5; ++plane) out[plane * logits.num_rows + row] = values[plane];
  };
  for_each_row(
      logits, settings, num_threads, [&](int64_t row) { return targets.is_ignored(row); },
      [&](int64_t row, const RowParams& params, const SliceStats* slices) {
        if (slices == nullptr) {
          write(row, {-kInfinity, 0.0, 0.0, 0.0}, -kInfinity);
          return;
        }
        const int64_t y = targets.at(row);
        const bool here = y >= 0 && y < logits.vocab;
        write(row, merge_slices(slices, num_slices(logits.vocab), params),
              here ? logit_at(row_at(logits, row, params.dtype), y, params) : -kInfinity);
      });
}

}  // namespace powerkernels
