"""Trials: the ranks of a world, each with its averager, in threads of this process."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..exchange.flat_gradient import FlatGradient
from ..gradients import Gradients
from ..layers import Layer, layers_of
from ..network.collectives import Collectives, Solo
from ..network.threads import ThreadCollectives, run_ranks
from .examples import World
from .inputs import values_of
from .targets import Subject, unwrapped

SEED = 5
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
Result = TypeVar("Result")


def bucket_of(subject: Subject) -> int:
    """Values that share scales; 64 where those of a whole layer do."""
    return 64 if subject.bucket_size == -1 else subject.bucket_size


def shapes_of(subject: Subject) -> Shapes:
    """Layers of all kinds: large and small ones, of one bucket and of a value more, vectors and a scalar."""
    bucket = bucket_of(subject)
    shapes: dict[str, tuple[int, ...]] = {
        "conv": (7, 5, 3, 1 + bucket // 64),
        "norm": (7,),
        "scalar": (),
        "bucket": (1, bucket),
        "over": (bucket + 1, 1),
        "small": (2, 3),
        "wide": (13, 2 * -(-bucket // 10) + 1),
        "bias": (11,),
    }
    return tuple(shapes.items())


class Rank:
    """One rank of a trial: an averager, bound to layers. Steps are counted from the first that is not warm-up."""

    def __init__(self, subject: Subject, layers: Sequence[Layer], network: Collectives, seed: int = SEED) -> None:
        self.subject, self.layers, self.network = subject, layers, network
        self.bound = subject.bind(layers, network, seed)
        self._whole = FlatGradient(layers)

    def average(self, values: Tensor, step: int, names: Sequence[str] | None = None) -> Tensor:
        """The average of these layers over the ranks, by default of all: flat, side by side."""
        layers = [layer for layer in self.layers if names is None or layer.name in names]
        flat, starts = values.clone(), offsets(layers)
        gradients = Gradients(flat, tuple(layer.name for layer in layers), tuple(starts))
        joined = self._whole.join([gradients]) if self.subject.needs_full_gradient else gradients
        self.bound.average_(joined, self.subject.first_step + step)
        if joined is not gradients:
            self._whole.split(joined, [gradients])
        return flat

    def apply(self, values: Tensor, step: int) -> Tensor:
        """The average, which then counts as applied."""
        averaged = self.average(values, step)
        self.bound.settle(True)
        return averaged

    def residual(self, name: str) -> Tensor | None:
        """What this rank's own gradients of a layer are still owed, flat; None where it does not remember any."""
        values: Tensor | None = self.bound.state_dict().get("residual", {}).get(name)
        return values

    def owed(self) -> Tensor:
        """This rank's part of what the averages are still owed: flat, of all layers; the ranks' parts add up."""
        state = self.bound.state_dict()
        total = torch.zeros(sum(layer.numel for layer in self.layers), dtype=torch.float64)
        for layer, start in zip(self.layers, offsets(self.layers), strict=True):
            if layer.name in state.get("residual", {}):
                total[start : start + layer.numel] += state["residual"][layer.name] / self.network.world_size
            if layer.name in state.get("share_residual", {}):
                first, stop = unwrapped(self.bound).shards[layer.name][self.network.rank]  # type: ignore[attr-defined]
                total[start + first : start + stop] += state["share_residual"][layer.name]
        return total


def offsets(layers: Sequence[Layer]) -> list[int]:
    """Where each layer begins, side by side."""
    return list(itertools.accumulate((layer.numel for layer in layers[:-1]), initial=0)) if layers else []


def layers_in(subject: Subject, world: World) -> tuple[Layer, ...]:
    """The layers of a world, compressed as the subject's bucket size has it."""
    return layers_of(world.shapes, subject.bucket_size)


def gradient(world: World, layers: Sequence[Layer], rank: int, step: int) -> Tensor:
    """A rank's gradient of a step: flat, of all layers."""
    return torch.cat([values_of(world.kind, layer.numel, 1000 * step + 10 * layer.index + rank) for layer in layers])


def alone(subject: Subject, layers: Sequence[Layer], seed: int = SEED) -> Rank:
    """A rank that has no others."""
    return Rank(subject, layers, Solo(), seed)


def on_ranks(
    subject: Subject,
    world: World,
    work: Callable[[Rank], Result],
    network: Callable[[ThreadCollectives], Any] = lambda ranks: ranks,
) -> list[Result]:
    """The result of `work` on every rank of a world."""
    layers = layers_in(subject, world)
    return run_ranks(world.ranks, lambda ranks: work(Rank(subject, layers, network(ranks))))


def bits(values: Tensor) -> Tensor:
    """Floats as integers, so that NaNs are equal where their bits are."""
    return values.contiguous().view(torch.int32)
