from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from powerkernels.philox import philox4x32, uniform53
from powerkernels.philox import reference as philox_reference

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(backend, counter, key, result):
    k0, k1 = words(key)
    got = philox4x32(torch.tensor(words(counter)), seed=k1 << 32 | k0)
    assert got.tolist() == words(result)


def test_backends_agree_bit_for_bit(compiled_backend, generator):
    counters = torch.randint(0, 2**32, (1000, 3, 4), generator=generator)
    seed = torch.tensor([-1234567890123456789])
    assert torch.equal(philox4x32(counters, seed=seed), philox_reference.philox4x32(counters, seed))


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, 2**63, 2**64 - 1, -1])
def test_a_seed_is_its_64_bits(backend, seed):
    counters = torch.arange(4)
    wrapped = (seed + 2**63) % 2**64 - 2**63
    as_tensor = philox4x32(counters, seed=torch.tensor(wrapped))
    assert torch.equal(philox4x32(counters, seed=seed), as_tensor)


def test_strides_and_leading_sizes_do_not_matter(backend, generator):
    counters = torch.randint(0, 2**32, (4, 5, 3), generator=generator).permute(2, 1, 0)
    got = philox4x32(counters, seed=5)
    assert got.shape == (3, 5, 4)
    assert torch.equal(got, philox4x32(counters.contiguous(), seed=5))
    assert philox4x32(counters[:0], seed=5).shape == (0, 5, 4)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_uniform53_is_exact(hi, lo):
    got = uniform53(torch.tensor(hi), torch.tensor(lo))
    assert got.item() == ((hi >> 5) * 2**26 + (lo >> 6)) / 2**53
    assert 0.0 <= got.item() < 1.0


@pytest.mark.parametrize(
    ("counters", "seed", "error", "names"),
    [
        (torch.zeros(3, dtype=torch.int64), 0, ValueError, "counters"),
        (torch.tensor(1), 0, ValueError, "counters"),
        (torch.zeros(4), 0, TypeError, "counters.*float32"),
        ([0, 0, 0, 0], 0, TypeError, "counters"),
        (torch.arange(4), 2**64, ValueError, "seed"),
        (torch.arange(4), 1.5, TypeError, "seed"),
        (torch.arange(4), torch.arange(2), TypeError, "seed"),
    ],
)
def test_bad_arguments(counters, seed, error, names):
    with pytest.raises(error, match=names):
        philox4x32(counters, seed=seed)


def test_opcheck(backend):
    torch.library.opcheck(
        torch.ops.powerkernels.philox4x32.default, (torch.arange(8).view(2, 4), torch.tensor([3]))
    )
