"""Checkpoints: a kill or a full disk leaves a good file, a bad file is named, and nothing in one can run."""

import argparse
import copy
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from image_classification import checkpoints

ROOT = Path(__file__).parents[2]
RUN = {"arch": "small", "num_classes": 3}
NAME = "checkpoint.pth.tar"


def small_model():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


def content(epoch, **changes):
    return {**RUN, "epoch": epoch, "iteration": 0, "state_dict": {"w": torch.full((1000,), float(epoch))}, **changes}


def save(folder, epoch, best=False, gather=False, **changes):
    checkpoints.save(content(epoch, **changes), folder, NAME, best=best, gather=gather)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def flip_a_weight(path):
    raw = bytearray(path.read_bytes())
    at = raw.index(torch.full((4,), float(checkpoints.load(path, RUN)["epoch"])).numpy().tobytes())
    raw[at] ^= 0xFF
    path.write_bytes(raw)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 1, 3, 3)).sum().backward()
    optimizer.step()
    save(tmp_path / "made" / "here", 1, state_dict=model.state_dict(), optimizer=optimizer.state_dict(),
         ranks=[{"random": checkpoints.random_state(), "averager": {"residual": {"w": torch.randn(3)}}}])
    loaded = checkpoints.load(tmp_path / "made" / "here" / NAME, RUN)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded["state_dict"][name], value)
    momentum = loaded["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state_dict()["state"][0]["momentum_buffer"])


def test_an_epoch_writes_the_last_the_best_and_the_gathered_checkpoint(tmp_path):
    save(tmp_path, 1)
    assert files(tmp_path) == [NAME]
    save(tmp_path, 2, best=True)
    save(tmp_path, 3)
    assert checkpoints.load(tmp_path / NAME, RUN)["epoch"] == 3
    assert checkpoints.load(tmp_path / checkpoints.BEST, RUN)["epoch"] == 2
    for epoch in range(1, 23):
        save(tmp_path, epoch, gather=True)
    gathered = {int(name.split("-")[1].split(".")[0]) for name in files(tmp_path) if "-" in name}
    assert gathered == {*range(1, 11), 11, 21}
    save(tmp_path, 1, gather=True, iteration=5)
    assert checkpoints.load(tmp_path / "checkpoint-1.pth.tar", RUN)["iteration"] == 0


def test_random_numbers_go_on_where_a_checkpoint_left_them(tmp_path):
    def draw():
        return torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random(), numpy.random.randn()

    numpy.random.randn()  # leaves the second of a pair of normal numbers in the state
    save(tmp_path, 1, ranks=[checkpoints.random_state()])
    expected = draw()
    checkpoints.set_random_state(checkpoints.load(tmp_path / NAME, RUN)["ranks"][0])
    assert draw() == expected


@settings(deadline=None, max_examples=30)
@given(fraction=st.floats(0, 0.999))
def test_a_truncated_checkpoint_is_damaged(tmp_path_factory, fraction):
    folder = tmp_path_factory.mktemp("truncated")
    save(folder, 1)
    path = folder / NAME
    os.truncate(path, int(fraction * path.stat().st_size))
    with pytest.raises(checkpoints.Damaged, match=rf"^checkpoint {path} is damaged .*; choose another$"):
        checkpoints.load(path, RUN)
    shutil.rmtree(folder)


def test_a_single_changed_byte_in_a_weight_is_noticed(tmp_path):
    save(tmp_path, 1)
    flip_a_weight(tmp_path / NAME)
    with pytest.raises(checkpoints.Damaged, match=r"is damaged \(wrong checksum of .*\); choose another$"):
        checkpoints.load(tmp_path / NAME, RUN)


@settings(deadline=None, max_examples=40)
@given(place=st.floats(0, 0.9999), mask=st.integers(1, 255))
def test_any_changed_byte_is_noticed_or_harmless(tmp_path_factory, place, mask):
    folder = tmp_path_factory.mktemp("changed")
    save(folder, 1)
    raw = bytearray((folder / NAME).read_bytes())
    raw[int(place * len(raw))] ^= mask
    (folder / NAME).write_bytes(raw)
    with suppress(checkpoints.Damaged):
        loaded = checkpoints.load(folder / NAME, RUN)
        assert torch.equal(loaded["state_dict"]["w"], content(1)["state_dict"]["w"])
    shutil.rmtree(folder)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^checkpoint {tmp_path / NAME} does not exist$"):
        checkpoints.load(tmp_path / NAME, RUN)


def test_other_files_are_no_checkpoints(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / NAME)
    with pytest.raises(checkpoints.Damaged, match=r"is no checkpoint of this program \(no epoch, iteration, arch,"):
        checkpoints.load(tmp_path / NAME, RUN)
    (tmp_path / NAME).write_text("a text")
    with pytest.raises(checkpoints.Damaged, match="is damaged"):
        checkpoints.load(tmp_path / NAME, RUN)


def test_a_checkpoint_of_another_run_does_not_fit(tmp_path):
    save(tmp_path, 1)
    message = (
        f"checkpoint {tmp_path / NAME} has num_classes 3, and this run has 5; "
        "choose another checkpoint or workspace, or run it as it was"
    )
    with pytest.raises(checkpoints.Misfit) as error:
        checkpoints.load(tmp_path / NAME, {**RUN, "num_classes": 5})
    assert str(error.value) == message


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**content(1), "extra": Malicious()}, tmp_path / NAME)
    for read in (checkpoints.load_weights, lambda path: checkpoints.load(path, RUN)):
        with pytest.raises(checkpoints.Damaged, match="holds more than tensors and plain values"):
            read(tmp_path / NAME)
    assert files(tmp_path) == [NAME]


