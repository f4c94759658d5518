"""Mixup: convex combinations of pairs of examples."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot


def mixup(images: Tensor, targets: Tensor, alpha: float, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Blend a batch with a permutation of itself: lambda x + (1 - lambda) x[permutation], on both tensors.

    One lambda ~ Beta(alpha, alpha) and one permutation per batch, both drawn from `seed` alone: integers of 0
    or more, such as (seed, rank, epoch, iteration). The same seed gives the same blend, and no global random
    state moves. Zhang et al. 2018, arXiv:1710.09412, section 2.

    Images [B, ...] and targets [B, K] are floating point; targets are one-hot labels, smoothed or not. An alpha of 0
    returns the batch itself.

    Raises ValueError where alpha is negative, or targets are not one row of probabilities per image.
    """
    if alpha < 0:
        raise ValueError(f"mixup's alpha is 0 or more, got {alpha}")
    if targets.ndim != 2 or len(targets) != len(images) or not targets.is_floating_point():
        got = f"{targets.dtype} {list(targets.shape)}"
        raise ValueError(f"mixup blends one-hot targets, float [{len(images)}, classes], got {got}")
    if alpha == 0:
        return images, targets
    random = np.random.default_rng(seed)
    fraction = float(random.beta(alpha, alpha))
    permutation = torch.from_numpy(random.permutation(len(images))).to(images.device)
    return images.lerp(images[permutation], 1 - fraction), targets.lerp(targets[permutation], 1 - fraction)


def mixup_labels(
    images: Tensor, labels: Tensor, num_classes: int, alpha: float, seed: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mixup of a batch with class indices, int64 [B]: the blend, and targets [B, num_classes] of the images' type."""
    return mixup(images, one_hot(labels, num_classes).to(images.dtype), alpha, seed)
