"""Flags: the list that was asked for, one by one; every range; and nothing that a user set is silently ignored."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compression
import main

ROOT = Path(__file__).parents[1]
USAGE = ROOT / "../shared/usage.txt"

TYPES = (
    "none", "sanity", "maxmin", "exponential", "1bit", "norm_uniform", "terngrad", "topk", "topk_rmsprop", "svd",
    "stats", "quantile", "eden",
)  # fmt: skip
EXTENSION_TYPES = ("eden",)  # behind those of the list
MIN_BITS = {"maxmin": 1, "exponential": 2, "norm_uniform": 2, "quantile": 1, "eden": 1}
ARCHITECTURES = (
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext101-32x4d", "se-resnext101-32x4d",
    "wide_resnet50", "wide_resnet101", "vgg16", "resnet18_convex",
)  # fmt: skip


class Option(NamedTuple):
    """One option of the list; a switch has neither metavar nor choices."""

    spellings: str
    default: object = False
    metavar: str | None = None
    choices: tuple[str, ...] | None = None


LISTED = (
    Option("--data-backend", "dali-cpu", "BACKEND", ("pytorch", "syntetic", "dali-gpu", "dali-cpu")),
    Option("--arch -a", "resnet50", "ARCH", ARCHITECTURES),
    Option("--model-config -c", "classic", "CONF", ("classic", "fanin", "grp-fanin", "grp-fanout")),
    Option("--num-classes", 1000, "N"),
    Option("-j --workers", 5, "N"),
    Option("--epochs", 90, "N"),
    Option("--run-epochs", -1, "N"),
    Option("-b --batch-size", 256, "N"),
    Option("--optimizer-batch-size", -1, "N"),
    Option("--lr --learning-rate", 0.1, "LR"),
    Option("--lr-schedule", "step", "SCHEDULE", ("step", "linear", "cosine")),
    Option("--warmup", 0, "E"),
    Option("--label-smoothing", 0.0, "S"),
    Option("--mixup", 0.0, "ALPHA"),
    Option("--momentum", 0.9, "M"),
    Option("--weight-decay --wd", 1e-4, "W"),
    Option("--bn-weight-decay"),
    Option("--nesterov"),
    Option("--print-freq -p", 10, "N"),
    Option("--resume", None, "PATH"),
    Option("--pretrained-weights", None, "PATH"),
    Option("--fp16"),
    Option("--static-loss-scale", 1, "STATIC_LOSS_SCALE"),
    Option("--dynamic-loss-scale"),
    Option("--prof", -1, "N"),
    Option("--amp"),
    Option("--seed", None, "SEED"),
    Option("--gather-checkpoints"),
    Option("--raport-file", "experiment_raport.json", "RAPORT_FILE"),
    Option("--evaluate"),
    Option("--training-only"),
    Option("--no-checkpoints"),
    Option("--checkpoint-filename", "checkpoint.pth.tar", "CHECKPOINT_FILENAME"),
    Option("--workspace", "./", "DIR"),
    Option("--memory-format", "nchw", None, ("nchw", "nhwc")),
    Option("--tensorboard-dir", None, "TENSORBOARD_DIR"),
    Option("--opt-level", "O1", None, ("O0", "O1", "O2", "O3")),
    Option("--hvd"),
    Option("--bb-ratio", None, "BB_RATIO"),
    Option("--bb-num-parallel-steps", 10, "BB_NUM_PARALLEL_STEPS"),
    Option("--compression-type", "none", None, TYPES),
    Option("--quantization-bits", 4, "QUANTIZATION_BITS"),
    Option("--bucket-size", 512, "BUCKET_SIZE"),
    Option("--error-feedback"),
    Option("--efx-bits", None, "EFX_BITS"),
    Option("--efx-randk", None, "EFX_RANDK"),
    Option("--topk-ratio", 0.01, "TOPK_RATIO"),
    Option("--big-grad"),
    Option("--dgc"),
    Option("--compressor-warmup-steps", 0, "COMPRESSOR_WARMUP_STEPS"),
    Option("--local_rank --local-rank", 0, "LOCAL_RANK"),
    Option("--powersgd-rank", None, "POWERSGD_RANK"),
    Option("--search"),
    Option("--search-alpha", 0.5, "SEARCH_ALPHA"),
    Option("--search-beta", 0.5, "SEARCH_BETA"),
    Option("--search-max-bits", 8, "SEARCH_MAX_BITS"),
    Option("--search-min-bits", 2, "SEARCH_MIN_BITS"),
    Option("--popsize", 5, "POPSIZE"),
    Option("--search-iterations", 2, "SEARCH_ITERATIONS"),
)

EXTENSIONS = (
    Option("--image-size", 224, "PIXELS"),
    Option("--crop-scale", 0.08, "SHARE"),
    Option("--hflip", 0.5, "P"),
    Option("--skip-bad-images"),
    Option("--reset-head"),
    Option("--save-weights", None, "FILE"),
    Option("--deterministic"),
    Option("--compile"),
    Option("--device", "auto", None, ("auto", "cpu", "cuda")),
    Option("--dist-backend", "auto", None, ("auto", "gloo", "nccl")),
    Option("--hierarchical", "auto", None, ("auto", "on", "off")),
    Option("--ranks-per-host", None, "N"),
    Option("--timeout", 900, "SECONDS"),
    Option("--threads", None, "N"),
    Option("--check-replicas", 100, "STEPS"),
    Option("--verify-wire"),
    Option("--second-hop-bits", None, "BITS"),
    Option("--dgc-clip", None, "NORM"),
    Option("--dense-dtype", "float32", None, ("float32", "bfloat16")),
    Option("--advise"),
    Option("--simulate", None, "CLUSTER"),
    Option("--advise-from", None, "FILE"),
    Option("--compression-scheme", None, "FILE"),
    Option("--search-calibration-steps", 20, "STEPS"),
    Option("--search-target-bits", None, "BITS"),
    Option("--search-target-error", None, "BITS"),
    Option("--search-objective", "bytes", None, ("bytes", "time")),
    Option("--search-balance"),
    Option("--search-measure", "root", None, ("root", "square", "loss")),
    Option("--search-pin", None, "PATTERN=BITS"),
    Option("--search-method", "both", None, ("de", "exact", "both")),
    Option("--search-every", "1", "N"),
    Option("--search-once"),
    Option("--search-last-steps", None, "N"),
    Option("--search-loss-batches", 2, "N"),
    Option("--search-families", None, "NAMES"),
)


REGISTERED = tuple(name for name, row in compression.COMPRESSORS.items() if row.listed)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "HOROVOD_RANK", "HOROVOD_LOCAL_RANK", "HOROVOD_SIZE",
        "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)


def parse(line):
    return main.parse(["DIR", *line.split()])


def error(capsys, arguments):
    """The one line that a refused command line leaves on standard error."""
    with pytest.raises(SystemExit) as stopped:
        main.parse(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("main.py: error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err.removeprefix("main.py: error: ").rstrip("\n")


# The list


def actions():
    return {flag: action for action in main.build_parser()._actions for flag in action.option_strings}


@pytest.mark.parametrize("option", LISTED + EXTENSIONS, ids=lambda option: option.spellings.split()[0])
def test_the_option_is_as_listed(option):
    action = actions()[option.spellings.split()[0]]
    assert action.option_strings == option.spellings.split()
    assert action.default == option.default
    assert type(action.default) is type(option.default)
    is_switch = option.metavar is None and option.choices is None
    assert (action.nargs == 0) == is_switch
    assert action.choices == option.choices
    if not is_switch and option.metavar:
        assert (action.metavar or action.dest.upper()) == option.metavar
    assert len(action.help.split()) >= 2


def test_there_is_no_option_besides_and_extensions_come_last():
    parser = main.build_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]
    expected = [flag for option in LISTED + EXTENSIONS for flag in option.spellings.split()]
    assert sorted(flags) == sorted([*expected, "-h", "--help", "--version"])
    assert flags[-len(EXTENSIONS) - 1 :] == [*(option.spellings for option in EXTENSIONS), "--version"]


def test_every_option_stands_in_the_group_of_its_topic_and_extensions_are_marked():
    options, *groups = main.build_parser()._action_groups[1:]
    assert [action.option_strings for action in options._group_actions] == [["-h", "--help"], ["--version"]]
    of = {flag: group.title for group in groups for action in group._group_actions for flag in action.option_strings}
    assert (of["--arch"], of["--image-size"]) == ("data and model",) * 2
    assert (of["--hvd"], of["--device"], of["--threads"]) == ("ranks",) * 3
    assert (of["--dgc"], of["--dgc-clip"], of["--dense-dtype"]) == ("gradient compression",) * 3
    assert (of["--search"], of["--search-target-bits"]) == ("bit-width search",) * 2
    marked = {flag for flag, action in actions().items() if action.help.startswith("(extension) ")}
    assert marked == {option.spellings for option in EXTENSIONS} | {"--version"}


def test_help_shows_defaults_that_are_values():
    shown = " ".join(main.build_parser().format_help().split())
    assert "number of classes (default: 1000)" in shown
    assert "epochs of linear warm-up, fewer than --epochs (default: 0)" in shown
    assert "default: None" not in shown
    assert "default: False" not in shown


def invocations(text):
    """'--arch ARCH, -a ARCH' and the like, as the help shows them."""
    return re.findall(r"^  (-\S.*?)(?:  .*)?$", text, re.MULTILINE)


def test_help_shows_the_usage_that_was_asked_for(monkeypatch):
    if not USAGE.exists():
        pytest.skip("the list lies beside the checkout of developers only")
    monkeypatch.setenv("COLUMNS", "80")
    asked, shown = USAGE.read_text(), main.build_parser().format_help()
    shown = shown.replace("".join(f",{name}" for name in EXTENSION_TYPES) + "}", "}")
    asked_usage, shown_usage = (text.partition("\n\n")[0].split() for text in (asked, shown))
    assert asked_usage[-1] == shown_usage[-1] == "DIR"
    assert shown_usage[: len(asked_usage) - 1] == asked_usage[:-1]
    alias = ", --local-rank LOCAL_RANK"
    extensions = {option.spellings for option in EXTENSIONS} | {"--version"}
    assert set(invocations(asked)) == {
        flag.replace(alias, "") for flag in invocations(shown) if flag.split()[0] not in extensions
    }


def test_the_registry_holds_the_types_of_the_list_in_its_order():
    assert TYPES == REGISTERED
    assert {name: row.min_bits for name, row in compression.COMPRESSORS.items() if row.has_bits} == MIN_BITS


def test_recipes_may_call_momentum_mom():
    assert parse("--mom 0.875 --wd 3e-5").momentum == 0.875
    for prefix in ("--mom", "--wd"):
        assert len({id(action) for flag, action in actions().items() if flag.startswith(prefix)}) == 1


def test_synthetic_is_an_alias():
    assert parse("--data-backend synthetic").data_backend == "syntetic"


def test_defaults_are_a_valid_command_line_and_nothing_is_given():
    flags = parse("")
    for option in LISTED + EXTENSIONS:
        name = max(option.spellings.split(), key=len).lstrip("-").replace("-", "_")
        name = {"learning_rate": "lr"}.get(name, name)
        assert getattr(flags, name) == option.default
    assert flags.given == ("data",)


def test_given_names_what_the_command_line_spells_out_even_a_default():
    assert parse("--data-backend dali-cpu -b 256 --amp").given == ("amp", "batch_size", "data", "data_backend")


# Ranges

RANGES = {
    "an integer from 1 to 8": (
        "1 8", "0 9 -1 4.0 x", "--quantization-bits --efx-bits --search-min-bits --search-max-bits "
        "--second-hop-bits --search-target-error",
    ),
    "an integer from 1 to 1000000000": (
        "1 1000000000", "0 -1 1.5 x 1000000001", "--epochs --print-freq/-p --search-calibration-steps "
        "--search-last-steps",
    ),
    "an integer from 1 to 1000000": ("1 1000000", f"0 1000001 {10**30}", "--num-classes -b/--batch-size"),
    "an integer from 1 to 1024": (
        "1 1024", f"0 -1 1025 {10**30}",
        "--bb-num-parallel-steps --powersgd-rank --popsize --ranks-per-host --threads --search-loss-batches",
    ),
    "an integer from 1 to 16384": ("1 16384", f"0 16385 {10**12}", "--image-size"),
    "an integer from 1 to 1000000000, or -1": (
        "1 1000 -1", f"0 -2 1e3 {10**30}", "--run-epochs --optimizer-batch-size --prof --bucket-size "
        "--check-replicas",
    ),
    "an integer from 0 to 1000000000": (
        "0 3", "-1 0.5 1000000001",
        "--warmup --compressor-warmup-steps --local_rank/--local-rank --search-iterations",
    ),
    "an integer from 0 to 1024": ("0 1024", "-1 1025", "-j/--workers"),
    "a number of seconds from 1 to 1000000000": ("1 900 1e9", "0 -1 0.5 1e10 nan inf x", "--timeout"),
    "an integer from 0 to 4294967295": ("0 4294967295", "-1 4294967296", "--seed"),
    "a number from 0 to 1e+38": ("0 1e-9 3 1e38", "-1e-9 nan inf 0,1 1e39", "--lr/--learning-rate --weight-decay/--wd"),
    "a number from 0 to 1000": ("0 1e-9 1000", "-1e-9 nan inf 1e300", "--mixup"),
    "a number from 1e-09 to 1e+09": (
        "1e-9 3 1e9", "0 -1 nan inf 1e300 1e-10",
        "--static-loss-scale --dgc-clip --search-alpha --search-beta",
    ),
    "a number above 0 and at most 128": ("1e-9 3 128", "0 -1 nan inf 1e300", "--search-target-bits"),
    "a number above 0 and at most 1": (
        "1e-9 0.5 1", "0 -0.1 1.001 nan", "--topk-ratio --bb-ratio --efx-randk --crop-scale",
    ),
    "a number from 0 to below 1": ("0 0.999", "1 -0.1 nan", "--label-smoothing --momentum"),
    "a number from 0 to 1": ("0 1", "-0.1 1.1 nan", "--hflip"),
}  # fmt: skip


@pytest.mark.parametrize("words", RANGES)
def test_numbers_out_of_range_are_refused_with_the_rule_and_the_value(words, capsys):
    good, bad, names = RANGES[words]
    for name in names.split():
        flag = name.split("/")[0]
        for value in good.split():
            action = main.build_parser()._option_string_actions[flag]
            assert action.type(value) == pytest.approx(float(value))
        for value in bad.split():
            assert error(capsys, ["DIR", f"{flag}={value}"] if flag[1] == "-" else ["DIR", flag + value]) == (
                f"argument {name}: expected {words}, got {value!r}"
            )


def test_every_number_is_checked():
    checked = {flag for _, _, names in RANGES.values() for name in names.split() for flag in name.split("/")}
    numbers = [o for o in LISTED + EXTENSIONS if isinstance(o.default, (int, float)) and o.metavar]
    assert {flag for option in numbers for flag in option.spellings.split()} <= checked


@pytest.mark.parametrize("option", [o for o in LISTED + EXTENSIONS if o.metavar], ids=lambda o: o.spellings)
@pytest.mark.parametrize("value", [10**40, 10**400, 1e300])
def test_no_number_is_without_a_bound(option, value, capsys):
    action = actions()[option.spellings.split()[0]]
    if action.type in (main.text, main.families, main.cluster) or action.choices:
        return
    assert re.search(r": expected a.* (to|at most|below) [\de+]+(, or -1)?, got ", error(
        capsys, ["DIR", f"{max(option.spellings.split(), key=len)}={value}"]
    ))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(option=st.sampled_from([o for o in LISTED + EXTENSIONS if o.metavar]), value=st.text())
def test_any_value_parses_or_is_refused_in_one_line(capsys, option, value):
    flag = next(flag for flag in option.spellings.split() if flag.startswith("--"))
    with suppress(SystemExit):
        main.parse(["DIR", f"{flag}={value}"])
    assert re.fullmatch(r"(main.py: error: [^\n]+\n)?", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: DIR"),
        (["DIR", "--bogus"], "unrecognized arguments: --bogus"),
        ([""], "argument DIR: expected a name, got ''"),
        (["DIR", "--arch", "alexnet"], "argument --arch/-a: invalid choice: 'alexnet' (choose from 'resnet18', "),
        (["DIR", "--compression-type", "zip"], "argument --compression-type: invalid choice: 'zip' (choose from "),
        (["DIR", "--search-mi", "3", "--search-ma"], "argument --search-max-bits: expected one argument"),
        (["DIR", "--search-t", "3"], "ambiguous option: --search-t could match --search-target-bits, --search-tar"),
        (["DIR", "one\nline"], "unrecognized arguments: one line"),
    ],
)
def test_other_mistakes_are_one_line_too(arguments, message, capsys):
    assert error(capsys, arguments).startswith(message)


# What goes with what

WITHOUT = "has no effect without"
QUANTIZERS = "maxmin, exponential, norm_uniform, quantile, eden"

REFUSED = {
    # files
    "--save-weights model.pth": "--save-weights writes a .safetensors file, got 'model.pth'; end its name so",
    # optimization and precision
    "--epochs 5 --warmup 5": "--warmup 5 must be below --epochs 5",
    "--nesterov --momentum 0": "--nesterov needs a --momentum above 0",
    "--amp --fp16": "--amp and --fp16 exclude each other; drop one",
    "--opt-level O2": f"--opt-level {WITHOUT} --amp",
    "--static-loss-scale 128": f"--static-loss-scale {WITHOUT} --fp16 or --amp",
    "--dynamic-loss-scale": f"--dynamic-loss-scale {WITHOUT} --fp16 or --amp",
    # data, devices, ranks
    "--data-backend syntetic --hflip 0": f"--hflip {WITHOUT} images; choose a --data-backend that reads them",
    "--data-backend syntetic --skip-bad-images": f"--skip-bad-images {WITHOUT} images",
    "--device cpu --data-backend dali-gpu": "--data-backend dali-gpu needs a GPU, and --device is cpu; use dali-cpu",
    "--device cpu --dist-backend nccl": "--dist-backend nccl needs a GPU, and --device is cpu; use gloo",
    "--hvd --dist-backend gloo": "--hvd and --dist-backend exclude each other; drop one",
    "--dist-backend gloo": f"--dist-backend {WITHOUT} other ranks; start some, as with torchrun --nproc_per_node 2",
    "--hierarchical off": f"--hierarchical {WITHOUT} other ranks; start some",
    "--ranks-per-host 2": f"--ranks-per-host {WITHOUT} other ranks; start some",
    "--bb-num-parallel-steps 5": f"--bb-num-parallel-steps {WITHOUT} --bb-ratio",
    "--bb-ratio 0.5 --big-grad": "--bb-ratio and --big-grad exclude each other; drop one",
    "--optimizer-batch-size 300": "--optimizer-batch-size 300 is no multiple of ranks x --batch-size = 1 x 256 = 256",
    # run control
    "--evaluate --training-only": "--evaluate and --training-only exclude each other; drop one",
    "--no-checkpoints --gather-checkpoints": "--no-checkpoints and --gather-checkpoints exclude each other; drop one",
    "--reset-head": f"--reset-head {WITHOUT} --pretrained-weights",
    "--reset-head --resume c.pth": f"--reset-head {WITHOUT} --pretrained-weights",
    "--resume c.pth --pretrained-weights w.pth": (
        "--pretrained-weights has no effect beside --resume PATH, whose checkpoint has all weights; drop one"
    ),
    "--resume c.pth --pretrained-weights w.pth --reset-head": "--pretrained-weights has no effect beside --resume PATH",
    "--no-checkpoints --checkpoint-filename x": f"--checkpoint-filename {WITHOUT} checkpoints; drop --no-checkpoints",
    "--checkpoint-filename model_best.pth.tar": (
        "--checkpoint-filename model_best.pth.tar is a name that copies of checkpoints get; choose another name"
    ),
    "--checkpoint-filename checkpoint-2.pth.tar": (
        "--checkpoint-filename checkpoint-2.pth.tar is a name that copies of checkpoints get; choose another name"
    ),
    "--raport-file checkpoint-2.pth.tar": "--raport-file checkpoint-2.pth.tar is a name that copies of checkpoints get",
    "--workspace w --raport-file checkpoint.pth.tar": "--raport-file and --checkpoint-filename are one file, ",
    "--checkpoint-filename experiment_raport.json": "--raport-file and --checkpoint-filename are one file, ",
    "--workspace w --resume w/experiment_raport.json": "--raport-file and --resume are one file, ",
    "--raport-file gradient_stats.jsonl": "--raport-file and the gradient statistics are one file, ",
    # compression
    "--compression-scheme s --quantization-bits 8": (
        "--compression-scheme and --quantization-bits exclude each other; drop one"
    ),
    "--dgc --compression-type maxmin": "--dgc is a top-k, and --compression-type is maxmin; use topk",
    "--dgc --error-feedback": "--dgc and --error-feedback exclude each other; drop one",
    "--dgc --powersgd-rank 4": "--dgc and --powersgd-rank exclude each other; drop one",
    "--dgc --quantization-bits 2": f"--quantization-bits has no effect with --dgc; use {QUANTIZERS}",
    "--dgc-clip 1": "--dgc-clip has no effect with --compression-type none; use --dgc",
    "--powersgd-rank 4 --compression-type topk": "--powersgd-rank goes with --compression-type none or svd, got topk",
    "--powersgd-rank 4 --big-grad": (
        "--powersgd-rank factors each layer's matrix, and --big-grad leaves one long vector; drop one"
    ),
    "--verify-wire": "--verify-wire has no effect without other ranks; start some",
    "--second-hop-bits 8": f"--second-hop-bits has no effect with --compression-type none; use {QUANTIZERS}",
    "--search --second-hop-bits 8": "--search and --second-hop-bits exclude each other; drop one",
    "--compression-type exponential --second-hop-bits 1": (
        "--compression-type exponential needs at least 2 bits, one of them the sign; raise --second-hop-bits"
    ),
    "--efx-bits 4": "--efx-bits has no effect with --compression-type none; use topk, topk_rmsprop",
    "--efx-randk 0.1 --compression-type maxmin": (
        "--efx-randk has no effect with --compression-type maxmin; use topk, topk_rmsprop"
    ),
    "--compression-type topk --efx-bits 4 --error-feedback": "--error-feedback and --efx-bits exclude each other",
    "--compression-type topk --efx-bits 4 --efx-randk 0.1": "--efx-bits and --efx-randk exclude each other; drop one",
    "--topk-ratio 0.1": "--topk-ratio has no effect with --compression-type none; use topk, topk_rmsprop, --dgc",
    "--quantization-bits 2": (
        f"--quantization-bits has no effect with --compression-type none; use {QUANTIZERS}"
    ),
    "--compression-type topk --quantization-bits 2": "--quantization-bits has no effect with --compression-type topk",
    "--compression-type exponential --quantization-bits 1": (
        "--compression-type exponential needs at least 2 bits, one of them the sign; raise --quantization-bits"
    ),
    "--error-feedback": "--error-feedback has no effect with --compression-type none; use ",
    "--bucket-size 64": "--bucket-size has no effect with --compression-type none; use ",
    "--compressor-warmup-steps 9": "--compressor-warmup-steps has no effect with --compression-type none; use ",
    "--compression-type sanity --dense-dtype bfloat16": (
        "--dense-dtype has no effect with --compression-type sanity; use none, maxmin, "
    ),
    "--compression-type stats --dense-dtype bfloat16": "--dense-dtype has no effect with --compression-type stats; ",
    "--hvd --dense-dtype bfloat16": (
        "--dense-dtype bfloat16 with --compression-type none is a sum of bfloat16, which Horovod has not; drop --hvd "
        "or --dense-dtype, or use a type whose messages are bytes, such as maxmin"
    ),
    "--hvd --dense-dtype bfloat16 --powersgd-rank 2": (
        "--dense-dtype bfloat16 with --powersgd-rank is a sum of bfloat16, which Horovod has not; drop --hvd or "
    ),
    "--hvd --dense-dtype bfloat16 --compression-type topk --compressor-warmup-steps 9": (
        "--dense-dtype bfloat16 with --compressor-warmup-steps is a sum of bfloat16, which Horovod has not; drop one "
        "of --hvd, --dense-dtype and --compressor-warmup-steps"
    ),
    "--compression-type stats --error-feedback": "--error-feedback has no effect with --compression-type stats; use ",
    # search
    "--bb-ratio 0.5 --compression-type topk": (
        "--bb-ratio lets the averages of some layers come late, and --compression-type topk settles whole steps; use "
        "none, sanity, maxmin, exponential, 1bit, norm_uniform, terngrad, stats, quantile, eden"
    ),
    "--bb-ratio 0.5 --powersgd-rank 4": (
        "--bb-ratio lets the averages of some layers come late, and --powersgd-rank settles whole steps; use none, "
    ),
    "--bb-ratio 0.5 --dgc": "--bb-ratio lets the averages of some layers come late, and --dgc settles whole steps",
    "--search --compression-type topk": (
        f"--search chooses bit widths, and --compression-type topk has none; use {QUANTIZERS}"
    ),
    "--search --compression-type none": "--search chooses bit widths, and --compression-type none has none; use ",
    "--compression-scheme f.json --compression-type 1bit": (
        f"--compression-scheme chooses bit widths, and --compression-type 1bit has none; use {QUANTIZERS}"
    ),
    "--search --big-grad": "--search and --big-grad exclude each other; drop one",
    "--compression-scheme f.json --big-grad": "--compression-scheme and --big-grad exclude each other; drop one",
    "--search --search-min-bits 5 --search-max-bits 4": "--search-min-bits 5 is above --search-max-bits 4",
    "--search --search-min-bits 1 --compression-type norm_uniform": (
        "--compression-type norm_uniform needs at least 2 bits, one of them the sign; raise --search-min-bits"
    ),
    "--search-alpha 0.3": f"--search-alpha {WITHOUT} --search",
    "--search-beta 0.3": f"--search-beta {WITHOUT} --search",
    "--search-min-bits 3": f"--search-min-bits {WITHOUT} --search",
    "--search-max-bits 3": f"--search-max-bits {WITHOUT} --search",
    "--popsize 50": f"--popsize {WITHOUT} --search",
    "--search-iterations 5": f"--search-iterations {WITHOUT} --search",
    "--search-target-bits 4": f"--search-target-bits {WITHOUT} --search",
    "--search --search-target-bits 4 --search-alpha 1": (
        "--search-alpha has no effect beside --search-target-bits, which asks for the least error within a budget; "
        "drop one"
    ),
    "--search --search-target-bits 4 --search-beta 1": "--search-beta has no effect beside --search-target-bits",
    "--search --search-target-error 3 --search-target-bits 3": (
        "--search-target-bits and --search-target-error exclude each other; drop one"
    ),
    "--search --search-target-error 3 --search-balance": (
        "--search-target-error and --search-balance exclude each other; drop one"
    ),
    "--search --search-target-error 3 --search-beta 1": (
        "--search-beta has no effect beside --search-target-error, which asks for the fewest bytes within an error"
    ),
    "--search --search-balance --search-alpha 1": (
        "--search-alpha has no effect beside --search-balance, which has no powers; drop one"
    ),
    "--search-objective time": f"--search-objective {WITHOUT} --search",
    "--search --search-objective time": f"--search-objective {WITHOUT} --search-target-error",
    "--search --search-objective time --search-target-bits 4": f"--search-objective {WITHOUT} --search-target-error",
    "--search --search-objective time --search-target-error 4": (
        "nothing travels: --search-objective time needs the number of ranks or --simulate; start some, as with torchrun"
    ),
    "--search --search-objective time --search-target-error 4 --bb-ratio 0.5": (
        "--search-objective time predicts steps that wait for all averages, and --bb-ratio lets some come late; drop"
    ),
    "--search --search-objective time --search-target-error 4 --search-families topk,eden": (
        "--search-objective time searches among bit widths, and --search-families among others; drop one"
    ),
    "--search --search-target-error 2 --search-min-bits 3": (
        "--search-target-error 2 is the error at a width that is searched, 3 to 8; give one of them, or search more"
    ),
    "--search --search-measure loss": (
        "--search-measure loss has changes of either sign, and powers need errors above 0; add --search-target-bits or "
    ),
    "--search --search-measure loss --search-balance": (
        "--search-balance weighs squared errors, and --search-measure is loss; use square, or --search-target-bits"
    ),
    "--search --search-measure loss --search-target-bits 3 --lr 0": (
        "--search-measure loss measures steps of --lr, which is 0; raise it, or use square"
    ),
    "--search --search-measure loss --search-target-bits 3 --fp16": (
        "--search-measure loss moves weights by less than half precision can tell; drop --fp16 or --opt-level"
    ),
    "--search --search-loss-batches 4": f"--search-loss-batches {WITHOUT} --search-measure loss",
    "--search-families maxmin": f"--search-families {WITHOUT} --search",
    "--search --search-families maxmin,topk": "--search-families needs a limit or a balance",
    "--search --search-families maxmin,svd": "argument --search-families: expected each at most once, some of maxmin",
    "--search --search-families topk,topk": "argument --search-families: expected each at most once, some of maxmin",
    "--search --search-families topk --search-target-bits 2 --bb-ratio 0.5": (
        "--bb-ratio and --search-families exclude each other; drop one"
    ),
    "--search --search-families topk --search-target-error 4": "--search-target-error is the error of a quantizer",
    "--search --search-families eden --search-target-bits 3 --search-measure loss": (
        "--search-measure loss measures widths, and --search-families has other options; use root or square"
    ),
    "--search --search-families norm_uniform --search-target-bits 3 --search-min-bits 1": (
        "a type of --search-families norm_uniform needs at least 2 bits, one of them the sign; raise --search-min-bits"
    ),
    "--search --search-method exact --popsize 9": (
        "--popsize has no effect beside --search-method exact, which runs no differential evolution; drop one"
    ),
    "--search --search-method de --search-target-bits 3": (
        "--search-method de makes the least of the powers, and --search-target-bits asks for something else; use both "
    ),
    "--search --search-method de --search-balance": "--search-method de makes the least of the powers, and --search-b",
    "--search --search-last-steps 5 --bb-ratio 0.5": "--search-last-steps and --bb-ratio exclude each other; drop one",
    "--search --search-every 5steps --bb-ratio 0.5": (
        "--search-every 5steps needs steps whose averages are all there at their end, and --bb-ratio lets some come "
    ),
    "--search-balance": f"--search-balance {WITHOUT} --search",
    "--search-pin fc.*=8": f"--search-pin {WITHOUT} --search",
    "--search-every 3": f"--search-every {WITHOUT} --search",
    "--search-once": f"--search-once {WITHOUT} --search",
    "--search-method de": f"--search-method {WITHOUT} --search",
    "--search-measure square": f"--search-measure {WITHOUT} --search",
    "--search-last-steps 3": f"--search-last-steps {WITHOUT} --search",
    "--search --search-calibration-steps 5": (
        f"--search-calibration-steps {WITHOUT} --pretrained-weights or --evaluate"
    ),
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_a_flag_without_effect_is_refused_with_what_it_goes_with(line, capsys):
    assert error(capsys, ["DIR", *line.split()]).startswith(REFUSED[line])


@pytest.mark.parametrize(
    "line",
    [
        "--arch resnet50 -b 256 --lr 0.256 --warmup 5 --lr-schedule cosine --label-smoothing 0.1 --mixup 0.2 "
        "--mom 0.875 --wd 3e-5 --epochs 250 --amp --static-loss-scale 128 --memory-format nhwc --seed 1 -j8 -p 100 "
        "--raport-file raport.json --workspace w --gather-checkpoints --optimizer-batch-size 1024",
        "--fp16 --dynamic-loss-scale --static-loss-scale 128 --data-backend syntetic --prof 100 --no-checkpoints",
        "--evaluate --resume c.pth --epochs 3 --lr 0.5 --gather-checkpoints --label-smoothing 0.1",
        "--resume auto --pretrained-weights w.pth --run-epochs 10",
        "--resume auto --no-checkpoints --checkpoint-filename other.pth",
        "--resume auto --pretrained-weights w.pth --reset-head --num-classes 37",
        "--compression-type maxmin --quantization-bits 1 --bucket-size -1 --error-feedback --big-grad",
        "--compression-type topk --topk-ratio 0.001 --error-feedback --quantization-bits 4 --bucket-size 1024",
        "--compression-type topk_rmsprop --efx-randk 0.1 --topk-ratio 0.1 --compressor-warmup-steps 100",
        "--dgc --dgc-clip 1 --nesterov --topk-ratio 0.001 --compressor-warmup-steps 500",
        "--compression-type topk --dgc",
        "--dense-dtype bfloat16",
        "--dense-dtype bfloat16 --bb-ratio 0.5 --compression-type maxmin --compressor-warmup-steps 9",
        "--dense-dtype bfloat16 --hvd --dgc --compressor-warmup-steps 9",
        "--dense-dtype bfloat16 --hvd --compression-type maxmin",
        "--powersgd-rank 4 --compressor-warmup-steps 10",
        "--compression-type svd --powersgd-rank 2",
        "--bb-ratio 0.9 --bb-num-parallel-steps 3 --hvd",
        "--bb-ratio 1 --compression-type 1bit --compressor-warmup-steps 9 --nesterov --amp --dynamic-loss-scale",
        "--bb-ratio 0.1 --search --error-feedback",
        "--search --popsize 50 --search-iterations 5 --search-alpha 1 --search-beta 2 --quantization-bits 8",
        "--search --pretrained-weights w.pth --search-calibration-steps 3 --search-target-bits 3.5",
        "--search --evaluate --search-calibration-steps 3 --resume c.pth --compression-type quantile "
        "--search-min-bits 1",
        "--compression-scheme s.json --compression-type norm_uniform --second-hop-bits 6",
        "--search --compression-scheme s.json --search-target-bits 4 --search-pin fc.*=8 --search-pin *.conv1.*=2-4",
        "--search --search-target-error 4 --search-measure loss --search-loss-batches 9 --search-every 500steps",
        "--search --search-balance --search-measure square --search-once --search-every 3 --search-last-steps 10",
        "--search --search-balance --search-measure root --search-method exact",
        "--search --search-target-error 4 --search-objective time --simulate hosts=2,link=1gbit --search-every 9steps",
        "--search --search-target-error 4 --search-objective time --simulate hosts=2,ranks=2,link=1gbit "
        "--hierarchical off",
        "--advise --simulate hosts=2,ranks=2,link=1gbit --hierarchical off --training-only",
        "--search --search-method de --search-beta 405 --popsize 50",
        "--image-size 32 --crop-scale 0.6 --hflip 0 --skip-bad-images --device cpu --threads 2 --timeout 60",
    ],
)
def test_sensible_recipes_are_accepted(line):
    parse(line)


@pytest.mark.parametrize("option", [o for o in LISTED + EXTENSIONS if o.default not in (False, None)], ids=str)
def test_a_default_spelled_out_is_never_refused(option):
    flag = next(flag for flag in option.spellings.split() if flag.startswith("--"))
    main.parse(["DIR", f"{flag}={option.default}"])


@pytest.mark.parametrize("words", ["0", "-1", "1.5", "steps", "5step", "0steps", "1000000001", "x", "²", "5 steps"])
def test_an_interval_is_a_number_of_epochs_or_of_steps(words, capsys):
    assert [parse(f"--search --search-every {good}").search_every for good in ("2", "02", "500steps")] == [
        "2", "2", "500steps",
    ]  # fmt: skip
    assert error(capsys, ["DIR", f"--search-every={words}"]) == (
        "argument --search-every: expected a number of epochs, or of optimizer steps as in 500steps, from 1 to "
        f"1000000000, got {words!r}"
    )


def test_pins_add_up_in_their_order():
    assert parse("--search --search-pin a=3 --search-pin b.*=4-8").search_pin == ["a=3", "b.*=4-8"]
    assert parse("--search").search_pin is None


def test_search_and_schemes_quantize_by_maxmin_where_no_type_is_given():
    assert parse("--search").compression_type == "maxmin"
    assert parse("--compression-scheme f.json").compression_type == "maxmin"
    assert parse("").compression_type == "none"


# Launchers

TORCHRUN = (
    "torchrun, once a host: torchrun --nnodes HOSTS --nproc_per_node RANKS --rdzv_backend c10d --rdzv_endpoint "
    "FIRST_HOST:29500 main.py ..."
)


def test_the_launchers_environment_wins_over_its_flag(monkeypatch, capsys):
    assert parse("--local_rank 3").local_rank == 3
    assert parse("--local-rank=3").local_rank == 3
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parse("--local-rank 3").local_rank == 1
    assert parse("").local_rank == 1
    monkeypatch.setenv("LOCAL_RANK", "one")
    assert error(capsys, ["DIR"]) == (
        "LOCAL_RANK in the environment: expected an integer from 0 to 1000000000, got 'one'"
    )


def test_the_total_batch_is_a_multiple_of_all_ranks_batches(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    parse("-b 64 --optimizer-batch-size 512")
    assert error(capsys, ["DIR", "-b64", "--optimizer-batch-size", "320"]) == (
        "--optimizer-batch-size 320 is no multiple of ranks x --batch-size = 4 x 64 = 256"
    )
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("HOROVOD_SIZE", "5")
    monkeypatch.setenv("HOROVOD_RANK", "0")
    flags = parse("-b 64 --optimizer-batch-size 320 --hvd")
    with pytest.raises(ValueError, match=r"= 3 x 64 = 192$"):
        main.check_world(flags, 3)


@pytest.mark.parametrize(
    ("arguments", "rank", "size", "starter", "command"),
    [
        ([], "HOROVOD_RANK", "HOROVOD_SIZE", "horovodrun", "use horovodrun -np 3 python main.py --hvd ..."),
        (["--hvd"], "RANK", "WORLD_SIZE", "torchrun", "drop --hvd, or use horovodrun -np 3 python main.py --hvd ..."),
        ([], "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "srun", f"where that is meant, or use {TORCHRUN}"),
        ([], "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "mpirun", f"where that is meant, or use {TORCHRUN}"),
    ],
)
def test_processes_that_would_train_apart_are_refused_and_the_first_says_it_for_all(
    arguments, rank, size, starter, command, monkeypatch, capsys
):
    monkeypatch.setattr(main.launchers, "PARTING_SECONDS", 0)
    monkeypatch.setenv(size, "3")
    monkeypatch.setenv(rank, "0")
    line = error(capsys, ["DIR", *arguments])
    assert line.startswith(f"{starter} started 3 processes")
    assert line.endswith(command)
    monkeypatch.setenv(rank, "1")
    with pytest.raises(SystemExit) as stopped:
        main.parse(["DIR", *arguments])
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "")


BY_TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
ALONE = "main.py: error: argument --epochs: expected an integer from 1 to 1000000000, got '0'\n"


def started_as(environment, *arguments):
    """The program as a process, with the variables that a launcher sets for it."""
    command, pipe = [sys.executable, "main.py", *arguments], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True)


def test_a_rank_that_is_alone_with_its_mistake_says_it(monkeypatch, capsys):
    """Others have said it by the time that the launcher leaves it."""
    monkeypatch.setattr(main.launchers, "PARTING_SECONDS", 0)
    for name, value in BY_TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert error(capsys, ["DIR", "--epochs", "0"]) == ALONE.removeprefix("main.py: error: ").rstrip()


def catches(process, number):
    """Whether a process has a handler for a signal."""
    [mask] = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_rank_that_the_launcher_ends_with_the_first_is_silent_and_keeps_its_status(tmp_path):
    rank = started_as(BY_TORCHRUN | {main.launchers.ERROR_FILE: str(tmp_path / "error")}, "DIR", "--epochs", "0")
    while rank.poll() is None and not catches(rank, signal.SIGTERM):
        time.sleep(0.01)
    rank.terminate()
    assert rank.communicate(timeout=900) == ("", "")
    assert rank.returncode == 2
    assert json.loads((tmp_path / "error").read_text())["message"]["message"] == ALONE.rstrip()


# What is shown of the flags


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([
    "--lr 0.5", "--wd 0", "-b 8", "-p 3", "--arch resnet18", "--error-feedback --compression-type topk", "--hvd",
    "--search", "--amp --opt-level O2", "--workspace=with/a\\ space", "--local_rank 1", "--epochs 90", "--mom .5",
    "--search-pin fc.*=8", "--search-pin -x=3", "--search-every 5steps", "--search-balance",
    "--data-backend synthetic", "--run-epochs 2", "--seed 0", "--workspace=-x", "--static-loss-scale 8 --fp16",
])))  # fmt: skip
def test_the_command_line_that_is_shown_gives_the_same_flags(words):
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            flags = main.parse(["DIR", *shlex.split(" ".join(words))])
    except SystemExit:
        return
    program, *shown = shlex.split(main.as_typed(flags).removesuffix(", all flags at their defaults"))
    again = main.parse(shown)
    assert program == "main.py"
    as_shown = {"given": (), "idle": {}, "local_rank": 0}
    assert vars(again) | as_shown == vars(flags) | as_shown
    assert not again.idle
    defaults = vars(main.parse(["DIR"]))
    assert not [name for name in again.given if name != "data" and getattr(again, name) == defaults[name]]


def test_only_what_differs_from_the_defaults_is_shown():
    assert main.as_typed(parse("")) == "main.py DIR, all flags at their defaults"
    assert main.as_typed(parse("--epochs 90 --wd 0 --nesterov")) == "main.py DIR --weight-decay 0.0 --nesterov"


def test_the_version_is_no_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.parse(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"gradwire {compression.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", compression.__version__)


def test_help_is_not_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.parse(["--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: main.py [-h] ")


HEAVY = ("torch", "torchvision", "numpy", "scipy", "PIL", "numba")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("--help", 0),
        ("--version", 0),
        ("DIR --bogus", 2),
        ("DIR --efx-bits 4", 2),
        ("DIR --raport-file model_best.pth.tar", 2),
    ],
)
def test_a_command_line_is_explained_and_refused_without_torch(arguments, status):
    program = (
        "import sys\n"
        "import main\n"
        "try:\n"
        f"    main.main({arguments.split()})\n"
        "finally:\n"
        f"    print('loaded:', *({{*sys.modules}} & {{*{HEAVY}}}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
