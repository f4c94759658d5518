"""Two levels: hosts average in codes what their ranks have added up, with every compressor of the registry."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from compression import COMPRESSORS, DENSE, Collectives, Layer, Metered, Solo, build, with_bits
from compression.averagers import Averager, Hierarchical, TwoHop
from compression.averagers.base import Sent
from compression.exchange.flat_gradient import FlatGradient
from compression.gradients import Gradients
from compression.layers import layers_of, owned_slices
from compression.network.hosts import Hosts
from compression.network.inside import Levels as Networks
from compression.network.inside import OverNetwork
from compression.network.threads import Counting, ThreadCollectives, ThreadLevels, run_hosts, run_ranks

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
    ("none", {"dense_dtype": "bfloat16"}),
    ("maxmin", {"bucket_size": 64, "dense_dtype": "bfloat16"}),
    ("powersgd", {"bucket_size": 64, "dense_dtype": "bfloat16"}),
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
    levels: ThreadLevels, name: str, options: Mapping[str, Any], between: Collectives | None = None
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
    def work(levels: ThreadLevels) -> list[torch.Tensor]:
        return averages_of(bound(levels, name, options), lambda step: gradient(levels.everyone.rank, step))

    first, *others = run_hosts(hosts_of(grid), work)
    assert any(average.any() for average in first)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert torch.equal(mine, theirs)


@every_variant
@pytest.mark.parametrize("grid", [(2, 2), (3, 3)], ids=str)
def test_it_sends_the_bytes_that_it_promises(name: str, options: dict[str, Any], grid: tuple[int, int]) -> None:
    """Between hosts; what ranks of a host give one another crosses no link."""
    hosts, ranks_per_host = grid

    def work(levels: ThreadLevels) -> tuple[float, float, float]:
        between = Metered(levels.between)
        averager = bound(levels._replace(between=between), name, options)
        step = options.get("warmup_steps", 0)
        averager.average_(laid_out(gradient(levels.everyone.rank, step)), step)
        promised = averager.sent(LAYERS, hosts * ranks_per_host)
        return between.traffic.bytes_sent, between.traffic.bytes_between_hosts, promised.total

    counted, crossed, promised = zip(*run_hosts(hosts_of(grid), work), strict=True)
    assert sum(counted) / len(counted) == pytest.approx(promised[0])
    assert crossed == counted
    assert len(set(promised)) == 1
    if name != "quantile":  # whose owners send a table of levels each
        one_rank_a_host = build(name, **options).averager(LAYERS, Solo(), 0).sent(LAYERS, hosts).total
        assert ranks_per_host * promised[0] == pytest.approx(one_rank_a_host, rel=0.1)  # top-k rounds up in each slice


@pytest.mark.parametrize("ownership", ["slices", "layers", "one"])
def test_every_value_has_one_owner(ownership: str) -> None:
    owned = owned_slices(LAYERS, 64, 3, ownership)
    for name, slices in owned.items():
        owners = [sum(start <= value < stop for start, stop in slices) for value in range(SIZES[name])]
        assert owners == [1] * SIZES[name]
        assert all(start % 64 == 0 for start, stop in slices if start < stop)


def test_whole_layers_are_spread_by_size() -> None:
    layers = layers_of([(f"layer{k}", (10 * (k + 1), 10)) for k in range(9)], 64)
    owned = owned_slices(layers, 64, 3, "layers")
    held = [sum(slices[place][1] - slices[place][0] for slices in owned.values()) for place in range(3)]
    assert max(held) / min(held) < 1.2


def test_slices_are_balanced() -> None:
    layers = layers_of([(f"layer{k}", (37, 97)) for k in range(11)] + [("large", (370, 97))], 64)
    owned = owned_slices(layers, 64, 4, "slices")
    held = [sum(slices[place][1] - slices[place][0] for slices in owned.values()) for place in range(4)]
    assert max(held) / min(held) < 1.1


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_one_owner_averages_as_the_hosts_alone_would(grid: tuple[int, int]) -> None:
    """With `big_grad` the first rank of a host owns all: the bits are those of the hosts' means, averaged flat."""
    options = {"bucket_size": 64, "big_grad": True, "error_feedback": True}
    hosts = hosts_of(grid)

    def mean_of_host(host: int, step: int) -> torch.Tensor:
        total = torch.zeros(VALUES)
        for place, rank in enumerate(hosts.inside[host]):
            part = gradient(rank, step) * (1.0 / grid[1])
            total = part if place == 0 else total + part
        return total

    def in_levels(levels: ThreadLevels) -> list[torch.Tensor]:
        return averages_of(bound(levels, "maxmin", options), lambda step: gradient(levels.everyone.rank, step))

    def flat(ranks: ThreadCollectives) -> list[torch.Tensor]:
        averager = build("maxmin", **options).averager(LAYERS, ranks, seed=3)
        return averages_of(averager, lambda step: mean_of_host(ranks.rank, step))

    for ours, expected in zip(run_hosts(hosts, in_levels)[0], run_ranks(grid[0], flat)[0], strict=True):
        assert torch.equal(ours, expected)


