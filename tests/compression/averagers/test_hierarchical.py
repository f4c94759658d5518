"""Two levels: hosts average in codes what their ranks have added up, with every compressor of the registry."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from compression import COMPRESSORS, Collectives, Metered, build
from compression.averagers import Hierarchical
from compression.averagers.base import Sent
from compression.exchange.flat_gradient import FlatGradient
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.hosts import Hosts
from compression.network.inside import Levels as Networks
from compression.network.inside import OverNetwork
from tests.support.threads import Counting, Levels, run_hosts

SHAPES = {"conv": (13, 3, 3, 3), "norm": (13,), "wide": (40, 65), "bias": (40,), "fc": (7, 91)}  # odd sizes
LAYERS = layers_of(SHAPES.items(), 64)
SIZES = {layer.name: layer.numel for layer in LAYERS}
VALUES = sum(SIZES.values())
GRIDS = [(2, 2), (3, 2), (2, 3), (3, 3)]  # hosts x ranks a host
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"bucket_size": 64} if "bucket_size" in row.takes else {}) for name, row in COMPRESSORS.items()
      if row.encodes),
    ("maxmin", {"bucket_size": 64, "error_feedback": True}),
    ("maxmin", {"bucket_size": 64, "error_feedback": True, "big_grad": True}),
    ("maxmin", {"bucket_size": -1}),
    ("maxmin", {"bucket_size": 64, "warmup_steps": 1}),
    ("topk", {"bucket_size": 64, "ratio": 0.05, "error_feedback": True}),
    ("topk", {"bucket_size": 64, "efx_bits": 3}),
    ("topk", {"bucket_size": 64, "efx_randk": 0.1}),
    ("topk", {"bucket_size": 64, "big_grad": True}),
    ("svd", {"bucket_size": 64, "rank": 2, "error_feedback": True}),
    ("svd", {"bucket_size": 64, "rank": 2, "big_grad": True}),
    ("dgc", {"bucket_size": 64, "clip": 1.0, "warmup_steps": 4}),
]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)


def hosts_of(grid: tuple[int, int]) -> Hosts:
    """Hosts whose ranks are not in a row: rank % hosts."""
    return Hosts.named([rank % grid[0] for rank in range(grid[0] * grid[1])])


def bound(
    levels: Levels, name: str, options: Mapping[str, Any], between: Collectives | None = None
) -> Hierarchical:
    networks = Networks(OverNetwork(levels.inside), between or levels.between)
    averager = build(name, **options).hierarchical(LAYERS, networks, seed=3)
    assert isinstance(averager, Hierarchical)
    return averager


def gradient(rank: int, step: int) -> torch.Tensor:
    return torch.randn(VALUES, generator=torch.Generator().manual_seed(97 * step + rank))


def laid_out(flat: torch.Tensor) -> Gradients:
    """A model's gradients as all averagers take them: the compressed layers first."""
    starts, at = [], 0
    for size in SIZES.values():
        starts.append(at)
        at += size
    return FlatGradient(LAYERS).join([Gradients(flat, tuple(SIZES), tuple(starts))])


@every_variant
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_all_ranks_get_the_same_bits(name: str, options: dict[str, Any], grid: tuple[int, int]) -> None:
    def work(levels: Levels) -> list[torch.Tensor]:
        averager, averages = bound(levels, name, options), []
        for step in range(3):
            gradients = laid_out(gradient(levels.everyone.rank, step))
            averager.average_(gradients, step)
            averager.settle(True)
            averages.append(gradients.flat.clone())
        return averages

    first, *others = run_hosts(hosts_of(grid), work)
    assert any(average.any() for average in first)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert torch.equal(mine, theirs)


@every_variant
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_owners_send_what_is_promised(name: str, options: dict[str, Any], grid: tuple[int, int]) -> None:
    """The owners of one place, as a mean over hosts; and all ranks, as a mean over them."""

    def work(levels: Levels) -> tuple[int, float, float, float]:
        network = Counting.of(levels.between)
        between = Metered(network)
        averager = bound(levels, name, options, between)
        averager.average_(laid_out(gradient(0, 0)), step=options.get("warmup_steps", 0))
        return levels.inside.rank, between.traffic.bytes_sent, network.messages, network.rounds

    def promised(levels: Levels) -> tuple[Sent, list[Sent]]:
        averager = bound(levels, name, options)
        return averager.sent(LAYERS, grid[0] * grid[1]), averager.sent_by_place(LAYERS, grid[0] * grid[1])

    hosts = hosts_of(grid)
    counted, (all_ranks, by_place) = run_hosts(hosts, work), run_hosts(hosts, promised)[0]
    for place, sent in enumerate(by_place):
        _, nbytes, messages, rounds = zip(*(each for each in counted if each[0] == place), strict=True)
        assert sum(nbytes) / grid[0] == pytest.approx(sent.total)
        assert sum(messages) / grid[0] == pytest.approx(sent.messages)
        assert max(rounds) == sent.rounds
    _, nbytes, messages, rounds = zip(*counted, strict=True)
    assert sum(nbytes) / len(counted) == pytest.approx(all_ranks.total)
    assert sum(messages) / len(counted) == pytest.approx(all_ranks.messages)
    assert max(rounds) == all_ranks.rounds
