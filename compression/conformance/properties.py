"""Properties: what codecs and averagers promise, each a function that looks for an example that breaks it.

`PROPERTIES` lists them. A check returns None where the promise is kept, a `Finding` where it is broken, and the reason
where it is not applicable. Each looks at its own promise alone, on examples that it chooses for that.
"""

import contextlib
import functools
import itertools
import math
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..codecs.base import Codec, decoded
from ..gradients import Gradients
from ..layers import Layer
from ..network.collectives import Metered, Solo
from ..network.threads import Counting, run_ranks
from .examples import Finding, Values, World, first_broken, in_a_line
from .inputs import INPUTS, ordinary, values_of
from .targets import Subject, nearly_square
from .trials import Rank, alone, bits, bucket_of, gradient, layers_in, offsets, on_ranks, shapes_of

Outcome = Finding | str | None
Check = Callable[[Subject], Outcome]
NO_CODEC = "its messages are no codec's; its averages are held to the rest"
_FEEDBACK_IS_OFF = "error feedback is off"
NOT_FINITE = (math.nan, math.inf, -math.inf)
FEW_KINDS = ("constant", "normal", "three non-zeros", "one outlier")
SIZES = (1, 2, 7, 64, 300, 1100)
LARGE = 5000  # values: several buckets, and more than most tests of a code try
STEPS = 5
MANY_DRAWS = 2048
PRIMES = (2, 3, 5, 7, 11, 13, 31, 61, 127, 251, 509)


@dataclass(frozen=True)
class Property:
    """A promise: its name, the rule in a sentence, and the search for an example that breaks it.

    `of_codec`: it is the codec's, whichever way this is averaged.
    """

    name: str
    rule: str
    check: Check
    of_codec: bool


PROPERTIES: list[Property] = []


def _holds(name: str, rule: str, of_codec: bool = False) -> Callable[[Check], Check]:
    """List a check under a name."""

    def listed(check: Check) -> Check:
        PROPERTIES.append(Property(name, rule, check, of_codec))
        return check

    return listed


# Codecs


@_holds(
    "exact size",
    "wire_bytes(count) is the length of every message of so many values, whatever the values and the seed",
    of_codec=True,
)
def exact_size(subject: Subject) -> Outcome:
    if subject.codec(1) is None:
        return NO_CODEC

    def measure(example: Values) -> str | None:
        values = example.tensor
        count, codec = len(values), _codec(subject, len(values))
        promised = codec.wire_bytes(count)
        for seed in range(6):
            wire = codec.encode(values[None], seed)
            if wire.dtype != torch.uint8 or tuple(wire.shape) != (1, promised):
                shown = f"{wire.dtype} {list(wire.shape)}"
                return f"wire_bytes({count}) is {promised}, and encode makes {shown} with seed {seed}"
        return None

    bucket = bucket_of(subject)
    counts = sorted({*range(1, 67), bucket - 1, bucket, bucket + 1, 2 * bucket + 3, *PRIMES, 1000, LARGE} - {0})
    examples = [*_values(["normal"], counts), *_values(list(INPUTS), SIZES)]
    return first_broken(examples, measure)


@_holds(
    "purity",
    "encode and decode give the same for the same values and seed, change no argument, and neither use nor change the "
    "global random states of torch, numpy and Python; any seed gives a valid message",
    of_codec=True,
)
def purity(subject: Subject) -> Outcome:
    if subject.codec(1) is None:
        return NO_CODEC

    def measure(example: Values) -> str | None:
        values = example.tensor
        count, codec = len(values), _codec(subject, len(values))
        wires, results = [], []
        for state in (1, 2):
            given = values[None].clone()
            with _global_random_states(state) as unchanged:
                wires.append(codec.encode(given, 7))
                sent = wires[-1].clone()
                results.append(decoded(codec, sent, count, 7))
                if not unchanged():
                    return "a global random state changes"
            if not torch.equal(bits(given), bits(values[None])):
                return "encode changes the values that it is given"
            if not torch.equal(sent, wires[-1]):
                return "decode changes the message that it is given"
        if not torch.equal(*wires):
            return "encode gives different messages for the same values and seed"
        if not torch.equal(*map(bits, results)):
            return "decode gives different values for the same message"
        for seed in (0, 2**32 + 1, 2**64 - 1):
            with _global_random_states(3):
                if not decoded(codec, codec.encode(values[None], seed), count, seed).isfinite().all():
                    return f"seed {seed} gives a message that decodes to values that are not finite"
        return None

    return first_broken([*_values(ordinary(), (2, 300)), *_values(["normal"], (1, 64, 1100, LARGE))], measure)


