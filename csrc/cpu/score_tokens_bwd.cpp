// The gradient of the logits from those of log_prob, log_z and entropy, all at once.
#include <cstring>

#include "powerkernels/row_slices.h"

namespace powerkernels {
namespace {

double score_at(const void* scores, DType dtype, int64_t row) {
  return load_as_double(scores, dtype == DType::float64 ? DType::float64 : DType::float32, row);
}

struct Incoming {
  double log_prob, log_z, entropy;

  Incoming(const ScoreGradients& gradients, DType dtype, int64_t row) {
    const auto at = [&](const void* g) { return g == nullptr ? 0.0 : score_at(g, dtype, row); };
    log_prob = at(gradients.log_prob);
    log_z = at(gradients.log_z);
    entropy = at(gradients.entropy);
  }
  bool is_zero() const { return log_prob == 0.0 && log_z == 0.0 && entropy == 0.0; }
};

RowGradient row_gradient(const SavedScores& saved, const Incoming& in, const RowParams& params,
                         int64_t row) {
  const auto at = [&](const void* scores) { return score_at(scores, params.dtype, row); };
  const double log_sum = at(saved.log_sum);
  const bool log_z_is_constant = params.alpha == 0.0 || params.alpha == 1.0;
  const double of_log_z = log_z_is_constant ? 0.0 : params.alpha * in.log_z;
  RowGradient g = {at(saved.row_max), -of_log_z, 0.0, 0.0, 0.0};
  // An impossible target's log_prob is a constant.
  if (at(saved.log_prob) != -std::numeric_limits<double>::infinity()) g.one_hot = in.log_prob;
  g.constant -= g.one_hot;
  if (in.entropy != 0.0) g.constant += in.entropy * (log_sum - at(saved.entropy));
  g.constant *= std::exp(-log_sum);
  g.slope = -in.entropy * std::exp(-log_sum);
  if (of_log_z != 0.0) {
    g.of_power = of_log_z * std::exp(-(at(saved.log_z) + params.alpha * log_sum));
  }
  return g;
}

}  // namespace

void score_tokens_bwd(const LogitRows& logits, const TargetRows& targets,
                      const RowSettings& settings, const SavedScores& saved,
                      const ScoreGradients& gradients, const GradientRows& dlogits,
                      int num_threads) {
  const DType dtype = settings.params.dtype;
  const int64_t size = element_size(dtype);
  RowTasks(logits, num_threads).run([&](int64_t row, int64_t first_slice, int64_t last_slice) {
    const int64_t first = first_slice * kSliceV;
    const int64_t n = std::min(last_slice * kSliceV, logits.vocab) - first;
    char* out = static_cast<char*>(dlogits.data) + (dlogits.layout.offset(row) + first) * size;
    const Incoming in(gradients, dtype, row);
    if (targets.is_ignored(row) || in.is_zero()) {
      std::memset(out, 0, static_cast<size_t>(n * size));
      return;
    }
    const RowParams params = settings.at(row);
    const RowGradient g = row_gradient(saved, in, params, row);
    if (std::isnan(g.max + score_at(saved.log_sum, dtype, row))) {
      constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
      for (int64_t i = 0; i < n; ++i) store_double(out, dtype, i, kNaN);
      return;
    }
    const char* x = row_at(logits, row, dtype) + first * size;
    const int64_t y = targets.at(row) - first;
    const bool y_is_here = y >= 0 && y < n;
    // Before its place may be overwritten, and added up before it is rounded.
    const double at_target =
        y_is_here ? gradient_at(load_as_double(x, dtype, y), params, g, g.one_hot) : 0.0;
    gradient_kernel(params, g)(x, n, params, g, out);
    if (y_is_here) store_double(out, dtype, y, at_target);
  });
}

}  // namespace powerkernels
