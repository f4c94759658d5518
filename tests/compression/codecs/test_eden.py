"""EDEN: unbiased, with the published error, whatever the values are; rotations that are each rank's and hop's own."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor

from compression import COMPRESSORS, build
from compression.codecs.eden import Eden, cut, is_exact
from compression.conformance import values_of
from compression.gradients import Gradients
from compression.kernels.reference.normal import lloyd_max, unbiased_error
from compression.kernels.reference.rotations import Rotations
from compression.layers import layers_of
from compression.network.threads import ThreadCollectives, run_ranks
from compression.randomness import Draws, stream_keys

KINDS = ("one non-zero", "two non-zeros", "three non-zeros", "eight non-zeros", "ten non-zeros", "2 % non-zeros")
KINDS += ("one outlier", "constant", "heavy tails", "normal", "mixed magnitudes")
DRAWS = 4000


def few_and_little(count: int) -> dict[str, Tensor]:
    """Vectors whose norm a few values hold, and little else: what signs and sums of them keep on a lattice."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(3))
    one, two, pair = 1e-3 * noise, 1e-5 * noise, torch.zeros(count)
    one[5] = 1.0
    two[5], two[9] = 1.0, -1.0
    pair[3], pair[7] = 1.0, 0.01
    three = torch.zeros(count)
    three[:3] = torch.tensor([3.0, 1.0, 1.0])
    return {"one": one, "two": two, "pair": pair, "3 1 1": three, "ones and noise": 1 + 0.01 * noise}


