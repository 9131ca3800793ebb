"""The linear layers of a CPU model: our product of bfloat16 weights, and layers packed in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from powerkernels import _extension
from powerkernels.power_sampling import packed_linear as module
from powerkernels.power_sampling.packed_linear import PackedLinears, pack, packed_linear

pytestmark = pytest.mark.skipif(_extension.extension() is None, reason="no compiled part")

# A float32 sum of K products errs by K · 2^-24 of the sum of their magnitudes at most; bfloat16
# rounds the result to 8 bits.
FLOAT32_STEP = 2.0**-24
BFLOAT16_STEP = 2.0**-8


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).bfloat16()


def bound(input: Tensor, weight: Tensor, truth: Tensor) -> Tensor:
    magnitudes = input.double().abs() @ weight.double().abs().T
    return truth.abs() * BFLOAT16_STEP + input.shape[-1] * FLOAT32_STEP * magnitudes


# A row alone, a group of each size, groups of unequal sizes.
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 13, 16])
# One column, a panel less and more one, tasks with one panel, several tasks.
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (15, 7), (17, 64), (48, 33), (200, 96)])
def test_against_float64(
    simd_level: str, rows: int, columns: int, depth: int, generator: torch.Generator
) -> None:
    input, weight = drawn(generator, rows, depth), drawn(generator, columns, depth)
    bias = drawn(generator, columns)
    packed = pack(weight)
    for added in (None, bias):
        output = packed_linear(input, packed, columns, added)
        truth = input.double() @ weight.double().T + (0 if added is None else added.double())
        assert output.dtype == torch.bfloat16
        assert ((output.double() - truth).abs() <= bound(input, weight, truth)).all()


def test_a_row_depends_on_itself_alone(generator: torch.Generator) -> None:
    input, weight = drawn(generator, 16, 576), drawn(generator, 200, 576)
    packed = pack(weight)
    together = packed_linear(input, packed, 200, None)
    for rows in (1, 2, 3, 5, 8):
        for first in range(16 - rows):
            alone = packed_linear(input[first : first + rows], packed, 200, None)
            assert torch.equal(alone, together[first : first + rows])


def test_the_number_of_threads_changes_nothing(
    restore_threads: None, generator: torch.Generator
) -> None:
    input, weight = drawn(generator, 5, 96), drawn(generator, 500, 96)
    packed = pack(weight)
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append(packed_linear(input, packed, 500, None))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_strides_shapes_and_non_finite(generator: torch.Generator) -> None:
    weight = drawn(generator, 40, 2 * 33)[:, ::2]  # neither rows nor columns contiguous
    input = drawn(generator, 2, 3, 66)[..., :33]
    output = packed_linear(input, pack(weight), 40, None)
    truth = input.double() @ weight.double().T
    assert output.shape == (2, 3, 40)
    assert ((output.double() - truth).abs() <= bound(input, weight, truth)).all()
    input[0, 1, 5], input[1, 2, 7] = float("nan"), float("inf")
    again = packed_linear(input, pack(weight), 40, None)
    assert again[0, 1].isnan().all()
    assert again[1, 2].isinf().all()
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = others[1, 2] = False
    assert torch.equal(again[others], output[others])


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40, dtype=torch.bfloat16)
        self.second = nn.Linear(40, 10, bias=False, dtype=torch.bfloat16)

    def forward(self, input: Tensor) -> Tensor:
        return self.second(self.first(input).relu())


@pytest.mark.parametrize("known", [True, False], ids=["bfloat16-known", "bfloat16-unknown"])
@pytest.mark.parametrize("backend_name", ["cpp", "reference"])
def test_a_model_packed_on_any_cpu(
    monkeypatch: pytest.MonkeyPatch, known: bool, backend_name: str, generator: torch.Generator
) -> None:
    """With oneDNN's bfloat16, with our product, with float32 copies: the same layers."""
    if known and not module.multiplies_bfloat16():
        pytest.skip("oneDNN does not multiply bfloat16 on this CPU")
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: known)
    monkeypatch.setenv("POWERKERNELS_BACKEND", backend_name)
    torch.manual_seed(5)
    layers, input = Layers(), drawn(generator, 7, 24)
    hidden = (input.double() @ layers.first.weight.double().T + layers.first.bias.double()).relu()
    truth = hidden.bfloat16().double() @ layers.second.weight.double().T
    packed = PackedLinears(layers)
    with torch.inference_mode(), packed.in_use():
        output = layers(input)
    # The hidden layer's rounding reaches the output through the second's weights.
    second = layers.second.weight
    slack = bound(hidden, second, truth) + hidden @ second.double().abs().T * BFLOAT16_STEP
    assert ((output.double() - truth).abs() <= slack).all()
    assert "forward" not in layers.first.__dict__

    with torch.no_grad():
        layers.second.weight.mul_(2)
    packed.refresh()
    with torch.inference_mode(), packed.in_use():
        assert torch.equal(layers(input), 2 * output)
