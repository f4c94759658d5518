"""The advisor: measures a model, a batch and some ranks, and advises on what to send."""

import contextlib
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..costs import Cluster, Compute, Costs, in_buffers
from ..costs.exchanges import FIRST_BUFFER_BYTES
from ..exchange.arguments import Group, arranged
from ..exchange.models import check_ranks, has_shards, trained_parameters, unwrapped
from ..layers import layers_of
from ..network.arrangement import Arrangement
from ..network.collectives import Collectives
from ..network.hosts import names_of_this_host
from ..network.world import usable_cores
from ..registry import build
from .advice import Advice, advice_on
from .choices import choices
from .links import measure_links, measure_this_machine, with_codecs
from .measured import Measured
from .profile import Profile, Step, together, with_copies
from .simulated import cluster_of
from .speeds import Codecs

STEP_SECONDS = 2.0
"""Seconds that the steps of a model get, three steps at least."""

ALONE = "nothing travels: advice needs the number of ranks, or a cluster to `simulate`"


def advise(
    model: nn.Module,
    step: Step,
    collectives: Collectives | None = None,
    *,
    simulate: str | Cluster | None = None,
    update: Callable[[], object] | None = None,
    hierarchical: bool | None = None,
    ranks_per_host: int | None = None,
    groups: tuple[Group, Group] | None = None,
    all_reduces_bfloat16: bool = True,
) -> Advice:
    """Predict the step of every compressor on this model, and say which one to take.

    `step` runs one forward and backward of the model, on a batch of its own; it is called some times, and nothing is
    averaged, stepped or kept: gradients, buffers and torch's random numbers are what they were. `update` does what a
    loop does after backward, such as the optimizer's step, in a way that changes nothing: of what it changes, nothing
    is restored but gradients. Without it that counts as no time. Ranks, `collectives`, `hierarchical`,
    `ranks_per_host` and `groups` are as `attach` takes them, and all ranks call it. `hierarchical` False leaves out two
    levels.

    `simulate` is a cluster that is not there, in words (`simulated.cluster_of`): links are then not measured, and one
    process is enough. `all_reduces_bfloat16`: whether the network adds up bfloat16.

    Raises ValueError, on all ranks alike, for one rank without a cluster, for what `attach` refuses of a model, for
    models that are sharded or static, for hosts that differ in their ranks, and where a step fails.
    """
    cluster = cluster_of(simulate) if isinstance(simulate, str) else simulate
    model = unwrapped(model)
    if has_shards(model):
        raise ValueError(
            "advice times whole gradients, and this model was given to fully_shard; give the model as it was before"
        )
    if isinstance(model, DistributedDataParallel) and model.static_graph:
        raise ValueError(
            "advice times steps in which nothing is averaged, which DistributedDataParallel cannot run with "
            "static_graph=True; make it without that for the advice"
        )
    if collectives is None:
        check_ranks(model)
    parameters = trained_parameters(model)
    arrangement = arranged(
        build("maxmin"),
        parameters,
        collectives,
        model.process_group if isinstance(model, DistributedDataParallel) else None,
        hierarchical=hierarchical,
        ranks_per_host=ranks_per_host,
        groups=groups,
        mesh=None,
        verify_wire=False,
    )
    try:
        if arrangement.collectives.world_size == 1 and cluster is None:
            raise ValueError(ALONE)
        return _Measuring(model, parameters, arrangement, step, update).advice(
            cluster, all_reduces_bfloat16, hierarchical is not False
        )
    finally:
        arrangement.close(True)


