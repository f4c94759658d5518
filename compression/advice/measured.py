"""Measurements: what an advice rests on, and its form in a file."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from ..costs import FREE, Cluster, CodecCosts, Compute, Costs


@dataclass(frozen=True)
class Measured:
    """What was measured on a model, a batch and some ranks; times are those of the slowest rank.

    shapes    of the trained parameters, by name in the model's order
    buffers   names of the parameters that travel together, in order
    compute   the rank's own work in a step
    cluster   the ranks and what joins them
    costs     of messages, and of each codec by the name of its choice
    errors    of one encoding of a gradient, relative to its norm, by the same names
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

    @property
    def values(self) -> int:
        """Values of the gradient."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers; rates without a limit are null."""
        content = asdict(self)
        for name, value in content["cluster"].items():
            content["cluster"][name] = None if value == FREE else value
        return content

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The inverse of `to_json`. Raises ValueError where it is none."""
        try:
            cluster: dict[str, Any] = {
                name: FREE if value is None else value for name, value in content["cluster"].items()
            }
            costs = dict(content["costs"])
            costs["codecs"] = {name: CodecCosts(**each) for name, each in costs["codecs"].items()}
            return cls(
                shapes={name: tuple(shape) for name, shape in content["shapes"].items()},
                buffers=tuple(tuple(names) for names in content["buffers"]),
                compute=Compute(**content["compute"]),
                cluster=Cluster(**cluster),
                costs=Costs(**costs),
                errors=dict(content["errors"]),
                machine=str(content["machine"]),
                ranks_on_machine=int(content["ranks_on_machine"]),
                seconds=float(content["seconds"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this holds no measurements of an advice ({error!r}); take an advice.json") from error
