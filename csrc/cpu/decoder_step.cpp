// A decoder step: sets of tasks that one team of threads takes in turn.
#include "powerkernels/decoder_step.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "powerkernels/decode_attention.h"
#include "powerkernels/packed_linear.h"
#include "powerkernels/parallel.h"
#include "powerkernels/simd_level.h"

namespace powerkernels {

PK_SIMD_DECLARE(void round_sums(DType dtype, const float* sums, const void* bias, int64_t n,
                                float* out);
                void add_sums(DType dtype, const float* sums, const void* bias, int64_t n,
                              float* out);
                void gate_sums(DType dtype, const float* gate, const void* gate_bias,
                               const float* up, const void* up_bias, int64_t n, float* out);
                void normalize(DType dtype, const float* x, const void* weight, int64_t n,
                               float epsilon, float* out);
                void rotate(DType dtype, const float* x, const float* cos, const float* sin,
                            int64_t n, void* out);
                void narrow(DType dtype, const float* x, int64_t n, void* out);
                void attend(const AttentionHead& head, const AttentionParams& params,
                            const AttentionScratch& scratch))

namespace {

// Memory of one thread.
float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(static_cast<size_t>(floats));
  return memory.data();
}

// Some columns of a linear layer.
struct Columns {
  int64_t first, count, panels;
  Columns(const DecoderLinear& linear, int64_t task)
      : first(task * kTaskColumns),
        count(std::min(kTaskColumns, linear.columns - first)),
        panels(panels_of(count)) {}
};

}  // namespace

DecoderStep::DecoderStep(const DecoderShape& shape, std::vector<DecoderLayer> layers,
                         const void* final_norm, const DecoderLinear& head)
    : shape_(shape), layers_(std::move(layers)), final_norm_(final_norm), head_(head) {
  const auto sized = [&](std::vector<float>& memory, int64_t per_lane) {
    memory.resize(static_cast<size_t>(shape.lanes * per_lane));
  };
  sized(hidden_, shape.hidden);
  sized(normed_, shape.hidden);
  sized(cos_, shape.head_size);
  sized(sin_, shape.head_size);
  sized(query_, shape.heads * shape.head_size);
  sized(key_, shape.kv_heads * shape.head_size);
  sized(value_, shape.kv_heads * shape.head_size);
  sized(attended_, shape.heads * shape.head_size);
  sized(gated_, shape.intermediate);
}

