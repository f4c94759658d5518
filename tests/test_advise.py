"""main.py --advise: on two ranks and on paper, what it writes, and one line for each bad input."""

import json
import math
from pathlib import Path
from unittest.mock import patch

import pytest

import compression
import main
from tests.support.program import SMALL, run, run_well

ON_PAPER = ("--advise", "--simulate", "hosts=4 ranks=2 link=1gbit latency=50us")


def forecasts_that_are_no_numbers() -> None:
    patch.object(compression.Advice, "to_json", lambda *_: {"seconds": math.nan}).start()


def content(workspace: Path) -> dict:
    assert sorted(path.name for path in workspace.iterdir() if not path.name.startswith(".")) == [
        "advice.json",
        "advice.png",
    ]
    assert (workspace / "advice.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((workspace / "advice.json").read_text())


def test_two_ranks_are_advised_and_train_nothing(pictures: Path, tmp_path: Path) -> None:
    first, second = run_well(pictures, *SMALL, "--advise", "--workspace", tmp_path, ranks=2)
    found = content(tmp_path)
    assert second.out == ""
    assert f"use: {' '.join(found['advised']['flags'])}" in first.out
    assert {each["compressor"] for each in found["choices"]} == set(compression.COMPRESSORS) - {"sanity", "stats"}
    for each in found["choices"]:
        main.parse([str(pictures), *each["flags"]])
        assert each["seconds"] > 0
    assert found["measured"]["ranks_on_machine"] == 2
    assert found["cluster"]["hosts"] * found["cluster"]["ranks_per_host"] == 2


def test_one_process_is_advised_for_a_cluster_that_is_not_there(pictures: Path, tmp_path: Path) -> None:
    [rank] = run_well(pictures, *SMALL, *ON_PAPER, "--workspace", tmp_path / "first")
    found = content(tmp_path / "first")
    assert found["cluster"]["link_mbit"] == 1_000
    flags = {each["name"]: each["flags"] for each in found["choices"]}
    assert flags["float32"] == ["--compression-type", "none"]
    assert flags["bfloat16"] == ["--compression-type", "none", "--dense-dtype", "bfloat16", "--hierarchical", "off"]
    assert flags["powersgd, rank 4, two levels"] == ["--powersgd-rank", "4", "--hierarchical", "on"]
    assert flags["maxmin, bits 2"] == [
        "--compression-type", "maxmin", "--quantization-bits", "2", "--error-feedback", "--hierarchical", "off",
    ]  # fmt: skip
    assert "send " in rank.out

    again = ("--advise-from", tmp_path / "first" / "advice.json", "--workspace", tmp_path / "again")
    run_well("no such folder", *ON_PAPER, *again)
    assert content(tmp_path / "again") == found

    [rank] = run("no such folder", *ON_PAPER, *again, before=forecasts_that_are_no_numbers)
    assert rank.status == 2
    assert "not JSON compliant" in rank.err
    assert content(tmp_path / "again") == found

    flat = (*again[:2], "--workspace", tmp_path / "flat", "--hierarchical", "off")
    run_well("no such folder", *ON_PAPER, *flat)
    assert not any(each["hierarchical"] for each in content(tmp_path / "flat")["choices"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--advise", "nothing travels: advice needs the number of ranks or --simulate"),
        ("--simulate hosts=2,link=1gbit", "--simulate has no effect without --advise"),
        ("--advise --simulate hosts=0", "argument --simulate: hosts is a number of 1 or more, got '0'"),
        ("--advise --simulate hosts=2,link=fast", "argument --simulate: link is a number with a unit"),
        ("--advise --advise-from x", "--advise-from has no effect without --advise and --simulate"),
        ("--advise --search --simulate hosts=2,link=1gbit", "--advise trains nothing, and --search is of no use"),
        ("--advise --evaluate --simulate hosts=2,link=1gbit", "--advise trains nothing, and --evaluate is of no use"),
        ("--advise --resume x --simulate hosts=2,link=1gbit", "--advise trains nothing, and --resume is of no use"),
        ("--advise --bb-ratio 0.5 --simulate hosts=2,link=1gbit", "--advise trains nothing, and --bb-ratio is of"),
        ("--advise --simulate hosts=2,link=1gbit,inside=1gbit", "argument --simulate: one rank of each host has no"),
        ("--advise --simulate hosts=2,link=1gbit --hierarchical on", "--advise tells whether two levels are faster"),
        (
            "--advise --simulate hosts=2,link=1gbit -b 8 --optimizer-batch-size 16",
            "--advise predicts steps of one batch a rank, 8 images, and --optimizer-batch-size 16 makes them of several"
            "; drop it, or raise --batch-size",
        ),
        (
            "--search --search-target-error 4 --search-objective time --simulate hosts=2,link=1gbit -b 8 "
            "--optimizer-batch-size 16",
            "--search-objective time predicts steps of one batch a rank, 8 images, and --optimizer-batch-size 16 makes",
        ),
        (
            "--advise --simulate hosts=2,link=1gbit --workspace w --advise-from w/advice.json",
            "--advise-from and the advice in --workspace are one file, ",
        ),
    ],
)
def test_flags_that_do_not_go_with_advice(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.parse(["DIR", *flags.split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert message in error


def test_a_launcher_of_one_rank_starts_nothing_to_be_advised_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main.parse(["DIR", "--advise"])
    assert "nothing travels: advice needs the number of ranks or --simulate" in capsys.readouterr().err


def test_flags_of_compression_are_said_to_have_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    plan = main.parse(["DIR", *ON_PAPER, "--compression-type", "eden", "--epochs", "3"])
    assert set(plan.idle) == {"compression_type", "epochs"}


def test_flags_of_training_are_said_to_have_no_effect() -> None:
    flags = "--lr 0.5 --mixup 0.2 -b 8 --optimizer-batch-size 8 --momentum 0.5"
    plan = main.parse(["DIR", *ON_PAPER, *flags.split()])
    assert set(plan.idle) == {"lr", "mixup", "optimizer_batch_size"}


def test_flags_of_the_model_are_said_to_have_no_effect_where_a_file_has_its_times() -> None:
    model = "--arch vgg16 -b 8 --image-size 32 --data-backend syntetic --num-classes 3 --amp --deterministic --seed 3"
    plan = main.parse(["DIR", *ON_PAPER, "--advise-from", "other.json", *model.split(), "--hierarchical", "off"])
    assert {plan.idle[name] for name in ("arch", "batch_size", "image_size", "data_backend", "amp", "seed")} == {
        "with --advise-from, whose file holds what was measured"
    }
    assert {"num_classes", "deterministic"} <= set(plan.idle)
    assert not {"hierarchical", "simulate", "advise_from"} & set(plan.idle)
    assert plan.hierarchical == "off"


def test_an_advice_needs_no_images_to_validate_on(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(pictures / "train")
    run_well(tmp_path / "data", *SMALL, *ON_PAPER, "--workspace", tmp_path / "workspace")
    assert content(tmp_path / "workspace")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"measured": {}}', '{"measured": 3}', '{"measured": {"version": 9}}', "[" * 10**5]
)
def test_a_file_that_is_no_advice_is_one_line_and_nothing_is_overwritten(text: str, tmp_path: Path) -> None:
    other, workspace = tmp_path / "other.json", tmp_path / "workspace"
    other.write_text(text)
    workspace.mkdir()
    (workspace / "advice.json").write_text("old")
    [rank] = run("DIR", *ON_PAPER, "--advise-from", other, "--workspace", workspace)
    assert rank.status == 2
    assert rank.err.count("\n") == 1
    assert rank.err.startswith(f"main.py: error: --advise-from {other}")
    assert (workspace / "advice.json").read_text() == "old"


def test_a_model_whose_step_fails_is_one_line_and_nothing_is_overwritten(pictures: Path, tmp_path: Path) -> None:
    """Labels of three classes, and a model of one."""
    (tmp_path / "advice.json").write_text("old")
    small = [word if word != "3" else "1" for word in SMALL]
    assert small != list(SMALL)
    [rank] = run(pictures, *small, *ON_PAPER, "--workspace", tmp_path)
    assert rank.status == 2
    assert rank.err.count("main.py: error: ") == 1
    assert (tmp_path / "advice.json").read_text() == "old"