@_holds(
    "independent rows",
    "a message depends on its own row of values alone, and rows of equal values are rounded independently",
    of_codec=True,
)
def independent_rows(subject: Subject) -> Outcome:
    codec = subject.codec(64)
    if codec is None:
        return NO_CODEC
    try:
        codec.encode(torch.ones(3, 64), 0)
    except Exception as error:
        return f"it takes one message at a time: {in_a_line(error)}"

    def measure(example: Values) -> str | None:
        values = example.tensor
        count, codec = len(values), _codec(subject, len(values))
        rows = torch.stack([values, values.flip(0), 0.5 * values])
        wires = codec.encode(rows, 3)
        together = decoded(codec, wires, count, 3)
        for row in range(3):
            others = rows.clone()
            others[[each for each in range(3) if each != row]] = 1.0
            other_wires = codec.encode(others, 3)
            if not torch.equal(other_wires[row], wires[row]):
                return f"the message of row {row} of 3 changes when the other rows do"
            # Alone, unless the number of a row is part of what is keyed.
            keyed = getattr(codec, "keyed", False)
            sent = other_wires if keyed else wires[row, None].clone()
            apart = decoded(codec, sent, count, 3)[row if keyed else 0]
            if not torch.allclose(apart, together[row], rtol=1e-5, atol=1e-6 * float(values.abs().max())):
                return f"row {row} of 3 decodes to other values than {'beside other rows' if keyed else 'alone'}"
        single_wires = {_key(codec.encode(values[None], seed)[0]) for seed in range(8)}
        if len(single_wires) == 8 and len({_key(wire) for wire in codec.encode(values.repeat(8, 1), 3)}) == 1:
            return "8 rows of equal values make equal messages, and 8 seeds make different ones"
        return None

    return first_broken(_values(FEW_KINDS, (7, 64, 300)), measure)


@_holds(
    "bias or contraction",
    "a code is unbiased, or within the bias_bound that it states, or a contraction: |v - decoded| < |v| for every v",
    of_codec=True,
)
def bias_or_contraction(subject: Subject) -> Outcome:
    if not _sends(subject):
        return "it sends nothing"
    counts = (*SIZES, LARGE) if subject.codec(1) is not None else (64, 300)
    vectors = {(kind, count): Values.of(values_of(kind, count)) for count in counts for kind in INPUTS}
    lengthens = [where for where, example in vectors.items() if _longer(subject, example)]
    if not lengthens:
        return None
    # Where it is no contraction it must be unbiased: at every such size, on the first kinds that show it.
    shown = []
    for count in counts:
        shown += [(kind, n) for kind, n in lengthens if n == count and kind in ordinary()][:2]
    tried = [*itertools.product(FEW_KINDS, (7,)), *itertools.product(ordinary(), (300,)), *shown]
    examples = [vectors[where] for where in dict.fromkeys(tried) if where in vectors]
    biased = first_broken(examples, lambda example: _bias(subject, example, not _is_random(subject)), tries=60)
    first = [vectors[where] for where in lengthens[:1]]
    lengthened = first_broken(first, lambda example: _longer(subject, example), tries=100 if biased else 0)
    if biased is None or lengthened is None:
        return None
    return Finding(
        f"{lengthened.measured}, so it is no contraction; and {biased.measured}, so it is biased",
        f"{lengthened.smallest} is not contracted, {biased.smallest} is biased",
    )


def _longer(subject: Subject, example: Values, draws: int = 8) -> str | None:
    """Whether what a code loses of a vector is no shorter than the vector: in one draw, or in the mean of them."""
    values = example.tensor.double()
    length = float(values.norm())
    is_ordinary = 1e-32 * len(values) ** 0.5 < length < 1e32
    lost: list[float] = []
    is_random = _is_random(subject)
    # A code that keeps few values may lose a lone one in all of a few draws, and is a contraction all the same.
    for seed in range(MANY_DRAWS):
        lost.append(float((values - _decoded(subject, example.tensor, seed).double()).norm()))
        if not math.isfinite(lost[-1]):
            return None  # another promise
        mean = math.sqrt(sum(each**2 for each in lost) / len(lost))
        is_enough = len(lost) >= draws and (mean < length or not (is_ordinary and is_random))
        if is_enough or lost[-1] > length * (1 + 1e-5):
            break
    worst = max(lost)
    if worst <= length * (1 + 1e-5) and (mean < length or not is_ordinary):
        return None
    return f"|v - decoded| is {_number(max(worst, mean))} for |v| of {_number(length)}"


