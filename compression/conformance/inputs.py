"""Inputs: values of many kinds, by name, on which promises tend to break.

What a code may fail on elsewhere is added: `INPUTS["ones"] = Input(lambda count, generator: torch.ones(count))`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..randomness import stream_key


@dataclass(frozen=True)
class Input:
    """A kind of values: `make(count, generator)` gives float32 [count].

    `ordinary` values are those that float32 adds and multiplies as it does numbers near 1. The others need only come
    back finite, and no longer than they were.
    """

    make: Callable[[int, Generator], Tensor]
    ordinary: bool = True


def _normal(count: int, generator: Generator) -> Tensor:
    return torch.randn(count, generator=generator)


def _sparse(nonzeros: int) -> Callable[[int, Generator], Tensor]:
    def make(count: int, generator: Generator) -> Tensor:
        values = torch.zeros(count)
        places = torch.randperm(count, generator=generator)[:nonzeros]
        values[places] = 1.5 * _normal(len(places), generator)
        return values

    return make


def _alone(count: int, place: int) -> Tensor:
    values = torch.zeros(count)
    values[place] = 1.5
    return values


def _outlier(count: int, generator: Generator) -> Tensor:
    values = 0.01 * _normal(count, generator)
    values[count // 2] = -7.5
    return values


def _mixed(count: int, generator: Generator) -> Tensor:
    powers = 40 * torch.rand(count, generator=generator) - 20
    return _normal(count, generator).sign() * 10**powers


INPUTS: dict[str, Input] = {
    "constant": Input(lambda count, generator: torch.full((count,), -1.25)),
    "zeros": Input(lambda count, generator: torch.zeros(count)),
    "normal": Input(_normal),
    "negative": Input(lambda count, generator: -_normal(count, generator).abs() - 0.5),
    "positive": Input(lambda count, generator: _normal(count, generator).abs() + 0.5),
    "first alone": Input(lambda count, generator: _alone(count, 0)),
    "last alone": Input(lambda count, generator: _alone(count, count - 1)),
    "one non-zero": Input(_sparse(1)),
    "two non-zeros": Input(_sparse(2)),
    "three non-zeros": Input(_sparse(3)),
    "eight non-zeros": Input(_sparse(8)),
    "ten non-zeros": Input(_sparse(10)),
    "2 % non-zeros": Input(lambda count, generator: _sparse(-(-count // 50))(count, generator)),
    "one outlier": Input(_outlier),
    "heavy tails": Input(lambda count, generator: _normal(count, generator) ** 5),
    "mixed magnitudes": Input(_mixed),
    "about 1e-30": Input(lambda count, generator: 1e-30 * _normal(count, generator)),
    "about 1e19": Input(lambda count, generator: 1e19 * _normal(count, generator)),
    "denormal": Input(lambda count, generator: 1e-41 * _normal(count, generator), ordinary=False),
    "3e38": Input(lambda count, generator: 3e38 * _normal(count, generator).sign(), ordinary=False),
}


def ordinary() -> list[str]:
    """Names of the inputs that float32 adds and multiplies as it does numbers near 1."""
    return [name for name, kind in INPUTS.items() if kind.ordinary]


def values_of(name: str, count: int, seed: int = 0) -> Tensor:
    """Values of a kind: float32 [count], always the same."""
    key = stream_key(seed, count, zlib.crc32(name.encode()))
    return INPUTS[name].make(count, Generator().manual_seed(key >> 1)).to(torch.float32)