@functools.cache
def gradient() -> Tensor:
    """A real one: of a layer behind a ReLU, on handwritten digits."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:256]).float().flatten(1) / 16, torch.tensor(digits.target[:256])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    return model[0].weight.grad.flatten()


def vectors(count: int) -> dict[str, Tensor]:
    named = {kind: values_of(kind, count) for kind in KINDS}
    return {**named, **few_and_little(count), "real gradient": gradient()[:count]}


def draws(quantizer: Eden, values: Tensor, contraction: bool, seeds: int = DRAWS) -> Tensor:
    """Decodings of one bucket under many rotations, a row each: float64 [seeds, count]."""
    rows = values.repeat(seeds, 1)
    plan = quantizer._messages(seeds, len(values))
    keys = stream_keys(0, 0, plan.layers, 0, 0)
    wire = torch.empty(plan.wire_bytes, dtype=torch.uint8)
    nothing, lost = torch.zeros(2, rows.numel())
    quantizer.encode_plan(plan, rows.view(-1), keys, wire, *((nothing, lost) if contraction else ()))
    out = torch.empty_like(rows)
    quantizer.decode_plan(plan, wire, out.view(-1), keys=keys)
    return out.double()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [64, 512])
@pytest.mark.parametrize("kind", vectors(64))
def test_it_is_unbiased_and_its_error_is_the_expected_one(kind: str, count: int, bits: int) -> None:
    """The squared bias, by the product of the means of two halves of the draws, is below 1e-4 of the error, up to the
    noise of so many draws: 5 deviations."""
    values = vectors(count)[kind]
    quantizer = Eden(bits, count)
    errors = draws(quantizer, values, contraction=False) - values.double()
    expected = quantizer.expected_squared_error(values)
    squares = errors.square().sum(1)
    assert float(squares.mean()) == pytest.approx(expected, rel=0.02 if count == 512 else 0.17)
    first, second = errors[: DRAWS // 2].mean(0), errors[DRAWS // 2 :].mean(0)
    bias = float(first @ second) / float(squares.mean())
    # Of independent means, each of squared length error / (DRAWS / 2), spread over the directions of the error.
    spectrum = (errors.T @ errors / DRAWS).square().sum().sqrt() / float(squares.mean())
    assert bias < 1e-4 + 5 * float(spectrum) / (DRAWS / 2)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", vectors(64))
def test_with_error_feedback_it_is_a_contraction(kind: str, bits: int) -> None:
    for count in (64, 512):
        values = vectors(count)[kind]
        found = draws(Eden(bits, count), values, contraction=True, seeds=500)
        lost = (found - values.double()).square().sum(1) / float(values.double().square().sum())
        assert float(lost.max()) < 0.95
        assert float(lost.mean()) < 1 / (1 + 1 / unbiased_error(bits, count)) * 1.05


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_error_of_the_papers_table_is_that_of_long_buckets(bits: int) -> None:
    published = {1: 0.57, 2: 0.133, 3: 0.0355, 4: 0.0095, 5: 0.0025, 8: 4.1e-5}
    if bits in published:
        assert unbiased_error(bits, 512) == pytest.approx(published[bits], rel=0.012)
    assert unbiased_error(bits, 8192) == pytest.approx(distortion(bits) / (1 - distortion(bits)), rel=2e-3)


def distortion(bits: int) -> float:
    """E (x - Q(x))^2 of a normal x, by a sum over a fine grid."""
    levels, thresholds = lloyd_max(bits)
    x = (np.arange(400_000) + 0.5) * (9.0 / 400_000)
    weight = np.exp(-x * x / 2) / np.exp(-x * x / 2).sum()
    return float((weight * (x - levels[np.searchsorted(thresholds, x)]) ** 2).sum())


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_the_means_between_thresholds_and_those_the_middles_of_levels(bits: int) -> None:
    """The definition, with the means of a normal variable taken anew, by a sum."""
    levels, thresholds = lloyd_max(bits)
    assert np.allclose(thresholds, (levels[1:] + levels[:-1]) / 2, rtol=0, atol=1e-12)
    for level, low, high in zip(levels, [0.0, *thresholds], [*thresholds, 12.0], strict=True):
        x = low + (np.arange(20_000) + 0.5) * ((high - low) / 20_000)
        weight = np.exp(-x * x / 2)
        assert float((weight * x).sum() / weight.sum()) == pytest.approx(level, abs=1e-7)


def test_no_assignment_of_levels_near_them_loses_less() -> None:
    """Least squared error is what they are for: any small change makes it larger."""
    levels, _ = lloyd_max(3)
    x = (np.arange(200_000) + 0.5) * (9.0 / 200_000)
    weight = np.exp(-x * x / 2) / np.exp(-x * x / 2).sum()

    def lost(levels: np.ndarray) -> float:
        middles = (levels[1:] + levels[:-1]) / 2
        return float((weight * (x - levels[np.searchsorted(middles, x)]) ** 2).sum())

    for step in np.eye(len(levels)) * 1e-3:
        assert lost(levels) < min(lost(levels + step), lost(levels - step))


@pytest.mark.parametrize("length", [64, 128, 512, 8192])
def test_a_rotation_keeps_lengths_and_goes_back(length: int) -> None:
    values = torch.randn(3, length, generator=torch.Generator().manual_seed(0))
    rotations = Rotations.drawn(Draws(*(torch.tensor([[64], [128], [0]]) * k for k in (1, 3, 5))), length)
    rotated = rotations.forward(values) / length
    assert torch.allclose(rotated.norm(dim=1), values.norm(dim=1), rtol=1e-5)
    assert torch.allclose(rotations.back(rotated) / length, values, atol=1e-5)
    assert not torch.allclose(rotated[0], rotated[1])


# Pieces of short buckets


@given(count=st.integers(1, 8192), bits=st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_a_short_bucket_is_cut_into_the_pieces_that_take_the_fewest_bytes(count: int, bits: int) -> None:
    pieces = cut(count, bits)
    assert sum(n for n, _ in pieces) == count
    for n, nbytes in pieces[:-1]:
        assert n in (64, 128, 256, 512, 1024, 2048, 4096)
        assert nbytes == 4 + n * bits // 8
    last, nbytes = pieces[-1]
    rotated_at = max(64, 1 << (last - 1).bit_length())
    assert nbytes == (4 * last if is_exact(last, bits) else 4 + rotated_at * bits // 8)
    # No other way to cut it, into powers of two and a last piece that is padded or exact, takes fewer.
    assert sum(nbytes for _, nbytes in pieces) == fewest(count, bits)


def fewest(count: int, bits: int) -> int:
    """The fewest bytes, over all ways."""
    ways = [4 + max(64, 1 << (count - 1).bit_length()) * bits // 8]
    ways += [4 * count] if count < 64 else []
    for power in (64, 128, 256, 512, 1024, 2048, 4096):
        if power < count:
            ways.append(4 + power * bits // 8 + fewest_of_rest(count - power, bits))
    return min(ways)


def fewest_of_rest(count: int, bits: int, seen: dict[tuple[int, int], int] = {}) -> int:  # noqa: B006
    if (count, bits) not in seen:
        seen[count, bits] = fewest(count, bits)
    return seen[count, bits]


def test_a_message_of_short_buckets_is_as_long_as_promised_and_decodes() -> None:
    for bits in (1, 4, 8):
        for count in (1, 5, 63, 64, 65, 300, 513, 1000, 1500):
            quantizer, values = Eden(bits), torch.randn(2, count, generator=torch.Generator().manual_seed(count))
            wire = quantizer.encode(values, 3)
            assert wire.shape == (2, quantizer.wire_bytes(count))
            lost = float((quantizer.decode(wire, count, seed=3) - values).square().sum())
            assert lost < 6 * quantizer.expected_squared_error(values) + 1e-9


# Range


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-10, 1e19, 3e38])
def test_no_magnitude_is_lost_or_becomes_infinite(magnitude: float, bits: int) -> None:
    values = magnitude * torch.randn(1, 512, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    quantizer = Eden(bits)
    found = quantizer.decode(quantizer.encode(values, 1), 512, seed=1)
    assert torch.isfinite(found).all()
    unit = (values.double() / magnitude).norm()
    lost = ((found.double() - values.double()) / magnitude).norm() / unit
    assert float(lost) < 1.5 * math.sqrt(unbiased_error(bits, 512))


def test_constants_at_the_edge_of_float32_are_cut_there() -> None:
    values = torch.full((1, 512), 3.3e38)
    found = [Eden(1).decode(Eden(1).encode(values, seed), 512, seed=seed) for seed in range(20)]
    assert all(torch.isfinite(each).all() for each in found)
    assert any(float(each.abs().max()) == pytest.approx(3.4e38) for each in found)


# Averages


def mean_error(world_size: int, bits: int) -> float:
    """Squared error of an average of equal gradients, over that of one encoding."""
    layers = layers_of([("w", (256, 512))], 512)
    values = torch.randn(256 * 512, generator=torch.Generator().manual_seed(0))

    def work(ranks: ThreadCollectives) -> Tensor:
        averager = build("eden", bits=bits, second_hop_bits=8).averager(layers, ranks, 0)
        flat = values.clone()
        averager.average_(Gradients(flat, ("w",), (0,)), 0)
        return flat

    found = run_ranks(world_size, work)
    assert all(torch.equal(found[0], each) for each in found)
    return float((found[0] - values).square().sum() / values.square().sum()) / unbiased_error(bits, 512)


def test_rotations_of_ranks_are_independent_so_that_errors_average_out() -> None:
    """With one rotation for all, equal gradients would keep the error of one; a rank's own shard is exact."""
    assert mean_error(8, 2) == pytest.approx(7 / 64, rel=0.1)


def test_without_its_seed_nothing_is_decoded() -> None:
    with pytest.raises(ValueError, match="Eden decodes with the seed, or the keys, that encoding took"):
        Eden(2).decode(Eden(2).encode(torch.ones(1, 64), 0), 64)


@pytest.mark.parametrize("bucket_size", [0, 32, 100, 16384, -1])
def test_other_sizes_of_buckets_are_refused_with_the_reason(bucket_size: int) -> None:
    expected = rf"a power of two of values, from 64, below which rounding is biased, to 8192, got {bucket_size}"
    with pytest.raises(ValueError, match=expected):
        build("eden", bucket_size=bucket_size)


def test_it_is_in_the_registry_with_bits_from_one() -> None:
    assert COMPRESSORS["eden"].min_bits == 1
    assert COMPRESSORS["eden"].has_bits
