"""The base of every exchange: a model, a compressor bound to its layers and ranks, and hooks on its backward."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..averagers import carried_over
from ..gradients import Gradients
from ..layers import DENSE
from ..network.inside import Levels
from ..registry import Compressor, build
from ..routes import Mixed, Route, mixed, squared_error
from .binding import Bind
from .hooks import Catch, flattened, shaped
from .momentum import MomentumWatch
from .pipeline import Pipeline
from .recorder import Recorder
from .report import Meter, Report


class Attached(ABC):
    """A model whose gradients are averaged in every backward. When they are applied is a subclass's business.

    A step is: `begin_step`, backward, `finish`, the optimizer's step, `settle`.
    """

    def __init__(
        self,
        catch: Catch,
        parameters: Mapping[str, nn.Parameter],
        compressor: Compressor,
        bind: Bind,
        record: bool,
        choose: Callable[[bool], bool] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`parameters`: those of the model that are averaged, by name; `catch` hooks the model that has them.

        `device`: that of the gradients, by default the parameters'.
        """
        self.parameters, self.compressor = dict(parameters), compressor
        self.device = device or next(iter(self.parameters.values())).device
        self._bind = bind
        self.binding = bind(compressor, None)
        self.layers, self.arrangement = self.binding.layers, self.binding.arrangement
        self.hosts = self.arrangement.hosts
        self.averager, self.collectives = self.binding.averager, self.binding.collectives
        self.recorder = Recorder(self.layers) if record else None
        self.pipeline = Pipeline(
            self.averager,
            self.layers,
            self.device,
            recorder=self.recorder,
            needs_full_gradient=compressor.needs_full_gradient,
            choose=choose,
            network=self.collectives,
        )
        self.meter = Meter(self.binding, self.pipeline)
        self.step = 0
        self.open = False
        """Whether a step is under way."""
        self.travelling = False
        """Whether some of its gradients have been submitted."""
        self.loss_scale: float | Tensor = 1.0
        self._suspect: tuple[tuple[str, ...], Tensor] | None = None
        try:
            self._hooks = catch(self.begin_backward, self.submit, self.end_backward)
        except BaseException:
            self.pipeline.close()
            raise
        self._overlooked_momentum = MomentumWatch(self.parameters, self.averager.without_momentum)

    @property
    def levels(self) -> Levels | None:
        """The ranks of this host, and those of this place, where they average in two levels."""
        return self.arrangement.levels

    # The step

    @abstractmethod
    def begin_step(self, loss_scale: float | Tensor = 1.0) -> None:
        """Declare the scale of the loss whose gradients travel next; the compressor sees them without it."""

    @abstractmethod
    def finish(self) -> Tensor:
        """Wait until every .grad holds the average, or None where no average is due.

        Returns a bool scalar on the device, equal on all ranks: all averages are finite. Raises what went wrong on the
        communication thread.
        """

    @abstractmethod
    def settle(self, applied: Tensor) -> None:
        """End the step: make the averager's pending state current where the step was applied, else drop it."""

    @abstractmethod
    def flush(self, loss_scale: float | Tensor = 1.0) -> Tensor | None:
        """Put averages that are still to be applied into .grad, after the last step before weights are looked at.

        They are `loss_scale` times too large; apply and settle them, and ask again. Returns what `finish` does, None
        where nothing is left.
        """

    def begin_backward(self) -> None:
        """Begin a step where the loop did not; called before the first gradients of a backward are submitted."""
        if not self.open or self.travelling:
            self.begin_step()

    def end_backward(self) -> None:
        """Raise what went wrong on the communication thread; called at the end of a backward that submitted any."""
        self.pipeline.check()

    @abstractmethod
    def submit(self, gradients: Gradients) -> "torch.futures.Future[Tensor]":
        """Take gradients of some layers. The future's value is their buffer, with the parameters' new gradients."""

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Backward inside only accumulates on this rank.

        Under DDP the forward must be inside, too: DDP decides there.
        """
        return self._hooks.no_sync()

    def all_finite(self, nonfinite: Mapping[str, Tensor]) -> Tensor:
        """Whether no layer's flag is set, not waited for; `nonfinite_layer` tells which."""
        if not nonfinite:
            return torch.ones((), dtype=torch.bool, device=self.device)
        bad, names = torch.stack(list(nonfinite.values())), tuple(nonfinite)
        seen = self._suspect
        self._suspect = (names, bad if seen is None or seen[0] != names else seen[1] | bad)
        return ~bad.any()

    def nonfinite_layer(self) -> str | None:
        """The first layer, in the model's order, whose average was not finite since the last call."""
        suspect, self._suspect = self._suspect, None
        if suspect is None:
            return None
        bad = {name for name, flag in zip(suspect[0], suspect[1].tolist(), strict=True) if flag}
        return next((layer.name for layer in self.layers if layer.name in bad), None)

    # State, counts and settings

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """This rank's state between steps: the step counter, and the state of averager and recorder."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any], ranks_alike: bool = True) -> None:
        """The inverse of `state_dict`. Raises ValueError where the state is not of such an exchange.

        Where the ranks are others than when it was saved, only state that all of them shared is taken of any rank's:
        the step counter, and averages that are still to be applied.
        """

    def gathered_state_dict(self) -> dict[str, Any]:
        """The states of all ranks, equal on all of them: one rank saves it, and each loads its own from it.

        Every rank calls it, between steps.
        """
        return self.binding.gathered(self.state_dict())

    @property
    def position(self) -> dict[str, Any]:
        """What this rank's state depends on; see `Binding`."""
        return self.binding.position

    def common_state(self) -> dict[str, Any]:
        """The state that all exchanges have."""
        return {
            "step": self.step,
            **self.binding.state_dict(),
            "recorded": self.recorder.state.state_dict() if self.recorder is not None else {},
            **({"recorder": self.recorder.state_dict()} if self.recorder is not None else {}),
        }

    def load_common_state(self, state: Mapping[str, Any], ranks_alike: bool) -> None:
        """The inverse of `common_state`."""
        if ranks_alike:
            self.binding.load_state_dict(state)
            if self.recorder is not None:
                self.recorder.load_state_dict(state["recorded"], state.get("recorder", {}))
        loaded = int(state["step"])
        self.meter.skip(loaded - self.step)
        self.step = loaded

    @property
    def widths(self) -> dict[str, int]:
        """Bits of every layer, DENSE where it is not encoded. Empty where the compressor has no bits."""
        return dict(self.averager.widths)

    def set_widths(self, widths: Mapping[str, int]) -> None:
        """Bits per layer from the next step on; unnamed layers keep theirs. Raises ValueError where they misfit."""
        self.averager.set_widths(widths)

    def encoded_bytes_at(self, bits: int) -> dict[str, int]:
        """Bytes of one encoding of each compressed layer at a width, what all ranks add to it included.

        A rank sends 2 (W - 1) / W of them in a step, W ranks or hosts. Raises ValueError where the compressor has no
        bit widths, or not this one.
        """
        layers = [layer for layer in self.layers if layer.compressed]
        nbytes = self.averager.encoded_bytes_at(layers, bits, self.collectives.world_size)
        return {layer.name: count for layer, count in zip(layers, nbytes, strict=True)}

    @property
    def dense_bytes(self) -> int:
        """Likewise of all layers that are never compressed, beside those that have widths."""
        layers = [layer for layer in self.layers if not layer.compressed]
        return sum(self.averager.encoded_bytes_at(layers, DENSE, self.collectives.world_size))

    def encoded_bytes_by(self, name: str, options: Mapping[str, Any]) -> dict[str, int]:
        """Bytes of every layer by a compressor of this name, as `encoded_bytes_at` counts them."""
        return self.binding.encoded_bytes_by(build(name, **options))

    def squared_errors_by(
        self, name: str, options: Mapping[str, Any], values: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """What one encoding by a compressor of this name loses of some layers' values; see `routes.squared_error`."""
        compressor, layers = build(name, **options), {layer.name: layer for layer in self.layers}
        return {layer: squared_error(compressor, layers[layer], of_layer) for layer, of_layer in values.items()}

    def reroute(self, routes: Mapping[str, Route], default: Route) -> None:
        """Average by other routes than before, from the next step on; only a mix of compressors has routes.

        What is owed goes along with each layer as far as `averagers.carried_over` has it. Every rank calls it, between
        steps. Raises ValueError for what `mixed` refuses.
        """
        if not isinstance(self.compressor, Mixed):
            raise ValueError(f"routes are those of a mix, and this exchange averages by {self.compressor.name}")
        compressor = mixed(routes, default, whole_layers=self.compressor.options.whole_layers)
        if compressor.bucket_size != self.compressor.bucket_size:
            raise ValueError(
                f"a model's layers are compressed or not by one bucket_size, {self.compressor.bucket_size} here, got "
                f"{compressor.bucket_size}; attach anew for another"
            )
        if self.arrangement.verify_wire and not compressor.sends_messages:
            raise ValueError(
                "`verify_wire` puts checksums on messages, and some of what these routes send the network itself adds "
                "up; leave it out, or route all layers to compressors whose messages are bytes"
            )
        self.pipeline.wait()
        before, traffic = self.averager, self.collectives.traffic
        self.binding = self._bind(compressor, traffic)
        self.compressor = compressor
        self.averager, self.collectives = self.binding.averager, self.binding.collectives
        self.averager.load_state_dict(self.carried_over(before.state_dict()))
        self.pipeline.averager = self.averager
        self.meter.encoding_anew(before.encoded_bytes)

    def carried_over(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The averager's state that goes on from that of a mix with other routes; see `averagers.carried_over`."""
        return carried_over(state, self.averager.states)

    @property
    def without_momentum(self) -> frozenset[str]:
        """Parameters whose momentum the compressor applies itself: the optimizer's must be off for them."""
        return self.averager.without_momentum

    def record(self) -> None:
        """Take this rank's own gradients, as they are in .grad, into the recorder; nothing else changes."""
        assert self.recorder is not None
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.recorder.record(Gradients(flattened(parameter.grad, parameter), (name,), (0,)))
        self.recorder.settle(True)

    @contextlib.contextmanager
    def moved(self, steps: Mapping[str, Tensor], factor: float) -> Iterator[None]:
        """The model with `factor` x some layers' steps added to its weights, which have their old bits afterwards.

        A layer's step is what `Recorder.averaged` gives of it, or what decodes from a code of that.
        """
        kept = {name: self.parameters[name].detach().clone() for name in steps}
        try:
            with torch.no_grad():
                for name, step in steps.items():
                    parameter = self.parameters[name]
                    parameter.add_(shaped(step.reshape(-1), parameter), alpha=factor)
            yield
        finally:
            with torch.no_grad():
                for name, weights in kept.items():
                    self.parameters[name].copy_(weights)

    def report(self) -> Report:
        """Bytes sent and seconds spent since the last report."""
        return self.meter.report(self.step + self.open)

    def close(self) -> None:
        """Leave the model alone, and end the communication thread and the process groups that were made for it.

        DDP keeps its hook for life: where it wraps the model, the next backward raises RuntimeError. Raises an
        exception of the communication thread that nobody was told of. Calling it twice is harmless.
        """
        self._hooks.remove()
        self._overlooked_momentum.end()
        self.pipeline.close()
        self.arrangement.close(self.pipeline.failure is None)
        if not self.pipeline.told:
            self.pipeline.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except BaseException:
            if error is None:  # else the block's own goes on
                raise

