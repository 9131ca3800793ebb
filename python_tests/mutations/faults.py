"""The faults: slips of one token or one line, each in a place of its own.

`old` is there exactly once, so that a fault that no longer fits its file is an error and not a
fault that nobody tries. Its tests are those of the code that it is in, in all their cases that are
not slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Fault:
    name: str
    family: str  # of the kernels, or the part of the package
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # files, folders or tests; what is slow of them is left out
    may_hang: bool = False  # whether tests that never end have caught it

    @property
    def is_compiled(self) -> bool:
        return self.file.startswith("csrc/")

    def applied_to(self, text: str) -> str:
        """The file's text with the fault. Raises ValueError where it does not fit."""
        if self.old == self.new:
            raise ValueError(f"{self.name}: it changes nothing")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: what it changes is in {self.file} {count} times, not 1")
        return text.replace(self.old, self.new)


# Short names for what is used below.
POWER = "powerkernels/power_sampling"
LOGPROB = "powerkernels/logprob"
COVARIANCE = "powerkernels/covariance"
LOSS = "powerkernels/policy_loss"
LINEAR = "powerkernels/linear_logprob"
SHARDING = "powerkernels/integrations/sharding.py"
CPU = "csrc/cpu"


def tests_of(folder: str, file: str, *names: str) -> tuple[str, ...]:
    """All of a file, or some of its tests."""
    path = str(PurePosixPath("python_tests", folder, f"{file}.py"))
    return tuple(f"{path}::{name}" for name in names) or (path,)


LAW = tests_of("power_sampling", "test_law", "test_chain_has_its_exact_law_at_every_length")
PURE_PATHS = tests_of(
    "power_sampling", "test_paths", "test_lanes_make_the_chain_of_the_pure_functions"
)
PREFETCHED_PATHS = tests_of(
    "power_sampling", "test_paths", "test_prefetching_leaves_the_chain_as_it_is"
)
COMPILED_TRANSITION = tests_of(
    "power_sampling", "test_transition", "test_compiled", "test_compiled_long_histories"
)
KERNEL_TRANSITION = tests_of("power_sampling", "test_transition", "test_kernels")
LOOP = tests_of("power_sampling", "test_graph_loop")
PACKED = tests_of("power_sampling", "test_packed_linear", "test_against_float64")
PHILOX = tests_of("philox", "test_philox")
MOVES = tests_of("lane_moves", "test_move_positions", "test_random_moves", "test_long_moves")
MOVE_KERNEL = tests_of(
    "lane_moves",
    "test_move_positions",
    "test_random_moves_in_the_kernel",
    "test_long_moves_in_the_kernel",
)
ATTENTION = tests_of("decode_attention", "test_decode_attention", "test_against_float64")
ATTENTION_KERNELS = tests_of("decode_attention", "test_kernels", "test_against_float64")
SCORES = tests_of("logprob", "test_score_tokens", "test_scores_are_the_truth")
SCORE_GRADIENTS = tests_of(
    "logprob", "test_score_tokens", "test_gradients_are_the_truth", "test_gradient_of_each_score"
)
SOFTCAP_GRADIENTS = tests_of("logprob", "test_score_tokens", "test_gradient_under_a_softcap")
SCORE_KERNELS = tests_of("logprob", "test_kernels", "test_small_vocabularies")
DRAWS = tests_of(
    "logprob",
    "test_sample_tokens",
    "test_law_across_slices",
    "test_every_backend_draws_the_tokens_of_the_reference",
)
INVERSE_CDF = tests_of(
    "logprob", "test_sample_tokens", "test_inverse_cdf_never_returns_what_has_no_mass"
)
DRAW_KERNELS = tests_of("logprob", "test_kernels", "test_draws_the_tokens_of_the_reference")
SUPPORT = tests_of("logprob", "test_support", "test_the_support")
SUPPORT_KERNELS = tests_of("logprob", "test_support", "test_the_support_by_the_kernels")
LIKELIHOOD = tests_of("logprob", "test_sequence_log_likelihood")
SPLIT_VOCABULARY = tests_of(
    "logprob", "test_vocab_parallel", "test_a_split_vocabulary_is_the_whole"
)
LINEARS = tests_of("linear_logprob", "test_linear_score_tokens")
LINEAR_KERNELS = tests_of("linear_logprob", "test_kernels", "test_fused_scores_are_the_truth")
MOMENTS = tests_of("covariance", "test_token_covariance", "test_covariance_is_its_definition")
TOP = tests_of("covariance", "test_selection", "test_top_is_that_of_a_sort")
EXCLUDED = tests_of("covariance", "test_selection", "test_excluded_tokens_count_and_are_not_taken")
BAND = tests_of("covariance", "test_selection", "test_band_has_the_largest_numbers")
BAND_BOUNDS = tests_of("covariance", "test_selection", "test_bounds_are_exclusive")
PADDING = tests_of("covariance", "test_selection", "test_padding_changes_nothing")
ACCUMULATOR = tests_of(
    "covariance",
    "test_accumulator",
    "test_micro_batches_are_as_the_truth",
    "test_one_token_of_8192_is_one_in_eight_micro_batches_too",
)
TOP_KERNELS = tests_of("covariance", "test_kernels", "test_top")
BAND_BOUNDS_KERNELS = tests_of("covariance", "test_kernels", "test_bounds_are_exclusive")
LAYOUT_KERNELS = tests_of("covariance", "test_kernels", "test_layouts")
RANKS = tests_of("covariance", "test_ranks")
LOSSES = tests_of("policy_loss", "test_policy_loss", "test_loss_is_that_of_the_textbook")
LOSS_MODES = tests_of("policy_loss", "test_policy_loss", "test_modes")
LOSS_KERNELS = tests_of("policy_loss", "test_kernels", "test_loss")
PACKED_LOSS_KERNELS = tests_of("policy_loss", "test_kernels", "test_packed_is_as_padded")
LAUNCHES = tests_of("launch_path", "test_launch_path", "test_calls")
JOBS = tests_of("integrations", "test_sharding", "test_ranks_draw_what_one_call_draws")
JOB_PROGRESS = tests_of("integrations", "test_sharding", "test_progress_of_a_resumed_job")
JOB_FILES = tests_of("integrations", "test_sharding", "test_a_write_that_fails_leaves_nothing")
RECORDS = tests_of(".", "test_cli", "test_plain_records_say_null_and_not_nan")
LINES = tests_of(".", "test_cli", "test_json_lines")

