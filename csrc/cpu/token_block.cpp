// See token_block.h. Compiled once per SIMD level.
//
// All but `losses` and `unclipped` is the same IEEE arithmetic at every level, and sums are exact
// or in a fixed order: the same bits.
#include "powerkernels/token_block.h"

#include "powerkernels/philox.h"  // its numbers only: no function of it may be compiled here
#include "powerkernels/simd.h"

namespace powerkernels {
namespace PK_SIMD {
namespace {

// The vectors of GCC and Clang, which split them into what the machine has.
constexpr int kLanes = 8;
typedef float F8 __attribute__((vector_size(32)));
typedef double D8 __attribute__((vector_size(64)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef int64_t L8 __attribute__((vector_size(64)));
typedef uint8_t B8 __attribute__((vector_size(8)));

template <typename V, typename T>
PK_INLINE V load8(const T* p) {
  V out;
  __builtin_memcpy(&out, p, sizeof(V));
  return out;
}

// All bits of the lanes whose byte is 1.
PK_INLINE L8 lanes_of(B8 mask) { return -__builtin_convertvector(mask, L8); }

PK_INLINE D8 keep(D8 x, L8 lanes) { return (D8)((L8)x & lanes); }

PK_INLINE L8 is_finite(F8 x) {
  const I8 magnitude = (I8)x & 0x7fffffff;
  return __builtin_convertvector(magnitude < 0x7f800000, L8);
}

PK_INLINE double sum_of(D8 x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// fn(i, n): n = kLanes places at a time, and the rest.
template <typename Fn>
PK_INLINE void for_lanes(int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) fn(i, kLanes);
  if (i < n) fn(i, static_cast<int>(n - i));
}

// Lanes from n on are 0.
template <typename V, typename T>
PK_INLINE V load_some(const T* p, int n) {
  if (n == kLanes) return load8<V>(p);
  V out = {};
  __builtin_memcpy(&out, p, static_cast<size_t>(n) * sizeof(T));
  return out;
}

template <DType dtype>
void widen_as(const void* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + F32::kWidth <= n; i += F32::kWidth) store(out + i, load_as<dtype>(x, i));
  for (; i < n; ++i) out[i] = load_one<dtype>(x, i);
}

void widen(const void* x, DType dtype, int64_t n, float* out) {
  if (dtype == DType::bfloat16) return widen_as<DType::bfloat16>(x, n, out);
  if (dtype == DType::float16) return widen_as<DType::float16>(x, n, out);
  widen_as<DType::float32>(x, n, out);
}

struct Parts {
  D8 sums[kNumUnits] = {};

  PK_INLINE void add(D8 x) {
    for (int u = 0; u < kNumUnits; ++u) {
      const double rounder = 1.5 * 0x1p52 * kUnits[u];
      const D8 part = (x + rounder) - rounder;
      x -= part;
      sums[u] += part;
    }
  }
};

void add_moments(const TokenBlockOf& block, double* sums) {
  Parts log_prob, advantage;
  L8 count = {}, nonfinite = {};
  for_lanes(block.n, [&](int64_t i, int n) {
    const F8 l = load_some<F8>(block.log_prob + i, n);
    const F8 a = load_some<F8>(block.advantages + i, n);
    const L8 mask = lanes_of(load_some<B8>(block.mask + i, n));
    const L8 kept = mask & is_finite(l) & is_finite(a);
    count -= mask;
    nonfinite -= mask & ~kept;
    log_prob.add(keep(__builtin_convertvector(l, D8), kept));
    advantage.add(keep(__builtin_convertvector(a, D8), kept));
  });
  sums[0] += sum_of(__builtin_convertvector(count, D8));
  sums[1] += sum_of(__builtin_convertvector(nonfinite, D8));
  for (int u = 0; u < kNumUnits; ++u) {
    sums[2 + u] += sum_of(log_prob.sums[u]);
    sums[2 + kNumUnits + u] += sum_of(advantage.sums[u]);
  }
}

void covariances(const TokenBlockOf& block, const CovMeans& means, float* cov) {
  for_lanes(block.n, [&](int64_t i, int n) {
    const D8 l = __builtin_convertvector(load_some<F8>(block.log_prob + i, n), D8);
    const D8 a = __builtin_convertvector(load_some<F8>(block.advantages + i, n), D8);
    const L8 mask = lanes_of(load_some<B8>(block.mask + i, n));
    const D8 product = keep((l - means.log_prob) * (a - means.advantage), mask);
    const F8 out = __builtin_convertvector(product, F8) + 0.0f;
    __builtin_memcpy(cov + i, &out, static_cast<size_t>(n) * sizeof(float));
  });
}

void cov_keys(const float* cov, const uint8_t* selectable, int64_t n, uint32_t* keys) {
  for_lanes(n, [&](int64_t i, int n) {
    const F8 x = load_some<F8>(cov + i, n);
    const I8 bits = (I8)x;
    const I8 kept = -__builtin_convertvector(load_some<B8>(selectable + i, n), I8) & (x == x);
    const I8 out = (bits ^ ((bits >> 31) | INT32_MIN)) & kept;
    __builtin_memcpy(keys + i, &out, static_cast<size_t>(n) * sizeof(uint32_t));
  });
}

int64_t in_band(const float* cov, const uint8_t* selectable, int64_t n, float lb, float ub,
                int32_t* place) {
  constexpr int64_t kStretch = 32;
  int64_t count = 0;
  const auto is_in = [&](int64_t i) {
    return static_cast<int>(selectable[i] & (cov[i] > lb) & (cov[i] < ub));
  };
  // Few are: most stretches have none.
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    const int64_t end = begin + kStretch < n ? begin + kStretch : n;
    int hits = 0;
    for (int64_t i = begin; i < end; ++i) hits += is_in(i);
    for (int64_t i = begin; hits != 0 && i < end; ++i) {
      place[count] = static_cast<int32_t>(i);
      count += is_in(i);
    }
  }
  return count;
}

int64_t count_nonzero(const float* cov, const uint8_t* selectable, int64_t n) {
  L8 total = {};
  for_lanes(n, [&](int64_t i, int n) {
    const F8 x = load_some<F8>(cov + i, n);
    const L8 nonzero = __builtin_convertvector(x != 0.0f, L8);
    total -= nonzero & lanes_of(load_some<B8>(selectable + i, n));
  });
  int64_t count = 0;
  for (int lane = 0; lane < kLanes; ++lane) count += total[lane];
  return count;
}

typedef uint64_t U8 __attribute__((vector_size(64)));
typedef uint32_t W8 __attribute__((vector_size(32)));

// Each lane holds a 32-bit word; see philox.h.
void philox(const uint32_t* c0, const uint32_t* c1, const uint32_t* c2, uint32_t c3, uint64_t seed,
            int64_t n, uint32_t* out) {
  constexpr uint64_t kWord = 0xffffffffu;
  for_lanes(n, [&](int64_t i, int n) {
    U8 a = __builtin_convertvector(load_some<W8>(c0 + i, n), U8);
    U8 b = __builtin_convertvector(load_some<W8>(c1 + i, n), U8);
    U8 c = __builtin_convertvector(load_some<W8>(c2 + i, n), U8);
    U8 d = U8{} + c3;
    uint64_t key0 = seed & kWord, key1 = seed >> 32;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const U8 product0 = a * uint64_t{kPhiloxMultiplier0},
               product1 = c * uint64_t{kPhiloxMultiplier1};
      a = (product1 >> 32) ^ b ^ key0;
      c = (product0 >> 32) ^ d ^ key1;
      b = product1 & kWord;
      d = product0 & kWord;
      key0 = (key0 + kPhiloxWeyl0) & kWord;
      key1 = (key1 + kPhiloxWeyl1) & kWord;
    }
    const W8 words = __builtin_convertvector(a, W8);
    __builtin_memcpy(out + i, &words, static_cast<size_t>(n) * sizeof(uint32_t));
  });
}

double sum(const float* x, int64_t n) {
  D8 total = {};
  for_lanes(
      n, [&](int64_t i, int n) { total += __builtin_convertvector(load_some<F8>(x + i, n), D8); });
  return sum_of(total);
}

int64_t count(const uint8_t* mask, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += mask[i];
  return total;
}

PK_INLINE F32 min(F32 a, F32 b) { return where_less(b, a, b, a); }  // a where one is NaN

// One vector of tokens; masks are 0 and 1.
struct Lanes {
  F32 log_prob, old_log_prob, advantages, weights, mask, selected;
};

struct Ratio {
  F32 difference, log_ratio, ratio;

