// Decode attention: one task per lane and key/value head.
#include "powerkernels/decode_attention.h"

#include <algorithm>
#include <vector>

#include "powerkernels/parallel.h"
#include "powerkernels/simd_level.h"

namespace powerkernels {

PK_SIMD_DECLARE(void attend(const AttentionHead& head, const AttentionParams& params,
                            const AttentionScratch& scratch))

void decode_attention(const AttentionTensors& t, const AttentionParams& params, int num_threads) {
  const int64_t key_floats = padded_size(params.head_size);
  const int64_t value_floats = padded_size(params.value_size);
  const int64_t query_floats = t.group * key_floats;
  const int64_t row_floats = kAttentionChunk * std::max(key_floats, value_floats);
  const int64_t score_floats = t.group * kAttentionChunk;
  parallel_for(t.lanes * t.kv_heads, num_threads, [&](int64_t task) {
    thread_local std::vector<float> memory;
    memory.resize(query_floats + row_floats + score_floats + t.group * value_floats);
    float* at = memory.data();
    const AttentionScratch scratch = {at, at + query_floats, at + query_floats + row_floats,
                                      at + query_floats + row_floats + score_floats};
    const int64_t lane = task / t.kv_heads, kv_head = task % t.kv_heads;
    const int64_t first_head = kv_head * t.group;
    const AttentionHead head = {
        element(t.query, params.dtype, lane * t.query_strides[0] + first_head * t.query_strides[1]),
        element(t.key, params.dtype, lane * t.key_strides[0] + kv_head * t.key_strides[1]),
        element(t.value, params.dtype, lane * t.value_strides[0] + kv_head * t.value_strides[1]),
        element(t.output, params.dtype,
                (lane * t.kv_heads * t.group + first_head) * params.value_size),
        t.sinks == nullptr ? nullptr : t.sinks + first_head,
        t.query_strides[1],
        t.key_strides[2],
        t.value_strides[2],
        t.group,
        t.lengths[lane]};
    PK_SIMD_PICK(attend)(head, params, scratch);
  });
}

}  // namespace powerkernels