SAMPLING_FAULTS = (
    Fault(
        "length-term-pure",
        "transition",
        "the pure transition's acceptance ratio lacks the two cut probabilities",
        f"{POWER}/metropolis_hastings.py",
        "(proposed.w_cumsum[-1] - state.w_cumsum[-1]) + math.log(n) - math.log(length)",
        "proposed.w_cumsum[-1] - state.w_cumsum[-1]",
        PURE_PATHS,
    ),
    Fault(
        "length-term-reference",
        "transition",
        "the lanes' acceptance ratio lacks the cut's probability of the way back",
        f"{POWER}/reference.py",
        "ratio = (ratio + self.log_int[n]) - self.log_int[length]",
        "ratio = ratio + self.log_int[n]",
        COMPILED_TRANSITION,
    ),
    Fault(
        "length-term-cpp",
        "transition",
        "the compiled acceptance ratio lacks the cut's probability of the way back",
        f"{CPU}/lane_transition.cpp",
        "ratio = (ratio + a_.log_int[n]) - a_.log_int[length];",
        "ratio = ratio + a_.log_int[n];",
        LAW,
    ),
    Fault(
        "length-term-triton",
        "transition",
        "the kernel's acceptance ratio has the length term where it is switched off",
        f"{POWER}/kernels.py",
        "        if LENGTH_TERM:\n            log_n =",
        "        if TRUNCATED_SUM:\n            log_n =",
        KERNEL_TRANSITION,
    ),
    Fault(
        "cut-sums-swapped",
        "transition",
        "the forward and the backward probability of the cut are exchanged",
        f"{CPU}/lane_transition.cpp",
        "ratio = (ratio + a_.log_int[n]) - a_.log_int[length];",
        "ratio = (ratio + a_.log_int[length]) - a_.log_int[n];",
        LAW,
    ),
    Fault(
        "growth-capped",
        "transition",
        "a proposal may not grow past the length of what it is compared with",
        f"{POWER}/reference.py",
        "            if rules.growth_cap:\n                limit = n",
        "            if rules.growth_cap or number > 0:\n                limit = n",
        COMPILED_TRANSITION,
    ),
    Fault(
        "growth-capped-cpp",
        "transition",
        "the same in the compiled transition",
        f"{CPU}/lane_transition.cpp",
        "      if (rules_.growth_cap) {",
        "      if (rules_.growth_cap || !extends) {",
        LAW,
    ),
    Fault(
        "early-rejection-off-by-one",
        "transition",
        "the bound of the acceptance ratio takes one token less than there is",
        f"{POWER}/reference.py",
        "return self._ratio(lane, length, int(self.lanes[lane, LENGTH]))",
        "return self._ratio(lane, length - 1, int(self.lanes[lane, LENGTH]))",
        COMPILED_TRANSITION,
    ),
    Fault(
        "early-rejection-against-nothing",
        "transition",
        "a proposal is ended early by comparing its ratio with its own sum",
        f"{POWER}/kernels.py",
        "through = through | (proposes & (log_r <= log_u))",
        "through = through | (proposes & (w_sum <= log_u))",
        KERNEL_TRANSITION,
    ),
    Fault(
        "skip-from-unrestricted-q",
        "transition",
        "the first token behind a shared prefix may be the one that was found to differ",
        f"{POWER}/reference.py",
        "me[BANNED] if busy and cursor == me[DIVERGENCE] else -1",
        "me[BANNED] if busy and cursor < me[DIVERGENCE] else -1",
        COMPILED_TRANSITION,
    ),
    Fault(
        "skip-from-unrestricted-q-cpp",
        "transition",
        "the same in the compiled transition",
        f"{CPU}/lane_transition.cpp",
        "a.ban[lane] = busy && cursor == me.divergence ? me.banned : -1;",
        "a.ban[lane] = busy && cursor == me.cut ? me.banned : -1;",
        LAW,
    ),
    Fault(
        "prefetched-item-handed-out-twice",
        "transition",
        "after an acceptance the next item is the accepted one once more",
        f"{POWER}/kernels.py",
        "next_item = first_free(won_item + 1, goes_on, item)",
        "next_item = first_free(won_item, goes_on, item)",
        KERNEL_TRANSITION,
    ),
    Fault(
        "prefetch-held-too-far",
        "transition",
        "one proposal made ahead too many goes on after an acceptance",
        f"{POWER}/reference.py",
        "if other[ITEM] <= last and self._is_the_same_from",
        "if other[ITEM] <= last + 1 and self._is_the_same_from",
        COMPILED_TRANSITION,
    ),
    Fault(
        "prefetched-tokens-counted",
        "engine",
        "tokens that were made ahead and dropped count for the chain",
        f"{POWER}/engine.py",
        "done = torch.arange(items.shape[1]) < ends[:, None]",
        "done = torch.arange(items.shape[1]) < ends[:, None] - 1",
        PREFETCHED_PATHS,
    ),
    Fault(
        "no-refill",
        "engine",
        "lanes whose chain has finished get no other one",
        f"{POWER}/engine.py",
        "self._idle.extend(lane_state.release_slots(state, slots))",
        "lane_state.release_slots(state, slots)",
        PREFETCHED_PATHS,
    ),
    Fault(
        "go-while-finished",
        "transition",
        "the loop does not stop for a chain that has finished",
        f"{POWER}/kernels.py",
        "tl.store(go_ptr, ((running > 0) & (finished == 0) & is_good).to(tl.int32))",
        "tl.store(go_ptr, ((running > 0) & is_good).to(tl.int32))",
        KERNEL_TRANSITION,
    ),
    Fault(
        "transition-words-swapped",
        "transition",
        "position and transition are exchanged in the counter of the cut and of log u",
        f"{CPU}/lane_transition.cpp",
        "philox4x32({{kTransitionDraw, 0, number, ",
        "philox4x32({{kTransitionDraw, number, 0, ",
        COMPILED_TRANSITION,
    ),
    Fault(
        "loop-looks-too-late",
        "graph loop",
        "the host's loop makes one tick more than its limit",
        f"{POWER}/graph_loop.py",
        "if self._ticks == limit or self._stop.is_set():",
        "if self._ticks > limit or self._stop.is_set():",
        LOOP,
    ),
    Fault(
        "loop-ignores-the-flag",
        "graph loop",
        "the host's loop goes on while its flag is positive, and not while it is not 0",
        f"{POWER}/graph_loop.py",
        "not self._stop.is_set() and bool(self._flag.item()):",
        "not self._stop.is_set() and self._flag.item() > 0:",
        LOOP,
    ),
    Fault(
        "loop-on-any-device",
        "graph loop",
        "a flag in host memory is taken by the loop on the device",
        f"{POWER}/graph_loop.py",
        'if flag.device.type != "cuda":',
        'if flag.device.type == "meta":',
        LOOP,
    ),
    Fault(
        "loop-flag-of-any-size",
        "graph loop",
        "the flag's shape is not looked at",
        f"{POWER}/graph_loop.py",
        'check_shape("flag", flag, (1,))',
        'check_shape("flag", flag, flag.shape)',
        LOOP,
    ),
    Fault(
        "philox-words-swapped",
        "philox",
        "two words of the state change places in a round",
        "powerkernels/philox/reference.py",
        "high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0",
        "high1 ^ c1 ^ key0, low0, high0 ^ c3 ^ key1, low1",
        PHILOX,
    ),
    Fault(
        "philox-counter-swapped",
        "philox",
        "sequence and position are exchanged in the counters of the band",
        f"{CPU}/covariance.cpp",
        "kernels_.philox(position_, number_low_, number_high_,",
        "kernels_.philox(number_low_, position_, number_high_,",
        BAND,
    ),
    Fault(
        "packed-linear-depth",
        "packed linear",
        "the last element of a row takes no part in the product",
        f"{CPU}/linear_panels.cpp",
        "for (int64_t k = 0; k < task.depth; ++k) {",
        "for (int64_t k = 0; k + 1 < task.depth; ++k) {",
        PACKED,
    ),
    Fault(
        "moved-range-off-by-one",
        "lane moves",
        "the last position of a range is not moved",
        f"{CPU}/lane_moves.cpp",
        "const int64_t bytes = move.count * cache.row_bytes;",
        "const int64_t bytes = (move.count - 1) * cache.row_bytes;",
        MOVES,
    ),
    Fault(
        "moved-runs-rounded-down",
        "lane moves",
        "what is left behind the last whole run is not moved",
        "powerkernels/lane_moves/kernels.py",
        "(tl.maximum(counts, 0).to(tl.int32) + run - 1) // run",
        "tl.maximum(counts, 0).to(tl.int32) // run",
        MOVE_KERNEL,
    ),
    Fault(
        "moved-over-what-is-kept",
        "lane moves",
        "the copy of the source's name is overwritten one word too early",
        "powerkernels/lane_moves/kernels.py",
        "mask=kept & (at >= same_from)",
        "mask=kept & (at >= same_from - 1)",
        MOVE_KERNEL,
    ),
    Fault(
        "attended-position-too-many",
        "decode attention",
        "the position behind a lane's last one is attended to",
        "powerkernels/decode_attention/kernels.py",
        "kept = (position >= start) & (position < length)",
        "kept = (position >= start) & (position <= length)",
        ATTENTION_KERNELS,
    ),
    Fault(
        "attended-position-too-few",
        "decode attention",
        "the compiled attention leaves out the last position of a chunk",
        f"{CPU}/attend.cpp",
        "const int count = static_cast<int>(end - first);",
        "const int count = static_cast<int>(end - first - (end == head.length));",
        ATTENTION,
    ),
    Fault(
        "window-off-by-one",
        "decode attention",
        "a window is one position shorter",
        "powerkernels/decode_attention/kernels.py",
        "return tl.maximum(length - window, 0), length",
        "return tl.maximum(length - window + 1, 0), length",
        ATTENTION_KERNELS,
    ),
    Fault(
        "empty-grid",
        "launch path",
        "attention without lanes is launched on an empty grid, which CUDA refuses",
        "powerkernels/decode_attention/gpu.py",
        "if output.numel() == 0:",
        "if num_positions == 0:",
        LAUNCHES,
    ),
)