class _Measuring:
    """One advice on this rank: its model and ranks, and what is measured of them, in order."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        arrangement: Arrangement,
        step: Step,
        update: Callable[[], object] | None,
    ) -> None:
        self.arrangement, self.network = arrangement, arrangement.collectives
        self.parameters, self.step, self.update = parameters, step, update
        self.device = next(iter(parameters.values())).device
        self.ddp = model if isinstance(model, DistributedDataParallel) else None
        no_sync = partial(_apart, self.ddp) if self.ddp is not None else contextlib.nullcontext
        self.profile = Profile(model, parameters, self.network, no_sync)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}

    def advice(self, simulated: Cluster | None, all_reduces_bfloat16: bool, levels: bool) -> Advice:
        with self.profile.as_it_was():
            return self._advice(simulated, all_reduces_bfloat16, levels)

    def _advice(self, simulated: Cluster | None, all_reduces_bfloat16: bool, levels: bool) -> Advice:
        began = time.perf_counter()
        cores = self.network.collect((names_of_this_host().get("machine", platform.node()), _cores()))
        machines = [machine for machine, _ in cores]
        on_machine = max(machines.count(machine) for machine in machines)
        sharing = ranks_per_core(cores) if self.device.type == "cpu" else 1.0
        if self.network.world_size > 1:
            there, costs, adding = measure_links(self.arrangement, self.device, sharing)
        else:
            costs, adding = measure_this_machine()
            there = Cluster(1)
        costs = self._with_overlaps(costs)
        cluster = simulated or there
        several = levels and cluster.hosts > 1 and cluster.ranks_per_host > 1
        two_levels = several and (simulated is not None or self.arrangement.levels is not None)
        ways = choices(two_levels, all_reduces_bfloat16=all_reduces_bfloat16)

        compute = self.profile.run(self.step, STEP_SECONDS)
        buffers = self._buffers(compute)
        codecs = Codecs(self.profile.gradient(), self.shapes, buffers, self.network)
        compute = replace(compute, contention=self.profile.contention(self.step, codecs.work(), compute))
        if self.ddp is not None:
            compute = with_copies(compute, self._copying(codecs.gradient))
        compute = replace(compute, after=compute.after + self._updating())
        measured = Measured(
            self.shapes,
            buffers,
            compute,
            cluster,
            with_codecs(costs, codecs.speeds(ways, cluster.ranks), adding),
            codecs.errors(ways),
            machine=f"{platform.machine()}, {usable_cores()} cores, {torch.get_num_threads()} threads a rank",
            ranks_on_machine=on_machine,
            seconds=time.perf_counter() - began,
        )
        measured = self.network.broadcast(measured)
        return advice_on(measured, cluster, ways)

    def _with_overlaps(self, costs: Costs) -> Costs:
        """The costs with what these networks let overlap; those that are not there are taken to be gloo or NCCL."""
        on_gloo, levels = self.device.type == "cpu", self.arrangement.levels
        return replace(
            costs,
            overlaps=on_gloo if self.network.world_size == 1 else self.network.matched_by_tag(self.device),
            overlaps_inside=on_gloo if levels is None else levels.inside.overlaps,
        )

    def _buffers(self, compute: Compute) -> tuple[tuple[str, ...], ...]:
        """Names of the layers that travel together: DDP groups them in the order in which they are ready."""
        late_first = sorted(self.shapes, key=lambda name: -compute.ready[name])
        layers = layers_of(((name, self.shapes[name]) for name in late_first), 1)
        return tuple(tuple(layer.name for layer in buffer) for buffer in in_buffers(layers, *self._limits()))

    def _limits(self) -> tuple[int, ...]:
        """The bytes at which a buffer is closed, and the first one; none without DDP."""
        if self.ddp is None:
            return ()
        limit = int(self.ddp.bucket_bytes_cap)
        return limit, FIRST_BUFFER_BYTES if self.ddp.bucket_bytes_cap_default else limit

    def _copying(self, gradient: Mapping[str, Tensor]) -> float:
        """Seconds to copy all gradients once, of the slowest rank."""

        def copying() -> float:
            into = {name: torch.empty_like(values) for name, values in gradient.items()}
            took = []
            for _ in range(3):
                start = self._now()
                for name, values in gradient.items():
                    into[name].copy_(values)
                took.append(self._now() - start)
            return min(took)

        return max(together(self.network, "a copy of the gradients", copying))

    def _updating(self) -> float:
        """Seconds of what a loop does after backward, the median of three; the slowest rank's."""
        update = self.update
        if update is None:
            return 0.0
        took = []

        def updating() -> None:
            for parameter in self.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            start = self._now()
            update()
            took.append(self._now() - start)

        for _ in range(3):
            together(self.network, "the update", updating)
        return float(max(self.network.collect(statistics.median(took))))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextlib.contextmanager
def _apart(model: DistributedDataParallel) -> Iterator[None]:
    """A block in which a rank's steps wait for no other: nothing is averaged, and no buffer is broadcast."""
    synchronizes = model.require_forward_param_sync
    model.require_forward_param_sync = False
    try:
        with model.no_sync():
            yield
    finally:
        model.require_forward_param_sync = synchronizes


def _cores() -> frozenset[int]:
    """Numbers of the cores that this process may use."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(usable_cores()))


def ranks_per_core(ranks: Sequence[tuple[str, frozenset[int]]]) -> float:
    """Ranks for each core of the fullest machine, 1 at least, of the machine of each rank and the cores it may use."""
    cores: dict[str, set[int]] = defaultdict(set)
    count: dict[str, int] = defaultdict(int)
    for machine, usable in ranks:
        cores[machine] |= usable
        count[machine] += 1
    return max(1.0, *(count[machine] / len(cores[machine]) for machine in cores))


def on_paper(
    measured: Measured,
    simulate: str | Cluster,
    *,
    hierarchical: bool | None = None,
    all_reduces_bfloat16: bool = True,
) -> Advice:
    """The advice for a cluster that is not there, from what was measured elsewhere; nothing runs.

    `hierarchical` False leaves out two levels.
    """
    cluster = cluster_of(simulate) if isinstance(simulate, str) else simulate
    two_levels = hierarchical is not False and cluster.hosts > 1 and cluster.ranks_per_host > 1
    ways = [
        choice
        for choice in choices(two_levels, all_reduces_bfloat16=all_reduces_bfloat16)
        if choice.codec in measured.errors
    ]
    return advice_on(replace(measured, cluster=cluster), cluster, ways)