  PK_INLINE explicit Ratio(const Lanes& x) {
    difference = x.log_prob - x.old_log_prob;
    // As the second of max a NaN stays.
    log_ratio = min(max(splat(-kMaxLogRatio), difference), splat(kMaxLogRatio));
    ratio = exp2_scaled(log_ratio, splat(1.44269504f));
  }
};

struct PpoClip {
  F32 unclipped, bounded;

  PK_INLINE PpoClip(const Lanes& x, const Ratio& r, float low, float high) {
    const F32 negative = splat(0.0f) - x.advantages;
    unclipped = negative * r.ratio;
    bounded = negative * min(max(splat(low), r.ratio), splat(high));
  }
  PK_INLINE F32 choose(F32 if_clipped, F32 otherwise) const {
    return where_less(unclipped, bounded, if_clipped, otherwise);
  }
};

PK_INLINE F32 sign(F32 x) {
  const F32 zero = splat(0.0f);
  return where_less(x, zero, splat(-1.0f), where_less(zero, x, splat(1.0f), zero));
}

struct Columns {
  F32 sums[kNumLossColumns];

  PK_INLINE Columns() {
    for (F32& column : sums) column = splat(0.0f);
  }
  PK_INLINE void add(int column, F32 x, F32 mask) {
    sums[column] = sums[column] + where_less(splat(0.0f), mask, x, splat(0.0f));
  }
};

struct LossAndTerm {
  F32 loss, term;
};

PK_INLINE LossAndTerm policy(const Lanes& x, const Ratio& r, const LossObjective& objective,
                             Columns& columns) {
  const F32 zero = splat(0.0f), one = splat(1.0f);
  const PpoClip ppo(x, r, objective.low, objective.high);
  F32 loss = ppo.unclipped;
  F32 term = where_less(splat(kMaxLogRatio), abs(r.difference), zero, loss);
  if (objective.clip) {
    columns.add(kClipped, ppo.choose(one, zero), x.mask);
    term = ppo.choose(zero, term);
    loss = ppo.choose(ppo.bounded, loss);
    if (objective.dual_clip < __builtin_inff()) {
      const F32 most = (zero - x.advantages) * splat(objective.dual_clip);
      const F32 dual = where_less(x.advantages, zero, where_less(most, loss, one, zero), zero);
      columns.add(kDualClipped, dual, x.mask);
      term = where_less(zero, dual, zero, term);
      loss = where_less(zero, dual, most, loss);
    }
  }
  if (objective.on_selected == OnSelected::drop) {
    term = where_less(zero, x.selected, zero, term);
    loss = where_less(zero, x.selected, zero, loss);
  } else if (objective.on_selected == OnSelected::penalise) {
    const F32 penalty = splat(objective.penalty);
    term = where_less(zero, x.selected, term + penalty * sign(r.difference), term);
    loss = where_less(zero, x.selected, loss + penalty * abs(r.difference), loss);
  }
  return {loss, term};
}

PK_INLINE LossAndTerm divergence(const Lanes& x, const Ratio& r, LossKind kind) {
  const F32 zero = splat(0.0f), one = splat(1.0f), d = r.difference;
  switch (kind) {
    case LossKind::value:
      return {x.log_prob, one};
    case LossKind::k1:
      return {d, one};
    case LossKind::abs:
      return {abs(d), sign(d)};
    case LossKind::k2:
      return {splat(0.5f) * (d * d), d};
    default:
      break;
  }
  const F32 inverse = exp2_scaled(r.log_ratio, splat(-1.44269504f));
  const F32 k3 = inverse + r.log_ratio - one;
  const F32 most = splat(kMaxK3);
  F32 term = where_less(splat(kMaxLogRatio), abs(d), zero, one - inverse);
  term = where_less(most, k3, zero, term);
  return {min(max(splat(-kMaxK3), k3), most), term};
}

PK_INLINE LossAndTerm loss_of(const Lanes& x, const LossObjective& objective, Columns& columns) {
  const F32 zero = splat(0.0f), one = splat(1.0f);
  const Ratio r(x);
  LossAndTerm out;
  if (objective.kind == LossKind::policy) {
    out = policy(x, r, objective, columns);
  } else {
    out = divergence(x, r, objective.kind);
    if (objective.straight_through) out.term = r.difference;
  }
  columns.add(kNegLogRatio, zero - r.log_ratio, x.mask);
  columns.add(kAbsLogRatio, abs(r.log_ratio), x.mask);
  columns.add(kK3Estimate, r.ratio - one - r.log_ratio, x.mask);
  columns.add(kSelectedColumn, x.selected, x.mask);
  // NaN where an input is infinite or NaN, else 0.
  const F32 odd = (x.log_prob - x.log_prob) + (x.old_log_prob - x.old_log_prob) +
                  ((x.advantages - x.advantages) + (x.weights - x.weights));
  columns.add(kNonfinite, where_less(odd, one, zero, one), x.mask);
  out.loss = where_less(zero, x.mask, out.loss * x.weights, zero);
  out.term = where_less(zero, x.mask, out.term * x.weights, zero);
  return out;
}

// Rows of floats, padded so that whole vectors can be loaded.
constexpr int64_t kPadded = kTokenBlock + F32::kWidth;

struct Padded {
  alignas(64) float values[kPadded];
};

void bytes_to_floats(const uint8_t* bytes, int64_t n, Padded* out) {
  for (int64_t i = 0; i < n; ++i) out->values[i] = bytes[i];
}

// Calls fn(lanes, i) for vectors of tokens; places beyond n are masked out.
template <typename Fn>
PK_INLINE void for_vectors(const TokenBlockOf& block, const Fn& fn) {
  static const float zeros[kPadded] = {};
  Padded mask, selected;
  bytes_to_floats(block.mask, block.n, &mask);
  if (block.selected != nullptr) bytes_to_floats(block.selected, block.n, &selected);
  const auto at = [&](const float* p, int64_t i, float missing) {
    if (p == nullptr) return splat(missing);
    if (i + F32::kWidth <= block.n) return load(p + i);
    alignas(64) float buffer[F32::kWidth] = {};
    __builtin_memcpy(buffer, p + i, static_cast<size_t>(block.n - i) * sizeof(float));
    return load(buffer);
  };
  for (int64_t i = block.n; i < block.n + F32::kWidth; ++i) {
    mask.values[i] = 0.0f;
    selected.values[i] = 0.0f;
  }
  for (int64_t i = 0; i < block.n; i += F32::kWidth) {
    Lanes x;
    x.log_prob = at(block.log_prob, i, 0.0f);
    x.old_log_prob = block.old_log_prob == nullptr ? x.log_prob : at(block.old_log_prob, i, 0.0f);
    x.advantages = at(block.advantages, i, 0.0f);
    x.weights = at(block.weights, i, 1.0f);
    x.mask = load(mask.values + i);
    x.selected = load((block.selected == nullptr ? zeros : selected.values) + i);
    fn(x, i);
  }
}

void unclipped(const TokenBlockOf& block, float low, float high, uint8_t* out) {
  Padded kept;
  for_vectors(block, [&](const Lanes& x, int64_t i) {
    const PpoClip ppo(x, Ratio(x), low, high);
    store(kept.values + i, ppo.choose(splat(0.0f), x.mask));
  });
  for (int64_t i = 0; i < block.n; ++i) out[i] = kept.values[i] != 0.0f;
}

void losses(const TokenBlockOf& block, const LossObjective& objective, float* loss, float* terms,
            double* columns) {
  Columns added;
  Padded block_terms;
  for_vectors(block, [&](const Lanes& x, int64_t i) {
    const LossAndTerm out = loss_of(x, objective, added);
    store(loss + i, out.loss);
    store(block_terms.values + i, out.term);
  });
  __builtin_memcpy(terms, block_terms.values, static_cast<size_t>(block.n) * sizeof(float));
  for (int column = kNegLogRatio; column < kCovariance; ++column) {
    columns[column] += sum_of_lanes(added.sums[column]);
  }
}

}  // namespace

const TokenKernels& token_kernels() {
  static const TokenKernels kernels = {widen,     add_moments, covariances, cov_keys,
                                       unclipped, losses,      in_band,     count_nonzero,
                                       philox,    sum,         count};
  return kernels;
}

}  // namespace PK_SIMD
}  // namespace powerkernels