SCORE_FAULTS = (
    Fault(
        "no-minus-p",
        "score_tokens",
        "the compiled gradient of log_prob is the one-hot vector without -p",
        f"{CPU}/score_tokens_bwd.cpp",
        "  g.constant -= g.one_hot;\n",
        "",
        SCORE_GRADIENTS,
    ),
    Fault(
        "no-minus-p-triton",
        "score_tokens",
        "the same in the kernel",
        f"{LOGPROB}/kernels.py",
        "constant = over_sum * (grad_entropy * surprise - grad_log_prob - alpha * grad_log_z)",
        "constant = over_sum * (grad_entropy * surprise - alpha * grad_log_z)",
        SCORE_KERNELS,
    ),
    Fault(
        "no-entropy-gradient",
        "score_tokens",
        "the compiled gradient of the entropy lacks the term with log p",
        f"{CPU}/score_tokens_bwd.cpp",
        "g.slope = -in.entropy * std::exp(-log_sum);",
        "g.slope = 0.0;",
        SCORE_GRADIENTS,
    ),
    Fault(
        "entropy-gradient-in-the-wrong-unit",
        "score_tokens",
        "the kernel's gradient of the entropy takes a log2 for a log",
        f"{LOGPROB}/kernels.py",
        "slope = over_sum * grad_entropy * -LN_2",
        "slope = -over_sum * grad_entropy",
        SCORE_KERNELS,
    ),
    Fault(
        "no-alpha",
        "score_tokens",
        "the compiled gradient of log_z lacks the factor alpha",
        f"{CPU}/score_tokens_bwd.cpp",
        "log_z_is_constant ? 0.0 : params.alpha * in.log_z;",
        "log_z_is_constant ? 0.0 : in.log_z;",
        SCORE_GRADIENTS,
    ),
    Fault(
        "no-alpha-triton",
        "score_tokens",
        "the kernel's gradient of log_z lacks the factor alpha in one of its two terms",
        f"{LOGPROB}/kernels.py",
        "of_power = over_temperature * alpha * grad_log_z",
        "of_power = over_temperature * grad_log_z",
        SCORE_KERNELS,
    ),
    Fault(
        "vocabulary-tail",
        "score_tokens",
        "a place behind the last logit of a slice counts",
        f"{CPU}/vocab_slice.cpp",
        "for (int i = n; i < padded; ++i) buffer[i] = -kInfinity;",
        "for (int i = n + 1; i < padded; ++i) buffer[i] = -kInfinity;",
        SCORES,
    ),
    Fault(
        "vocabulary-tail-bwd",
        "score_tokens",
        "the gradient of what is behind the last whole step is left out",
        f"{CPU}/vocab_slice_bwd.cpp",
        "const int64_t rest = n % kStep * kSize;",
        "const int64_t rest = n % F32::kWidth * kSize;",
        SCORE_GRADIENTS,
    ),
    Fault(
        "vocabulary-tail-triton",
        "score_tokens",
        "a logit behind the row's end counts",
        f"{LOGPROB}/kernels.py",
        "mask=even < left, other=-INFINITY",
        "mask=even <= left, other=-INFINITY",
        SCORE_KERNELS,
    ),
    Fault(
        "tail-counted-twice",
        "score_tokens",
        "the row's end is summed by the part before its own too",
        f"{LOGPROB}/kernels.py",
        "(tail < first + SLICES):",
        "(tail <= first + SLICES):",
        SCORE_KERNELS,
    ),
    Fault(
        "softcap-derivative",
        "score_tokens",
        "the derivative of the softcap lacks a square",
        f"{LOGPROB}/reference.py",
        "dz = dz * (1 - (z / softcap) ** 2)",
        "dz = dz * (1 - z / softcap)",
        SOFTCAP_GRADIENTS,
    ),
    Fault(
        "slice-and-token-by-one-number",
        "sample_tokens",
        "the token in a slice is drawn by the uniform that has picked the slice",
        f"{CPU}/sample_tokens.cpp",
        "uniform53(words.v[2], words.v[3]),",
        "uniform53(words.v[0], words.v[1]),",
        DRAWS,
    ),
    Fault(
        "last-slice-never-drawn",
        "sample_tokens",
        "the kernel's inverse CDF leaves out the last slice",
        f"{LOGPROB}/kernels.py",
        "    kept = index < num_slices\n",
        "    kept = index < num_slices - 1\n",
        DRAW_KERNELS,
    ),
    Fault(
        "drawn-without-mass",
        "sample_tokens",
        "an entry without mass is drawn where the uniform is 0",
        f"{LOGPROB}/reference.py",
        "first = (cumulative <= (u * cumulative[:, -1]).unsqueeze(-1)).sum(-1)",
        "first = (cumulative < (u * cumulative[:, -1]).unsqueeze(-1)).sum(-1)",
        INVERSE_CDF,
    ),
    Fault(
        "banned-at-another-place",
        "sample_tokens",
        "what is left of the banned token's slice is put in the slice before it",
        f"{CPU}/sample_tokens.cpp",
        "const bool is_rest = i == banned_slice;",
        "const bool is_rest = i + 1 == banned_slice;",
        DRAWS,
    ),
    Fault(
        "one-too-many-of-top-k",
        "sample_tokens",
        "the kernel's top_k keeps one logit more",
        f"{LOGPROB}/gpu.py",
        "min(support.top_k, vocab),",
        "min(support.top_k + 1, vocab),",
        SUPPORT_KERNELS,
    ),
    Fault(
        "one-too-few-of-top-k",
        "sample_tokens",
        "the compiled top_k keeps one logit less where there are many",
        f"{CPU}/support.cpp",
        "const auto place = entries.begin() + (k - 1);",
        "const auto place = entries.begin() + std::max<int64_t>(k - 2, 0);",
        SUPPORT,
    ),
    Fault(
        "length-of-a-packed-sequence",
        "sequence_log_likelihood",
        "a token at a bound belongs to the sequence before it",
        f"{LOGPROB}/reference.py",
        "torch.searchsorted(cu_seqlens[1:].long(), position, right=True)",
        "torch.searchsorted(cu_seqlens[1:].long(), position)",
        LIKELIHOOD,
    ),
    Fault(
        "target-in-the-next-tile",
        "linear_score_tokens",
        "the target at the begin of a tile is looked for in the tile before it",
        f"{LINEAR}/kernels.py",
        "here = (of_target >= entry) &",
        "here = (of_target > entry) &",
        LINEAR_KERNELS,
    ),
    Fault(
        "tile-behind-the-vocabulary",
        "linear_score_tokens",
        "a column behind the vocabulary counts",
        f"{LINEAR}/kernels.py",
        "tl.where((entries < vocab)[None, :], logits, -INFINITY)",
        "tl.where((entries <= vocab)[None, :], logits, -INFINITY)",
        LINEAR_KERNELS,
    ),
    Fault(
        "gradients-of-log-prob-alone",
        "linear_score_tokens",
        "rows that have a gradient of log_z or entropy alone are left out",
        f"{LINEAR}/functional.py",
        "    for grad in incoming:\n",
        "    for grad in incoming[:1]:\n",
        LINEARS,
    ),
    Fault(
        "chunk-off-by-one",
        "linear_score_tokens",
        "the gradient of the hidden states takes the weights of one row further on",
        f"{LINEAR}/functional.py",
        "of_chunks = vocab_parallel.shifted(targets, ignore_index, starts)",
        "of_chunks = vocab_parallel.shifted(targets, ignore_index, starts + (starts > 0))",
        LINEARS,
    ),
    Fault(
        "rank-missing-in-the-gradient",
        "ranks",
        "the gradient of the hidden states is that of one rank's part of the vocabulary",
        f"{LINEAR}/functional.py",
        "            _process_group.all_reduce(hidden_sums, group)",
        "            _process_group.all_reduce(hidden_sums.clone(), group)",
        SPLIT_VOCABULARY,
    ),
    Fault(
        "rank-missing-in-the-sum",
        "ranks",
        "the first rank's part of the vocabulary is not in the normaliser",
        f"{LOGPROB}/reference.py",
        "total = (factor * shard_sum).sum(0)",
        "total = (factor * shard_sum)[-2:].sum(0)",
        SPLIT_VOCABULARY,
    ),
    Fault(
        "ranks-ties",
        "ranks",
        "a rank's own ties count for those of the ranks before it",
        f"{COVARIANCE}/functional.py",
        "before = ranks[: _process_group.group_named(group).rank()].sum(0)",
        "before = ranks[: _process_group.group_named(group).rank() + 1].sum(0)",
        RANKS,
    ),
)

