"""Compressors that break one promise each, and keep all others."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compression.averagers import OneHop
from compression.averagers.base import Sent, gathered
from compression.gradients import Gradients
from compression.layers import Layer
from compression.network.collectives import Collectives
from compression.randomness import stream_key
from compression.registry import FixedWidthOptions, Row


@dataclass(frozen=True)
class Signs:
    """Signs as bytes, and the mean magnitude: keeps all promises."""

    def wire_bytes(self, count: int) -> int:
        return 4 + count

    def encode(self, values_RN: Tensor, seed: int) -> Tensor:
        return torch.cat([self.scale(values_RN).view(torch.uint8), (values_RN >= 0).to(torch.uint8)], dim=1)

    def decode(self, wire_RB: Tensor, count: int) -> Tensor:
        scale = wire_RB[:, :4].reshape(-1).view(torch.float32)[:, None]
        return scale * (wire_RB[:, 4:].to(torch.float32) * 2 - 1)

    def scale(self, values_RN: Tensor) -> Tensor:
        return values_RN.abs().mean(1, keepdim=True, dtype=torch.float64).to(torch.float32)


class WrongSize(Signs):
    def wire_bytes(self, count: int) -> int:
        return super().wire_bytes(count) + (count == 13)


class Impure(Signs):
    def encode(self, values_RN: Tensor, seed: int) -> Tensor:
        if values_RN.shape[1] == 2:
            torch.manual_seed(seed % 2**32)
        return super().encode(values_RN, seed)


class DependentRows(Signs):
    def scale(self, values_RN: Tensor) -> Tensor:
        return super().scale(values_RN.reshape(1, -1)).repeat(len(values_RN), 1)


class Biased(Signs):
    """Values as they are, and a fifth of the largest magnitude added to every other, taken from the rest."""

    def wire_bytes(self, count: int) -> int:
        return 4 * count

    def encode(self, values_RN: Tensor, seed: int) -> Tensor:
        return values_RN.clone().view(torch.uint8)

    def decode(self, wire_RB: Tensor, count: int) -> Tensor:
        values = wire_RB.clone().view(torch.float32)
        sides = torch.arange(count) % 2 * 2 - 1
        moved = (values + 0.2 * values.abs().amax(1, keepdim=True) * sides).clamp(-3.4e38, 3.4e38)
        return torch.where(values.isfinite(), moved, values)


class Overflowing(Signs):
    def scale(self, values_RN: Tensor) -> Tensor:
        return values_RN.abs().mean(1, keepdim=True)


class Forgiving(Signs):
    def scale(self, values_RN: Tensor) -> Tensor:
        return super().scale(values_RN.nan_to_num(0, 0, 0))


class Squeezed(Signs):
    def decode(self, wire_RB: Tensor, count: int) -> Tensor:
        return super().decode(wire_RB, count).squeeze(1)


@dataclass(frozen=True)
class StochasticSign(Signs):
    """Signs at random, whose mean is the vector: unbiased. Their error is longer than most vectors."""

    stretch: float = 1.0

    def encode(self, values_RN: Tensor, seed: int) -> Tensor:
        scale = values_RN.abs().amax(1, keepdim=True) * self.stretch
        generator = torch.Generator().manual_seed(stream_key(seed, 1))
        draws = torch.rand(values_RN.shape, generator=generator, dtype=torch.float64)
        positive = draws < 0.5 + 0.5 * values_RN.double() / scale
        return torch.cat([scale.view(torch.uint8), positive.to(torch.uint8)], dim=1)


# Averagers


class SignsInOneHop(OneHop):
    """Keeps all promises."""

    def __init__(self, layers: Sequence[Layer], collectives: Collectives, seed: int, feedback: bool) -> None:
        super().__init__(lambda layer: Signs(), layers, collectives, seed, feedback)


class WrongTraffic(SignsInOneHop):
    def sent(self, layers: Sequence[Layer], world_size: int) -> Sent:
        return super().sent(layers, world_size).then(gathered(1, world_size)._replace(messages=0, rounds=0))


class Disagreeing(SignsInOneHop):
    def average_(self, gradients: Gradients, step: int) -> None:
        super().average_(gradients, step)
        if self.collectives.rank == 4:
            gradients.flat.copy_(gradients.flat.nextafter(torch.tensor(torch.inf)))


class Summing(SignsInOneHop):
    def average_(self, gradients: Gradients, step: int) -> None:
        super().average_(gradients, step)
        if self.collectives.world_size == 4:
            gradients.flat.mul_(4)


class Unrepeatable(SignsInOneHop):
    def average_(self, gradients: Gradients, step: int) -> None:
        torch.rand(1)
        super().average_(gradients, step)


class Decaying(SignsInOneHop):
    def _encode(self, name: str, values: Tensor, step: int) -> Tensor:
        message = super()._encode(name, values, step)
        if self.states and self.layers[name].compressed:
            assert self._residual.pending is not None
            self._residual.pending[self._residual.span(name)] *= 0.9
        return message


class Rash(SignsInOneHop):
    def settle(self, applied: Tensor | bool, layers: Collection[str] | None = None) -> None:
        super().settle(True, layers)


class Regrouping(SignsInOneHop):
    """It forgets what it remembers when layers come in another grouping."""

    _names: tuple[str, ...] | None = None

    def average_(self, gradients: Gradients, step: int) -> None:
        if self.states and self._names not in (None, gradients.names):
            super().load_state_dict({})
        self._names = gradients.names
        super().average_(gradients, step)


class Packing(SignsInOneHop):
    """It takes layers to lie side by side."""

    def average_(self, gradients: Gradients, step: int) -> None:
        ends = list(itertools.accumulate((self._sizes[name] for name in gradients.names), initial=0))
        super().average_(Gradients(gradients.flat, gradients.names, tuple(ends[:-1])), step)


class Forgetful(SignsInOneHop):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def row_of(kind: type[SignsInOneHop]) -> Row:
    """A row of the registry that averages so."""

    def average(options: Any, layers: Sequence[Layer], collectives: Collectives, seed: int) -> SignsInOneHop:
        return kind(layers, collectives, seed, options.error_feedback)

    return Row("signs", FixedWidthOptions, average)


ROW = row_of(SignsInOneHop)
BROKEN: dict[str, object] = {
    "exact size": WrongSize(),
    "purity": Impure(),
    "independent rows": DependentRows(),
    "bias or contraction": Biased(),
    "finite": Overflowing(),
    "not finite": Forgiving(),
    "odd sizes": Squeezed(),
    "bounded residual": StochasticSign(),
    "exact traffic": row_of(WrongTraffic),
    "agreement": row_of(Disagreeing),
    "mean": row_of(Summing),
    "repeatability": row_of(Unrepeatable),
    "telescoping": row_of(Decaying),
    "no trace": row_of(Rash),
    "grouping": row_of(Regrouping),
    "padding": row_of(Packing),
    "resume": row_of(Forgetful),
}
"""By the name of the promise."""


# Wrong at some sizes, steps or values only


@dataclass(frozen=True)
class WrongWhere(Biased):
    """Values as they are, negated where `wrong` says so."""

    wrong: Callable[[Tensor], bool]

    def encode(self, values_RN: Tensor, seed: int) -> Tensor:
        values = -values_RN if self.wrong(values_RN) else values_RN
        return values.clone().view(torch.uint8)

    def decode(self, wire_RB: Tensor, count: int) -> Tensor:
        return wire_RB.clone().view(torch.float32)


class Halving(WrongWhere):
    """Halves its argument where it is wrong."""

    def encode(self, values_RN: Tensor, seed: int) -> Tensor:
        wire = values_RN.clone().view(torch.uint8)
        if self.wrong(values_RN):
            values_RN.mul_(0.5)
        return wire


WRONG_SOMEWHERE: dict[str, object] = {
    "with more than 320 values": WrongWhere(lambda values: values.shape[1] > 320),
    "with more than 2000 values": WrongWhere(lambda values: values.shape[1] > 2000),
    "with one value": WrongWhere(lambda values: values.shape[1] == 1),
    "with 64 values": WrongWhere(lambda values: values.shape[1] == 64),
    "with positive values": WrongWhere(lambda values: values.shape[1] > 1 and bool((values > 0).all())),
    "with a last value alone": WrongWhere(lambda values: values.shape[1] > 1 and bool((values[:, :-1] == 0).all())),
    "its argument is changed, if it is long": Halving(lambda values: values.shape[1] > 400),
}


@dataclass(frozen=True)
class Kept(WrongWhere):
    """A fraction of the values, each drawn by itself; unbiased if they are scaled, else a contraction in the mean."""

    fraction: float = 0.05
    scaled: bool = False

    def encode(self, values_RN: Tensor, seed: int) -> Tensor:
        draws = torch.rand(values_RN.shape, generator=torch.Generator().manual_seed(stream_key(seed, 1) >> 1))
        scale = 1 / self.fraction if self.scaled else 1.0
        scaled = torch.where(values_RN.isfinite(), (values_RN * scale).clamp(-3.4e38, 3.4e38), values_RN)
        kept = torch.where(draws < self.fraction, scaled, 0.0 * values_RN)
        return kept.contiguous().view(torch.uint8)


class WrongLater(SignsInOneHop):
    """Keeps all promises in the first `GOOD` steps."""

    GOOD = 3


class DisagreeingLater(WrongLater):
    def average_(self, gradients: Gradients, step: int) -> None:
        super().average_(gradients, step)
        if step >= self.GOOD:
            gradients.flat.mul_(1 + 0.1 * self.collectives.rank)


class SilentLater(WrongLater):
    def average_(self, gradients: Gradients, step: int) -> None:
        super().average_(gradients, step)
        if step >= self.GOOD:
            gradients.flat.zero_()


class TalkativeLater(WrongLater):
    def average_(self, gradients: Gradients, step: int) -> None:
        super().average_(gradients, step)
        if step >= self.GOOD:
            self.collectives.sum_(torch.zeros(1000))


WRONG_LATER = {"agreement": DisagreeingLater, "mean": SilentLater, "exact traffic": TalkativeLater}
