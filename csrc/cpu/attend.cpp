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

PK_INLINE float sum_lanes(F32 a) { return static_cast<float>(sum_of_lanes(a)); }

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

// Scores of up to kAttentionChunk keys, one row of `scores` per query.
template <DType dtype>
PK_INLINE void score_chunk(const AttentionHead& head, const AttentionParams& params,
                           const AttentionScratch& scratch, int64_t first, int count) {
  const int64_t size = padded_size(params.head_size);
  for (int j = 0; j < count; ++j) {
    widen<dtype>(head.key, (first + j) * head.key_stride, params.head_size, scratch.rows);
    for (int64_t g = 0; g < head.group; ++g) {
      F32 dot = splat(0.0f);
      const float* query = scratch.query + g * size;
      for (int64_t i = 0; i < size; i += F32::kWidth) {
        dot = fma(load(query + i), load(scratch.rows + i), dot);
      }
      float score = sum_lanes(dot) * params.scale;
      if (params.softcap != 0.0f) {
        score = params.softcap * __builtin_tanhf(score / params.softcap);
      }
      scratch.scores[g * kAttentionChunk + j] = score;
    }
  }
  for (int64_t g = 0; g < head.group; ++g) {
    for (int j = count; j < kAttentionChunk; ++j) {
      scratch.scores[g * kAttentionChunk + j] = -kInfinity;
    }
  }
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
      total[g] = total[g] * keep + sum_lanes(sum);
      float* out = scratch.sums + g * value_floats;
      for (int64_t i = 0; i < value_floats; i += F32::kWidth) {
        F32 acc = load(out + i) * splat(keep);
        for (int j = 0; j < count; ++j) {
          acc = fma(splat(weight[j]), load(scratch.rows + j * value_floats + i), acc);
        }
        store(out + i, acc);
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
