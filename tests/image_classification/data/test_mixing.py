import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classification.data import mixup, mixup_labels


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of which each is one number, its own; targets one-hot for that number."""
    return torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), torch.eye(count)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.floats(0.05, 10), st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_one_fraction_and_one_permutation_blend_images_and_targets_alike(count, alpha, seed):
    images, targets = batch(count)
    mixed, mixed_targets = mixup(images, targets, alpha, seed)
    assert torch.allclose(mixed_targets.sum(1), torch.ones(count))
    # A target row holds the weights of the images in the blend.
    assert torch.allclose(mixed, torch.einsum("bk,kchw->bchw", mixed_targets, images), atol=1e-5)
    fractions = {round(fraction, 4) for fraction in mixed_targets.diagonal().tolist()} - {1.0}
    assert len(fractions) <= 1


def test_the_blend_is_a_function_of_the_seed_and_moves_no_global_state():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first, again, other = (mixup(*batch(), 1.0, seed)[0] for seed in ((1, 0, 7), (1, 0, 7), (1, 1, 7)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_fractions_follow_the_beta_distribution(alpha):
    # The fraction of an image in its own blend, where the permutation moved it.
    fractions = []
    for seed in range(2000):
        own = mixup(*batch(8), alpha, (seed,))[1].diagonal()
        fractions.append(own[own < 1].max().item() if (own < 1).any() else 1.0)
    mean, variance = 0.5, 1 / (4 * (2 * alpha + 1))
    assert np.mean(fractions) == pytest.approx(mean, abs=5 * np.sqrt(variance / 2000))
    assert np.var(fractions) == pytest.approx(variance, rel=0.1)


def test_alpha_zero_is_the_batch_itself():
    images, targets = batch()
    mixed, mixed_targets = mixup(images, targets, 0.0, (1,))
    assert mixed is images
    assert mixed_targets is targets


def test_the_batch_is_not_written_to():
    images, targets = torch.rand(4, 3, 2, 2), torch.eye(4)
    before = images.clone(), targets.clone()
    mixup(images, targets, 1.0, (1,))
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])


def test_a_negative_alpha_is_an_error():
    with pytest.raises(ValueError, match=r"mixup's alpha is 0 or more, got -0\.1"):
        mixup(*batch(), -0.1, (1,))


@pytest.mark.parametrize("targets", [torch.arange(6), torch.eye(6).long(), torch.eye(5)])
def test_targets_that_are_not_one_hot_rows_are_an_error(targets):
    with pytest.raises(ValueError, match=r"mixup blends one-hot targets, float \[6, classes\], got torch\."):
        mixup(batch()[0], targets, 1.0, (1,))


def test_class_indices_are_mixed_as_one_hot_targets() -> None:
    images, targets = batch()
    mixed, mixed_targets = mixup_labels(images, torch.arange(6), 6, 0.4, (1, 2))
    expected, expected_targets = mixup(images, targets, 0.4, (1, 2))
    assert torch.equal(mixed, expected)
    assert torch.equal(mixed_targets, expected_targets)
