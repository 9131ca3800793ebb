// From the sums over slices to the scores of a token. All in double, slices in their order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "powerkernels/vocab_slice.h"

namespace powerkernels {

// SliceStats of a whole row.
struct RowSums {
  double max;
  double sum;
  double pow_sum;  // also at alpha = 1
  double dot;
};

struct RowStats {
  double max;      // maximum logit; NaN where the row has no softmax
  double log_sum;  // log sum e^((x - max)/temperature)
  double log_z;    // LSE(alpha z) - alpha LSE(z)
  double entropy;
};

inline int64_t num_slices(int64_t vocab) { return (vocab + kSliceV - 1) / kSliceV; }

inline int slice_length(int64_t vocab, int64_t slice) {
  return static_cast<int>(std::min<int64_t>(kSliceV, vocab - slice * kSliceV));
}

// factor^alpha for the factor e^((slice max - row max) / temperature) of a slice. Products for
// small integers: a second exponential per slice would be seen in the whole.
inline double pow_factor(double factor, double slice_max, double row_max, const RowParams& params) {
  constexpr double kMaxProductAlpha = 8.0;
  if (params.alpha > kMaxProductAlpha || params.alpha != std::floor(params.alpha)) {
    return std::exp(params.alpha * (slice_max - row_max) / params.temperature);
  }
  double power = 1.0;
  for (int k = 0; k < static_cast<int>(params.alpha); ++k) power *= factor;
  return power;
}

inline RowSums merge_slices(const SliceStats* slices, int64_t count, const RowParams& params) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  double max = -kInfinity;
  for (int64_t i = 0; i < count; ++i) max = std::max(max, slices[i].max);
  double sum = 0.0, pow_sum = 0.0, dot = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const SliceStats& s = slices[i];
    if (s.max == -kInfinity) {
      sum += s.sum;  // nothing, or a NaN that must be seen
      continue;
    }
    const double difference = s.max - max;
    const double factor = std::exp(difference / params.temperature);
    sum += factor * s.sum;
    if (params.entropy && factor > 0.0) dot += factor * (s.dot + difference * s.sum);
    if (params.alpha != 1.0) pow_sum += pow_factor(factor, s.max, max, params) * s.pow_sum;
  }
  return {max, sum, params.alpha == 1.0 ? sum : pow_sum, dot};
}

inline RowStats finish_row(const RowSums& sums, const RowParams& params) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (sums.max == -kInfinity || std::isnan(sums.sum)) return {kNaN, kNaN, kNaN, kNaN};
  RowStats row;
  row.max = sums.max;
  row.log_sum = std::log(sums.sum);
  row.entropy = row.log_sum - sums.dot / (sums.sum * params.temperature);
  row.log_z = 0.0;
  if (params.alpha != 1.0) {
    row.log_z = std::log(sums.pow_sum) - params.alpha * row.log_sum;
    // Of one sign by Jensen's inequality; rounding must not say otherwise.
    row.log_z = params.alpha > 1.0 ? std::min(row.log_z, 0.0) : std::max(row.log_z, 0.0);
  }
  return row;
}

// The raw logit of one entry after softcap.
inline double logit_at(const void* row, int64_t v, const RowParams& params) {
  const double x = load_as_double(row, params.dtype, v);
  if (params.softcap == 0.0 || x == -std::numeric_limits<double>::infinity()) return x;
  return params.softcap * std::tanh(x / params.softcap);
}

inline double log_prob_at(const void* row, int64_t v, const RowStats& stats,
                          const RowParams& params) {
  return (logit_at(row, v, params) - stats.max) / params.temperature - stats.log_sum;
}

}  // namespace powerkernels