COVARIANCE_FAULTS = (
    Fault(
        "selection-of-each-micro-batch",
        "covariance",
        "each micro-batch selects its own tokens",
        f"{COVARIANCE}/accumulator.py",
        "            self._selection = select(self._parts, self._rule, seed, self._group)\n",
        "            own = [select([p], self._rule, seed, self._group) for p in self._parts]\n"
        "            self._selection = own[0]._replace(masks=[one.masks[0] for one in own])\n",
        ACCUMULATOR,
    ),
    Fault(
        "threshold-of-the-first-micro-batch",
        "covariance",
        "the threshold is found in the first micro-batch's histogram",
        f"{COVARIANCE}/functional.py",
        "        total = _added(own)\n        if group:",
        "        total = own[0]\n        if group:",
        ACCUMULATOR,
    ),
    Fault(
        "last-tie-first",
        "covariance",
        "of equal covariances the last is taken first",
        f"{COVARIANCE}/reference.py",
        "place = tied.cumsum(0) - 1",
        "place = tied.flip(0).cumsum(0).flip(0) - 1",
        TOP,
    ),
    Fault(
        "own-ties-before",
        "covariance",
        "a program counts its own ties among those before it",
        f"{COVARIANCE}/kernels.py",
        "mask=program < pid, other=0)",
        "mask=program <= pid, other=0)",
        TOP_KERNELS,
    ),
    Fault(
        "ties-off-by-one",
        "covariance",
        "one tie too many is taken",
        f"{CPU}/covariance.cpp",
        "x.key == threshold && left > 0",
        "x.key == threshold && left >= 0",
        TOP,
    ),
    Fault(
        "k-off-by-one",
        "covariance",
        "one token more than k is selected",
        f"{CPU}/covariance.cpp",
        "std::min(static_cast<int64_t>(wanted), total)",
        "std::min(static_cast<int64_t>(wanted) + 1, total)",
        TOP,
    ),
    Fault(
        "share-rounded-up",
        "covariance",
        "a share of the tokens is rounded up",
        f"{COVARIANCE}/kernels.py",
        "share = tl.maximum(tl.floor(count * wanted), 1.0)",
        "share = tl.maximum(tl.ceil(count * wanted), 1.0)",
        TOP_KERNELS,
    ),
    Fault(
        "band-with-its-lower-bound",
        "covariance",
        "a covariance that is the lower bound is in the band",
        f"{CPU}/token_block.cpp",
        "(cov[i] > lb)",
        "(cov[i] >= lb)",
        BAND_BOUNDS,
    ),
    Fault(
        "band-with-its-upper-bound",
        "covariance",
        "a covariance that is the upper bound is in the kernel's band",
        f"{COVARIANCE}/kernels.py",
        "kept = kept & (cov > lb) & (cov < ub)",
        "kept = kept & (cov > lb) & (cov <= ub)",
        BAND_BOUNDS_KERNELS,
    ),
    Fault(
        "mean-over-all-tokens",
        "covariance",
        "the means are over all tokens, and not over those of the mask",
        f"{COVARIANCE}/reference.py",
        "count = tokens.mask.sum(dtype=torch.float64)",
        "count = torch.ones_like(tokens.mask).sum(dtype=torch.float64)",
        MOMENTS,
    ),
    Fault(
        "sum-over-all-tokens",
        "covariance",
        "the compiled sums take masked-out tokens too",
        f"{CPU}/token_block.cpp",
        "const L8 kept = mask & is_finite(l) & is_finite(a);",
        "const L8 kept = is_finite(l) & is_finite(a);",
        MOMENTS,
    ),
    Fault(
        "masks-swapped",
        "covariance",
        "what counts and what may be selected change places",
        f"{COVARIANCE}/tokens.py",
        "        layout(kept, cu_seqlens),\n        layout(selectable, cu_seqlens),\n",
        "        layout(selectable, cu_seqlens),\n        layout(kept, cu_seqlens),\n",
        EXCLUDED,
    ),
    Fault(
        "place-in-the-batch",
        "covariance",
        "a token's random number is that of its place in the batch, and not in its sequence",
        f"{CPU}/covariance.cpp",
        "static_cast<uint32_t>(token - row_begin_)",
        "static_cast<uint32_t>(token)",
        PADDING,
    ),
    Fault(
        "packed-bounds-off-by-one",
        "covariance",
        "a token at a bound belongs to the sequence before it",
        f"{COVARIANCE}/kernels.py",
        "other=0) > index",
        "other=0) >= index",
        LAYOUT_KERNELS,
    ),
)

