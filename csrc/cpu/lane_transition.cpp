// powerkernels/power_sampling/reference.py in C++, with the same bits; a task is a slot.
#include "powerkernels/lane_transition.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "powerkernels/parallel.h"
#include "powerkernels/philox.h"

namespace powerkernels {
namespace {

// First word of the Philox counter; see metropolis_hastings.py.
constexpr uint32_t kTokenDraw = 0, kTransitionDraw = 1, kMatchDraw = 2;

// Where the newest state of a chain lies at a moment of a transition.
struct Source {
  int64_t lane, copy;
};

struct Proposal {
  int64_t cut, divergence;
  double log_u;
};

// The lanes of each slot, as lists through `next`.
struct Members {
  std::vector<int64_t> first, next;

  explicit Members(const LaneArrays& a) : first(a.num_lanes, -1), next(a.num_lanes, -1) {
    for (int64_t lane = a.num_lanes - 1; lane >= 0; --lane) {
      const int64_t slot = a.lanes[lane].slot;
      if (slot < 0) continue;
      next[lane] = first[slot];
      first[slot] = lane;
    }
  }
};

// One slot's part of a transition. Slots share no lane, so they may run at once.
class SlotTransition {
 public:
  SlotTransition(const LaneArrays& arrays, const TransitionRules& rules, const DrawnTokens& drawn,
                 const Members& members, int64_t slot)
      : a_(arrays), rules_(rules), drawn_(drawn), members_(members), slot_(slot) {}

  void run() {
    Slot& chain = a_.slots[slot_];
    if (chain.status != kRunning) return;
    Source source = {chain.newest, kCurrent};
    if (drawn_.token != nullptr) source = append_and_resolve();
    bool extending = false, busy = false;
    for_each_lane([&](int64_t lane) { extending |= a_.lanes[lane].phase == kExtend; });
    for_each_lane([&](int64_t lane) {
      Lane& me = a_.lanes[lane];
      // Nothing is known of the state behind an extension before it is there.
      if (me.phase == kWait && !extending) begin(lane, source);
      extending |= me.phase == kExtend;
      busy |= me.is_busy();
    });
    if (!busy && chain.next_item >= chain.end_item) {
      chain.status = kFinished;
      for_each_lane([&](int64_t lane) { a_.lanes[lane].phase = kIdle; });
    }
  }

  int64_t num_decoded() const { return num_decoded_; }
  bool is_bad() const { return is_bad_; }

 private:
  template <typename Work>
  void for_each_lane(const Work& work) const {
    for (int64_t lane = members_.first[slot_]; lane >= 0; lane = members_.next[lane]) work(lane);
  }

  int64_t* tokens(Source at) const {
    return a_.tokens + (at.copy * a_.num_lanes + at.lane) * a_.max_length;
  }
  TokenRecord* scores(Source at) const {
    return a_.scores + (at.copy * a_.num_lanes + at.lane) * a_.max_length;
  }
  double* w_sum(Source at) const {
    return a_.w_sum + (at.copy * a_.num_lanes + at.lane) * (a_.max_length + 1);
  }

  bool is_eos(int64_t token) const {
    return std::find(a_.eos, a_.eos + a_.num_eos, token) != a_.eos + a_.num_eos;
  }

  // Writes a lane's drawn token; returns whether its item is through, and if so whether it is
  // complete and log r, or its bound.
  bool append(int64_t lane, bool* complete, double* log_r) {
    Lane& me = a_.lanes[lane];
    const double s = rules_.proposal_power;
    const int64_t token = drawn_.token[lane];
    const double log_prob = drawn_.log_prob[lane], log_z = drawn_.log_z[lane];
    double w = log_z;
    if (s != rules_.alpha) w += (rules_.alpha - s) * log_prob;
    if (1.0 <= s && s <= rules_.alpha) w = std::min(w, 0.0);
    is_bad_ |= token < 0;
    ++num_decoded_;

    const Source working = {lane, kWorking};
    const int64_t t = me.cursor, length = t + 1;
    TokenRecord* records = scores(working);
    const double before = t > 0 ? records[t - 1].log_prob_sum : 0.0;
    tokens(working)[t] = token;
    records[t] = {log_prob, s * log_prob - log_z, drawn_.entropy[lane], before + log_prob};
    double* sums = w_sum(working);
    sums[t + 1] = sums[t] + w;
    me.written = length;

    *complete = is_eos(token) || length == me.limit;
    *log_r = 0.0;
    bool through = *complete;
    if (me.phase == kPropose) {
      const bool cut_short = *complete && rules_.truncated_sum;
      const int64_t n = cut_short ? std::min(me.length, length) : me.length;
      *log_r = ratio(lane, length, {lane, kCurrent}, n);
      // Each term only falls while a proposal grows, in floating point too.
      through = through || (rules_.early_rejection && *log_r <= a_.log_u[lane]);
    }
    if (!through) me.cursor = length;
    return through;
  }

