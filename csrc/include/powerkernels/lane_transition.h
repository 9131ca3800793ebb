// What all lanes do between two model steps: see powerkernels/power_sampling/lane_state.py for the
// state and reference.py for the rules. The structs are rows of its tensors.
#pragma once

#include <cstdint>

#include "powerkernels/lane_moves.h"

namespace powerkernels {

enum LanePhase : int64_t { kIdle, kWait, kExtend, kPropose };
enum SlotStatus : int64_t { kEmpty, kRunning, kFinished };
constexpr int64_t kWorking = 0, kCurrent = 1;

struct Lane {
  int64_t slot, phase, item, length, agree, cursor, divergence, written, banned, limit, cut,
      prompt_token;

  bool is_busy() const { return phase >= kExtend; }
};

struct Slot {
  int64_t status, chain, next_item, end_item, newest, newest_length, ended;
};

struct TokenRecord {
  double log_prob, log_q, entropy, log_prob_sum;
};

struct TraceRow {
  double block, cut, length, accepted, log_accept_ratio, log_likelihood, decoded;
};

struct LaneTotals {
  int64_t bad, num_finished, num_running, num_busy, num_decoded;
};

struct TransitionRules {
  double alpha, proposal_power;
  int64_t num_mcmc_steps, block_size;
  bool early_rejection, shared_prefix_skip, length_term, growth_cap, truncated_sum, stop_at_eos;
};

// C lanes and slots, L tokens of a completion, N items of a chain.
struct LaneArrays {
  Lane* lanes;            // [C]
  Slot* slots;            // [C]
  const int64_t* offset;  // [C]
  double* log_u;          // [C]
  int64_t* tokens;        // [2, C, L]
  TokenRecord* scores;    // [2, C, L]
  double* w_sum;          // [2, C, L + 1]
  TraceRow* trace;        // [C, N]
  int64_t* fed;           // [C]
  int64_t* position;      // [C]
  int64_t* counters;      // [C, 4]
  int64_t* ban;           // [C]
  LaneMove* moves;        // [C]
  LaneTotals* totals;     // [1]
  int32_t* go;            // [1]
  const int64_t* block_limits;
  const double* log_int;  // [L + 1]
  const int64_t* eos;     // [num_eos]
  const uint64_t* seed;   // [1]
  int64_t num_lanes, max_length, num_items, num_eos;
};

// [C] each; token null: nothing was drawn.
struct DrawnTokens {
  const int64_t* token;
  const double* log_prob;
  const double* log_z;
  const double* entropy;
};

void lane_transition(const LaneArrays& arrays, const TransitionRules& rules,
                     const DrawnTokens& drawn, int num_threads);

}  // namespace powerkernels
