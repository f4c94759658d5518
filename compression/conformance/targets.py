"""Targets: what a name or an object is that shall be held to its promises, and how its averagers are bound.

A codec is averaged as a user of it would: a quantizer by `TwoHop`, any other by `OneHop`.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..averagers import Averager, OneHop, TopKAverager, TwoHop, WarmUp
from ..codecs.base import Codec
from ..codecs.quantizer import Quantizer
from ..layers import Layer
from ..network.collectives import Collectives, Solo
from ..registry import COMPRESSORS, Compressor, Row

BUCKET = 64
"""Values that a layer needs to be encoded, by codecs that have no bucket size."""

KNOWN = (
    "a codec, a class or function that makes one (from its options, or for each layer), a registry's Row, or a "
    "Compressor that was built"
)


class UnknownTarget(ValueError):
    """A name, an object or an option with which nothing can be checked."""


@dataclass(frozen=True)
class Subject:
    """One way of using a compressor: with error feedback, or without.

    `label` tells it from the target's others. `error_feedback`: what an encoding loses shall be added later.
    `bucket_size`: layers with fewer values are not encoded. `first_step`: the first step that is not warm-up.
    `needs_full_gradient`: all layers come at once.
    """

    label: str
    bind: Callable[[Sequence[Layer], Collectives, int], Averager]
    error_feedback: bool
    bucket_size: int = BUCKET
    first_step: int = 0
    needs_full_gradient: bool = False

    def codec(self, count: int) -> Codec | None:
        """The codec of a matrix of so many values; None where an averager's messages are no codec's."""
        return _codec_of(self, count)


@functools.lru_cache(maxsize=1000)
def _codec_of(subject: Subject, count: int) -> Codec | None:
    layer = Layer(0, "weight", nearly_square(count), compressed=True)
    bound = unwrapped(subject.bind([layer], Solo(), 0))
    if isinstance(bound, OneHop):
        return bound.codecs[layer.name]
    if isinstance(bound, TwoHop):
        return bound.codec
    return bound.codec_at(subject.first_step) if isinstance(bound, TopKAverager) else None


@dataclass(frozen=True)
class Target:
    """A compressor under its name, and the ways of using it that are checked."""

    name: str
    subjects: tuple[Subject, ...]


def nearly_square(count: int) -> tuple[int, int]:
    """The shape of the matrix of so many values with the most rows that are no more than the columns."""
    rows = next(rows for rows in range(max(1, int(count**0.5)), 0, -1) if count % rows == 0)
    return rows, count // rows


def unwrapped(averager: Averager) -> Averager:
    """The averager behind a warm-up."""
    return averager.inner if isinstance(averager, WarmUp) else averager


def resolve(target: object, options: Mapping[str, Any]) -> Target:
    """What a name of the registry, a `module:name` or an object is, with these options.

    Raises UnknownTarget where it is nothing that can be checked, or does not take the options.
    """
    if not isinstance(target, str):
        return _of_object(_called(target), target, options)
    if ":" in target:
        return _of_object(target, _loaded(target), options)
    if target not in COMPRESSORS:
        raise UnknownTarget(
            f"no compressor is called {target!r}; there are {', '.join(COMPRESSORS)}. What is not among them is named "
            "as module:name"
        )
    return _of_row(target, COMPRESSORS[target], options)


def _called(target: object) -> str:
    return getattr(target, "__qualname__", None) or (target.name if isinstance(target, Compressor) else str(target))


def _loaded(path: str) -> object:
    module, _, name = path.partition(":")
    if not (module and name):
        raise UnknownTarget(f"{path!r} names no object: name it as module:name")
    if module.endswith(".py") or "/" in module:
        raise UnknownTarget(f"{path}: a module is named without its folder and its .py; name it as module:name")
    try:
        found: object = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnknownTarget(f"{path}: no module is called {error.name!r}") from error
    except (Exception, SystemExit) as error:
        raise UnknownTarget(f"{path}: importing {module} raises {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UnknownTarget(f"{path}: {module} has no {name!r}")
        found = getattr(found, part)
    return found


def _of_object(name: str, target: object, options: Mapping[str, Any]) -> Target:
    if isinstance(target, Row):
        return _of_row(name, target, options)
    if isinstance(target, Compressor):
        if options:
            raise UnknownTarget(f"{name} is built already, and takes no option {min(options)!r}")
        return Target(name, (_of_chosen("", COMPRESSORS[target.name], target.options),))
    if not isinstance(target, type) and _is_codec(target):
        feedback = _feedback({**options})
        if others := sorted(set(options) - {"error_feedback"}):
            raise UnknownTarget(f"{name} is made already, and takes no option {others[0]!r}; its class might")
        return Target(name, (_of_codec(lambda layer: target, target, feedback),))
    if callable(target):
        return _of_factory(name, target, options)
    raise UnknownTarget(f"{name} is of {type(target).__name__}, with which nothing can be checked: name {KNOWN}")


def _of_factory(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Target:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError as error:  # of a type that is built in
        raise UnknownTarget(f"{name} makes nothing that can be checked: name {KNOWN}") from error
    own, feedback = dict(options), _feedback(options)
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    if "error_feedback" in parameters:
        own["error_feedback"] = feedback
    elif not takes_any:
        own.pop("error_feedback", None)
    taken = [each for each in parameters if each not in ("layer", "args", "kwargs")]
    for option in own:
        if option == "layer" or (option not in parameters and not takes_any):
            raise UnknownTarget(f"{name} takes no option {option!r}; it takes {', '.join(taken) or 'none'}")
    first = Layer(0, "weight", nearly_square(BUCKET), compressed=True)
    made = _made(name, factory, {**own, "layer": first} if "layer" in parameters else own)
    if "layer" in parameters and _is_codec(made):
        return Target(name, (_of_codec(lambda layer: factory(layer=layer, **own), made, feedback),))
    if isinstance(made, Row | Compressor):
        return _of_object(name, made, {})
    if not _is_codec(made):
        raise UnknownTarget(f"{name} makes a {type(made).__name__}, with which nothing can be checked: name {KNOWN}")
    return Target(name, (_of_codec(lambda layer: made, made, feedback),))


def _made(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise UnknownTarget(f"{name}: {error}; name its options") from error
    try:
        return factory(**options)
    except Exception as error:
        raise UnknownTarget(f"{name} cannot be made of {dict(options)}: {type(error).__name__}: {error}") from error


def _is_codec(target: object) -> bool:
    return all(callable(getattr(target, name, None)) for name in ("wire_bytes", "encode", "decode"))


def _feedback(options: Mapping[str, Any]) -> bool:
    feedback = options.get("error_feedback", True)
    if not isinstance(feedback, bool):
        raise UnknownTarget(f"error_feedback is true or false, got {feedback!r}")
    return feedback


def _of_codec(codec_of: Callable[[Layer], Any], example: Any, feedback: bool) -> Subject:
    if isinstance(example, Quantizer):

        def quantized(layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
            return TwoHop(example, layers, collectives, seed, feedback)

        return Subject("", quantized, feedback, example.bucket_size)

    def gathered(layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
        return OneHop(codec_of, layers, collectives, seed, feedback)

    return Subject("", gathered, feedback)


def _of_row(name: str, row: Row, options: Mapping[str, Any]) -> Target:
    both = "error_feedback" in row.takes and "error_feedback" not in options and not row.needs_feedback
    ways: list[dict[str, Any]] = [{"error_feedback": False}, {"error_feedback": True}] if both else [{}]
    subjects: list[Subject] = []
    for way in ways:
        label = ", ".join(f"{option}={value}".lower() for option, value in way.items())
        try:
            chosen = row.chosen(name, {**options, **way})
        except ValueError as error:
            if way.get("error_feedback") and subjects:  # at odds with another option
                continue
            raise UnknownTarget(str(error)) from error
        subjects.append(_of_chosen(label, row, chosen))
    return Target(name, tuple(subjects))


def _of_chosen(label: str, row: Row, chosen: Any) -> Subject:
    def bind(layers: Sequence[Layer], collectives: Collectives, seed: int) -> Averager:
        return row.averager(chosen, layers, collectives, seed)

    return Subject(
        label,
        bind,
        chosen.error_feedback or row.needs_feedback,
        chosen.bucket_size,
        chosen.warmup_steps,
        chosen.needs_full_gradient,
    )