  // log r of a lane's proposal, `length` tokens of it, against n tokens of a state.
  double ratio(int64_t lane, int64_t length, Source state, int64_t n) const {
    double ratio = w_sum({lane, kWorking})[length] - w_sum(state)[n];
    if (rules_.length_term) ratio = (ratio + a_.log_int[n]) - a_.log_int[length];
    return ratio;
  }

  // Rejects and accepts what is through, first item first; returns the newest state.
  Source append_and_resolve() {
    Slot& chain = a_.slots[slot_];
    // The first item that is accepted, and its log r.
    int64_t winner = -1;
    double winner_log_r = 0.0;
    rejected_.clear();
    for_each_lane([&](int64_t lane) {
      const Lane& me = a_.lanes[lane];
      if (!me.is_busy()) return;
      bool complete;
      double log_r;
      if (!append(lane, &complete, &log_r)) return;
      const bool accepted = me.phase == kExtend || (complete && a_.log_u[lane] < log_r);
      if (!accepted) {
        rejected_.push_back({lane, log_r});
      } else if (winner < 0 || me.item < a_.lanes[winner].item) {
        winner = lane;
        winner_log_r = log_r;
      }
    });
    for (const auto& [lane, log_r] : rejected_) {
      Lane& me = a_.lanes[lane];
      if (winner >= 0 && me.item > a_.lanes[winner].item) continue;
      record(lane, {lane, kCurrent}, me.length, false, log_r);
      me.phase = kWait;
    }
    if (winner < 0) return {chain.newest, kCurrent};

    Lane& me = a_.lanes[winner];
    const int64_t first = me.divergence, length = me.written;
    record(winner, {winner, kWorking}, length, true, winner_log_r);
    const int64_t split = std::min(first, me.agree);
    // The lanes that are at no earlier item take the items that follow, none left out, so they can
    // hold these.
    int64_t last = me.item;
    for_each_lane([&](int64_t lane) {
      const Lane& other = a_.lanes[lane];
      last += !(other.is_busy() && other.item < me.item);
    });
    for_each_lane([&](int64_t lane) {
      if (lane == winner) return;
      Lane& other = a_.lanes[lane];
      other.agree = std::min(other.agree, split);
      // What was begun after this item was begun from another state.
      if (!other.is_busy() || other.item < me.item) return;
      if (other.item <= last && is_the_same_from(winner, lane)) {
        go_on_from(winner, lane);
      } else {
        other.phase = kWait;
      }
    });
    a_.moves[winner] = {winner, kWorking, first, length - first, first};
    me.phase = kWait;
    me.length = me.agree = me.divergence = length;
    chain.newest = winner;
    chain.newest_length = length;
    chain.ended = is_eos(tokens({winner, kWorking})[length - 1]);
    hand_out_from(me.item + 1);
    chain.end_item = a_.num_items;
    return {winner, kWorking};
  }

  // Whether a proposal would be what it is had it been begun from the accepted one, which is in the
  // winner's working copy.
  bool is_the_same_from(int64_t winner, int64_t lane) const {
    const Lane &me = a_.lanes[lane], &accepted = a_.lanes[winner];
    const int64_t n = accepted.written;
    const bool through = me.cursor < me.written;
    if (me.phase != kPropose || through || me.divergence >= me.agree) return false;
    // Behind an extension comes another state.
    if (me.item / items_per_block() != accepted.item / items_per_block()) return false;
    if (rules_.growth_cap && me.limit != n) return false;
    if (cut_of(transition_words(a_.slots[slot_].chain, me.item), n) != me.cut) return false;
    if (!rules_.early_rejection) return true;
    return !(ratio(lane, me.written, {winner, kWorking}, n) <= a_.log_u[lane]);
  }

  // Makes the accepted proposal the state that a lane's proposal is compared with. Its working copy
  // keeps what was written for the item.
  void go_on_from(int64_t winner, int64_t lane) {
    Lane& me = a_.lanes[lane];
    const int64_t n = a_.lanes[winner].written, first = me.agree;
    a_.moves[lane] = {winner, kWorking, first, n - first, std::max(first, me.written)};
    me.length = me.agree = n;
  }

  // Lets the next item be the first one from `item` on that no lane is at.
  void hand_out_from(int64_t item) {
    bool held = true;
    for (; held; item += held) {
      held = false;
      for_each_lane(
          [&](int64_t lane) { held |= a_.lanes[lane].is_busy() && a_.lanes[lane].item == item; });
    }
    a_.slots[slot_].next_item = item;
  }

