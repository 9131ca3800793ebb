// Attention of one new token per lane over the lane's own prefix in a static cache.
#pragma once

#include <cstdint>

#include "powerkernels/dtype.h"

namespace powerkernels {

// Positions are taken in chunks with fixed bounds, counted from position 0 of the cache: a lane's
// result depends on its own prefix only, not on how it got there or on what the other lanes hold.
constexpr int kAttentionChunk = 64;
// Query heads per key/value head at most; the caller refuses more.
constexpr int kMaxQueryGroup = 128;

struct AttentionParams {
  DType dtype;  // of query, key, value and output; not float64
  int64_t head_size;
  int64_t value_size;
  float scale;
  float softcap;   // 0: none
  int64_t window;  // attend to the last `window` positions; 0: to all
};

// One key/value head of one lane with the `group` query heads that share it.
struct AttentionHead {
  const void* query;  // [group, head_size], rows query_stride apart
  const void* key;    // position j at key + j * key_stride
  const void* value;
  void* output;                                    // [group, value_size], contiguous
  const float* sinks;                              // [group], or null
  int64_t query_stride, key_stride, value_stride;  // in elements
  int64_t group;
  int64_t length;  // positions in use, >= 1
};

struct AttentionScratch {
  float* query;   // [group, padded head_size]
  float* rows;    // [kAttentionChunk, padded max(head_size, value_size)]
  float* scores;  // [group, kAttentionChunk]
  float* sums;    // [group, padded value_size]
};

// Floats per row of scratch: the size rounded up to whole vectors of any SIMD level.
inline int64_t padded_size(int64_t size) { return (size + 15) / 16 * 16; }

// Strides in elements; the last dimension of every tensor is contiguous.
struct AttentionTensors {
  const void* query;       // [lanes, group * kv_heads, head_size]
  const void* key;         // [lanes, kv_heads, positions, head_size]
  const void* value;       // [lanes, kv_heads, positions, value_size]
  const int64_t* lengths;  // [lanes]
  const float* sinks;      // [group * kv_heads], or null
  void* output;            // [lanes, group * kv_heads, value_size], contiguous
  int64_t lanes, kv_heads, group;
  int64_t query_strides[2];  // lane, head
  int64_t key_strides[3];    // lane, head, position
  int64_t value_strides[3];
};

void decode_attention(const AttentionTensors& tensors, const AttentionParams& params,
                      int num_threads);

}  // namespace powerkernels
