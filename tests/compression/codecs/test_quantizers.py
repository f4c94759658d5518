"""Every quantizer of the registry, at every width: what its paper says of it, and what all of them promise."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression import COMPRESSORS, Solo, build, codec
from compression.averagers import TwoHop
from compression.codecs.base import decoded
from compression.codecs.quantizer import Quantizer
from compression.gradients import Gradients
from compression.kernels import reference
from compression.layers import layers_of
from compression.network.threads import ThreadCollectives, run_ranks
from tests.support.quantizers import takes

QUANTIZERS = {name: row for name, row in COMPRESSORS.items() if row.quantizer is not None}
AT_ALL_WIDTHS = [
    (name, {"bits": bits} if row.has_bits else {})
    for name, row in QUANTIZERS.items()
    for bits in (range(row.min_bits, 9) if row.has_bits else (0,))
]
WITH_BITS = [(name, options) for name, options in AT_ALL_WIDTHS if options]
# Where cases are long: that every width has the reference's bits is tested on its own.
AT_FEW_WIDTHS = [
    pytest.param(*case, marks=pytest.mark.slow if case[1].get("bits") in (3, 5, 6, 7) else ()) for case in AT_ALL_WIDTHS
]
quantizers = pytest.mark.parametrize(("name", "options"), AT_ALL_WIDTHS, ids=str)
quantizers_with_bits = pytest.mark.parametrize(("name", "options"), WITH_BITS, ids=str)

ODD = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 3e38, -3e38]
finite = st.one_of(st.sampled_from(ODD), st.floats(width=32, allow_nan=False, allow_infinity=False))
finite_values = st.lists(finite, min_size=1, max_size=150)

BUCKET = 256
NORMAL = torch.randn(16, BUCKET, generator=torch.Generator().manual_seed(0))
HEAVY_TAILED = NORMAL**5
DRAWS = 400
LONGER = 4  # than the vector, what one bit and one rotation may make of it at worst: 1 / cosine of the angle between


def buckets(name: str, options: dict[str, Any]) -> Quantizer:
    """The codec with a message that is one bucket."""
    found: Quantizer = codec(name, **options, bucket_size=BUCKET)
    return found


def samples(quantizer: Quantizer, values: Tensor) -> Tensor:
    """Independent decodings of every row, which the rows of one encoding are: [DRAWS, rows, count]."""
    rows, count = values.shape
    wire = quantizer.encode(values.repeat(DRAWS, 1), 0)
    return decoded(quantizer, wire, count, 0).view(DRAWS, rows, count)


# Messages


@quantizers
@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 4097])
def test_a_message_is_exactly_as_long_as_promised(name: str, options: dict[str, Any], count: int) -> None:
    for bucket_size in (size for size in (512, -1) if takes(name, size)):
        quantizer = codec(name, **options, bucket_size=bucket_size)
        message = quantizer.encode(torch.randn(3, count), 0)
        assert message.shape == (3, quantizer.wire_bytes(count))
        assert decoded(quantizer, message, count, 0).shape == (3, count)


RESNET50_SIZES = [4096, 9408, 16384, 36864, 65536, 147456, 262144, 524288, 589824, 1048576, 2048000, 2359296]
OVERHEAD_BITS = {"terngrad": 1.70, "1bit": 1.13}


@pytest.mark.parametrize(
    ("name", "options"), [case for case in AT_ALL_WIDTHS if case[0] != "quantile" or case[1]["bits"] <= 4], ids=str
)
def test_a_value_costs_its_bits_and_little_more_on_the_layers_of_resnet50(name: str, options: dict[str, Any]) -> None:
    """Scales, tables and padding included. A table of 2^b levels weighs more on small layers above 4 bits."""
    bits = options.get("bits", 0)
    layers = layers_of([(str(size), (size // 64, 64)) for size in RESNET50_SIZES], 512)
    averager = build(name, **options).averager(layers, Solo(), 0)
    values = sum(RESNET50_SIZES)
    starts = [sum(RESNET50_SIZES[:index]) for index in range(len(layers))]
    averager.average_(Gradients(torch.ones(values), tuple(layer.name for layer in layers), tuple(starts)), 0)
    assert 8 * averager.encoded_bytes / values / 2 <= OVERHEAD_BITS.get(name, bits + 0.13)  # two hops


@quantizers
@given(values=finite_values, seed=st.integers(0, 2**32 - 1), bucket_size=st.sampled_from([1, 7, 64, -1]))
@settings(deadline=None, max_examples=20)
def test_finite_values_stay_finite_and_within_reach(
    name: str, options: dict[str, Any], values: list[float], seed: int, bucket_size: int
) -> None:
    vector = torch.tensor([values], dtype=torch.float32)
    quantizer = codec(name, **options, bucket_size=bucket_size if takes(name, bucket_size) else 64)
    found = decoded(quantizer, quantizer.encode(vector, seed), len(values), seed)
    assert torch.isfinite(found).all()
    # What was rotated may come back larger, up to what the whole bucket has where one value gets all of the error.
    reach = vector.double().norm() * LONGER if name == "eden" else vector.abs().max().double()
    assert float(found.abs().max()) <= float(reach) * (1 + 1e-6) + 1e-42


@quantizers
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bucket_with_a_bad_value_decodes_to_nan_and_the_others_do_not(
    name: str, options: dict[str, Any], bad: float
) -> None:
    values = torch.randn(2, 512)
    values[1, 88] = bad
    quantizer = codec(name, **options)
    found = decoded(quantizer, quantizer.encode(values, 0), 512, 0)
    assert torch.isfinite(found[0]).all()
    assert torch.isnan(found[1]).all()


# What the papers say


def clipped(name: str, values: Tensor) -> Tensor:
    """The values that a code is unbiased for: TernGrad clips at 2.5 root mean squares."""
    if name != "terngrad":
        return values
    bound = 2.5 * values.square().mean(1, keepdim=True).sqrt()
    return values.clamp(-bound, bound)


@pytest.mark.parametrize("values", [NORMAL, HEAVY_TAILED, NORMAL.abs() + 3], ids=["normal", "heavy", "one-sided"])
@pytest.mark.parametrize(("name", "options"), [case for case in AT_FEW_WIDTHS if case.values[0] != "1bit"], ids=str)
def test_codes_are_unbiased(name: str, options: dict[str, Any], values: Tensor) -> None:
    """A z-test of all values at once: the mean of 4,096 squared z is 1 with deviation 0.022 for normal z.

    A value that is rarely rounded up is far from normal: values whose rarer side is expected less than 10 times are
    left out. The bound is 5 deviations and 0.05 for what is left of that, a false alarm in less than a million runs.
    """
    found = samples(buckets(name, options), values).double()
    error = (found.mean(0) - clipped(name, values)).abs()
    spread = found.std(0)
    span = found.amax(0) - found.amin(0)
    fraction = (found.mean(0) - found.amin(0)) / span  # of draws that were rounded up
    counts = (span > 0) & (torch.minimum(fraction, 1 - fraction) * DRAWS >= 10)
    assert int(counts.sum()) > 0 or bool((error < 1e-6).all())
    if int(counts.sum()) > 0:
        z = error[counts] / (spread[counts] / DRAWS**0.5)
        assert float(z.square().mean()) < 1 + 5 * (2 / int(counts.sum())) ** 0.5 + 0.05


@quantizers_with_bits
def test_the_expected_error_is_what_happens(name: str, options: dict[str, Any]) -> None:
    quantizer = buckets(name, options)
    losses = (samples(quantizer, NORMAL[:1]) - NORMAL[:1]).double().square().sum(dim=(1, 2))
    spread = float(losses.std()) / DRAWS**0.5
    assert abs(float(losses.mean()) - quantizer.expected_squared_error(NORMAL[0])) < 5 * spread + 1e-9  # 5 sigma


@pytest.mark.parametrize("values", [NORMAL, NORMAL * NORMAL.abs()], ids=["normal", "longer tails"])
@pytest.mark.parametrize(("name", "options"), [case for case in WITH_BITS if case[1]["bits"] <= 4], ids=str)
def test_the_expected_error_of_a_projection_is_nearly_what_happens(
    name: str, options: dict[str, Any], values: Tensor
) -> None:
    """What error feedback leaves over after many encodings of one layer, in the mean."""
    quantizer = codec(name, **options, bucket_size=512)
    lost = torch.stack([quantizer.encoding_error(values, seed, projected=True) for seed in range(64)])
    expected = quantizer.expected_squared_error(values, projected=True)
    assert float(lost.double().square().sum(1).mean()) == pytest.approx(expected, rel=0.05)
    assert expected < float(values.double().square().sum())  # a projection is a contraction


@quantizers_with_bits
def test_the_error_of_an_encoding_is_what_decoding_misses(name: str, options: dict[str, Any]) -> None:
    quantizer = buckets(name, options)
    found = decoded(quantizer, quantizer.encode(NORMAL.view(1, -1), 7), NORMAL.numel(), 7)
    assert torch.equal(quantizer.encoding_error(NORMAL, 7), NORMAL.view(-1) - found[0])


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e19, 1e37])
@quantizers_with_bits
def test_the_expected_error_scales_with_the_square_of_the_values(
    name: str, options: dict[str, Any], size: float, projected: bool
) -> None:
    """Also where a square is no float32: the power of two next to a size only moves exponents."""
    quantizer, factor = buckets(name, options), 2.0 ** round(math.log2(size))
    values = torch.linspace(-1, 2, 200) ** 3
    expected = quantizer.expected_squared_error(values, projected) * factor**2
    assert quantizer.expected_squared_error(values * factor, projected) == pytest.approx(expected, rel=1e-3)
    reference_error = reference.expected_squared_error(quantizer, quantizer._messages(1, 200), values, projected)
    assert reference_error * factor**2 == pytest.approx(expected, rel=1e-4)


def maxmin_bound(values: Tensor, bits: int) -> Tensor:
    """Rounding within a step u has variance at most u^2 / 4."""
    step = (values.amax(1) - values.amin(1)) / (2**bits - 1)
    return values.shape[1] * step**2 / 4


def norm_uniform_bound(values: Tensor, bits: int) -> Tensor:
    """QSGD, lemma 3.1, with the maximum norm: min(n u^2 / 4, u |v|_1), u = norm / s."""
    step = values.abs().amax(1) / (2 ** (bits - 1) - 1)
    return torch.minimum(values.shape[1] * step**2 / 4, step * values.abs().sum(1))


def exponential_bound(values: Tensor, bits: int) -> Tensor:
    """NUQSGD, theorem 1, with the maximum norm: between l and 2 l at most v^2 / 8, below the least level l^2 / 4."""
    least = values.abs().amax(1) * 2.0 ** (2 - 2 ** (bits - 1))
    return values.square().sum(1) / 8 + values.shape[1] * least**2 / 4


def quantile_bound(values: Tensor, bits: int) -> Tensor:
    """Rounding within a gap has variance at most gap^2 / 4, and no gap is wider than the range."""
    return values.shape[1] * (values.amax(1) - values.amin(1)) ** 2 / 4


def eden_bound(values: Tensor, bits: int) -> Tensor:
    """Panter and Dite 1951: the distortion of levels for normal values is at most D = sqrt(3) pi / 2 / 4^b, which it
    tends to. Without bias that is D / (1 - D); at one bit pi / 2 - 1 (DRIVE, theorem 3)."""
    distortion = 3**0.5 * math.pi / 2 / 4**bits
    return values.square().sum(1) * min(math.pi / 2 - 1, distortion / (1 - distortion))


BOUNDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "maxmin": maxmin_bound,
    "norm_uniform": norm_uniform_bound,
    "exponential": exponential_bound,
    "quantile": quantile_bound,
    "eden": eden_bound,
}


@quantizers_with_bits
@given(values=st.lists(st.floats(-(2.0**30), 2.0**30, width=32), min_size=1, max_size=100))
@settings(deadline=None, max_examples=20)
def test_the_expected_error_is_within_the_papers_bound(
    name: str, options: dict[str, Any], values: list[float]
) -> None:
    vector = torch.tensor([values], dtype=torch.float32)
    bound = float(BOUNDS[name](vector.double(), options["bits"]))
    found = codec(name, **options, bucket_size=-1 if takes(name, -1) else 512).expected_squared_error(vector)
    assert found <= bound * (1 + 1e-4) + 1e-12 * float(vector.double().square().sum())


def test_the_variance_of_terngrad_is_that_of_its_coin() -> None:
    """E |Q - v|^2 = sum of |v| (s - |v|), equation 9 of the paper in its other form."""
    values = clipped("terngrad", NORMAL)
    scale = values.abs().amax(1, keepdim=True)
    expected = (values.abs() * (scale - values.abs())).double().sum()
    losses = (samples(buckets("terngrad", {}), NORMAL) - values).double().square().sum(dim=(1, 2))
    assert abs(float(losses.mean() - expected)) < 5 * float(losses.std()) / DRAWS**0.5  # 5 sigma


@given(values=st.lists(st.floats(-(2.0**30), 2.0**30, width=32), min_size=1, max_size=100))
@settings(deadline=None, max_examples=50)
def test_one_bit_is_the_best_that_signs_can_do(values: list[float]) -> None:
    """The mean of each side: it keeps the bucket's sum, and what it loses is orthogonal to what it sends."""
    vector = torch.tensor([values], dtype=torch.float32)
    quantizer = codec("1bit", bucket_size=-1)
    sent = quantizer.decode(quantizer.encode(vector, 0), len(values)).double()
    size = float(vector.double().norm()) * len(values) ** 0.5
    lost = vector.double() - sent
    assert abs(float(lost.sum())) <= 1e-5 * size
    assert abs(float((lost * sent).sum())) <= 1e-5 * float(vector.double().square().sum())
    assert bool(((sent < 0) == (vector < 0))[sent != 0].all())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_quantile_levels_hold_equal_fractions_between_the_extremes(bits: int) -> None:
    values = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(bits))
    quantizer = codec("quantile", bits=bits, bucket_size=-1)
    table = quantizer.encode(values, 0)[0, : 4 * 2**bits].clone().view(torch.float32)
    assert table[0] == values.min()
    assert table[-1] == values.max()
    for k, level in enumerate(table.tolist()):
        assert float((values <= level).double().mean()) == pytest.approx(k / (2**bits - 1), abs=0.01)