void DecoderStep::operator()(const void* embedded, const void* cos, const void* sin,
                             const int64_t* position, void* logits, int num_threads) {
  const DecoderShape& s = shape_;
  const DType dtype = s.dtype;
  const int64_t group = s.heads / s.kv_heads;
  for (int64_t lane = 0; lane < s.lanes; ++lane) {
    if (position[lane] < 0 || position[lane] >= s.positions) {
      throw std::out_of_range("position " + std::to_string(position[lane]) + " of lane " +
                              std::to_string(lane) + " is not in a cache of " +
                              std::to_string(s.positions));
    }
  }

  const auto normalize_lanes = [&](Team& team, const void* weight) {
    team.run(s.lanes, [&](int64_t lane) {
      PK_SIMD_PICK(normalize)
      (dtype, hidden_.data() + lane * s.hidden, weight, s.hidden, s.epsilon,
       normed_.data() + lane * s.hidden);
    });
  };
  // Sums of one task's columns for all lanes, [lanes, panels * kPanelColumns].
  const auto multiply = [&](const DecoderLinear& linear, const Columns& columns, const float* input,
                            int64_t depth, float* sums) {
    PK_SIMD_PICK(multiply_panels)
    ({dtype, input, element(linear.packed, dtype, columns.first * depth), sums, s.lanes, depth,
      columns.panels});
  };
  // One task of a linear layer whose outputs go to out [lanes, linear.columns], through `finish`.
  const auto project = [&](const DecoderLinear& linear, int64_t task, const float* input,
                           int64_t depth, float* out, auto finish) {
    const Columns columns(linear, task);
    float* sums = scratch(s.lanes * kTaskColumns);
    multiply(linear, columns, input, depth, sums);
    for (int64_t lane = 0; lane < s.lanes; ++lane) {
      finish(dtype, sums + lane * columns.panels * kPanelColumns,
             element(linear.bias, dtype, columns.first), columns.count,
             out + lane * linear.columns + columns.first);
    }
  };

  // Rotates one key/value head's queries and key, writes the cache, attends.
  const auto attend_head = [&](const DecoderLayer& layer, int64_t task) {
    const int64_t lane = task / s.kv_heads, kv_head = task % s.kv_heads;
    const int64_t size = s.head_size, padded = padded_size(size);
    const int64_t kv_width = s.kv_heads * size;
    const int64_t row = lane * s.positions + position[lane];
    const float *cosines = cos_.data() + lane * size, *sines = sin_.data() + lane * size;
    // Queries and outputs in the dtype, a normed head, and what `attend` needs.
    float* memory = scratch((2 * group + 1) * padded + group * padded + kAttentionChunk * padded +
                            group * kAttentionChunk + group * padded);
    float *queries = memory, *outputs = queries + group * padded, *head = outputs + group * padded;
    float* rest = head + padded;
    const auto rotated = [&](const float* x, const void* norm, void* out) {
      if (norm != nullptr) {
        PK_SIMD_PICK(normalize)(dtype, x, norm, size, s.epsilon, head);
        x = head;
      }
      PK_SIMD_PICK(rotate)(dtype, x, cosines, sines, size, out);
    };
    for (int64_t g = 0; g < group; ++g) {
      rotated(query_.data() + (lane * s.heads + kv_head * group + g) * size, layer.query_norm,
              element(static_cast<void*>(queries), dtype, g * size));
    }
    const int64_t kv_first = kv_head * size;
    rotated(key_.data() + lane * kv_width + kv_first, layer.key_norm,
            element(layer.keys, dtype, row * kv_width + kv_first));
    PK_SIMD_PICK(narrow)
    (dtype, value_.data() + lane * kv_width + kv_first, size,
     element(layer.values, dtype, row * kv_width + kv_first));

    const int64_t start = lane * s.positions * kv_width + kv_first;
    PK_SIMD_PICK(attend)
    ({queries, element(static_cast<const void*>(layer.keys), dtype, start),
      element(static_cast<const void*>(layer.values), dtype, start), outputs, nullptr, size,
      kv_width, kv_width, group, position[lane] + 1},
     {dtype, size, size, s.scale, 0.0f, layer.window},
     {rest, rest + group * padded, rest + (group + kAttentionChunk) * padded,
      rest + (group + kAttentionChunk) * padded + group * kAttentionChunk});
    PK_SIMD_PICK(widen)
    (dtype, outputs, group * size, attended_.data() + (lane * s.heads + kv_head * group) * size);
  };

  parallel_team(num_threads, [&](Team& team) {
    team.run(s.lanes, [&](int64_t lane) {
      const int64_t size = s.head_size;
      PK_SIMD_PICK(widen)
      (dtype, element(embedded, dtype, lane * s.hidden), s.hidden,
       hidden_.data() + lane * s.hidden);
      PK_SIMD_PICK(widen)
      (dtype, element(cos, dtype, lane * size), size, cos_.data() + lane * size);
      PK_SIMD_PICK(widen)
      (dtype, element(sin, dtype, lane * size), size, sin_.data() + lane * size);
    });
    for (const DecoderLayer& layer : layers_) {
      normalize_lanes(team, layer.input_norm);
      const int64_t query_tasks = linear_tasks(layer.query.columns);
      const int64_t kv_tasks = linear_tasks(layer.key.columns);
      team.run(query_tasks + 2 * kv_tasks, [&](int64_t task) {
        const auto finish = PK_SIMD_PICK(round_sums);
        if (task < query_tasks) {
          project(layer.query, task, normed_.data(), s.hidden, query_.data(), finish);
        } else if (task < query_tasks + kv_tasks) {
          project(layer.key, task - query_tasks, normed_.data(), s.hidden, key_.data(), finish);
        } else {
          project(layer.value, task - query_tasks - kv_tasks, normed_.data(), s.hidden,
                  value_.data(), finish);
        }
      });
      team.run(s.lanes * s.kv_heads, [&](int64_t task) { attend_head(layer, task); });
      team.run(linear_tasks(s.hidden), [&](int64_t task) {
        project(layer.out, task, attended_.data(), s.heads * s.head_size, hidden_.data(),
                PK_SIMD_PICK(add_sums));
      });
      normalize_lanes(team, layer.mlp_norm);
      team.run(linear_tasks(s.intermediate), [&](int64_t task) {
        const Columns columns(layer.gate, task);
        float* gates = scratch(2 * s.lanes * kTaskColumns);
        float* ups = gates + s.lanes * kTaskColumns;
        multiply(layer.gate, columns, normed_.data(), s.hidden, gates);
        multiply(layer.up, columns, normed_.data(), s.hidden, ups);
        const int64_t width = columns.panels * kPanelColumns;
        for (int64_t lane = 0; lane < s.lanes; ++lane) {
          PK_SIMD_PICK(gate_sums)
          (dtype, gates + lane * width, element(layer.gate.bias, dtype, columns.first),
           ups + lane * width, element(layer.up.bias, dtype, columns.first), columns.count,
           gated_.data() + lane * s.intermediate + columns.first);
        }
      });
      team.run(linear_tasks(s.hidden), [&](int64_t task) {
        project(layer.down, task, gated_.data(), s.intermediate, hidden_.data(),
                PK_SIMD_PICK(add_sums));
      });
    }
    normalize_lanes(team, final_norm_);
    team.run(linear_tasks(head_.columns), [&](int64_t task) {
      const Columns columns(head_, task);
      float* sums = scratch(s.lanes * kTaskColumns);
      multiply(head_, columns, normed_.data(), s.hidden, sums);
      for (int64_t lane = 0; lane < s.lanes; ++lane) {
        PK_SIMD_PICK(store_sums)
        (dtype, sums + lane * columns.panels * kPanelColumns,
         element(head_.bias, dtype, columns.first), columns.count,
         element(logits, dtype, lane * head_.columns + columns.first));
      }
    });
  });
}

}  // namespace powerkernels