def _bias(subject: Subject, example: Values, deterministic: bool, draws: int = 256) -> str | None:
    """Whether the mean of many draws is off by more than noise explains, in any of many directions.

    Directions are each value, the vector, its signs, ones, and some at random. A rounding that was never seen may have
    a chance of up to 14 in `draws`, at odds of a million to one.
    """
    values = example.tensor.double()
    samples = torch.stack(
        [_decoded(subject, example.tensor, seed).double() for seed in range(1 if deterministic else draws)]
    )
    largest = float(torch.maximum(values.abs().max(), samples.abs().max()))
    if largest == 0:
        return None
    codec = subject.codec(len(values))
    stated = getattr(codec, "bias_bound", None)
    bound = stated(example.tensor[None])[0].double() if stated is not None else torch.zeros_like(values)
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(4, len(values), generator=generator, dtype=torch.float64)
    pooled = torch.cat([values[None] / largest, values.sign()[None], torch.ones_like(values)[None], some])
    biases = samples.mean(0) - values
    off = torch.cat([biases.abs() - bound, (pooled @ biases).abs() - pooled.abs() @ bound])
    rounding = 1e-5 * largest * torch.cat([torch.ones_like(values), pooled.abs().sum(1)])
    noise = torch.zeros_like(off)
    if not deterministic:
        deviation = torch.cat([samples.std(0), (samples @ pooled.T).std(0)]) / math.sqrt(draws)
        most = torch.cat([torch.ones_like(values), pooled.abs().amax(1)])
        noise = 6.5 * deviation + 14 / draws * 2 * largest * most
    excess = off - noise - rounding
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return None
    what = f"value {worst}" if worst < len(values) else "a sum over all values"
    explained = f"noise explains {_number(float(noise[worst]))}" if not deterministic else "nothing is random"
    return f"the mean of {len(samples)} draws is off by {_number(float(off[worst]))} in {what}, where {explained}"


@functools.lru_cache(maxsize=100)
def _is_random(subject: Subject) -> bool:
    """Whether what is decoded depends on the seed."""
    examples = [each.tensor for each in _values(ordinary(), (7, 300))]
    return any(len({_key(_decoded(subject, each, seed)) for seed in range(8)}) > 1 for each in examples)


def _decoded(subject: Subject, values: Tensor, seed: int) -> Tensor:
    """What arrives of values: through the codec, or where there is none in the average of a rank that is alone."""
    codec = subject.codec(len(values))
    if codec is not None:
        return decoded(codec, codec.encode(values[None], seed), len(values), seed)[0]
    return alone(subject, [_matrix(len(values))], seed).average(values, 0)


# Both


@_holds("finite", "finite values decode to finite ones and have finite averages, 3e38 and denormals too")
def finite(subject: Subject) -> Outcome:
    def encoded(example: Values) -> str | None:
        for seed in range(3):
            found = _decoded(subject, example.tensor, seed)
            if not found.isfinite().all():
                return f"decoded is {_first_bad(found)} with seed {seed}"
        return None

    def averaged(world: World) -> str | None:
        layers = layers_in(subject, world)

        def work(rank: Rank) -> Tensor:
            steps = 3 if INPUTS[world.kind].ordinary else 1  # a residual on top of 3e38 would overflow float32 itself
            return torch.stack([rank.apply(gradient(world, layers, 0, step), step) for step in range(steps)])

        found = torch.stack(on_ranks(subject, world, work))
        return None if found.isfinite().all() else f"an average is {_first_bad(found)}"

    codec = first_broken(_values(list(INPUTS), SIZES), encoded) if subject.codec(1) is not None else None
    has_momentum = bool(alone(subject, [_matrix(bucket_of(subject))]).bound.without_momentum)
    kinds = ordinary() if has_momentum else list(INPUTS)  # momentum on top of 3e38 would overflow float32 itself, too
    return codec or first_broken(_worlds(subject, (2,), kinds), averaged)


