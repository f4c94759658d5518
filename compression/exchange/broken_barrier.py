"""The broken barrier: a step waits for the layers that hold most of the gradient, and the others' averages come late.

Backward ends with the first layers, and forward begins with them: their averages are the only ones that the next
forward needs at once, and nothing is left to hide them behind. They also tend to hold most of the gradient's norm, and
few of its bytes. So a step waits for the smallest prefix of layers, in forward order, that holds a fraction R of the
squared norm. The others travel behind the next steps' compute, and are applied S steps later, as they are.

SGD still converges where the weights that a gradient is taken at stay near those that it is applied to, the better the
nearer (Elastic Consistency, Nadiradze et al., AAAI 2021, arXiv:2001.05918). The scheduler published with that goes on
as soon as enough of the norm has arrived: which layers are late, and for how long, is up to the network's timing and
differs from run to run. Here all that results depend on is fixed before anything travels:

* The prefix of a step follows from the norms of the averages that were applied last, which all ranks know.
* Layers outside the prefix of step t are applied in step t + S, also where they arrived long before.
* A layer that is not due in a step is skipped: no momentum, no weight decay. Two averages that are due are added.

Only the order on the wire is up to timing. A prefix overtakes all late averages that still wait, but for those of its
own layers, since the residuals of a layer go from step to step. Before every job rank 0 chooses for all.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..gradients import Gradients, is_unit_scale, not_finite
from ..registry import Compressor, with_stale_updates
from ..routes import Route, mixed
from ..streams import device_future, record_stream
from .attached import Attached
from .binding import Bind
from .hooks import Catch, shaped

_CHUNK = 2**16  # values that are squared at a time, so that their float64 copy stays in the cache


def prefix_length(squares: Sequence[float], fraction: float) -> int:
    """Number of layers, from the first on, that hold a fraction of the sum of their squared norms.

    All of them where there is nothing to divide: the sum is zero, or not finite.
    """
    total = sum(squares)
    held = 0.0
    for length, square in enumerate(squares, start=1):
        held += square
        if 0 < total < math.inf and held >= fraction * total:
            return length
    return len(squares)


def _check_can_be_late(compressor: Compressor) -> None:
    if not compressor.supports_stale_updates:
        raise ValueError(
            f"compressor {compressor.name} averages whole steps, and a broken barrier lets layers be late; "
            f"use {', '.join(with_stale_updates())}, without big_grad"
        )


class _Average(NamedTuple):
    """The average of a layer, float32 and without loss scale."""

    name: str
    values: Tensor
    nonfinite: Tensor
    squared_norm: float


@dataclass(eq=False)
class _Part:
    """Some layers of one step: their gradients, and once `future` is completed their averages in place of them."""

    step: int
    due: int
    gradients: Gradients
    averages: Sequence[_Average] = ()
    future: Any = None


class BrokenBarrier(Attached):
    """An exchange whose steps wait for a fraction of the gradient; see above for its promises and its cost.

    It needs every part of a step: `begin_step`, backward, `finish`, the optimizer's step, `settle`. Before weights are
    looked at the late averages must be applied too: see `flush`.

    The state that averager and recorder keep of a layer is settled with the layer's own average, if that is finite.
    Where a step is not applied, because another layer's was not, a finite average of it is lost.
    """

    def __init__(
        self,
        catch: Catch,
        parameters: Mapping[str, nn.Parameter],
        compressor: Compressor,
        bind: Bind,
        fraction: float,
        late_steps: int,
        record: bool = False,
    ) -> None:
        if not (0 < fraction <= 1 and late_steps >= 1):
            raise ValueError(
                f"a broken barrier waits for a fraction above 0 and at most 1, and is late by 1 step or more, got "
                f"{fraction} and {late_steps}"
            )
        _check_can_be_late(compressor)
        self.fraction, self.late_steps = fraction, late_steps
        self._outstanding: list[_Part] = []  # of this step and earlier ones, in their order
        self._held: list[_Part] = []  # late ones of this step, until its prefix has been queued
        super().__init__(catch, parameters, compressor, bind, record, self._choose_urgent)
        self._sizes = {layer.name: layer.numel for layer in self.layers}
        self._squares = dict.fromkeys(self._sizes, math.nan)  # of the averages that were applied last
        self._last_late = dict.fromkeys(self._sizes, 0)  # how many late ones are queued up to the layer's last
        self.prefix = frozenset(self._sizes)

    def reroute(self, routes: Mapping[str, Route], default: Route) -> None:
        _check_can_be_late(mixed(routes, default))
        super().reroute(routes, default)

    # The step

    def begin_step(self, loss_scale: float | Tensor = 1.0) -> None:
        self._check_step_has_ended()
        self.open, self.travelling = True, False
        self.loss_scale = loss_scale
        length = prefix_length(list(self._squares.values()), self.fraction)
        self.prefix = frozenset(list(self._squares)[:length])

    def finish(self) -> Tensor:
        for part in self._held:
            part.future = self.pipeline.submit(part.gradients, part.step, self._arrival(part))
            self._last_late.update(dict.fromkeys(part.gradients.names, self.pipeline.submitted))
        self._held = []
        return self._apply(self.step)

    def settle(self, applied: Tensor) -> None:
        """End the step. Every part has settled its own state already."""
        if self.open:
            self.open = False
            self.step += 1

    def flush(self, loss_scale: float | Tensor = 1.0) -> Tensor | None:
        self.loss_scale = loss_scale
        return self._apply(min(part.due for part in self._outstanding)) if self._outstanding else None

    def submit(self, gradients: Gradients) -> "torch.futures.Future[Tensor]":
        """Copy the prefix and queue it, copy the rest and hold it back; the buffer is done with at once.

        The rest would only be in the prefix's way: it has the next steps' compute to travel behind.
        """
        self.travelling = True
        self.meter.submitted()
        values = dict(gradients.layers(self._sizes))
        urgent = {name: view for name, view in values.items() if name in self.prefix}
        late = {name: view for name, view in values.items() if name not in self.prefix}
        if urgent:
            part = self._part(urgent, self.step)
            after = max(self._last_late[name] for name in urgent)
            part.future = self.pipeline.submit_urgent(part.gradients, part.step, after, self._arrival(part))
        if late:
            self._held.append(self._part(late, self.step + self.late_steps))
        done: torch.futures.Future[Tensor] = device_future(gradients.flat.device)
        done.set_result(gradients.flat)
        return done

    # State

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, late averages included; those outstanding are waited for, and not applied."""
        self._check_step_has_ended()
        self._wait_for(self._outstanding)
        late = [
            {
                "step": part.step,
                "due": part.due,
                "averages": {average.name: average.values.cpu().clone() for average in part.averages},
            }
            for part in self._outstanding
        ]
        return self.common_state() | {"late": late, "squares": dict(self._squares)}

    def load_state_dict(self, state: Mapping[str, Any], ranks_alike: bool = True) -> None:
        state = self.binding.own_state(state, ranks_alike)
        self.load_common_state(state, ranks_alike)
        self._squares.update(state.get("squares", {}))
        self._outstanding = [self._restored(**late) for late in state.get("late", [])]

    def set_widths(self, widths: Mapping[str, int]) -> None:
        self.pipeline.wait()  # what is queued travels with the widths of its step
        super().set_widths(widths)

    # The work itself

    def _check_step_has_ended(self) -> None:
        if self.open:
            raise ValueError(
                "the averages of a broken barrier come with finish(), and the last step ended without; call finish() "
                "before the optimizer's step and settle() after it"
            )

    def _choose_urgent(self, urgent: bool) -> bool:
        """Rank 0's choice: 4 bytes, and the rank's wait for the others."""
        vote = torch.tensor([float(urgent and self.collectives.rank == 0)], device=self.device)
        self.collectives.sum_(vote)
        return bool(vote)

    def _part(self, values: Mapping[str, Tensor], due: int) -> _Part:
        """A copy of some layers of this step."""
        part = _Part(self.step, due, Gradients.packed(values, self.loss_scale))
        self._outstanding.append(part)
        return part

    def _arrival(self, part: _Part) -> Any:
        """The work of the communication thread once a part's averages have arrived."""

        def arrive(averages: Gradients) -> None:
            part.gradients = averages  # the copy that is of the gradients' own type and scale goes
            part.averages = self._inspected(averages, [self.pipeline.nonfinite[name] for name in averages.names])
            for average in part.averages:
                self.averager.settle(~average.nonfinite, [average.name])
                if self.recorder is not None:
                    self.recorder.settle(~average.nonfinite, [average.name])

        return arrive

    def _inspected(self, averages: Gradients, nonfinite: Sequence[Tensor]) -> list[_Average]:
        names, views = zip(*averages.layers(self._sizes), strict=True)
        squares = torch.stack([_squared_norm(view) for view in views]).tolist()
        return [_Average(*each) for each in zip(names, views, nonfinite, squares, strict=True)]

    def _restored(self, step: int, due: int, averages: Mapping[str, Tensor]) -> _Part:
        """A part, from its entry in a `state_dict`."""
        gradients = Gradients.packed({name: values.to(self.device) for name, values in averages.items()})
        future: Any = device_future(self.device)
        future.set_result(gradients.flat)
        nonfinite = not_finite(gradients.flat, [values for _, values in gradients.layers(self._sizes)])
        return _Part(step, due, gradients, self._inspected(gradients, nonfinite), future)

    def _wait_for(self, parts: Sequence[_Part]) -> None:
        for part in parts:
            part.future.wait()
        self.pipeline.check()

    def _due(self, step: int) -> Iterator[_Average]:
        """The averages that are due in a step, waited for; they are outstanding no more."""
        due = [part for part in self._outstanding if part.due <= step]
        self._wait_for(due)
        self._outstanding = [part for part in self._outstanding if part.due > step]
        for average in (each for part in due for each in part.averages):
            record_stream(average.values, average.nonfinite)
            yield average

    def _apply(self, step: int) -> Tensor:
        """Put the sums of the averages that are due in a step into .grad."""
        sums: dict[str, Tensor] = {}
        nonfinite = dict.fromkeys(self._sizes, torch.zeros((), dtype=torch.bool, device=self.device))
        for name, values, bad, square in self._due(step):
            sums[name] = sums[name] + values if name in sums else values
            nonfinite[name] = nonfinite[name] | bad
            self._squares[name] = square
        for name, parameter in self.parameters.items():
            parameter.grad = None
            if name in sums:
                total = sums[name] if is_unit_scale(self.loss_scale) else sums[name] * self.loss_scale
                parameter.grad = shaped(total.to(parameter.dtype), parameter)
        self.meter.arrived()
        return self.all_finite(nonfinite)


def _squared_norm(values: Tensor) -> Tensor:
    """A scalar on the device, in float64: another order of additions then moves no prefix."""
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for chunk in values.split(_CHUNK):
        wide = chunk.double()
        total += torch.dot(wide, wide)
    return total