@pytest.mark.parametrize(
    ("name", "options"), [case for case in AT_ALL_WIDTHS if case[0] in ("norm_uniform", "exponential")], ids=str
)
def test_what_lies_on_the_levels_comes_back_as_it_is(name: str, options: dict[str, Any]) -> None:
    """Both keep the largest magnitude as a level, and with it all others."""
    quantizer, norm, s = codec(name, **options), 3.0, 2 ** (options["bits"] - 1) - 1
    sides = torch.arange(s + 1) / s if name == "norm_uniform" else torch.tensor([0.0, *(2.0**-k for k in range(s))])
    levels = norm * torch.cat([-sides, sides])[None]
    found = quantizer.decode(quantizer.encode(levels, 3), levels.shape[1])
    assert torch.allclose(found, levels, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "options"), [case for case in AT_ALL_WIDTHS if case[0] != "eden"], ids=str)
def test_a_constant_comes_back_as_it_is(name: str, options: dict[str, Any]) -> None:
    for value in (0.0, -1.25, 3e38, 1e-30):
        values = torch.full((1, 700), value)
        quantizer = codec(name, **options)
        assert torch.allclose(quantizer.decode(quantizer.encode(values, 1), 700), values, rtol=1e-6, atol=0)


# With error feedback


LAYERS = layers_of([("weight", (20, 50)), ("bias", (20,))], 64)
VALUES = 1020
GRADIENTS = torch.randn(2, VALUES, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "options"), AT_FEW_WIDTHS, ids=str)
def test_with_error_feedback_what_was_applied_follows_the_gradients(name: str, options: dict[str, Any]) -> None:
    """The difference of their sums is what is still remembered, and that stays bounded over 700 steps."""

    def work(ranks: ThreadCollectives) -> tuple[float, float]:
        bound = build(name, **options, bucket_size=64, error_feedback=True).averager(LAYERS, ranks, 0)
        assert isinstance(bound, TwoHop)
        difference, middle = torch.zeros(VALUES), 0.0
        noise = torch.Generator().manual_seed(ranks.rank)
        for step in range(700):
            values = GRADIENTS[ranks.rank] + torch.randn(VALUES, generator=noise)
            mean, flat = values.clone(), values
            ranks.sum_(mean)
            bound.average_(Gradients(flat, ("weight", "bias"), (0, 1000)), step)
            bound.settle(True)
            difference += mean / ranks.world_size - flat
            if step == 349:
                middle = float(difference[:1000].norm())
        return middle, float(difference[:1000].norm())

    for middle, end in run_ranks(2, work):
        assert end < 1.5 * middle


