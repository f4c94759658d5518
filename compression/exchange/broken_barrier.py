"""The broken barrier: a step waits for the layers that hold most of the gradient, and the others' averages come late.

Backward ends with the first layers, and forward begins with them: their averages are the only ones that the next
forward needs at once, and nothing is left to hide them behind. They also tend to hold most of the gradient's norm, and
few of its bytes. So a step waits for the smallest prefix of layers, in forward order, that holds a share R of the
squared norm. The others travel behind the next steps' compute, and are applied S steps later, as they are.

SGD still converges where the weights that a gradient is taken at stay near those that it is applied to, the better the
nearer (Elastic Consistency, Nadiradze et al., AAAI 2021, arXiv:2001.05918). The scheduler published with that goes on
as soon as enough of the norm has arrived: which layers are late, and for how long, is up to the network's timing and
differs from run to run. Here all that results depend on is fixed before anything travels:

* The prefix of a step follows from the norms of the averages that were applied last, which all ranks know.
* What is not in the prefix of step t is applied in step t + S, also where it arrived long before.
* A layer that is not due in a step is skipped: no momentum, no weight decay. Two averages that are due are added.

Only the order on the wire is up to timing. A prefix overtakes all late averages that still wait, but for those of its
own layers, since what a codec remembers of a layer goes from step to step. Before every job rank 0 chooses for all.

When not to use it. Every byte still travels: a step can come down to max(compute, communication) and no further, so
where the network is several times too slow, send less instead; where it is fast, there is nothing to hide. On a steady
network S = 1 hides as much as any S: more only evens out a rate that varies. Staleness costs accuracy, above all with
a high learning rate and momentum m: along a direction of curvature c, steps that are late by one are stable for
lr x c < 1 - m, where those in time are for lr x c < 2 (1 + m), at m = 0.9 for 0.1 and 3.8 (the roots of
z^2 - (1 + m) z + m + lr c and of z^2 - (1 + m - lr c) z + m). And it costs S copies of the late layers, in a
checkpoint within an epoch too. A loss scale hears of an overflow in a late layer S steps late, and backs off once for
every step that overflowed meanwhile.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients import Gradients
from ..network.collectives import Collectives
from ..registry import COMPRESSORS, Compressor, with_stale_updates
from ..streams import Phases, device_future, run_all
from .exchange import Exchange, is_unit_scale, not_finite, unscaled
from .hooks import shaped

_CHUNK = 2**16  # values that are squared at a time, so that their float64 copy stays in the cache


def prefix_length(squares: Sequence[float], fraction: float) -> int:
    """How many layers, from the first on, hold a share of the sum of their squared norms.

    All of them where there is nothing to share: the sum is zero, or not finite.
    """
    total = sum(squares)
    held = 0.0
    for length, square in enumerate(squares, start=1):
        held += square
        if 0 < total < math.inf and held >= fraction * total:
            return length
    return len(squares)


@dataclass(eq=False)
class _Part:
    """Some layers of one step: their gradients, and once `done` the averages, float32 and without loss scale."""

    step: int
    due: int
    gradients: Gradients
    bad: Sequence[Tensor] = ()  # of each layer: its average is not finite
    squares: Sequence[float] = ()  # of each layer: the squared norm of its average
    done: Any = field(init=False)  # a future

    def __post_init__(self) -> None:
        self.done = device_future(self.gradients.flat.device)

    def complete(self) -> None:
        self.done.set_result([self.gradients.flat, *self.bad])


class BrokenBarrier(Exchange):
    """An exchange whose steps wait for a share of the gradient; see above for what it promises and what it costs.

    It needs the whole of a step: `begin_step`, backward, `finish`, the optimizer's step, `settle`. Before weights are
    looked at the late averages must be applied too: see `drain`.

    What averagers and recorder remember of a layer is committed with the layer's own average, if that is finite. Where
    a step is not applied, because another layer's was not, a finite average of it is lost.
    """

    def __init__(
        self,
        model: nn.Module,
        compressor: Compressor,
        collectives: Collectives,
        seed: int,
        fraction: float,
        late_steps: int,
    ) -> None:
        if not (0 < fraction <= 1 and late_steps >= 1):
            raise ValueError(
                f"a broken barrier waits for a fraction above 0 and at most 1, and is late by 1 step or more, got "
                f"{fraction} and {late_steps}"
            )
        if not COMPRESSORS[compressor.name].supports_stale_updates or compressor.needs_full_gradient:
            raise ValueError(
                f"compressor {compressor.name} averages whole steps, and a broken barrier lets layers be late; "
                f"use {', '.join(with_stale_updates())}, without big_grad"
            )
        super().__init__(model, compressor, collectives, seed)
        self.fraction, self.late_steps = fraction, late_steps
        self._squares = dict.fromkeys(self._parameters, math.nan)  # of the averages that were applied last
        self.prefix = frozenset(self._parameters)
        self._outstanding: list[_Part] = []  # of this step and earlier ones, in their order
        self._held: list[_Part] = []  # late ones of this step, until its prefix has been queued
        self._last_late = dict.fromkeys(self._parameters, 0)  # how many late ones are queued up to the layer's last

    def begin_step(self, loss_scale: float | Tensor = 1.0) -> None:
        super().begin_step(loss_scale)
        length = prefix_length(list(self._squares.values()), self.fraction)
        self.prefix = frozenset(list(self._squares)[:length])

    def finish(self) -> Tensor:
        """Wait for the averages that are due in this step, and put them into .grad; parameters without one get None.

        Returns and raises as `Exchange.finish`.
        """
        for part in self._held:
            number = self._engine.submit(partial(self._average_part, part), [part.done])
            self._last_late.update(dict.fromkeys(part.gradients.names, number))
        self._held = []
        return self._apply(self.step)

    def drain(self, loss_scale: float | Tensor = 1.0) -> Tensor | None:
        self._loss_scale = loss_scale
        return self._apply(min(part.due for part in self._outstanding)) if self._outstanding else None

    def state_dict(self) -> dict[str, Any]:
        """As `Exchange.state_dict`; what is outstanding is waited for, and not applied."""
        self._wait_for(self._outstanding)
        late = [
            {
                "step": part.step,
                "due": part.due,
                "averages": {name: average.cpu().clone() for name, average, _, _ in self._layers_of(part)},
            }
            for part in self._outstanding
        ]
        return super().state_dict() | {"late": late, "squares": dict(self._squares)}

    def load_state_dict(self, state: Mapping[str, Any], ranks_alike: bool = True) -> None:
        super().load_state_dict({**state, "late": []}, ranks_alike)
        self._squares.update(state.get("squares", {}))
        self._outstanding = [self._restored(**late) for late in state.get("late", [])]

    # The work itself.

    def _end_step(self) -> None:
        if self._open:
            raise ValueError(
                "the averages of a broken barrier come with finish(), and the last step ended without; call finish() "
                "before the optimizer's step and settle() after it"
            )

    def _remember(self, applied: Tensor) -> None:
        """Nothing: every part has committed what it computed."""

    def _choose(self, urgent: bool) -> bool:
        """Rank 0's choice: 4 bytes, and the rank's wait for the others."""
        start = time.perf_counter()
        try:
            if self._failure is None:
                word = torch.tensor([float(urgent and self.collectives.rank == 0)], device=self.device)
                self.collectives.sum_(word)
                urgent = bool(word)
        except BaseException as error:
            self._failure = error
        self._job_seconds += time.perf_counter() - start
        return urgent

    def _submit(self, gradients: Gradients, done: "torch.futures.Future[Tensor]") -> None:
        """Copy what is in the prefix and queue it, copy the rest and hold it back; the buffer is done with at once.

        The rest would only be in the prefix's way: it has the next steps' compute to travel behind.
        """
        self._travelling, self._submitted_at = True, time.perf_counter()
        urgent = [name in self.prefix for name in gradients.names]
        if any(urgent):
            part = self._part(gradients, urgent, self.step)
            after = max(self._last_late[name] for name in part.gradients.names)
            self._engine.submit_urgent(partial(self._average_part, part), after, [part.done])
        if not all(urgent):
            self._held.append(self._part(gradients, [not each for each in urgent], self.step + self.late_steps))
        done.set_result(gradients.flat)

    def _part(self, gradients: Gradients, chosen: Sequence[bool], due: int) -> _Part:
        """The chosen layers of a flat buffer, copied."""
        pairs = zip(gradients.names, self._views(gradients), strict=True)
        values = {name: view for (name, view), each in zip(pairs, chosen, strict=True) if each}
        part = _Part(self.step, due, _packed(values, self._loss_scale))
        self._outstanding.append(part)
        return part

    def _average_part(self, part: _Part) -> None:
        """On the communication thread."""
        with self._capturing_failure():
            run_all(self._timed(self._phases(part)))
        part.complete()

    def _phases(self, part: _Part) -> Phases:
        gradients = self._prepared(part.gradients)
        self.averager.average_(gradients, part.step)
        part.gradients = unscaled(gradients)
        self._inspect(part)
        finite = {name: ~bad for name, bad in zip(part.gradients.names, part.bad, strict=True)}
        self.averager.commit(finite)
        if self.recorder is not None:
            self.recorder.memory.commit(finite)
        yield False

    def _inspect(self, part: _Part) -> None:
        views = self._views(part.gradients)
        part.bad = not_finite(part.gradients.flat, views)
        part.squares = torch.stack([_squared_norm(view) for view in views]).tolist()

    def _restored(self, step: int, due: int, averages: Mapping[str, Tensor]) -> _Part:
        """What `state_dict` made of a part."""
        part = _Part(step, due, _packed({name: values.to(self.device) for name, values in averages.items()}))
        self._inspect(part)
        part.complete()
        return part

    def _wait_for(self, parts: Sequence[_Part]) -> None:
        for part in parts:
            part.done.wait()
        if self._failure is not None:
            raise self._failure

    def _apply(self, step: int) -> Tensor:
        """Put the sums of the averages that are due in a step into .grad."""
        due = [part for part in self._outstanding if part.due <= step]
        self._wait_for(due)
        self._outstanding = [part for part in self._outstanding if part.due > step]
        sums: dict[str, Tensor] = {}
        self._bad = dict.fromkeys(self._parameters, torch.zeros((), dtype=torch.bool, device=self.device))
        for name, average, bad, square in (each for part in due for each in self._layers_of(part)):
            sums[name] = sums[name] + average if name in sums else average
            self._bad[name] = self._bad[name] | bad
            self._squares[name] = square
        for name, parameter in self._parameters.items():
            parameter.grad = None
            if name in sums:
                total = sums[name] if is_unit_scale(self._loss_scale) else sums[name] * self._loss_scale
                parameter.grad = shaped(total.to(parameter.dtype), parameter)
        return super().finish()

    def _layers_of(self, part: _Part) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """(name, average, whether that is not finite, its squared norm)."""
        return zip(part.gradients.names, self._views(part.gradients), part.bad, part.squares, strict=True)


def _packed(values: Mapping[str, Tensor], loss_scale: float | Tensor = 1.0) -> Gradients:
    """A copy of layers side by side."""
    offsets = [0]
    for each in values.values():
        offsets.append(offsets[-1] + each.numel())
    return Gradients(torch.cat(list(values.values())), tuple(values), tuple(offsets[:-1]), loss_scale)


def _squared_norm(values: Tensor) -> Tensor:
    """In float64: what machines that add up in another order then differ by moves no prefix. A scalar on the device."""
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for chunk in values.split(_CHUNK):
        wide = chunk.double()
        total += torch.dot(wide, wide)
    return total
