// Draws a token from q ~ p^alpha by inverse CDF in two steps: one uniform picks the slice, a second
// the token in it. Only that slice is read again.
#include "powerkernels/philox.h"
#include "powerkernels/row_slices.h"
#include "powerkernels/support.h"

namespace powerkernels {
namespace {

constexpr int64_t kNoToken = -1;

// First i with mass[0] + ... + mass[i] > u * total; -1 where there is no mass. Entries without mass
// are never returned. mass(i) is called for every i, in order.
template <typename Mass>
int64_t inverse_cdf(int64_t count, double u, const Mass& mass) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += mass(i);
  double cumulative = 0.0;
  int64_t last = -1;
  for (int64_t i = 0; i < count; ++i) {
    const double m = mass(i);
    if (!(m > 0.0)) continue;
    cumulative += m;
    last = i;
    if (cumulative > u * total) return i;
  }
  return last;  // u * total was rounded up to the total
}

int64_t draw(const char* row, int64_t vocab, const SliceStats* slices, double row_max,
             const SliceKernels& kernels, const RowParams& params, int64_t banned, double lowest,
             const PhiloxWords& words) {
  const int64_t count = num_slices(vocab);
  double mass[kSliceV];  // of the entries of one slice
  const auto fill_masses = [&](int64_t slice, int hidden) {
    const char* x = row + slice * kSliceV * element_size(params.dtype);
    return kernels.masses(x, slice_length(vocab, slice), hidden, lowest, params, mass);
  };

  int64_t banned_slice = -1;
  double rest_max = 0.0, rest_mass = 0.0;  // of the banned token's slice without it
  if (banned >= 0) {
    // Summed anew: subtracting the banned token's mass would leave nothing where it is nearly 1.
    banned_slice = banned / kSliceV;
    rest_max = fill_masses(banned_slice, static_cast<int>(banned % kSliceV));
    for (int i = 0; i < slice_length(vocab, banned_slice); ++i) rest_mass += mass[i];
    row_max = rest_max;
    for (int64_t i = 0; i < count; ++i) {
      if (i != banned_slice) row_max = std::max(row_max, slices[i].max);
    }
    if (row_max == -std::numeric_limits<double>::infinity()) return banned;
  }

  static thread_local std::vector<double> slice_mass;
  if (static_cast<int64_t>(slice_mass.size()) < count)
    slice_mass.resize(static_cast<size_t>(count));
  double* of_slice = slice_mass.data();
  for (int64_t i = 0; i < count; ++i) {
    const bool is_rest = i == banned_slice;
    const double max = is_rest ? rest_max : slices[i].max;
    // At alpha = 1 the kernels leave pow_sum out: it is the sum.
    const double own = params.alpha == 1.0 ? slices[i].sum : slices[i].pow_sum;
    const double sum = is_rest ? rest_mass : own;
    of_slice[i] = 0.0;
    if (sum > 0.0) {
      const double factor = std::exp((max - row_max) / params.temperature);
      of_slice[i] = pow_factor(factor, max, row_max, params) * sum;
    }
  }
  const int64_t slice =
      inverse_cdf(count, uniform53(words.v[0], words.v[1]), [&](int64_t i) { return of_slice[i]; });
  fill_masses(slice, slice == banned_slice ? static_cast<int>(banned % kSliceV) : kNoEntry);
  return slice * kSliceV + inverse_cdf(slice_length(vocab, slice),
                                       uniform53(words.v[2], words.v[3]),
                                       [&](int64_t i) { return mass[i]; });
}

// The slices with the masses of what is >= lowest alone, as both sums.
void restrict_slices(const char* row, int64_t vocab, const SliceStats* slices,
                     const SliceKernels& kernels, const RowParams& params, double lowest,
                     SliceStats* out) {
  double entries[kSliceV], mass[kSliceV];
  for (int64_t i = 0; i < num_slices(vocab); ++i) {
    out[i] = {-std::numeric_limits<double>::infinity(), 0.0, 0.0, 0.0};
    if (slices[i].max < lowest) continue;
    out[i].max = slices[i].max;
    const char* x = row + i * kSliceV * element_size(params.dtype);
    const int count = kernels.entries_from(x, slice_length(vocab, i), lowest, slices[i].max, params,
                                           entries, mass);
    // Several sums, so that additions do not wait for one another.
    double sums[4] = {0.0, 0.0, 0.0, 0.0};
    for (int k = 0; k < count; ++k) sums[k % 4] += mass[k];
    out[i].sum = out[i].pow_sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

// log sum p^alpha over the support, from its slices and the log_sum of the whole row.
double support_log_z(const SliceStats* slices, int64_t count, double log_sum,
                     const RowParams& params) {
  const RowSums sums = merge_slices(slices, count, params);
  const double log_z = std::log(sums.pow_sum) - params.alpha * log_sum;
  // Below 1 a sum over a part may have either sign.
  return params.alpha >= 1.0 ? std::min(log_z, 0.0) : log_z;
}

}  // namespace

void sample_tokens(const LogitRows& logits, uint64_t seed, const int64_t* counters,
                   const int64_t* banned, const RowParams& params, const SupportBounds& bounds,
                   int64_t* token, const ScoreOutputs& outputs, int num_threads) {
  const SliceKernels& kernels = slice_kernels(params);
  for_each_row(
      logits, {params, nullptr}, num_threads, [](int64_t) { return false; },
      [&](int64_t row, const RowParams&, const SliceStats* slices) {
        const int64_t count = num_slices(logits.vocab);
        const RowSums sums = merge_slices(slices, count, params);
        RowStats stats = finish_row(sums, params);
        if (std::isnan(stats.max)) {
          token[row] = kNoToken;
          write_scores(outputs, params, row, stats.max, stats);
          return;
        }
        PhiloxWords counter;
        for (int i = 0; i < 4; ++i) counter.v[i] = static_cast<uint32_t>(counters[4 * row + i]);
        const char* x = row_at(logits, row, params.dtype);
        double lowest = -std::numeric_limits<double>::infinity();
        if (!bounds.keep_all(logits.vocab)) {
          lowest = support_threshold(x, logits.vocab, slices, sums, kernels, params, bounds);
          static thread_local std::vector<SliceStats> restricted;
          restricted.resize(static_cast<size_t>(count));
          restrict_slices(x, logits.vocab, slices, kernels, params, lowest, restricted.data());
          slices = restricted.data();
          stats.log_z = support_log_z(slices, count, stats.log_sum, params);
        }
        token[row] = draw(x, logits.vocab, slices, stats.max, kernels, params,
                          banned == nullptr ? -1 : banned[row], lowest, philox4x32(counter, seed));
        write_scores(outputs, params, row, log_prob_at(x, token[row], stats, params), stats);
      });
}

}  // namespace powerkernels
