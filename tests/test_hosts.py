"""Several ranks a host: the whole program on one machine that is taken as two hosts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from image_classification.logs import records
from tests.support.program import SMALL, Rank, run, run_well, tiny
from tests.test_horovod import checkpoint, horovodrun, needs_horovod, torchrun

TWO_HOSTS = ("--ranks-per-host", 2)
FEEDBACK = "--compression-type maxmin --error-feedback"
PARAMETERS = [name for name, _ in tiny(3).named_parameters()]
SETTINGS = {  # every compressor's are in tests/compression/averagers/test_hierarchical.py
    "maxmin": FEEDBACK,
    "topk": "--compression-type topk --error-feedback",
    "powersgd": "--powersgd-rank 2",
    "bfloat16": "--dense-dtype bfloat16",
    "search": f"--search --popsize 1 --search-iterations 0 {FEEDBACK}",
    "big-grad": f"--big-grad {FEEDBACK}",
    "broken barrier": f"--bb-ratio 0.5 --bb-num-parallel-steps 2 {FEEDBACK}",
    "clipping": "--dgc --dgc-clip 0.5 --compressor-warmup-steps 4",
    "micro-batches": f"--optimizer-batch-size 16 --prof 6 {FEEDBACK}",
}
TRAINING = (
    "digits -a resnet18 --num-classes 10 --image-size 32 --data-backend pytorch -j 0 -b 4 --threads 1 "
    f"--training-only --prof 3 --epochs 1 --seed 3 {FEEDBACK}"
)


def argv(pictures: Path, workspace: Path, flags: str, epochs: int = 2) -> list[object]:
    return [pictures, *SMALL, "-b", 2, "--workspace", workspace, "--epochs", epochs, "--prof", 3, *flags.split()]


def same_parameters(ranks: list[Rank]) -> bool:
    return all(torch.equal(ranks[0].weights[name], rank.weights[name]) for rank in ranks for name in PARAMETERS)


def metrics(workspace: Path) -> dict[str, Any]:
    """The last epoch's."""
    return [record["data"] for record in records(workspace / "experiment_raport.json") if len(record["step"]) == 1][-1]


@pytest.mark.parametrize("flags", SETTINGS.values(), ids=SETTINGS)
def test_two_hosts_of_two_ranks_end_with_the_same_bits_and_go_on_exactly(
    flags: str, pictures: Path, tmp_path: Path
) -> None:
    straight = run_well(*argv(pictures, tmp_path / "straight", flags), *TWO_HOSTS, ranks=4)
    assert same_parameters(straight)
    begun = argv(pictures, tmp_path / "begun", flags)
    run_well(*begun, *TWO_HOSTS, "--run-epochs", 1, ranks=4)
    resumed = run_well(*begun, *TWO_HOSTS, "--resume", "auto", ranks=4)
    assert all(torch.equal(resumed[0].weights[name], straight[0].weights[name]) for name in PARAMETERS)
    assert straight[0].widths == resumed[0].widths
    found = metrics(tmp_path / "straight")
    assert 0 < found["comm.host_bytes"] < found["comm.host_bytes_dense"]
    assert found["comm.host_ratio"] == pytest.approx(found["comm.host_bytes"] / found["comm.host_bytes_dense"])
    assert found["comm.host_bytes"] == pytest.approx(2 * found["comm.bytes_sent"], rel=0.01)


@pytest.mark.parametrize("flags", [FEEDBACK, "--powersgd-rank 2"])
def test_residuals_do_not_move_to_another_arrangement_and_a_line_says_so(
    flags: str, pictures: Path, tmp_path: Path
) -> None:
    begun = argv(pictures, tmp_path, flags)
    run_well(*begun, *TWO_HOSTS, "--run-epochs", 1, ranks=4)
    ranks = run_well(*begun, "--hierarchical", "off", "--resume", "auto", ranks=4)
    assert same_parameters(ranks)
    assert ranks[0].err.count("averaged in another arrangement of hosts: residuals are dropped; to keep them") == 1
    assert not any("arrangement" in rank.err for rank in ranks[1:])


def test_without_compression_ranks_of_several_hosts_average_flat(pictures: Path, tmp_path: Path) -> None:
    ranks = run_well(*argv(pictures, tmp_path, "", epochs=1), *TWO_HOSTS, ranks=4)
    found = metrics(tmp_path)
    assert found["comm.host_ratio"] == pytest.approx(1)
    line = "gradients are averaged in one level over 2 hosts x 2: a host puts about"
    assert [rank.err.count(line) for rank in ranks] == [1, 0, 0, 0]


def test_on_one_host_nothing_crosses_a_link(pictures: Path, tmp_path: Path) -> None:
    run_well(*argv(pictures, tmp_path, FEEDBACK, epochs=1), ranks=2)
    found = metrics(tmp_path)
    assert (found["comm.host_bytes"], found["comm.host_bytes_dense"]) == (0, 0)
    assert "comm.host_ratio" not in found


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--ranks-per-host 3", "--ranks-per-host 3 does not divide the ranks of every host: there are 4"),
        ("--hierarchical on", "--hierarchical needs several hosts with as many ranks each, two or more: all 4 ranks"),
        ("--hierarchical on --ranks-per-host 1", "there are 4 hosts x 1, and nothing to add up inside"),
        ("--hierarchical on --ranks-per-host 2 --compression-type stats", "this compressor encodes nothing"),
    ],
)
def test_levels_that_cannot_be_are_refused_in_one_line_before_anything_is_written(
    flags: str, reason: str, pictures: Path, tmp_path: Path
) -> None:
    kind = "" if "stats" in flags else "--compression-type maxmin"
    ranks = run(*argv(pictures, tmp_path / "new", f"{kind} {flags}"), ranks=4)
    assert [rank.status for rank in ranks] == [2] * 4
    assert [len(rank.err.splitlines()) for rank in ranks] == [1, 0, 0, 0]
    assert reason in ranks[0].err
    assert not (tmp_path / "new").exists()


@needs_horovod
@pytest.mark.slow
def test_horovod_gives_the_same_parameters_on_two_hosts_of_two_ranks(tmp_path: Path) -> None:
    """Hosts are names to horovodrun: this machine has two."""
    hosts = ["-H", "localhost:2,127.0.0.1:2"]
    done = horovodrun(4, "main.py", *TRAINING.split(), "--hvd", "--workspace", str(tmp_path / "hvd"), hosts=hosts)
    assert done.returncode == 0, done.stdout + done.stderr
    done = torchrun(4, "main.py", *TRAINING.split(), "--ranks-per-host", "2", "--workspace", str(tmp_path / "ddp"))
    assert done.returncode == 0, done.stdout + done.stderr
    horovod, ddp = (checkpoint(tmp_path / name) for name in ("hvd", "ddp"))
    assert [rank["exchange"]["position"] for rank in horovod["ranks"]] == [
        rank["exchange"]["position"] for rank in ddp["ranks"]
    ]
    for name, values in ddp["state_dict"].items():
        assert torch.equal(horovod["state_dict"][name], values), name
    assert metrics(tmp_path / "hvd")["comm.host_bytes"] == metrics(tmp_path / "ddp")["comm.host_bytes"]