@quantizers
def test_with_error_feedback_a_code_never_loses_more_than_the_vector(name: str, options: dict[str, Any]) -> None:
    """It is scaled into a projection, whatever the code; Seide's means are one already."""
    layers = layers_of([("w", HEAVY_TAILED.shape)], BUCKET)
    bound = build(name, **options, bucket_size=BUCKET, error_feedback=True).averager(layers, Solo(), 0)
    bound.average_(Gradients(HEAVY_TAILED.flatten().clone(), ("w",), (0,)), 0)
    bound.settle(True)
    residual = bound.state_dict()["residual"]["w"].view_as(HEAVY_TAILED)
    if name == "quantile":  # one table for the layer
        residual, vectors = residual.reshape(1, -1), HEAVY_TAILED.reshape(1, -1)
    else:
        vectors = HEAVY_TAILED
    assert bool((residual.norm(dim=1) <= vectors.norm(dim=1) * (1 + 1e-5)).all())


def test_a_width_that_a_quantizer_does_not_have_is_refused() -> None:
    for name, row in QUANTIZERS.items():
        if row.has_bits:
            words = f"codes are {row.min_bits} to 8 bits wide, got bits=9"
            with pytest.raises(ValueError, match=words):
                codec(name, bits=9)
        else:
            with pytest.raises(ValueError, match="has one width and no other, got bits=4"):
                codec(name).with_bits(4)
        words = "a power of two" if name == "eden" else "bucket size of at least 1, or -1 for the whole layer, got 0"
        with pytest.raises(ValueError, match=words):
            codec(name, bucket_size=0)
