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

double masses(const void* logits, int n, int hidden, double lowest, const RowParams& params,
              double* mass) {
  const double best = stage(logits, n, hidden, params, mass);
  for (int i = 0; i < n; ++i) {
    const bool masked = mass[i] == -kInfinity || mass[i] < lowest;
    mass[i] = masked ? 0.0 : std::exp(params.alpha * (mass[i] - best) / params.temperature);
  }
  return best < lowest ? -kInfinity : best;
}

int entries_from(const void* logits, int n, double lowest, double center, const RowParams& params,
                 double* entries, double* mass) {
  double x[kSliceV];
  stage(logits, n, kNoEntry, params, x);
  int count = 0;
  for (int i = 0; i < n; ++i) {
    if (x[i] == -kInfinity || !(x[i] >= lowest)) continue;
    entries[count] = x[i];
    if (mass != nullptr)
      mass[count] = std::exp(params.alpha * (x[i] - center) / params.temperature);
    ++count;
  }
  return count;
}

constexpr SliceKernels kDoubleKernels = {stats, masses, entries_from};

bool holds(double scale) { return scale >= kMinFloatScale && scale <= kMaxFloatScale; }

bool fits_float(const RowParams& params) {
  return params.dtype != DType::float64 && holds(1.0 / params.temperature) &&
         (params.alpha == 0.0 || holds(params.alpha / params.temperature)) &&
         (params.softcap == 0.0 || holds(params.softcap));
}

void gradient(const void* logits, int64_t n, const RowParams& params, const RowGradient& g,
              void* out) {
  for (int64_t i = 0; i < n; ++i) {
    const double x = load_as_double(logits, params.dtype, i);
    store_double(out, params.dtype, i, gradient_at(x, params, g, 0.0));
  }
}

}  // namespace

PK_SIMD_DECLARE(const SliceKernels& slice_kernels(DType dtype))
PK_SIMD_DECLARE(GradientKernel gradient_kernel(const RowParams& params, const RowGradient& g))

const SliceKernels& slice_kernels(const RowParams& params) {
  return fits_float(params) ? PK_SIMD_PICK(slice_kernels)(params.dtype) : kDoubleKernels;
}

GradientKernel gradient_kernel(const RowParams& params, const RowGradient& g) {
  const double scale = 1.0 / params.temperature, slope = scale * std::abs(g.slope);
  // A factor that overflows would give NaN where e^d is 0.
  const bool fits = scale * std::abs(g.constant) <= kMaxFloatScale && slope <= kMaxFloatScale &&
                    scale * std::abs(g.of_power) <= kMaxFloatScale &&
                    (slope < kMinFloatScale || holds(scale * slope));
  return fits_float(params) && fits ? PK_SIMD_PICK(gradient_kernel)(params, g) : gradient;
}

double gradient_at(double logit, const RowParams& params, const RowGradient& g, double one_hot) {
  if (logit == -kInfinity) return 0.0;
  double x = logit, derivative = 1.0;
  if (params.softcap != 0.0) {
    x = params.softcap * std::tanh(logit / params.softcap);
    const double e = std::exp(-2.0 * std::abs(logit / params.softcap));
    derivative = 4.0 * e / ((1.0 + e) * (1.0 + e));
  }
  const double d = (x - g.max) / params.temperature;
  const double e = std::exp(d);
  const double power = g.of_power == 0.0 ? 0.0 : std::exp(params.alpha * d);
  double sum = one_hot;
  // Where e is 0, d may be infinite. A NaN is not 0.
  if (e != 0.0) sum += e * (g.constant + g.slope * d);
  if (power != 0.0) sum += power * g.of_power;
  return sum / params.temperature * derivative;
}

}  // namespace powerkernels
