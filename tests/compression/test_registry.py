"""One table runs every compressor of the registry: what all of them promise, whatever they do."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from compression import COMPRESSORS, Metered, Solo, build, codec
from compression.averagers import Averager
from compression.exchange.flat_gradient import FlatGradient
from compression.gradients import Gradients
from compression.layers import layers_of
from compression.network.threads import Counting, ThreadCollectives, run_ranks

SHAPES = {"conv": (7, 5, 3, 3), "norm": (7,), "wide": (130, 40), "small": (2, 3), "fc": (11, 64), "bias": (11,)}
LAYERS = layers_of(SHAPES.items(), 64)
NAMES = tuple(SHAPES)
OFFSETS = tuple(sum(layer.numel for layer in LAYERS[:index]) for index in range(len(LAYERS)))
VALUES = sum(layer.numel for layer in LAYERS)


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Every compressor, plain and with what changes its state or its messages: error feedback, warm-up, bfloat16."""
    cases = []
    for name, row in COMPRESSORS.items():
        base = {"bucket_size": 64} if "bucket_size" in row.takes else {}
        cases.append((name, base))
        if "error_feedback" in row.takes:
            cases.append((name, {**base, "error_feedback": True}))
        if "warmup_steps" in row.takes:
            cases.append((name, {**base, "warmup_steps": 2}))
        if "dense_dtype" in row.takes:
            cases.append((name, {**base, "dense_dtype": "bfloat16"}))
    return cases


VARIANTS = variants()
every_compressor = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)


