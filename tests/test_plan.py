"""The plan: what a run depends on follows from the command line, and each flag is in it, is refused, or is told of."""

import contextlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import main
from image_classification import models
from tests.support.command_lines import NUMBERS, flags, values, word
from tests.support.program import own_rank, run, run_well, tiny

FLAGS = flags()
DEFAULTS = vars(main.build_parser().parse_args(["DIR"]))

COMPANIONS = (
    "", "--search", "--evaluate", "--search --evaluate", "--amp", "--fp16", "--bb-ratio=0.5", "--bb-ratio=1", "--dgc",
    "--powersgd-rank=2", "--compression-type=maxmin", "--compression-type=topk", "--compression-type=1bit",
    "--compression-type=svd", "--data-backend=syntetic", "--resume=auto", "--pretrained-weights=w.pth", "--lr=0",
    "--search --search-target-bits=4", "--amp --dynamic-loss-scale", "--no-checkpoints",
)  # fmt: skip
"""Flags that others go with."""


@contextlib.contextmanager
def started(ranks: int) -> Iterator[None]:
    """The environment of one of so many ranks, or of a process that no launcher started."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        if ranks > 1:
            for name, value in (("RANK", 0), ("WORLD_SIZE", ranks), ("LOCAL_RANK", 0)):
                monkeypatch.setenv(name, str(value))
        yield


def parse(words: Sequence[str], ranks: int) -> main.Plan | None:
    """The plan of a command line; None where it is refused, in one line and with exit status 2."""
    plan, status = None, 0
    with started(ranks), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            plan = main.parse(words)
        except SystemExit as stopped:
            status = stopped.code
    error = said.getvalue()
    assert (status, error[:16], error.count("\n")) == ((2, "main.py: error: ", 1) if plan is None else (0, "", 0))
    return plan


def acted_on(plan: main.Plan) -> dict[str, object]:
    """The flags as the run sees them."""
    return {name: value for name, value in vars(plan).items() if name not in ("given", "idle")}


@st.composite
def flag_and_value(draw: st.DrawFn) -> str:
    action = FLAGS[draw(st.sampled_from(sorted(FLAGS)))]
    return word(action, draw(st.sampled_from(values(action))))


@settings(max_examples=1000)
@given(
    companions=st.lists(st.sampled_from(COMPANIONS), max_size=2),
    others=st.lists(flag_and_value(), max_size=3),
    name=st.sampled_from(sorted(FLAGS)),
    choice=st.randoms(use_true_random=False),
    ranks=st.sampled_from([1, 2]),
)
def test_a_flag_is_in_the_plan_or_refused_or_told_of(
    companions: list[str], others: list[str], name: str, choice: random.Random, ranks: int
) -> None:
    value = choice.choice(values(FLAGS[name]))
    plan = parse(["DIR", *" ".join(companions).split(), *others, word(FLAGS[name], value)], ranks)
    if plan is None:
        return
    if name in plan.idle:
        assert getattr(plan, name) == DEFAULTS[name]
        assert main.spelled(name) in main.in_one_line(plan.idle)
    elif name != "local_rank" or ranks == 1:  # else the launcher's is taken
        found = getattr(plan, name)
        assert (found[-1] if isinstance(found, list) else found) == read(name, value)


def read(name: str, value: str | None) -> object:
    """The value that a word of the command line stands for."""
    kind = FLAGS[name].type
    return True if value is None else kind(value) if callable(kind) else value


@settings(max_examples=100)
@given(others=st.lists(flag_and_value(), max_size=4), ranks=st.sampled_from([1, 2]))
def test_a_plan_does_not_change_and_is_its_own_plan(others: list[str], ranks: int) -> None:
    plan = parse(["DIR", *others], ranks)
    if plan is None:
        return
    with pytest.raises(AttributeError, match="a plan is complete before anything starts, and epochs does not change"):
        plan.epochs = 3
    again = main.plan_of(plan, DEFAULTS)
    assert acted_on(again) == acted_on(plan)
    assert not again.idle


IDLE = {
    "--bb-ratio 1 --bb-num-parallel-steps 3": (
        "no effect: --bb-num-parallel-steps with --bb-ratio 1, which lets nothing be late"
    ),
    "--amp --dynamic-loss-scale --static-loss-scale 8": "no effect: --static-loss-scale with --dynamic-loss-scale",
    "--evaluate --lr 0.5 --compression-type topk --topk-ratio 0.1": (
        "no effect: --compression-type, --lr, --topk-ratio with --evaluate"
    ),
    "--data-backend syntetic -j 8": "no effect: --workers with --data-backend syntetic, which loads nothing",
    "-c fanin --resume c": "no effect: --model-config with --resume, whose checkpoint has all weights",
    "-c fanin --pretrained-weights w": "no effect: --model-config with --pretrained-weights, which are all weights",
    "--compression-type 1bit --error-feedback": "no effect: --error-feedback with a compressor that always has it",
    "--dgc --compression-type topk": "no effect: --compression-type with --dgc, which is a top-k",
    "--lr 0 --warmup 3 -a vgg16 --bn-weight-decay": (
        "no effect: --bn-weight-decay with --arch vgg16, which trains no batch norm; --warmup with --lr 0"
    ),
}


@pytest.mark.parametrize("line", IDLE)
def test_what_recipes_repeat_without_effect_is_told_in_one_line(line: str) -> None:
    plan = parse(["DIR", *line.split()], 1)
    assert plan is not None
    assert main.in_one_line(plan.idle) == IDLE[line]


# Real runs

BASE = (
    "-a tiny --num-classes 3 --image-size 32 --data-backend pytorch -j 0 -b 4 --epochs 2 --prof 1 --seed 1 --lr 0.01"
)
LEFT_OUT = ("compile", "hvd")  # a minute to compile, and another launcher
RUNS = {
    "arch": ("tiny",),
    "batch_size": ("4", "8"),
    "bucket_size": ("-1", "64", "512"),
    "checkpoint_filename": ("c.pth.tar",),
    "compression_scheme": ("{made}/scheme.json",),
    "compressor_warmup_steps": ("0", "1"),
    "data_backend": ("pytorch", "syntetic"),
    "device": ("auto", "cpu"),
    "dist_backend": ("auto", "gloo"),
    "epochs": ("2", "3"),
    "image_size": ("32", "40"),
    "lr": ("0", "0.01"),
    "num_classes": ("3", "4"),
    "optimizer_batch_size": ("-1", "8", "16"),
    "popsize": ("1", "2"),
    "pretrained_weights": ("{made}/checkpoint.pth.tar", "{made}/w.safetensors"),
    "prof": ("1", "2"),
    "raport_file": ("r.json",),
    "resume": ("auto", "{made}/checkpoint.pth.tar"),
    "save_weights": ("{work}/w.safetensors",),
    "search_iterations": ("0", "1"),
    "static_loss_scale": ("1", "8"),
    "tensorboard_dir": ("{work}/events",),
    "threads": ("1",),
    "weight_decay": ("0", "0.001"),
    "workers": ("0", "1"),
    "workspace": ("{work}",),
}
"""Values with which a run takes a second, where small numbers, or every choice, are not."""


@pytest.fixture(scope="module")
def made(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, weights and a scheme."""
    folder = tmp_path_factory.mktemp("made")
    written = ("--workspace", folder, "--save-weights", folder / "w.safetensors")
    run_well(pictures, *BASE.split(), "--run-epochs", 1, *written)
    (folder / "scheme.json").write_text(json.dumps({"4": ["0.weight", "3.weight", "5.weight"]}))
    return folder


