"""Precision: which numbers a model computes in, and how an optimizer steps it.

One path serves every flag: a loss scale that may be 1, master weights that may be none. Knows nothing of
batches and epochs, nor of who averages the gradients: it is told whether the averages are finite.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from image_classification.optim import ParameterGroup

MEMORY_FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
"""Name -> order in memory of images and convolutions; nhwc is channels-last."""


@dataclass(frozen=True)
class Precision:
    """Types of the weights and of the arithmetic, and the loss scale. `choose` makes it from the flags."""

    device: torch.device
    weights: torch.dtype = torch.float32
    batch_norm: torch.dtype = torch.float32
    """Type of the batch norms' parameters and statistics."""
    autocast: torch.dtype | None = None
    """Type that autocast computes in; None: everything is computed in the weights' type."""
    master_weights: bool = False
    """Half-precision weights are stepped in float32 copies of them."""
    loss_scale: float = 1.0
    """The constant scale, or where a dynamic one starts."""
    dynamic_loss_scale: bool = False

    @classmethod
    def choose(
        cls,
        device: torch.device,
        *,
        amp: bool = False,
        opt_level: str = "O1",
        fp16: bool = False,
        static_loss_scale: float = 1.0,
        dynamic_loss_scale: bool = False,
    ) -> "Precision":
        """The precision that the flags ask for. `opt_level` counts with `amp` only; `fp16` is level O2.

        O0 float32; O1 autocast; O2 half-precision weights with float32 batch norms and master weights; O3 all
        half precision. Half precision is float16 on a GPU and bfloat16 on a CPU. A dynamic scale starts at
        2^16, like torch.amp's, and overrides a static one.

        Raises ValueError for an unknown level, or a loss scale that is not above 0.
        """
        half = torch.float16 if device.type == "cuda" else torch.bfloat16
        levels: dict[str, dict[str, Any]] = {
            "O0": {},
            "O1": {"autocast": half},
            "O2": {"weights": half, "master_weights": True},
            "O3": {"weights": half, "batch_norm": half},
        }
        level = "O2" if fp16 else opt_level if amp else "O0"
        if level not in levels:
            raise ValueError(f"unknown optimization level {level!r}; choose one of {', '.join(levels)}")
        if not 0 < static_loss_scale < float("inf"):
            raise ValueError(f"the loss scale is a finite number above 0, got {static_loss_scale}")
        scale = 2.0**16 if dynamic_loss_scale else float(static_loss_scale)
        return cls(device, **levels[level], loss_scale=scale, dynamic_loss_scale=dynamic_loss_scale)

    def convert(self, model: nn.Module, memory_format: str = "nchw") -> nn.Module:
        """Move `model` to the device, to its types and to a memory format, in place: after its weights are loaded,
        before DDP."""
        model.to(self.device)
        for module in model.modules():
            dtype = self.batch_norm if isinstance(module, _BatchNorm) else self.weights
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.to(dtype))
        model.to(memory_format=MEMORY_FORMATS[memory_format])  # type: ignore[call-overload]
        return model

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """float32 logits [B, C] of float32 images [B, 3, H, W]."""
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits: Tensor = model(images.to(self.weights))
        return logits.float()


class LossScale:
    """Factor of the loss before backward, so that small gradients survive half precision.

    A static one never changes. A dynamic one lives on the device and follows torch.amp.GradScaler's rule, by
    its kernel and with its defaults: halved after a step that was not finite, doubled after 2,000 in a row
    that were. GradScaler itself judges by what it finds in this rank's gradients and keeps the verdict to
    itself; here the averages of all ranks decide, and compressors are told as well. Micikevicius et al.
    2018, arXiv:1710.03740, section 3.2.
    """

    def __init__(self, precision: Precision) -> None:
        self._dynamic = precision.dynamic_loss_scale
        self._static = precision.loss_scale
        self._scale = torch.full((), precision.loss_scale, device=precision.device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=precision.device)

    @property
    def value(self) -> float | Tensor:
        """A number where it never changes, else a float32 scalar on the device, which `update` leaves as it is."""
        return self._scale.clone() if self._dynamic else self._static

    def inverse(self) -> Tensor:
        """1/scale: a float32 scalar on the device."""
        return self._scale.double().reciprocal().float()

    def update(self, found_inf: Tensor) -> None:
        """Adapt the scale to a step: `found_inf` is a float32 scalar, 1.0 where it was skipped, else 0.0."""
        if self._dynamic:
            torch._amp_update_scale_(self._scale, self._good_steps, found_inf, 2.0, 0.5, 2000)

    def can_back_off(self) -> bool:
        """Whether a smaller scale may still help against overflow. Synchronizes with the device.

        At 2^-16, gradients of 2^31 still fit into float16: one that is not finite there is not finite at any scale.
        """
        return self._dynamic and self._scale.item() > 2.0**-16

    def state_dict(self) -> dict[str, float]:
        """The state of a dynamic scale; a static one has none."""
        return {"scale": self._scale.item(), "good_steps": self._good_steps.item()} if self._dynamic else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self._dynamic:
            self._scale.fill_(state["scale"])
            self._good_steps.fill_(state["good_steps"])


