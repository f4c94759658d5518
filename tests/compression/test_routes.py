"""Mixes of compressors: what they are as a whole, what they refuse, and models that are attached to one."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import compression
from compression import Mixed, Solo, build, mixed
from compression.layers import layers_of
from compression.network.threads import ThreadCollectives, run_ranks
from compression.routes import label, squared_error

LAYERS = layers_of([("0.weight", (16, 20)), ("0.bias", (16,)), ("1.weight", (8, 16)), ("1.bias", (8,))], 64)
SMALL = {"bucket_size": 64}
FIRST = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 8))


def model() -> nn.Module:
    """The same in all threads, which share torch's generator."""
    return copy.deepcopy(FIRST)


def trained(compressor: Mixed, ranks: Any, steps: int = 4, **options: Any) -> tuple[torch.Tensor, compression.Attached]:
    """The weights after some steps on this rank's own examples."""
    module, losses = model(), torch.Generator().manual_seed(ranks.rank)
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    with compression.attach(module, compressor, ranks, **options) as exchange:
        for _ in range(steps):
            exchange.begin_step()
            module(torch.randn(5, 20, generator=losses)).square().mean().backward()
            finite = exchange.finish()
            optimizer.step()
            exchange.settle(finite)
            optimizer.zero_grad()
        while (finite := exchange.flush()) is not None:
            optimizer.step()
            exchange.settle(finite)
            optimizer.zero_grad()
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]), exchange


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_model_trains_and_replicas_stay_equal(world_size: int) -> None:
    compressor = mixed(
        {
            "0.weight": ("powersgd", {"rank": 2, **SMALL}),
            "1.weight": ("topk", {"ratio": 0.1, "error_feedback": True, **SMALL}),
        }
    )
    first, *others = [weights for weights, _ in run_ranks(world_size, lambda ranks: trained(compressor, ranks))]
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, torch.cat([p.detach().reshape(-1) for p in model().parameters()]))


def test_one_family_on_all_layers_is_that_compressor() -> None:
    options = {"bits": 3, "error_feedback": True, **SMALL}
    routes = dict.fromkeys(["0.weight", "1.weight"], ("maxmin", options))

    def both(ranks: ThreadCollectives) -> tuple[torch.Tensor, torch.Tensor]:
        routed, _ = trained(mixed(routes, ("maxmin", options)), ranks)
        alone, _ = trained(build("maxmin", **options), ranks)  # type: ignore[arg-type]
        return routed, alone

    for routed, alone in run_ranks(2, both):
        assert torch.equal(routed, alone)


def test_routes_change_between_steps_and_what_is_owed_goes_along() -> None:
    """Of every layer: the sum of what was applied and of what is owed is the sum of the gradients."""
    feedback = {"error_feedback": True, **SMALL}
    ways: list[tuple[str, dict[str, Any]]] = [
        ("maxmin", {"bits": 2, **feedback}),
        ("eden", {"bits": 2, **feedback}),
        ("maxmin", {"bits": 3, **feedback}),
        ("topk", {"ratio": 0.1, **feedback}),
        ("powersgd", {"rank": 1, **SMALL}),
        ("topk", {"ratio": 0.2, **feedback}),
    ]

    def work(ranks: ThreadCollectives) -> tuple[torch.Tensor, torch.Tensor]:
        module, applied, true = model(), torch.zeros(320), torch.zeros(320)
        generator = torch.Generator().manual_seed(ranks.rank)
        shares: dict[str, torch.Tensor] = {}
        owned: dict[str, tuple[int, int]] = {}
        with compression.attach(module, mixed({}, ways[0], whole_layers=True), ranks) as exchange:
            for number, way in enumerate(ways):
                exchange.reroute({"0.weight": way}, ("none", {}))
                if number == 3:  # from a quantizer: an owner owes of its averages, which nothing else knows
                    lost = torch.zeros(320)
                    for name, (start, stop) in owned.items():
                        lost[start:stop] += shares[name]
                    ranks.sum_(lost)
                    true -= lost
                for _ in range(2):
                    module.zero_grad()
                    exchange.begin_step()
                    (module[0].weight * (gradient := torch.randn(16, 20, generator=generator))).sum().backward()
                    exchange.settle(exchange.finish())
                    applied += module[0].weight.grad.reshape(-1)
                    ranks.sum_(total := gradient.reshape(-1).clone())
                    true += total / ranks.world_size
                (state,) = (each for each in exchange.averager.state_dict().values() if each)
                shares = state.get("share_residual", {})
                family = next(iter(exchange.averager.families.values()))
                owned = {name: family.shards[name][ranks.rank] for name in shares}
            owed = state["residual"]["0.weight"] / ranks.world_size
            ranks.sum_(owed)
        return applied + owed, true

    for accounted, true in run_ranks(2, work):
        assert torch.allclose(accounted, true, atol=1e-4)


def test_a_report_counts_on_where_routes_change() -> None:
    with compression.attach(model(), mixed({}, ("maxmin", SMALL)), Solo()) as exchange:
        compressor, before = exchange.compressor, exchange.averager
        assert isinstance(compressor, Mixed)
        for way in (("maxmin", {"bits": 2, **SMALL}), ("maxmin", {"bits": 8, **SMALL})):
            exchange.reroute({"0.weight": way}, ("none", {}))
            exchange.begin_step()
            exchange.finish()
        assert exchange.averager is not before
        assert exchange.report().bytes_sent == 0
    with (
        compression.attach(model(), "maxmin", Solo(), **SMALL) as exchange,  # type: ignore[arg-type]
        pytest.raises(ValueError, match="routes are those of a mix, and this exchange averages by maxmin"),
    ):
        exchange.reroute({}, ("none", {}))


