"""The watch for momentum that would be applied twice."""

import pytest
import torch
from torch import nn

import compression


def test_momentum_that_would_be_applied_twice_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    for momentum, lines in ((0.9, 1), (0.0, 0)):
        caplog.clear()
        model = nn.Linear(20, 64)
        with compression.attach(model, "dgc", bucket_size=64):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(8, 20)).square().mean().backward()
                optimizer.step()
        told = [record.message for record in caplog.records if "applies momentum to weight" in record.message]
        assert len(told) == lines
