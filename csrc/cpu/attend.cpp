// Attention of one key/value head's queries over a prefix, softmax online over chunks of positions.
// Compiled once per SIMD level.
#include "powerkernels/decode_attention.h"
#include "powerkernels/simd.h"

namespace powerkernels {
namespace PK_SIMD {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kInfinity = __builtin_inff();

// n elements as floats, padded with zeros to whole vectors.
template <DType dtype>
PK_INLINE void widen(const void* x, int64_t offset, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + F32::kWidth <= n; i += F32::kWidth) store(out + i, load_as<dtype>(x, offset + i));
  for (; i < n; ++i) out[i] = load_one<dtype>(x, offset + i);
  for (; i < padded_size(n); ++i) out[i] = 0.0f;
}

// e^d for d <= 0.
PK_INLINE F32 exp_of_negative(F32 d) {
  const F32 exponent = max(splat(-kMaxNegativeExponent), d * splat(kLog2E));
  return exp2_scaled(exponent, splat(1.0f));
}
PK_INLINE float exp_of_negative(float d) {
  alignas(64) float lanes[F32::kWidth];
  store(lanes, exp_of_negative(splat(d)));
  return lanes[0];
}

// Dot products of kQueries queries with kKeys keys, rows of `size` floats, into scores; so many at
// a time that no product waits for the one before it.
template <int kQueries, int kKeys>
PK_INLINE void dots(const float* queries, const float* keys, int64_t size, float* scores) {
  F32 sums[kQueries][kKeys];
  for (int q = 0; q < kQueries; ++q) {
    for (int j = 0; j < kKeys; ++j) sums[q][j] = splat(0.0f);
  }
  for (int64_t i = 0; i < size; i += F32::kWidth) {
    F32 key[kKeys];
    for (int j = 0; j < kKeys; ++j) key[j] = load(keys + j * size + i);
    for (int q = 0; q < kQueries; ++q) {
      const F32 query = load(queries + q * size + i);
      for (int j = 0; j < kKeys; ++j) sums[q][j] = fma(query, key[j], sums[q][j]);
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    float* row = scores + q * kAttentionChunk;
    if constexpr (kKeys == 4) {
      store_sums_of_lanes(row, sums[q]);
    } else {
      for (int j = 0; j < kKeys; ++j) row[j] = static_cast<float>(sum_of_lanes(sums[q][j]));
    }
  }
}

constexpr int kQueriesAtOnce = 3, kKeysAtOnce = 4;

template <int kKeys>
PK_INLINE void dots_of_all_queries(const AttentionHead& head, const AttentionScratch& scratch,
                                   const float* keys, int64_t size, float* scores) {
  int64_t g = 0;
  for (; g + kQueriesAtOnce <= head.group; g += kQueriesAtOnce) {
    dots<kQueriesAtOnce, kKeys>(scratch.query + g * size, keys, size, scores + g * kAttentionChunk);
  }
  for (; g < head.group; ++g) {
    dots<1, kKeys>(scratch.query + g * size, keys, size, scores + g * kAttentionChunk);
  }
}

// Scores of up to kAttentionChunk keys, one row of `scores` per query.
template <DType dtype>
PK_INLINE void score_chunk(const AttentionHead& head, const AttentionParams& params,
                           const AttentionScratch& scratch, int64_t first, int count) {
  const int64_t size = padded_size(params.head_size);
  const auto key = [&](int j) { return scratch.rows + j * size; };
  for (int j = 0; j < count; ++j) {
    widen<dtype>(head.key, (first + j) * head.key_stride, params.head_size, key(j));
  }
  int j = 0;
  for (; j + kKeysAtOnce <= count; j += kKeysAtOnce) {
    dots_of_all_queries<kKeysAtOnce>(head, scratch, key(j), size, scratch.scores + j);
  }
  for (; j < count; ++j) {
    dots_of_all_queries<1>(head, scratch, key(j), size, scratch.scores + j);
  }
  const F32 scale = splat(params.scale);
  for (int64_t g = 0; g < head.group; ++g) {
    float* scores = scratch.scores + g * kAttentionChunk;
    for (j = count; j < kAttentionChunk; ++j) scores[j] = 0.0f;
    for (j = 0; j < kAttentionChunk; j += F32::kWidth) store(scores + j, load(scores + j) * scale);
    if (params.softcap != 0.0f) {
      for (j = 0; j < count; ++j) {
        scores[j] = params.softcap * __builtin_tanhf(scores[j] / params.softcap);
      }
    }
    for (j = count; j < kAttentionChunk; ++j) scores[j] = -kInfinity;
  }
}

// Adds to kVectors vectors of a query's output, times `keep`, its weights times the values' rows.
template <int kVectors>
PK_INLINE void add_values(const float* weight, const float* rows, int64_t stride, int count,
                          F32 keep, float* out) {
  F32 sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = load(out + v * F32::kWidth) * keep;
  for (int j = 0; j < count; ++j) {
    const F32 w = splat(weight[j]);
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = fma(w, load(rows + j * stride + v * F32::kWidth), sums[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) store(out + v * F32::kWidth, sums[v]);
}

template <DType dtype>
void attend_as(const AttentionHead& head, const AttentionParams& params,
               const AttentionScratch& scratch) {
  float max_score[kMaxQueryGroup], total[kMaxQueryGroup];
  const int64_t value_floats = padded_size(params.value_size);
  for (int64_t g = 0; g < head.group; ++g) {
    widen<dtype>(head.query, g * head.query_stride, params.head_size,
                 scratch.query + g * padded_size(params.head_size));
    // A sink is a score without a value.
    max_score[g] = head.sinks == nullptr ? -kInfinity : head.sinks[g];
    total[g] = head.sinks == nullptr ? 0.0f : 1.0f;
  }
  for (int64_t i = 0; i < head.group * value_floats; ++i) scratch.sums[i] = 0.0f;

  const int64_t start =
      params.window > 0 && params.window < head.length ? head.length - params.window : 0;
  for (int64_t chunk = start / kAttentionChunk * kAttentionChunk; chunk < head.length;
       chunk += kAttentionChunk) {
    const int64_t first = chunk > start ? chunk : start;
    const int64_t end =
        chunk + kAttentionChunk < head.length ? chunk + kAttentionChunk : head.length;
    const int count = static_cast<int>(end - first);
    score_chunk<dtype>(head, params, scratch, first, count);
    for (int j = 0; j < count; ++j) {
      widen<dtype>(head.value, (first + j) * head.value_stride, params.value_size,
                   scratch.rows + j * value_floats);
    }
    for (int64_t g = 0; g < head.group; ++g) {
      float* weight = scratch.scores + g * kAttentionChunk;
      F32 best = load(weight);
      for (int j = F32::kWidth; j < kAttentionChunk; j += F32::kWidth) {
        best = max(load(weight + j), best);
      }
      const float before = max_score[g];
      const float chunk_best = max_of_lanes(best);
      const float now = chunk_best > before ? chunk_best : before;
      max_score[g] = now;
      F32 sum = splat(0.0f);
      for (int j = 0; j < kAttentionChunk; j += F32::kWidth) {
        const F32 e = exp_of_negative(load(weight + j) - splat(now));
        store(weight + j, e);
        sum = sum + e;
      }
      const float keep = before == now ? 1.0f : exp_of_negative(before - now);
      total[g] = total[g] * keep + static_cast<float>(sum_of_lanes(sum));
      float* out = scratch.sums + g * value_floats;
      constexpr int kVectors = 64 / F32::kWidth;  // so many sums hide the products' latency
      int64_t i = 0;
      for (; i + kVectors * F32::kWidth <= value_floats; i += kVectors * F32::kWidth) {
        add_values<kVectors>(weight, scratch.rows + i, value_floats, count, splat(keep), out + i);
      }
      for (; i < value_floats; i += F32::kWidth) {
        add_values<1>(weight, scratch.rows + i, value_floats, count, splat(keep), out + i);
      }
    }
  }
  for (int64_t g = 0; g < head.group; ++g) {
    const float scale = 1.0f / total[g];
    for (int64_t i = 0; i < params.value_size; ++i) {
      store_one<dtype>(head.output, g * params.value_size + i,
                       scratch.sums[g * value_floats + i] * scale);
    }
  }
}

}  // namespace

void attend(const AttentionHead& head, const AttentionParams& params,
            const AttentionScratch& scratch) {
  if (params.dtype == DType::bfloat16) return attend_as<DType::bfloat16>(head, params, scratch);
  if (params.dtype == DType::float16) return attend_as<DType::float16>(head, params, scratch);
  attend_as<DType::float32>(head, params, scratch);
}

}  // namespace PK_SIMD
}  // namespace powerkernels
