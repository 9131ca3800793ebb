"""The Triton kernels of the scores: on a GPU, or interpreted, where sizes are kept small."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from powerkernels import sample_tokens, score_tokens
from powerkernels._cuda_graph import waits_are_errors
from powerkernels.logprob import gpu, reference, vocab_parallel
from powerkernels.logprob.functional import implementation
from powerkernels.logprob.options import ScoreOptions
from python_tests import tiers, triton_device
from python_tests.logprob import expected
from python_tests.logprob.expected import (
    assert_close_to_truth,
    assert_gradient_close,
    far_apart,
    float32_expression,
    gradient,
    random_logits,
    random_weights,
    true_gradient,
    truth,
)

# numpy's word for a row of NaN.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALPHAS = (0.5, 1.0, 2.0, 2.5, 4.0, 7.3)


@pytest.fixture(autouse=True)
def allow_for_truncation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts a float32 to bfloat16 where a GPU rounds."""
    if triton_device.INTERPRETED:
        monkeypatch.setitem(expected.GRADIENT_FLOOR, torch.bfloat16, 2**-7)


def check(
    device: str, logits: Tensor, targets: Tensor, weights: list[Tensor], **options: float
) -> None:
    """Values and gradients against float64."""
    alpha = options["alpha"]
    z = logits.to(device).requires_grad_()
    got = score_tokens(z, targets.to(device), entropy=True, **options)
    exact = truth(logits, targets, **options)
    expression = float32_expression(
        logits, targets.clamp(min=0), alpha, options.get("temperature", 1.0)
    )
    for name, value, *exact_and_peer in zip(got._fields, got, exact, expression, strict=True):
        assert_close_to_truth(value.detach().cpu(), *exact_and_peer, f"{name} {options}")
    found = gradient(got, [weight.to(device) for weight in weights], z).cpu()
    assert_gradient_close(
        found, *true_gradient(logits, targets, weights, **options), f"{options}", alpha
    )


SMALL = [
    *((vocab, alpha) for vocab in (1, 2, 127, 1024) for alpha in (0.0, 2.5, 4.0)),
    *((1025, alpha) for alpha in (0.0, *ALPHAS, 8.5, 1e-3)),
    *((2500, alpha) for alpha in (0.5, 4.0, 7.3)),
]


