"""A whole run: train on two ranks, search on what that left, train with what was found; and what each step writes."""

import itertools
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compression
from image_classification import checkpoints
from image_classification.logs import parts_of_step, records
from tests.support.program import SMALL, Rank, compiled_code_goes_to, run, run_well, tiny

COMPRESSED = {"3.weight": 16 * 32 * 9, "5.weight": 32 * 48 * 9, "10.weight": 48 * 64}
PARAMETERS = dict(tiny(3).named_parameters())
VALUES = sum(parameter.numel() for parameter in PARAMETERS.values())
DENSE_BYTES = 4 * (VALUES - sum(COMPRESSED.values()))

EPOCH_METRICS = {
    "train.loss", "train.compute_ips", "train.total_ips", "train.data_time", "train.compute_time", "lr", "val.top1",
    "val.top5", "val.loss", "val.compute_ips", "val.total_ips", "val.data_time", "val.compute_latency",
    "val.compute_latency_at95", "val.compute_latency_at99", "val.compute_latency_at100", "comm.bytes_sent",
    "comm.bytes_dense", "comm.ratio", "comm.host_bytes", "comm.host_bytes_dense", "comm.time", "codec.time",
    "comm.exposed_time", "step.count", "step.time", "step.data_time", "step.compute_time", "step.exchange_time",
}  # fmt: skip
ITERATION_METRICS = {name for name in EPOCH_METRICS if not name.startswith(("val.", "step."))}


@dataclass(frozen=True)
class Stage:
    """One run of the program, and the folder that it wrote to."""

    workspace: Path
    ranks: list[Rank]

    def checkpoint(self) -> dict[str, Any]:
        return torch.load(self.workspace / "checkpoint.pth.tar", weights_only=True)

    def search(self, when: int | str) -> dict[str, Any]:
        return json.loads((self.workspace / f"adapt_logs/search_{when}.json").read_text())

    def scheme(self, when: int | str) -> dict[str, list[str]]:
        return json.loads((self.workspace / f"adapt_logs/compress_scheme_{when}.json").read_text())

    def records(self) -> list[dict[str, Any]]:
        return records(self.workspace / "experiment_raport.json")

    def metrics(self, *step: int) -> dict[str, float]:
        [data] = [record["data"] for record in self.records() if record["step"] == list(step)]
        return data


def stage(workspace: Path, data: Path, flags: str, *more: object) -> Stage:
    return Stage(workspace, run_well(data, *SMALL, "--workspace", workspace, *flags.split(), *more, ranks=2))


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Two epochs with 4 bits and error feedback."""
    flags = "--epochs 2 --compression-type maxmin --error-feedback"
    return stage(tmp_path_factory.mktemp("trained"), pictures, flags)


@pytest.fixture(scope="module")
def searched(trained: Stage, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A search on the weights that were trained, and nothing else."""
    flags = "--compression-type maxmin --search --evaluate --search-calibration-steps 3"
    weights = trained.workspace / "checkpoint.pth.tar"
    return stage(tmp_path_factory.mktemp("searched"), pictures, flags, "--pretrained-weights", weights)


