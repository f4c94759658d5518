"""Averages of a few values: what is sent, what is remembered, and what becomes of the rest."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from compression import build
from compression.averagers import Averager, RmsScore, TopKAverager
from compression.codecs.quantizers import MaxMin
from compression.codecs.sparsifiers import RandomK, TopK
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.collectives import Solo
from compression.network.threads import ThreadCollectives, run_ranks

SHAPES = {"wide": (40, 30), "bias": (40,), "conv": (8, 4, 3, 3), "small": (3, 3)}
LAYERS = layers_of(SHAPES.items(), 64)
NAMES = tuple(SHAPES)
PLACES = {"wide": slice(0, 1200), "bias": slice(1200, 1240), "conv": slice(1240, 1528), "small": slice(1528, 1537)}
OFFSETS = tuple(place.start for place in PLACES.values())
VALUES, DENSE_VALUES = 1537, 49
COMPRESSED = ("wide", "conv")


def gradient(rank: int, step: int = 0, count: int = VALUES) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1000 * step + rank))


def average(bound: Averager, values: Tensor, step: int = 0) -> Tensor:
    flat = values.clone()
    bound.average_(Gradients(flat, NAMES, OFFSETS), step)
    return flat


def bind(name: str, ranks: Any, **options: Any) -> TopKAverager:
    bound = build(name, bucket_size=64, **options).averager(LAYERS, ranks, seed=11)
    assert isinstance(bound, TopKAverager)
    return bound


def on_ranks(
    world_size: int, work: Callable[[TopKAverager, int], Any], name: str = "topk", **options: Any
) -> list[Any]:
    return run_ranks(world_size, lambda ranks: work(bind(name, ranks, **options), ranks.rank))


def sparsified(values: Tensor, ratio: float) -> Tensor:
    """The top-k of each compressed layer; the other layers as they are."""
    out = values.clone()
    for name in COMPRESSED:
        part = values[PLACES[name]][None]
        out[PLACES[name]] = TopK(ratio).decode(TopK(ratio).encode(part), part.shape[1])[0]
    return out


def mean(parts: Sequence[Tensor]) -> Tensor:
    """In rank order, each scaled before it is added."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part * (1.0 / len(parts))
    return total


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0])
def test_the_average_is_the_mean_of_the_ranks_top_k(world_size: int, ratio: float) -> None:
    expected = mean([sparsified(gradient(rank), ratio) for rank in range(world_size)])
    for seen in on_ranks(world_size, lambda bound, rank: average(bound, gradient(rank)), ratio=ratio):
        assert torch.equal(seen, expected)


@pytest.mark.parametrize("ratio", [0.01, 0.25])
def test_a_rank_sends_its_records_and_the_dense_layers_once(ratio: float) -> None:
    def work(bound: TopKAverager, rank: int) -> int:
        average(bound, gradient(rank))
        return bound.encoded_bytes

    codec = TopK(ratio)
    expected = codec.wire_bytes(1200) + codec.wire_bytes(288) + 4 * DENSE_VALUES
    assert on_ranks(3, work, ratio=ratio) == [expected] * 3