def test_what_could_not_be_loaded_again_replaces_nothing(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(Exception, match="Weights only load failed"):
        save(tmp_path, 2, best_prec1=numpy.float64(50.0))
    assert files(tmp_path) == [NAME]
    assert checkpoints.load(tmp_path / NAME, RUN)["epoch"] == 1


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(tmp_path):
    save(tmp_path, 1, best=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, size in ((100_000, 100_000), (1_000_000, 1_000_000), (3000, 1000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError) as error:  # noqa: PT011
                save(tmp_path, 2, best=True, gather=True, state_dict={"w": torch.zeros(size)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(error.value) == (
            f"cannot write checkpoint {tmp_path / NAME}: File too large; "
            "the last one is intact; make room or choose another workspace"
        )
        assert files(tmp_path) == [NAME, checkpoints.BEST]
        assert checkpoints.load(tmp_path / NAME, RUN)["epoch"] == 1


def test_a_device_is_never_replaced_by_a_checkpoint(tmp_path):
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(OSError, match=rf"^cannot write checkpoint {tmp_path / NAME}: not a regular file; the last"):
        save(tmp_path, 1)
    assert (tmp_path / NAME).is_fifo()


def test_a_checkpoint_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / NAME).symlink_to(tmp_path / "disk" / "real")
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert (tmp_path / NAME).is_symlink()
    assert checkpoints.load(tmp_path / "disk" / "real", RUN)["epoch"] == 2


def test_a_workspace_that_is_a_file_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^cannot write checkpoint .*: File exists; the last one is intact"):
        save(tmp_path / "file", 1)


def test_a_read_only_workspace_is_an_error_that_says_so():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write everywhere
        try:
            with pytest.raises(OSError, match=r"^cannot write checkpoint .*: Permission denied; the last one"):
                save(Path(folder), 1)
        finally:
            os.seteuid(user)
        assert files(Path(folder)) == []


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from image_classification import checkpoints
content = {"arch": "small", "num_classes": 3, "iteration": 0, "state_dict": {"w": torch.zeros(200000)}}
for epoch in range(1, 100000):
    checkpoints.save(content | {"epoch": epoch}, Path(sys.argv[1]), "checkpoint.pth.tar", best=True, gather=False)
    print(epoch, flush=True)
"""


@pytest.mark.parametrize("kills", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path, kills):
    done = 0
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(kills):
        process.send_signal(signal.SIGSTOP)  # what is on disk now is what a kill now would leave
        snapshot = tmp_path / "snapshot"
        shutil.copytree(tmp_path, snapshot, ignore=shutil.ignore_patterns("snapshot"))
        found = checkpoints.newest_good(snapshot, NAME, RUN, pytest.fail)
        assert found is not None
        assert found[1]["epoch"] >= done
        done = found[1]["epoch"]
        shutil.rmtree(snapshot)
        process.send_signal(signal.SIGCONT)
        time.sleep(random.Random(done).uniform(0, 0.02))
    process.kill()
    process.communicate()
    save(tmp_path, done + 100, best=True)
    assert files(tmp_path) == [NAME, checkpoints.BEST]


def newest(folder):
    warnings = []
    found = checkpoints.newest_good(folder, NAME, RUN, warnings.append)
    return (found[0].name, found[1]["epoch"]) if found else None, warnings


def test_resuming_takes_what_got_furthest_whatever_the_clock_says(tmp_path):
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "missing") == (None, [])
    save(tmp_path, 1, best=True, gather=True)
    save(tmp_path, 2)
    os.utime(tmp_path / NAME, (0, 0))
    assert newest(tmp_path) == ((NAME, 2), [])
    save(tmp_path, 2, best=True)
    save(tmp_path, 2, iteration=5)
    assert newest(tmp_path) == ((NAME, 2), [])


@pytest.mark.parametrize("damage", [truncate, flip_a_weight])
def test_resuming_passes_over_damaged_checkpoints_with_a_line_each(tmp_path, damage):
    save(tmp_path, 1, gather=True)
    save(tmp_path, 2, best=True)
    save(tmp_path, 3)
    damage(tmp_path / NAME)
    found, warnings = newest(tmp_path)
    assert found == (checkpoints.BEST, 2)
    assert len(warnings) == 1
    assert warnings[0].startswith(f"passed over: checkpoint {tmp_path / NAME} is damaged")
    damage(tmp_path / checkpoints.BEST)
    assert newest(tmp_path)[0] == ("checkpoint-1.pth.tar", 1)
    damage(tmp_path / "checkpoint-1.pth.tar")
    found, warnings = newest(tmp_path)
    assert found is None
    assert len(warnings) == 3


def test_resuming_never_overwrites_another_runs_checkpoints(tmp_path):
    save(tmp_path, 1, arch="other")
    with pytest.raises(checkpoints.Misfit, match="has arch other, and this run has small"):
        newest(tmp_path)


def test_weights_are_found_in_all_that_carries_them(tmp_path):
    model = small_model()
    state = model.state_dict()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"module." + name: value for name, value in state.items()}, tmp_path / "ddp.pth")
    torch.save({"model": state, "epoch": 3}, tmp_path / "torchvision.pth")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save(tmp_path, 1, state_dict=state)
    checkpoints.save_weights(model.to(memory_format=torch.channels_last), tmp_path / "model.safetensors")
    assert len(files(tmp_path)) == 6
    for path in tmp_path.iterdir():
        other = small_model()
        checkpoints.load_into(other, checkpoints.load_weights(path), path)
        for name, value in other.state_dict().items():
            assert torch.equal(value, state[name]), path


def torchvision_script(model, average=None, wrap=lambda state: state):
    """A checkpoint as torchvision's references/classification/train.py writes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5),
        ],
        milestones=[2],
    )
    checkpoint = {
        "model": wrap(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(data_path="/data", lr=0.1, model="resnet50", device="cuda", val_crop_size=224,
                                   mixup_alpha=0.2, weights=None, gpu=0, distributed=True),
    }  # fmt: skip
    if average is not None:
        checkpoint["model_ema"] = average.state_dict()
        checkpoint["scaler"] = torch.amp.GradScaler("cpu").state_dict()
    return checkpoint


def timm_script(model, average=None, metric=None, wrap=lambda state: state):
    """A checkpoint as timm's CheckpointSaver writes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpoint = {
        "epoch": 7,
        "arch": "resnet50",
        "state_dict": wrap(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": argparse.Namespace(model="resnet50", mean=(0.5, 0.5, 0.5), opt_betas=None, model_kwargs={},
                                   device=torch.device("cuda", 0)),
        "amp_scaler": torch.amp.GradScaler("cpu").state_dict(),
    }  # fmt: skip
    if average is not None:
        checkpoint["state_dict_ema"] = average.state_dict()
    if metric is not None:
        checkpoint["metric"] = metric
    return checkpoint


def prefixed(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


SCRIPTS = {
    "torchvision": torchvision_script,
    "torchvision, compiled inside DDP": lambda model: torchvision_script(model, wrap=prefixed("module._orig_mod.")),
    "timm": timm_script,
    "timm, DDP inside compiled": lambda model: timm_script(model, wrap=prefixed("_orig_mod.module.")),
    "timm, wrapped thrice": lambda model: timm_script(model, wrap=prefixed("module._orig_mod.module.")),
    "timm, numpy's float64": lambda model: timm_script(model, metric=numpy.float64(76.1)),
    "timm, numpy's float32": lambda model: timm_script(model, metric=numpy.float32(76.1)),
    "timm, numpy's int64 and bool": lambda model: timm_script(model) | {"n": numpy.int64(3), "b": numpy.True_},
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_weights_are_found_in_what_training_scripts_write(script, tmp_path):
    model = small_model()
    torch.save(script(model), tmp_path / "w.pth")
    loaded = checkpoints.load_weights(tmp_path / "w.pth", pytest.fail)
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    with pytest.raises(checkpoints.Damaged):  # a checkpoint to go on from is made of less
        checkpoints.load(tmp_path / "w.pth", RUN)


def test_numpys_scalars_are_read_under_the_name_that_numpy_1_gave_them(tmp_path):
    metric = b"cnumpy._core.multiarray\nscalar\n"
    torch.save(timm_script(small_model(), metric=numpy.float64(76.1)), tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            assert metric in content or not name.endswith("data.pkl")
            old.writestr(name, content.replace(metric, metric.replace(b"_core", b"core")))
    assert "0.weight" in checkpoints.load_weights(tmp_path / "old.pth")


@pytest.mark.parametrize(
    ("script", "trained", "average"),
    [(torchvision_script, "model", "model_ema"), (timm_script, "state_dict", "state_dict_ema")],
)
def test_of_trained_weights_and_their_average_the_trained_ones_are_taken_and_a_line_says_so(
    script, trained, average, tmp_path
):
    model = small_model()
    ema = copy.deepcopy(model)
    ema[0].weight.data.add_(1)
    wrapped = torch.optim.swa_utils.AveragedModel(ema) if average == "model_ema" else ema
    content = script(model, wrapped)
    torch.save(content, tmp_path / "w.pth")
    lines = []
    loaded = checkpoints.load_weights(tmp_path / "w.pth", lines.append)
    assert torch.equal(loaded["0.weight"], model[0].weight)
    assert lines == [
        f"weights file {tmp_path / 'w.pth'} holds trained weights and a running average of them: '{trained}' is taken; "
        f"to start from the average, save its '{average}' alone"
    ]
    for alone in ({average: content[average]}, content[average]):
        torch.save(alone, tmp_path / "average.pth")
        loaded = checkpoints.load_weights(tmp_path / "average.pth", pytest.fail)
        assert loaded.keys() == model.state_dict().keys()
        assert torch.equal(loaded["0.weight"], ema[0].weight)


@pytest.mark.parametrize("place", ["args", "metric", "inside args"])
def test_what_training_scripts_write_cannot_run_code_either(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = timm_script(small_model())
    content["args" if place == "inside args" else place] = Malicious()
    if place == "inside args":
        content["args"] = argparse.Namespace(model=Malicious())
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(checkpoints.Damaged, match="holds more than tensors and plain values"):
        checkpoints.load_weights(tmp_path / "w.pth")
    assert files(tmp_path) == ["w.pth"]


def test_a_head_of_other_classes_is_left_out_where_that_was_asked_for_and_else_the_error_says_how():
    model, other = small_model(), small_model()
    other[3] = nn.Linear(4, 5)
    own = copy.deepcopy(model.state_dict())
    with pytest.raises(checkpoints.Misfit) as error:
        checkpoints.load_into(model, other.state_dict(), "W.pth", head="3")
    assert str(error.value) == (
        "weights W.pth do not fit the model: 2 of another shape (3.weight [5, 4] for [3, 4], 3.bias [5] for [3]); "
        "choose their `num_classes`, or `reset_head` for a classifier that is drawn anew"
    )
    checkpoints.load_into(model, other.state_dict(), "W.pth", head="3", reset_head=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name] if name.startswith("3.") else other.state_dict()[name])
    checkpoints.load_into(model, small_model().state_dict(), "W.pth", head="3", reset_head=True)
    assert torch.equal(model[3].weight, own["3.weight"])  # of as many classes, too
    with pytest.raises(checkpoints.Misfit, match=r"1 missing \(0.bias\); choose their `arch` and `num_classes`$"):
        checkpoints.load_into(model, {k: v for k, v in own.items() if k != "0.bias"}, "W", head="3", reset_head=True)


def test_damaged_and_missing_weights_are_named(tmp_path):
    checkpoints.save_weights(small_model(), tmp_path / "cut.safetensors")
    torch.save(small_model().state_dict(), tmp_path / "cut.pth")
    for name in ("cut.safetensors", "cut.pth"):
        truncate(tmp_path / name)
        message = rf"^weights file {tmp_path / name} is damaged .*; choose another$"
        with pytest.raises(checkpoints.Damaged, match=message):
            checkpoints.load_weights(tmp_path / name)
    for name in ("none.safetensors", "none.pth"):
        with pytest.raises(FileNotFoundError, match=rf"^weights file {tmp_path / name} does not exist$"):
            checkpoints.load_weights(tmp_path / name)
    torch.save({"state_dict": {"w": 3}}, tmp_path / "numbers.pth")
    with pytest.raises(checkpoints.Damaged, match="holds something else than tensors by name"):
        checkpoints.load_weights(tmp_path / "numbers.pth")


def test_weights_that_do_not_fit_name_the_differing_keys_and_change_nothing():
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["3.bias"]
    state["3.weight"] = torch.zeros(5, 4)
    state |= {f"extra{n}": torch.zeros(1) for n in range(5)}
    with pytest.raises(checkpoints.Misfit) as error:
        checkpoints.load_into(model, state, "W.pth")
    assert str(error.value) == (
        "weights W.pth do not fit the model: 1 missing (3.bias); 5 unknown (extra0, extra1, extra2, ...); "
        "1 of another shape (3.weight [5, 4] for [3, 4]); choose their `arch` and `num_classes`"
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_state_dicts_from_before_batch_norms_counted_load():
    state = {name: value for name, value in small_model().state_dict().items() if "num_batches" not in name}
    model = small_model()
    checkpoints.load_into(model, state, "old.pth")
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"])
