"""Deep gradient compression: momentum before sparsification, its masking, its clipping, its ramp."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import compression
from compression import build
from compression.averagers import DeepGradientCompression, WarmUp
from compression.codecs.sparsifiers import TopK
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.collectives import Solo
from compression.network.threads import ThreadCollectives, run_ranks

SHAPES = {"weight": (40, 30), "bias": (40,)}
LAYERS = layers_of(SHAPES.items(), 64)
NAMES, OFFSETS, VALUES = ("weight", "bias"), (0, 1200), 1240
WEIGHT, BIAS = slice(0, 1200), slice(1200, 1240)


def gradient(rank: int, step: int = 0) -> Tensor:
    return torch.randn(VALUES, generator=torch.Generator().manual_seed(1000 * step + rank))


def average(bound: DeepGradientCompression, values: Tensor, step: int) -> Tensor:
    flat = values.clone()
    bound.average_(Gradients(flat, NAMES, OFFSETS), step)
    bound.settle(True)
    return flat


def sgd_path(momentum: float, nesterov: bool, steps: int) -> list[Tensor]:
    """Weights under torch's own SGD."""
    weights = torch.zeros(VALUES, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=0.1, momentum=momentum, nesterov=nesterov)
    path = []
    for step in range(steps):
        weights.grad = gradient(0, step)
        optimizer.step()
        path.append(weights.detach()[WEIGHT].clone())
    return path


def dgc_path(bound: DeepGradientCompression, steps: int) -> list[Tensor]:
    """The compressed layer's weights, stepped without momentum."""
    weights = torch.zeros(VALUES, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=0.1)
    path = []
    for step in range(steps):
        weights.grad = average(bound, gradient(0, step), step)
        optimizer.step()
        path.append(weights.detach()[WEIGHT].clone())
    return path


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("nesterov", [False, True])
def test_all_values_sent_and_no_masking_is_momentum_sgd_bit_for_bit(nesterov: bool) -> None:
    bound = DeepGradientCompression(1.0, LAYERS, Solo(), 0.9, nesterov, masking=False)
    assert all_equal(dgc_path(bound, 8), sgd_path(0.9, nesterov, 8))


def test_all_values_sent_and_masked_is_sgd_without_momentum_bit_for_bit() -> None:
    bound = DeepGradientCompression(1.0, LAYERS, Solo(), 0.9)
    assert all_equal(dgc_path(bound, 8), sgd_path(0.0, False, 8))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("masking", [False, True])
def test_velocity_and_sum_follow_the_papers_recursion(nesterov: bool, masking: bool) -> None:
    bound = DeepGradientCompression(0.1, LAYERS, Solo(), 0.9, nesterov, masking)
    u, v = torch.zeros(1200), torch.zeros(1200)
    for step in range(20):
        seen = average(bound, gradient(0, step), step)[WEIGHT]
        g = gradient(0, step)[WEIGHT]
        u = 0.9 * u + g
        v = v + (g + 0.9 * u if nesterov else u)
        sent = v.abs() >= v.abs().topk(120).values[-1]
        assert torch.allclose(seen, torch.where(sent, v, 0.0), atol=1e-5)
        v = torch.where(sent, 0.0, v)
        u = torch.where(sent, 0.0, u) if masking else u
    state = bound.state_dict()
    assert torch.allclose(state["velocity"]["weight"], u, atol=1e-5)
    assert torch.allclose(state["accumulated"]["weight"], v, atol=1e-5)


def test_a_dropped_step_leaves_no_trace() -> None:
    bound = DeepGradientCompression(0.1, LAYERS, Solo(), 0.9)
    average(bound, gradient(0), 0)
    before = bound.state_dict()
    bad = gradient(1)
    bad[5] = float("inf")
    bound.average_(Gradients(bad, NAMES, OFFSETS), 1)
    assert not bad[5].isfinite()
    bound.settle(False)
    after = bound.state_dict()
    for name in ("velocity", "accumulated"):
        assert torch.equal(before[name]["weight"], after[name]["weight"])


def test_layers_of_one_dimension_travel_dense_and_keep_the_optimizers_momentum() -> None:
    def work(ranks: ThreadCollectives) -> Tensor:
        bound = DeepGradientCompression(0.01, LAYERS, ranks, 0.9)
        assert bound.without_momentum == {"weight"}
        return [average(bound, gradient(ranks.rank, step), step)[BIAS] for step in range(2)][-1]

    for seen in run_ranks(2, work):
        assert torch.equal(seen, (0.5 * gradient(0, 1) + 0.5 * gradient(1, 1))[BIAS])


@pytest.mark.parametrize("ratio", [0.001, 0.1])
def test_the_fraction_kept_falls_in_four_equal_stages(ratio: float) -> None:
    bound = DeepGradientCompression(ratio, LAYERS, Solo(), 0.9, ramp_steps=8)
    stages = [1 / 4, 1 / 4, 1 / 16, 1 / 16, 1 / 64, 1 / 64, 1 / 256, 1 / 256, 0, 0]
    assert [bound.ratio_at(step) for step in range(10)] == [max(ratio, stage) for stage in stages]
    for step in range(10):
        seen = average(bound, gradient(0, step), step)
        assert int(seen[WEIGHT].count_nonzero()) == TopK(bound.ratio_at(step)).kept(1200)


