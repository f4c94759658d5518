"""Wishes: what a search is to make least, and within which limit.

A wish knows nothing of tables. It is validated on construction, and again against the tables that it is asked of.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["objective", "bits", "error", "balance", "time"]
FIELDS: Mapping[Kind, tuple[str, ...]] = {
    "objective": ("alpha", "beta"),
    "bits": ("target",),
    "error": ("target",),
    "balance": (),
    "time": ("target",),
}
WITHIN_ERROR = ("error", "time")
"""Kinds whose target is the width of a uniform assignment, whose error is the limit."""


@dataclass(frozen=True)
class Wish:
    """One of five wishes; make it by the method of its name.

    objective  the least E^alpha C^beta
    bits       the least total error with at most `target` encoded bits a value on average
    error      the fewest bytes with at most the total error of all layers at `target` bits
    balance    the least (1 + omega) x bytes, where omega is the total squared error over |m|^2
    time       the least predicted seconds of a step with at most that error; needs a timeline

    Raises ValueError for a number that makes no sense, and names it.
    """

    kind: Kind
    alpha: float | None = None
    beta: float | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in FIELDS:
            raise ValueError(f"a wish is one of {', '.join(FIELDS)}, got {self.kind!r}")
        for field in ("alpha", "beta", "target"):
            value, wanted = getattr(self, field), field in FIELDS[self.kind]
            if wanted != (value is not None):
                rule = "needs" if wanted else "takes no"
                raise ValueError(f"the wish {self.kind!r} {rule} {field}, got {value}")
        for name, power in (("alpha", self.alpha), ("beta", self.beta)):
            if power is not None and not 0 < power < math.inf:
                raise ValueError(f"the search's {name} must be a finite number above 0, got {power}")
        if self.kind == "bits":
            check_target(self.target)
        if self.kind in WITHIN_ERROR and self.target not in range(1, 9):
            raise ValueError(f"a limit of error is that of a uniform width of 1 to 8 bits, got {self.target}")

    @classmethod
    def objective(cls, alpha: float = 0.5, beta: float = 0.5) -> "Wish":
        """The least E^alpha C^beta, the published formula."""
        return cls("objective", alpha=alpha, beta=beta)

    @classmethod
    def bits(cls, target: float) -> "Wish":
        """The least total error with at most `target` encoded bits a value on average, scales included."""
        return cls("bits", target=target)

    @classmethod
    def error(cls, uniform: int) -> "Wish":
        """The fewest bytes with at most the total error of all layers at `uniform` bits."""
        return cls("error", target=uniform)

    @classmethod
    def balance(cls) -> "Wish":
        """The least (1 + omega) x bytes."""
        return cls("balance")

    @classmethod
    def time(cls, uniform: int) -> "Wish":
        """The least predicted seconds of a step with at most the total error of all layers at `uniform` bits."""
        return cls("time", target=uniform)

    def check(self, widths: Sequence[int], measure: str = "root") -> None:
        """Raise ValueError where tables of these widths, whose errors are of this measure, cannot serve the wish."""
        if self.kind in WITHIN_ERROR and self.target not in widths:
            raise ValueError(
                f"a limit of error is that of one of the widths {', '.join(map(str, widths))}, got {self.target}; "
                "name one of them, or search among more widths"
            )
        if self.kind == "balance" and measure != "square":
            raise ValueError(
                f"a balance weighs squared errors against bytes, and these errors are of measure {measure!r}; "
                "measure 'square'"
            )
        if self.kind == "objective" and measure == "loss":
            raise ValueError(
                "a power of the error needs errors that are not negative, and changes of a loss may be; "
                "ask for a number of bits or an error instead, or measure 'root' or 'square'"
            )

    def to_json(self) -> dict[str, Any]:
        """The kind and its numbers."""
        return {"kind": self.kind} | {field: getattr(self, field) for field in FIELDS[self.kind]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Wish":
        """The wish that `to_json` wrote. Raises ValueError where it is none."""
        known = {"kind", "alpha", "beta", "target"}
        numbers = [value for key, value in content.items() if key != "kind"]
        if (
            "kind" not in content
            or not known >= set(content)
            or not all(type(value) in (int, float) for value in numbers)
        ):
            raise ValueError(f"a wish holds a kind and numbers for alpha, beta or target, got {dict(content)}")
        return cls(**content)

    def __str__(self) -> str:
        match self.kind:
            case "objective":
                return f"the least (total error)^{self.alpha:g} x (ratio)^{self.beta:g}"
            case "bits":
                return f"the least error with at most {self.target:g} bits a value"
            case "error":
                return f"the fewest bytes with at most the error of uniform {self.target:g} bits"
            case "time":
                return f"the least step time with at most the error of uniform {self.target:g} bits"
        return "the least (1 + omega) x bytes"


def check_target(bits_a_value: float | None) -> None:
    """Raise ValueError where this is no number of bits a value."""
    if bits_a_value is None or not 0 < bits_a_value < math.inf:
        raise ValueError(f"a budget must be a finite number of bits a value above 0, got {bits_a_value}")
