"""A bit that flips between two ranks: with checksums the run ends and names the sender; without, replicas differ."""

import itertools
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from compression.network import torch_distributed
from tests.support.program import SMALL, own_rank, run, run_well

FLAGS = ("--compression-type", "maxmin", "--verify-wire", "--prof", 3)


def flip_a_bit_of_the_third_message() -> None:
    """Of those that rank 1 receives, after it has left rank 0."""
    wait, messages = torch_distributed._Messages.wait, itertools.count(1)

    def wait_and_flip(self: torch_distributed._Messages) -> Tensor:
        received = wait(self)
        if own_rank() == 1 and received.numel() and next(messages) == 3:
            received.view(-1)[0].bitwise_xor_(torch.tensor(1, dtype=torch.uint8))
        return received

    patch.object(torch_distributed._Messages, "wait", wait_and_flip).start()


def test_a_flipped_bit_ends_the_run_and_names_the_sender(pictures: Path, tmp_path: Path) -> None:
    argv = (pictures, *SMALL, "--workspace", tmp_path, *FLAGS)
    _, second = run(*argv, ranks=2, before=flip_a_bit_of_the_third_message)
    assert second.status == 2
    assert "from rank 0 arrived damaged at rank 1: its checksum is not that of its bytes" in second.err
    assert "Traceback" not in second.err


@pytest.mark.parametrize("flags", ["", "--compression-type topk --topk-ratio 0.1"])
def test_checksums_change_no_result(flags: str, pictures: Path, tmp_path: Path) -> None:
    weights = []
    for more in ((), ("--verify-wire",)):
        folder = tmp_path / str(len(weights))
        words = flags.split() or ("--compression-type", "maxmin")
        run_well(pictures, *SMALL, "--workspace", folder, "--prof", 3, "--epochs", 1, *words, *more, ranks=2)
        saved = torch.load(folder / "checkpoint.pth.tar", weights_only=False)
        weights.append(saved["state_dict"])
    for name, values in weights[0].items():
        assert torch.equal(values, weights[1][name]), name
