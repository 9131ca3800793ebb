// Which logit of a row is the smallest that top_k, top_p and min_p let be drawn.
#include "powerkernels/support.h"

#include <functional>
#include <utility>
#include <vector>

#include "powerkernels/row_slices.h"

namespace powerkernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Row {
  const char* data;
  int64_t vocab;
  const SliceStats* slices;
  const SliceKernels& kernels;
  const RowParams& params;

  // Calls take(slice, its length) for the slices that hold an entry >= what lowest() is by then.
  template <typename Lowest, typename Take>
  void for_each_slice(const Lowest& lowest, const Take& take) const {
    for (int64_t i = 0; i < num_slices(vocab); ++i) {
      if (slices[i].max < lowest()) continue;
      take(data + i * kSliceV * element_size(params.dtype), slice_length(vocab, i));
    }
  }
};

void make_room(std::vector<double>& values, int64_t count) {
  const auto wanted = static_cast<size_t>(count + kSliceV);
  if (values.size() < wanted) values.resize(2 * wanted);
}

// The k-th largest entry; -inf where fewer are above it.
double kth_largest(const Row& row, int64_t k) {
  // Cut back to the k largest so far whenever there are this many.
  const int64_t limit = std::max<int64_t>(2 * k, 256);
  static thread_local std::vector<double> entries;
  int64_t count = 0;
  double lowest = -kInfinity;
  const auto kth = [&] {
    const auto place = entries.begin() + (k - 1);
    std::nth_element(entries.begin(), place, entries.begin() + count, std::greater<double>());
    return *place;
  };
  row.for_each_slice([&] { return lowest; },
                     [&](const char* x, int n) {
                       make_room(entries, count);
                       count += row.kernels.entries_from(x, n, lowest, 0.0, row.params,
                                                         entries.data() + count, nullptr);
                       if (count < limit) return;
                       lowest = kth();
                       count = k;
                     });
  return count < k ? -kInfinity : kth();
}

// Entries and their masses relative to the row's largest.
struct Candidates {
  const double* entry;
  const double* mass;
  int64_t count;
};

Candidates candidates_from(const Row& row, double lowest, double max) {
  static thread_local std::vector<double> entries, masses;
  int64_t count = 0;
  row.for_each_slice([&] { return lowest; },
                     [&](const char* x, int n) {
                       make_room(entries, count);
                       make_room(masses, count);
                       count +=
                           row.kernels.entries_from(x, n, lowest, max, row.params,
                                                    entries.data() + count, masses.data() + count);
                     });
  return {entries.data(), masses.data(), count};
}

// The largest candidate that has at least `wanted` of mass above or at it; the smallest where
// rounding leaves all of them short of it.
double weighted_threshold(const Candidates& all, double wanted, double max) {
  constexpr int kNumBins = 1024;
  const double min = *std::min_element(all.entry, all.entry + all.count);
  // Halved, since the difference of two doubles need not be one.
  double scale = kNumBins / (0.5 * max - 0.5 * min);
  if (!std::isfinite(scale)) scale = 0.0;
  const auto bin_of = [&](double x) {
    return std::min(static_cast<int>((0.5 * max - 0.5 * x) * scale), kNumBins - 1);
  };
  double mass[kNumBins] = {};
  for (int64_t i = 0; i < all.count; ++i) mass[bin_of(all.entry[i])] += all.mass[i];
  double above = 0.0;
  int bin = 0;
  while (bin < kNumBins && above + mass[bin] < wanted) above += mass[bin++];
  if (bin == kNumBins) return min;

  using Candidate = std::pair<double, double>;
  static thread_local std::vector<Candidate> near;
  near.clear();
  for (int64_t i = 0; i < all.count; ++i) {
    if (bin_of(all.entry[i]) == bin) near.emplace_back(all.entry[i], all.mass[i]);
  }
  std::sort(near.begin(), near.end(), std::greater<Candidate>());
  for (const Candidate& candidate : near) {
    above += candidate.second;
    if (above >= wanted) return candidate.first;
  }
  return near.back().first;
}

double top_p_threshold(const Row& row, const RowSums& sums, const SupportBounds& bounds,
                       double kth) {
  const RowParams& params = row.params;
  if (bounds.top_k < row.vocab) {
    const Candidates all = candidates_from(row, kth, sums.max);
    double total = 0.0;
    for (int64_t i = 0; i < all.count; ++i) total += all.mass[i];
    return weighted_threshold(all, bounds.top_p * total, sums.max);
  }
  // Entries of this mass or less are out: all of them together have no more than may be left out,
  // and not even half of it, whatever the rounding.
  const double spare = (1.0 - bounds.top_p) * sums.pow_sum / static_cast<double>(2 * row.vocab);
  double lowest = -kInfinity;
  if (params.alpha > 0.0) lowest = sums.max + std::log(spare) * params.temperature / params.alpha;
  const Candidates all = candidates_from(row, lowest, sums.max);
  return weighted_threshold(all, bounds.top_p * sums.pow_sum, sums.max);
}

}  // namespace

double support_threshold(const char* data, int64_t vocab, const SliceStats* slices,
                         const RowSums& sums, const SliceKernels& kernels, const RowParams& params,
                         const SupportBounds& bounds) {
  const Row row = {data, vocab, slices, kernels, params};
  double threshold = -kInfinity;
  if (bounds.top_k < vocab) threshold = kth_largest(row, bounds.top_k);
  if (bounds.top_p < 1.0) {
    threshold = std::max(threshold, top_p_threshold(row, sums, bounds, threshold));
  }
  if (bounds.min_p > 0.0 && params.alpha > 0.0) {
    const double drop = std::log(bounds.min_p) * params.temperature / params.alpha;
    threshold = std::max(threshold, sums.max + drop);
  }
  if (params.dtype == DType::float64) return threshold;
  const float rounded = static_cast<float>(threshold);
  const bool is_below = static_cast<double>(rounded) < threshold;
  return is_below ? std::nextafter(rounded, std::numeric_limits<float>::infinity()) : rounded;
}

void support_thresholds(const LogitRows& logits, const RowParams& params,
                        const SupportBounds& bounds, double* out, int num_threads) {
  const SliceKernels& kernels = slice_kernels(params);
  for_each_row(
      logits, {params, nullptr}, num_threads, [](int64_t) { return false; },
      [&](int64_t row, const RowParams&, const SliceStats* slices) {
        const RowSums sums = merge_slices(slices, num_slices(logits.vocab), params);
        const bool has_softmax = !std::isnan(finish_row(sums, params).max);
        out[row] = has_softmax ? support_threshold(row_at(logits, row, params.dtype), logits.vocab,
                                                   slices, sums, kernels, params, bounds)
                               : std::numeric_limits<double>::quiet_NaN();
      });
}

}  // namespace powerkernels
