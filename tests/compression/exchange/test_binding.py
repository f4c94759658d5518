"""Bindings: what other compressors would send over the same ranks is what they do send there."""

from typing import Any

import pytest
import torch

from compression import Metered, build, mixed
from compression.exchange.binding import Binding
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.arrangement import Arrangement
from compression.network.hosts import Hosts
from compression.network.inside import Levels, OverNetwork
from compression.network.threads import ThreadCollectives, ThreadLevels, run_hosts, run_ranks

SMALL = {"bucket_size": 64}
LAYERS = layers_of({"conv": (13, 3, 3, 3), "norm": (13,), "wide": (40, 65), "fc": (7, 91)}.items(), 64)
COMPRESSORS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("none", {"dense_dtype": "bfloat16"}),
    ("maxmin", {"bits": 3, **SMALL}),
    ("eden", {"bits": 2, **SMALL}),
    ("quantile", SMALL),
    ("topk", {"ratio": 0.05, **SMALL}),
    ("powersgd", {"rank": 2, **SMALL}),
]


def average(averager: Any, rank: int) -> None:
    names, sizes = tuple(layer.name for layer in LAYERS), [layer.numel for layer in LAYERS]
    flat = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(rank))
    averager.average_(Gradients(flat, names, tuple(sum(sizes[:k]) for k in range(len(sizes)))), 0)


@pytest.mark.parametrize(("name", "options"), COMPRESSORS, ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_flat_they_send_the_bytes_that_they_would(name: str, options: dict[str, Any], world_size: int) -> None:
    def work(ranks: ThreadCollectives) -> tuple[dict[str, int], float]:
        arrangement = Arrangement(ranks, Hosts.single(ranks.world_size))
        binding = Binding(build("maxmin", **SMALL), LAYERS, arrangement, 0)
        metered = Metered(ranks)
        average(build(name, **options).averager(LAYERS, metered, 0), ranks.rank)
        return binding.encoded_bytes_by(build(name, **options)), metered.traffic.bytes_sent

    promised, sent = zip(*run_ranks(world_size, work), strict=True)
    rounded_up = len(LAYERS) / 2 if name == "topk" and world_size % 2 else 1e-6  # half a byte a layer
    assert all(each == promised[0] for each in promised)
    assert -1e-6 <= sum(promised[0].values()) - sum(sent) / (2 * (world_size - 1)) <= rounded_up


@pytest.mark.parametrize(("name", "options"), COMPRESSORS, ids=str)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("grid", [(2, 2), (4, 2), (2, 3)], ids=str)
def test_between_hosts_they_do_too(name: str, options: dict[str, Any], whole: bool, grid: tuple[int, int]) -> None:
    hosts = Hosts.named([rank % grid[0] for rank in range(grid[0] * grid[1])])
    whole = whole or name == "powersgd"  # which needs matrices, as a mix with it does

    def work(levels: ThreadLevels) -> tuple[dict[str, int], float]:
        between = Metered(levels.between)
        networks = Levels(OverNetwork(levels.inside), between)
        start = mixed({}, ("maxmin", SMALL), whole_layers=whole)
        binding = Binding(start, LAYERS, Arrangement(levels.everyone, hosts, networks), 0)
        other = mixed({}, (name, options), whole_layers=whole)
        average(other.hierarchical(LAYERS, networks, 0), levels.everyone.rank)
        return binding.encoded_bytes_by(build(name, **options)), between.traffic.bytes_sent

    promised, sent = zip(*run_hosts(hosts, work), strict=True)
    assert all(each == promised[0] for each in promised)
    assert sum(promised[0].values()) == pytest.approx(sum(sent) / (2 * (grid[0] - 1)), rel=1e-12)
