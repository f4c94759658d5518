"""Whole runs that search: every wish, measure and time to search, on one rank and on several, and after a restart."""

import json
import math
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compression import Measured, World
from compression.costs import Cluster, CodecCosts, Compute, Costs
from compression.network.threads import ThreadCollectives, run_ranks
from image_classification.logs import records
from main import Snapshot
from search import false_claims, load_search
from tests.support.program import SMALL, Rank, run, run_well, signal_in_step

COMPRESSED = ("3.weight", "5.weight", "10.weight")
QUICK = "--search --popsize 1 --search-iterations 0"


def searches(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of all searches of a run, by when they were."""
    paths = sorted((folder / "adapt_logs").glob("search_*.json"))
    return {path.stem.removeprefix("search_"): json.loads(path.read_text()) for path in paths}


def installed(found: dict[str, Any]) -> dict[str, int]:
    return dict(zip(found["layers"], found["installed"]["bits"], strict=True))


def widths_of(rank: Rank) -> dict[str, int]:
    return {name: rank.widths[name] for name in COMPRESSED}


def searched(folder: Path, data: Path, flags: str, ranks: int = 1, *more: object) -> list[Rank]:
    return run_well(data, *SMALL, "--workspace", folder, *flags.split(), *more, ranks=ranks)


def total_error(found: dict[str, Any], bits: list[int]) -> float:
    return math.fsum(row[found["widths"].index(width)] for row, width in zip(found["error"], bits, strict=True))


# Wishes


def test_an_error_is_kept_with_the_fewest_bytes(pictures: Path, tmp_path: Path) -> None:
    [rank] = searched(tmp_path, pictures, f"{QUICK} --search-target-error 4 --epochs 1 --prof 2")
    found = searches(tmp_path)["0"]
    assert found["wish"] == {"kind": "error", "target": 4}
    assert total_error(found, found["installed"]["bits"]) <= total_error(found, [4, 4, 4])
    assert widths_of(rank) == installed(found)
    assert "--search-target-error" in rank.out


def test_the_least_step_time_is_found_on_a_cluster_that_is_not_there(pictures: Path, tmp_path: Path) -> None:
    cluster = "--simulate hosts=2,link=1mbit"
    flags = f"{QUICK} --search-target-error 4 --search-objective time {cluster} --epochs 1 --prof 2"
    [rank] = searched(tmp_path, pictures, flags)
    found = searches(tmp_path)["0"]
    assert found["wish"] == {"kind": "time", "target": 4}
    assert total_error(found, found["installed"]["bits"]) <= total_error(found, [4, 4, 4])
    assert widths_of(rank) == installed(found)
    assert false_claims(found) == []
    assert found["time"]["seconds"] > found["timeline"]["own"]  # a link of 1 Mbit/s hides nowhere
    assert "Predicted step:" in rank.out
    assert "--search-objective time" in rank.out


def test_steps_are_measured_on_the_ranks_that_there_are_once_in_a_run(pictures: Path, tmp_path: Path) -> None:
    flags = f"{QUICK} --search-target-error 4 --search-objective time --prof 2"
    searched(tmp_path, pictures, f"{flags} --epochs 1", 2)
    ranks = searched(tmp_path, pictures, f"{flags} --epochs 2 --resume auto", 2)
    found = searches(tmp_path)
    assert found.keys() == {"0", "1"}
    assert found["0"]["timeline"] == found["1"]["timeline"]
    assert all(widths_of(rank) == installed(found["1"]) for rank in ranks)


@pytest.mark.parametrize("ranks_per_host", [None, 1])
def test_times_measured_on_other_hosts_are_not_gone_on_with(ranks_per_host: int | None) -> None:
    """Two ranks on this machine, which count as two hosts where they are told so."""
    plan: Any = SimpleNamespace(workspace="w", checkpoint_filename="c", simulate=None, ranks_per_host=ranks_per_host)
    costs = Costs(0.0, 0.0, 0.0, 0.0, 0.0, {"float32": CodecCosts(0.0, 0.0)})
    compute, errors = Compute(0.1, 0.1, 0.0, {"a": 0.1}), {"float32": 0.0}
    by_shape = {
        shape: Measured({"a": (3,)}, (("a",),), compute, Cluster(*shape), costs, errors) for shape in ((1, 2), (2, 1))
    }

    def known(ranks: ThreadCollectives) -> list[tuple[int, int]]:
        snapshot = Snapshot(plan, World(ranks.rank, 2, torch.device("cpu"), ranks, None, None))
        kept = {shape: {"times": measured.to_json(), "simulate": None} for shape, measured in by_shape.items()}
        return [shape for shape in kept if snapshot.measured({"world_size": 2, "measured": kept[shape]}) is not None]

    expected = (1, 2) if ranks_per_host is None else (2, 1)
    assert run_ranks(2, known) == [[expected]] * 2


def test_a_balance_is_of_squared_errors(pictures: Path, tmp_path: Path) -> None:
    searched(tmp_path, pictures, f"{QUICK} --search-balance --epochs 1 --prof 2 --search-min-bits 1")
    found = searches(tmp_path)["0"]
    assert found["measure"] == "square"
    tables = load_search(tmp_path / "adapt_logs/search_0.json").tables

    def balance(bits: tuple[int, ...]) -> float:
        return (1 + tables.total_error(bits) / tables.norm2) * (tables.encoded_bytes(bits) + tables.dense_bytes)

    every = np.array(np.meshgrid(*[range(1, 9)] * 3)).T.reshape(-1, 3).tolist()
    assert balance(tuple(found["installed"]["bits"])) == pytest.approx(min(balance(tuple(bits)) for bits in every))


@pytest.mark.parametrize("method", ["de", "exact"])
def test_what_the_method_finds_is_installed(method: str, pictures: Path, tmp_path: Path) -> None:
    flags = "--search --search-alpha 1 --search-beta 3 --epochs 1 --prof 2"
    searched(tmp_path, pictures, f"{flags} --search-method {method}")
    found = searches(tmp_path)["0"]
    assert found["installed"]["by"] == {"de": "de", "exact": "optimum"}[method]
    assert ("de" in found, "optimum" in found) == (method == "de", method == "exact")


def test_powers_of_any_size_serve(pictures: Path, tmp_path: Path) -> None:
    searched(tmp_path, pictures, f"{QUICK} --search-beta 1e9 --epochs 1 --prof 2")
    assert set(installed(searches(tmp_path)["0"]).values()) == {2}


def test_pins_hold(pictures: Path, tmp_path: Path) -> None:
    pins = ("--search-pin", "*=2-3", "--search-pin", "5.*=8")
    [rank] = searched(tmp_path, pictures, f"{QUICK} --epochs 1 --prof 2", 1, *pins)
    found = searches(tmp_path)["0"]
    assert widths_of(rank) == installed(found)
    assert widths_of(rank)["5.weight"] == 8
    assert {widths_of(rank)[name] for name in ("3.weight", "10.weight")} <= {2, 3}
    assert found["pins"] == {"3.weight": [2, 3], "5.weight": [8, 8], "10.weight": [2, 3]}


# Measures


@pytest.mark.parametrize("feedback", [False, True])
def test_squares_are_those_of_the_roots(feedback: bool, pictures: Path, tmp_path: Path) -> None:
    found = {}
    for measure in ("root", "square"):
        flags = f"{QUICK} --epochs 1 --prof 2 --search-measure {measure} {'--error-feedback' if feedback else ''}"
        searched(tmp_path / measure, pictures, flags)
        found[measure] = searches(tmp_path / measure)["0"]
    assert np.allclose(np.square(found["root"]["error"]), found["square"]["error"], rtol=1e-9)
    assert found["square"]["settings"]["error_feedback"] is feedback
    assert found["square"]["norm2"] > 0


def test_the_loss_is_measured_alike_on_any_number_of_ranks(pictures: Path, tmp_path: Path) -> None:
    """Each rank measures its part, on the same images; the weights and batch norms that are measured are all ranks'."""
    flags = f"{QUICK} --epochs 1 --prof 2 --search-measure loss --search-target-bits 4.2 --search-loss-batches 1"
    ranks = searched(tmp_path, pictures, flags, 2)
    found = searches(tmp_path)["0"]
    assert found["measure"] == "loss"
    assert np.abs(found["error"]).max() > 0
    assert widths_of(ranks[0]) == widths_of(ranks[1]) == installed(found)
    assert found["settings"]["measuring_seconds"] > 0
    assert "The errors were measured in" in ranks[0].out


def test_measuring_the_loss_changes_neither_weights_nor_buffers(pictures: Path, tmp_path: Path) -> None:
    """The last search of a run comes after its last step."""
    flags = "--epochs 1 --prof 2 --search --search-target-bits 4.2 --search-method exact"
    ends = [
        searched(tmp_path / measure, pictures, f"{flags} --search-measure {measure}", 2)
        for measure in ("square", "loss")
    ]
    for one, other in zip(*ends, strict=True):
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_bytes_are_those_that_are_sent(pictures: Path, tmp_path: Path) -> None:
    """Of quantile, whose levels are a table that each of the owners sends; on two hosts of two ranks."""
    flags = "--compression-type quantile --search --search-target-bits 6 --search-method exact --epochs 2 --prof 2"
    for name, ranks, more in (("flat", 3, ""), ("hosts", 4, "--ranks-per-host 2")):
        searched(tmp_path / name, pictures, f"{flags} {more}", ranks)
        found = load_search(tmp_path / name / "adapt_logs/search_0.json")
        promised = found.tables.encoded_bytes(found.installed) + found.tables.dense_bytes
        [data] = [line["data"] for line in records(tmp_path / name / "experiment_raport.json") if line["step"] == [1]]
        if name == "flat":
            assert data["comm.bytes_sent"] == pytest.approx(2 * 2 / 3 * promised)
        else:
            assert data["comm.host_bytes"] == pytest.approx(promised)
        assert found.settings["ranks"] == ranks
        assert found.settings["hosts"] == (1 if name == "flat" else 2)
        assert found.tables.bits_a_value(found.installed) <= 6


# When


def test_a_search_every_few_epochs(pictures: Path, tmp_path: Path) -> None:
    searched(tmp_path, pictures, f"{QUICK} --search-every 2 --epochs 4 --prof 1")
    assert list(searches(tmp_path)) == ["1", "3"]
    pictures_of = {path.name for path in (tmp_path / "adapt_logs").glob("*.png")}
    assert pictures_of == {"search_1.png", "search_3.png", "bits_over_time.png"}


NOT_DUE = "no search is due: this run ends with "


@pytest.mark.parametrize(
    ("every", "said"),
    [
        ("9steps", NOT_DUE + "step 8, and --search-every is 9steps\n"),
        ("8steps", ""),
        ("3", NOT_DUE + "epoch 2, and --search-every is 3\n"),
        ("2", ""),
    ],
)
def test_a_run_that_ends_before_a_search_says_so(every: str, said: str, pictures: Path, tmp_path: Path) -> None:
    [rank] = searched(tmp_path, pictures, f"{QUICK} --search-every {every} --epochs 2 --prof 4")
    assert said in rank.err
    assert (NOT_DUE in rank.err) == bool(said)
    assert bool(searches(tmp_path)) == (not said)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_search_every_few_steps(ranks: int, pictures: Path, tmp_path: Path) -> None:
    flags = f"{QUICK} --search-every 3steps --search-target-bits 4.2 --epochs 2 --prof 4 --error-feedback"
    ends = searched(tmp_path, pictures, flags, ranks)
    found = searches(tmp_path)
    assert sorted(found) == ["step3", "step6"]
    assert [found[when]["settings"]["step"] for when in ("step3", "step6")] == [3, 6]
    assert all(widths_of(end) == installed(found["step6"]) for end in ends)


def test_a_search_once_keeps_its_widths(pictures: Path, tmp_path: Path) -> None:
    flags = f"{QUICK} --search-once --search-target-bits 4.2 --epochs 2 --prof 1"
    [rank] = searched(tmp_path, pictures, flags)
    assert list(searches(tmp_path)) == ["0"]
    assert widths_of(rank) == installed(searches(tmp_path)["0"])
    [rank] = searched(tmp_path, pictures, flags.replace("--epochs 2", "--epochs 3"), 1, "--resume", "auto")
    assert list(searches(tmp_path)) == ["0"]
    assert widths_of(rank) == installed(searches(tmp_path)["0"])


@pytest.mark.parametrize("accumulation", ["", "--optimizer-batch-size 8"])
def test_errors_are_of_the_mean_of_the_last_gradients(accumulation: str, pictures: Path, tmp_path: Path) -> None:
    flags = f"{QUICK} --epochs 1 --prof 6 {accumulation} --search-last-steps"
    steps = 3 if accumulation else 6
    norms = {}
    for last in (1, 2, steps, 99):
        searched(tmp_path / str(last), pictures, f"{flags} {last}")
        saved = torch.load(tmp_path / f"{last}/checkpoint.pth.tar", weights_only=True)["ranks"][0]["exchange"]
        assert saved["recorder"]["mean"] is True
        assert {float(weight) for weight in saved["recorder"]["weight"].values()} == {min(last, steps)}
        norms[last] = searches(tmp_path / str(last))["0"]["norm2"]
    assert norms[steps] == norms[99] != norms[1]
    assert norms[1] != norms[2]


def test_a_run_may_start_from_a_scheme_and_search(pictures: Path, tmp_path: Path) -> None:
    scheme = tmp_path / "scheme.json"
    scheme.write_text(json.dumps({"8": list(COMPRESSED)}))
    flags = f"{QUICK} --search-target-bits 3.5 --epochs 2 --prof 1"
    [rank] = searched(tmp_path, pictures, flags, 1, "--compression-scheme", scheme)
    ratios = [
        line["data"]["comm.ratio"] for line in records(tmp_path / "experiment_raport.json") if len(line["step"]) == 1
    ]
    assert ratios[0] > 1.5 * ratios[1]
    assert widths_of(rank) == installed(searches(tmp_path)["1"])
    flags = flags.replace("--epochs 2", "--epochs 3")
    searched(tmp_path, pictures, flags, 1, "--compression-scheme", scheme, "--resume", "auto")
    *_, resumed = [line["data"]["comm.ratio"] for line in records(tmp_path / "experiment_raport.json")
                   if len(line["step"]) == 1]  # fmt: skip
    assert resumed < ratios[0] / 1.5  # with the widths of the last search, not with those of the scheme


# Resume

STOPPED = [
    "--search-target-bits 4.2 --search-every 2steps --search-last-steps 2 --error-feedback",
    "--search-target-error 3 --search-last-steps 3 --search-measure square",
    "--search-target-bits 4.2 --search-measure loss --search-loss-batches 1",
    "--search-target-bits 4.2 --search-once --search-pin 5.*=4-8",
    "--search-balance --search-method exact --search-every 2",
]


@pytest.mark.parametrize("flags", STOPPED)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(flags: str, pictures: Path, tmp_path: Path) -> None:
    quick = "" if "exact" in flags or "loss" in flags else "--popsize 1"
    flags = f"--search {quick} {flags} --epochs 2 --prof 3"
    whole = searched(tmp_path / "whole", pictures, flags, 2)
    stop = partial(signal_in_step, 4, signal.SIGTERM, 1)
    argv = (pictures, *SMALL, "--workspace", tmp_path / "stopped", *flags.split())
    assert [rank.status for rank in run(*argv, ranks=2, before=stop)] == [143] * 2
    ended = run_well(*argv, "--resume", "auto", ranks=2)
    for one, other in zip(whole, ended, strict=True):
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
        assert one.widths == other.widths
    found, again = searches(tmp_path / "whole"), searches(tmp_path / "stopped")
    assert found.keys() == again.keys()
    for when in found:
        assert found[when]["error"] == again[when]["error"]


# Files


def test_a_search_leaves_all_that_is_needed_to_repeat_it(pictures: Path, tmp_path: Path) -> None:
    flags = "--search --search-target-bits 4.2 --error-feedback --bucket-size 256 --popsize 3 --epochs 1 --prof 2"
    [rank] = searched(tmp_path, pictures, f"{flags} --tensorboard-dir {tmp_path / 'events'}")
    found = searches(tmp_path)["0"]
    assert found["wish"] == {"kind": "bits", "target": 4.2}
    assert (found["seed"], found["popsize"], found["iterations"]) == (1, 3, 2)
    settings = found["settings"]
    assert settings | {"measuring_seconds": 0, "search_seconds": 0} == {
        "type": "maxmin", "bucket_size": 256, "error_feedback": True, "ranks": 1, "hosts": 1, "step": 2, "epoch": 0,
        "iteration": 2, "last_steps": None, "measuring_seconds": 0, "search_seconds": 0,
    }  # fmt: skip
    written = rank.out.splitlines()[-1].split()
    for name in ("epoch0.json", "search_0.json", "compress_scheme_0.json", "search_0.png"):
        assert str(tmp_path / "adapt_logs" / name) in written
    again = load_search(tmp_path / "adapt_logs/search_0.json")
    assert again.bits_by_layer() == {name: rank.widths[name] for name in ("0.weight", *COMPRESSED)}  # smaller buckets


def test_pictures_go_to_tensorboard(pictures: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    searched(tmp_path, pictures, f"{QUICK} --epochs 2 --prof 1 --tensorboard-dir {tmp_path / 'events'}")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert len(events.Images("search/picture")) == 2
    assert len(events.Images("search/bits_over_time")) == 1


# Families

FAMILIES = "--search --search-families maxmin,eden,topk,powersgd --search-target-bits 2 --error-feedback"


def test_families_are_searched_on_digits_and_what_they_promise_travels(tmp_path: Path) -> None:
    flags = "-a resnet18 --num-classes 10 --image-size 32 --data-backend pytorch -j 0 -b 4 --training-only --seed 1"
    run_well("digits", *flags.split(), *FAMILIES.split(), "--epochs", 2, "--prof", 2, "--workspace", tmp_path, ranks=2)
    first = json.loads((tmp_path / "adapt_logs/families_0.json").read_text())
    assert len({option.split()[0] for option in first["installed"]["options"]}) > 1
    assert first["installed"]["error"] <= min(each["error"] for each in first["alone"].values() if each)
    *_, data = [line["data"] for line in records(tmp_path / "experiment_raport.json") if line["step"] == [1]]
    assert data["comm.bytes_sent"] == pytest.approx(first["installed"]["encoded_bytes"] + first["dense_bytes"])


def test_routes_of_a_search_resume_exactly_and_their_scheme_serves_another_run(pictures: Path, tmp_path: Path) -> None:
    """With error feedback: what is owed by family is in the checkpoint."""
    flags = f"{FAMILIES} --search-min-bits 3 --prof 2 --epochs"
    whole = searched(tmp_path / "whole", pictures, f"{flags} 3", 2)
    searched(tmp_path / "parts", pictures, f"{flags} 3 --run-epochs 2", 2)
    parts = searched(tmp_path / "parts", pictures, f"{flags} 3 --resume auto", 2)
    for one, other in zip(whole, parts, strict=True):
        assert one.weights
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    scheme = tmp_path / "whole/adapt_logs/compress_scheme_2.json"
    found = json.loads((tmp_path / "whole/adapt_logs/families_2.json").read_text())
    written = {name: option for option, names in json.loads(scheme.read_text()).items() for name in names}
    assert [written[name] for name in found["layers"]] == found["installed"]["options"]
    searched(tmp_path / "scheme", pictures, f"--compression-scheme {scheme} --error-feedback --epochs 1 --prof 2", 2)
    [data] = [line["data"] for line in records(tmp_path / "scheme/experiment_raport.json") if line["step"] == [0]]
    assert data["comm.bytes_sent"] == pytest.approx(found["installed"]["encoded_bytes"] + found["dense_bytes"])


# What cannot be searched

REFUSED = {
    "--search-pin none=4": "the pin 'none=4' matches no compressed layer; there are 3.weight, 5.weight, 10.weight",
    "--search-pin *=9": "the pin '*=9' must be within the widths 2, 3, 4, 5, 6, 7, 8, got 9",
    "--search-pin *=8-4": "the pin '*=8-4' has its bounds reversed",
    "--search-pin 5.weight": "a pin is PATTERN=BITS or PATTERN=LEAST-MOST",
    "--search-target-bits 1.5": "a budget must hold the cheapest assignment, 2.1",
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_asked_for_is_one_line_before_the_first_step(
    flags: str, ranks: int, pictures: Path, tmp_path: Path
) -> None:
    ends = run(pictures, *SMALL, "--workspace", tmp_path / "none", "--search", *flags.split(), ranks=ranks)
    assert [end.status for end in ends] == [2] * ranks
    errors = [line for end in ends for line in end.err.splitlines() if line.startswith("main.py: error: ")]
    assert len(errors) == 1
    assert REFUSED[flags] in errors[0]
    assert not (tmp_path / "none").exists()


def test_a_loss_that_is_not_finite_ends_all_ranks_with_one_line(pictures: Path, tmp_path: Path) -> None:
    flags = f"{QUICK} --epochs 1 --prof 2 --search-measure loss --search-target-bits 4.2"
    ends = run(pictures, *SMALL, "--workspace", tmp_path, *flags.split(), ranks=2, before=make_the_loss_infinite)
    assert {end.status for end in ends} == {2}
    errors = [line for end in ends for line in end.err.splitlines() if line.startswith("main.py: error: ")]
    assert len(errors) == 1
    assert "error must be finite, got " in errors[0]


def make_the_loss_infinite() -> None:
    from image_classification import training

    training.mean_loss = lambda *arguments: math.inf
