// One step of a decoder-only transformer for all lanes, on a CPU: from the embedded tokens to the
// logits, in one parallel region. For the few rows of a lane step the operators between the linear
// layers, and the threads' way into and out of each, take longer than reading the weights.
//
// The layer is that of Llama: RMS norm, grouped-query attention with rotary positions, a gated
// SiLU; with biases of the projections (Qwen2) and norms of the heads (Qwen3) where given. Values
// are rounded to the model's dtype wherever its operators in torch would store them. A lane's
// logits depend on its own token, position and cache only, whatever the number of lanes or threads.
#pragma once

#include <cstdint>
#include <vector>

#include "powerkernels/dtype.h"

namespace powerkernels {

struct DecoderLinear {
  const void* packed = nullptr;  // what pack_linear made of [columns, depth]
  const void* bias = nullptr;    // [columns], or null
  int64_t columns = 0;
};

struct DecoderLayer {
  const void* input_norm;                // [hidden]
  const void* mlp_norm;                  // [hidden]
  const void* query_norm;                // [head_size], or null
  const void* key_norm;                  // [head_size], or null
  DecoderLinear query, key, value, out;  // of the attention
  DecoderLinear gate, up, down;
  void* keys;      // [lanes * positions, kv_heads * head_size], a step writes its position's row
  void* values;    // likewise
  int64_t window;  // attend to the last `window` positions; 0: to all
};

struct DecoderShape {
  DType dtype;  // of everything: bfloat16 or float32
  int64_t lanes, positions, hidden, heads, kv_heads, head_size, intermediate;
  float epsilon;  // of the norms
  float scale;    // of the attention's dot products
};

class DecoderStep {
 public:
  DecoderStep(const DecoderShape& shape, std::vector<DecoderLayer> layers, const void* final_norm,
              const DecoderLinear& head);

  // embedded [lanes, hidden], cos and sin [lanes, head_size] of the rotary positions, position
  // int64 [lanes] in [0, positions), logits [lanes, head.columns]; all contiguous. Throws
  // std::out_of_range for a position outside.
  void operator()(const void* embedded, const void* cos, const void* sin, const int64_t* position,
                  void* logits, int num_threads);

 private:
  DecoderShape shape_;
  std::vector<DecoderLayer> layers_;
  const void* final_norm_;
  DecoderLinear head_;
  // As floats, holding values of the dtype.
  std::vector<float> hidden_, normed_, cos_, sin_, query_, key_, value_, attended_, gated_;
};

}  // namespace powerkernels
