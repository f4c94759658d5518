"""The worked example of ADDING_A_COMPRESSOR.md, as a reader would use it: registered, held to all promises, trained."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import compression
import tests.compression.test_registry as promises
from compression.conformance import check
from tests.support.broken_promises import StochasticSign
from tests.support.small_training import train

DOCUMENT = Path(__file__).parents[2] / "ADDING_A_COMPRESSOR.md"
NAME = "scaled_sign"


@pytest.fixture(autouse=True)
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the document's code blocks define, with its row in the registry for the time of a test."""
    text = DOCUMENT.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": __name__}  # dataclasses look up the module that they are in
    for block in re.finditer(r"(?<=```python\n).*?(?=```)", text, re.DOTALL):
        lines_before = text.count("\n", 0, block.start())
        exec(compile("\n" * lines_before + block.group(), str(DOCUMENT), "exec"), names)
    monkeypatch.setitem(compression.COMPRESSORS, NAME, names["row"])
    return names


@pytest.mark.parametrize(
    "options", [{}, {"error_feedback": True}, {"warmup_steps": 2}, {"dense_dtype": "bfloat16"}], ids=str
)
@pytest.mark.parametrize(
    ("promise", "arguments"),
    [
        (promises.test_ranks_agree_bit_for_bit, (3,)),
        (promises.test_a_resumed_run_goes_on_bit_for_bit, ()),
        (promises.test_a_bad_gradient_reaches_every_rank_and_leaves_no_trace, (float("inf"),)),
        (promises.test_a_bad_gradient_reaches_every_rank_and_leaves_no_trace, (float("nan"),)),
        (promises.test_finite_gradients_give_finite_averages, ("huge",)),
        (promises.test_finite_gradients_give_finite_averages, ("denormal",)),
        (promises.test_layers_may_come_in_any_grouping_from_step_to_step, ()),
        (promises.test_counted_bytes_are_the_messages_bytes, (2,)),
        (promises.test_one_rank_alone_still_encodes, ()),
    ],
)
def test_it_keeps_what_every_compressor_promises(options: dict[str, Any], promise: Any, arguments: Any) -> None:
    promise(NAME, {"bucket_size": 64, **options}, *arguments)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_its_messages_are_as_long_as_promised_and_a_contraction(example: dict[str, Any], count: int) -> None:
    codec = example["ScaledSign"]()
    values = torch.randn(3, count, generator=torch.Generator().manual_seed(count))
    wire = codec.encode(values, seed=0)
    assert wire.dtype == torch.uint8
    assert wire.shape == (3, codec.wire_bytes(count))
    decoded = codec.decode(wire, count)
    assert torch.equal(decoded.sign(), values.sign())
    assert ((values - decoded).norm(dim=1) <= values.norm(dim=1)).all()


def test_the_commands_that_check_it_find_nothing(tmp_path: Path) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text.partition("## Check it\n")[2].partition("\n## ")[0]
    code = re.search(r"(?<=```python\n).*?(?=```)", text, re.DOTALL)
    commands = re.findall(r"^python -m (.*)$", section, re.MULTILINE)
    assert code is not None
    assert len(commands) == 3
    (tmp_path / "scaled_sign.py").write_text(code.group(), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(DOCUMENT.parent)}
    for command in commands:
        line = [sys.executable, "-m", *command.split()]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        assert " 0 FAILS" in done.stdout


def test_the_test_that_checks_it_finds_nothing(example: dict[str, Any]) -> None:
    example["test_it_keeps_its_promises"]()


def test_what_a_failed_check_prints_is_what_is_shown() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    (block,) = re.findall(r"(?<=```text\n).*?(?=```)", text, re.DOTALL)
    printed = str(check(StochasticSign()))
    for line in block.splitlines()[:2]:  # below are measurements
        assert line.removesuffix("...") in printed
    assert [line.partition(":")[0] for line in block.splitlines()[2:]] == [f"{'measured':>27}", f"{'smallest':>27}"]


def test_it_trains() -> None:
    trained = train(NAME, 150, error_feedback=True)
    assert trained.last_loss < trained.first_loss / 2
    assert trained.ranks_agree
    assert trained.ratio < 0.1
