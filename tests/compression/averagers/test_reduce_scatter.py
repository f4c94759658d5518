"""Averaging of shards: every rank gets the mean of its row, unbiased, in as many bytes as promised."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from compression import COMPRESSORS, DENSE, Collectives, Layer, Metered, build, mixed, with_bits
from compression.averagers import Averager, ReduceScatter, ReduceScatterInLevels
from compression.gradients import Gradients
from compression.layers import Pieces, compressible
from compression.network.hosts import Hosts
from compression.network.inside import Levels, OverNetwork
from compression.network.threads import Counting, ThreadCollectives, ThreadLevels, run_hosts, run_ranks
from compression.registry import with_reduce_scatter
from tests.support import quantizers

BUCKET = 64
SHAPES = {"wide": (7, 61), "bias": (5,), "thin": (2, 130), "conv": (5, 3, 3, 3), "scale": (), "fc": (12, 40)}
SHAPES["scale"] = (1,)
QUANTIZERS = [name for name, row in COMPRESSORS.items() if row.quantizer is not None]
UNBIASED = [name for name in QUANTIZERS if not COMPRESSORS[name].needs_feedback]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"bucket_size": BUCKET, "error_feedback": COMPRESSORS[name].needs_feedback}) for name in QUANTIZERS),
    *((name, {"bucket_size": BUCKET, "error_feedback": True}) for name in UNBIASED),
    *((name, {"bucket_size": BUCKET, "bits": 2}) for name in with_bits()),
    ("maxmin", {"bucket_size": -1}),
    ("maxmin", {"bucket_size": BUCKET, "warmup_steps": 2}),
    ("maxmin", {"bucket_size": BUCKET, "dense_dtype": "bfloat16"}),
    ("none", {}),
    ("none", {"dense_dtype": "bfloat16"}),
]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
WORLDS = [1, 2, 3, 4]
GRIDS = [(2, 2), (3, 2), (2, 3)]  # hosts x ranks a host


def pieces_of(ranks: int) -> dict[str, Pieces]:
    """Every parameter cut by rows, as many to each rank but the last ones, which may get none."""
    pieces = {}
    for name, (rows, *others) in SHAPES.items():
        each, width = -(-rows // ranks), int(torch.Size(others).numel())
        held = [max(0, min(each, rows - rank * each)) * width for rank in range(ranks)]
        pieces[name] = Pieces(tuple(held), each * width)
    return pieces


def layers_of(rank: int, ranks: int) -> list[Layer]:
    """A rank's own pieces, compressed where the whole parameter is."""
    values = {name: pieces.values[rank] for name, pieces in pieces_of(ranks).items()}
    return [
        Layer(index, name, (values[name],), compressible(shape, BUCKET))
        for index, (name, shape) in enumerate(SHAPES.items())
    ]


def whole(rank: int, step: int = 0) -> dict[str, torch.Tensor]:
    """A rank's gradients of the whole parameters."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def laid_out(gradients: Mapping[str, torch.Tensor], rank: int, ranks: int) -> Gradients:
    """The buffer of all rows, padded with zeros, and where this rank's pieces begin in it."""
    pieces = pieces_of(ranks)
    row = sum(each.padded for name, each in pieces.items() if name in gradients)
    flat, offsets, at = torch.zeros(ranks, row), [], 0
    for name, values in gradients.items():
        parts = values.reshape(-1).split(pieces[name].values)
        for owner, part in enumerate(parts):
            flat[owner, at : at + len(part)] = part
        offsets.append(rank * row + at)
        at += pieces[name].padded
    return Gradients(flat.view(-1), tuple(gradients), tuple(offsets))


