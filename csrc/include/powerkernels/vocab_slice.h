// A row of logits is read in slices of kSliceV vocabulary entries: small enough to stay in the
// first cache between the pass for the maximum and the pass for the sums, and the unit that the
// sampler picks first. The bounds are fixed, so that a row's result depends on nothing but the row.
#pragma once

#include <cstdint>

#include "powerkernels/dtype.h"

namespace powerkernels {

constexpr int kSliceV = 1024;

// What one softmax row is asked for. x is a logit after softcap, before temperature.
struct RowParams {
  DType dtype;
  double alpha;        // >= 0
  double temperature;  // > 0
  double softcap;      // 0: none
  bool entropy;
};

// Sums over one slice, d = x - max:
struct SliceStats {
  double max;      // -inf where the slice has no finite entry
  double sum;      // sum of e^(d/temperature)
  double pow_sum;  // sum of e^(alpha*d/temperature); only if alpha != 1
  double dot;      // sum of d*e^(d/temperature), 0 for d = -inf; only if entropy
};

constexpr int kNoEntry = -1;

struct SliceKernels {
  // Slices first..last-1 of a row of logits, each into its place in `slices`.
  void (*stats)(const void* row, int64_t vocab, int64_t first, int64_t last,
                const RowParams& params, SliceStats* slices);
  // x: the n <= kSliceV logits of one slice. mass[i] = e^(alpha*(x_i - max)/temperature), 0 for
  // -inf, for the entry `hidden` (kNoEntry: none) and for what is below `lowest`, a float for float
  // logits. Returns the maximum over the others, -inf where there are none.
  double (*masses)(const void* x, int n, int hidden, double lowest, const RowParams& params,
                   double* mass);
  // The entries of a slice that are >= lowest and not -inf, in their order; with `mass`, which may
  // be null, also e^(alpha*(x - center)/temperature). Returns their number. Writes up to n of each.
  int (*entries_from)(const void* x, int n, double lowest, double center, const RowParams& params,
                      double* entries, double* mass);
};

// The kernels for these parameters at the SIMD level in use.
const SliceKernels& slice_kernels(const RowParams& params);

// The gradient of an entry, with d = (x - max)/temperature:
// (e^d * (constant + slope*d) + of_power * e^(alpha*d) + one_hot at the target) / temperature,
// times the derivative of the softcap. max is finite.
struct RowGradient {
  double max;
  double constant;
  double slope;
  double of_power;
  double one_hot;
};

// Entries 0..n-1 of a row of logits, one_hot left out; `out` is of their dtype and may be they.
using GradientKernel = void (*)(const void* logits, int64_t n, const RowParams& params,
                                const RowGradient& g, void* out);

// The kernel for these parameters at the SIMD level in use.
GradientKernel gradient_kernel(const RowParams& params, const RowGradient& g);

// One entry, in double; one_hot: g.one_hot if it is the target, else 0.
double gradient_at(double logit, const RowParams& params, const RowGradient& g, double one_hot);

}  // namespace powerkernels