@pytest.fixture(scope="module")
def continued(trained: Stage, searched: Stage, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A third epoch with the widths that the search found."""
    scheme = searched.workspace / "adapt_logs/compress_scheme_calibration.json"
    flags = "--epochs 3 --prof 3 --compression-type maxmin --error-feedback --compression-scheme"
    start = trained.workspace / "checkpoint.pth.tar"
    return stage(tmp_path_factory.mktemp("continued"), pictures, flags, scheme, "--resume", start)


@pytest.fixture(scope="module")
def adaptive(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Three epochs with a search after each."""
    flags = "--search --search-target-bits 3.7 --popsize 2 --epochs 3 --prof 3 --quantization-bits 6"
    return stage(tmp_path_factory.mktemp("adaptive"), pictures, flags)


def encoded_bytes(name: str, bits: int, bucket_size: int = 512) -> int:
    """Bytes of one layer: a minimum and a step in float32 for every bucket, and codes in whole bytes."""
    full, rest = divmod(COMPRESSED[name], bucket_size)
    return sum(8 + math.ceil(count * bits / 8) for count in [bucket_size] * full + [rest] * (rest > 0))


PARTS = ("step.data_time", "step.compute_time", "step.exchange_time")


def ratio(widths: Mapping[str, int]) -> float:
    """Bytes sent over those of float32, at any number of ranks."""
    return (sum(encoded_bytes(name, widths[name]) for name in COMPRESSED) + DENSE_BYTES) / (4 * VALUES)


# Training


def test_two_ranks_with_4_bits_and_error_feedback_learn(trained: Stage) -> None:
    assert trained.metrics(1)["train.loss"] < trained.metrics(0)["train.loss"]
    assert trained.metrics(1)["val.top1"] > 60  # chance is 33


@pytest.mark.parametrize("name", ["trained", "continued", "adaptive"])
def test_ranks_end_with_the_same_parameters_bit_for_bit(name: str, request: pytest.FixtureRequest) -> None:
    first, second = request.getfixturevalue(name).ranks
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in PARAMETERS)
    assert not torch.equal(first.weights["1.running_mean"], second.weights["1.running_mean"])  # each has its own images


def test_the_checkpoint_holds_the_averaged_statistics_and_the_buffers_of_both_ranks(trained: Stage) -> None:
    saved = trained.checkpoint()
    assert saved["state_dict"].keys() == trained.ranks[0].weights.keys()
    assert all(torch.equal(saved["state_dict"][name], trained.ranks[0].weights[name]) for name in PARAMETERS)
    for rank, own in zip(trained.ranks, saved["ranks"], strict=True):
        assert own["buffers"].keys() == {name for name in rank.weights if name not in PARAMETERS}
        assert all(torch.equal(own["buffers"][name], rank.weights[name]) for name in own["buffers"])
    for name in ("1.running_mean", "1.running_var", "6.running_mean", "6.running_var"):
        assert torch.equal(saved["state_dict"][name], sum(rank.weights[name] for rank in trained.ranks) / 2)


def test_the_table_of_a_checkpoints_keys_is_what_is_saved(trained: Stage) -> None:
    rows = [line.split("|")[1] for line in checkpoints.__doc__.splitlines() if line.startswith("| `")]
    documented = [name for row in rows for name in re.findall("`([a-z_0-9]+)`", row)]
    assert sorted(documented) == sorted(trained.checkpoint())


def test_bytes_are_those_of_the_codes_and_of_what_is_not_compressed(trained: Stage) -> None:
    for epoch in range(2):
        metrics = trained.metrics(epoch)
        assert metrics["comm.bytes_dense"] == 4 * VALUES  # 2 (W - 1) / W of them, at W = 2
        assert metrics["comm.bytes_sent"] / metrics["comm.bytes_dense"] == pytest.approx(metrics["comm.ratio"])
        assert metrics["comm.ratio"] == pytest.approx(ratio(dict.fromkeys(COMPRESSED, 4)))


@pytest.mark.parametrize("flags", ["", "--compression-type maxmin --error-feedback"])
def test_in_bfloat16_two_ranks_learn_and_what_is_not_encoded_takes_half(
    flags: str, pictures: Path, tmp_path: Path
) -> None:
    done = stage(tmp_path, pictures, f"--epochs 2 --dense-dtype bfloat16 --hierarchical off {flags}")
    metrics = done.metrics(1)
    codes = sum(encoded_bytes(name, 4) for name in COMPRESSED)
    expected = codes + DENSE_BYTES / 2 if flags else 2 * VALUES
    assert metrics["comm.bytes_sent"] == pytest.approx(expected)
    assert metrics["comm.bytes_dense"] == 4 * VALUES
    assert metrics["train.loss"] < done.metrics(0)["train.loss"]
    first, second = done.ranks
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in PARAMETERS)


# The raport


def test_every_line_of_the_raport_is_a_record_of_dllogger(trained: Stage) -> None:
    lines = (trained.workspace / "experiment_raport.json").read_text().splitlines()
    assert all(line.startswith("DLLL {") for line in lines)
    found = [json.loads(line.removeprefix("DLLL ")) for line in lines]
    keys = {"timestamp", "datetime", "elapsedtime", "type", "step", "data"}
    assert all(record.keys() == keys for record in found if record["type"] == "LOG")
    times = [float(record["elapsedtime"]) for record in found]
    assert times == sorted(times)


