"""Models: image classifiers by name, freshly initialized.

A model here knows nothing of checkpoints, devices or precision.
"""

from collections.abc import Callable

import torch
from torch import nn

from image_classification.models import resnets
from image_classification.models.initialization import MODEL_CONFIGS, initialize_
from image_classification.torchvision_import import torchvision

__all__ = ["ARCHITECTURES", "MODEL_CONFIGS", "build", "check_input_shape"]

_models = torchvision.models

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": _models.resnet18,
    "resnet34": _models.resnet34,
    "resnet50": _models.resnet50,
    "resnet101": _models.resnet101,
    "resnet152": _models.resnet152,
    "resnext101-32x4d": resnets.resnext101_32x4d,
    "se-resnext101-32x4d": resnets.se_resnext101_32x4d,
    "wide_resnet50": _models.wide_resnet50_2,
    "wide_resnet101": _models.wide_resnet101_2,
    "vgg16": _models.vgg16,
    "resnet18_convex": resnets.resnet18_convex,
}
"""Name -> constructor, called with `num_classes`."""


def build(arch: str, config: str = "classic", num_classes: int = 1000) -> nn.Module:
    """A new classifier: float32 images [B, 3, H, W] -> logits [B, num_classes].

    Convolutions are drawn as `config` says, all else as torchvision draws it, from torch's global generator:
    the same seed gives the same weights.

    Raises:
        ValueError: an unknown name, or fewer than one class.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; choose one of {', '.join(ARCHITECTURES)}")
    if config not in MODEL_CONFIGS:
        raise ValueError(f"unknown model config {config!r}; choose one of {', '.join(MODEL_CONFIGS)}")
    if num_classes < 1:
        raise ValueError(f"a classifier has at least 1 class, got num_classes={num_classes}")
    model = ARCHITECTURES[arch](num_classes=num_classes)
    initialize_(model, MODEL_CONFIGS[config])
    return model


@torch.no_grad()
def check_input_shape(model: nn.Module, batch_size: int, image_size: int) -> None:
    """Go through a model with a batch of square images that has shapes and no values; the model stays as it was.

    Raises:
        ValueError: the model cannot take such a batch, in training or in evaluation, whichever it is set to.
    """
    state = {name: value.to("meta") for name, value in (*model.named_parameters(), *model.named_buffers())}
    images = torch.empty(batch_size, 3, image_size, image_size, device="meta")
    try:
        torch.func.functional_call(model, state, (images,))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the model cannot take a batch of {batch_size} images of {image_size} pixels "
            f"({str(error).splitlines()[0]}); use larger images or batches"
        ) from error
