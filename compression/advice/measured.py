"""Measurements: what an advice rests on, and its form in a file."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from ..costs import FREE, Cluster, CodecCosts, Compute, Costs

VERSION = 1
"""Of the form in a file."""


@dataclass(frozen=True)
class Measured:
    """What was measured on a model, a batch and some ranks; times are those of the slowest rank.

    shapes    of the trained parameters, by name in the model's order
    buffers   names of the parameters that travel together, in order
    compute   the rank's own work in a step
    cluster   the ranks and what joins them
    costs     of messages, and of each codec by the name of its choice
    errors    of one encoding of a gradient, relative to its norm, by the same names

    Raises ValueError, one line, for a number that is none, and where the parts are not of one model.
    """

    shapes: Mapping[str, tuple[int, ...]]
    buffers: tuple[tuple[str, ...], ...]
    compute: Compute
    cluster: Cluster
    costs: Costs
    errors: Mapping[str, float]
    machine: str = ""
    ranks_on_machine: int = 1
    seconds: float = field(default=0.0, compare=False)  # that measuring took

    def __post_init__(self) -> None:
        for name, shape in self.shapes.items():
            if not all(isinstance(size, int) and size >= 0 for size in shape):
                raise ValueError(f"shapes are of whole numbers, got {shape} of {name!r}")
        if sorted(name for names in self.buffers for name in names) != sorted(self.shapes):
            raise ValueError("buffers hold every one of the shapes' names once, and these do not; measure anew")
        if missing := self.shapes.keys() - self.compute.ready.keys():
            raise ValueError(f"ready says nothing of {min(missing)!r}; measure anew")
        plain = {name: value for name, value in vars(self.costs).items() if name != "codecs"}
        speeds = {
            f"{name} of {choice}": value
            for choice, costs in self.costs.codecs.items()
            for name, value in vars(costs).items()
        }
        errors = {f"error of {choice}": error for choice, error in self.errors.items()}
        own = {"ranks_on_machine": self.ranks_on_machine, "seconds": self.seconds}
        for name, value in (plain | speeds | errors | own).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"measurements are finite and not negative, got {value} as {name}; measure anew")

    @property
    def values(self) -> int:
        """Values of the gradient."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers, and the `version` of the form; rates without a limit are null."""
        content = {"version": VERSION} | asdict(self)
        for name, value in content["cluster"].items():
            content["cluster"][name] = None if value == FREE else value
        return content

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The inverse of `to_json`. Raises ValueError where it is none."""
        try:
            if content["version"] != VERSION:
                raise ValueError(f"measurements of version {VERSION} are read, got {content['version']}; measure anew")
            cluster: dict[str, Any] = {
                name: FREE if value is None else value for name, value in content["cluster"].items()
            }
            costs = dict(content["costs"])
            costs["codecs"] = {name: CodecCosts(**each) for name, each in costs["codecs"].items()}
            if odd := costs["codecs"].keys() ^ content["errors"].keys():
                raise ValueError(f"errors and codecs have the same names, and {min(odd)!r} is of one; measure anew")
            if "float32" not in content["errors"]:
                raise ValueError("float32, which every advice is held against, is not in errors; measure anew")
            return cls(
                shapes={name: tuple(shape) for name, shape in content["shapes"].items()},
                buffers=tuple(tuple(names) for names in content["buffers"]),
                compute=Compute(**content["compute"]),
                cluster=Cluster(**cluster),
                costs=Costs(**costs),
                errors=dict(content["errors"]),
                machine=str(content["machine"]),
                ranks_on_machine=content["ranks_on_machine"],
                seconds=content["seconds"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this holds no measurements of an advice ({error!r}); take an advice.json") from error
