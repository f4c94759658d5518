"""Arguments of `attach` that make no sense: one clear line. What ranks choose alike is in test_scripts.py."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import compression


def network() -> nn.Module:
    return nn.Linear(20, 64)


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (lambda: compression.attach(nn.ReLU(), "none"), "nothing of this model is trained"),
        (lambda: compression.attach(lambda: None, "none"), "gradients are those of a module, got function"),  # type: ignore
        (lambda: compression.attach(network(), "maxmin", bits="4"), "compressor maxmin takes bits as int, got '4'"),
        (lambda: compression.attach(network(), "maxmin", bits=True), "takes bits as int, got True"),
        (lambda: compression.build("topk", ratio="1%"), "takes ratio as float or int, got '1%'"),
        (lambda: compression.build("topk", efx_bits=2.5), "takes efx_bits as int or none, got 2.5"),
        (lambda: compression.attach(network(), "maxmim"), "no compressor is called 'maxmim'"),
        (lambda: compression.attach(network(), 4), "a compressor is a name with its options, or what build"),  # type: ignore[arg-type]
        (lambda: compression.attach(network(), compression.build("none"), bits=4), "got Compressor and bits"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(attempt: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        attempt()
