"""Models: image classifiers by name, freshly initialized.

A model here knows nothing of checkpoints, devices or precision. A new one is one function and one row of ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from image_classification.rows import loaded

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ARCHITECTURES", "MODEL_CONFIGS", "build", "check_input_shape", "head_of"]

_TORCHVISION = "image_classification.torchvision_import:torchvision.models"
_RESNETS = "image_classification.models.resnets"
_INITIALIZATION = "image_classification.models.initialization"

ARCHITECTURES: dict[str, str | Callable[..., nn.Module]] = {
    "resnet18": f"{_TORCHVISION}.resnet18",
    "resnet34": f"{_TORCHVISION}.resnet34",
    "resnet50": f"{_TORCHVISION}.resnet50",
    "resnet101": f"{_TORCHVISION}.resnet101",
    "resnet152": f"{_TORCHVISION}.resnet152",
    "resnext101-32x4d": f"{_RESNETS}:resnext101_32x4d",
    "se-resnext101-32x4d": f"{_RESNETS}:se_resnext101_32x4d",
    "wide_resnet50": f"{_TORCHVISION}.wide_resnet50_2",
    "wide_resnet101": f"{_TORCHVISION}.wide_resnet101_2",
    "vgg16": f"{_TORCHVISION}.vgg16",
    "resnet18_convex": f"{_RESNETS}:resnet18_convex",
}
"""Name -> constructor, called with `num_classes`, or its name."""

MODEL_CONFIGS: dict[str, str | Callable[[nn.Conv2d], int]] = {
    "classic": f"{_INITIALIZATION}:fan_out",
    "fanin": f"{_INITIALIZATION}:fan_in",
    "grp-fanin": f"{_INITIALIZATION}:fan_in",
    "grp-fanout": f"{_INITIALIZATION}:fan_out_of_group",
}
"""Name -> the fan that scales a convolution's weights, or its name."""


def build(arch: str, config: str = "classic", num_classes: int = 1000) -> nn.Module:
    """A new classifier: float32 images [B, 3, H, W] -> logits [B, num_classes].

    Convolutions are drawn as `config` says, all else as torchvision draws it, from torch's global generator:
    the same seed gives the same weights.

    Raises ValueError for an unknown name, or fewer than one class.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; choose one of {', '.join(ARCHITECTURES)}")
    if config not in MODEL_CONFIGS:
        raise ValueError(f"unknown model config {config!r}; choose one of {', '.join(MODEL_CONFIGS)}")
    if num_classes < 1:
        raise ValueError(f"a classifier has at least 1 class, got num_classes={num_classes}")
    from image_classification.models.initialization import initialize_

    model: nn.Module = loaded(ARCHITECTURES[arch])(num_classes=num_classes)
    initialize_(model, loaded(MODEL_CONFIGS[config]))
    return model


def head_of(model: nn.Module) -> str:
    """The name of the module that tells the classes apart: the last linear layer."""
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def check_input_shape(model: nn.Module, batch_size: int, image_size: int) -> None:
    """Go through a model with a batch of square images that has shapes and no values; the model stays as it was.

    Raises ValueError where the model cannot take such a batch, in training or in evaluation, whichever it is set to.
    """
    import torch

    state = {name: value.to("meta") for name, value in (*model.named_parameters(), *model.named_buffers())}
    images = torch.empty(batch_size, 3, image_size, image_size, device="meta")
    try:
        with torch.no_grad():
            torch.func.functional_call(model, state, (images,))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the model cannot take a batch of {batch_size} images of {image_size} pixels "
            f"({str(error).splitlines()[0]}); use larger images or batches"
        ) from error
