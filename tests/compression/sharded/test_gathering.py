"""All-gathers in codes: all ranks compute with the same decoded values, and the owners' weights stay exact."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import compression
from compression.codecs.nearest import Nearest
from compression.sharded.exchange import ShardedExchange
from compression.sharded.gathering import BLOCK, AllGather
from compression.sharded.units import mesh_of, units_of
from tests.support.gloo_ranks import as_rank, run

WIDTH, HIDDEN = 64, 131  # rows that neither two nor four ranks divide


class Seen(nn.Linear):
    """A layer that remembers the weights with which it computed, forward, again, and backward."""

    def __init__(self, *sizes: int, bias: bool = True) -> None:
        super().__init__(*sizes, bias=bias)
        self.seen: list[Tensor] = []
        self.register_full_backward_pre_hook(lambda module, _: self.seen.append(self.weight.detach().clone()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(self.weight.detach().clone())
        return super().forward(inputs)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(WIDTH), Seen(WIDTH, HIDDEN), Seen(HIDDEN, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.as_tensor(self.out(self.into(self.norm(inputs)).relu()))


class Network(nn.Module):
    """Two blocks, of which the first is computed again in backward, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.last = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, 5)
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = self.blocks
        hidden = checkpoint(first, self.frozen(inputs), use_reentrant=False)
        return torch.as_tensor(self.last(second(hidden)))


def sharded(model: nn.Module | None = None, **how: Any) -> Any:
    torch.manual_seed(0)
    model, mesh = model or Network(), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def in_codes(model: nn.Module, bits: int | None = 8, **how: Any) -> ShardedExchange:
    exchange = compression.attach(model, "none", gather_bits=bits, **how)
    assert isinstance(exchange, ShardedExchange)
    return exchange


def batch(step: int = 0) -> Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def everyones(values: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, values)
    return found


def exact(parameter: nn.Parameter) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.full_tensor().detach()


def half_steps(weights: Tensor, bits: int, dim: int = 0) -> Tensor:
    """Half a step of every value's block; blocks begin with each rank's piece."""
    found = []
    for piece in weights.chunk(dist.get_world_size(), dim):
        parts = [torch.full_like(part, float(part.max() - part.min())) for part in piece.flatten().split(BLOCK)]
        found.append(torch.cat(parts).view(piece.shape))
    return torch.cat(found, dim) / (2**bits - 1) / 2


def check_close(decoded: Tensor, weights: Tensor, bits: int, dim: int = 0, more: float = 0.0) -> None:
    error = (decoded.float() - weights).abs()
    assert error.max() > 0
    assert (error <= half_steps(weights, bits, dim) * (1 + 2**-8) + more * weights.abs() + 1e-7).all()


def layers(model: nn.Module) -> list[Seen]:
    return [module for module in model.modules() if isinstance(module, Seen)]


def check_seen(model: nn.Module, times: Sequence[int], check: bool = True) -> list[Tensor]:
    """What the layers computed with: as often as that, always the same, and equal on all ranks."""
    for layer, count in zip(layers(model), times, strict=True):
        assert len(layer.seen) == count
        assert all(torch.equal(layer.seen[0], later) for later in layer.seen)
    found = [layer.seen[0] for layer in layers(model)]
    for others in everyones(found):
        assert all(torch.equal(one, other) for one, other in zip(found, others, strict=True))
    for layer in layers(model):
        layer.seen.clear()
    return found


RECOMPUTED = (3, 3, 2, 2)  # forward, again, backward


def values(rank: int) -> None:
    """One decoded value everywhere, within half a step of the exact one, which its owner keeps."""
    for bits in (8, 4):
        model = sharded()
        before = [exact(layer.weight) for layer in layers(model)]
        with in_codes(model, bits):
            model(batch()).square().sum().backward()
            seen = check_seen(model, RECOMPUTED)
            for decoded, weights, layer in zip(seen, before, layers(model), strict=True):
                check_close(decoded, weights, bits)
                assert torch.equal(exact(layer.weight), weights)

            with torch.no_grad():
                model.eval()(batch())  # what evaluation computes with
            assert all(map(torch.equal, check_seen(model, (1, 1, 1, 1)), seen))
            model.blocks[0].unshard()
            assert torch.equal(model.blocks[0].into.weight, seen[0])
            # Small layers are as they are.
            for name in ("norm.weight", "norm.bias", "into.bias", "out.bias"):
                gathered = model.blocks[0].get_parameter(name).detach().clone()
                model.blocks[0].reshard()
                assert torch.equal(gathered, exact(model.blocks[0].get_parameter(name)))
                model.blocks[0].unshard()
            model.blocks[0].reshard()
            assert torch.equal(model.state_dict()["blocks.0.into.weight"].full_tensor(), before[0])
        model(batch())
        assert all(map(torch.equal, check_seen(model, (1, 1, 1, 1)), before))  # closed: as they are