@pytest.mark.parametrize(("vocab", "alpha"), tiers.every(2, SMALL, of_several=True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_vocabularies(kernel_device, dtype, vocab, alpha, generator):
    logits = random_logits((3, vocab), dtype, generator)
    targets = torch.randint(vocab, (3,), generator=generator)
    check(kernel_device, logits, targets, random_weights(targets, generator), alpha=alpha)


@pytest.mark.parametrize(
    ("vocab", "dtype", "alpha"),
    [
        *((50257, torch.bfloat16, alpha) for alpha in ALPHAS),
        (50257, torch.float32, 2.5),
        (50257, torch.float16, 7.3),
        (151937, torch.bfloat16, 4.0),
        (151937, torch.float32, 7.3),
        (151937, torch.float16, 0.5),
    ],
)
def test_real_vocabularies(kernel_device, vocab, dtype, alpha, generator):
    logits = random_logits((1, vocab), dtype, generator)
    targets = torch.tensor([vocab - 1])
    logits[0, -1] = 2.0
    weights = [torch.randn(1, generator=generator) for _ in range(3)]
    check(kernel_device, logits, targets, weights, alpha=alpha, temperature=0.8)


@pytest.mark.parametrize("cap", [0.5, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(kernel_device, dtype, cap, generator):
    logits = random_logits((3, 1300), dtype, generator) * 3
    logits[0, 7] = 0.0
    targets = torch.randint(1300, (3,), generator=generator)
    weights = random_weights(targets, generator)
    z = logits.to(kernel_device).requires_grad_()
    got = score_tokens(z, targets.to(kernel_device), alpha=2, entropy=True, softcap=cap)
    y = logits.float().requires_grad_()
    capped = torch.where(y == -torch.inf, y, cap * torch.tanh(y / cap))
    expression = float32_expression(capped, targets, 2, 1.0)
    exact = truth(logits, targets, alpha=2, softcap=cap)
    for name, value, *exact_and_peer in zip(got._fields, got, exact, expression, strict=True):
        assert_close_to_truth(
            value.detach().cpu(), exact_and_peer[0], exact_and_peer[1].detach(), name
        )
    x = logits.double().requires_grad_()
    assert_gradient_close(
        gradient(got, [weight.to(kernel_device) for weight in weights], z).cpu(),
        gradient(truth(x, targets, alpha=2, softcap=cap), weights, x),
        gradient(expression, weights, y),
        "gradient",
        2.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_for_each_token(kernel_device, dtype, generator):
    logits = random_logits((4, 1100), torch.float32, generator)
    targets = torch.randint(1100, (4,), generator=generator)
    temperature = torch.rand(4, generator=generator).to(dtype) + 0.5
    got = score_tokens(
        logits.to(kernel_device),
        targets.to(kernel_device),
        alpha=2.5,
        temperature=temperature.to(kernel_device),
        entropy=True,
    )
    exact = truth(logits, targets, alpha=2.5, temperature=temperature)
    expression = float32_expression(logits, targets, 2.5, temperature)
    for name, value, *exact_and_peer in zip(got._fields, got, exact, expression, strict=True):
        assert_close_to_truth(value.cpu(), *exact_and_peer, name)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_common_offset(kernel_device, offset, generator):
    """The maximum is taken off in units of log2, rounded: all terms must share that rounding."""
    logits = torch.randn(2, 2100, generator=generator).mul(64).round().div(64) + offset
    targets = logits.argmax(-1)
    got = score_tokens(logits.to(kernel_device), targets.to(kernel_device), alpha=2.5, entropy=True)
    exact = truth(logits, targets, alpha=2.5)
    for name, value, true in zip(got._fields, got, exact, strict=True):
        assert ((value.cpu().double() - true).abs() <= 3e-6 * (1 + true.abs())).all(), name


@pytest.mark.parametrize(("alpha", "temperature"), [(1e6, 1.0), (1e-6, 1.0), (4.0, 1e-35)])
def test_far_corners(kernel_device, alpha, temperature, generator):
    logits = torch.randn(2, 1100, generator=generator)
    targets = logits.argmax(-1)
    got = score_tokens(
        logits.to(kernel_device),
        targets.to(kernel_device),
        alpha=alpha,
        temperature=temperature,
        entropy=True,
    )
    exact = truth(logits, targets, alpha=alpha, temperature=temperature)
    for name, value, true in zip(got._fields, got, exact, strict=True):
        tolerance = 1e-6 * (1 + true.abs()) * max(1.0, alpha if name == "log_z" else 1.0)
        assert ((value.cpu().double() - true).abs() <= tolerance).all(), name


def test_which_implementation_serves(kernel_device):
    def chosen(dtype: torch.dtype, **options: float) -> str:
        logits = torch.zeros(1, 2, dtype=dtype, device=kernel_device)
        return implementation(logits, ScoreOptions(**options)).__name__.rpartition(".")[2]

    assert chosen(torch.bfloat16) == "gpu"
    assert chosen(torch.float64) == "eager"
    assert chosen(torch.float32, temperature=1e-35) == "eager"


@pytest.mark.parametrize("bad", ["nan", "nan_payload", "inf", "all_masked"])
@pytest.mark.parametrize(("alpha", "place"), [(1.0, 3), (4.0, 1500), (7.3, 3), (7.3, 900)])
def test_a_bad_row_is_nan_alone(kernel_device, bad, place, alpha, generator):
    clean = random_logits((3, 1700), torch.float32, generator)
    targets = torch.tensor([0, 1, 2])
    logits = clean.clone()
    if bad == "all_masked":
        logits[1] = -torch.inf
    elif bad == "nan_payload":
        logits.view(torch.int32)[1, place] = 0x7FC001FF
    else:
        logits[1, place] = float(bad)
    z = logits.to(kernel_device).requires_grad_()
    targets = targets.to(kernel_device)
    got = score_tokens(z, targets, alpha=alpha, entropy=True)
    expected = score_tokens(clean.to(kernel_device), targets, alpha=alpha, entropy=True)
    for value, before in zip(got, expected, strict=True):
        assert value[1].isnan()
        assert torch.equal(value[[0, 2]], before[[0, 2]])
    (slope,) = torch.autograd.grad(sum(score.sum() for score in got), z)
    assert slope[1].isnan().all()
    assert slope[[0, 2]].isfinite().all()


def test_ignored_rows_and_rows_without_a_gradient(kernel_device, generator):
    logits = random_logits((4, 1100), torch.float32, generator)
    logits[1] = torch.nan
    logits[2] = torch.nan
    targets = torch.tensor([0, -100, 2, 5], device=kernel_device)
    z = logits.to(kernel_device).requires_grad_()
    scores = score_tokens(z, targets, alpha=2.5, entropy=True)
    assert all((score[1] == 0).all() for score in scores)
    keep = torch.tensor([1.0, 1.0, 0.0, 1.0], device=kernel_device)
    total = sum((score * keep).nan_to_num(0.0).sum() for score in scores)
    (slope,) = torch.autograd.grad(total, z)
    assert (slope[[1, 2]] == 0).all()
    assert slope.isfinite().all()
    assert (slope[[0, 3]] != 0).any(-1).all()


def test_an_impossible_target_and_one_out_of_range(kernel_device):
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], device=kernel_device, requires_grad=True)
    scores = score_tokens(logits, torch.tensor([1], device=kernel_device), alpha=2.0)
    assert scores.log_prob.item() == -torch.inf
    (slope,) = torch.autograd.grad(scores.log_prob.sum(), logits)
    assert (slope == 0).all()
    if kernel_device == "cuda":  # on the CPU it is an error
        scores = score_tokens(logits, torch.tensor([3], device=kernel_device), alpha=2.0)
        assert scores.log_prob.item() == -torch.inf


def layouts(base: Tensor) -> dict[str, Tensor]:
    """base is [3, 4, 1040]."""
    return {
        "vector": base[0, 0],
        "matrix with a row stride": base[0, :, :1031],
        "odd rows": base.flatten()[1 : 1 + 3 * 1033].view(3, 1033),
        "shifted": base[:, :-1],
        "permuted": base.permute(1, 0, 2),
        "last stride 2": base[..., ::2],
        "repeated row": base[0, :1].expand(3, -1),
        "no rows": base[:, :0],
    }


@pytest.mark.parametrize("layout", layouts(torch.empty(3, 4, 1040)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(kernel_device, layout, dtype, generator):
    base = torch.randn(3, 4, 1040, generator=generator).to(kernel_device, dtype)
    logits = layouts(base)[layout]
    targets = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
    targets = targets.to(kernel_device)
    weights = [torch.ones(targets.shape, device=kernel_device)] * 3
    flat = logits.reshape(-1, logits.shape[-1]).contiguous()
    results = []
    for x, y in ((logits, targets.int()), (flat, targets.flatten())):
        z = x.detach().requires_grad_()
        scores = score_tokens(z, y, alpha=4, entropy=True)
        slope = gradient(scores, [weight.view(y.shape) for weight in weights], z)
        results.append([*(score.detach().flatten() for score in scores), slope.flatten()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", tiers.every(2, [7.3, 1.0, 4.0, 2.5]))
def test_both_variants_and_any_batch_have_the_same_bits(
    kernel_device, dtype, alpha, generator, monkeypatch
):
    vocab = 2 * gpu.GROUP * gpu.SLICE_V + 2300
    logits = random_logits((3, vocab), dtype, generator).to(kernel_device)
    logits[1, : gpu.GROUP * gpu.SLICE_V] = -torch.inf
    targets = torch.tensor([5, vocab - 1, 9000], device=kernel_device)

    def scores(rows: list[int]) -> Tensor:
        return torch.stack(score_tokens(logits[rows], targets[rows], alpha=alpha, entropy=True))

    monkeypatch.setattr(gpu, "MANY_GROUPS", 10**9)
    few = scores([0, 1, 2])
    monkeypatch.setattr(gpu, "MANY_GROUPS", 0)
    assert torch.equal(scores([0, 1, 2]), few)
    assert torch.equal(scores([2, 0]), few[:, [2, 0]])


def test_in_place(kernel_device, generator):
    base = random_logits((3, 1100), torch.bfloat16, generator).to(kernel_device)
    targets = torch.tensor([0, 1099, 5], device=kernel_device)
    weights = [torch.ones(3, device=kernel_device)] * 3
    results = []
    for inplace in (False, True):
        z = base.clone().requires_grad_()
        scores = score_tokens(z, targets, alpha=4, entropy=True, inplace_backward=inplace)
        slope = gradient(scores, weights, z)
        assert (slope.data_ptr() == z.data_ptr()) == inplace
        results.append(slope.clone())
    assert torch.equal(*results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the whole size is tested")
def test_offsets_beyond_2_to_the_31(kernel_device, generator):
    logits = torch.randn(2, 1100, generator=generator).bfloat16()
    targets = torch.tensor([3, 1099])
    results = []
    for rows in (logits, far_apart(logits)):
        samples = sample_tokens(rows, alpha=4, seed=0, counters=counters_for(2), entropy=True)
        z = rows.requires_grad_()
        scores = score_tokens(
            z, targets, alpha=4, entropy=True, inplace_backward=rows is not logits
        )
        slope = gradient(scores, [torch.ones(2)] * 3, z)
        results.append([*samples, *(score.detach() for score in scores), slope.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("cuts", [(1025,), (7, 1500), (2047, 2048)])
def test_shards_are_the_whole(kernel_device, cuts, generator):
    options = ScoreOptions(alpha=2.5, entropy=True, temperature=0.7)
    logits = random_logits((4, 2300), torch.float32, generator).to(kernel_device)
    targets = torch.tensor([0, 2299, 1700, -100], device=kernel_device)
    logits[1, 7:1500] = -torch.inf
    sums, start = [], 0
    for end in (*cuts, 2300):
        local = vocab_parallel.shifted(targets, -100, start)
        sums.append(gpu.row_sums(logits[:, start:end], local, vocab_parallel.IGNORED, options))
        start = end
    got = gpu.finish_scores(torch.stack(sums), targets, -100, options)
    expected = gpu.score_tokens(logits, targets, -100, options)
    for name, value, other in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=2e-6, msg=name)


def counters_for(num_rows: int) -> Tensor:
    index = torch.arange(num_rows)
    return torch.stack((torch.zeros_like(index), index, index % 7, index + 11), dim=-1)


@pytest.mark.parametrize("alpha", tiers.every(2, [0.0, 1.0, 2.5, 4.0, 7.3]))
@pytest.mark.parametrize("vocab", [5, 1500])
def test_draws_the_tokens_of_the_reference(kernel_device, vocab, alpha, generator):
    """Equal uniforms, equal masses up to rounding: they differ only within rounding of a bound.

    One draw in 10^5 may: none of so few, nearly always.
    """
    rows = 2000 if kernel_device == "cuda" else 16
    logits = random_logits((rows, vocab), torch.float32, generator)
    counters = counters_for(rows)
    banned = torch.randint(-1, vocab, (rows,), generator=generator)
    for ban in (None, banned):
        expected = reference.draw_tokens(
            logits, alpha=alpha, seed=torch.tensor([4]), counters=counters, banned=ban
        )
        got = sample_tokens(
            logits.to(kernel_device),
            alpha=alpha,
            seed=4,
            counters=counters.to(kernel_device),
            banned=None if ban is None else ban.to(kernel_device),
        )
        assert (got.token.cpu() != expected).sum() <= rows // 1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 1024, 9000])
def test_scores_of_draws_have_the_bits_of_score_tokens(kernel_device, vocab, dtype, generator):
    rows = 3
    logits = (3 * torch.randn(rows, vocab, generator=generator)).to(kernel_device, dtype)
    logits[:, 1::5] = -torch.inf
    counters = counters_for(rows).to(kernel_device)
    for alpha in (1.0, 4.0, 7.3):
        samples = sample_tokens(logits, alpha=alpha, seed=1, counters=counters, entropy=True)
        scores = score_tokens(logits, samples.token, alpha=alpha, entropy=True)
        for value, score in zip(samples[1:], scores, strict=True):
            assert torch.equal(value, score)


def test_a_banned_token_that_has_almost_all_mass(kernel_device):
    """Its neighbours' masses vanish beside it; the draw among them must be right still."""
    logits = torch.tensor([[1.0, 0.5, -torch.inf, 0.0, 300.0]]).expand(30, -1)
    counters, banned = counters_for(30), torch.full((30,), 4)
    expected = reference.draw_tokens(
        logits, alpha=1.0, seed=torch.tensor([0]), counters=counters, banned=banned
    )
    got = sample_tokens(
        logits.to(kernel_device),
        seed=0,
        counters=counters.to(kernel_device),
        banned=banned.to(kernel_device),
    )
    assert torch.equal(got.token.cpu(), expected)
    assert set(expected.tolist()) == {0, 1, 3}


def test_draws_from_rows_without_a_choice(kernel_device):
    logits = torch.zeros(5, 1300)
    logits[0, 1100] = torch.nan
    logits[1, 5] = torch.inf
    logits[2] = -torch.inf
    logits[3] = -torch.inf
    logits[3, 1200] = 3.0
    banned = torch.tensor([-1, -1, 7, 1200, -1])
    samples = sample_tokens(
        logits.to(kernel_device),
        alpha=2,
        seed=0,
        counters=counters_for(5).to(kernel_device),
        banned=banned.to(kernel_device),
        entropy=True,
    )
    assert samples.token[:4].tolist() == [-1, -1, -1, 1200]
    assert samples.token[4] >= 0
    for score in samples[1:]:
        assert score[:3].isnan().all()
        assert score[3:].isfinite().all()


def test_a_seed_may_be_a_tensor_of_64_bits(kernel_device):
    logits = torch.zeros(4, 700, device=kernel_device)
    counters = counters_for(4)
    expected = reference.draw_tokens(
        logits.cpu(),
        alpha=1.0,
        seed=torch.tensor([-(2**63) + 5]),
        counters=counters,
        banned=None,
    )
    counters = counters.to(kernel_device)
    for seed in (2**63 + 5, torch.tensor([-(2**63) + 5], device=kernel_device)):
        got = sample_tokens(logits, seed=seed, counters=counters)
        assert torch.equal(got.token.cpu(), expected)


needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class TestOnAGpu:
    """What only a GPU can show."""

    pytestmark = needs_gpu

    @pytest.fixture(autouse=True)
    def use_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("POWERKERNELS_BACKEND", "triton")

    @pytest.mark.gpu_memory(5)  # the logits, 4.4 GB, are overwritten by their gradient
    def test_more_than_2_to_the_31_elements(self):
        rows, vocab = 16600, 131072
        logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
        logits[-1] = torch.linspace(-3, 3, vocab)
        targets = torch.full((rows,), 131071, device="cuda")
        z = logits.requires_grad_()
        scores = score_tokens(z, targets, alpha=4, entropy=True, inplace_backward=True)
        last = logits[-1:].detach().cpu()
        exact = truth(last, targets[-1:].cpu(), alpha=4.0)
        for value, true in zip(scores, exact, strict=True):
            assert value[-1].item() == pytest.approx(true.item(), rel=1e-5)
        weights = [torch.ones(rows, device="cuda")] * 3
        expected, expression = true_gradient(
            last, targets[-1:].cpu(), [torch.ones(1)] * 3, alpha=4.0
        )
        slope = gradient(scores, weights, z)[-1:].cpu()
        assert_gradient_close(slope, expected, expression, "last row", 4.0)

    def test_in_a_cuda_graph(self):
        generator = torch.Generator("cuda").manual_seed(0)
        logits = torch.randn(64, 151936, device="cuda", generator=generator).bfloat16()
        targets = torch.randint(151936, (64,), device="cuda", generator=generator)
        counters = counters_for(64).cuda()
        seed = torch.tensor([3], device="cuda")
        static = logits.clone().requires_grad_()

        def work() -> list[Tensor]:
            scores = score_tokens(static, targets, alpha=4, entropy=True)
            slope = gradient(scores, [torch.ones_like(score) for score in scores], static)
            samples = sample_tokens(static.detach(), alpha=4, seed=seed, counters=counters)
            return [*(score.detach() for score in scores), slope, samples.token]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = work()
        with torch.no_grad():
            static.copy_(logits.flip(0))
        graph.replay()
        expected = work()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

    def test_nothing_waits_for_the_device(self):
        logits = torch.randn(64, 50257, device="cuda").requires_grad_()
        targets = torch.randint(50257, (64,), device="cuda")
        counters, seed = counters_for(64).cuda(), torch.tensor([3], device="cuda")
        scores = score_tokens(logits, targets, alpha=2.5, entropy=True)  # compiles
        scores.log_prob.sum().backward()
        with waits_are_errors():
            scores = score_tokens(logits, targets, alpha=2.5, entropy=True)
            scores.log_prob.sum().backward()
            sample_tokens(logits.detach(), alpha=4, seed=seed, counters=counters)

    def test_run_to_run_bits(self):
        logits = torch.randn(300, 151936, device="cuda").bfloat16()
        targets = torch.randint(151936, (300,), device="cuda")
        first = score_tokens(logits, targets, alpha=7.3, entropy=True)
        for _ in range(5):
            again = score_tokens(logits, targets, alpha=7.3, entropy=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    # Of what the compiler itself imports, at its first use.
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_compiles_as_one_graph(self):
        logits = torch.randn(8, 5000, device="cuda").requires_grad_()
        targets = torch.randint(5000, (8,), device="cuda")

        def loss(x: Tensor) -> Tensor:
            scores = score_tokens(x * 2, targets, alpha=4, entropy=True)
            return sum(score.sum() for score in scores)

        (expected,) = torch.autograd.grad(loss(logits), logits)
        (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(logits), logits)
        torch.testing.assert_close(got, expected)

    def test_cpu_and_gpu_draw_the_same_tokens(self, monkeypatch):
        """They differ where a uniform falls within rounding of a bound: about 1 draw in 10^5."""
        generator = torch.Generator().manual_seed(1)
        logits = 2 * torch.randn(20_000, 3000, generator=generator)
        counters = counters_for(20_000)
        on_gpu = sample_tokens(logits.cuda(), alpha=1.0, seed=4, counters=counters.cuda())
        monkeypatch.setenv("POWERKERNELS_BACKEND", "auto")
        on_cpu = sample_tokens(logits, alpha=1.0, seed=4, counters=counters)
        assert (on_gpu.token.cpu() != on_cpu.token).sum() <= 4