def test_the_raport_holds_flags_units_iterations_epochs_and_a_summary(trained: Stage) -> None:
    units = {record["metric"]: record["metadata"] for record in trained.records() if record["type"] == "METADATA"}
    assert units.keys() == {*EPOCH_METRICS, "best.top1", "comm.host_ratio"}
    assert units["comm.bytes_sent"] == {"unit": "bytes/step"}
    steps = [record["step"] for record in trained.records() if record["type"] == "LOG"]
    iterations = [[epoch, iteration] for epoch in range(2) for iteration in range(1, 10)]
    assert steps == ["PARAMETER", *iterations[:9], [0], *iterations[9:], [1], []]
    assert trained.metrics(0, 3).keys() == ITERATION_METRICS
    assert trained.metrics(1).keys() == EPOCH_METRICS
    assert trained.metrics().keys() == {*EPOCH_METRICS, "best.top1"}
    [flags] = [record["data"] for record in trained.records() if record["step"] == "PARAMETER"]
    assert (flags["compression_type"], flags["batch_size"], flags["seed"]) == ("maxmin", 4, 1)
    assert flags["version"] == trained.checkpoint()["version"] == compression.__version__


def test_a_run_begins_with_the_flags_that_differ_and_what_it_found(trained: Stage) -> None:
    first, found, *_ = trained.ranks[0].out.splitlines()
    program, *words = shlex.split(first.removeprefix("running "))
    assert program == "main.py"
    typed = [*SMALL, "--threads", "1", "--workspace", str(trained.workspace), "--epochs", "2", "--compression-type"]
    assert sorted(words[1:]) == sorted(
        [{"-a": "--arch", "-b": "--batch-size", "-j": "--workers"}.get(word, word) for word in typed]
        + ["maxmin", "--error-feedback"]
    )
    assert found == "1 host x 2 ranks over gloo, each on CPU, 1 thread; seed 1"


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_parts_of_a_step_add_up_to_it_and_fit_into_the_epoch(trained: Stage, epoch: int) -> None:
    found = trained.metrics(epoch)
    assert found["step.time"] == pytest.approx(sum(found[name] for name in PARTS))
    assert all(found[name] >= 0 for name in PARTS)
    assert found["step.time"] == pytest.approx(found["train.data_time"] + found["train.compute_time"])
    assert found["step.exchange_time"] == found["comm.exposed_time"]
    ends = [float(record["elapsedtime"]) for record in trained.records() if record["step"] in ([epoch], [epoch - 1])]
    assert found["step.count"] == 9
    assert found["step.count"] * found["step.time"] <= ends[-1] - (ends[0] if epoch else 0)
    [line] = [line for line in trained.ranks[0].out.splitlines() if line.startswith(f"epoch {epoch} | ")]
    assert line.endswith(" | " + parts_of_step(found))


def test_accumulated_batches_are_one_step_whose_parts_add_up(pictures: Path, tmp_path: Path) -> None:
    flags = "--epochs 1 --prof 4 --training-only --no-checkpoints --optimizer-batch-size 16 --compression-type maxmin"
    found = stage(tmp_path, pictures, flags).metrics(0)
    assert found["step.time"] == pytest.approx(2 * (found["train.data_time"] + found["train.compute_time"]))
    assert found["step.count"] == 2
    assert found["step.time"] == pytest.approx(sum(found[name] for name in PARTS))
    assert all(found[name] >= 0 for name in PARTS)


def test_without_ranks_and_compressor_a_step_is_data_and_compute(pictures: Path, tmp_path: Path) -> None:
    argv = (pictures, *SMALL, "--epochs", 1, "--prof", 2, "--training-only", "--no-checkpoints")
    [rank] = run_well(*argv, "--workspace", tmp_path)
    found = Stage(tmp_path, [rank]).metrics(0)
    assert "step.exchange_time" not in found
    assert found["step.time"] == pytest.approx(found["step.data_time"] + found["step.compute_time"])
    [line] = [line for line in rank.out.splitlines() if line.startswith("epoch 0 | ")]
    assert not [word for word in ("comm.", "codec", "network", "exchange") if word in line]
    assert rank.out.splitlines()[1] == "one process on CPU, 1 thread; seed 1"


