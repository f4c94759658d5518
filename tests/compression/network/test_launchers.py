"""Launchers: processes that were started together and do not know of each other are told so, and others are not."""

from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from compression.network.launchers import ERROR_FILE, HOROVODRUN, TORCHRUN, note_failure, speaks_first

MISFIT = "in the environment, so that ranks would wait for ever or train apart; use"


def variables(words: str) -> dict[str, str]:
    return dict(word.split("=") for word in words.split())


def by_torchrun(rank: int, hosts: tuple[int, ...]) -> str:
    """The variables that torchrun sets for a rank, on hosts of so many ranks each."""
    host = next(host for host in range(len(hosts)) if rank < sum(hosts[: host + 1]))
    return (
        f"RANK={rank} WORLD_SIZE={sum(hosts)} LOCAL_RANK={rank - sum(hosts[:host])} LOCAL_WORLD_SIZE={hosts[host]} "
        f"GROUP_RANK={host} GROUP_WORLD_SIZE={len(hosts)}"
    )


SRUN = "SLURM_STEP_NUM_TASKS=8 SLURM_PROCID=3 SLURM_NNODES=2"


@pytest.mark.parametrize(
    ("words", "message", "rank"),
    [
        (
            "HOROVOD_RANK=2 HOROVOD_SIZE=4",
            "horovodrun started 4 processes, and without `hvd` each would train by itself; use",
            2,
        ),
        (
            SRUN,
            "srun started 8 processes that are told of no others, so that each would train by itself; unset "
            "SLURM_STEP_NUM_TASKS where that is meant, or use",
            3,
        ),
        (
            "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1",
            "mpirun started 2 processes that are told of no others, so that each would train by itself; unset "
            "OMPI_COMM_WORLD_SIZE where that is meant, or use",
            1,
        ),
        ("OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1 " + SRUN, "mpirun started 2 processes that are told of no", 1),
        ("OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 SLURM_PTY_PORT=1 " + SRUN, "mpirun started 2 processes", 0),
        (
            "SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=1 " + by_torchrun(2, (4,)),
            "srun started 2 torchruns that are told of one host, so that each would train by itself; unset "
            "SLURM_STEP_NUM_TASKS where that is meant, or use",
            3,
        ),
        ("RANK=4 WORLD_SIZE=4", f"RANK 4 does not fit WORLD_SIZE 4 {MISFIT}", 0),
        (
            "RANK=1 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 GROUP_RANK=0 GROUP_WORLD_SIZE=1",
            f"LOCAL_WORLD_SIZE 4 does not fit WORLD_SIZE 8 {MISFIT}",
            1,
        ),
        ("RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=4", f"LOCAL_WORLD_SIZE 4 does not fit WORLD_SIZE 2 {MISFIT}", 1),
        (
            "RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 GROUP_RANK=0 GROUP_WORLD_SIZE=2",
            f"LOCAL_WORLD_SIZE 4 does not fit WORLD_SIZE 4 {MISFIT}",
            1,
        ),
        (
            "RANK=1 WORLD_SIZE=8 LOCAL_RANK=5 LOCAL_WORLD_SIZE=4",
            f"LOCAL_RANK 5 does not fit LOCAL_WORLD_SIZE 4 {MISFIT}",
            0,
        ),
        (
            "RANK=1 WORLD_SIZE=4 GROUP_RANK=2 GROUP_WORLD_SIZE=2",
            f"GROUP_RANK 2 does not fit GROUP_WORLD_SIZE 2 {MISFIT}",
            0,
        ),
    ],
)
def test_processes_that_would_train_apart_are_told_how_to_train_together(words: str, message: str, rank: int) -> None:
    apart = TORCHRUN.apart(variables(words))
    assert apart is not None
    assert apart.message.startswith(message)
    assert apart.rank == rank
    assert apart.launcher is (HOROVODRUN if "horovodrun" in message else TORCHRUN)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "HOROVOD_RANK=0 HOROVOD_SIZE=1",
        "HOROVOD_RANK=1 HOROVOD_SIZE=2 RANK=1 WORLD_SIZE=2",
        "SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0",
        "SLURM_NTASKS=8 SLURM_NNODES=2",  # a bare salloc
        "SLURM_NTASKS=8 SLURM_NNODES=2 SLURM_PROCID=0",  # a bare sbatch
        "SLURM_STEP_NUM_TASKS=8",
        "SLURM_PTY_PORT=41234 SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=0",  # a shell
        "SLURM_PTY_PORT=41234 SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=0 " + by_torchrun(1, (4,)),
        "SLURM_STEP_NUM_TASKS=many SLURM_PROCID=0",
        "OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_RANK=0",
        "RANK=1 WORLD_SIZE=2 " + SRUN,  # by a script that tells torch what srun says
        "SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=1 " + by_torchrun(5, (4, 4)),
        "RANK=0 WORLD_SIZE=1",
        *(by_torchrun(rank, hosts) for hosts in ((1,), (4,), (1, 1), (2, 3), (1, 5, 2)) for rank in range(sum(hosts))),
    ],
)
def test_ranks_that_know_of_each_other_and_single_processes_are_left_alone(words: str) -> None:
    assert TORCHRUN.apart(variables(words)) is None