  // Gives a lane the chain's next item that takes a model step, if there is one.
  void begin(int64_t lane, Source source) {
    Slot& chain = a_.slots[slot_];
    Lane& me = a_.lanes[lane];
    const int64_t n = chain.newest_length;
    while (chain.next_item < chain.end_item) {
      const int64_t item = chain.next_item;
      const int64_t block = item / items_per_block();
      const bool extends = item % items_per_block() == 0;
      if (extends && block > 0 && chain.ended != 0 && rules_.stop_at_eos) {
        chain.end_item = item;
        return;
      }
      hand_out_from(item + 1);
      Proposal proposal = {0, n, 0.0};
      if (!extends) proposal = draw(chain.chain, item, n, source);
      const int64_t divergence = proposal.divergence;
      if (divergence == n && (!extends || chain.ended != 0)) {
        // A proposal that repeats the whole completion, accepted at no cost, or a completion with
        // its EOS, which is not extended.
        record_item(item, proposal.cut, n, true, 0.0, source, 0);
        continue;
      }
      int64_t limit = a_.block_limits[block];
      if (rules_.growth_cap) {
        limit = extends ? std::min(n + rules_.block_size, a_.max_length) : n;
      }
      sync(lane, n, source);
      me.phase = extends ? kExtend : kPropose;
      me.item = item;
      me.cut = proposal.cut;
      me.limit = limit;
      me.cursor = me.divergence = me.written = divergence;
      me.banned = -1;
      if (!extends && rules_.shared_prefix_skip) me.banned = tokens(source)[divergence];
      a_.log_u[lane] = proposal.log_u;
      return;
    }
  }

  PhiloxWords transition_words(int64_t chain, int64_t item) const {
    const auto number = static_cast<uint32_t>(transition_number(item));
    return philox4x32({{kTransitionDraw, 0, number, static_cast<uint32_t>(chain)}}, *a_.seed);
  }

  static int64_t cut_of(const PhiloxWords& words, int64_t n) {
    return (static_cast<int64_t>(words.v[0]) * n) >> 32;
  }

  Proposal draw(int64_t chain, int64_t item, int64_t n, Source source) const {
    const auto number = static_cast<uint32_t>(transition_number(item));
    const auto chain_word = static_cast<uint32_t>(chain);
    const PhiloxWords words = transition_words(chain, item);
    const int64_t cut = cut_of(words, n);
    const double log_u = std::log(uniform53(words.v[1], words.v[2]));
    int64_t divergence = cut;
    if (rules_.shared_prefix_skip) {
      const TokenRecord* records = scores(source);
      for (; divergence < n; ++divergence) {
        const PhiloxWords match = philox4x32(
            {{kMatchDraw, static_cast<uint32_t>(divergence), number, chain_word}}, *a_.seed);
        if (uniform53(match.v[0], match.v[1]) >= std::exp(records[divergence].log_q)) break;
      }
    }
    return {cut, divergence, log_u};
  }

  // Makes both copies of a lane the newest state, n tokens.
  void sync(int64_t lane, int64_t n, Source source) {
    Lane& me = a_.lanes[lane];
    LaneMove move = {source.lane, source.copy, std::min(me.agree, me.divergence), 0, 0};
    move.count = n - move.first;
    if (me.agree >= n) {
      // Its own current copy is: undo what was written.
      move = {lane, kCurrent, me.divergence, std::min(me.written, n) - me.divergence, 0};
    }
    move.both_from = move.first;
    if (move.count > 0) a_.moves[lane] = move;
    me.length = me.agree = n;
  }

  void record(int64_t lane, Source state, int64_t length, bool accepted, double log_r) const {
    const Lane& me = a_.lanes[lane];
    record_item(me.item, me.cut, length, accepted, log_r, state, me.written - me.divergence);
  }

  void record_item(int64_t item, int64_t cut, int64_t length, bool accepted, double log_r,
                   Source state, int64_t decoded) const {
    a_.trace[slot_ * a_.num_items + item] = {static_cast<double>(item / items_per_block()),
                                             static_cast<double>(cut),
                                             static_cast<double>(length),
                                             accepted ? 1.0 : 0.0,
                                             log_r,
                                             scores(state)[length - 1].log_prob_sum,
                                             static_cast<double>(decoded)};
  }

  int64_t items_per_block() const { return rules_.num_mcmc_steps + 1; }

  int64_t transition_number(int64_t item) const {
    const int64_t number = item % items_per_block();
    return number == 0 ? 0 : item / items_per_block() * rules_.num_mcmc_steps + number;
  }

