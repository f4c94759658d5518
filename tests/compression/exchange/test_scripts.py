"""Training scripts as people write them: each averages rightly, or is told in one line what is in the way."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import compression
from compression.averagers import TwoHop
from compression.network.threads import ThreadCollectives, run_ranks
from tests.support.gloo_ranks import as_rank, run

RANKS = 2
FEEDBACK = {"bits": 2, "bucket_size": 64, "error_feedback": True}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(100 * step + rank))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(model: nn.Module, rank: int, steps: int = 3, **sgd: Any) -> Tensor:
    """The weights after a loop that knows of no exchange."""
    optimizer = torch.optim.SGD(model.parameters(), **({"lr": 0.1} | sgd))
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
    return weights(model)


def refusal(attempt: Callable[[], Any]) -> str:
    """The message of the ValueError that an attempt at attaching ends with; no thread of it is left."""
    try:
        attempt().close()
    except ValueError as error:
        return str(error)
    return ""


def equal_on_all(values: Tensor) -> bool:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return all(torch.equal(values, other) for other in everyone)


# What ranks over gloo do


def compiled(rank: int) -> bool:
    """Compiled around DDP, and within it."""
    model = DistributedDataParallel(torch.compile(network(), backend="eager"))
    wrapped = torch.compile(model, backend="eager")
    with compression.attach(wrapped, "maxmin", bits=4, bucket_size=64) as exchange:
        end = train(wrapped, rank)
        return equal_on_all(end) and exchange.report().bytes_sent > 0


def held_by_a_trainer(rank: int) -> bool:
    trainer = nn.Module()
    trainer.model = DistributedDataParallel(network())
    with compression.attach(trainer, "maxmin", bucket_size=64) as exchange:
        end = train(trainer.model, rank)
        return equal_on_all(end) and exchange.report().bytes_sent > 0


class Ignoring(nn.Module):
    """A network of which DDP leaves out a part."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.ignored = network(), nn.Linear(20, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        total: Tensor = self.kept(inputs).sum() + self.ignored(inputs).sum()
        return total


