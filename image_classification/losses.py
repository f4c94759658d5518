"""The training loss. Validation is plain cross-entropy."""

from torch import nn


def training_loss(label_smoothing: float = 0.0) -> nn.CrossEntropyLoss:
    """Mean cross-entropy of logits [B, C] and labels: class indices [B], or soft targets [B, C] as of mixup.

    Either kind is smoothed: a fraction `label_smoothing` of it is spread evenly over all C classes.
    Szegedy et al. 2016, arXiv:1512.00567, section 7.

    Raises ValueError where `label_smoothing` is not in [0, 1).
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label smoothing is a fraction in [0, 1), got {label_smoothing}")
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