def averages_of(averager: Averager, gradient_of: Callable[[int], torch.Tensor], steps: int = 3) -> list[torch.Tensor]:
    averages = []
    for step in range(steps):
        gradients = laid_out(gradient_of(step))
        averager.average_(gradients, step)
        averager.settle(True)
        averages.append(gradients.flat.clone())
    return averages


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("maxmin", {"bucket_size": 64, "bits": 2, "error_feedback": True}),
        ("1bit", {"bucket_size": 64}),
        ("topk", {"bucket_size": 64, "ratio": 0.05, "error_feedback": True}),
        ("svd", {"bucket_size": 64, "rank": 2, "error_feedback": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_residuals_account_for_every_loss(name: str, options: dict[str, Any], grid: tuple[int, int]) -> None:
    """The sum of averages and what owners still owe is the sum of the true means, up to rounding."""
    hosts, ranks_per_host = grid
    steps = 5

    def work(levels: ThreadLevels) -> torch.Tensor:
        averager = bound(levels, name, options)
        total = sum(averages_of(averager, lambda step: gradient(levels.everyone.rank, step), steps))
        assert isinstance(total, torch.Tensor)
        assert isinstance(averager, Hierarchical)
        owed = {layer: torch.zeros(SIZES[layer]) for layer in SIZES}
        state = averager.state_dict()
        place = levels.inside.rank
        for layer, values in state["residual"].items():
            start, stop = averager.owned[layer][place]
            owed[layer][start:stop] += values / hosts
        for layer, values in state.get("share_residual", {}).items():
            first, _ = averager.owned[layer][place]
            assert isinstance(averager.inner, TwoHop)
            start, stop = averager.inner.shards[layer][levels.between.rank]
            owed[layer][first + start : first + stop] += values
        everywhere = laid_out(torch.cat(list(owed.values()))).flat.clone()
        levels.everyone.sum_(everywhere)
        return total + everywhere

    true = sum(laid_out(gradient(rank, step)).flat.clone() for rank in range(hosts * ranks_per_host)
               for step in range(steps)) / (hosts * ranks_per_host)
    assert isinstance(true, torch.Tensor)
    for accounted in run_hosts(hosts_of(grid), work):
        assert torch.allclose(accounted, true, atol=2e-5)


@every_variant
def test_state_resumes_exactly(name: str, options: dict[str, Any]) -> None:
    def work(levels: ThreadLevels) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        def run(averager: Averager, first: int, last: int) -> list[torch.Tensor]:
            averages = []
            for step in range(first, last):
                gradients = laid_out(gradient(levels.everyone.rank, step))
                averager.average_(gradients, step)
                averager.settle(True)
                averages.append(gradients.flat.clone())
            return averages

        whole = run(bound(levels, name, options), 0, 4)
        begun = bound(levels, name, options)
        run(begun, 0, 2)
        resumed = bound(levels, name, options)
        resumed.load_state_dict(begun.state_dict())
        return whole[2:], run(resumed, 2, 4)

    for whole, resumed in run_hosts(hosts_of((2, 3)), work):
        assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))