def ignored(rank: int) -> tuple[bool, bool, bool]:
    model = Ignoring()
    names = [f"ignored.{name}" for name, _ in model.ignored.named_parameters()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapped = DistributedDataParallel(model)
    settled = []
    for big_grad in (False, True):
        if big_grad:
            wrapped = DistributedDataParallel(model)
        with compression.attach(wrapped, "maxmin", big_grad=big_grad, **FEEDBACK) as exchange:
            for step in range(2):
                wrapped(batch(rank, step)).backward()
            exchange.state_dict()
            settled.append(exchange.step == 2 and bool(exchange.averager.states["residual"].current.any()))
            names_of_layers = {layer.name for layer in exchange.layers}
    return settled[0], settled[1], not names_of_layers & set(names)


class Sometimes(nn.Module):
    """A network whose middle layer is used in some steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(20, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, inputs: Tensor, use: bool) -> Tensor:
        hidden = self.first(inputs)
        return torch.as_tensor(self.last(self.middle(hidden) if use else hidden))


USED = [[True, False, False, True, False, True], [True, False, True, False, False, True]]  # by rank and step


def unused(rank: int) -> float:
    """Distance of all that was applied, and of what is owed, to the true sum, in units of that, of the middle layer."""
    torch.manual_seed(0)
    model = Sometimes()
    plain = DistributedDataParallel(model, find_unused_parameters=True)
    true = torch.zeros(64 * 64)
    for step in range(len(USED[0])):
        plain(batch(rank, step), USED[rank][step]).square().mean().backward()
        true += torch.zeros(64 * 64) if model.middle.weight.grad is None else model.middle.weight.grad.flatten()
        model.zero_grad(set_to_none=True)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    applied = torch.zeros(64 * 64)
    with compression.attach(wrapped, "maxmin", **FEEDBACK) as exchange:
        for step in range(len(USED[0])):
            wrapped(batch(rank, step), USED[rank][step]).square().mean().backward()
            used = any(USED[other][step] for other in range(RANKS))
            assert (model.middle.weight.grad is not None) == used
            if used:
                applied += model.middle.weight.grad.flatten()
            model.zero_grad(set_to_none=True)
        state = exchange.state_dict()["averager"]
        assert isinstance(exchange.averager, TwoHop)
        owed = state["residual"]["middle.weight"] / RANKS
        start, stop = exchange.averager.shards["middle.weight"][rank]
        owed[start:stop] += state["share_residual"]["middle.weight"]
        dist.all_reduce(owed)
    return float((applied + owed - true).norm() / true.norm())


class Checkpointed(nn.Module):
    """Blocks whose backward is a backward within the backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(20, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=True)
        return torch.as_tensor(hidden)


def checkpointed(rank: int) -> bool:
    """Averages, or the same bits as DDP alone."""
    ends = []
    for hooked in (False, True):
        model = DistributedDataParallel(Checkpointed(), static_graph=True, bucket_cap_mb=0.02)
        if not hooked:
            ends.append(train(model, rank, steps=5))
            continue
        with compression.attach(model, "none"):
            ends.append(train(model, rank, steps=5))
    return torch.equal(*ends) and equal_on_all(ends[1])


def out_of_step(rank: int) -> bool:
    """A rank whose backward pauses between buckets, where DDP expects layers that are not used."""
    model = DistributedDataParallel(network(), find_unused_parameters=True, bucket_cap_mb=0.01)
    pause = model.module[2].register_full_backward_hook(lambda *_: time.sleep(0.3 * rank))
    with compression.attach(model, "maxmin", **FEEDBACK):
        equal = equal_on_all(train(model, rank, steps=3))
    pause.remove()
    return equal


def in_disjoint_groups(rank: int) -> bool:
    """Each rank alone in a group of its own: nobody waits for the other."""
    groups = [dist.new_group([other]) for other in range(RANKS)]
    model = DistributedDataParallel(network(), process_group=groups[rank])
    with compression.attach(model, "maxmin", bucket_size=64):
        train(model, rank)
    return True


def differing(rank: int) -> list[str]:
    told = []
    for choices in ({"bits": 4 + rank}, {"seed": rank}, {"error_feedback": bool(rank)}, {"record": bool(rank)}):
        model = DistributedDataParallel(network())
        told.append(refusal(lambda model=model, choices=choices: compression.attach(model, "maxmin", **choices)))
    model = DistributedDataParallel(network())
    told.append(refusal(lambda: compression.attach(model, "maxmin" if rank else "terngrad")))
    return told


def refused(rank: int) -> dict[str, str]:
    frozen = DistributedDataParallel(network())
    frozen.module[0].weight.requires_grad_(False)
    twice = DistributedDataParallel(network())
    compression.attach(twice, "none").close()
    sparse = DistributedDataParallel(nn.Sequential(nn.Embedding(100, 8, sparse=True), nn.Linear(8, 4)))
    complex_weight = nn.Linear(4, 4)
    complex_weight.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    unusing = DistributedDataParallel(network(), find_unused_parameters=True)
    two = nn.ModuleList([DistributedDataParallel(network()), DistributedDataParallel(network())])
    beside = nn.ModuleDict({"ddp": DistributedDataParallel(network()), "head": nn.Linear(4, 4)})
    attempts: dict[str, Callable[[], Any]] = {
        "some groups": lambda: compression.attach(
            DistributedDataParallel(network()), "maxmin", groups=(compression.Solo(),) * 2 if rank else None
        ),
        "bare": lambda: compression.attach(network(), "none"),
        "frozen": lambda: compression.attach(frozen, "none"),
        "twice": lambda: compression.attach(twice, "none"),
        "sparse": lambda: compression.attach(sparse, "none"),
        "complex": lambda: compression.attach(DistributedDataParallel(complex_weight), "none"),
        "late": lambda: compression.attach(unusing, "none", barrier_fraction=0.5),
        "whole": lambda: compression.attach(unusing, "topk", big_grad=True),
        "two": lambda: compression.attach(two, "none"),
        "beside": lambda: compression.attach(beside, "none"),
    }
    return {name: refusal(attempt) for name, attempt in attempts.items()}


def by_hand(rank: int) -> bool:
    """Without DDP, over collectives that are given."""
    model = network()
    network_of_all = compression.TorchDistributed(dist.new_group(), dist.new_group())
    with compression.attach(model, "maxmin", network_of_all, bucket_size=64):
        return equal_on_all(train(model, rank))


def again_and_again(rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Files and threads that are left after the first attachment, and after nine more."""
    left = []
    for _ in range(10):
        model = DistributedDataParallel(network())
        with compression.attach(model, "maxmin", bucket_size=64):
            train(model, rank, steps=1)
        del model
        left.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
    return left[0], left[-1]


def gathered(rank: int) -> tuple[bool, bool, str]:
    """What one rank saves is what each loads its own from; another rank's state is refused."""
    model = DistributedDataParallel(network())
    with compression.attach(model, "maxmin", **FEEDBACK) as exchange:
        train(model, rank)
        own, everyone = exchange.state_dict(), exchange.gathered_state_dict()
    boxes = [everyone if rank == 0 else None, own if rank == 0 else None]
    dist.broadcast_object_list(boxes, src=0)
    with compression.attach(DistributedDataParallel(network()), "maxmin", **FEEDBACK) as exchange:
        exchange.load_state_dict(boxes[0])
        mine = exchange.state_dict()["averager"]["residual"]
        same = all(torch.equal(mine[name], values) for name, values in own["averager"]["residual"].items())
        theirs = refusal(lambda: exchange.load_state_dict(boxes[1]) or exchange)
    return same, boxes[0]["every_rank"][0]["position"] == {"ranks": 2, "rank": 0}, theirs


def failing(rank: int) -> list[str]:
    """Errors of the communication thread: in the backward that they belong to, and in close() where none follows."""
    told = []
    model = DistributedDataParallel(network())
    exchange = compression.attach(model, "maxmin", bucket_size=64)
    with patch.object(TwoHop, "post", side_effect=OSError("the cable is out")):
        try:
            model(batch(rank, 0)).sum().backward()
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    exchange.close()
    dist.barrier()
    alone = network()
    exchange = compression.attach(alone, "maxmin", compression.Solo(), bucket_size=64)
    exchange.pipeline.failure, exchange.pipeline.told = OSError("nobody was told"), False
    try:
        exchange.close()
    except OSError as error:
        told.append(str(error))
    exchange.close()
    return told


PROGRAMS: dict[str, Callable[[int], Any]] = {
    program.__name__: program
    for program in (
        compiled, held_by_a_trainer, ignored, unused, checkpointed, out_of_step, in_disjoint_groups, differing,
        refused, by_hand, again_and_again,
        gathered, failing,
    )
}  # fmt: skip


def every_program(rank: int, folder: Path) -> dict[str, Any]:
    return {name: program(rank) for name, program in PROGRAMS.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every program's result on every rank."""
    return run(__file__, RANKS, tmp_path_factory.mktemp("ranks"))[0]


Results = list[dict[str, Any]]


@pytest.mark.parametrize(
    "program", ["compiled", "held_by_a_trainer", "checkpointed", "out_of_step", "in_disjoint_groups", "by_hand"]
)
def test_ranks_average_whatever_wraps_the_model(results: Results, program: str) -> None:
    assert [each[program] for each in results] == [True] * RANKS


def test_layers_are_those_that_ddp_reduces(results: Results) -> None:
    """Those that it ignores count for nothing: steps are settled, and with big_grad backward returns."""
    assert [each["ignored"] for each in results] == [(True, True, True)] * RANKS


def test_a_layer_that_a_step_does_not_use_keeps_what_is_owed(results: Results) -> None:
    assert all(each["unused"] < 1e-5 for each in results)


def test_choices_that_differ_by_rank_are_refused_on_all_of_them(results: Results) -> None:
    for each in results:
        bits, seed, feedback, record, name = each["differing"]
        assert bits == "all ranks choose alike, and bits is 4 on rank 0 and 5 on rank 1; give all of them the same"
        assert "seed is 0 on rank 0 and 1 on rank 1" in seed
        assert "error_feedback is False on rank 0 and True on rank 1" in feedback
        assert "record is False on rank 0 and True on rank 1" in record
        assert "compressor is 'terngrad' on rank 0 and 'maxmin' on rank 1" in name


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("some groups", "all ranks choose alike, and groups is False on rank 0 and True on rank 1"),
        ("bare", "torch.distributed has 2 ranks, and this model is not wrapped in DistributedDataParallel"),
        ("frozen", "parameter 0.weight was frozen after DistributedDataParallel had been made"),
        ("twice", "has a communication hook already, which it keeps for life"),
        ("sparse", "0 has sparse gradients, which no compressor takes; make it with sparse=False"),
        ("complex", "parameter weight is complex"),
        ("late", "make it without find_unused_parameters and static_graph, or wait for all"),
        ("whole", "make it without find_unused_parameters and static_graph, or leave out big_grad and clip"),
        ("two", "this model trains 2 DistributedDataParallel modules: attach to each"),
        ("beside", "this model trains head.weight outside of its DDP"),
    ],
)
def test_what_cannot_be_averaged_is_refused_when_attaching(results: Results, what: str, reason: str) -> None:
    assert all(reason in each["refused"][what] for each in results)


def test_attaching_again_leaves_nothing_more(results: Results) -> None:
    for each in results:
        (files, threads), (files_later, threads_later) = each["again_and_again"]
        assert files_later <= files
        assert threads_later <= threads + 2  # one that has ended is counted for a moment more


def test_state_of_all_ranks_is_saved_by_one(results: Results) -> None:
    for rank, each in enumerate(results):
        same, named, theirs = each["gathered"]
        assert same
        assert named
        words = "the state is that of rank 0 of 2 that average in one level, and this is rank 1"
        assert (words in theirs) == bool(rank)


def test_an_error_ends_the_backward_that_it_belongs_to(results: Results) -> None:
    for each in results:
        backward, closing = each["failing"]
        assert "the cable is out" in backward
        assert closing == "nobody was told"


# Alone


def test_an_overflow_without_a_declared_scale_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    for declared, lines in ((False, 1), (True, 0)):
        caplog.clear()
        model = network()
        with compression.attach(model, "maxmin", **FEEDBACK) as exchange:
            for _ in range(3):
                if declared:
                    exchange.begin_step(2.0)
                (model(batch(0, 0)).sum() * float("inf")).backward()
                model.zero_grad()
            exchange.state_dict()
        told = [record.message for record in caplog.records if "no loss scale was declared" in record.message]
        assert len(told) == lines
        assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_time_that_a_loop_spends_elsewhere_is_not_the_exchanges() -> None:
    """A slow loop: what passes between the last average and the next step is not waiting for it."""

    def work(ranks: ThreadCollectives) -> tuple[float, float]:
        model = network()
        with compression.attach(model, "maxmin", ranks, bucket_size=64) as exchange:
            start = time.perf_counter()
            for step in range(4):
                model(batch(ranks.rank, step)).sum().backward()
                time.sleep(0.5)
            exchange.state_dict()
            return exchange.report().exposed_seconds, time.perf_counter() - start

    for exposed, total in run_ranks(2, work):
        assert exposed < total - 4 * 0.5 + 0.01


if __name__ == "__main__":
    as_rank(every_program)
