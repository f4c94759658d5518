"""Spectral atoms: exact length, unbiased, the paper's probabilities, and the average of any codec in one hop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compression
from compression import Metered, Solo
from compression.averagers import OneHop
from compression.codecs.low_rank import SpectralAtoms, inclusion_probabilities, systematic_sample
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.threads import ThreadCollectives, run_ranks

KINDS = ("normal", "heavy tail", "zeros", "constant", "rank one", "one value", "denormal", "huge", "tiny")


def matrix(kind: str, rows: int, cols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, cols, generator=generator)
    one = torch.zeros(rows, cols)
    one[rows // 2, cols // 3] = -7.5
    return {
        "normal": normal,
        "heavy tail": normal**9,
        "zeros": torch.zeros(rows, cols),
        "constant": torch.full((rows, cols), -1.25),
        "rank one": normal[:, :1] @ normal[:1],
        "one value": one,
        "denormal": normal * 1e-41,
        "huge": normal.sign() * 3e38,
        "tiny": normal * 1e-30,
    }[kind]


def there_and_back(codec: SpectralAtoms, values: Tensor, seed: int = 0) -> Tensor:
    wire = codec.encode(values.reshape(1, -1), seed)
    assert wire.shape == (1, codec.wire_bytes(values.numel()))
    return codec.decode(wire, values.numel()).view(values.shape)


# The codec


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 30),
    rank=st.integers(1, 6),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 9),
    contraction=st.booleans(),
)
def test_messages_have_the_promised_length_and_finite_matrices_stay_finite(
    rows: int, cols: int, rank: int, kind: str, seed: int, contraction: bool
) -> None:
    codec = SpectralAtoms(rows, cols, rank, contraction)
    values = matrix(kind, rows, cols, seed)
    assert codec.wire_bytes(rows * cols) == 4 * min(rank * (rows + cols), rows * cols)
    decoded = there_and_back(codec, values, seed)
    assert torch.isfinite(decoded).all()
    if codec.dense:
        assert torch.equal(decoded, values)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "huge"])
@pytest.mark.parametrize(("rows", "cols", "rank"), [(9, 14, 3), (14, 9, 3), (8, 40, 1)])
def test_atoms_are_unbiased(kind: str, rows: int, cols: int, rank: int) -> None:
    """A z-test along 5 random directions: 120 tests at 5 sigma, one false alarm in 14,000 runs."""
    draws = 400
    codec, values = SpectralAtoms(rows, cols, rank), matrix(kind, rows, cols)
    scale = values.abs().max().clamp_min(1e-45).double()
    decoded = codec.decode(codec.encode(values.reshape(1, -1).repeat(draws, 1), 5), rows * cols).double() / scale
    directions = torch.randn(rows * cols, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lost = (decoded - values.reshape(-1).double() / scale) @ directions
    noise = lost.std(0) / math.sqrt(draws)
    rounding = 1e-5 if kind != "denormal" else 0.02  # of a few ulp
    assert (lost.mean(0).abs() <= 5 * noise + rounding * rows * cols).all()


def test_messages_of_one_call_draw_independently() -> None:
    codec = SpectralAtoms(12, 12, 1)
    decoded = codec.decode(codec.encode(matrix("normal", 12, 12).reshape(1, -1).repeat(20, 1), 0), 144)
    assert len({tuple(row.tolist()) for row in decoded}) > 3


@pytest.mark.parametrize("kind", ["zeros", "constant", "rank one", "one value"])
def test_a_matrix_of_few_atoms_arrives_as_it_is(kind: str) -> None:
    values = matrix(kind, 12, 17)
    decoded = there_and_back(SpectralAtoms(12, 17, 2), values)
    assert torch.allclose(decoded, values, atol=1e-5 * float(values.abs().max()))


@settings(deadline=None, max_examples=50)
@given(
    sigma=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=12),
    zeros=st.integers(0, 3),
    total=st.integers(1, 5),
)
def test_probabilities_solve_the_papers_problem(sigma: list[float], zeros: int, total: int) -> None:
    """The least variance, sum of sigma^2 / p, for a sum of p: all p below 1 are proportional to sigma."""
    ordered = torch.tensor(sorted(sigma, reverse=True) + [0.0] * zeros, dtype=torch.float64)
    if total >= len(ordered):
        return
    chances = inclusion_probabilities(ordered, total)
    some = ordered > 0
    assert ((chances > 0) == some).all()
    assert (chances <= 1).all()
    assert float(chances.sum()) == pytest.approx(min(total, len(sigma)))
    free = some & (chances < 1)
    if free.any():
        factor = (chances / ordered)[free]
        assert torch.allclose(factor, factor[:1])
        assert (ordered[some & (chances == 1)] * factor[0] >= 1 - 1e-9).all()


@settings(deadline=None, max_examples=50)
@given(draw=st.integers(0, 2**40 - 1), seed=st.integers(0, 100), total=st.integers(1, 6))
def test_a_sample_has_exactly_its_size_and_no_index_twice(draw: int, seed: int, total: int) -> None:
    sigma = torch.rand(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4 + 1e-9
    chances = inclusion_probabilities(sigma.sort(descending=True).values, total)
    sample = systematic_sample(chances, total, draw * 2.0**-40).tolist()
    assert len(set(sample)) == total
    assert set(range(int((chances == 1).sum()))) <= set(sample)


def test_with_error_feedback_nothing_grows() -> None:
    for kind in KINDS:
        values = matrix(kind, 10, 16).double()
        for seed in range(20):
            decoded = there_and_back(SpectralAtoms(10, 16, 3, contraction=True), values.float(), seed)
            assert (values - decoded.double()).norm() <= values.norm() * (1 + 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_spoils_the_matrix(bad: float) -> None:
    values = matrix("normal", 10, 16)
    values[3, 4] = bad
    assert torch.isnan(there_and_back(SpectralAtoms(10, 16, 3), values)).all()


def test_a_matrix_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="this codec is for 10 x 16 values, got 150"):
        SpectralAtoms(10, 16, 3).encode(torch.zeros(1, 150), 0)
    with pytest.raises(ValueError, match="160 values make a message of 312 bytes, got 311"):
        SpectralAtoms(10, 16, 3).decode(torch.zeros(1, 311, dtype=torch.uint8), 160)
    with pytest.raises(ValueError, match="sends at least 1 atom of a matrix, got rank=0"):
        compression.codec("svd", rows=3, cols=4, rank=0)


# Its average: one hop


SHAPES = {"conv": (8, 6, 3, 3), "norm": (8,), "flat": (2, 40), "fc": (12, 20)}
LAYERS = layers_of(SHAPES.items(), 64)
OFFSETS = (0, 432, 440, 520)
VALUES = 760


def gradient(rank: int, step: int) -> Tensor:
    return torch.randn(VALUES, generator=torch.Generator().manual_seed(100 * rank + step))


def test_the_average_is_the_mean_of_what_the_ranks_sent_in_rank_order() -> None:
    def work(ranks: ThreadCollectives) -> tuple[Tensor, Tensor, float]:
        metered = Metered(ranks)
        bound = compression.build("svd", rank=2, bucket_size=64).averager(LAYERS, metered, seed=3)
        averaged, own = gradient(ranks.rank, 0), gradient(ranks.rank, 0)
        bound.average_(Gradients(averaged, tuple(SHAPES), OFFSETS), 0)
        alone = OneHop(lambda layer: bound.codecs[layer.name], LAYERS, Solo(ranks.rank, 1), seed=3)
        alone.average_(Gradients(own, tuple(SHAPES), OFFSETS), 0)
        return averaged, own, metered.traffic.bytes_sent

    results = run_ranks(3, work)
    expected = torch.zeros(VALUES)
    for _, own, _ in results:
        expected += own * (1.0 / 3)
    factored = 4 * 2 * (8 + 54 + 12 + 20)
    for averaged, _, sent in results:
        assert torch.equal(averaged, expected)
        assert sent == 2 * (factored + 4 * (8 + 80))


def test_with_error_feedback_what_is_applied_follows_the_gradients() -> None:
    layers = layers_of([("weight", (6, 12))], 64)
    bound = compression.build("svd", rank=1, bucket_size=64, error_feedback=True).averager(layers, Solo(), seed=3)
    generator = torch.Generator().manual_seed(0)
    own, applied, given, largest = torch.randn(72, generator=generator), torch.zeros(72), torch.zeros(72), 0.0
    for step in range(1000):
        flat = own + torch.randn(72, generator=generator)
        given += flat
        bound.average_(Gradients(flat, ("weight",), (0,)), step)
        bound.settle(True)
        applied += flat
        residual = bound.state_dict()["residual"]["weight"]
        largest = max(largest, float(residual.norm() / own.norm()))
    assert torch.allclose(applied + residual, given, atol=0.01)
    assert largest < 20


def test_residuals_for_a_run_without_error_feedback_are_refused() -> None:
    bound = compression.build("svd").averager(LAYERS, Solo(), seed=0)
    with pytest.raises(ValueError, match="the checkpoint holds a residual, which this compression does not remember"):
        bound.load_state_dict({"residual": {"fc": torch.zeros(240)}})
