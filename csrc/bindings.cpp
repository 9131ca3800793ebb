// Binds the ops to Python: addresses come as integers, the GIL is released while they work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "powerkernels/decode_attention.h"
#include "powerkernels/decoder_step.h"
#include "powerkernels/lane_moves.h"
#include "powerkernels/lane_transition.h"
#include "powerkernels/ops.h"
#include "powerkernels/packed_linear.h"
#include "powerkernels/parallel.h"
#include "powerkernels/simd_level.h"
#include "powerkernels/token_ops.h"
#if defined(POWERKERNELS_CUDA)
#include "powerkernels/device_info.h"
#endif
#if defined(POWERKERNELS_GRAPH_LOOP)
#include "powerkernels/graph_loop.h"
#endif

namespace py = pybind11;

namespace {

using namespace powerkernels;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// An array of floats as (address, code of its dtype); address 0 is a missing one.
using Floats = std::pair<uintptr_t, int>;
// A batch as (tokens, sequences, width, address of bounds).
using Rows = std::array<int64_t, 4>;

// A packed linear layer as (address, address of its bias, columns).
using Linear = std::tuple<uintptr_t, uintptr_t, int64_t>;

DecoderLinear decoder_linear(const Linear& linear) {
  return {pointer<const void>(std::get<0>(linear)), pointer<const void>(std::get<1>(linear)),
          std::get<2>(linear)};
}

FloatArray floats(const Floats& array) {
  return {pointer<const void>(array.first), static_cast<DType>(array.second)};
}

TokenRows token_rows(const Rows& rows) {
  return {rows[0], rows[1], rows[2], pointer<const int64_t>(static_cast<uintptr_t>(rows[3]))};
}

TokenArrays token_arrays(const Rows& rows, const Floats& log_prob, const Floats& advantages,
                         uintptr_t mask) {
  return {token_rows(rows),
          floats(log_prob),
          {nullptr, DType::float32},
          floats(advantages),
          pointer<const uint8_t>(mask),
          pointer<const uint8_t>(mask)};
}

SelectionState selection_state(const std::array<int64_t, 4>& state) {
  return {state[0], state[1], state[2], state[3]};
}

py::dict cuda_devices() {
  py::dict result;
  py::list devices;
#if defined(POWERKERNELS_CUDA)
  const CudaInfo info = cuda_info();
  for (const CudaDevice& device : info.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["compute_capability"] = py::make_tuple(device.major, device.minor);
    entry["num_sms"] = device.num_sms;
    entry["memory_bytes"] = device.memory_bytes;
    devices.append(entry);
  }
  result["runtime_version"] = info.runtime_version;
  result["driver_version"] = info.driver_version;
  result["error"] = info.error;
#else
  result["runtime_version"] = 0;
  result["driver_version"] = 0;
  result["error"] = "built without CUDA";
#endif
  result["count"] = devices.size();
  result["devices"] = devices;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of powerkernels; used through powerkernels._extension.";
  m.attr("version") = POWERKERNELS_VERSION;
#if defined(POWERKERNELS_CUDA)
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.attr("slice_v") = kSliceV;

  m.def("simd_level", [] { return std::string(simd_level_name(simd_level())); });
  m.def("highest_simd_level", [] { return std::string(simd_level_name(highest_simd_level())); });
  m.def("set_simd_level", [](const std::string& name) { set_simd_level(name.c_str()); });
  m.def("parallel_backend", [] { return std::string(parallel_backend()); });
  m.def("cuda_devices", &cuda_devices,
        "dict: runtime_version, driver_version (1000 * major + 10 * minor), error, count, devices");

  m.def(
      "philox4x32",
      [](uintptr_t counters, uint64_t seed, int64_t count, uintptr_t out) {
        philox4x32_many(pointer<const int64_t>(counters), seed, count, pointer<int64_t>(out));
      },
      py::arg("counters"), py::arg("seed"), py::arg("count"), py::arg("out"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "score_tokens",
      [](uintptr_t logits, int dtype, int64_t num_rows, int64_t vocab, int64_t inner,
         int64_t outer_stride, int64_t inner_stride, uintptr_t targets, bool targets_are_int64,
         int64_t ignore_index, double alpha, double temperature, double softcap, bool entropy,
         uintptr_t log_prob, uintptr_t log_z, uintptr_t entropy_out, int num_threads,
         uintptr_t temperatures, uintptr_t row_max, uintptr_t log_sum) {
        return score_tokens(
            {pointer<const void>(logits), num_rows, vocab, {inner, outer_stride, inner_stride}},
            {pointer<const void>(targets), targets_are_int64, ignore_index},
            {{static_cast<DType>(dtype), alpha, temperature, softcap, entropy},
             pointer<const double>(temperatures)},
            {pointer<void>(log_prob), pointer<void>(log_z), pointer<void>(entropy_out),
             pointer<void>(row_max), pointer<void>(log_sum)},
            num_threads);
      },
      py::arg("logits"), py::arg("dtype"), py::arg("num_rows"), py::arg("vocab"), py::arg("inner"),
      py::arg("outer_stride"), py::arg("inner_stride"), py::arg("targets"),
      py::arg("targets_are_int64"), py::arg("ignore_index"), py::arg("alpha"),
      py::arg("temperature"), py::arg("softcap"), py::arg("entropy"), py::arg("log_prob"),
      py::arg("log_z"), py::arg("entropy_out"), py::arg("num_threads"), py::arg("temperatures") = 0,
      py::arg("row_max") = 0, py::arg("log_sum") = 0, py::call_guard<py::gil_scoped_release>());

  m.def(
      "row_sums",
      [](uintptr_t logits, int dtype, int64_t num_rows, int64_t vocab, int64_t inner,
         int64_t outer_stride, int64_t inner_stride, uintptr_t targets, bool targets_are_int64,
         int64_t ignore_index, double alpha, double temperature, uintptr_t temperatures,
         double softcap, bool entropy, uintptr_t out, int num_threads) {
        row_sums(
            {pointer<const void>(logits), num_rows, vocab, {inner, outer_stride, inner_stride}},
            {pointer<const void>(targets), targets_are_int64, ignore_index},
            {{static_cast<DType>(dtype), alpha, temperature, softcap, entropy},
             pointer<const double>(temperatures)},
            pointer<double>(out), num_threads);
      },
      py::arg("logits"), py::arg("dtype"), py::arg("num_rows"), py::arg("vocab"), py::arg("inner"),
      py::arg("outer_stride"), py::arg("inner_stride"), py::arg("targets"),
      py::arg("targets_are_int64"), py::arg("ignore_index"), py::arg("alpha"),
      py::arg("temperature"), py::arg("temperatures"), py::arg("softcap"), py::arg("entropy"),
      py::arg("out"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "score_tokens_bwd",
      [](uintptr_t logits, int dtype, int64_t num_rows, int64_t vocab, int64_t inner,
         int64_t outer_stride, int64_t inner_stride, uintptr_t targets, bool targets_are_int64,
         int64_t ignore_index, double alpha, double temperature, uintptr_t temperatures,
         double softcap, uintptr_t log_prob, uintptr_t log_z, uintptr_t entropy, uintptr_t row_max,
         uintptr_t log_sum, uintptr_t grad_log_prob, uintptr_t grad_log_z, uintptr_t grad_entropy,
         uintptr_t dlogits, int64_t dlogits_inner, int64_t dlogits_outer_stride,
         int64_t dlogits_inner_stride, int num_threads) {
        score_tokens_bwd(
            {pointer<const void>(logits), num_rows, vocab, {inner, outer_stride, inner_stride}},
            {pointer<const void>(targets), targets_are_int64, ignore_index},
            {{static_cast<DType>(dtype), alpha, temperature, softcap, /*entropy=*/false},
             pointer<const double>(temperatures)},
            {pointer<const void>(log_prob), pointer<const void>(log_z),
             pointer<const void>(entropy), pointer<const void>(row_max),
             pointer<const void>(log_sum)},
            {pointer<const void>(grad_log_prob), pointer<const void>(grad_log_z),
             pointer<const void>(grad_entropy)},
            {pointer<void>(dlogits), {dlogits_inner, dlogits_outer_stride, dlogits_inner_stride}},
            num_threads);
      },
      py::arg("logits"), py::arg("dtype"), py::arg("num_rows"), py::arg("vocab"), py::arg("inner"),
      py::arg("outer_stride"), py::arg("inner_stride"), py::arg("targets"),
      py::arg("targets_are_int64"), py::arg("ignore_index"), py::arg("alpha"),
      py::arg("temperature"), py::arg("temperatures"), py::arg("softcap"), py::arg("log_prob"),
      py::arg("log_z"), py::arg("entropy"), py::arg("row_max"), py::arg("log_sum"),
      py::arg("grad_log_prob"), py::arg("grad_log_z"), py::arg("grad_entropy"), py::arg("dlogits"),
      py::arg("dlogits_inner"), py::arg("dlogits_outer_stride"), py::arg("dlogits_inner_stride"),
      py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "sample_tokens",
      [](uintptr_t logits, int dtype, int64_t num_rows, int64_t vocab, int64_t row_stride,
         double alpha, double temperature, int64_t top_k, double top_p, double min_p, uint64_t seed,
         uintptr_t counters, uintptr_t banned, bool entropy, uintptr_t token, uintptr_t log_prob,
         uintptr_t log_z, uintptr_t entropy_out, int num_threads) {
        sample_tokens({pointer<const void>(logits), num_rows, vocab, {num_rows, 0, row_stride}},
                      seed, pointer<const int64_t>(counters), pointer<const int64_t>(banned),
                      {static_cast<DType>(dtype), alpha, temperature, /*softcap=*/0.0, entropy},
                      {top_k, top_p, min_p}, pointer<int64_t>(token),
                      {pointer<void>(log_prob), pointer<void>(log_z), pointer<void>(entropy_out),
                       nullptr, nullptr},
                      num_threads);
      },
      py::arg("logits"), py::arg("dtype"), py::arg("num_rows"), py::arg("vocab"),
      py::arg("row_stride"), py::arg("alpha"), py::arg("temperature"), py::arg("top_k"),
      py::arg("top_p"), py::arg("min_p"), py::arg("seed"), py::arg("counters"), py::arg("banned"),
      py::arg("entropy"), py::arg("token"), py::arg("log_prob"), py::arg("log_z"),
      py::arg("entropy_out"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "support_threshold",
      [](uintptr_t logits, int dtype, int64_t num_rows, int64_t vocab, int64_t row_stride,
         double alpha, double temperature, int64_t top_k, double top_p, double min_p, uintptr_t out,
         int num_threads) {
        support_thresholds(
            {pointer<const void>(logits), num_rows, vocab, {num_rows, 0, row_stride}},
            {static_cast<DType>(dtype), alpha, temperature, /*softcap=*/0.0, /*entropy=*/false},
            {top_k, top_p, min_p}, pointer<double>(out), num_threads);
      },
      py::arg("logits"), py::arg("dtype"), py::arg("num_rows"), py::arg("vocab"),
      py::arg("row_stride"), py::arg("alpha"), py::arg("temperature"), py::arg("top_k"),
      py::arg("top_p"), py::arg("min_p"), py::arg("out"), py::arg("num_threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "sequence_log_likelihood",
      [](uintptr_t log_prob, int dtype, int64_t rows, int64_t length, int64_t row_stride,
         uintptr_t mask, uintptr_t cu_seqlens, double alpha, uintptr_t out, int num_threads) {
        sequence_log_likelihood(pointer<const void>(log_prob), static_cast<DType>(dtype), rows,
                                length, row_stride, pointer<const uint8_t>(mask),
                                pointer<const int64_t>(cu_seqlens), alpha, pointer<double>(out),
                                num_threads);
      },
      py::arg("log_prob"), py::arg("dtype"), py::arg("rows"), py::arg("length"),
      py::arg("row_stride"), py::arg("mask"), py::arg("cu_seqlens"), py::arg("alpha"),
      py::arg("out"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "cov_moments",
      [](const Rows& rows, const Floats& log_prob, const Floats& advantages, uintptr_t mask,
         const Floats& old_log_prob, uintptr_t selectable, double low, double high,
         uintptr_t unclipped, uintptr_t out, int num_threads) {
        TokenArrays tokens = token_arrays(rows, log_prob, advantages, mask);
        tokens.old_log_prob = floats(old_log_prob);
        tokens.selectable = pointer<const uint8_t>(selectable);
        cov_moments(
            tokens,
            {static_cast<float>(low), static_cast<float>(high), pointer<uint8_t>(unclipped)},
            pointer<double>(out), num_threads);
      },
      py::arg("rows"), py::arg("log_prob"), py::arg("advantages"), py::arg("mask"),
      py::arg("old_log_prob"), py::arg("selectable"), py::arg("low"), py::arg("high"),
      py::arg("unclipped"), py::arg("out"), py::arg("num_threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "cov_tokens",
      [](const Rows& rows, const Floats& log_prob, const Floats& advantages, uintptr_t mask,
         uintptr_t moments, uintptr_t out, int num_threads) {
        cov_tokens(token_arrays(rows, log_prob, advantages, mask), pointer<const double>(moments),
                   pointer<float>(out), num_threads);
      },
      py::arg("rows"), py::arg("log_prob"), py::arg("advantages"), py::arg("mask"),
      py::arg("moments"), py::arg("out"), py::arg("num_threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "cov_keys",
      [](const Rows& rows, const Floats& log_prob, const Floats& advantages, uintptr_t selectable,
         uintptr_t moments, bool band, double lb, double ub, uint64_t seed, int64_t first_sequence,
         uintptr_t sequence_index, uintptr_t values, uintptr_t counts, int num_threads) {
        cov_keys(
            {token_arrays(rows, log_prob, advantages, selectable), pointer<const double>(moments),
             band, static_cast<float>(lb), static_cast<float>(ub), seed, first_sequence,
             pointer<const int64_t>(sequence_index)},
            pointer<uint32_t>(values), pointer<int64_t>(counts), num_threads);
      },
      py::arg("rows"), py::arg("log_prob"), py::arg("advantages"), py::arg("selectable"),
      py::arg("moments"), py::arg("band"), py::arg("lb"), py::arg("ub"), py::arg("seed"),
      py::arg("first_sequence"), py::arg("sequence_index"), py::arg("values"), py::arg("counts"),
      py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());

  py::class_<KeyCandidates>(m, "KeyCandidates")
      .def(
          py::init([](uintptr_t values, int64_t num_tokens, uint32_t first_digit, int num_threads) {
            return KeyCandidates(pointer<const uint32_t>(values), num_tokens, first_digit,
                                 num_threads);
          }),
          py::arg("values"), py::arg("num_tokens"), py::arg("first_digit"), py::arg("num_threads"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "histogram",
          [](const KeyCandidates& self, uint32_t prefix, int digit, uintptr_t out) {
            self.histogram(prefix, digit, pointer<int64_t>(out));
          },
          py::arg("prefix"), py::arg("digit"), py::arg("out"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "mark",
          [](const KeyCandidates& self, const std::array<int64_t, 4>& state, int64_t ties_before,
             uintptr_t out) {
            self.mark(selection_state(state), ties_before, pointer<uint8_t>(out));
          },
          py::arg("state"), py::arg("ties_before"), py::arg("out"),
          py::call_guard<py::gil_scoped_release>());

  m.def(
      "cov_narrow",
      [](uintptr_t counts, uintptr_t moments, double ratio, int64_t k,
         const std::optional<std::array<int64_t, 4>>& state, int digit) {
        const SelectionState before = selection_state(state.value_or(std::array<int64_t, 4>{}));
        const SelectionState next =
            cov_narrow(pointer<const int64_t>(counts), pointer<const double>(moments), ratio, k,
                       state.has_value() ? &before : nullptr, digit);
        return std::array<int64_t, 4>{next.threshold, next.remaining, next.chosen,
                                      next.num_nonzero};
      },
      py::arg("counts"), py::arg("moments"), py::arg("ratio"), py::arg("k"), py::arg("state"),
      py::arg("digit"));

  m.def(
      "policy_loss_sums",
      [](const Rows& rows, const Floats& log_prob, const Floats& old_log_prob,
         const Floats& advantages, const Floats& weights, uintptr_t mask, uintptr_t selected,
         uintptr_t moments, int kind, bool clip, double low, double high, double dual_clip,
         int on_selected, double penalty, bool straight_through, uintptr_t row_loss,
         uintptr_t row_count, uintptr_t sums, uintptr_t terms, int num_threads) {
        TokenArrays tokens = token_arrays(rows, log_prob, advantages, mask);
        tokens.old_log_prob = floats(old_log_prob);
        policy_loss_sums(
            {tokens, floats(weights), pointer<const uint8_t>(selected),
             pointer<const double>(moments)},
            {static_cast<LossKind>(kind), clip, static_cast<float>(low), static_cast<float>(high),
             static_cast<float>(dual_clip), static_cast<OnSelected>(on_selected),
             static_cast<float>(penalty), straight_through},
            {pointer<double>(row_loss), pointer<double>(row_count), pointer<double>(sums),
             pointer<float>(terms)},
            num_threads);
      },
      py::arg("rows"), py::arg("log_prob"), py::arg("old_log_prob"), py::arg("advantages"),
      py::arg("weights"), py::arg("mask"), py::arg("selected"), py::arg("moments"), py::arg("kind"),
      py::arg("clip"), py::arg("low"), py::arg("high"), py::arg("dual_clip"),
      py::arg("on_selected"), py::arg("penalty"), py::arg("straight_through"), py::arg("row_loss"),
      py::arg("row_count"), py::arg("sums"), py::arg("terms"), py::arg("num_threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "move_positions",
      [](uintptr_t table, int64_t num_tensors, int64_t num_positions, uintptr_t moves,
         uintptr_t offset, int64_t num_lanes, int num_threads) {
        move_positions(pointer<const LaneCache>(table), num_tensors, num_positions,
                       pointer<const LaneMove>(moves), pointer<const int64_t>(offset), num_lanes,
                       num_threads);
      },
      py::arg("table"), py::arg("num_tensors"), py::arg("num_positions"), py::arg("moves"),
      py::arg("offset"), py::arg("num_lanes"), py::arg("num_threads"),
      py::call_guard<py::gil_scoped_release>());

  struct LaneTransition {
    LaneArrays arrays;
    TransitionRules rules;
  };
  py::class_<LaneTransition>(m, "LaneTransition")
      .def(py::init([](const std::map<std::string, uintptr_t>& addresses, int64_t num_lanes,
                       int64_t max_length, int64_t num_items, int64_t num_eos, double alpha,
                       double proposal_power, int64_t num_mcmc_steps, int64_t block_size,
                       bool early_rejection, bool shared_prefix_skip, bool length_term,
                       bool growth_cap, bool truncated_sum, bool stop_at_eos) {
             const auto at = [&](const char* name) { return addresses.at(name); };
             return LaneTransition{
                 {pointer<Lane>(at("lanes")),
                  pointer<Slot>(at("slots")),
                  pointer<const int64_t>(at("offset")),
                  pointer<double>(at("log_u")),
                  pointer<int64_t>(at("tokens")),
                  pointer<TokenRecord>(at("scores")),
                  pointer<double>(at("w_sum")),
                  pointer<TraceRow>(at("trace")),
                  pointer<int64_t>(at("fed")),
                  pointer<int64_t>(at("position")),
                  pointer<int64_t>(at("counters")),
                  pointer<int64_t>(at("ban")),
                  pointer<LaneMove>(at("moves")),
                  pointer<LaneTotals>(at("totals")),
                  pointer<int32_t>(at("go")),
                  pointer<const int64_t>(at("block_limits")),
                  pointer<const double>(at("log_int")),
                  pointer<const int64_t>(at("eos")),
                  pointer<const uint64_t>(at("seed")),
                  num_lanes,
                  max_length,
                  num_items,
                  num_eos},
                 {alpha, proposal_power, num_mcmc_steps, block_size, early_rejection,
                  shared_prefix_skip, length_term, growth_cap, truncated_sum, stop_at_eos}};
           }),
           py::kw_only(), py::arg("addresses"), py::arg("num_lanes"), py::arg("max_length"),
           py::arg("num_items"), py::arg("num_eos"), py::arg("alpha"), py::arg("proposal_power"),
           py::arg("num_mcmc_steps"), py::arg("block_size"), py::arg("early_rejection"),
           py::arg("shared_prefix_skip"), py::arg("length_term"), py::arg("growth_cap"),
           py::arg("truncated_sum"), py::arg("stop_at_eos"))
      .def(
          "__call__",
          [](const LaneTransition& self, uintptr_t token, uintptr_t log_prob, uintptr_t log_z,
             uintptr_t entropy, int num_threads) {
            lane_transition(self.arrays, self.rules,
                            {pointer<const int64_t>(token), pointer<const double>(log_prob),
                             pointer<const double>(log_z), pointer<const double>(entropy)},
                            num_threads);
          },
          py::arg("token"), py::arg("log_prob"), py::arg("log_z"), py::arg("entropy"),
          py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "decode_attention",
      [](uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t lengths, uintptr_t sinks,
         uintptr_t output, int dtype, int64_t lanes, int64_t kv_heads, int64_t group,
         int64_t head_size, int64_t value_size, std::array<int64_t, 2> query_strides,
         std::array<int64_t, 3> key_strides, std::array<int64_t, 3> value_strides, double scale,
         double softcap, int64_t window, int num_threads) {
        decode_attention({pointer<const void>(query),
                          pointer<const void>(key),
                          pointer<const void>(value),
                          pointer<const int64_t>(lengths),
                          pointer<const float>(sinks),
                          pointer<void>(output),
                          lanes,
                          kv_heads,
                          group,
                          {query_strides[0], query_strides[1]},
                          {key_strides[0], key_strides[1], key_strides[2]},
                          {value_strides[0], value_strides[1], value_strides[2]}},
                         {static_cast<DType>(dtype), head_size, value_size,
                          static_cast<float>(scale), static_cast<float>(softcap), window},
                         num_threads);
      },
      py::arg("query"), py::arg("key"), py::arg("value"), py::arg("lengths"), py::arg("sinks"),
      py::arg("output"), py::arg("dtype"), py::arg("lanes"), py::arg("kv_heads"), py::arg("group"),
      py::arg("head_size"), py::arg("value_size"), py::arg("query_strides"), py::arg("key_strides"),
      py::arg("value_strides"), py::arg("scale"), py::arg("softcap"), py::arg("window"),
      py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "pack_linear",
      [](uintptr_t weight, int dtype, int64_t stride, int64_t columns, int64_t depth,
         uintptr_t packed, int num_threads) {
        pack_linear(static_cast<DType>(dtype), pointer<const void>(weight), stride, columns, depth,
                    pointer<void>(packed), num_threads);
      },
      py::arg("weight"), py::arg("dtype"), py::arg("stride"), py::arg("columns"), py::arg("depth"),
      py::arg("packed"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "packed_linear",
      [](uintptr_t input, uintptr_t packed, uintptr_t bias, uintptr_t output, int dtype,
         int64_t rows, int64_t columns, int64_t depth, int64_t input_stride, int num_threads) {
        packed_linear(
            {static_cast<DType>(dtype), pointer<const void>(input), pointer<const void>(packed),
             pointer<const void>(bias), pointer<void>(output), rows, columns, depth, input_stride},
            num_threads);
      },
      py::arg("input"), py::arg("packed"), py::arg("bias"), py::arg("output"), py::arg("dtype"),
      py::arg("rows"), py::arg("columns"), py::arg("depth"), py::arg("input_stride"),
      py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "prefer_huge_pages",
      [](uintptr_t memory, int64_t bytes) { prefer_huge_pages(pointer<void>(memory), bytes); },
      py::arg("memory"), py::arg("bytes"));

  py::class_<DecoderLayer>(m, "DecoderLayer")
      .def(py::init([](uintptr_t input_norm, uintptr_t mlp_norm, uintptr_t query_norm,
                       uintptr_t key_norm, const Linear& query, const Linear& key,
                       const Linear& value, const Linear& out, const Linear& gate, const Linear& up,
                       const Linear& down, uintptr_t keys, uintptr_t values, int64_t window) {
             return DecoderLayer{pointer<const void>(input_norm),
                                 pointer<const void>(mlp_norm),
                                 pointer<const void>(query_norm),
                                 pointer<const void>(key_norm),
                                 decoder_linear(query),
                                 decoder_linear(key),
                                 decoder_linear(value),
                                 decoder_linear(out),
                                 decoder_linear(gate),
                                 decoder_linear(up),
                                 decoder_linear(down),
                                 pointer<void>(keys),
                                 pointer<void>(values),
                                 window};
           }),
           py::arg("input_norm"), py::arg("mlp_norm"), py::arg("query_norm"), py::arg("key_norm"),
           py::arg("query"), py::arg("key"), py::arg("value"), py::arg("out"), py::arg("gate"),
           py::arg("up"), py::arg("down"), py::arg("keys"), py::arg("values"), py::arg("window"));

  py::class_<DecoderStep>(m, "DecoderStep")
      .def(py::init([](int dtype, int64_t lanes, int64_t positions, int64_t hidden, int64_t heads,
                       int64_t kv_heads, int64_t head_size, int64_t intermediate, float epsilon,
                       float scale, const std::vector<DecoderLayer>& layers, uintptr_t final_norm,
                       const Linear& head) {
             return std::make_unique<DecoderStep>(
                 DecoderShape{static_cast<DType>(dtype), lanes, positions, hidden, heads, kv_heads,
                              head_size, intermediate, epsilon, scale},
                 layers, pointer<const void>(final_norm), decoder_linear(head));
           }),
           py::arg("dtype"), py::arg("lanes"), py::arg("positions"), py::arg("hidden"),
           py::arg("heads"), py::arg("kv_heads"), py::arg("head_size"), py::arg("intermediate"),
           py::arg("epsilon"), py::arg("scale"), py::arg("layers"), py::arg("final_norm"),
           py::arg("head"))
      .def(
          "__call__",
          [](DecoderStep& self, uintptr_t embedded, uintptr_t cos, uintptr_t sin,
             uintptr_t position, uintptr_t logits, int num_threads) {
            self(pointer<const void>(embedded), pointer<const void>(cos), pointer<const void>(sin),
                 pointer<const int64_t>(position), pointer<void>(logits), num_threads);
          },
          py::arg("embedded"), py::arg("cos"), py::arg("sin"), py::arg("position"),
          py::arg("logits"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
  m.attr("PANEL_COLUMNS") = kPanelColumns;

#if defined(POWERKERNELS_GRAPH_LOOP)
  m.def("why_no_graph_loop", &why_no_graph_loop,
        "Why this machine cannot run a GraphLoop, in a line; empty if it can.");
  m.def("graph_node_kinds", &graph_node_kinds, py::arg("graph"),
        "dict: how many nodes of each kind a cudaGraph_t holds");

  py::class_<GraphLoop>(m, "GraphLoop")
      .def(py::init<uintptr_t, uintptr_t, int>(), py::arg("tick_graph"), py::arg("flag"),
           py::arg("device"), py::call_guard<py::gil_scoped_release>())
      .def("launch", &GraphLoop::launch, py::arg("stream"), py::arg("max_ticks") = 0,
           py::call_guard<py::gil_scoped_release>())
      .def("is_done", &GraphLoop::is_done, py::call_guard<py::gil_scoped_release>())
      .def("request_stop", &GraphLoop::request_stop)
      .def("clear_stop", &GraphLoop::clear_stop)
      .def("ticks", &GraphLoop::ticks);
#endif
}