def test_with_horovod_its_own_launcher_counts_and_others_are_judged_by_who_has_joined() -> None:
    apart = HOROVODRUN.apart(variables(by_torchrun(1, (2,))))
    assert apart == (
        "torchrun started 2 processes, and with `hvd`, which joins those of horovodrun, each would train by itself; "
        "drop `hvd`, or use",
        1,
        2,
        HOROVODRUN,
    )
    assert HOROVODRUN.apart(variables("HOROVOD_RANK=1 HOROVOD_SIZE=2 " + by_torchrun(1, (2,)))) is None
    for words, starter in ((SRUN, "srun"), ("OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_RANK=3", "mpirun")):
        assert HOROVODRUN.apart(variables(words)) is None  # Horovod may join them over MPI
        assert HOROVODRUN.apart(variables(words), joined=8) is None
        alone = HOROVODRUN.apart(variables(words), joined=1)
        assert alone is not None
        assert alone.message.startswith(f"{starter} started 8 processes that are told of no others")
        assert alone.rank == 3
    assert HOROVODRUN.apart({}, joined=1) is None


# Who speaks, and what launchers are told


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("", True),
        (by_torchrun(0, (4,)), True),
        (by_torchrun(3, (4,)), False),
        (by_torchrun(4, (4, 4)), True),  # a host's torchrun has a terminal of its own
        (f"SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 {by_torchrun(4, (4, 4))}", False),  # where srun did not start it
        ("RANK=0 WORLD_SIZE=2", True),
        ("RANK=1 WORLD_SIZE=2", False),
        ("HOROVOD_RANK=0 HOROVOD_SIZE=4 HOROVOD_LOCAL_RANK=0", True),
        ("HOROVOD_RANK=2 HOROVOD_SIZE=4 HOROVOD_LOCAL_RANK=0", False),
        ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=8", True),
        ("SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=8", False),
        ("OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2", False),
    ],
)
def test_one_process_of_those_that_share_a_terminal_speaks_first(words: str, first: bool) -> None:
    assert speaks_first(variables(words)) is first


def test_torchruns_summary_quotes_the_line_of_a_failure(tmp_path: Path) -> None:
    """That of the rank that has the cause, not of the one that lost it: also where both are noted at one time."""
    lost, cause = tmp_path / "0.json", tmp_path / "1.json"
    note_failure("main.py: error: a line", {ERROR_FILE: str(cause)})
    note_failure("main.py: error: no way to the others", {ERROR_FILE: str(lost)}, follows=True)
    failures = {0: ProcessFailure(0, 10, 1, str(lost)), 1: ProcessFailure(1, 11, 2, str(cause))}
    others, _, root = str(ChildFailedError("main.py", failures)).partition("Root Cause")
    assert "  traceback : main.py: error: a line\n" in root
    assert "  exitcode  : 2 (pid: 11)" in root
    assert "  traceback : main.py: error: no way to the others\n" in others


def test_a_failure_can_be_noted_nowhere(tmp_path: Path) -> None:
    note_failure("a line", {})
    note_failure("a line", {ERROR_FILE: str(tmp_path / "no folder/error.json")})
    assert list(tmp_path.iterdir()) == []