@pytest.mark.parametrize("ramp_steps", [1, 2, 3, 5])
def test_any_length_of_ramp_starts_at_a_quarter_and_ends_on_time(ramp_steps: int) -> None:
    bound = DeepGradientCompression(0.001, LAYERS, Solo(), 0.9, ramp_steps=ramp_steps)
    shards = [bound.ratio_at(step) for step in range(ramp_steps + 1)]
    assert shards == sorted(shards, reverse=True)
    assert shards[0] == 1 / 4
    assert shards[-2] > shards[-1] == 0.001


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_clipping_bounds_the_ranks_gradient_by_the_root_of_their_number(world_size: int) -> None:
    clip = 0.5

    def work(ranks: ThreadCollectives) -> Tensor:
        bound = DeepGradientCompression(1.0, LAYERS, ranks, 0.9, clip=clip)
        return average(bound, gradient(ranks.rank), 0)

    def clipped(values: Tensor) -> Tensor:
        return values * (clip * math.sqrt(world_size) / values.norm()).clamp(max=1.0)

    expected = sum(clipped(gradient(rank)) for rank in range(world_size)) / world_size
    for seen in run_ranks(world_size, work):
        assert torch.allclose(seen, expected, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
def test_independent_gradients_have_a_mean_of_the_clipped_norm_on_any_number_of_ranks(world_size: int) -> None:
    def rank_main(ranks: ThreadCollectives) -> Tensor:
        bound = DeepGradientCompression(1.0, LAYERS, ranks, 0.0, clip=1.0)
        return average(bound, 100 * gradient(ranks.rank), 0)

    (mean, *_) = run_ranks(world_size, rank_main)
    assert 0.85 < mean.norm() < 1.15


def test_clipping_leaves_small_gradients_alone_and_overflows_nowhere() -> None:
    small = DeepGradientCompression(1.0, LAYERS, Solo(), 0.9, clip=1e3)
    assert torch.equal(average(small, gradient(0), 0), gradient(0))
    assert not average(small, torch.zeros(VALUES), 1)[BIAS].any()
    large = DeepGradientCompression(1.0, LAYERS, Solo(), 0.9, clip=1.0)
    assert average(large, torch.full((VALUES,), 3e38), 0).norm() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clipping_keeps_what_is_not_finite_in_its_place(bad: float) -> None:
    """So that the layer that is named is the one where it began."""
    values = gradient(0)
    values[BIAS.start] = bad
    seen = average(DeepGradientCompression(1.0, LAYERS, Solo(), 0.9, clip=1.0), values, 0)
    assert (~seen.isfinite()).nonzero().tolist() == [[BIAS.start]]


def test_the_registry_builds_it_and_the_ramp_takes_the_place_of_the_warm_up() -> None:
    compressor = build("dgc", ratio=0.02, momentum=0.5, nesterov=True, clip=2.0, warmup_steps=6, bucket_size=64)
    assert compressor.needs_full_gradient
    assert not build("dgc").needs_full_gradient
    bound = compressor.averager(LAYERS, Solo(), 0)
    assert isinstance(bound, DeepGradientCompression)
    assert not isinstance(bound, WarmUp)
    assert (bound.ratio_at(0), bound.ratio_at(6)) == (0.25, 0.02)
    assert "dgc" not in [name for name, row in compression.COMPRESSORS.items() if row.listed]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.0}, "momentum is a number from 0 to below 1, got 1.0"),
        ({"clip": 0.0}, "clip bounds a norm and is a number above 0, got 0.0; None is off"),
        ({"ratio": 2}, "TopK keeps a fraction of the values above 0 and at most 1, got ratio=2"),
        ({"error_feedback": True}, "compressor dgc takes no option 'error_feedback'"),
    ],
)
def test_options_out_of_range_are_refused(options: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build("dgc", **options)


def test_two_ranks_reach_the_least_squares_solution() -> None:
    """A convex problem whose two halves pull apart: only what both ranks send, in time, leads to the optimum."""
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.randn(2, 400, 200, generator=generator), torch.randn(200, generator=generator)
    targets = inputs @ weights
    layers = layers_of({"weight": (20, 10)}.items(), 64)

    def work(ranks: ThreadCollectives) -> Tensor:
        bound = build("dgc", ratio=0.05, bucket_size=64, warmup_steps=40).averager(layers, ranks, 0)
        x, y, found = inputs[ranks.rank], targets[ranks.rank], torch.zeros(200)
        for step in range(300):
            flat = x.T @ (x @ found - y) / len(x)
            bound.average_(Gradients(flat, ("weight",), (0,)), step)
            bound.settle(True)
            found = found - 0.03 * flat
        return found

    first, second = run_ranks(2, work)
    assert torch.equal(first, second)
    assert (first - weights).norm() < 0.02 * weights.norm()
