"""A training of two ranks that are threads, for compressors that a test adds to the registry."""

from dataclasses import dataclass

import torch
from torch import nn

import compression
from compression.network.threads import ThreadCollectives, run_ranks


@dataclass(frozen=True)
class Trained:
    """Mean losses of the first and the last ten steps, agreement of the ranks' bits, and bytes over float32's."""

    first_loss: float
    last_loss: float
    ranks_agree: bool
    ratio: float


def train(name: str, steps: int, device: str = "cpu", **options: object) -> Trained:
    """Train a network of two layers through a compressor of the registry."""

    def rank_main(ranks: ThreadCollectives) -> tuple[list[float], torch.Tensor, float]:
        model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
        for index, parameter in enumerate(model.parameters()):  # threads share torch's generator
            generator = torch.Generator().manual_seed(index)
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(device)
        exchange = compression.attach(model, compression.build(name, **options), ranks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        losses = []
        for step in range(steps):
            images = torch.randn(32, 20, generator=torch.Generator().manual_seed(2 * step + ranks.rank)).to(device)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), images[:, :10].argmax(1))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ratio = exchange.report().ratio
        exchange.close()
        return losses, torch.cat([p.detach().flatten() for p in model.parameters()]), ratio

    (losses, weights, ratio), (_, others, _) = run_ranks(2, rank_main)
    return Trained(sum(losses[:10]) / 10, sum(losses[-10:]) / 10, torch.equal(weights, others), ratio)
