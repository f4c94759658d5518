import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classification.data.images import render
from image_classification.data.views import train_view, val_view
from image_classification.torchvision_import import torchvision
from tests.support.image_folders import picture

sides = st.integers(1, 600)


@settings(deadline=None, max_examples=200)
@given(sides, sides, st.floats(0.01, 1), st.integers(0, 2**62))
def test_a_training_crop_lies_in_the_image_and_is_all_that_is_shown(width, height, crop_scale, seed):
    view = train_view(width, height, crop_scale, 0.5, (seed,))
    left, top, right, bottom = view.box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert view.region == (0, 0, right - left, bottom - top)


@settings(deadline=None, max_examples=200)
@given(st.integers(300, 400), st.integers(300, 400), st.floats(0.05, 1), st.integers(0, 2**62))
def test_a_training_crop_has_an_allowed_area_and_ratio(width, height, crop_scale, seed):
    left, top, right, bottom = train_view(width, height, crop_scale, 0.5, (seed,)).box
    crop_width, crop_height = right - left, bottom - top
    rounding = 0.5 / min(crop_width, crop_height)
    assert crop_width * crop_height >= width * height * crop_scale * (1 - 3 * rounding)
    assert 3 / 4 * (1 - 3 * rounding) <= crop_width / crop_height <= 4 / 3 * (1 + 3 * rounding)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 1000), (0, 433, 100, 566)),
        ((1000, 100), (433, 0, 566, 100)),
        ((1, 1), (0, 0, 1, 1)),
        ((1, 9), (0, 4, 1, 5)),
    ],
)
def test_where_no_draw_fits_the_crop_is_the_largest_central_one(size, box):
    assert train_view(*size, 1.0, 0.5, (3,)).box == box


@settings(deadline=None, max_examples=50)
@given(sides, sides, st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_a_training_view_is_a_function_of_its_seed(width, height, seed):
    views = {train_view(width, height, 0.08, 0.5, tuple(seed)) for _ in range(2)}
    assert len(views) == 1


@pytest.mark.parametrize("size", [(500, 500), (400, 711)])
def test_crops_are_distributed_as_torchvisions(size):
    draws = 1500
    ours = np.array([train_view(*size, 0.08, 0.5, (seed,)).box for seed in range(draws)])
    torch.manual_seed(2)
    image, crop = torch.empty(3, size[1], size[0]), torchvision.transforms.RandomResizedCrop
    theirs = np.array([crop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(draws)])
    width, height = ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]
    pairs = [(ours[:, 1], theirs[:, 0]), (ours[:, 0], theirs[:, 1]), (height, theirs[:, 2]), (width, theirs[:, 3])]
    for one, other in (*pairs, (width * height, theirs[:, 2] * theirs[:, 3])):
        assert scipy.stats.ks_2samp(one, other).pvalue > 1e-4


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_are_as_frequent_as_asked(probability):
    flips = [train_view(9, 9, 0.5, probability, (seed,)).flip for seed in range(2000)]
    assert np.mean(flips) == pytest.approx(probability, abs=5 * np.sqrt(probability * (1 - probability) / 2000))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.integers(0, 9))
def test_a_validation_view_shows_what_torchvisions_resize_and_center_crop_show(width, height, size, seed):
    image = picture(width, height, seed)
    transforms = torchvision.transforms
    expected = transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)])(image)
    shown = render(image, val_view(width, height, size), size)
    # Pillow rounds after each of two passes, and takes the region in single precision.
    assert np.abs(shown.astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("flip", [False, True])
def test_a_training_view_shows_what_torchvisions_resized_crop_shows(flip):
    image = picture(90, 70, seed=1)
    view = train_view(90, 70, 0.2, float(flip), (5,))
    left, top, right, bottom = view.box
    functional = torchvision.transforms.functional
    expected = functional.resized_crop(image, top, left, bottom - top, right - left, [32, 32])
    expected = functional.hflip(expected) if flip else expected
    assert np.array_equal(render(image, view, 32), np.asarray(expected))


def test_a_long_and_narrow_image_costs_no_more_than_what_is_shown_of_it():
    image = picture(2, 50_000, seed=1)
    assert render(image, val_view(*image.size, 224), 224).shape == (224, 224, 3)