# The search


def test_a_search_with_evaluate_writes_its_files_and_trains_nothing(trained: Stage, searched: Stage) -> None:
    assert {str(path.relative_to(searched.workspace)) for path in searched.workspace.rglob("*.*")} == {
        "experiment_raport.json",
        "adapt_logs/epochcalibration.json",
        "adapt_logs/compress_scheme_calibration.json",
        "adapt_logs/search_calibration.json",
        "adapt_logs/search_calibration.png",
    }
    saved = trained.checkpoint()["state_dict"]
    for rank in searched.ranks:
        assert all(torch.equal(rank.weights[name], saved[name]) for name in saved)
    assert {name for name in searched.metrics() if name.startswith("train.")} == set()
    assert "val.top1" in searched.metrics()
    assert "Differential evolution is" in searched.ranks[0].out


SEARCHES = [("searched", "calibration"), ("adaptive", 0), ("adaptive", 1), ("adaptive", 2)]


@pytest.fixture(params=SEARCHES, ids=str)
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    name, when = request.param
    return request.getfixturevalue(name).search(when)


def objective(found: Mapping[str, Any], bits: Sequence[int]) -> float:
    columns = [found["widths"].index(width) for width in bits]
    error = math.fsum(row[column] for row, column in zip(found["error"], columns, strict=True))
    nbytes = sum(row[column] for row, column in zip(found["nbytes"], columns, strict=True))
    ratio = (nbytes + found["dense_bytes"]) / (4 * found["values"])
    return error ** found["alpha"] * ratio ** found["beta"]


