"""Resuming: whatever a run is stopped by, and wherever, the run that goes on ends with the same bits."""

import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

import main
from compression import ARITHMETIC, Solo, build
from compression.layers import layers_of
from image_classification.checkpoints import load_weights
from image_classification.logs import records
from tests.support.program import (
    SMALL,
    every_compressor,
    run,
    run_well,
    signal_in_step,
    signal_in_validation,
    tiny,
)

SETTINGS = {
    **every_compressor(),
    "warm-up": "--compression-type maxmin --compressor-warmup-steps 3",
    "one tensor": "--compression-type topk --error-feedback --big-grad",
    "dropped values in bits": "--compression-type topk --efx-bits 4",
    "dropped values at random": "--compression-type topk --efx-randk 0.1",
    "search": "--search --popsize 1 --search-iterations 0 --error-feedback",
    "masters": "--amp --opt-level O2 --compression-type maxmin --error-feedback",
    "moving loss scale": "--fp16 --dynamic-loss-scale --compression-type maxmin --error-feedback",
    "schedule": "--lr-schedule cosine --warmup 1 --nesterov --label-smoothing 0.1",
    "mixup": "--mixup 0.2",
}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Paths at which two nested structures of tensors and plain values differ in a bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [path for key in one for path in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [path for index, pair in pairs for path in differences(*pair, f"{where}.{index}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [where]


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def argv(pictures: Path, workspace: Path, flags: str = "", epochs: int = 2) -> list[object]:
    return [pictures, *SMALL, "--workspace", workspace, "--epochs", epochs, "--prof", 3, *flags.split()]


@pytest.mark.parametrize("flags", SETTINGS.values(), ids=SETTINGS)
def test_a_run_that_goes_on_after_an_epoch_ends_with_the_same_bits(flags: str, pictures: Path, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_well(*argv(pictures, straight, flags), "--gather-checkpoints")
    run_well(*argv(pictures, resumed, flags), "--resume", straight / "checkpoint-1.pth.tar")
    last = checkpoint(straight / "checkpoint.pth.tar")
    assert differences(last, checkpoint(straight / "checkpoint-1.pth.tar"))
    assert differences(last, checkpoint(resumed / "checkpoint.pth.tar")) == []


class Interruption(NamedTuple):
    """A signal, the exit status that it gives, and the run that it hits."""

    number: int
    status: int
    ranks: int
    flags: str = ""
    iterations_per_step: int = 1


INTERRUPTIONS = {
    "alone": Interruption(signal.SIGTERM, 143, ranks=1),
    "by hand": Interruption(signal.SIGINT, 130, ranks=1, flags="--search --popsize 1 --search-iterations 0"),
    "two ranks": Interruption(signal.SIGINT, 130, ranks=2),
    "two ranks, micro-batches": Interruption(
        signal.SIGTERM, 143, ranks=2, flags="--optimizer-batch-size 16 --prof 6", iterations_per_step=2
    ),
}


@pytest.mark.parametrize("case", INTERRUPTIONS.values(), ids=INTERRUPTIONS)
def test_a_run_that_a_signal_stops_within_an_epoch_goes_on_with_the_same_bits(
    case: Interruption, pictures: Path, tmp_path: Path
) -> None:
    """The last rank gets the signal in its first step of the second epoch. All stop after the same step."""
    flags = f"--compression-type maxmin --error-feedback {case.flags}"
    straight, stopped = (argv(pictures, tmp_path / name, flags) for name in ("straight", "stopped"))
    run_well(*straight, ranks=case.ranks)
    first, *_ = ended = run(*stopped, ranks=case.ranks, before=partial(signal_in_step, 4, case.number, case.ranks - 1))
    assert [rank.status for rank in ended] == [case.status] * case.ranks, first.err
    saved = checkpoint(tmp_path / "stopped/checkpoint.pth.tar")
    iteration = (1 if case.ranks == 1 else 2) * case.iterations_per_step
    assert (saved["epoch"], saved["iteration"]) == (1, iteration)
    assert f"stopped by a signal after iteration {iteration} of epoch 1; go on with --resume " in first.out
    run_well(*stopped, "--resume", "auto", ranks=case.ranks)
    one, other = (checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("straight", "stopped"))
    assert differences(one, other) == []


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("flags", ["--compression-type maxmin", "--search --popsize 1 --search-iterations 0"])
def test_a_run_that_a_signal_stops_in_a_validation_keeps_the_epoch(
    flags: str, ranks: int, pictures: Path, tmp_path: Path
) -> None:
    """The last rank gets the signal. What goes on neither trains the epoch again nor loses its metrics."""
    flags += " --error-feedback"
    straight, stopped = (argv(pictures, tmp_path / name, flags) for name in ("straight", "stopped"))
    run_well(*straight, ranks=ranks)
    first, *_ = ended = run(*stopped, ranks=ranks, before=partial(signal_in_validation, signal.SIGTERM, ranks - 1))
    assert [rank.status for rank in ended] == [143] * ranks, first.err
    saved = checkpoint(tmp_path / "stopped/checkpoint.pth.tar")
    assert (saved["epoch"], saved["iteration"]) == (0, 3)
    assert "stopped by a signal in the validation of epoch 0; go on with --resume " in first.out
    first, *_ = run_well(*stopped, "--resume", "auto", ranks=ranks)
    assert "epoch 0 iteration" not in first.out
    assert "epoch 0 | train.loss" in first.out
    one, other = (checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("straight", "stopped"))
    assert differences(one, other) == []


def test_other_batches_go_on_at_the_images_that_were_not_seen(pictures: Path, tmp_path: Path) -> None:
    before = partial(signal_in_step, 3, signal.SIGTERM)
    run(*argv(pictures, tmp_path), "--prof", -1, before=before)  # three batches of 4
    [rank] = run_well(*argv(pictures, tmp_path, epochs=1), "--resume", "auto", "-b", 8, "--prof", -1)
    assert "4 images of epoch 0 are seen twice: the batches are others" in rank.err
    assert "epoch 0 iteration 2/9" in rank.out
    assert "epoch 0 iteration 1/9" not in rank.out


def test_ranks_go_on_after_an_epoch_with_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    flags = "--compression-type maxmin --error-feedback --search --popsize 1 --search-iterations 0"
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_well(*argv(pictures, straight, flags), "--gather-checkpoints", ranks=2)
    run_well(*argv(pictures, resumed, flags), "--resume", straight / "checkpoint-1.pth.tar", ranks=2)
    one, other = (checkpoint(folder / "checkpoint.pth.tar") for folder in (straight, resumed))
    assert differences(one, other) == []


def test_all_ranks_of_a_launcher_may_get_the_signal_at_once(pictures: Path, tmp_path: Path) -> None:
    before = partial(signal_in_step, 1, signal.SIGTERM)
    first, second = run(*argv(pictures, tmp_path), ranks=2, before=before)
    assert (first.status, second.status) == (143, 143)
    assert checkpoint(tmp_path / "checkpoint.pth.tar")["iteration"] == 2


def test_a_run_that_is_stopped_without_checkpoints_says_that_nothing_was_saved(pictures: Path, tmp_path: Path) -> None:
    before = partial(signal_in_step, 2, signal.SIGTERM)
    [rank] = run(*argv(pictures, tmp_path), "--no-checkpoints", before=before)
    assert rank.status == 143
    assert "stopped by a signal after iteration 2 of epoch 0; --no-checkpoints: nothing was saved" in rank.out
    assert [path.name for path in tmp_path.iterdir()] == ["experiment_raport.json"]


def test_auto_starts_anew_where_there_is_no_checkpoint(pictures: Path, tmp_path: Path) -> None:
    run_well(*argv(pictures, tmp_path / "fresh"))
    run_well(*argv(pictures, tmp_path / "auto"), "--resume", "auto")
    one, other = (checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("fresh", "auto"))
    assert differences(one, other) == []


def test_auto_passes_over_a_damaged_checkpoint_and_goes_on_from_the_one_before(pictures: Path, tmp_path: Path) -> None:
    flags = argv(pictures, tmp_path, "--gather-checkpoints", epochs=3)
    run_well(*flags)
    newest, gathered = (tmp_path / name for name in ("checkpoint.pth.tar", "checkpoint-3.pth.tar"))
    straight = checkpoint(newest)
    for path in (newest, gathered):
        path.write_bytes(path.read_bytes()[:-1000])
    [rank] = run_well(*flags, "--resume", "auto")
    assert f"passed over: checkpoint {newest} is damaged" in rank.err
    assert f"passed over: checkpoint {gathered} is damaged" in rank.err
    assert "epoch 2 |" in rank.out
    assert "epoch 1 |" not in rank.out
    assert differences(straight, checkpoint(newest)) == []


def test_a_raport_holds_every_epoch_once_however_often_the_run_was_resumed(pictures: Path, tmp_path: Path) -> None:
    before = partial(signal_in_step, 4, signal.SIGTERM)
    assert run(*argv(pictures, tmp_path), before=before)[0].status == 143
    run_well(*argv(pictures, tmp_path), "--resume", "auto")
    logged = [record for record in records(tmp_path / "experiment_raport.json") if record["type"] == "LOG"]
    steps = [record["step"] for record in logged]
    assert [step for step in steps if isinstance(step, list)] == [
        [0, 1], [0, 2], [0, 3], [0], [1, 1], [1, 2], [1, 3], [1], [],
    ]  # fmt: skip
    assert steps.count("PARAMETER") == 2
    assert [record["data"]["step.count"] for record in logged if len(record["step"]) == 1] == [3, 3]


def test_a_finished_run_that_is_resumed_changes_nothing(pictures: Path, tmp_path: Path) -> None:
    run_well(*argv(pictures, tmp_path))
    before = checkpoint(tmp_path / "checkpoint.pth.tar")
    raport = (tmp_path / "experiment_raport.json").read_text()
    [rank] = run_well(*argv(pictures, tmp_path), "--resume", "auto")
    assert "nothing is left to train: --epochs is 2, and the checkpoint has 2" in rank.out
    assert "epoch 1 |" not in rank.out
    assert differences(before, checkpoint(tmp_path / "checkpoint.pth.tar")) == []
    assert (tmp_path / "experiment_raport.json").read_text().startswith(raport)  # the summary is still there


@pytest.mark.parametrize(
    ("flags", "width"),
    [("", 4), ("--quantization-bits 8", 8), ("--quantization-bits 8 --search --popsize 1 --search-iterations 0", 4)],
    ids=["as they were", "asked for", "of the last search"],
)
def test_bits_that_are_asked_for_go_before_those_of_a_checkpoint(
    flags: str, width: int, pictures: Path, tmp_path: Path
) -> None:
    run_well(*argv(pictures, tmp_path, "--compression-type maxmin", epochs=1))
    [rank] = run_well(*argv(pictures, tmp_path, f"--compression-type maxmin {flags}", epochs=1), "--resume", "auto")
    assert set(rank.widths.values()) - {32} == {width}


class Change(NamedTuple):
    """Flags before and after, what the line says of both and of what was remembered; empty where there is no line."""

    before: str
    after: str
    line: str


MAXMIN = "--compression-type maxmin --error-feedback"
REMEMBERED = "dropped: what compression remembered"
CHANGES = {
    "none": Change(MAXMIN, "", f"--compression-type maxmin, and this run of --compression-type none; {REMEMBERED}"),
    "another with memory": Change(
        MAXMIN, "--compression-type quantile --error-feedback",
        f"--compression-type maxmin, and this run of --compression-type quantile; {REMEMBERED}",
    ),
    "another that remembers other things": Change(
        MAXMIN, "--powersgd-rank 2", f"--compression-type maxmin, and this run of --powersgd-rank; {REMEMBERED}"
    ),
    "to a momentum of its own": Change(
        MAXMIN, "--dgc --topk-ratio 0.1", "--compression-type maxmin, and this run of --dgc; dropped: momentum that "
        "--dgc keeps by itself, what compression remembered",
    ),
    "from a momentum of its own": Change(
        "--dgc --topk-ratio 0.1", "", "--dgc, and this run of --compression-type none; dropped: momentum that --dgc "
        "keeps by itself, what compression remembered",
    ),
    "from nothing": Change("", MAXMIN, ""),
    "bits of another": Change(
        "--compression-type maxmin --quantization-bits 2", "--compression-type norm_uniform",
        "--compression-type maxmin, and this run of --compression-type norm_uniform; dropped: bit widths",
    ),
    "without feedback": Change(
        MAXMIN, "--compression-type maxmin", f"--error-feedback, and this run of no --error-feedback; {REMEMBERED}"
    ),
    "with feedback": Change("--compression-type maxmin", MAXMIN, ""),
    "another rank": Change("--powersgd-rank 2", "--powersgd-rank 3", f"--powersgd-rank 2, and this run of "
                           f"--powersgd-rank 3; {REMEMBERED}"),
    "another bucket size": Change(
        MAXMIN, f"{MAXMIN} --bucket-size 256", "--bucket-size 512, and this run of --bucket-size 256; dropped: bit "
        "widths, what compression remembered",
    ),
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_compressor_begins_anew_and_says_what_is_dropped(
    change: Change, ranks: int, pictures: Path, tmp_path: Path
) -> None:
    """What goes on is what a checkpoint without a compressor's memory gives, bit for bit."""
    run_well(*argv(pictures, tmp_path / "before", change.before, epochs=1), ranks=ranks)
    path = tmp_path / "before/checkpoint.pth.tar"
    first, *others = run_well(*argv(pictures, tmp_path / "after", change.after), "--resume", path, ranks=ranks)
    assert first.err == (f"the checkpoint is of {change.line}\n" if change.line else "")
    assert [rank.err for rank in others] == [""] * (ranks - 1)
    saved = checkpoint(path)
    assert bool(change.line) or not any(saved["ranks"][0]["exchange"]["averager"].values())
    for own in saved["ranks"]:
        own["exchange"]["averager"] = {}
    del saved["compressor"]  # as of earlier code, which compares nothing
    saved["widths"] = {}
    if "momentum" in change.line:
        return
    torch.save(saved, tmp_path / "forgetful")
    run_well(*argv(pictures, tmp_path / "expected", change.after), "--resume", tmp_path / "forgetful", ranks=ranks)
    one, other = (checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("after", "expected"))
    assert differences(one, other) == []


KEPT = {
    "one tensor": Change(
        MAXMIN, f"{MAXMIN} --big-grad", "no --big-grad, and this run of --big-grad; residuals are kept"
    ),
    "another seed": Change(MAXMIN, f"{MAXMIN} --seed 2", "--seed 1, and this run of --seed 2; residuals are kept"),
    "other bits": Change(MAXMIN, f"{MAXMIN} --quantization-bits 2", ""),
    "another ratio": Change(
        "--compression-type topk --error-feedback", "--compression-type topk --error-feedback --topk-ratio 0.1", ""
    ),
}


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT)
def test_what_compression_remembers_outlives_what_it_does_not_rest_on(
    change: Change, pictures: Path, tmp_path: Path
) -> None:
    """The checkpoint has all epochs: what the run that goes on remembers at its end is what it took up."""
    run_well(*argv(pictures, tmp_path / "before", change.before, epochs=1))
    path = tmp_path / "before/checkpoint.pth.tar"
    flags = argv(pictures, tmp_path / "after", change.after, epochs=1)
    [rank] = run_well(*flags, "--resume", path, before=partial(save_when_nothing_is_left, tmp_path / "kept"))
    assert rank.err == (f"the checkpoint is of {change.line}\n" if change.line else "")
    saved = checkpoint(path)["ranks"][0]["exchange"]["averager"]
    assert any(saved.values())
    assert differences(torch.load(tmp_path / "kept", weights_only=True), saved) == []


@pytest.mark.parametrize("after", ["--compression-type svd", "--compression-type 1bit"])
def test_widths_that_were_chosen_layer_by_layer_are_not_dropped_silently(
    after: str, pictures: Path, tmp_path: Path
) -> None:
    scheme = tmp_path / "scheme.json"
    scheme.write_text('{"4": ["3.weight", "5.weight"], "2": ["10.weight"]}')
    flags = f"--compression-type maxmin --compression-scheme {scheme}"
    run_well(*argv(pictures, tmp_path / "before", flags, epochs=1))
    path = tmp_path / "before/checkpoint.pth.tar"
    [rank] = run_well(*argv(pictures, tmp_path / "after", after, epochs=1), "--resume", path)
    assert rank.err == (
        f"the checkpoint is of --compression-type maxmin, and this run of {after}; dropped: bit widths\n"
    )


def save_when_nothing_is_left(path: Path) -> None:
    """Keep what the averager remembers at the end of a run."""
    finish = main.Run._finish

    def keep_and_finish(run: main.Run) -> int:
        torch.save(run.exchange.averager.state_dict(), path)
        return finish(run)

    patch.object(main.Run, "_finish", keep_and_finish).start()


def test_a_compressor_that_finds_nothing_to_compress_says_so(pictures: Path, tmp_path: Path) -> None:
    [rank] = run_well(*argv(pictures, tmp_path, "--compression-type maxmin --bucket-size 100000", epochs=1))
    assert rank.err == "nothing is compressed: no layer has a bucket of 100000 values\n"


def test_another_number_of_ranks_goes_on_with_what_is_not_the_ranks_own(pictures: Path, tmp_path: Path) -> None:
    flags = argv(pictures, tmp_path, "--compression-type maxmin --error-feedback --compressor-warmup-steps 3")
    run_well(*flags, "--run-epochs", 1, ranks=2)
    assert checkpoint(tmp_path / "checkpoint.pth.tar")["ranks"][0]["exchange"]["step"] == 3
    [rank] = run_well(*flags, "--resume", "auto")
    assert rank.err == (
        "the checkpoint is of 2 ranks, and these are 1: residuals and random states are dropped, and batch-norm "
        "statistics become their averages\n"
    )
    saved = checkpoint(tmp_path / "checkpoint.pth.tar")
    assert (saved["epoch"], saved["ranks"][0]["exchange"]["step"]) == (2, 6)
    ratios = [
        record["data"]["comm.ratio"] for record in records(tmp_path / "experiment_raport.json") if record["step"] == [1]
    ]
    assert ratios[0] < 0.5  # the warm-up in float32 is over


def test_gradient_statistics_outlive_another_number_of_ranks(pictures: Path, tmp_path: Path) -> None:
    flags = argv(pictures, tmp_path, "--compression-type stats")
    run_well(*flags, "--run-epochs", 1, ranks=2)
    before = (tmp_path / "gradient_stats.jsonl").read_text()
    run_well(*flags, "--resume", "auto")
    assert before
    assert (tmp_path / "gradient_stats.jsonl").read_text().startswith(before)


def test_what_several_ranks_validated_is_what_one_rank_loads_and_what_is_exported(
    pictures: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "weights.safetensors"
    all_images = ("--prof", -1)
    run_well(*argv(pictures, tmp_path, epochs=1), *all_images, "--save-weights", exported, ranks=2)
    evaluate = ("--evaluate", "--resume", tmp_path / "checkpoint.pth.tar")
    [rank] = run_well(*argv(pictures, tmp_path / "other"), *all_images, *evaluate)
    saved = checkpoint(tmp_path / "checkpoint.pth.tar")
    own = [each["buffers"]["1.running_mean"] for each in saved["ranks"]]
    assert not torch.equal(own[0], own[1])
    assert torch.equal(rank.weights["1.running_mean"], (own[0] + own[1]) / 2)
    torch.testing.assert_close(load_weights(exported), dict(rank.weights))
    losses = [
        record["data"]["val.loss"]
        for folder in (tmp_path, tmp_path / "other")
        for record in records(folder / "experiment_raport.json")
        if record["type"] == "LOG" and "val.loss" in record["data"]
    ]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


BEFORE = {
    "maxmin": ("maxmin", {"error_feedback": True}, "--compression-type maxmin --error-feedback"),
    "powersgd": ("powersgd", {"rank": 2}, "--powersgd-rank 2"),
    "dgc": ("dgc", {"ratio": 0.1, "warmup_steps": 4}, "--dgc --topk-ratio 0.1 --compressor-warmup-steps 4"),
}
"""Checkpoints in tests/checkpoints, of 2 ranks after the first of two epochs: names, options, flags.

They were written by the code before averagers, exchanges and checkpoints were arranged as they are now.
"""


@pytest.mark.parametrize("name", BEFORE)
def test_a_checkpoint_of_earlier_code_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """To the bits where this machine computes as the one that wrote it did, which the first epoch tells."""
    written = Path(__file__).parent / "checkpoints" / f"{name}.pth.tar"
    compressor, options, words = BEFORE[name]
    small = [*SMALL, "--data-backend", "syntetic", "--prof", 3, "--epochs", 2, *words.split()]
    straight = run_well(tmp_path, *small, "--workspace", tmp_path / "straight", "--gather-checkpoints", ranks=2)
    resumed = run_well(tmp_path, *small, "--workspace", tmp_path / "resumed", "--resume", written, ranks=2)
    before, after = checkpoint(written), checkpoint(tmp_path / "straight" / "checkpoint-1.pth.tar")
    parameters = dict(tiny(3).named_parameters())
    for rank, own in enumerate(after["ranks"]):
        assert own["exchange"].pop("position") == {"ranks": 2, "rank": rank}  # which earlier code did not say
    if all(torch.equal(before["state_dict"][name], after["state_dict"][name]) for name in parameters):
        assert differences(before["ranks"], after["ranks"]) == []
        assert differences(dict(straight[0].weights), dict(resumed[0].weights)) == []
    assert all(torch.equal(*(rank.weights[name] for rank in resumed)) for name in parameters)
    assert f"version 1 of the compressors' arithmetic, and goes on with version {ARITHMETIC}" in resumed[0].err
    layers = layers_of(((name, parameter.shape) for name, parameter in parameters.items()), 512)
    for rank, own in enumerate(before["ranks"]):
        averager = build(compressor, **options).averager(layers, Solo(rank, world_size=2), 1)
        averager.load_state_dict(own["exchange"]["averager"])
        assert differences(averager.state_dict(), own["exchange"]["averager"]) == []