LOSS_FAULTS = (
    Fault(
        "clip-sides-swapped",
        "policy loss",
        "the ratio's two bounds are exchanged",
        f"{LOSS}/kernels.py",
        "clamp(ratio, low, high)",
        "clamp(ratio, high, low)",
        LOSS_KERNELS,
    ),
    Fault(
        "clip-against-the-advantage",
        "policy loss",
        "the smaller of the two losses is taken, as if the advantage had the other sign",
        f"{LOSS}/reference.py",
        "torch.maximum(unclipped, bounded)",
        "torch.minimum(unclipped, bounded)",
        LOSSES,
    ),
    Fault(
        "clipped-gradient",
        "policy loss",
        "tokens that are clipped keep their gradient",
        f"{CPU}/token_block.cpp",
        "term = ppo.choose(zero, term);",
        "term = ppo.choose(term, term);",
        LOSSES,
    ),
    Fault(
        "dual-clip-at-any-advantage",
        "policy loss",
        "the dual clip holds at positive advantages too",
        f"{LOSS}/kernels.py",
        "dual_clipped = (advantage < 0.0) & (loss > most)",
        "dual_clipped = (advantage != 0.0) & (loss > most)",
        LOSS_KERNELS,
    ),
    Fault(
        "penalty-sign",
        "policy loss",
        "the gradient of KL-Cov's penalty has the other sign",
        f"{CPU}/token_block.cpp",
        "term + penalty * sign(r.difference)",
        "term - penalty * sign(r.difference)",
        LOSSES,
    ),
    Fault(
        "penalty-without-coefficient",
        "policy loss",
        "KL-Cov's penalty is not times its coefficient",
        f"{LOSS}/kernels.py",
        "loss + tl.abs(difference) * penalty",
        "loss + tl.abs(difference)",
        LOSS_KERNELS,
    ),
    Fault(
        "empty-sequences-counted",
        "policy loss",
        "sequences without a token are in the denominator",
        f"{LOSS}/aggregate.py",
        "found = (row_count > 0).sum().double()",
        "found = (row_count >= 0).sum().double()",
        LOSS_MODES,
    ),
    Fault(
        "token-mean-of-sequences",
        "policy loss",
        "the mean over tokens divides by the number of sequences",
        f"{LOSS}/aggregate.py",
        'count = _or("batch_num_tokens", tokens, row_count.sum())',
        'count = _or("batch_num_tokens", tokens, (row_count > 0).sum().double())',
        LOSS_MODES,
    ),
    Fault(
        "packed-sequence-too-short",
        "policy loss",
        "the last token of a packed sequence is left out",
        f"{LOSS}/kernels.py",
        "row_end = tl.load(bounds_ptr + row + 1)",
        "row_end = tl.load(bounds_ptr + row + 1) - 1",
        PACKED_LOSS_KERNELS,
    ),
)