def gradient(rank: int, step: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return scale * torch.randn(VALUES, generator=generator)


def averager(name: str, options: Mapping[str, Any], ranks: Any, seed: int = 5) -> Averager:
    return build(name, **options).averager(LAYERS, ranks, seed)


def average(bound: Averager, values: torch.Tensor, step: int) -> torch.Tensor:
    flat = values.clone()
    bound.average_(Gradients(flat, NAMES, OFFSETS), step)
    return flat


def on_ranks(world_size: int, name: str, options: Mapping[str, Any], work: Callable[[Averager, int], Any]) -> list[Any]:
    return run_ranks(world_size, lambda ranks: work(averager(name, options, ranks), ranks.rank))


@every_compressor
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_agree_bit_for_bit(name: str, options: dict[str, Any], world_size: int) -> None:
    def work(bound: Averager, rank: int) -> list[torch.Tensor]:
        averages = []
        for step in range(4):
            averages.append(average(bound, gradient(rank, step), step))
            bound.settle(True)
        return averages

    first, *others = on_ranks(world_size, name, options, work)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@every_compressor
def test_a_resumed_run_goes_on_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    def straight(bound: Averager, rank: int) -> torch.Tensor:
        for step in range(6):
            last = average(bound, gradient(rank, step), step)
            bound.settle(True)
        return last

    def resumed(ranks: ThreadCollectives) -> torch.Tensor:
        before = averager(name, options, ranks)
        for step in range(3):
            average(before, gradient(ranks.rank, step), step)
            before.settle(True)
        after = averager(name, options, ranks)
        after.load_state_dict(before.state_dict())
        for step in range(3, 6):
            last = average(after, gradient(ranks.rank, step), step)
            after.settle(True)
        return last

    for a, b in zip(on_ranks(2, name, options, straight), run_ranks(2, resumed), strict=True):
        assert torch.equal(a, b)


@every_compressor
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_reaches_every_rank_and_leaves_no_trace(
    name: str, options: dict[str, Any], bad: float
) -> None:
    def work(bound: Averager, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        for step in range(3):
            average(bound, gradient(rank, step), step)
            bound.settle(True)
        poisoned = gradient(rank, 3)
        if rank == 1:
            poisoned[OFFSETS[2] + 17] = bad
        seen = average(bound, poisoned, 3)
        bound.settle(False)
        return seen, average(bound, gradient(rank, 4), 4)

    def clean(bound: Averager, rank: int) -> torch.Tensor:
        for step in range(3):
            average(bound, gradient(rank, step), step)
            bound.settle(True)
        return average(bound, gradient(rank, 4), 4)

    for (seen, after), expected in zip(
        on_ranks(3, name, options, work), on_ranks(3, name, options, clean), strict=True
    ):
        if name != "sanity":
            assert not torch.isfinite(seen).all()
        assert torch.equal(after, expected)


@every_compressor
@pytest.mark.parametrize("kind", ["zeros", "constant", "denormal", "huge", "heavy tail", "one value"])
def test_finite_gradients_give_finite_averages(name: str, options: dict[str, Any], kind: str) -> None:
    values = {
        "zeros": torch.zeros(VALUES),
        "constant": torch.full((VALUES,), -1.25),
        "denormal": gradient(0, 0) * 1e-41,
        "huge": gradient(0, 0).sign() * 3e38,
        "heavy tail": gradient(0, 0) ** 15,
        "one value": torch.nn.functional.one_hot(torch.tensor(OFFSETS[2] + 5), VALUES).float(),
    }[kind]

    def work(bound: Averager, rank: int) -> torch.Tensor:
        for step in range(1 if kind == "huge" else 3):  # a residual on top of 3e38 would overflow float32 itself
            seen = average(bound, values, step)
            bound.settle(True)
        return seen

    assert all(torch.isfinite(seen).all() for seen in on_ranks(2, name, options, work))


@every_compressor
def test_layers_may_come_in_any_grouping_from_step_to_step(name: str, options: dict[str, Any]) -> None:
    """DDP rebuilds its buckets after the first step: what is remembered of a layer must survive it."""

    def whole(bound: Averager, rank: int) -> torch.Tensor:
        for step in range(3):
            last = average(bound, gradient(rank, step), step)
            bound.settle(True)
        return last

    def regrouped(bound: Averager, rank: int) -> torch.Tensor:
        average(bound, gradient(rank, 0), 0)
        bound.settle(True)
        for step in (1, 2):
            values = gradient(rank, step)
            for group in ((5, 4, 3), (2, 1), (0,)):
                flat = torch.cat([values[OFFSETS[k] : OFFSETS[k] + LAYERS[k].numel] for k in group])
                ends = [0]
                for k in group:
                    ends.append(ends[-1] + LAYERS[k].numel)
                bound.average_(Gradients(flat, tuple(NAMES[k] for k in group), tuple(ends[:-1])), step)
                for k, at in zip(group, ends, strict=False):
                    values[OFFSETS[k] : OFFSETS[k] + LAYERS[k].numel] = flat[at : at + LAYERS[k].numel]
            bound.settle(True)
        return values

    for a, b in zip(on_ranks(2, name, options, whole), on_ranks(2, name, options, regrouped), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@every_compressor
@pytest.mark.parametrize("world_size", [2, 3])
def test_counted_bytes_are_the_messages_bytes(name: str, options: dict[str, Any], world_size: int) -> None:
    class Weighed(ThreadCollectives):
        """Weighs what leaves this rank; an all-reduce is weighed as a ring, the way gloo and NCCL do it."""

        sent = 0.0

        def sum_(self, values: torch.Tensor) -> None:
            self.sent += 2 * (self.world_size - 1) / self.world_size * values.nbytes
            super().sum_(values)

        def exchange(self, messages: torch.Tensor, sizes: Any) -> torch.Tensor:
            self.sent += messages.nbytes
            return super().exchange(messages, sizes)

        def gather(self, message: torch.Tensor, sizes: Any) -> torch.Tensor:
            self.sent += message.nbytes * (self.world_size - 1)
            return super().gather(message, sizes)

    def work(ranks: ThreadCollectives) -> tuple[float, float]:
        weighed = Weighed.of(ranks)
        metered = Metered(weighed)
        bound = averager(name, options, metered)
        for step in range(3):
            average(bound, gradient(ranks.rank, step), step)
            bound.settle(True)
        return weighed.sent, metered.traffic.bytes_sent

    for sent, counted in run_ranks(world_size, work):
        assert counted == pytest.approx(sent)
        assert (sent == 0) == (name == "sanity")


TOP_K_FATES = [("topk", {"bucket_size": 64, "efx_bits": 3}), ("topk", {"bucket_size": 64, "efx_randk": 0.1})]
ROUNDED = [
    ("maxmin", {"bucket_size": 64, "error_feedback": True, "dense_dtype": "bfloat16"}),
    ("topk", {"bucket_size": 64, "efx_bits": 3, "dense_dtype": "bfloat16"}),
    ("powersgd", {"bucket_size": 10_000, "dense_dtype": "bfloat16"}),  # which leaves it nothing to factor
]


@pytest.mark.parametrize(
    ("name", "options"), [*VARIANTS, *TOP_K_FATES, *ROUNDED, ("topk", {"big_grad": True})], ids=str
)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_it_sends_the_bytes_that_it_promises(name: str, options: dict[str, Any], world_size: int) -> None:
    """The promise is the mean over the ranks, and made by a rank of another world, too."""

    def work(ranks: ThreadCollectives) -> float:
        metered = Metered(ranks)
        bound = averager(name, options, metered)
        step = options.get("warmup_steps", 0)
        gradients = FlatGradient(LAYERS).join([Gradients(gradient(ranks.rank, step), NAMES, OFFSETS)])
        bound.average_(gradients, step)
        return metered.traffic.bytes_sent

    promised = averager(name, options, Solo()).bytes_sent(LAYERS, world_size)
    assert sum(run_ranks(world_size, work)) / world_size == pytest.approx(promised)
    assert (promised == 0) == (name == "sanity" or world_size == 1)


@pytest.mark.parametrize(("name", "options"), [*VARIANTS, *TOP_K_FATES, ("topk", {"big_grad": True})], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 13])
def test_it_sends_as_many_messages_as_it_promises(name: str, options: dict[str, Any], world_size: int) -> None:
    """Those of no bytes are not sent. The promise is the mean over the ranks, and of rounds the most."""

    def work(ranks: ThreadCollectives) -> tuple[int, int]:
        network = Counting.of(ranks)
        step = options.get("warmup_steps", 0)
        gradients = FlatGradient(LAYERS).join([Gradients(gradient(ranks.rank, step), NAMES, OFFSETS)])
        averager(name, options, network).average_(gradients, step)
        return network.messages, network.rounds

    promised = averager(name, options, Solo()).sent(LAYERS, world_size)
    messages, rounds = zip(*run_ranks(world_size, work), strict=True)
    assert sum(messages) / world_size == pytest.approx(promised.messages)
    assert max(rounds) == promised.rounds
    assert (promised.messages == 0) == (name == "sanity" or world_size == 1)


@pytest.mark.parametrize("shapes", [{"bias": (5,)}, {"tiny": (2, 2), "bias": (3,)}, {"wide": (40, 65)}], ids=str)
@pytest.mark.parametrize(("name", "options"), [*VARIANTS, *TOP_K_FATES], ids=str)
def test_a_buffer_of_few_layers_has_no_more_messages_than_promised(
    name: str, options: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Layers that are all small or all large, of which one kind of message may not be there."""
    layers = layers_of(shapes.items(), 64)
    starts = tuple(sum(layer.numel for layer in layers[:index]) for index in range(len(layers)))

    def work(ranks: ThreadCollectives) -> int:
        network = Counting.of(ranks)
        flat = torch.ones(sum(layer.numel for layer in layers))
        bound = build(name, **options).averager(layers, network, 5)
        bound.average_(Gradients(flat, tuple(shapes), starts), options.get("warmup_steps", 0))
        return network.messages

    promised = build(name, **options).averager(layers, Solo(), 5).sent(layers, 3)
    assert sum(run_ranks(3, work)) / 3 == pytest.approx(promised.messages)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_row_names_what_there_is(name: str) -> None:
    row = COMPRESSORS[name]
    assert row.takes == tuple(field.name for field in dataclasses.fields(row.options()))
    assert (row.min_bits > 0) == row.has_bits == ("bits" in row.takes)
    assert not row.has_bits or row.min_bits == type(codec(name)).min_bits
    if row.quantizer is not None or row.codec is not None:
        options = {"svd": {"rows": 8, "cols": 8, "rank": 2}}.get(name, {})
        assert codec(name, **options).wire_bytes(64) > 0


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("maxmin", {"bits": "4"}, "maxmin's codec takes bits as int, got '4'"),
        ("maxmin", {"bits": True}, "maxmin's codec takes bits as int, got True"),
        ("eden", {"bucket_size": 64.0}, "eden's codec takes bucket_size as int, got 64.0"),
        ("topk", {"ratio": "x"}, "topk's codec takes ratio as float or int, got 'x'"),
        ("maxmin", {"width": 1}, "the codec of maxmin takes no option 'width'; it takes bits, bucket_size"),
        ("svd", {"rows": 64}, "the codec of svd needs its cols; it takes rows, cols, rank, contraction"),
        ("none", {}, "compressor none has no codec; those with one: "),
    ],
)
def test_a_codec_is_refused_as_a_compressor_is(name: str, options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(error)}"):
        codec(name, **options)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_row_says_whether_the_network_adds_up(name: str) -> None:
    class Noted(ThreadCollectives):
        sums = 0

        def sum_(self, values: torch.Tensor) -> None:
            self.sums += 1
            super().sum_(values)

    def work(ranks: ThreadCollectives) -> int:
        noted = Noted.of(ranks)
        average(averager(name, {}, noted), gradient(ranks.rank, 0), 0)
        return noted.sums

    assert all((sums > 0) == COMPRESSORS[name].all_reduces for sums in run_ranks(2, work))


@every_compressor
def test_one_rank_alone_still_encodes(name: str, options: dict[str, Any]) -> None:
    """So that what a compressor does to training can be studied without a cluster."""
    alone = average(averager(name, options, Solo()), gradient(0, 0), 5)
    lossless = name in ("none", "stats") and "dense_dtype" not in options
    assert torch.equal(alone, gradient(0, 0)) == lossless


@pytest.mark.parametrize("name", COMPRESSORS)
def test_options_that_a_compressor_does_not_take_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="takes no option 'color'"):
        build(name, color=1)


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="no compressor is called 'gzip'; there are none, sanity, maxmin"):
        build("gzip")