@every_variant
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_reaches_every_rank_and_no_residual(
    name: str, options: dict[str, Any], bad: float
) -> None:
    def work(levels: ThreadLevels) -> tuple[bool, bool]:
        averager = bound(levels, name, options)
        averages_of(averager, lambda step: gradient(levels.everyone.rank, step), 2)
        before = {key: dict(values) if isinstance(values, dict) else values
                  for key, values in averager.state_dict().items()}
        values = gradient(levels.everyone.rank, 2)
        if levels.everyone.rank == 3:
            values[100] = bad  # of the layer "conv"
        gradients = laid_out(values)
        averager.average_(gradients, 2)
        averager.settle(False)
        after = averager.state_dict()
        kept = all(
            torch.equal(torch.as_tensor(values), torch.as_tensor(after[key][layer]))
            for key, layers in before.items() if isinstance(layers, dict)
            for layer, values in layers.items()
        )
        return bool(torch.isfinite(gradients.flat).all()), kept

    for finite, kept in run_hosts(hosts_of((2, 2)), work):
        assert not finite
        assert kept


def test_widths_are_set_on_slices_as_on_layers() -> None:
    def work(levels: ThreadLevels) -> tuple[dict[str, int], float, float]:
        between = Metered(levels.between)
        averager = bound(levels._replace(between=between), "maxmin", {"bucket_size": 64})
        averager.set_widths({"conv": 8, "wide": 2, "fc": DENSE})
        averager.average_(laid_out(gradient(levels.everyone.rank, 0)), 0)
        return dict(averager.widths), between.traffic.bytes_sent, averager.sent(LAYERS, 4).total

    widths, counted, promised = zip(*run_hosts(hosts_of((2, 2)), work), strict=True)
    assert widths[0] == {"conv": 8, "norm": DENSE, "wide": 2, "bias": DENSE, "fc": DENSE}
    assert all(each == widths[0] for each in widths)
    assert sum(counted) / 4 == pytest.approx(promised[0])


def test_noise_of_owners_is_independent() -> None:
    """Two owners' slices of one and the same values are not rounded alike."""
    layers = (Layer(0, "layer", (128, 64), True),)

    def work(levels: ThreadLevels) -> torch.Tensor:
        networks = Networks(OverNetwork(levels.inside), levels.between)
        averager = build("maxmin", bits=2, bucket_size=64).hierarchical(layers, networks, seed=0)
        flat = gradient(0, 0)[:64].repeat(128)
        averager.average_(Gradients(flat, ("layer",), (0,)), 0)
        return flat

    first, second = run_hosts(hosts_of((2, 2)), work)[0].chunk(2)
    assert not torch.equal(first, second)


@every_variant
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_owners_send_what_is_promised(name: str, options: dict[str, Any], grid: tuple[int, int]) -> None:
    """The owners of one place, as a mean over hosts; and all ranks, as a mean over them."""

    def work(levels: ThreadLevels) -> tuple[int, float, float, float]:
        network = Counting.of(levels.between)
        between = Metered(network)
        averager = bound(levels, name, options, between)
        averager.average_(laid_out(gradient(0, 0)), step=options.get("warmup_steps", 0))
        return levels.inside.rank, between.traffic.bytes_sent, network.messages, network.rounds

    def promised(levels: ThreadLevels) -> tuple[Sent, list[Sent]]:
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


@pytest.mark.parametrize("grid", [(2, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("name", with_bits())
def test_bytes_at_a_width_are_those_that_cross_the_links(name: str, grid: tuple[int, int]) -> None:
    """A host sends 2 (H - 1) / H of what its owners encode."""
    hosts, ranks = grid[0], grid[0] * grid[1]

    def work(levels: ThreadLevels) -> tuple[float, int]:
        between = Metered(levels.between)
        averager = bound(levels, name, {"bucket_size": 64}, between)
        averager.set_widths({"conv": 8, "wide": 2, "fc": 2})
        averager.average_(laid_out(gradient(levels.everyone.rank, 0)), 0)
        conv, norm, wide, bias, fc = LAYERS
        of_width = {8: [conv], 2: [wide, fc], DENSE: [norm, bias]}
        promised = [averager.encoded_bytes_at(layers, bits, ranks) for bits, layers in of_width.items()]
        return between.traffic.bytes_sent, sum(map(sum, promised))

    counted, promised = zip(*run_hosts(hosts_of(grid), work), strict=True)
    assert sum(counted) == 2 * (hosts - 1) * promised[0]
    assert len(set(promised)) == 1