JOB_FAULTS = (
    Fault(
        "resumed-part-counted-twice",
        "jobs",
        "parts that were there before the run count twice in what is done",
        SHARDING,
        "        done = self.num_parts - len(self.missing_parts())\n",
        "        done = num_done_before + self.num_parts - len(self.missing_parts())\n",
        JOB_PROGRESS,
    ),
    Fault(
        "equal-prompts-draw-the-same",
        "jobs",
        "rows with equal prompts draw some samples twice",
        SHARDING,
        "first_sample=[row.repeat * num_samples for row, _ in good],",
        "first_sample=[row.repeat for row, _ in good],",
        JOBS,
    ),
    Fault(
        "last-row-of-a-part",
        "jobs",
        "the last part is one row short",
        SHARDING,
        "return first, min(first + self.rows_per_part, self.prompts.num_rows)",
        "return first, min(first + self.rows_per_part, self.prompts.num_rows - 1)",
        JOBS,
    ),
    Fault(
        "part-of-a-dead-worker",
        "jobs",
        "a file that a worker has not finished counts as its part",
        SHARDING,
        'unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")',
        "unfinished = path",
        JOB_FILES,
    ),
    Fault(
        "nan-in-a-record",
        "records",
        "a number that is not finite is written as it is",
        "powerkernels/records.py",
        "return value if math.isfinite(value) else None",
        "return value",
        RECORDS,
    ),
    Fault(
        "prompt-of-another-sample",
        "cli",
        "a line of JSON has the prompt of another row",
        "powerkernels/cli.py",
        "prompts[sample.prompt_index], arguments, model)",
        "prompts[sample.sample_index], arguments, model)",
        LINES,
    ),
)

FAULTS = (*SAMPLING_FAULTS, *SCORE_FAULTS, *COVARIANCE_FAULTS, *LOSS_FAULTS, *JOB_FAULTS)
