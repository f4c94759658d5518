"""The training loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from image_classification.losses import training_loss


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(6, 4, generator=generator)
    return logits, torch.randint(4, (6,), generator=generator)


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 0.99))
def test_smoothing_spreads_its_fraction_over_all_classes(smoothing: float) -> None:
    logits, labels = batch()
    smoothed = one_hot(labels, 4) * (1 - smoothing) + smoothing / 4
    expected = -(smoothed * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(training_loss(smoothing)(logits, labels), expected)


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 0.99))
def test_one_hot_targets_cost_what_their_labels_cost(smoothing: float) -> None:
    logits, labels = batch()
    loss = training_loss(smoothing)
    torch.testing.assert_close(loss(logits, one_hot(labels, 4).float()), loss(logits, labels))


def test_the_loss_of_mixed_targets_is_the_mix_of_their_losses() -> None:
    logits, labels = batch()
    loss = training_loss(0.1)
    mixed = 0.3 * one_hot(labels, 4) + 0.7 * one_hot(labels.flip(0), 4)
    expected = 0.3 * loss(logits, labels) + 0.7 * loss(logits, labels.flip(0))
    torch.testing.assert_close(loss(logits, mixed), expected)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_fraction_outside_its_range_is_an_error(smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"label smoothing is a fraction in \[0, 1\), got {smoothing}"):
        training_loss(smoothing)
