"""Layers that travel by families: each as if its family were alone, all ranks alike, and at the bytes promised."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch

from compression import DENSE, Collectives, Metered, Mixed, Solo, build, codec, mixed
from compression.averagers import Averager, Hierarchical, Routed, WarmUp
from compression.exchange.engine import Engine
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.hosts import Hosts
from compression.network.inside import Levels, OverNetwork
from compression.network.threads import Counting, ThreadCollectives, ThreadLevels, run_hosts, run_ranks
from compression.network.torch_distributed import TorchDistributed
from compression.streams import Meanwhile
from tests.support import gloo_ranks

SHAPES = {"conv": (13, 3, 3, 3), "norm": (13,), "wide": (40, 65), "fc": (7, 91), "deep": (24, 40), "last": (40, 16)}
SHAPES |= {"bias": (40,), "head": (16, 10)}
LAYERS = layers_of(SHAPES.items(), 64)
SIZES = {layer.name: layer.numel for layer in LAYERS}
STARTS = {name: sum(list(SIZES.values())[:place]) for place, name in enumerate(SIZES)}
VALUES = sum(SIZES.values())
FEEDBACK = {"bucket_size": 64, "error_feedback": True}
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "conv": ("maxmin", {"bits": 3, **FEEDBACK}),
    "wide": ("topk", {"ratio": 0.05, **FEEDBACK}),
    "fc": ("powersgd", {"rank": 2, "bucket_size": 64}),
    "deep": ("eden", {"bits": 2, **FEEDBACK}),
    "last": ("maxmin", {"bits": 5, **FEEDBACK}),
}
FAMILIES = {
    "eden(bucket_size=64, error_feedback=True)": ["deep"],
    "maxmin(bucket_size=64, error_feedback=True)": ["conv", "last"],
    "none": ["norm", "bias", "head"],
    "powersgd(rank=2, bucket_size=64)": ["fc"],
    "topk(ratio=0.05, bucket_size=64, error_feedback=True)": ["wide"],
}
MIXED = mixed(ROUTES)
PARTS = [("conv", "norm", "wide"), ("fc", "deep"), ("last", "bias", "head")]  # buffers, as DDP makes them


def gradient(rank: int, step: int) -> torch.Tensor:
    return torch.randn(VALUES, generator=torch.Generator().manual_seed(97 * step + rank))


def buffer(flat: torch.Tensor, names: tuple[str, ...] = tuple(SIZES)) -> Gradients:
    """Layers of a whole gradient, side by side."""
    return Gradients.packed({name: flat[STARTS[name] : STARTS[name] + SIZES[name]] for name in names})


def averages_of(averager: Averager, rank: int, first: int = 0, last: int = 3) -> list[torch.Tensor]:
    """The averages of some steps, each as a whole gradient."""
    averages = []
    for step in range(first, last):
        parts = [buffer(gradient(rank, step), names) for names in PARTS]
        for part in parts:
            averager.average_(part, step)
        averager.settle(True)
        averages.append(torch.cat([part.flat for part in parts]))
    return averages


def bound(network: Collectives, compressor: Mixed = MIXED) -> Averager:
    return compressor.averager(LAYERS, network, seed=3)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_get_the_bits_that_each_family_alone_would_give(world_size: int) -> None:
    """The bits of a layer depend on its own family only, so a mix is the sum of its families."""

    def alone(name: str, ranks: ThreadCollectives) -> torch.Tensor:
        family, options = ROUTES.get(name, ("none", {}))
        own = [layer for layer in LAYERS if layer.name == name]
        averager, averages = build(family, **options).averager(own, ranks, seed=3), []
        for step in range(3):
            part = buffer(gradient(ranks.rank, step), (name,))
            averager.average_(part, step)
            averager.settle(True)
            averages.append(part.flat)
        return torch.stack(averages)

    first, *others = run_ranks(world_size, lambda ranks: torch.stack(averages_of(bound(ranks), ranks.rank)))
    assert all(torch.equal(first, other) for other in others)
    for name in SHAPES:
        expected = run_ranks(world_size, partial(alone, name))[0]
        assert torch.equal(first[:, STARTS[name] : STARTS[name] + SIZES[name]], expected), name


def test_layers_are_grouped_by_everything_but_bits() -> None:
    averager = bound(Solo())
    assert isinstance(averager, Routed)
    assert {name: [layer for layer in SHAPES if averager.family_of[layer] == name] for name in averager.families} == (
        FAMILIES
    )
    assert dict(averager.widths) == {"conv": 3, "last": 5, "deep": 2}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_it_sends_what_it_promises(world_size: int) -> None:
    def work(ranks: ThreadCollectives) -> tuple[float, float, float]:
        network = Counting.of(ranks)
        metered = Metered(network)
        bound(metered).average_(buffer(gradient(ranks.rank, 0)), 0)
        return metered.traffic.bytes_sent, network.messages, network.rounds

    promised = bound(Solo()).sent(LAYERS, world_size)
    nbytes, messages, rounds = zip(*run_ranks(world_size, work), strict=True)
    assert sum(nbytes) / world_size == pytest.approx(promised.total)
    assert sum(messages) / world_size == pytest.approx(promised.messages)
    assert max(rounds) == promised.rounds
    alone = [
        build(name, **options).averager([layer], Solo(), 0)
        for layer in LAYERS
        for name, options in [ROUTES.get(layer.name, ("none", {}))]
    ]
    expected = sum(each.bytes_sent([layer], world_size) for each, layer in zip(alone, LAYERS, strict=True))
    assert promised.total == pytest.approx(expected)


def test_widths_change_what_is_sent_and_are_those_of_families_that_have_any() -> None:
    averager = bound(Solo())
    before = averager.bytes_sent(LAYERS, 2)
    averager.set_widths({"conv": 8, "last": DENSE})
    assert dict(averager.widths) == {"conv": 8, "last": DENSE, "deep": 2}
    three, five, eight = (codec("maxmin", bits=bits, bucket_size=64) for bits in (3, 5, 8))
    more = eight.wire_bytes(351) - three.wire_bytes(351) + 4 * 640 - five.wire_bytes(640)
    assert averager.bytes_sent(LAYERS, 2) - before == more
    conv, deep = (layer for layer in LAYERS if layer.name in ("conv", "deep"))
    alone = build("eden", bucket_size=64).averager([deep], Solo(), 0)
    assert averager.encoded_bytes_at([deep], 4, 2) == alone.encoded_bytes_at([deep], 4, 2)
    with pytest.raises(ValueError, match="has no bit widths"):
        averager.set_widths({"wide": 4})
    with pytest.raises(ValueError, match="nowhere is not a compressed layer"):
        averager.set_widths({"nowhere": 4})
    with pytest.raises(ValueError, match="has no bit widths to measure"):
        averager.encoded_bytes_at([conv, *(layer for layer in LAYERS if layer.name == "wide")], 4, 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_each_family_owes_and_what_was_applied_add_up(world_size: int) -> None:
    steps = 6

    def work(ranks: ThreadCollectives) -> tuple[torch.Tensor, torch.Tensor]:
        averager = bound(ranks)
        assert isinstance(averager, Routed)
        total = torch.stack(averages_of(averager, ranks.rank, 0, steps)).sum(0)
        owed = torch.zeros(VALUES)
        for family, state in averager.state_dict().items():
            for name, values in state["residual"].items():
                assert name in FAMILIES[family]
                owed[STARTS[name] : STARTS[name] + SIZES[name]] += values / world_size
            for name, values in state.get("share_residual", {}).items():
                start, stop = averager.families[family].shards[name][ranks.rank]  # type: ignore[attr-defined]
                owed[STARTS[name] + start : STARTS[name] + stop] += values
        ranks.sum_(owed)
        return total, owed

    applied, owed = run_ranks(world_size, work)[0]
    true = sum(gradient(rank, step) for rank in range(world_size) for step in range(steps)) / world_size
    assert isinstance(true, torch.Tensor)
    assert torch.allclose(applied + owed, true, atol=2e-5)
    for name in ROUTES:
        assert owed[STARTS[name] : STARTS[name] + SIZES[name]].any(), name


def test_state_is_kept_by_family_and_layer_and_resumes_exactly() -> None:
    def work(ranks: ThreadCollectives) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, Any]]:
        whole = averages_of(bound(ranks), ranks.rank, 0, 4)
        begun, resumed = bound(ranks), bound(ranks)
        averages_of(begun, ranks.rank, 0, 2)
        resumed.load_state_dict(begun.state_dict())
        return whole[2:], averages_of(resumed, ranks.rank, 2, 4), begun.state_dict()

    for whole, resumed, state in run_ranks(2, work):
        assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))
        kept = {family: sorted(layers["residual"]) for family, layers in state.items()}
        assert kept == {family: sorted(layers) for family, layers in FAMILIES.items() if family != "none"}


def test_state_of_other_routes_is_refused() -> None:
    state = bound(Solo()).state_dict()
    other = mixed({**ROUTES, "wide": ROUTES["deep"]})
    with pytest.raises(ValueError, match=r"state of topk\(.*\), by which no layer .*; resume with the routes"):
        bound(Solo(), other).load_state_dict({**state, next(reversed(FAMILIES)): {}})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_reaches_every_rank_and_no_residual(bad: float) -> None:
    def flat_state(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {
            f"{family}/{kind}/{name}": values
            for family, kinds in state.items()
            for kind, layers in kinds.items()
            if isinstance(layers, dict)
            for name, values in layers.items()
        }

    def work(ranks: ThreadCollectives) -> list[tuple[bool, bool]]:
        averager, seen = bound(ranks), []
        averages_of(averager, ranks.rank, 0, 2)
        before = flat_state(averager.state_dict())
        for name in SHAPES:
            values = gradient(ranks.rank, 2)
            if ranks.rank == 1:
                values[STARTS[name] + 5] = bad
            part = buffer(values)
            averager.average_(part, 2)
            averager.settle(False)
            after = flat_state(averager.state_dict())
            own = part.flat[STARTS[name] : STARTS[name] + SIZES[name]]
            seen.append((bool(own.isfinite().all()), all(torch.equal(before[key], after[key]) for key in before)))
        return seen

    for seen in run_ranks(2, work):
        assert seen == [(False, True)] * len(SHAPES)


@pytest.mark.parametrize("grid", [(2, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("matrices", [True, False])
def test_between_hosts_layers_are_cut_as_the_strictest_family_has_it(grid: tuple[int, int], matrices: bool) -> None:
    compressor = MIXED if matrices else mixed({name: way for name, way in ROUTES.items() if way[0] != "powersgd"})
    hosts = Hosts.named([rank % grid[0] for rank in range(grid[0] * grid[1])])

    def work(levels: ThreadLevels) -> tuple[list[torch.Tensor], list[torch.Tensor], float, float]:
        between = Metered(levels.between)

        def in_levels() -> Averager:
            averager = compressor.hierarchical(LAYERS, Levels(OverNetwork(levels.inside), between), seed=3)
            assert isinstance(averager, Hierarchical)
            assert averager.ownership == ("layers" if matrices else "slices")
            return averager

        rank = levels.everyone.rank
        averager, resumed = in_levels(), in_levels()
        averager.set_widths({"conv": 7})
        counted = between.traffic.bytes_sent
        averager.average_(buffer(gradient(rank, 9)), 9)
        counted, promised = between.traffic.bytes_sent - counted, averager.sent(LAYERS, grid[0] * grid[1]).total
        averager.settle(False)
        averager.set_widths({"conv": 3})
        averages = averages_of(averager, rank, 0, 2)
        resumed.load_state_dict(averager.state_dict())
        return [*averages, *averages_of(averager, rank, 2, 4)], averages_of(resumed, rank, 2, 4), counted, promised

    results = run_hosts(hosts, work)
    for whole, resumed, *_ in results:
        assert all(torch.equal(one, other) for one, other in zip(whole, results[0][0], strict=True))
        assert all(torch.equal(one, other) for one, other in zip(whole[2:], resumed, strict=True))
    assert sum(counted for *_, counted, _ in results) / len(results) == pytest.approx(results[0][3])


def test_a_warm_up_promises_to_overlap_and_does_so_once_it_is_over() -> None:
    """While one family still adds up float32, which waits for all ranks, no other buffer may begin."""
    options = {**FEEDBACK, "warmup_steps": 2}
    assert build("maxmin", **options).averager(LAYERS, Solo(), 0).overlaps
    routes = {"conv": ("maxmin", options), "wide": ("eden", FEEDBACK)}
    layers = [layer for layer in LAYERS if layer.name in routes]
    averager = mixed(routes).averager(layers, Solo(), 0)
    assert averager.overlaps
    for step, others_begin in ((0, False), (1, False), (2, True)):
        found = buffer(gradient(0, step), tuple(routes))
        yielded = set(averager.post(found, step)(found))
        assert (Meanwhile.OTHERS_BEGIN in yielded) == others_begin
        assert averager.overlaps == others_begin


def test_each_family_warms_up_by_itself() -> None:
    routes = {"conv": ("maxmin", {**FEEDBACK, "warmup_steps": 2}), "wide": ROUTES["wide"]}
    compressor = mixed(routes)

    def work(ranks: ThreadCollectives) -> list[torch.Tensor]:
        averager = bound(ranks, compressor)
        assert isinstance(averager, Routed)
        assert any(isinstance(each, WarmUp) for each in averager.families.values())
        return averages_of(averager, ranks.rank, 0, 3)

    averages = run_ranks(2, work)[0]
    conv = slice(STARTS["conv"], STARTS["conv"] + SIZES["conv"])
    exact = [
        torch.allclose(average[conv], (gradient(0, step) + gradient(1, step))[conv] / 2, atol=1e-6)
        for step, average in enumerate(averages)
    ]
    assert exact == [True, True, False]


@pytest.mark.parametrize("blocking", ["topk", "powersgd", "none"])
def test_no_other_buffer_begins_where_a_family_waits_for_other_ranks(blocking: str) -> None:
    """One that began could wait in a sum for a rank which waits for this buffer's second hop."""
    quantizers = mixed({name: ROUTES[name] for name in ("conv", "deep")}, ROUTES["last"])
    others = {} if blocking == "none" else {"wide": (blocking, {"bucket_size": 64})}
    waiting = mixed({**others, "conv": ROUTES["conv"]}, ("none", {}) if blocking == "none" else ROUTES["last"])

    class ByTag(Metered):
        def matched_by_tag(self, device: torch.device) -> bool:
            return True

    for compressor, overlaps in ((quantizers, True), (waiting, False)):
        averager, part = bound(ByTag(Solo()), compressor), buffer(gradient(0, 0))
        said = list(averager.post(part, 0)(part))
        assert (Meanwhile.OTHERS_BEGIN in said) is overlaps
        assert len(said) >= 2


def test_buffers_overlap_on_a_real_network_and_end_with_the_same_bits(tmp_path: Any) -> None:
    """Families whose order counts, and others whose messages pass one another, in many buffers at once."""
    (first, second), _ = gloo_ranks.run(__file__, 2, tmp_path)
    assert torch.equal(first, second)
    expected = run_ranks(2, lambda ranks: torch.stack(averages_of(bound(ranks), ranks.rank, 0, 6)))[0]
    assert torch.equal(first, expected)


def through_an_engine(rank: int, folder: Any) -> torch.Tensor:
    averager, averages = bound(TorchDistributed()), []
    engine = Engine(torch.device("cpu"), lambda urgent: urgent)
    for step in range(6):
        parts = [buffer(gradient(rank, step), names) for names in PARTS]
        for part in parts:
            averaging_of_part = averager.post(part, step)
            engine.submit(partial(averaging_of_part, part))
        engine.wait()
        averager.settle(True)
        averages.append(torch.cat([part.flat for part in parts]))
    engine.close()
    return torch.stack(averages)


if __name__ == "__main__":
    gloo_ranks.as_rank(through_an_engine)