  const LaneArrays& a_;
  const TransitionRules& rules_;
  const DrawnTokens& drawn_;
  const Members& members_;
  const int64_t slot_;
  std::vector<std::pair<int64_t, double>> rejected_;
  int64_t num_decoded_ = 0;
  bool is_bad_ = false;
};

// Does a lane's move to its tokens, scores and sums.
void move_lane(const LaneArrays& a, int64_t lane) {
  const LaneMove& move = a.moves[lane];
  if (move.count == 0) return;
  const auto row = [&](int64_t copy, int64_t of) { return copy * a.num_lanes + of; };
  const int64_t source = row(move.source_copy, move.source_lane);
  for (const int64_t copy : {kWorking, kCurrent}) {
    const int64_t target = row(copy, lane);
    if (target == source) continue;
    const int64_t first = copy == move.source_copy ? move.both_from : move.first;
    const int64_t count = move.first + move.count - first;
    if (count <= 0) continue;
    const int64_t to = target * a.max_length + first, from = source * a.max_length + first;
    std::memcpy(a.tokens + to, a.tokens + from, count * sizeof(*a.tokens));
    std::memcpy(a.scores + to, a.scores + from, count * sizeof(*a.scores));
    // One entry more a lane, and the sum behind each token.
    std::memcpy(a.w_sum + to + target + 1, a.w_sum + from + source + 1, count * sizeof(*a.w_sum));
  }
}

// What the model is fed next. A lane without an item repeats the prompt's last token.
void prepare_step(const LaneArrays& a, const TransitionRules& rules, int64_t lane) {
  const Lane& me = a.lanes[lane];
  const bool busy = me.is_busy();
  const int64_t cursor = busy ? me.cursor : 0;
  const int64_t* tokens = a.tokens + (kWorking * a.num_lanes + lane) * a.max_length;
  a.fed[lane] = cursor > 0 ? tokens[cursor - 1] : me.prompt_token;
  a.position[lane] = a.offset[lane] + cursor;
  a.ban[lane] = busy && cursor == me.divergence ? me.banned : -1;
  const int64_t block = me.item / (rules.num_mcmc_steps + 1);
  const int64_t number = me.item % (rules.num_mcmc_steps + 1);
  int64_t* counter = a.counters + 4 * lane;
  counter[0] = kTokenDraw;
  counter[1] = cursor;
  counter[2] = busy && number > 0 ? block * rules.num_mcmc_steps + number : 0;
  counter[3] = busy ? a.slots[me.slot].chain : 0;
}

}  // namespace

void lane_transition(const LaneArrays& arrays, const TransitionRules& rules,
                     const DrawnTokens& drawn, int num_threads) {
  // Below this many lanes a thread team costs more than it gives.
  constexpr int64_t kParallelThreshold = 256;
  constexpr int64_t kLanesPerTask = 64;
  if (arrays.num_lanes < kParallelThreshold) num_threads = 1;
  const int64_t num_tasks = (arrays.num_lanes + kLanesPerTask - 1) / kLanesPerTask;
  const auto for_each = [&](const auto& work) {
    parallel_for(num_tasks, num_threads, [&](int64_t task) {
      const int64_t last = std::min((task + 1) * kLanesPerTask, arrays.num_lanes);
      for (int64_t i = task * kLanesPerTask; i < last; ++i) work(i);
    });
  };
  const Members members(arrays);
  std::atomic<int64_t> num_decoded{0};
  std::atomic<bool> bad{false};
  std::fill(arrays.moves, arrays.moves + arrays.num_lanes, LaneMove{0, 0, 0, 0, 0});
  for_each([&](int64_t slot) {
    SlotTransition transition(arrays, rules, drawn, members, slot);
    transition.run();
    num_decoded += transition.num_decoded();
    if (transition.is_bad()) bad = true;
  });
  for_each([&](int64_t lane) { move_lane(arrays, lane); });
  for_each([&](int64_t lane) { prepare_step(arrays, rules, lane); });

  LaneTotals& totals = *arrays.totals;
  totals.num_decoded += num_decoded;
  if (bad) totals.bad = 1;
  totals.num_finished = totals.num_running = totals.num_busy = 0;
  for (int64_t i = 0; i < arrays.num_lanes; ++i) {
    totals.num_finished += arrays.slots[i].status == kFinished;
    totals.num_running += arrays.slots[i].status == kRunning;
    totals.num_busy += arrays.lanes[i].is_busy();
  }
  *arrays.go = totals.num_running > 0 && totals.num_finished == 0 && totals.bad == 0;
}

}  // namespace powerkernels