@pytest.mark.parametrize("name", ["topk", "dgc"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_in_bfloat16_dense_layers_take_half_the_bytes_and_are_added_up_in_float32(name: str, world_size: int) -> None:
    def work(bound: TopKAverager, rank: int) -> tuple[Tensor, int]:
        return average(bound, gradient(rank)), bound.encoded_bytes

    exact = on_ranks(world_size, work, name, ratio=0.25)
    rounded = on_ranks(world_size, work, name, ratio=0.25, dense_dtype="bfloat16")
    expected = mean([gradient(rank).bfloat16().float() for rank in range(world_size)])
    for (plain, four), (seen, two) in zip(exact, rounded, strict=True):
        assert four - two == 2 * DENSE_VALUES
        for name, place in PLACES.items():
            assert torch.equal(seen[place], (plain if name in COMPRESSED else expected)[place])


@pytest.mark.parametrize(("name", "steps"), [("topk", 1000), ("topk_rmsprop", 200)])
def test_with_error_feedback_what_was_applied_follows_the_sum_of_gradients(name: str, steps: int) -> None:
    """Applied updates and residuals add up to all gradients, and residuals stay bounded."""

    def work(bound: TopKAverager, rank: int) -> tuple[Tensor, Tensor, float]:
        applied, true, largest = torch.zeros(VALUES), torch.zeros(VALUES), 0.0
        for step in range(steps):
            applied += average(bound, gradient(rank, step), step)
            true += gradient(rank, step)
            bound.settle(True)
            largest = max(largest, float(bound.states["residual"].current.abs().max()))
        compensated = torch.zeros(VALUES)
        for layer, values in bound.state_dict()["residual"].items():
            compensated[PLACES[layer]] = values
        return applied, true - compensated, largest

    results = on_ranks(2, work, name, ratio=0.1, error_feedback=True)
    settled = (results[0][1] + results[1][1]) / 2
    assert torch.allclose(results[0][0], settled, atol=2e-3)
    assert max(largest for *_, largest in results) < 20  # a value that is never sent would be at 32 after 1,000 steps


def test_a_dropped_step_leaves_the_residual_as_it_was() -> None:
    bound = bind("topk", Solo(), error_feedback=True, ratio=0.1)
    average(bound, gradient(0))
    bound.settle(True)
    before = bound.state_dict()["residual"]
    average(bound, gradient(1), 1)
    bound.settle(False)
    after = bound.state_dict()["residual"]
    assert all(torch.equal(before[name], after[name]) for name in COMPRESSED)


def test_without_error_feedback_there_is_no_state() -> None:
    bound = bind("topk", Solo())
    average(bound, gradient(0))
    bound.settle(True)
    assert bound.state_dict() == {}


def test_state_that_does_not_belong_here_is_refused() -> None:
    with pytest.raises(ValueError, match="holds a residual, which this compression does not remember; resume with"):
        bind("topk", Solo()).load_state_dict({"residual": {}})


def test_the_score_divides_by_the_root_mean_square_of_the_gradient() -> None:
    bound = bind("topk_rmsprop", Solo(), ratio=0.1)
    square = torch.zeros(1200)
    for step in range(5):
        values = gradient(0, step)
        seen = average(bound, values, step)
        bound.settle(True)
        wide = values[PLACES["wide"]]
        square = square * 0.99 + wide * wide * 0.01
        if step == 0:  # every value is as large as its mean
            continue
        kept = (wide.abs() / (square.sqrt() + 1e-8)).topk(120).indices
        assert set(seen[PLACES["wide"]].nonzero()[:, 0].tolist()) == set(kept.tolist())
        assert torch.equal(seen[PLACES["wide"]][kept], wide[kept])
    assert torch.allclose(bound.state_dict()["mean_square"]["wide"], square)


def test_the_mean_square_of_the_largest_gradients_stays_finite() -> None:
    score = RmsScore(LAYERS)
    gradients = Gradients(torch.full((VALUES,), 3.4e38), NAMES, OFFSETS)
    compressed = Gradients(gradients.flat, COMPRESSED, (0, 1240))
    for _ in range(3):
        rated = score.score(compressed, compressed)
        score.state.settle(True)
        assert rated.flat[PLACES["wide"]].isfinite().all()
    assert score.state.current is not None
    assert score.state.current.isfinite().all()


def side_by_side(values: Tensor) -> tuple[Gradients, Tensor]:
    """The compressed layers one after the other, then the others, in one buffer."""
    order = (*COMPRESSED, "bias", "small")
    flat = torch.cat([values[PLACES[name]] for name in order])
    return Gradients(flat, order, (0, 1200, 1488, 1528)), flat


@pytest.mark.parametrize("options", [{}, {"error_feedback": True}])
@pytest.mark.parametrize("name", ["topk", "topk_rmsprop"])
def test_a_global_top_k_is_one_of_all_layers(name: str, options: dict[str, Any]) -> None:
    bound = bind(name, Solo(), ratio=0.01, big_grad=True, **options)
    values = gradient(0)
    values[PLACES["conv"]] *= 100
    gradients, flat = side_by_side(values)
    bound.average_(gradients, 0)
    assert int(flat[:1488].count_nonzero()) == 15
    if name == "topk":
        assert not flat[:1200].any()
    assert torch.equal(flat[1488:], torch.cat([values[PLACES["bias"]], values[PLACES["small"]]]))
    assert bound.encoded_bytes == TopK(0.01).wire_bytes(1488) + 4 * DENSE_VALUES


def test_all_layers_as_one_must_lie_side_by_side() -> None:
    with pytest.raises(ValueError, match="needs its compressed layers side by side, in order"):
        average(bind("topk", Solo(), big_grad=True), gradient(0))


def test_dropped_values_travel_quantized_and_unbiased() -> None:
    """The mean over many draws of the rounding, value by value: |z| > 5.5 has a chance of 4e-8, 6e-5 in all."""
    steps = 150

    def work(bound: TopKAverager, rank: int) -> Tensor:
        return torch.stack([average(bound, gradient(rank), step) for step in range(steps)]).double()

    drawn = on_ranks(2, work, efx_bits=4, ratio=0.01)[0]
    expected = mean([gradient(0), gradient(1)]).double()
    deviation = drawn.std(0)
    deviation = deviation.clamp_min(0.1 * float(deviation.mean()))  # a rare draw may not have come at all
    z = (drawn.mean(0) - expected) / (deviation / steps**0.5)
    assert z.abs().max() < 5.5
    assert (drawn - expected).abs().max() < 1.0


def test_the_dense_layers_are_not_sent_a_second_time_with_the_dropped_values() -> None:
    def work(bound: TopKAverager, rank: int) -> int:
        average(bound, gradient(rank))
        return bound.encoded_bytes

    gathered = TopK(0.01).wire_bytes(1200) + TopK(0.01).wire_bytes(288) + 4 * DENSE_VALUES
    quantized = MaxMin(3, 64).wire_bytes(1200) + MaxMin(3, 64).wire_bytes(288)
    assert sum(on_ranks(2, work, efx_bits=3)) == 2 * gathered + quantized  # each encodes the other's shard

    drawn = RandomK(0.05).kept(1200) + RandomK(0.05).kept(288)
    assert on_ranks(2, work, efx_randk=0.05) == [gathered + 4 * drawn] * 2


@pytest.mark.parametrize("world_size", [1, 3])
def test_dropped_values_at_the_drawn_positions_reach_the_average(world_size: int) -> None:
    def work(bound: TopKAverager, rank: int) -> list[Tensor]:
        return [average(bound, gradient(rank), step) for step in range(2)]

    full = mean([gradient(rank) for rank in range(world_size)])
    only_top_k = mean([sparsified(gradient(rank), 0.01) for rank in range(world_size)])
    first, *others = on_ranks(world_size, work, efx_randk=0.2)
    drawn = []
    for seen in first:
        complete = (seen - full).abs() < 1e-6
        assert torch.equal(seen[~complete], only_top_k[~complete])
        sampled = complete[PLACES["wide"]].sum() - ((only_top_k - full).abs() < 1e-6)[PLACES["wide"]].sum()
        assert 240 - 12 * world_size <= sampled <= 240  # of 1,200, less those that the top-k took as well
        drawn.append(complete)
    assert not torch.equal(*drawn)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("options", [{"efx_bits": 2}, {"efx_randk": 0.1}, {"big_grad": True}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["topk", "topk_rmsprop"])
def test_what_is_not_finite_reaches_every_rank(name: str, options: dict[str, Any], bad: float) -> None:
    def work(bound: TopKAverager, rank: int) -> Tensor:
        values = gradient(rank)
        if rank == 1:
            values[PLACES["conv"].start + 100] = bad
        gradients, flat = side_by_side(values)
        bound.average_(gradients, 0)
        return flat

    for seen in on_ranks(2, work, name, **options):
        assert not seen[1200 + 100].isfinite()


def test_layers_that_are_all_dense_travel_alone() -> None:
    def work(ranks: ThreadCollectives) -> Tensor:
        flat = gradient(ranks.rank, count=40)
        bind("topk", ranks, efx_randk=0.1).average_(Gradients(flat, ("bias",), (0,)), 0)
        return flat

    for seen in run_ranks(2, work):
        assert torch.equal(seen, mean([gradient(0, count=40), gradient(1, count=40)]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0}, "TopK keeps a fraction of the values above 0 and at most 1, got ratio=0"),
        ({"efx_bits": 9}, "MaxMin codes are 1 to 8 bits wide, got bits=9"),
        ({"efx_randk": 1.5}, "RandomK sends a fraction of the values above 0 and at most 1, got fraction=1.5"),
        ({"efx_bits": 2, "efx_randk": 0.1}, "one fate: choose one of efx_bits and efx_randk"),
        ({"error_feedback": True, "efx_bits": 2}, "one fate: choose one of error_feedback and efx_bits"),
    ],
)
def test_options_out_of_range_or_at_odds_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build("topk", **options)