def waiting(rank: int) -> None:
    """Gathers that others overtake, and a handle of one, give the same values."""
    model = sharded()
    with in_codes(model):
        model(batch()).square().sum().backward()
        expected = check_seen(model, RECOMPUTED)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module._set_unshard_async_op(True)
        model(batch()).square().sum().backward()
        assert all(map(torch.equal, check_seen(model, RECOMPUTED), expected))
        handles = [block.unshard(async_op=True) for block in model.blocks]
        for handle in handles[::-1]:
            handle.wait()
        assert torch.equal(model.blocks[1].out.weight, expected[3])


def layouts(rank: int) -> None:
    """Half precision, shards kept on a CPU, columns, modules given at once, weights of which one rank holds nothing."""
    for dtype, precision in ((torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
        model = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
        with in_codes(model):
            model(batch()).square().sum().backward()
            for decoded, layer in zip(check_seen(model, RECOMPUTED), layers(model), strict=True):
                assert decoded.dtype == dtype
                check_close(decoded, exact(layer.weight), 8, more=precision)
    model = sharded(offload_policy=CPUOffloadPolicy(pin_memory=False))
    with in_codes(model):
        model(batch()).square().sum().backward()
        for decoded, layer in zip(check_seen(model, RECOMPUTED), layers(model), strict=True):
            check_close(decoded, exact(layer.weight), 8)
    model = sharded(Seen(128, 48, bias=False), shard_placement_fn=lambda parameter: Shard(1))
    with in_codes(model):
        model(torch.ones(1, 128, requires_grad=True)).sum().backward()
        check_close(check_seen(model, (2,))[0], exact(model.weight), 8, dim=1)
    twins = [Seen(WIDTH, WIDTH), Seen(WIDTH, WIDTH)]
    fully_shard(twins, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))  # which travel together
    model = sharded(nn.Sequential(*twins))
    with in_codes(model):
        model(batch())
        for decoded, layer in zip(check_seen(model, (1, 1)), twins, strict=True):
            check_close(decoded, exact(layer.weight), 8)
    model = sharded(Seen(1024, 1, bias=False))
    with in_codes(model):
        model(torch.ones(1, 1024, requires_grad=True)).sum().backward()
        check_close(check_seen(model, (2,))[0], exact(model.weight), 8)


def mixed(rank: int) -> None:
    """Parameters of two dtypes are refused, and taken where a policy makes them one."""
    model = nn.Sequential(Seen(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH).to(torch.bfloat16).requires_grad_(False))
    model = sharded(model)
    with in_codes(model), pytest.raises(ValueError, match="gathered as uint8, as FSDP gathers several dtypes"):
        model(batch())
    double = sharded(nn.Linear(WIDTH, WIDTH).double())
    with in_codes(double), pytest.raises(ValueError, match="gathered as float64"):
        double(batch().double())


def broken(rank: int) -> None:
    """A weight that is not finite makes its block so on all ranks."""
    model = sharded()
    weight = model.blocks[1].into.weight
    if rank == 0:
        weight.detach().to_local().view(-1)[3] = torch.inf
    with in_codes(model):
        model(batch())
        found = check_seen_with_nan(model.blocks[1].into)
    assert found.view(-1)[:BLOCK].isnan().all()
    assert found.view(-1)[BLOCK:].isfinite().all()


def check_seen_with_nan(layer: Seen) -> Tensor:
    (found,) = layer.seen
    for other in everyones(found):
        assert torch.equal(found.view(torch.int32), other.view(torch.int32))
    return found


def message_bytes(module: nn.Module, bits: int, ranks: int, but: str = "blocks") -> int:
    """Bytes of a rank's row: 8 for the scales of each block of 512, and codes; float32 of what has one dimension."""
    total = 0
    for name, parameter in module.named_parameters():
        if name.startswith(but):
            continue
        count = -(-parameter.shape[0] // ranks) * parameter[:1].numel()
        full, rest = divmod(count, BLOCK)
        coded = parameter.ndim > 1 and full > 0
        total += full * (8 + BLOCK * bits // 8) + bool(rest) * (8 + -(-rest * bits // 8)) if coded else 4 * count
    return total


def nbytes(rank: int) -> None:
    """Bytes are those of the messages, times the gathers: one for forward, and one for backward where it resharded."""
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    for bits in (8, 5):
        rows = 2 * message_bytes(Block(), bits, ranks) + message_bytes(Network(), bits, ranks)
        for gathers, reshard in ((2, True), (1, False)):
            model = sharded(reshard_after_forward=reshard)
            with in_codes(model, bits) as exchange:
                for _ in range(2):
                    model(batch()).square().sum().backward()
                    report, expected = exchange.report(), (ranks - 1) * gathers * rows
                    assert report.gathered_bytes == report.metrics()["comm.gathered_bytes"] == expected


def training(rank: int) -> None:
    """What is learned with 8 bits is what is learned without codes."""
    losses: dict[int, float] = {}
    target = torch.randn(WIDTH, 5, generator=torch.Generator().manual_seed(7))
    for bits in (0, 8):
        model = sharded()
        exchange = in_codes(model, bits or None)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses[bits] = 0.0
        for step in range(80):
            optimizer.zero_grad()
            inputs = batch(step)
            loss = (model(inputs) - inputs @ target / WIDTH**0.5).square().mean()
            loss.backward()
            optimizer.step()
            losses[bits] += float(loss) / 20 * (step >= 60)
        first = float((batch() @ target / WIDTH**0.5).square().mean())
        assert losses[bits] < 0.7 * first
        exchange.close()
    assert losses[8] == pytest.approx(losses[0], rel=0.05)


def refused(rank: int) -> None:
    model = sharded()
    for bits in (3, 9):
        with pytest.raises(ValueError, match=f"gather_bits are those of .* 4 to 8, got {bits}; leave it out"):
            compression.attach(model, "maxmin", gather_bits=bits)
    with pytest.raises(ValueError, match="gather_bits is 4 on rank 0 and 5 on rank 1"):
        compression.attach(model, "none", gather_bits=4 + rank)
    with pytest.raises(ValueError, match="no module of this model was given to fully_shard"):
        compression.attach(nn.Linear(2, 2), "maxmin", gather_bits=8)
    mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()).view(-1, 1), mesh_dim_names=("hosts", "ranks"))
    with pytest.raises(ValueError, match="FSDP gathers parameters inside each host"):
        compression.attach(model, "maxmin", mesh=mesh, gather_bits=8)
    with in_codes(model) as exchange:
        assert exchange.gathering is not None
        unit = units_of(model)[1]
        short = AllGather(exchange.gathering, replace(unit, pieces=unit.pieces[:1]), Nearest(8), 0)
        row = torch.zeros(99)
        with pytest.raises(RuntimeError, match=r"FSDP gathers 99 values a rank of blocks\.0, and its parameters have"):
            short(row.repeat(2), row, mesh_of([unit]).get_group())


def levels(rank: int) -> None:
    """Two hosts of two ranks: the same values in two levels, for half the bytes between hosts."""
    sent, between, seen = [], [], []
    for hierarchical, verify_wire in ((False, False), (None, False), (None, True)):
        model = sharded()
        how = {"hierarchical": hierarchical, "verify_wire": verify_wire}
        with in_codes(model, ranks_per_host=2, **how) as exchange:
            model(batch()).square().sum().backward()
            report = exchange.report()
            sent.append(report.gathered_bytes)
            between.append(report.host_gathered_bytes)
            seen.append(check_seen(model, RECOMPUTED))
    for others in seen[1:]:
        assert all(map(torch.equal, seen[0], others))
    assert sent[1] == sent[0]
    assert between[1] == between[0] / 2 == 2 * sent[1] / 3
    assert sent[2] > sent[1]  # by checksums


def smaller(rank: int) -> None:
    """Shards of a smaller group after forward: backward gathers what was decoded, as it is."""
    model = sharded(reshard_after_forward=2)
    with in_codes(model, ranks_per_host=2) as exchange:
        model(batch()).square().sum().backward()
        for decoded, layer in zip(check_seen(model, RECOMPUTED), layers(model), strict=True):
            check_close(decoded, exact(layer.weight), 8)
        report = exchange.report()
        assert 2 * report.gathered_bytes > report.host_gathered_bytes > 0


OF_TWO = (nbytes, values, waiting, layouts, mixed, broken, training, refused)
OF_FOUR = (values, levels, smaller)


@pytest.mark.parametrize("ranks", [2, 4])
def test_gathers(ranks: int, tmp_path: Path) -> None:
    run(__file__, ranks, tmp_path)


def work(rank: int, folder: Path) -> None:
    for task in {2: OF_TWO, 4: OF_FOUR}[dist.get_world_size()]:
        task(rank)


if __name__ == "__main__":
    as_rank(work)