@_holds(
    "not finite",
    "NaN or infinity in any value makes something that is decoded not finite, and so the average on every rank",
)
def not_finite(subject: Subject) -> Outcome:
    if not _sends(subject):
        return "it sends nothing"

    def decoded(example: Values) -> str | None:
        values = example.tensor
        if values.isfinite().all() or not _decoded(subject, values, 0).isfinite().all():
            return None
        return "all that is decoded is finite"

    def spoiled() -> Iterator[Values]:
        for kind, count, bad in itertools.product(("constant", "normal", "zeros", "3e38"), (1, 7, 64, 300), NOT_FINITE):
            for place in sorted({0, count // 2, count - 1}):
                values = values_of(kind, count)
                values[place] = bad
                yield Values.of(values)

    def averaged(world: World) -> str | None:
        layers = layers_in(subject, world)

        def work(rank: Rank) -> dict[str, bool]:
            seen = {}
            for layer, start in zip(layers, offsets(layers), strict=True):
                for place, bad in zip((0, layer.numel // 2, layer.numel - 1), NOT_FINITE, strict=True):
                    values = gradient(world, layers, rank.network.rank, 0)
                    if rank.network.rank == world.ranks - 1:
                        values[start + place] = bad
                    averages = rank.average(values, 0)
                    rank.bound.settle(False)
                    seen[f"{bad} as value {place} of {layer.name}"] = not averages.isfinite().all()
            return seen

        for number, seen in enumerate(on_ranks(subject, world, work)):
            for where, spoilt in seen.items():
                if not spoilt:
                    return f"with {where} on the last rank, the averages of rank {number} are all finite"
        return None

    codec = first_broken(spoiled(), decoded) if subject.codec(1) is not None else None
    return codec or first_broken(_worlds(subject, (1, 3)), averaged, tries=60)


@_holds(
    "odd sizes",
    "any number of values decodes to as many, and layers of any shape have averages: one value, primes, a bucket and "
    "one more or less, matrices, vectors and scalars",
)
def odd_sizes(subject: Subject) -> Outcome:
    bucket = bucket_of(subject)

    def decoded(example: Values) -> str | None:
        values = example.tensor
        found = _decoded(subject, values, 0)
        if found.dtype == torch.float32 and found.shape == values.shape and found.isfinite().all():
            return None
        return f"{len(values)} values decode to {found.dtype} {list(found.shape)}: {found[:8].tolist()}"

    def averaged(world: World) -> str | None:
        layers = layers_in(subject, world)
        work = on_ranks(subject, world, lambda rank: rank.average(gradient(world, layers, rank.network.rank, 0), 0))
        return next((f"an average is {_first_bad(found)}" for found in work if not found.isfinite().all()), None)

    counts = sorted({1, *PRIMES, bucket - 1, bucket, bucket + 1, 2 * bucket - 1, 2 * bucket + 1, 997} - {0})
    codec = first_broken(_values(["normal"], counts), decoded) if subject.codec(1) is not None else None
    shapes: list[tuple[int, ...]] = [
        (), (1,), (3,), (bucket,), (1, 1), (1, bucket), (bucket, 1), (3, bucket), (bucket + 1, 2),
        (7, 11), (1, 1, 1, bucket), (bucket - 1, 3), (2, 3, 5, 7),
    ]  # fmt: skip
    layers = tuple((f"layer{index}", shape) for index, shape in enumerate(shapes))
    every = (((name, shape),) for name, shape in layers)
    examples = [World(ranks, each, "normal") for ranks, each in itertools.product((1, 3), (*every, layers))]
    return codec or first_broken(examples, averaged)


# Averagers


@_holds("exact traffic", "a rank sends as many bytes and messages, in as many rounds, as its averager promises")
def exact_traffic(subject: Subject) -> Outcome:
    def measure(world: World) -> str | None:
        layers = layers_in(subject, world)

        def work(rank: Rank) -> tuple[float, int, int]:
            for step in range(STEPS):
                rank.apply(gradient(world, layers, rank.network.rank, step), step)
            metered = rank.network
            assert isinstance(metered, Metered)
            assert isinstance(metered.inner, Counting)
            return metered.traffic.bytes_sent, metered.inner.messages, metered.inner.rounds

        sent = on_ranks(subject, world, work, lambda ranks: Metered(Counting.of(ranks)))
        nbytes, messages, rounds = zip(*sent, strict=True)
        promised = subject.bind(layers, Solo(), 0).sent(layers, world.ranks)
        found = (
            ("bytes", promised.total, sum(nbytes) / world.ranks / STEPS),
            ("messages", promised.messages, sum(messages) / world.ranks / STEPS),
            ("rounds", promised.rounds, max(rounds) / STEPS),
        )
        for what, wanted, counted in found:
            if not math.isclose(wanted, counted, rel_tol=1e-9):
                return f"{wanted:g} {what} a step are promised, and {counted:g} are sent, the mean over ranks and steps"
        return None

    shapes = shapes_of(subject)
    few = [tuple(each for each in shapes if each[0] in names) for names in (("bias",), ("small", "norm"), ("wide",))]
    examples = [World(ranks, shapes, "normal") for ranks in (1, 2, 3, 5)] + [World(3, each, "normal") for each in few]
    return first_broken(examples, measure)


@_holds("agreement", "every rank ends with the same bits")
def agreement(subject: Subject) -> Outcome:
    def measure(world: World) -> str | None:
        layers = layers_in(subject, world)

        def work(rank: Rank) -> Tensor:
            number = rank.network.rank
            return torch.stack([rank.apply(gradient(world, layers, number, step), step) for step in range(STEPS)])

        first, *others = on_ranks(subject, world, work)
        for number, other in enumerate(others, start=1):
            if not torch.equal(bits(first), bits(other)):
                different = (bits(first) != bits(other)).sum()
                return f"rank {number} has other bits than rank 0 in {different} of {first.numel()} values"
        return None

    return first_broken(_worlds(subject, (2, 3, 4, 5), ("constant", "mixed magnitudes")), measure)


@_holds("mean", "averages are the mean over ranks of what each of them sent, within what a code loses")
def mean(subject: Subject) -> Outcome:
    if not _sends(subject):
        return "it sends nothing"
    # What is owed, and momentum, belong to later averages.
    steps = STEPS if _without_feedback(subject) == _FEEDBACK_IS_OFF else 1

    def measure(world: World) -> str | None:
        layers = layers_in(subject, world)
        values = gradient(world, layers, 0, 0)
        expected = values * (world.ranks + 1) / 2
        multiples = [values * (number + 1) for number in range(world.ranks)]
        own = [
            (each, alone(subject, layers, seed).average(each, 0))
            for each in (*multiples, expected)
            for seed in range(4)  # what one draw loses may be far less than what another does
        ]

        def work(rank: Rank) -> list[Tensor]:
            return [rank.apply(multiples[rank.network.rank], step) for step in range(steps)]

        everything, *_ = on_ranks(subject, world, work)
        for (layer, start), found in itertools.product(zip(layers, offsets(layers), strict=True), everything):
            span = slice(start, start + layer.numel)
            lost = [(each - sent)[span].norm() for each, sent in own]
            length = expected[span].norm()
            is_exact = max(lost) <= 0.01 * length
            allowed = (0.05 if is_exact else 0.5) * length + 3 * (max(lost) + max(lost[-4:]))
            off = (found - expected)[span].norm()
            if off > allowed:
                return (
                    f"the average of {layer.name} is off by {_number(float(off))}, and codes explain "
                    f"{_number(float(allowed))}; rank r has r + 1 times the gradients of rank 0"
                )
        return None

    return first_broken(_worlds(subject, (1, 2, 3, 4, 5), ("constant", "three non-zeros"), "constant"), measure)


@_holds(
    "repeatability",
    "averages follow from gradients, seed and step alone: no global random state is used or changed",
)
def repeatability(subject: Subject) -> Outcome:
    def measure(world: World) -> str | None:
        layers, found = layers_in(subject, world), []

        def work(rank: Rank) -> Tensor:
            number = rank.network.rank
            return torch.stack([rank.apply(gradient(world, layers, number, step), step) for step in range(3)])

        for state in (1, 2):
            with _global_random_states(state) as unchanged:
                found.append(torch.stack(on_ranks(subject, world, work)))
                if not unchanged():
                    return "a global random state changes"
        return None if torch.equal(*map(bits, found)) else "two runs of the same steps have different averages"

    return first_broken(_worlds(subject, (1, 2)), measure)


@_holds(
    "telescoping",
    "with error feedback, the sum of what was applied and of what is still owed is the sum of the mean gradients",
)
def telescoping(subject: Subject) -> Outcome:
    if reason := _without_feedback(subject):
        return reason
    steps = 6

    def measure(world: World) -> str | None:
        layers = layers_in(subject, world)

        def work(rank: Rank) -> tuple[Tensor, Tensor, Tensor, set[str]]:
            given = torch.zeros(sum(layer.numel for layer in layers), dtype=torch.float64)
            applied = torch.zeros_like(given)
            for step in range(steps):
                values = gradient(world, layers, rank.network.rank, step)
                given += values.double() / world.ranks
                applied += rank.apply(values, step).double()
            remembered = {layer.name for layer in layers if rank.residual(layer.name) is not None}
            return given, applied, rank.owed(), remembered

        all_given, (applied, *_), all_owed, (remembered, *_) = zip(*on_ranks(subject, world, work), strict=True)
        given, owed = torch.stack(all_given).sum(0), torch.stack(all_owed).sum(0)
        for layer, start in zip(layers, offsets(layers), strict=True):
            span = slice(start, start + layer.numel)
            if not layer.compressed or (remembered and layer.name not in remembered):
                continue  # it travels as it is
            scale = max(float(each[span].abs().max()) for each in (given, applied, owed))
            lost = float((given - applied - owed)[span].abs().max())
            if not lost <= 1e-4 * scale:
                return (
                    f"after {steps} steps {_number(lost)} of a value of {layer.name} is neither applied nor owed, "
                    f"where sums are up to {_number(scale)}"
                )
        return None

    return first_broken(_worlds(subject, (1, 2, 3), ("constant", "three non-zeros", "heavy tails")), measure)


@_holds(
    "bounded residual",
    "with error feedback, what is owed stays bounded by a multiple of the gradient, however many the steps",
)
def bounded_residual(subject: Subject) -> Outcome:
    if reason := _without_feedback(subject):
        return reason

    def alike(example: Values) -> str | None:
        values = example.tensor
        return _growth(subject, [lambda step: values])

    count = 8 * -(-5 * bucket_of(subject) // 32)
    if found := first_broken(_values(ordinary(), (count,)), alike, tries=40):
        return found
    for ranks, kind in itertools.product((1, 2), ("normal", "2 % non-zeros", "one outlier")):
        if measured := _growth(subject, [_fresh(kind, count, rank) for rank in range(ranks)]):
            return Finding(measured, f"{ranks} ranks, {count} values, fresh gradients of the kind {kind!r}")
    return None


def _fresh(kind: str, count: int, rank: int) -> Callable[[int], Tensor]:
    return lambda step: values_of(kind, count, 2 * step + rank)


def _growth(subject: Subject, gradients: Sequence[Callable[[int], Tensor]]) -> str | None:
    """Whether what ranks with these gradients are owed grows without end.

    It does not where it is hardly larger in the second half of the steps than in the first. Else there are twice as
    many steps, up to four for every value: a code that sends one value a step has sent all of them by then.
    """
    layer = _matrix(len(gradients[0](0)))
    most = max(512, 4 * layer.numel)

    def work(rank: Rank) -> str | None:
        unapplied = torch.zeros(layer.numel, dtype=torch.float64)
        gradient_norm, earlier, later, until = 0.0, 0.0, 0.0, 48
        for step in itertools.count():
            every = [own(step) for own in gradients]
            gradient_norm = max(gradient_norm, *(float(each.norm(dtype=torch.float64)) for each in every))
            unapplied += torch.stack(every).double().mean(0) - rank.apply(every[rank.network.rank], step).double()
            residual = rank.residual(layer.name)
            remembered = [unapplied] if residual is None else [residual, rank.owed()]
            own_owed = max(float(each.norm(dtype=torch.float64)) for each in remembered)
            owed = max(rank.network.collect(own_owed))  # so that all ranks go on, or none
            if not owed <= 1e6 * gradient_norm:
                return f"after {step + 1} steps {_number(owed / gradient_norm)} gradients are owed"
            if step < until // 2:
                earlier = max(earlier, owed)
            else:
                later = max(later, owed)
            if step + 1 < until:
                continue
            if later <= max(1.25 * earlier, gradient_norm):
                return None
            if until >= most:
                break
            earlier, later, until = max(earlier, later), 0.0, 2 * until
        return (
            f"up to {_number(earlier / gradient_norm)} gradients are owed by step {until // 2}, and "
            f"{_number(later / gradient_norm)} by step {until}"
        )

    if len(gradients) == 1:
        return work(alone(subject, [layer]))
    return next(filter(None, run_ranks(len(gradients), lambda ranks: work(Rank(subject, [layer], ranks)))), None)


@_holds(
    "no trace",
    "a step that is settled as not applied changes nothing that is remembered, whether its gradients are finite or not",
)
def no_trace(subject: Subject) -> Outcome:
    def measure(world: World) -> str | None:
        layers = layers_in(subject, world)

        def run(rank: Rank, bad: float | None, dropped: bool, each: bool) -> tuple[Tensor, list[Tensor]]:
            for step in range(2):
                rank.apply(gradient(world, layers, rank.network.rank, step), step)
            if dropped:
                values = gradient(world, layers, rank.network.rank, 2)
                if bad is not None and rank.network.rank == world.ranks - 1:
                    values[len(values) // 2] = bad
                rank.average(values, 2)
                for names in [[layer.name] for layer in layers] if each else [None]:
                    rank.bound.settle(False, names)
            last = rank.apply(gradient(world, layers, rank.network.rank, 3), 3)
            return last, list(_tensors(rank.bound.state_dict()))

        clean = on_ranks(subject, world, lambda rank: run(rank, None, False, False))
        for bad, each in ((math.nan, False), (-math.inf, True), (None, False), (None, True)):
            found = on_ranks(subject, world, lambda rank: run(rank, bad, True, each))  # noqa: B023
            what = f"a step with {bad}" if bad is not None else "a finite step"
            for (last, state), (clean_last, clean_state) in zip(found, clean, strict=True):
                if not torch.equal(bits(last), bits(clean_last)):
                    return f"the average after {what} that was not applied is another than without that step"
                if not all(map(torch.equal, state, clean_state)) or len(state) != len(clean_state):
                    return f"what is remembered after {what} that was not applied is another than without that step"
        return None

    return first_broken(_worlds(subject, (1, 2)), measure, tries=60)


@_holds("grouping", "layers may come in any grouping from step to step, and have the same averages")
def grouping(subject: Subject) -> Outcome:
    if subject.needs_full_gradient:
        return "all layers come at once"

    def measure(world: World) -> str | None:
        layers = layers_in(subject, world)
        spans = {layer.name: slice(at, at + layer.numel) for layer, at in zip(layers, offsets(layers), strict=True)}
        groups = [layers[-1:], layers[len(layers) // 2 : -1], layers[: len(layers) // 2]]

        def work(rank: Rank, regrouped: bool) -> Tensor:
            for step in range(3):
                values = gradient(world, layers, rank.network.rank, step)
                if not regrouped or step == 0:
                    values = rank.average(values, step)
                else:
                    for group in filter(None, groups):
                        names = [layer.name for layer in group]
                        found = rank.average(torch.cat([values[spans[name]] for name in names]), step, names)
                        for layer, at in zip(group, offsets(group), strict=True):
                            values[spans[layer.name]] = found[at : at + layer.numel]
                rank.bound.settle(True)
            return values

        whole = on_ranks(subject, world, lambda rank: work(rank, False))
        for expected, found in zip(whole, on_ranks(subject, world, lambda rank: work(rank, True)), strict=True):
            for name, span in spans.items():
                off = float((expected - found)[span].abs().max())
                if not off <= 1e-5 * float(expected[span].abs().max()) + 1e-6 * float(expected.abs().max()):
                    return f"in other groups the average of {name} is off by {_number(off)} in the third step"
        return None

    return first_broken(_worlds(subject, (1, 2, 3), ("constant", "heavy tails")), measure)


@_holds("padding", "layers may lie apart in their buffer: zeros between them stay, and averages are the same")
def padding(subject: Subject) -> Outcome:
    if subject.needs_full_gradient:
        return "all layers come at once, side by side"

    def measure(world: World) -> str | None:
        layers = layers_in(subject, world)
        starts = offsets(layers)
        names, apart = tuple(layer.name for layer in layers), tuple(at + 3 * turn for turn, at in enumerate(starts))
        spans = [(layer.name, at, layer.numel) for layer, at in zip(layers, apart, strict=True)]
        between = torch.ones(apart[-1] + layers[-1].numel + 3, dtype=torch.bool)
        for _, at, count in spans:
            between[at : at + count] = False

        def work(rank: Rank, padded: bool) -> tuple[Tensor, Tensor]:
            values = gradient(world, layers, rank.network.rank, 0)
            if not padded:
                return rank.average(values, 0), values[:0]
            flat = torch.zeros(len(between))
            flat[~between] = values
            rank.bound.average_(Gradients(flat, names, apart), subject.first_step)
            return flat[~between], flat[between]

        packed = on_ranks(subject, world, lambda rank: work(rank, False))
        padded = on_ranks(subject, world, lambda rank: work(rank, True))
        for (expected, _), (found, zeros) in zip(packed, padded, strict=True):
            if zeros.any():
                return "what lies between layers is no longer zero"
            for (name, _, count), at in zip(spans, starts, strict=True):
                off = float((expected - found)[at : at + count].abs().max())
                if not off <= 1e-5 * float(expected.abs().max()):
                    return f"where layers lie apart the average of {name} is off by {_number(off)}"
        return None

    return first_broken(_worlds(subject, (1, 2)), measure)


@_holds("resume", "an averager that loads the state of another goes on with the same bits")
def resume(subject: Subject) -> Outcome:
    def measure(world: World) -> str | None:
        layers = layers_in(subject, world)

        def work(rank: Rank) -> bool:
            def own(step: int) -> Tensor:
                return gradient(world, layers, rank.network.rank, step)

            for step in range(3):
                rank.apply(own(step), step)
            after = Rank(subject, layers, rank.network)
            after.bound.load_state_dict(rank.bound.state_dict())
            straight = [rank.apply(own(step), step) for step in (3, 4)]
            resumed = [after.apply(own(step), step) for step in (3, 4)]
            return torch.equal(bits(torch.stack(straight)), bits(torch.stack(resumed)))

        same = all(on_ranks(subject, world, work))
        return None if same else "after 3 steps, one that resumes has other averages than one that goes on"

    return first_broken(_worlds(subject, (1, 2), ("constant", "heavy tails")), measure)


# What they share


def _codec(subject: Subject, count: int) -> Codec:
    codec = subject.codec(count)
    assert codec is not None
    return codec


def _values(kinds: Sequence[str], counts: Sequence[int]) -> Iterator[Values]:
    for count, kind in itertools.product(counts, kinds):
        yield Values.of(values_of(kind, count))


def _worlds(
    subject: Subject, ranks: Sequence[int], kinds: Sequence[str] = (), every: str = "normal"
) -> Iterator[World]:
    """Worlds of layers of all kinds: of so many ranks with gradients of one kind, and of two ranks with others."""
    shapes = shapes_of(subject)
    yield from (World(size, shapes, every) for size in ranks)
    yield from (World(2, shapes, kind) for kind in kinds if kind != every)


def _matrix(count: int) -> Layer:
    return Layer(0, "weight", nearly_square(count), compressed=True)


def _sends(subject: Subject) -> bool:
    layer = _matrix(bucket_of(subject))
    return subject.bind([layer], Solo(), 0).bytes_sent([layer], 2) > 0


def _without_feedback(subject: Subject) -> str | None:
    """Why nothing is owed: None where something is."""
    layer = _matrix(4 * bucket_of(subject))
    rank = alone(subject, [layer])
    if rank.bound.without_momentum:
        return "it applies momentum itself, and owes no sum of gradients"
    rank.apply(values_of("normal", layer.numel), 0)
    if subject.error_feedback or rank.residual(layer.name) is not None:
        return None
    return _FEEDBACK_IS_OFF


def _tensors(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for _, value in sorted(state.items()):
            yield from _tensors(value)


@contextlib.contextmanager
def _global_random_states(seed: int) -> Iterator[Callable[[], bool]]:
    """Global random states of a seed, and whether they are still the same; afterwards they are as they were."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    start = _global_states()
    try:
        yield lambda: _global_states() == start
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def _global_states() -> tuple[bytes, bytes, object]:
    return _key(torch.get_rng_state()), pickle.dumps(np.random.get_state()), random.getstate()


def _key(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _first_bad(values: Tensor) -> str:
    flat = values.flatten()
    return str(flat[~flat.isfinite()][0].item())


def _number(value: float) -> str:
    return f"{value:.3g}"