def own_pieces(gradients: Gradients, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    sizes = {layer.name: layer.numel for layer in layers_of(rank, ranks)}
    return {name: values.clone() for name, values in gradients.layers(sizes)}


def flat(ranks: Collectives, name: str, options: Mapping[str, Any], seed: int = 3) -> Averager:
    size = ranks.world_size
    return build(name, **options).reduce_scatter(layers_of(ranks.rank, size), pieces_of(size), ranks, seed)


def hosts_of(grid: tuple[int, int]) -> Hosts:
    """Hosts whose ranks are not in a row: rank % hosts."""
    return Hosts.named([rank % grid[0] for rank in range(grid[0] * grid[1])])


def in_levels(
    levels: ThreadLevels,
    grid: tuple[int, int],
    name: str,
    options: Mapping[str, Any],
    between: Collectives | None = None,
) -> ReduceScatterInLevels:
    size, hosts = grid[0] * grid[1], hosts_of(grid)
    networks = Levels(OverNetwork(levels.inside), between or levels.between)
    averager = build(name, **options).hierarchical_reduce_scatter(
        layers_of(levels.everyone.rank, size), pieces_of(size), hosts.between, networks, 3
    )
    assert isinstance(averager, ReduceScatterInLevels)
    return averager


def averaged(bound: Averager, rank: int, ranks: int, step: int, settle: bool = True) -> dict[str, torch.Tensor]:
    gradients = laid_out(whole(rank, step), rank, ranks)
    bound.average_(gradients, step)
    bound.settle(settle)
    return own_pieces(gradients, rank, ranks)


def in_order(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean, each multiplied and then added up, one after the other."""
    first, *others = (each * (1.0 / len(values)) for each in values)
    return sum(others, first)


def mean_of_rank(rank: int, ranks: int, step: int = 0) -> dict[str, torch.Tensor]:
    """What a rank is to get, added up in rank order."""
    parts = [own_pieces(laid_out(whole(other, step), rank, ranks), rank, ranks) for other in range(ranks)]
    return {name: in_order([part[name] for part in parts]) for name in SHAPES}


@pytest.mark.parametrize("size", WORLDS)
def test_float32_is_the_sum_in_rank_order(size: int) -> None:
    pieces = run_ranks(size, lambda ranks: averaged(flat(ranks, "none", {}), ranks.rank, size, 0))
    for rank, own in enumerate(pieces):
        for name, expected in mean_of_rank(rank, size).items():
            assert torch.equal(own[name], expected), name


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_in_two_levels_float32_is_the_sum_over_hosts_of_their_means(grid: tuple[int, int]) -> None:
    hosts, size = hosts_of(grid), grid[0] * grid[1]

    def work(levels: ThreadLevels) -> dict[str, torch.Tensor]:
        return averaged(in_levels(levels, grid, "none", {}), levels.everyone.rank, size, 0)

    for rank, own in enumerate(run_hosts(hosts, work)):
        parts = [own_pieces(laid_out(whole(other), rank, size), rank, size) for other in range(size)]
        for name, values in own.items():
            means = [in_order([parts[other][name] for other in ranks]) for ranks in hosts.inside]
            assert torch.equal(values, in_order(means)), name


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_is_unbiased(name: str, size: int) -> None:
    """Of values that TernGrad does not clip."""
    steps = 150

    def clipped(rank: int) -> dict[str, torch.Tensor]:
        return {key: values.clamp(-1.5, 1.5) for key, values in whole(rank).items()}

    def work(ranks: ThreadCollectives) -> dict[str, torch.Tensor]:
        bound = flat(ranks, name, {"bucket_size": BUCKET} | ({"bits": 2} if name in with_bits() else {}))
        draws = []
        for step in range(steps):
            gradients = laid_out(clipped(ranks.rank), ranks.rank, size)
            bound.average_(gradients, step)
            draws.append(own_pieces(gradients, ranks.rank, size))
        return {key: torch.stack([draw[key] for draw in draws]).double() for key in SHAPES}

    results = run_ranks(size, work)
    errors, variances = [], []
    for rank, draws in enumerate(results):
        parts = [own_pieces(laid_out(clipped(other), rank, size), rank, size) for other in range(size)]
        for key, values in draws.items():
            if not values.numel():
                continue
            expected = torch.stack([part[key] for part in parts]).double().mean(0)
            errors.append(values.mean(0) - expected)
            variances.append(values.var(0) / steps)
    error, variance = torch.cat(errors), torch.cat(variances)
    # The mean square over n values is the mean variance, up to 5 sigma of a chi square, of half of which are drawn.
    assert float((error**2).sum() / variance.sum()) < 1 + 5 * (4.0 / len(error)) ** 0.5


@every_variant
@pytest.mark.parametrize("size", WORLDS)
def test_it_sends_the_bytes_that_it_promises(name: str, options: dict[str, Any], size: int) -> None:
    step = options.get("warmup_steps", 0)

    def work(ranks: ThreadCollectives) -> tuple[float, float, int, int, Any]:
        counting = Counting.of(ranks)
        metered = Metered(counting)
        bound = flat(metered, name, options)
        averaged(bound, ranks.rank, size, step)
        promised = bound.sent(layers_of(ranks.rank, size), size)
        return metered.traffic.bytes_sent, bound.encoded_bytes, counting.messages, counting.rounds, promised

    sent, encoded, messages, rounds, promised = zip(*run_ranks(size, work), strict=True)
    assert sent == encoded
    assert len(set(promised)) == 1
    assert sum(sent) / size == pytest.approx(promised[0].total, rel=1e-12)
    assert sum(messages) / size == pytest.approx(promised[0].messages, rel=1e-12)
    assert set(rounds) == {promised[0].rounds}


@every_variant
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_so_it_does_in_two_levels(name: str, options: dict[str, Any], grid: tuple[int, int]) -> None:
    size, step = grid[0] * grid[1], options.get("warmup_steps", 0)

    def work(levels: ThreadLevels) -> tuple[float, float, Any]:
        between = Metered(levels.between)
        bound = in_levels(levels, grid, name, options, between)
        averaged(bound, levels.everyone.rank, size, step)
        return between.traffic.bytes_sent, bound.encoded_bytes, bound.sent(layers_of(levels.everyone.rank, size), size)

    sent, encoded, promised = zip(*run_hosts(hosts_of(grid), work), strict=True)
    assert sent == encoded
    assert len(set(promised)) == 1
    assert sum(sent) / size == pytest.approx(promised[0].total, rel=1e-12)


def test_a_quantizer_of_ones_own_needs_a_row_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPRESSORS, quantizers.NAME, quantizers.ROW)
    test_the_mean_is_unbiased(quantizers.NAME, 2)
    for feedback in (False, True):
        options = {"bucket_size": BUCKET, "error_feedback": feedback}
        test_it_sends_the_bytes_that_it_promises(quantizers.NAME, options, 3)
        test_two_runs_give_the_same_bits_and_resuming_goes_on_with_them(quantizers.NAME, options)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_two_levels_put_less_on_the_link_of_a_host(grid: tuple[int, int]) -> None:
    hosts, size = hosts_of(grid), grid[0] * grid[1]

    def work(levels: ThreadLevels) -> tuple[float, float]:
        rank = levels.everyone.rank
        between, everyone = Metered(levels.between), Metered(levels.everyone, hosts=hosts.of)
        averaged(in_levels(levels, grid, "maxmin", {"bucket_size": BUCKET}, between), rank, size, 0)
        averaged(flat(everyone, "maxmin", {"bucket_size": BUCKET}), rank, size, 0)
        return between.traffic.bytes_sent, everyone.traffic.bytes_between_hosts

    levels, one = (sum(each) for each in zip(*run_hosts(hosts, work), strict=True))
    assert levels * grid[1] == pytest.approx(one, rel=0.02)


@every_variant
def test_two_runs_give_the_same_bits_and_resuming_goes_on_with_them(name: str, options: dict[str, Any]) -> None:
    def run(ranks: ThreadCollectives, interrupted: bool) -> list[dict[str, torch.Tensor]]:
        bound, results = flat(ranks, name, options), []
        for step in range(5):
            if interrupted and step == 3:
                state = bound.state_dict()
                bound = flat(ranks, name, options)
                bound.load_state_dict(state)
            results.append(averaged(bound, ranks.rank, 3, step, settle=step != 1))
        return results

    first, second = (run_ranks(3, partial(run, interrupted=interrupted)) for interrupted in (False, True))
    for mine, other in zip(first, second, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in SHAPES)


@pytest.mark.parametrize("name", UNBIASED)
def test_pieces_travel_the_same_in_whatever_company(name: str) -> None:
    """Of all parameters in one exchange, or of some in each: what a rank gets of a parameter has the same bits."""

    def work(ranks: ThreadCollectives) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        rank, apart = ranks.rank, {}
        options = {"bucket_size": BUCKET, "error_feedback": True}
        together = averaged(flat(ranks, name, options), rank, 4, 0)
        bound = flat(ranks, name, options)
        for some in (["fc", "bias"], ["conv", "thin", "scale"], ["wide"]):
            gradients = laid_out({key: whole(rank)[key] for key in some}, rank, 4)
            bound.average_(gradients, 0)
            apart |= own_pieces(gradients, rank, 4)
        return together, apart

    for together, apart in run_ranks(4, work):
        assert all(torch.equal(together[key], apart[key]) for key in SHAPES)


def test_rows_and_senders_draw_random_numbers_of_their_own() -> None:
    """Where all values are alike, so are errors, unless they are drawn apart."""
    size, shape = 4, (4, 512)
    pieces = {"weight": Pieces((512,) * size, 512)}

    def work(ranks: ThreadCollectives) -> torch.Tensor:
        layer = Layer(0, "weight", (512,), True)
        bound = build("maxmin", bits=1, bucket_size=512).reduce_scatter([layer], pieces, ranks, 0)
        values = torch.full(shape, 0.5)
        values[:, 0], values[:, 1] = 0.0, 1.0
        buffer = values.reshape(-1)
        bound.average_(Gradients(buffer, ("weight",), (ranks.rank * 512,)), 0)
        return buffer.view(shape)[ranks.rank, 2:]

    means = torch.stack(run_ranks(size, work))
    correlation = torch.corrcoef(means)
    assert float((correlation - torch.eye(size)).abs().max()) < 0.25  # 5 sigma
    # Three codes of 0 or 1 and one 0.5: the variance is 3 / 4 of that of a coin, over 16.
    assert float(means.var()) == pytest.approx(3 / 64, rel=0.25)


def test_error_feedback_accounts_for_every_loss() -> None:
    """Over steps the means and what is still owed add up to the gradients', row by row."""
    size, steps = 3, 6

    def work(ranks: ThreadCollectives) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        bound, rank = flat(ranks, "maxmin", {"bits": 1, "bucket_size": BUCKET, "error_feedback": True}), ranks.rank
        totals = {key: torch.zeros(pieces_of(size)[key].values[rank]) for key in SHAPES}
        for step in range(steps):
            for key, values in averaged(bound, rank, size, step).items():
                totals[key] += values
        return totals, bound.state_dict()["residual"]

    results = run_ranks(size, work)
    pieces = pieces_of(size)
    for rank, (totals, own) in enumerate(results):
        assert {key: len(values) for key, values in own.items()} == {
            key: sum(pieces[key].values) - pieces[key].values[rank]
            for key, shape in SHAPES.items() if compressible(shape, BUCKET)
        }
        for key, values in totals.items():
            expected = sum(mean_of_rank(rank, size, step)[key] for step in range(steps))
            for other, (_, owed) in enumerate(results):
                if other != rank and key in owed:
                    sizes = [count for to, count in enumerate(pieces[key].values) if to != other]
                    part = owed[key].split(sizes)[rank - (rank > other)]
                    values = values + part / size
            assert torch.allclose(values, torch.as_tensor(expected), atol=1e-5), key


def test_dropped_steps_leave_no_trace() -> None:
    def work(ranks: ThreadCollectives) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        bound = flat(ranks, "1bit", {"bucket_size": BUCKET, "error_feedback": True})
        averaged(bound, ranks.rank, 2, 0)
        before = bound.state_dict()["residual"]
        averaged(bound, ranks.rank, 2, 1, settle=False)
        return before, bound.state_dict()["residual"]

    for before, after in run_ranks(2, work):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_is_not_finite_reaches_its_owner() -> None:
    def work(ranks: ThreadCollectives) -> bool:
        bound, values = flat(ranks, "maxmin", {"bucket_size": BUCKET}), whole(ranks.rank)
        if ranks.rank == 0:
            values["fc"][11, 39] = torch.nan  # the last rank's
        gradients = laid_out(values, ranks.rank, 4)
        bound.average_(gradients, 0)
        own = own_pieces(gradients, ranks.rank, 4)
        return all(bool(each.isfinite().all()) for each in own.values())

    assert run_ranks(4, work) == [True, True, True, False]


def test_widths_of_layers_are_their_own() -> None:
    def work(ranks: ThreadCollectives) -> None:
        bound = flat(ranks, "maxmin", {"bits": 4, "bucket_size": BUCKET})
        layers = layers_of(ranks.rank, 2)
        at_four = bound.bytes_sent(layers, 2)
        bound.set_widths({"fc": 2, "wide": DENSE})
        assert bound.widths["fc"] == 2
        own = averaged(bound, ranks.rank, 2, 0)
        assert torch.equal(own["wide"], mean_of_rank(ranks.rank, 2)["wide"])
        assert not torch.equal(own["thin"], mean_of_rank(ranks.rank, 2)["thin"])
        sizes = [bound.encoded_bytes_at(layers, bits, 2) for bits in (2, 4, DENSE)]
        names = [layer.name for layer in layers]
        change = sizes[0][names.index("fc")] - sizes[1][names.index("fc")]
        change += sizes[2][names.index("wide")] - sizes[1][names.index("wide")]
        assert bound.bytes_sent(layers, 2) == at_four + change / 2
        with pytest.raises(ValueError, match="bias is not a compressed layer"):
            bound.set_widths({"bias": 4})

    run_ranks(2, work)


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(ValueError, match=r"leave it out|choose one") as error:
        build(name, **options).check_reduce_scatter()
    return str(error.value)


def test_what_averages_no_pieces_is_refused_with_a_way_out() -> None:
    refused = set(COMPRESSORS) - set(with_reduce_scatter())
    assert refused == {"sanity", "stats", "topk", "topk_rmsprop", "svd", "powersgd", "dgc"}
    for name in refused:
        assert "groups=(inside, between)" in refusal(name)
    assert "needs whole matrices" in refusal("powersgd")
    assert "encodes layers as a whole" in refusal("dgc")
    with pytest.raises(ValueError, match="choose one compressor"):
        mixed({}, ("maxmin", {})).check_reduce_scatter()


def test_options_without_effect_and_bias_that_nobody_asked_for_are_refused() -> None:
    assert "error_feedback=True" in refusal("1bit")
    build("1bit", error_feedback=True).check_reduce_scatter()
    assert "nobody sends" in refusal("maxmin", second_hop_bits=8)
    assert "one module at a time" in refusal("maxmin", big_grad=True)
    assert "one module at a time" in refusal("none", big_grad=True)


def test_pieces_are_those_of_all_ranks() -> None:
    def work(ranks: ThreadCollectives) -> None:
        bound = flat(ranks, "maxmin", {"bucket_size": BUCKET})
        assert isinstance(bound, ReduceScatter)
        with pytest.raises(ValueError, match="in pieces among 2 ranks, got 3"):
            bound.sent(layers_of(ranks.rank, 2), 3)

    run_ranks(2, work)
