"""Averaging of any codec's messages in one gather; tests/compression/codecs/test_low_rank.py has more of it."""

import pytest
import torch

from compression import Solo, build
from compression.averagers import OneHop
from compression.codecs.base import BFloat16, Float32
from compression.gradients import Gradients
from compression.layers import layers_of

LAYERS = layers_of([("weight", (8, 10))], 64)
VALUES = torch.randn(80, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dense", [Float32(), BFloat16()], ids=str)
def test_with_error_feedback_a_codec_may_make_its_message_of_the_values_own_memory(dense: Float32 | BFloat16) -> None:
    """As float32 does, which reads the same bytes as a message."""
    bound = OneHop(lambda layer: dense, LAYERS, Solo(), 0, error_feedback=True)
    flat = VALUES.clone()
    bound.average_(Gradients(flat, ("weight",), (0,)), 0)
    bound.settle(True)
    assert torch.equal(flat, dense.decode(dense.encode(VALUES[None]), 80)[0])
    assert torch.equal(bound.state_dict()["residual"]["weight"], VALUES - flat)


def test_with_error_feedback_a_layer_that_atoms_make_no_smaller_arrives_as_it_is() -> None:
    bound = build("svd", rank=8, bucket_size=64, error_feedback=True).averager(LAYERS, Solo(), 0)
    flat = VALUES.clone()
    bound.average_(Gradients(flat, ("weight",), (0,)), 0)
    assert torch.equal(flat, VALUES)