def test_routes_keep_the_bucket_size() -> None:
    with (
        compression.attach(model(), mixed({}, ("maxmin", SMALL)), Solo()) as exchange,
        pytest.raises(ValueError, match="by one bucket_size, 64 here, got 512; attach anew"),
    ):
        exchange.reroute({"0.weight": ("maxmin", {})}, ("none", {}))


def test_an_encoding_loses_what_it_leaves_out() -> None:
    torch.manual_seed(0)
    layer, values = LAYERS[0], torch.randn(16, 20)
    low_rank = torch.randn(16, 1) @ torch.randn(1, 20)
    squares = values.square().reshape(-1).sort().values
    kept = build("topk", ratio=0.25, error_feedback=True, **SMALL)  # type: ignore[arg-type]
    assert squared_error(kept, layer, values) == pytest.approx(float(squares[:240].sum()), rel=1e-5)
    assert squared_error(build("none"), layer, values) == 0
    ranks = [squared_error(build("powersgd", rank=rank, bucket_size=64), layer, values) for rank in (1, 2, 4, 8)]
    assert ranks == sorted(ranks, reverse=True)
    assert squared_error(build("powersgd", rank=1, bucket_size=64), layer, low_rank) < 1e-8 * float(
        low_rank.square().sum()
    )
    for feedback in (False, True):
        quantized = build("eden", bits=3, error_feedback=feedback, **SMALL)  # type: ignore[arg-type]
        expected = quantized.codec_at(3).expected_squared_error(values, feedback)
        assert squared_error(quantized, layer, values) == expected


def test_averages_may_be_late_where_every_family_can_be() -> None:
    late = mixed({"0.weight": ("eden", {"bits": 3, "error_feedback": True, **SMALL})}, ("maxmin", SMALL))
    first, second = (
        weights for weights, _ in run_ranks(2, lambda ranks: trained(late, ranks, barrier_fraction=0.5, late_steps=2))
    )
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="mixed averages whole steps, and a broken barrier lets layers be late"):
        trained(mixed({"0.weight": ("topk", SMALL)}), Solo(), barrier_fraction=0.5)


def test_it_is_what_its_compressors_are_together() -> None:
    nothing, some = mixed({}), mixed({"0.weight": ("powersgd", SMALL)}, ("maxmin", SMALL))
    assert not nothing.encodes
    assert not nothing.sends_messages
    assert nothing.supports_stale_updates
    assert (nothing.bucket_size, some.bucket_size) == (512, 64)
    assert some.encodes
    assert some.needs_matrix
    assert some.error_feedback
    assert not some.supports_stale_updates
    assert mixed({"0.weight": ("topk", SMALL)}, ("maxmin", SMALL)).sends_messages
    assert not mixed({"0.weight": ("topk", SMALL)}, ("maxmin", SMALL)).needs_matrix


def test_families_are_named_by_all_options_but_bits() -> None:
    assert label(build("maxmin", bits=2)) == label(build("maxmin", bits=8)) == "maxmin"
    assert label(build("topk", ratio=0.02, error_feedback=True)) == "topk(ratio=0.02, error_feedback=True)"
    assert label(build("none")) == "none"


@pytest.mark.parametrize(
    ("routes", "error"),
    [
        ({"0.weight": ("topk", {"big_grad": True})}, "takes all gradients at once here; leave out its big_grad"),
        ({"0.weight": ("dgc", {"clip": 1.0})}, "dgc takes all gradients at once here"),
        ({"0.weight": ("topk", {}), "1.weight": ("eden", SMALL)}, "eden has 64 beside 512; give all of them the same"),
        ({"0.weight": ("nothing", {})}, "no compressor is called 'nothing'"),
        ({"0.weight": ("topk", {"bits": 2})}, "compressor topk takes no option 'bits'"),
    ],
)
def test_what_cannot_be_mixed_is_refused(routes: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        mixed(routes)


def test_a_route_of_no_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model has no layer 7\.weight, for which a route is given"):
        mixed({"7.weight": ("maxmin", {})}).averager(LAYERS, Solo(), 0)


def test_it_has_no_width_for_all_layers() -> None:
    with pytest.raises(ValueError, match="a mix of compressors has no bit width for all layers, got 4"):
        mixed({"0.weight": ("maxmin", SMALL)}).codec_at(4)


def test_ranks_route_alike() -> None:
    def work(ranks: ThreadCollectives) -> None:
        way = ("maxmin", SMALL) if ranks.rank else ("eden", SMALL)
        with pytest.raises(ValueError, match="all ranks choose alike, and routes is"):
            compression.attach(model(), mixed({"0.weight": way}), ranks)

    run_ranks(2, work)


def test_checksums_need_messages_of_every_family() -> None:
    with pytest.raises(ValueError, match="what mixed sends the network itself adds up"):
        compression.attach(model(), mixed({"0.weight": ("maxmin", SMALL)}), Solo(), verify_wire=True)
    sends = mixed({"0.weight": ("topk", SMALL)}, ("maxmin", SMALL))
    compression.attach(model(), sends, Solo(), verify_wire=True).close()
