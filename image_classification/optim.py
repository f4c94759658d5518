"""Stochastic gradient descent: which parameter decays, which has momentum, which kernel steps it.

Knows nothing of gradients: who averages, scales or skips them is the caller's business.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

ParameterGroup = dict[str, Any]
"""A group as torch's optimizers take it, with `params` a list of (name, parameter)."""


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    bn_weight_decay: bool = False,
    without_momentum: Collection[str] = (),
) -> list[ParameterGroup]:
    """The trainable parameters of `model`, grouped by weight decay and momentum; frozen ones are left out.

    A batch norm's parameters decay only with `bn_weight_decay`. The type of the module decides, so that
    batch norms in any place and of any name are found. `without_momentum` names parameters as
    `model.named_parameters()` does; their group has momentum 0, whatever the optimizer's is.

    Raises ValueError where `without_momentum` names something that is no trainable parameter.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if unknown := set(without_momentum) - set(trainable):
        raise ValueError(f"no trainable parameter is called {min(unknown)!r}, so its momentum cannot be off")
    in_batch_norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for parameter in module.parameters(recurse=False)
    }
    members: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in trainable.items():
        decay = weight_decay if bn_weight_decay or id(parameter) not in in_batch_norms else 0.0
        members.setdefault((decay, name in without_momentum), []).append((name, parameter))
    return [
        {"params": params, "weight_decay": decay} | ({"momentum": 0.0, "nesterov": False} if plain else {})
        for (decay, plain), params in members.items()
    ]


def sgd(groups: list[ParameterGroup], *, lr: float, momentum: float = 0.9, nesterov: bool = False) -> Optimizer:
    """SGD with dampening 0 on groups of `parameter_groups`; a parameter without gradient is left as it is.

    Apex's FusedSGD where apex is installed and the parameters are on a GPU, else torch's fused kernel. Torch's
    can skip a step by a flag on the device (`optimizer.found_inf`), apex's cannot: look at
    `optimizer.defaults.get("fused")`.

    Momentum starts as zeros, which makes the first step's momentum its gradient, as in torch. Torch itself
    would leave the buffers uninitialized where the very first step is skipped by that flag, and then call
    them momentum.
    """
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    optimizer = _apex_sgd(groups, parameters, lr=lr, momentum=momentum, nesterov=nesterov) or torch.optim.SGD(
        groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=all(map(_fused_kernel_works, parameters))
    )
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


def _fused_kernel_works(parameter: nn.Parameter) -> bool:
    """Torch 2.13's fused kernel for CPUs takes half-precision weights, and leaves most of them unchanged."""
    return parameter.device.type != "cpu" or parameter.dtype in (torch.float32, torch.float64)


def _apex_sgd(groups: list[ParameterGroup], parameters: list[nn.Parameter], **options: Any) -> Optimizer | None:
    on_gpu = all(parameter.device.type == "cuda" for parameter in parameters)
    # Apex steps over parameters of any other type without a word.
    known_types = all(parameter.dtype in (torch.float16, torch.float32) for parameter in parameters)
    if not (on_gpu and known_types):
        return None
    try:
        from apex.optimizers import FusedSGD

        return FusedSGD(groups, **options)
    except (ImportError, RuntimeError):  # not installed, or installed without its CUDA extensions
        return None
