// The sums over one slice in double, element by element: float64 logits, and parameters that a
// float32 exponent cannot hold.
#include <algorithm>
#include <cmath>
#include <limits>

#include "powerkernels/simd_level.h"
#include "powerkernels/vocab_slice.h"

namespace powerkernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Between these a scale, and its product with any difference of floats that matters, is a normal
// float32.
constexpr double kMinFloatScale = 1e-30, kMaxFloatScale = 1e30;

// Fills x with the logits as doubles and returns their maximum; a NaN is left for the sums to show.
double stage(const void* logits, int n, int hidden, const RowParams& params, double* x) {
  double best = -kInfinity;
  for (int i = 0; i < n; ++i) {
    x[i] = load_as_double(logits, params.dtype, i);
    if (params.softcap != 0.0 && x[i] != -kInfinity) {
      x[i] = params.softcap * std::tanh(x[i] / params.softcap);
    }
    if (i == hidden) x[i] = -kInfinity;
    if (x[i] > best) best = x[i];
  }
  return best;
}

void slice_stats(const void* logits, int n, const RowParams& params, SliceStats* out) {
  double x[kSliceV];
  const double best = stage(logits, n, kNoEntry, params, x);
  const bool integer_power = params.alpha == 0.0 || params.alpha == 1.0 || params.alpha == 2.0 ||
                             params.alpha == 3.0 || params.alpha == 4.0;
  SliceStats s = {best, 0.0, 0.0, 0.0};
  for (int i = 0; i < n; ++i) {
    if (x[i] == -kInfinity) continue;
    const double d = x[i] - best;
    const double p = std::exp(d / params.temperature);
    s.sum += p;
    if (p > 0.0 || p != p) s.dot += p * d;
    if (integer_power) {
      double power = 1.0;
      for (int k = 0; k < static_cast<int>(params.alpha); ++k) power *= p;
      s.pow_sum += power;
    } else {
      s.pow_sum += std::exp(params.alpha * d / params.temperature);
    }
  }
  *out = s;
}

void stats(const void* row, int64_t vocab, int64_t first, int64_t last, const RowParams& params,
           SliceStats* slices) {
  const char* data = static_cast<const char*>(row);
  for (int64_t i = first; i < last; ++i) {
    const int64_t begin = i * kSliceV;
    const int n = static_cast<int>(std::min<int64_t>(kSliceV, vocab - begin));
    slice_stats(data + begin * element_size(params.dtype), n, params, slices + i);
  }
}

double masses(const void* logits, int n, int hidden, const RowParams& params, double* mass) {
  const double best = stage(logits, n, hidden, params, mass);
  for (int i = 0; i < n; ++i) {
    const bool masked = mass[i] == -kInfinity;
    mass[i] = masked ? 0.0 : std::exp(params.alpha * (mass[i] - best) / params.temperature);
  }
  return best;
}

constexpr SliceKernels kDoubleKernels = {stats, masses};

}  // namespace

PK_SIMD_DECLARE(const SliceKernels& slice_kernels(DType dtype))

const SliceKernels& slice_kernels(const RowParams& params) {
  const double scale = 1.0 / params.temperature, pow_scale = params.alpha / params.temperature;
  const auto holds = [](double s) { return s >= kMinFloatScale && s <= kMaxFloatScale; };
  const bool in_float = holds(scale) && (params.alpha == 0.0 || holds(pow_scale)) &&
                        (params.softcap == 0.0 || holds(params.softcap));
  if (params.dtype == DType::float64 || !in_float) return kDoubleKernels;
  return PK_SIMD_PICK(slice_kernels)(params.dtype);
}

}  // namespace powerkernels
