"""Attaching over several hosts: real ranks over gloo, on hosts that launchers' variables make."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

import compression
from tests.support.gloo_ranks import as_rank
from tests.support.gloo_ranks import run as run_ranks

HOST_OF = {"2 x 2": "0110", "2 + 1": "001", "3 x 2": "012210"}  # shuffled: no rank // k would find them
STEPS = 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 65), nn.ReLU(), nn.Linear(65, 47), nn.ReLU(), nn.Linear(47, 5))


def train(model: nn.Module, exchange: compression.Attached, rank: int, first: int = 0, last: int = STEPS) -> Tensor:
    """The weights after some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(first, last):
        inputs = torch.randn(8, 33, generator=torch.Generator().manual_seed(100 * step + rank))
        exchange.begin_step()
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        finite = exchange.finish()
        optimizer.step()
        exchange.settle(finite)
    while exchange.flush() is not None:
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def attached(model: nn.Module, name: str = "maxmin", **how: Any) -> compression.Attached:
    wanted, takes = {"bucket_size": 64, "error_feedback": True}, compression.COMPRESSORS[name].takes
    options = {option: value for option, value in wanted.items() if option in takes}
    return compression.attach(model, compression.build(name, **options), seed=5, **how)


def trained(rank: int, name: str = "maxmin", **how: Any) -> dict[str, Any]:
    model = DistributedDataParallel(network())
    exchange = attached(model, name, **how)
    weights = train(model, exchange, rank)
    report, position = exchange.report(), exchange.arrangement.position
    exchange.close()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, weights)
    return {
        "equal": all(torch.equal(weights, other) for other in everyone),
        "position": position,
        "sent": report.bytes_sent / STEPS,
        "host": report.host_bytes / STEPS,
        "host dense": report.host_bytes_dense / STEPS,
        "weights": weights,
    }