class MixedPrecisionOptimizer:
    """An optimizer behind a loss scale and, where `precision` says so, float32 master weights.

    `groups` are those of `optim.parameter_groups`, of a converted model. `build` makes the optimizer of them
    (`functools.partial(optim.sgd, lr=...)`), with the master weights in place of half-precision parameters.
    """

    def __init__(
        self, groups: list[ParameterGroup], build: Callable[[list[ParameterGroup]], Optimizer], precision: Precision
    ) -> None:
        self.precision = precision
        self.scale = LossScale(precision)
        self._parameters: dict[str, nn.Parameter] = {n: p for group in groups for n, p in group["params"]}
        self._masters: dict[str, nn.Parameter] = {}
        if precision.master_weights:
            self._masters = {
                name: nn.Parameter(parameter.detach().float())
                for name, parameter in self._parameters.items()
                if parameter.dtype != torch.float32
            }
        self._stepped = self._parameters | self._masters
        self.optimizer = build(
            [group | {"params": [(name, self._stepped[name]) for name, _ in group["params"]]} for group in groups]
        )
        # Averages of finite float32 gradients are checked by whoever averages them. Half-precision ones can
        # overflow when the average is written, and scaled ones must be unscaled anyway.
        self._unscales = precision.dynamic_loss_scale or precision.loss_scale != 1 or precision.weights != torch.float32

    @property
    def masters(self) -> dict[str, Tensor]:
        """float32 weights by parameter name, of those that a step rounds to half precision."""
        return {name: master.detach() for name, master in self._masters.items()}

    @torch.no_grad()
    def set_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Take the master weights from a state dict, where there are any, and round the model's from them."""
        for name, master in self._masters.items():
            master.copy_(weights[name])
        if self._masters:
            self._copy_masters_to_model()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def scaled(self, loss: Tensor, accumulation: int = 1) -> Tensor:
        """The loss to call backward on, as one of `accumulation` micro-batches: loss x scale / accumulation."""
        factor = self.scale.value / accumulation
        return loss if isinstance(factor, float) and factor == 1 else loss * factor

    @torch.no_grad()
    def step(self, finite: Tensor) -> Tensor:
        """One step with the parameters' averaged gradients, still scaled, which are used up.

        Skipped entirely, momentum and weight decay included, unless all gradients are finite: where the bool
        scalar `finite` says so, and no half-precision gradient has overflowed. Parameters without gradient
        are left as they are.

        Returns a bool scalar on the device: the step was applied. The host waits for it only where the optimizer
        cannot be told on the device (apex, and half-precision weights on a CPU).
        """
        gradients = self._gradients()
        found_inf = finite.logical_not().float()
        if self._unscales and gradients:
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, self.scale.inverse())
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not found_inf.item():
            self.optimizer.step()
        if self._masters:
            self._copy_masters_to_model()
        self.scale.update(found_inf)
        return found_inf == 0

    def _gradients(self) -> list[Tensor]:
        """Gradients of the stepped parameters, in their memory format: fused kernels go by memory order."""
        gradients = []
        for name, stepped in self._stepped.items():
            gradient = self._parameters[name].grad
            if gradient is not None and (gradient.dtype, gradient.stride()) != (stepped.dtype, stepped.stride()):
                gradient = torch.empty_like(stepped).copy_(gradient)
            stepped.grad = gradient
            if gradient is not None:
                gradients.append(gradient)
        return gradients

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for parameter in (*self._parameters.values(), *self._masters.values()):
            parameter.grad = None

    def _copy_masters_to_model(self) -> None:
        torch._foreach_copy_([self._parameters[name] for name in self._masters], list(self._masters.values()))

    def _momentum(self) -> dict[str, Tensor]:
        return {
            name: self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self._stepped.items()
            if "momentum_buffer" in self.optimizer.state[parameter]
        }

    def state_dict(self) -> dict[str, Any]:
        """Momentum and master weights by parameter name, and the dynamic loss scale. Not the flags' values."""
        return {"momentum": self._momentum(), "masters": self.masters, "loss_scale": self.scale.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()` of an optimizer of the same parameters and precision.

        Raises ValueError where they differ.
        """
        own = self.state_dict()
        for part, remedy in (
            ("momentum", "the same `arch`, `momentum` and `without_momentum`"),
            ("masters", "the same `amp`, `opt_level` and `fp16`"),
            ("loss_scale", "`dynamic_loss_scale` if and only if it was on"),
        ):
            if differing := own[part].keys() ^ state[part].keys():
                raise ValueError(
                    f"the saved optimizer state has another {part.replace('_', ' ')} than this run "
                    f"({min(differing)} is in one of them only); resume with {remedy}"
                )
        for part in ("momentum", "masters"):
            for name, saved in state[part].items():
                own[part][name].copy_(saved)
        self.scale.load_state_dict(state["loss_scale"])
        if self._masters:
            self._copy_masters_to_model()