def drawn(number: int) -> tuple[list[str], int]:
    """The flags of a command line that is accepted, and how many ranks run it."""
    choice = random.Random(number)
    while True:
        ranks = choice.choice((1, 2))
        few = choice.sample(sorted(FLAGS.keys() - {*LEFT_OUT}), 4)
        companions = choice.choice([c for c in COMPANIONS if "w.pth" not in c]).split()
        words = [*companions, *(word(FLAGS[name], choice.choice(quick(name))) for name in few)]
        with patch.dict(models.ARCHITECTURES, tiny=tiny):
            if parse(["DIR", *words], ranks) is not None:
                return words, ranks


def quick(name: str) -> Sequence[str | None]:
    """Values of a flag with which a run takes a second."""
    every = values(FLAGS[name])
    small = [value for value in every if value in ("0", "0.01", "0.1", "0.5", "0.9", "1", "2", "3", "4")]
    return RUNS.get(name, small if every is NUMBERS else every)


def note_flags(path: Path) -> None:
    """Rank 0 leaves behind which flags were given and counted, and which the run has read."""
    read: set[str] = set()
    close = main.Run.close

    def noted(plan: main.Plan, name: str) -> object:
        read.add(name)
        return object.__getattribute__(plan, name)

    def close_and_note(rank: main.Run) -> None:
        close(rank)
        if own_rank() == 0:
            counted = [name for name in rank.flags.given if vars(rank.flags)[name] != DEFAULTS[name]]
            path.write_text(json.dumps(sorted({*counted} - read)))

    patch.object(main, "as_typed", lambda plan: "as typed").start()  # it reads every flag
    patch.object(main.Plan, "__getattribute__", noted).start()
    patch.object(main.Run, "close", close_and_note).start()


FEW, MANY = 20, 300


@pytest.mark.parametrize(
    "number", [*range(FEW), *(pytest.param(number, marks=pytest.mark.slow) for number in range(FEW, MANY))]
)
def test_what_is_accepted_runs_and_reads_every_flag(number: int, made: Path, pictures: Path, tmp_path: Path) -> None:
    words, ranks = drawn(number)
    words = [text.format(made=made, work=tmp_path / "work") for text in words]
    unread = tmp_path / "unread"
    argv = (pictures, *BASE.split(), "--workspace", tmp_path / "work", *words)
    done = run(*argv, ranks=ranks, before=partial(note_flags, unread))
    errors = [rank.err for rank in done]
    assert not any("Traceback" in error for error in errors), (words, errors)
    assert {rank.status for rank in done} <= {0, 2}, (words, errors)
    if done[0].status == 0:
        assert json.loads(unread.read_text()) == [], words
    else:
        assert "main.py: error: " in errors[0], words