def by_hand(rank: int) -> dict[str, Any]:
    """Hosts 0, 1 and 2, 3, as process groups and as a mesh."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    if rank < 2:  # some ranks have kept groups when all make them
        with compression.averaging({"some": torch.ones(70)}, "maxmin", group=groups[0], bucket_size=64) as averaging:
            assert averaging.average_()
    apart = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])]
    model = DistributedDataParallel(network(), process_group=apart[rank in (1, 2)])
    with attached(model) as exchange:  # models that know nothing of one another
        in_a_part = train(model, exchange, rank)
    own = (groups[rank // 2], groups[2 + rank % 2])
    wrong = (groups[rank // 2], groups[rank // 2])
    return {
        "in a part": in_a_part,
        "groups": trained(rank, groups=own),
        "mesh": trained(rank, mesh=DeviceMesh("cpu", torch.arange(4).view(2, 2))),
        "found": trained(rank, ranks_per_host=2),
        "refused groups": refusal(lambda: trained(rank, groups=wrong)),
        "refused mesh": refusal(lambda: trained(rank, mesh=DeviceMesh("cpu", torch.arange(4)))),
        "refused both": refusal(lambda: trained(rank, groups=own, mesh=DeviceMesh("cpu", torch.arange(4).view(2, 2)))),
        "refused ranks per host": refusal(lambda: trained(rank, ranks_per_host=3)),
        "refused compressor": refusal(lambda: trained(rank, "none", groups=own)),
    }


def refusal(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def resumed(rank: int) -> dict[str, Any]:
    """Training that is interrupted after a step, and state of another position."""
    whole = trained(rank)
    model = DistributedDataParallel(network())
    exchange = attached(model)
    train(model, exchange, rank, 0, 1)
    state = exchange.state_dict()
    exchange.close()
    again = DistributedDataParallel(network())
    again.load_state_dict(model.state_dict())
    exchange = attached(again)
    exchange.load_state_dict(state)
    weights = train(again, exchange, rank, 1, STEPS)
    exchange.close()
    flat = attached(DistributedDataParallel(network()), hierarchical=False)
    refused = refusal(lambda: flat.load_state_dict(state))
    flat.close()
    return {"exact": torch.equal(weights, whole["weights"]), "refused": refused}


def two_by_two(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {name: trained(rank, name) for name in ("maxmin", "topk", "powersgd", "dgc")}
    results["flat"] = trained(rank, hierarchical=False)
    results["none"] = trained(rank, "none")
    results["late"] = trained(rank, barrier_fraction=0.5)
    results["resumed"] = resumed(rank)
    results["not there"] = refusal(lambda: trained(rank, hierarchical=True, ranks_per_host=1))
    return results


def unequal(rank: int) -> dict[str, Any]:
    return {"flat": trained(rank), "refused": refusal(lambda: trained(rank, hierarchical=True))}


TASKS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "2 x 2": ("2 x 2", two_by_two),
    "2 + 1": ("2 + 1", unequal),
    "by hand": ("", by_hand),
    "3 x 2": ("3 x 2", trained),
}


def work(rank: int, folder: Path, task: str) -> dict[str, Any]:
    return TASKS[task][1](rank)


def environment_of(rank: int, hosts: str) -> Mapping[str, str]:
    if not hosts:
        return {}
    return {"GROUP_RANK": hosts[rank], "LOCAL_WORLD_SIZE": str(hosts.count(hosts[rank]))}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list[dict[str, Any]], list[str]]]:
    """(results, standard error) of every rank, for a task that is run once."""
    done: dict[str, tuple[list[dict[str, Any]], list[str]]] = {}

    def run_once(task: str) -> tuple[list[dict[str, Any]], list[str]]:
        if task not in done:
            hosts = HOST_OF.get(TASKS[task][0], "")
            ranks = len(hosts) or 4
            environments = [environment_of(rank, hosts) for rank in range(ranks)]
            done[task] = run_ranks(
                __file__, ranks, tmp_path_factory.mktemp("ranks"), task, environments=environments
            )
        return done[task]

    return run_once


Run = Callable[[str], tuple[list[dict[str, Any]], list[str]]]
VALUES = sum(parameter.numel() for parameter in network().parameters())


@pytest.mark.parametrize("name", ["maxmin", "topk", "powersgd", "dgc", "late"])
def test_hosts_with_several_ranks_average_in_two_levels(run: Run, name: str) -> None:
    results, _ = run("2 x 2")
    positions = [(each[name]["position"]["place"], each[name]["position"]["number"]) for each in results]
    assert positions == [(0, 0), (0, 1), (1, 0), (1, 1)]  # ranks 0 and 3 are on one host, 1 and 2 on the other
    assert all(each[name]["equal"] for each in results)


def test_a_host_sends_the_codes_of_one_rank(run: Run) -> None:
    results, errors = run("2 x 2")
    in_levels, flat = (sum(each[name]["host"] for each in results) / 4 for name in ("maxmin", "flat"))
    assert sum(each["maxmin"]["sent"] for each in results) / 2 == pytest.approx(in_levels)  # all of it crosses links
    assert flat / in_levels == pytest.approx(2, rel=0.02)
    # Neighbors in the ring of ranks 0 to 3 on hosts "0110" are on different hosts twice, once for each host.
    assert results[0]["flat"]["host dense"] == pytest.approx(2 * 3 / 4 * 4 * VALUES)
    line = "gradients are averaged in one level over 2 hosts x 2: a host puts about 0.0 MB a step on its link"
    assert errors[0].count(line) == 3  # flat, none, and the flat one that took state
    assert not any(line in error for error in errors[1:])


def test_what_encodes_nothing_stays_flat(run: Run) -> None:
    results, _ = run("2 x 2")
    assert "place" not in results[0]["none"]["position"]
    dense = sum(each["none"]["host"] for each in results) / 4
    assert dense == pytest.approx(results[0]["none"]["host dense"])


def test_state_goes_on_exactly_and_only_at_its_position(run: Run) -> None:
    for each in run("2 x 2")[0]:
        assert each["resumed"]["exact"]
        assert "of 2 hosts x 2, in two levels, and this is rank" in each["resumed"]["refused"]


def test_one_rank_a_host_has_no_two_levels(run: Run) -> None:
    for each in run("2 x 2")[0]:
        assert "4 hosts x 1, and nothing to add up inside" in each["not there"]


def test_three_hosts_average_alike(run: Run) -> None:
    assert all(each["equal"] for each in run("3 x 2")[0])


def test_hosts_that_differ_average_flat_and_say_so(run: Run) -> None:
    results, errors = run("2 + 1")
    assert all(each["flat"]["equal"] and "place" not in each["flat"]["position"] for each in results)
    assert all("start as many ranks on each" in each["refused"] for each in results)
    assert errors[0].count("averaged in one level over hosts of 2 + 1 ranks: a host puts about") == 1
    assert errors[0].count("in two levels, which need as many ranks on each host, it would be") == 1
    assert "averaged" not in errors[1] + errors[2]


def test_levels_by_hand_are_those_that_are_found(run: Run) -> None:
    for rank, each in enumerate(run("by hand")[0]):
        for way in ("groups", "mesh", "found"):
            assert each[way]["position"] == {"hosts": 2, "ranks_per_host": 2, "place": rank % 2, "number": rank // 2}
            assert torch.equal(each[way]["weights"], each["found"]["weights"])


def test_models_over_disjoint_groups_of_ranks_know_nothing_of_one_another(run: Run) -> None:
    first, second, third, fourth = (each["in a part"] for each in run("by hand")[0])
    assert torch.equal(first, fourth)
    assert torch.equal(second, third)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("groups", "groups are two levels of the same 4 ranks"),
        ("mesh", "a mesh of hosts x ranks has 2 dimensions, got 1"),
        ("both", "groups and a mesh say the same"),
        ("ranks per host", "`ranks_per_host` 3 does not divide"),
        ("compressor", "this compressor encodes nothing"),
    ],
)
def test_levels_that_do_not_fit_are_refused(run: Run, what: str, reason: str) -> None:
    assert all(reason in each[f"refused {what}"] for each in run("by hand")[0])


if __name__ == "__main__":
    as_rank(work)