def assignments(found: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    return itertools.product(found["widths"], repeat=len(found["layers"]))


def test_the_file_of_a_search_is_enough_to_check_all_its_numbers(found: dict[str, Any]) -> None:
    assert found["layers"] == list(COMPRESSED)
    assert found["numel"] == list(COMPRESSED.values())
    assert found["widths"] == [2, 3, 4, 5, 6, 7, 8]
    assert found["nbytes"] == [[encoded_bytes(name, bits) for bits in found["widths"]] for name in COMPRESSED]
    assert (found["dense_bytes"], found["values"]) == (DENSE_BYTES, VALUES)
    for choice in (found["de"], found["optimum"], found["installed"]):
        assert choice["objective"] == pytest.approx(objective(found, choice["bits"]), rel=1e-12)
    assert {int(width): value for width, value in found["uniform"].items()} == pytest.approx(
        {width: objective(found, [width] * 3) for width in found["widths"]}, rel=1e-12
    )


def test_no_assignment_at_all_is_better_than_the_optimum(found: dict[str, Any]) -> None:
    least = min(objective(found, bits) for bits in assignments(found))
    assert found["optimum"]["objective"] == pytest.approx(least, rel=1e-12)
    assert found["de"]["objective"] >= least * (1 - 1e-12)


def test_what_is_installed_is_the_optimum_or_the_least_error_in_budget(found: dict[str, Any]) -> None:
    if "budget" not in found:
        assert found["installed"] == {"by": "optimum", **found["optimum"]}
        return

    def total_error(bits: Sequence[int]) -> float:
        return sum(row[found["widths"].index(width)] for row, width in zip(found["error"], bits, strict=True))

    def bits_a_value(bits: Sequence[int]) -> float:
        return 8 * sum(map(encoded_bytes, COMPRESSED, bits)) / sum(COMPRESSED.values())

    affordable = [bits for bits in assignments(found) if bits_a_value(bits) <= 3.7]
    assert bits_a_value(found["installed"]["bits"]) <= 3.7
    assert total_error(found["installed"]["bits"]) == pytest.approx(min(map(total_error, affordable)))
    assert found["installed"]["by"] == "budget"


def test_errors_are_those_of_the_ranks_averaged_gradients(adaptive: Stage) -> None:
    """Recomputed from what the ranks keep in the checkpoint: the root of the sum of u^2 f (1 - f)."""
    found = adaptive.search(2)
    recorded = [rank["exchange"]["recorded"] for rank in adaptive.checkpoint()["ranks"]]
    for name, errors in zip(found["layers"], found["error"], strict=True):
        mean = sum(rank[name].to(torch.float64).flatten() for rank in recorded) / 2
        for bits, error in zip(found["widths"], errors, strict=True):
            assert error == pytest.approx(math.sqrt(sum(map(lost, mean.split(512), [bits] * 99))), rel=1e-4)


def lost(bucket: torch.Tensor, bits: int) -> float:
    values = bucket.numpy()
    step = np.ptp(values) / (2**bits - 1)
    fraction = np.modf((values - values.min()) / step)[0]
    return float((step**2 * fraction * (1 - fraction)).sum())


@pytest.mark.parametrize(("name", "when"), SEARCHES)
def test_the_scheme_gives_every_parameter_one_width(
    name: str, when: int | str, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(name)
    scheme, found = run.scheme(when), run.search(when)
    assert sorted(itertools.chain(*scheme.values())) == sorted(PARAMETERS)
    assert set(scheme["32"]) == PARAMETERS.keys() - COMPRESSED.keys()
    assert {name: int(bits) for bits, names in scheme.items() for name in names if bits != "32"} == dict(
        zip(found["layers"], found["installed"]["bits"], strict=True)
    )


def installed(stage: Stage, when: int | str) -> dict[str, int]:
    return dict(zip(COMPRESSED, stage.search(when)["installed"]["bits"], strict=True))


def test_the_widths_of_each_search_are_sent_in_the_next_epoch(adaptive: Stage) -> None:
    assert adaptive.metrics(0)["comm.ratio"] == pytest.approx(ratio(dict.fromkeys(COMPRESSED, 6)))
    assert adaptive.metrics(1)["comm.ratio"] == pytest.approx(ratio(installed(adaptive, 0)))
    assert adaptive.metrics(2)["comm.ratio"] == pytest.approx(ratio(installed(adaptive, 1)))


def test_all_ranks_have_the_widths_of_the_last_search_and_the_checkpoint_too(adaptive: Stage) -> None:
    for widths in (*(rank.widths for rank in adaptive.ranks), adaptive.checkpoint()["widths"]):
        assert {name: widths[name] for name in COMPRESSED} == installed(adaptive, 2)
        assert {widths[name] for name in PARAMETERS.keys() - COMPRESSED.keys()} == {32}


def test_a_scheme_serves_a_resumed_run(trained: Stage, searched: Stage, continued: Stage) -> None:
    widths = installed(searched, "calibration")
    assert continued.metrics(2)["comm.ratio"] == pytest.approx(ratio(widths))
    assert all({**rank.widths, **widths} == rank.widths for rank in continued.ranks)
    assert continued.checkpoint()["epoch"] == trained.checkpoint()["epoch"] + 1


def test_training_that_searches_for_want_of_a_compressor_says_so_once(adaptive: Stage) -> None:
    assert [rank.err for rank in adaptive.ranks] == ["no --compression-type given: widths of maxmin are chosen\n", ""]


def test_pretrained_weights_are_searched_before_the_first_epoch(trained: Stage, pictures: Path, tmp_path: Path) -> None:
    flags = "--search --popsize 1 --search-iterations 0 --search-calibration-steps 2 --epochs 1 --prof 2"
    weights = trained.workspace / "checkpoint.pth.tar"
    run = stage(tmp_path, pictures, flags, "--pretrained-weights", weights)
    assert run.metrics(0)["comm.ratio"] == pytest.approx(ratio(installed(run, "calibration")))
    assert run.search(0)["error"] != run.search("calibration")["error"]


# The same again


def test_the_same_seed_twice_gives_the_same_bits_and_another_seed_others(pictures: Path, tmp_path: Path) -> None:
    flags = "--epochs 1 --prof 3 --mixup 0.2 --compression-type maxmin --error-feedback --deterministic --seed"
    weights = [stage(tmp_path / str(k), pictures, flags, seed).ranks[0].weights for k, seed in enumerate((7, 7, 8))]
    first, again, other = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in COMPRESSED)


def test_a_compiled_model_learns_the_same(pictures: Path, tmp_path: Path) -> None:
    flags = "--epochs 1 --prof 2 --compression-type maxmin --error-feedback"
    cache = partial(compiled_code_goes_to, tmp_path / "cache")
    [plain] = run_well(pictures, *SMALL, *flags.split(), "--workspace", tmp_path / "plain")
    [compiled] = run_well(
        pictures, *SMALL, *flags.split(), "--workspace", tmp_path / "compiled", "--compile", before=cache
    )
    assert (tmp_path / "cache").exists()
    assert plain.weights.keys() == compiled.weights.keys()
    for name in COMPRESSED:  # up to the order of sums
        assert torch.allclose(plain.weights[name], compiled.weights[name], atol=1e-3)


# What a run leaves


def test_saved_weights_are_those_of_the_checkpoint_and_load_as_pretrained(
    trained: Stage, pictures: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "new folder/w.safetensors"
    flags = (pictures, *SMALL, "--workspace", tmp_path, "--evaluate", "--pretrained-weights")
    run_well(*flags, trained.workspace / "checkpoint.pth.tar", "--save-weights", weights)
    [rank] = run_well(*flags, weights)
    saved = checkpoints.load_weights(weights)
    assert saved.keys() == rank.weights.keys()
    assert all(torch.equal(saved[name], rank.weights[name]) for name in saved)


@pytest.mark.parametrize(
    ("missing", "flags", "metric"),
    [("train", "--evaluate", "val.top1"), ("val", "--training-only --epochs 1 --search --popsize 1", "train.loss")],
)
def test_what_neither_trains_nor_validates_needs_no_such_folder(
    missing: str, flags: str, metric: str, trained: Stage, pictures: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pictures, tmp_path / "pictures", ignore=shutil.ignore_patterns(missing))
    weights = ("--pretrained-weights", trained.workspace / "checkpoint.pth.tar")
    done = stage(tmp_path / "work", folder, flags, *weights, "--prof", 2, "--tensorboard-dir", tmp_path / "events")
    assert metric in done.metrics()


def test_a_search_on_a_checkpoint_needs_training_images(trained: Stage, pictures: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "pictures", ignore=shutil.ignore_patterns("train"))
    weights = trained.workspace / "checkpoint.pth.tar"
    [rank] = run(folder, *SMALL, "--search", "--evaluate", "--pretrained-weights", weights, "--workspace", tmp_path)
    assert rank.status == 2
    assert rank.err.splitlines()[-1].startswith(f"main.py: error: data folder {folder} has no folder train; expected")


FILES = {
    "--epochs 1": {"checkpoint.pth.tar", "model_best.pth.tar"},
    "--epochs 1 --training-only": {"checkpoint.pth.tar"},
    "--epochs 1 --no-checkpoints": set(),
    "--epochs 2 --gather-checkpoints --training-only": {
        "checkpoint.pth.tar", "checkpoint-1.pth.tar", "checkpoint-2.pth.tar",
    },
    "--epochs 3 --run-epochs 1 --checkpoint-filename c.pth --training-only": {"c.pth"},
    "--evaluate": set(),
    "--epochs 1 --no-checkpoints --save-weights WORKSPACE/w.safetensors": {"w.safetensors"},
    "--evaluate --save-weights WORKSPACE/w.safetensors": {"w.safetensors"},
}  # fmt: skip


@pytest.mark.parametrize("flags", FILES)
def test_a_run_leaves_the_files_that_its_flags_name_and_says_so(flags: str, pictures: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "made/by the run"
    words = [word.replace("WORKSPACE", str(workspace)) for word in flags.split()]
    [rank] = run_well(pictures, *SMALL, "--workspace", workspace, "--prof", 1, *words)
    assert {path.name for path in workspace.iterdir()} == FILES[flags] | {"experiment_raport.json"}
    assert rank.out.splitlines()[-1].startswith(f"wrote {workspace}/experiment_raport.json")
    told = [line.partition(": ")[0] for line in rank.err.splitlines()]
    assert told == (["no effect", "random weights are scored"] if "--evaluate" in flags else [])
