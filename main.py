"""Train ImageNet-style classifiers on many ranks with compressed gradients.

The one entry of the program, to be read from top to bottom. Its sections:

    errors        how one line reaches the user, however many ranks have it
    types         values that a flag may have
    parser        every flag, and how a command line is read
    cross-checks  which flags go together
    plan          from flags to what a run depends on, complete before anything starts
    builders      from flags to objects: compressor, model, data, logs
    advice        what to send, measured and predicted before a training
    run           one run: four steps that build it, and the loop over epochs
    resume        a run's checkpoint, and how a run goes on from one
    entry         ranks join, run, and fail together

Everything below this file takes plain values: the parsed namespace never leaves it. The packages load their modules on
use, so that a command line is read, checked and refused without torch.
"""

from __future__ import annotations

import sys

# Python 3.14 has a package `compression` too. Where something at its start has imported that one, ours takes its place.
if "attach" not in dir(sys.modules.get("compression")):
    sys.modules.pop("compression", None)

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import secrets
import shlex
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import compression
import image_classification as classification
import search
from compression.network import launchers

if TYPE_CHECKING:
    from torch import Tensor, nn

# Flags that are options of compressors, and the registry's names of these.
OPTIONS = {
    "quantization_bits": "bits",
    "bucket_size": "bucket_size",
    "error_feedback": "error_feedback",
    "compressor_warmup_steps": "warmup_steps",
    "powersgd_rank": "rank",
    "topk_ratio": "ratio",
    "second_hop_bits": "second_hop_bits",
    "efx_bits": "efx_bits",
    "efx_randk": "efx_randk",
    "big_grad": "big_grad",
    "dgc_clip": "clip",
    "dense_dtype": "dense_dtype",
}

# Settings that --search-families chooses among; quantizers have their widths.
KEPT_BY_TOPK, RANKS_OF_POWERSGD = (0.001, 0.003, 0.01, 0.03, 0.1), (1, 2, 4, 8)
NO_QUANTIZERS = ("topk", "powersgd")

# Compressors that a flag of their own chooses.
CHOSEN_BY = {"powersgd": "--powersgd-rank", "dgc": "--dgc"}

# Options of the libraries whose flags have other names; all others are flags' names.
FLAG_OF = {option: flag for flag, option in OPTIONS.items()} | {
    "accumulation": "optimizer_batch_size",
    "backend": "dist_backend",
    "barrier_fraction": "bb_ratio",
    "iterations": "prof",
    "late_steps": "bb_num_parallel_steps",
    "without_momentum": "dgc",
}

# How ranks are started so that they know of each other.
START = {
    compression.TORCHRUN: "torchrun, once a host: torchrun --nnodes HOSTS --nproc_per_node RANKS --rdzv_backend c10d "
    "--rdzv_endpoint FIRST_HOST:29500 main.py ...",
    compression.HOROVODRUN: "horovodrun -np {size} python main.py --hvd ...",
}

PROGRAM = "gradwire"
ADVICE = "advice.json"  # in the workspace, of --advise
IN_LEVELS = {"auto": None, "on": True, "off": False}  # what --hierarchical says to `attach`
STATISTICS = "gradient_stats.jsonl"  # in the workspace, of --compression-type stats


def spelled(name: str) -> str:
    """A flag as users write it."""
    return "--" + name.replace("_", "-")


def in_flags(message: str, flags: argparse.Namespace) -> str:
    """A library's message for users of the command line.

    Libraries know no flags: they name their options in backquotes, such as `batch_size`. Here, and nowhere else, these
    become flags.
    """

    def flag(match: re.Match[str]) -> str:
        name = FLAG_OF.get(match[1], match[1])
        return spelled(name) if hasattr(flags, name) else match[0]

    return re.sub("`([a-z0-9_]+)`", flag, message)


# Errors


def tell(error: str, *, aloud: bool = True, follows: bool = False) -> None:
    """The one line of an error, on standard error where it is said aloud, and in any case for torchrun's summary.

    `follows`: another rank has the cause.
    """
    line = f"main.py: error: {' '.join(error.splitlines())}"
    if aloud:
        print(line, file=sys.stderr, flush=True)
    launchers.note_failure(line, follows=follows)


def tell_before_ranks_have_met(error: str) -> None:
    """Likewise, of an error with exit status 2 that other ranks are likely to have, too: one of them says it.

    A rank that a while later is still there is alone with its error.
    """
    tell(error, aloud=launchers.speaks_first())
    if not launchers.speaks_first():
        launchers.let_the_first_speak(status=2)
        tell(error)


# Types


def number(kind: Callable[[str], Any], rule: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type for the numbers of one kind for which a rule holds."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
            if math.isfinite(value) and holds(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"expected {rule}, got {text!r}")

    return read


def integer(least: int, most: int, off: int | None = None) -> Callable[[str], Any]:
    """An argparse type for the integers of a range; `off` is one more, which turns something off."""
    rule = f"an integer from {least} to {most}" + ("" if off is None else f", or {off}")
    return number(int, rule, lambda n: least <= n <= most or n == off)


def between(least: float, most: float) -> Callable[[str], Any]:
    """An argparse type for the numbers of a range."""
    return number(float, f"a number from {least:g} to {most:g}", lambda x: least <= x <= most)


# Largest values are far above any use and far below what the arithmetic of the libraries cannot hold.
bit_width = integer(1, 8)
count = integer(1, 10**9)
count_or_off = integer(1, 10**9, off=-1)
count_or_none = integer(0, 10**9)
few = integer(1, 1024)
few_or_none = integer(0, 1024)
million = integer(1, 10**6)
pixels = integer(1, 2**14)
seed = integer(0, 2**32 - 1)  # what numpy seeds with
amount = between(0, 1e38)  # what float32 holds
concentration = between(0, 1000)
scale = between(1e-9, 1e9)
bits_a_value = number(float, "a number above 0 and at most 128", lambda x: 0 < x <= 128)
fraction = number(float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
below_one = number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)
patience = number(float, "a number of seconds from 1 to 1000000000", lambda x: 1 <= x <= 1e9)
probability = between(0, 1)


def interval(value: str) -> str:
    """An argparse type: a number of epochs, or of steps as in 500steps."""
    digits, most = value.removesuffix("steps"), 10**9
    if not digits.isdecimal() or not digits.isascii() or not 1 <= int(digits[:20]) <= most:
        rule = f"a number of epochs, or of optimizer steps as in 500steps, from 1 to {most}"
        raise argparse.ArgumentTypeError(f"expected {rule}, got {value!r}")
    return value.replace(digits, str(int(digits)))


def families(value: str) -> str:
    """An argparse type: compressors that a search chooses among, by name, with commas between them."""
    names, known = value.split(","), (*compression.with_bits(), *NO_QUANTIZERS)
    if not set(names) <= set(known) or len(set(names)) < len(names):
        rule = f"each at most once, some of {', '.join(known)}, with commas between them"
        raise argparse.ArgumentTypeError(f"expected {rule}, got {value!r}")
    return value


def cluster(value: str) -> str:
    """An argparse type: a cluster in words."""
    try:
        compression.cluster_of(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def text(value: str) -> str:
    """An argparse type for names of files and folders: anything but nothing."""
    if not value:
        raise argparse.ArgumentTypeError("expected a name, got ''")
    return value


def data_backend(name: str) -> str:
    """An argparse type: an alias stands for the spelling that recipes use."""
    return classification.data.ALIASES.get(name, name)


# Parser


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line and exit status 2; `--help` shows the usage."""

    def error(self, message: str) -> NoReturn:
        tell_before_ranks_have_met(message)
        self.exit(2)


class Repeated(argparse.Action):
    """A flag that may be given several times; its value is the list of all."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else ()), value])


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults of flags that have a value of their own without being given.

    Each spelling of a flag is followed by its value, as every Python before 3.13 shows it.
    """

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join(f"{spelling} {value}" for spelling in action.option_strings)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        with_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if with_default else action.help


def build_parser() -> argparse.ArgumentParser:
    """Every flag, in the order in which the usage line shows them: groups take turns, extensions come last."""
    parser = OneLineParser(prog="main.py", description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    group = parser.add_argument_group
    model, optimization = group("data and model"), group("optimization")
    precision, run = group("precision"), group("run control and output")
    ranks, encoding = group("ranks"), group("gradient compression")
    widths = group("bit-width search")

    add = model.add_argument
    parser.add_argument("data", metavar="DIR", type=text,
                        help="folder with train/CLASS/* and val/CLASS/*, or the word digits: the embedded "
                        "data set of handwritten digits")
    add("--data-backend", metavar="BACKEND", type=data_backend, choices=tuple(classification.data.BACKENDS),
        default=classification.data.DEFAULT_BACKEND,
        help=f"data backend: {' | '.join(classification.data.BACKENDS)}; synthetic is an alias (default: %(default)s; "
        "pytorch where DALI is not installed)")
    add("--arch", "-a", metavar="ARCH", choices=tuple(classification.models.ARCHITECTURES), default="resnet50",
        help=f"model architecture: {' | '.join(classification.models.ARCHITECTURES)}")
    add("--model-config", "-c", metavar="CONF", choices=tuple(classification.models.MODEL_CONFIGS), default="classic",
        help=f"initialization: {' | '.join(classification.models.MODEL_CONFIGS)}")
    add("--num-classes", metavar="N", type=million, default=1000, help="number of classes")
    add("-j", "--workers", metavar="N", type=few_or_none, default=5,
        help="loader processes per rank, or DALI threads")

    add = optimization.add_argument
    add("--epochs", metavar="N", type=count, default=90, help="epochs of the whole training")
    add("--run-epochs", metavar="N", type=count_or_off, default=-1,
        help="stop this run after N epochs, never past --epochs (default: %(default)s, at --epochs)")
    add("-b", "--batch-size", metavar="N", type=million, default=256, help="images per rank")
    add("--optimizer-batch-size", metavar="N", type=count_or_off, default=-1,
        help="images per optimizer step over all ranks, by gradient accumulation: a multiple of ranks x "
        "--batch-size (default: %(default)s, one batch of each rank)")
    add("--lr", "--learning-rate", metavar="LR", type=amount, default=0.1,
        help="learning rate before the schedule")
    add("--lr-schedule", metavar="SCHEDULE", choices=("step", "linear", "cosine"), default="step",
        help="learning rate over the epochs: step (x0.1 at 30, 60 and 80), linear, cosine")
    add("--warmup", metavar="E", type=count_or_none, default=0,
        help="epochs of linear warm-up, fewer than --epochs")
    add("--label-smoothing", metavar="S", type=below_one, default=0.0,
        help="fraction of each training label that is spread over all classes")
    add("--mixup", metavar="ALPHA", type=concentration, default=0.0,
        help="mix pairs of training images by Beta(ALPHA, ALPHA); 0 is off")
    add("--momentum", metavar="M", type=below_one, default=0.9, help="momentum of SGD")
    add("--weight-decay", "--wd", metavar="W", type=amount, default=1e-4, help="weight decay")
    add("--bn-weight-decay", action="store_true", help="decay the parameters of batch norms too")
    add("--nesterov", action="store_true", help="Nesterov's form of momentum")

    add = run.add_argument
    add("--print-freq", "-p", metavar="N", type=count, default=10, help="iterations between lines")
    add("--resume", metavar="PATH", type=text,
        help="go on from this checkpoint; the word auto takes the newest good one of --workspace and "
        "starts anew where there is none")
    add("--pretrained-weights", metavar="PATH", type=text,
        help="start from these weights: a state dict, a .safetensors file, or a checkpoint of this program, of "
        "torchvision's or of timm's")

    add = precision.add_argument
    add("--fp16", action="store_true",
        help="half-precision model with float32 batch norms and master weights")
    add("--static-loss-scale", type=scale, default=1,
        help="constant loss scale, with --fp16 or --amp; a power of 2 is exact")
    add("--dynamic-loss-scale", action="store_true",
        help="let the loss scale follow the gradients, with --fp16 or --amp; overrides --static-loss-scale")
    run.add_argument("--prof", metavar="N", type=count_or_off, default=-1,
                     help="run the first N iterations of each epoch only (default: %(default)s, all)")
    add("--amp", action="store_true", help="automatic mixed precision as --opt-level says")

    add = run.add_argument
    add("--seed", type=seed, help="seed of everything random; without it, runs differ")
    add("--gather-checkpoints", action="store_true",
        help="also keep checkpoint-{epoch+1}.pth.tar of epochs below 10 and of every tenth, counted from 0")
    add("--raport-file", type=text, default="experiment_raport.json",
        help="file of --workspace that gets all metrics as JSON lines")
    add("--evaluate", action="store_true", help="one validation pass, no training")
    add("--training-only", action="store_true", help="no validation")
    add("--no-checkpoints", action="store_true", help="write no checkpoints")
    add("--checkpoint-filename", type=text, default="checkpoint.pth.tar",
        help="checkpoint of the last epoch, in --workspace")
    add("--workspace", metavar="DIR", type=text, default="./",
        help="folder of all files that are written, made where missing")
    model.add_argument("--memory-format", choices=("nchw", "nhwc"), default="nchw",
                       help="memory layout of the model and the batches; nhwc is channels-last")
    add("--tensorboard-dir", type=text, help="folder for TensorBoard's event files")
    precision.add_argument("--opt-level", choices=("O0", "O1", "O2", "O3"), default="O1",
                           help="with --amp: O0 float32, O1 autocast, O2 half-precision weights with float32 "
                           "batch norms and master weights, O3 all half precision")

    add = ranks.add_argument
    add("--hvd", action="store_true", help="average through Horovod, under horovodrun")
    add("--bb-ratio", type=fraction,
        help="broken barrier: a step waits for the first layers that hold this fraction of the squared gradient "
        "norm, and applies the others' averages late; without it, a step waits for all")
    add("--bb-num-parallel-steps", type=few, default=10,
        help="with --bb-ratio: steps by which a late average is late")

    add = encoding.add_argument
    add("--compression-type", default="none",
        choices=tuple(name for name, row in compression.COMPRESSORS.items() if row.listed),
        help="encoding of the gradients (default: %(default)s; maxmin with --search or "
        "--compression-scheme)")
    add("--quantization-bits", type=bit_width, default=4,
        help="bits per value, 1 to 8, for types that have bits; with --search the widths before the "
        "first search")
    add("--bucket-size", type=count_or_off, default=512,
        help="values of a layer that share one scale, -1 for the whole layer; layers with fewer values are not "
        "encoded")
    add("--error-feedback", action="store_true", help="add the error of an encoding to the next step's gradient")
    add("--efx-bits", type=bit_width,
        help="with top-k, in place of --error-feedback: send the dropped values too, in this many bits")
    add("--efx-randk", type=fraction,
        help="with top-k, in place of --error-feedback: send this fraction of the dropped values too, drawn at "
        "random")
    add("--topk-ratio", type=fraction, default=0.01, help="with top-k or --dgc: fraction of values sent")
    add("--big-grad", action="store_true",
        help="encode and average all gradients as one tensor after backward")
    add("--dgc", action="store_true", help="deep gradient compression: top-k with momentum correction")
    add("--compressor-warmup-steps", type=count_or_none, default=0,
        help="optimizer steps that encode nothing before compression begins; with --dgc the steps over which the "
        "fraction sent falls")
    ranks.add_argument("--local_rank", "--local-rank", type=count_or_none, default=0,
                       help="rank on this machine, given by the launcher; LOCAL_RANK in the environment wins")
    add("--powersgd-rank", type=few,
        help="PowerSGD of this rank; with --compression-type svd its rank (default: 4 with svd)")

    add = widths.add_argument
    add("--search", action="store_true", help="search a bit width for each layer after each epoch")
    add("--search-alpha", type=scale, default=0.5, help="power of the error in the objective")
    add("--search-beta", type=scale, default=0.5, help="power of the compression ratio in the objective")
    add("--search-max-bits", type=bit_width, default=8, help="largest width, 1 to 8")
    add("--search-min-bits", type=bit_width, default=2, help="smallest width, 1 to 8")
    add("--popsize", type=few, default=5, help="population of the differential evolution, per layer")
    add("--search-iterations", type=count_or_none, default=2,
        help="generations after the first: popsize x layers x (iterations + 1) evaluations")

    def extension(group: argparse._ArgumentGroup, *names: str, help: str, **options: Any) -> None:
        group.add_argument(*names, help=f"(extension) {help}", **options)

    extension(model, "--image-size", metavar="PIXELS", type=pixels, default=224, help="side of the square crop")
    extension(model, "--crop-scale", metavar="SHARE", type=fraction, default=0.08,
              help="least fraction of the image's area in a random crop")
    extension(model, "--hflip", metavar="P", type=probability, default=0.5,
              help="probability that a training image is flipped")
    extension(model, "--skip-bad-images", action="store_true",
              help="leave out images that cannot be read, and say which, in place of stopping")
    extension(run, "--reset-head", action="store_true",
              help="with --pretrained-weights: draw the final classifier anew, for other classes than they know")
    extension(run, "--save-weights", metavar="FILE", type=text,
              help="write the model's weights alone after each epoch, or after --evaluate, as FILE.safetensors")
    extension(run, "--deterministic", action="store_true", help="deterministic kernels only")
    extension(optimization, "--compile", action="store_true", help="torch.compile the model")
    extension(ranks, "--device", choices=("auto", "cpu", "cuda"), default="auto",
              help="where to train; auto takes a GPU where there is one")
    extension(ranks, "--dist-backend", choices=("auto", "gloo", "nccl"), default="auto",
              help="torch.distributed's backend; auto takes nccl on GPUs and gloo on CPUs")
    extension(ranks, "--hierarchical", choices=("auto", "on", "off"), default="auto",
              help="add up inside a host in float32 and average between hosts in codes; auto does where hosts have "
              "as many ranks each, two or more, and the type encodes")
    extension(ranks, "--ranks-per-host", metavar="N", type=few,
              help="with --hierarchical: take each host as several of so many ranks (default: found)")
    extension(ranks, "--timeout", metavar="SECONDS", type=patience, default=900,
              help="how long ranks wait for all to have come, and from then on for one that shows no sign of life")
    extension(ranks, "--threads", metavar="N", type=few,
              help="threads that compute in each rank's process (default: the cores that it may use, divided by the "
              "ranks on its host)")
    extension(ranks, "--check-replicas", metavar="STEPS", type=count_or_off, default=100,
              help="optimizer steps after which the ranks' weights, bit widths and step counts are compared, as they "
              "are with each checkpoint; -1 compares them with checkpoints alone")
    extension(ranks, "--verify-wire", action="store_true",
              help="put a checksum on every message, and stop at one that arrives damaged, naming its sender")
    extension(encoding, "--second-hop-bits", metavar="BITS", type=bit_width,
              help="bits per value of averages on their way back, for types that have bits (default: those of the "
              "gradients)")
    extension(encoding, "--dgc-clip", metavar="NORM", type=scale,
              help="with --dgc: clip each rank's gradient to this norm before momentum")
    extension(encoding, "--dense-dtype", choices=("float32", "bfloat16"), default="float32",
              help="numbers as which values travel that are not encoded: all with --compression-type none, those of "
              "small layers with the others")
    extension(encoding, "--advise", action="store_true",
              help="train nothing: measure this model, batch and network for some tens of seconds, predict the step "
              "of every compressor, and say which flags to use; writes advice.json and advice.png")
    extension(encoding, "--simulate", metavar="CLUSTER", type=cluster,
              help="with --advise or --search-objective time: for a cluster that is not there, as in 'hosts=16 ranks=8 "
              "link=25gbit latency=50us'; "
              f"keys: {', '.join(compression.CLUSTER_KEYS)}")
    extension(encoding, "--advise-from", metavar="FILE", type=text,
              help="with --simulate: take the times of a model and of codecs from an advice.json that was written "
              "elsewhere, and measure nothing")
    extension(widths, "--compression-scheme", metavar="FILE", type=text,
              help="train with the widths of a compress_scheme_N.json that a search wrote")
    extension(widths, "--search-calibration-steps", metavar="STEPS", type=count, default=20,
              help="with --search and --pretrained-weights: steps of the calibration pass before the first search")
    extension(widths, "--search-target-bits", metavar="BITS", type=bits_a_value,
              help="with --search: least error with at most this many bits a value on average")
    extension(widths, "--search-target-error", metavar="BITS", type=bit_width,
              help="with --search: fewest bytes with at most the error that all layers have at this width")
    extension(widths, "--search-objective", choices=("bytes", "time"), default="bytes",
              help="with --search-target-error: what is least within the error, the bytes, or the step time that "
              "--advise would predict")
    extension(widths, "--search-balance", action="store_true",
              help="with --search: least (1 + squared error / squared norm) x bytes, which has no knob")
    extension(widths, "--search-measure", choices=("root", "square", "loss"), default="root",
              help="with --search: what the total error is a sum of: the layers' norms of errors, their squares, or "
              "changes of the loss that are measured")
    extension(widths, "--search-pin", metavar="PATTERN=BITS", type=text, action=Repeated,
              help="with --search: width of the layers whose names match, as in 'fc.*=8', or its bounds, as in "
              "'fc.*=4-8'; may be given several times, and the last that matches counts")
    extension(widths, "--search-method", choices=("de", "exact", "both"), default="both",
              help="differential evolution, whose finding is installed then, the exact optimum, or the better of both")
    extension(widths, "--search-every", metavar="N", type=interval, default="1",
              help="epochs from one search to the next, or optimizer steps, as in 500steps")
    extension(widths, "--search-once", action="store_true", help="search the first time only, and keep the widths")
    extension(widths, "--search-last-steps", metavar="N", type=count,
              help="with --search: measure errors on the mean of the last N gradients (default: on their running sum "
              "m = 0.8 m + g)")
    extension(widths, "--search-loss-batches", metavar="N", type=few, default=2,
              help="with --search-measure loss: training batches on which the loss is measured, the same for all "
              "layers and widths")
    extension(widths, "--search-families", metavar="NAMES", type=families,
              help="with --search: choose for each layer among widths of quantizers, fractions kept by topk, ranks of "
              "powersgd and float32, as in maxmin,eden,topk,powersgd, in place of the widths of one type")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {compression.__version__}",
                        help="(extension) show the version and exit")
    return parser


def parse(argv: Sequence[str] | None = None) -> Plan:
    """The plan of a command line that is read and cross-checked, by default of this process's own.

    With `--search` or `--compression-scheme` and no `--compression-type`, the type is maxmin. Exits with status 2 and
    one line on stderr where something is wrong.
    """
    parser = build_parser()
    defaults = vars(parser.parse_args(["DIR"]))
    absent = object()
    argv = sys.argv[1:] if argv is None else argv
    read = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, absent))))
    given = {name: value for name, value in read.items() if value is not absent}
    flags = argparse.Namespace(**defaults | given, given=tuple(sorted(given)))
    launcher = launcher_of(flags)
    try:
        flags.local_rank = from_environment(launcher.local_rank, count_or_none, flags.local_rank)
        if (flags.search or flags.compression_scheme) and "compression_type" not in given:
            flags.compression_type = "maxmin"
        changed = {name for name, value in given.items() if value != defaults[name]}
        check(flags, changed, launcher.started_this_process())
        check_world(flags, from_environment(launcher.size, count, 1))
    except ValueError as error:
        parser.error(str(error))
    if apart := launcher.apart():
        refuse_apart(apart, flags)
        parser.exit(2)
    return plan_of(flags, defaults)


def as_typed(flags: argparse.Namespace) -> str:
    """The command line that gives these flags: those that differ from their defaults, on any rank."""
    defaults = vars(build_parser().parse_args(["DIR"]))
    words = []
    for name, default in defaults.items():
        value, flag = getattr(flags, name), spelled(name)
        if name not in ("data", "local_rank") and value != default:
            for each in value if isinstance(value, list) else [value]:
                takes_one = not str(each).startswith("-")  # or it would be read as a flag
                words += [flag] if each is True else [flag, str(each)] if takes_one else [f"{flag}={each}"]
    return shlex.join(["main.py", flags.data, *words]) + ("" if words else ", all flags at their defaults")


def launcher_of(flags: argparse.Namespace) -> compression.Launcher:
    """The launcher that the flags count on."""
    return compression.HOROVODRUN if flags.hvd else compression.TORCHRUN


def refuse_apart(apart: launchers.Apart, flags: argparse.Namespace) -> None:
    """Say why processes would train apart, and the command that starts them together: all know, and the first says."""
    way_together = f"{apart.message} {START[apart.launcher].format(size=apart.size)}"
    tell(in_flags(way_together, flags), aloud=apart.rank == 0)
    if apart.rank != 0:
        launchers.let_the_first_speak(status=2)


def from_environment(name: str, kind: Callable[[str], int], default: int) -> int:
    """A variable of a launcher's environment, or the default. Raises ValueError where it is not of this kind."""
    try:
        return kind(os.environ.get(name, str(default)))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name} in the environment: {error}") from error


# Cross-checks


def refuse(wrong: Any, message: str) -> None:
    """Raise ValueError with a message where something is wrong."""
    if wrong:
        raise ValueError(message)


def check(flags: argparse.Namespace, changed: set[str], launched: bool) -> None:
    """Hold the flags against one another; `changed` names those that differ from their defaults.

    A flag that could have no effect is an error that names the flags it needs: nothing that a user set is
    silently ignored. A default spelled out is never refused, nor is what recipes and sweeps repeat: of that a line is
    told (`without_effect`). `launched`: a launcher has started this process, perhaps among others.

    Raises ValueError, one line that names the flags and the way out.
    """
    def goes_with(names: str, useful: Any, what: str) -> None:
        for name in names.split():
            refuse(name in changed and not useful, f"{spelled(name)} has no effect without {what}")

    def useless_beside(names: str, other: Any, what: str) -> None:
        for name in names.split():
            refuse(name in changed and other, f"{spelled(name)} has no effect beside {what}; drop one")

    def only_one(names: str) -> None:
        chosen = [spelled(name) for name in names.split() if name in changed]
        refuse(len(chosen) > 1, f"{' and '.join(chosen)} exclude each other; drop one")

    # files
    refuse(flags.save_weights and not flags.save_weights.endswith(".safetensors"),
           f"--save-weights writes a .safetensors file, got '{flags.save_weights}'; end its name so")

    # optimization and precision
    refuse(flags.warmup >= flags.epochs, f"--warmup {flags.warmup} must be below --epochs {flags.epochs}")
    refuse(flags.nesterov and not flags.momentum, "--nesterov needs a --momentum above 0")
    only_one("amp fp16")
    goes_with("opt_level", flags.amp, "--amp")
    goes_with("static_loss_scale dynamic_loss_scale", flags.amp or flags.fp16, "--fp16 or --amp")

    # data, devices and ranks
    goes_with("crop_scale hflip skip_bad_images", flags.data_backend != "syntetic",
              "images; choose a --data-backend that reads them")
    refuse(flags.device == "cpu" and flags.data_backend == "dali-gpu",
           "--data-backend dali-gpu needs a GPU, and --device is cpu; use dali-cpu")
    refuse(flags.device == "cpu" and flags.dist_backend == "nccl",
           "--dist-backend nccl needs a GPU, and --device is cpu; use gloo")
    only_one("hvd dist_backend")
    ranks = "other ranks; start some, as with torchrun --nproc_per_node 2"
    goes_with("dist_backend ranks_per_host verify_wire", launched, ranks)
    goes_with("hierarchical", launched or flags.simulate, ranks)
    goes_with("bb_num_parallel_steps", flags.bb_ratio, "--bb-ratio")
    only_one("bb_ratio big_grad")
    goes_with("ranks_per_host", flags.hierarchical != "off", "two levels; drop --hierarchical off")

    # advice
    goes_with("simulate", flags.advise or flags.search_objective == "time", "--advise or --search-objective time")
    goes_with("advise_from", flags.advise and flags.simulate, "--advise and --simulate")
    for name in ("evaluate", "search", "resume", "compression_scheme", "bb_ratio", "save_weights"):
        refuse(flags.advise and name in changed, f"--advise trains nothing, and {spelled(name)} is of no use to it; "
                                                 "drop one")
    refuse(flags.advise and flags.hierarchical == "on",
           "--advise tells whether two levels are faster, and --hierarchical on leaves it no choice; drop it")
    refuse(flags.advise and not launched and not flags.simulate,
           "nothing travels: advice needs the number of ranks or --simulate; start some, as with torchrun "
           "--nproc_per_node 2")

    # run control
    only_one("evaluate training_only")
    only_one("no_checkpoints gather_checkpoints")
    goes_with("checkpoint_filename", not flags.no_checkpoints or flags.resume == "auto",
              "checkpoints; drop --no-checkpoints")
    refuse(Path(flags.checkpoint_filename).name != flags.checkpoint_filename,
           f"--checkpoint-filename {flags.checkpoint_filename} is a path, and a name is needed; "
           "choose the folder with --workspace")
    goes_with("reset_head", flags.pretrained_weights, "--pretrained-weights")
    useless_beside("pretrained_weights", goes_on(flags), "--resume PATH, whose checkpoint has all weights")
    check_files(flags)

    # compression
    kind, row = flags.compression_type, compression.COMPRESSORS[flags.compression_type]
    for flag, asked in (("--search", flags.search), ("--compression-scheme", flags.compression_scheme)):
        refuse(asked and not row.has_bits,
               f"{flag} chooses bit widths, and --compression-type {kind} has none; "
               f"use {', '.join(compression.with_bits())}")
    refuse(flags.dgc and kind not in ("none", "topk"),
           f"--dgc is a top-k, and --compression-type is {kind}; use topk")
    refuse(flags.powersgd_rank and kind not in ("none", "svd"),
           f"--powersgd-rank goes with --compression-type none or svd, got {kind}")
    only_one("dgc powersgd_rank")
    only_one("dgc error_feedback efx_bits efx_randk")
    refuse(flags.powersgd_rank and flags.big_grad and kind == "none",
           "--powersgd-rank factors each layer's matrix, and --big-grad leaves one long vector; drop one")
    chosen = compressor_name(flags)
    chosen_row, chosen_by = compression.COMPRESSORS[chosen], CHOSEN_BY.get(chosen, f"--compression-type {chosen}")
    for name, option in OPTIONS.items():
        others = [CHOSEN_BY.get(other, other) for other, row in compression.COMPRESSORS.items() if option in row.takes]
        refuse(name in changed and option not in chosen_row.takes,
               f"{spelled(name)} has no effect with {chosen_by}; use {', '.join(others)}")
    over_horovod = flags.hvd and flags.dense_dtype == "bfloat16"
    refuse(over_horovod and chosen_row.all_reduces,
           f"--dense-dtype bfloat16 with {chosen_by} is a sum of bfloat16, which Horovod has not; drop --hvd or "
           "--dense-dtype, or use a type whose messages are bytes, such as maxmin")
    refuse(over_horovod and flags.compressor_warmup_steps and not chosen_row.own_warmup,
           "--dense-dtype bfloat16 with --compressor-warmup-steps is a sum of bfloat16, which Horovod has not; drop "
           "one of --hvd, --dense-dtype and --compressor-warmup-steps")
    refuse(flags.verify_wire and not chosen_row.sends_messages,
           f"--verify-wire puts checksums on messages, and what {chosen_by} sends the network itself adds up; drop it, "
           "or use a type whose messages are bytes, such as maxmin")
    refuse(flags.bb_ratio and not chosen_row.supports_stale_updates,
           f"--bb-ratio lets the averages of some layers come late, and {chosen_by} settles whole steps; "
           f"use {', '.join(compression.with_stale_updates())}")

    # search
    goes_with("search_alpha search_beta search_max_bits search_min_bits popsize search_iterations "
              "search_target_bits search_calibration_steps search_target_error search_balance search_measure "
              "search_pin search_method search_every search_once search_last_steps search_loss_batches "
              "search_families search_objective",
              flags.search, "--search")
    goes_with("search_objective", flags.search_target_error, "--search-target-error")
    by_time = flags.search_objective == "time"
    refuse(by_time and flags.search_families,
           "--search-objective time searches among bit widths, and --search-families among others; drop one")
    refuse(by_time and flags.bb_ratio,
           "--search-objective time predicts steps that wait for all averages, and --bb-ratio lets some come late; "
           "drop one")
    refuse(by_time and not launched and not flags.simulate,
           "nothing travels: --search-objective time needs the number of ranks or --simulate; start some, as with "
           "torchrun --nproc_per_node 2")
    check_families(flags, changed)
    goes_with("search_calibration_steps", flags.pretrained_weights or flags.evaluate,
              "--pretrained-weights or --evaluate")
    only_one("search_target_bits search_target_error search_balance")
    useless_beside("search_alpha search_beta", flags.search_target_bits,
                   "--search-target-bits, which asks for the least error within a budget")
    useless_beside("search_alpha search_beta", flags.search_target_error,
                   "--search-target-error, which asks for the fewest bytes within an error")
    useless_beside("search_alpha search_beta", flags.search_balance, "--search-balance, which has no powers")
    check_measure_of_search(flags)
    goes_with("search_loss_batches", flags.search_measure == "loss", "--search-measure loss")
    useless_beside("popsize search_iterations", flags.search_method == "exact",
                   "--search-method exact, which runs no differential evolution")
    wish = next((name for name in WISHES if getattr(flags, name)), None)
    refuse(flags.search_method == "de" and wish,
           f"--search-method de makes the least of the powers, and {spelled(wish or '')} asks for something else; use "
           "both or exact")
    only_one("search_last_steps bb_ratio")
    refuse(flags.bb_ratio and flags.search_every.endswith("steps"),
           f"--search-every {flags.search_every} needs steps whose averages are all there at their end, and --bb-ratio "
           "lets some come late; give a number of epochs")
    only_one("search big_grad")
    only_one("search second_hop_bits")
    only_one("compression_scheme big_grad")
    only_one("compression_scheme quantization_bits")
    refuse(flags.search_min_bits > flags.search_max_bits,
           f"--search-min-bits {flags.search_min_bits} is above --search-max-bits {flags.search_max_bits}")
    least = "search_min_bits" if flags.search else "quantization_bits"
    for name in (least, "second_hop_bits"):
        refuse(row.has_bits and (getattr(flags, name) or row.min_bits) < row.min_bits,
               f"--compression-type {kind} needs at least {row.min_bits} bits, one of them the sign; "
               f"raise {spelled(name)}")


def check_families(flags: argparse.Namespace, changed: set[str]) -> None:
    """Refuse what a search among families cannot do, or has no use for."""
    if not flags.search_families:
        return
    for name in ("compression_type", "search_pin", "search_method", "popsize", "search_iterations", "second_hop_bits",
                 "compression_scheme", "bb_ratio", "verify_wire"):
        refuse(name in changed, f"{spelled(name)} and --search-families exclude each other; drop one")
    refuse(flags.search_measure == "loss",
           "--search-measure loss measures widths, and --search-families has other options; use root or square")
    refuse(not any(getattr(flags, name) for name in WISHES),
           "--search-families needs a limit or a balance, for errors of 0 are among its options; add "
           "--search-target-bits, --search-target-error or --search-balance")
    names = flags.search_families.split(",")
    quantizers = [compression.COMPRESSORS[name] for name in names if name not in NO_QUANTIZERS]
    refuse(flags.search_target_error and not quantizers,
           "--search-target-error is the error of a quantizer, and --search-families names none; add one")
    refuse(flags.hvd and flags.dense_dtype == "bfloat16",
           "--dense-dtype bfloat16 with --search-families is a sum of bfloat16, which Horovod has not; drop --hvd or "
           "--dense-dtype")
    least = max((row.min_bits for row in quantizers), default=1)
    refuse(min(flags.search_min_bits, flags.quantization_bits) < least,
           f"a type of --search-families {flags.search_families} needs at least {least} bits, one of them the sign; "
           "raise --search-min-bits or --quantization-bits")


WISHES = ("search_target_bits", "search_target_error", "search_balance")
"""Flags that ask a search for something else than the least of the powers."""


def check_measure_of_search(flags: argparse.Namespace) -> None:
    """Refuse errors that do not go with what a search is asked for, or that no such run can measure."""
    least, most, error = flags.search_min_bits, flags.search_max_bits, flags.search_target_error
    refuse(error and not least <= error <= most,
           f"--search-target-error {error} is the error at a width that is searched, {least} to {most}; give one of "
           "them, or search more")
    if flags.search_measure != "loss":
        return
    refuse(flags.search_balance,
           "--search-balance weighs squared errors, and --search-measure is loss; use square, or --search-target-bits")
    refuse(not (flags.search_target_bits or error),
           "--search-measure loss has changes of either sign, and powers need errors above 0; add --search-target-bits "
           "or --search-target-error")
    refuse(flags.lr == 0, "--search-measure loss measures steps of --lr, which is 0; raise it, or use square")
    refuse(flags.fp16 or (flags.amp and flags.opt_level in ("O2", "O3")),
           "--search-measure loss moves weights by less than half precision can tell; drop --fp16 or --opt-level, or "
           "use square")


def goes_on(flags: argparse.Namespace) -> bool:
    """Whether the run begins with a checkpoint, whatever the workspace holds."""
    return flags.resume not in (None, "auto")


def check_files(flags: argparse.Namespace) -> None:
    """Refuse flags by which two files are one, or one is both read and written anew, or one is a pipe.

    Raises ValueError, one line that names the flags, and the way out.
    """
    for name in ("checkpoint_filename", "raport_file"):
        refuse(classification.copies.is_name_of_copy(Path(getattr(flags, name)).name),
               f"{spelled(name)} {getattr(flags, name)} is a name that copies of checkpoints get; "
               "choose another name")
    workspace = Path(flags.workspace)
    files = {
        "--raport-file": workspace / flags.raport_file,
        "--checkpoint-filename": workspace / flags.checkpoint_filename,
        "the gradient statistics": workspace / STATISTICS,
        "--save-weights": flags.save_weights,
        "--resume": None if flags.resume == "auto" else flags.resume,
        "--pretrained-weights": flags.pretrained_weights,
        "--compression-scheme": flags.compression_scheme,
        "--advise-from": flags.advise_from,
        "the advice in --workspace": workspace / ADVICE if flags.advise else None,
    }
    folders = {"--workspace": flags.workspace, "--tensorboard-dir": flags.tensorboard_dir}
    for name, path in (files | folders).items():
        refuse(path and (Path(path).is_fifo() or Path(path).is_socket()),
               f"{name}: {path} is a pipe or a socket, and whoever opens it waits; choose another name")
    paths = {name: Path(path).resolve() for name, path in files.items() if path}
    for (one, path), (other, same) in itertools.combinations(paths.items(), 2):
        refuse(path == same and not {one, other} <= {"--checkpoint-filename", "--resume", "--pretrained-weights"},
               f"{one} and {other} are one file, {path}; choose another name")


def check_world(flags: argparse.Namespace, world_size: int) -> None:
    """Hold the flags against the number of ranks.

    Raises ValueError where `--optimizer-batch-size` is no multiple of ranks x batch, or asks predictions for steps of
    several batches.
    """
    batch, total = world_size * flags.batch_size, flags.optimizer_batch_size
    for asked, who, needs in ((flags.advise, "--advise", "advice needs"),
                              (flags.search_objective == "time", *["--search-objective time"] * 2)):
        refuse(asked and world_size == 1 and not flags.simulate,
               f"nothing travels: {needs} the number of ranks or --simulate; start two or more")
        refuse(asked and total > batch,
               f"{who} predicts steps of one batch a rank, {batch} images, and --optimizer-batch-size {total} makes "
               "them of several; drop it, or raise --batch-size")
    refuse(total != -1 and total % batch,
           f"--optimizer-batch-size {total} is no multiple of ranks x --batch-size = {world_size} x "
           f"{flags.batch_size} = {batch}")


# Plan


class Plan(argparse.Namespace):
    """Flags as one run depends on them, from before it starts until it ends.

    `given` holds the sorted names of those that the command line spells out. `idle` says of those that have no effect
    beside the others why; here they have their defaults, so that nothing can depend on what they were.
    """

    def __init__(self, **flags: Any) -> None:
        vars(self).update(flags)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"a plan is complete before anything starts, and {name} does not change")


def plan_of(flags: argparse.Namespace, defaults: Mapping[str, Any]) -> Plan:
    """The plan of flags that go together."""
    why = without_effect(flags)
    idle = {name: why[name] for name in flags.given if name in why and getattr(flags, name) != defaults[name]}
    given = tuple(name for name in flags.given if name not in idle)
    return Plan(**vars(flags) | {name: defaults[name] for name in idle} | {"given": given, "idle": idle})


TRAINING = (
    "epochs run_epochs optimizer_batch_size lr_schedule warmup mixup momentum weight_decay bn_weight_decay nesterov "
    "print_freq static_loss_scale dynamic_loss_scale gather_checkpoints no_checkpoints quantization_bits "
    "second_hop_bits efx_bits efx_randk topk_ratio big_grad dgc dgc_clip compressor_warmup_steps powersgd_rank "
    "compression_scheme bb_ratio bb_num_parallel_steps check_replicas verify_wire search_every search_once"
)
"""Flags that count in training alone."""

NOT_ADVISED = (
    "epochs run_epochs optimizer_batch_size lr lr_schedule warmup mixup print_freq gather_checkpoints no_checkpoints "
    "checkpoint_filename prof training_only raport_file tensorboard_dir compression_type quantization_bits "
    "second_hop_bits bucket_size error_feedback efx_bits efx_randk topk_ratio big_grad dgc dgc_clip "
    "compressor_warmup_steps powersgd_rank dense_dtype check_replicas verify_wire"
)
"""Flags that count in training, and not in an advice, which tries all compressors at their usual settings."""

IN_THE_FILE = (
    "data_backend arch model_config num_classes workers batch_size image_size crop_scale hflip skip_bad_images "
    "label_smoothing momentum weight_decay bn_weight_decay nesterov pretrained_weights reset_head static_loss_scale "
    "dynamic_loss_scale amp opt_level fp16 memory_format compile deterministic seed ranks_per_host"
)
"""Flags that count where an advice measures a model on its ranks, and not where a file has what was measured."""

CALIBRATION = "crop_scale hflip label_smoothing compression_type bucket_size error_feedback dense_dtype"
"""Flags that count in training, and where a search passes over training images."""


def without_effect(flags: argparse.Namespace) -> dict[str, str]:
    """Flags that have no effect beside the others and go along with them all the same, by name, and why.

    Recipes, sweeps and command lines that are run again with one flag more hold them.
    """
    why: dict[str, str] = {}

    def idle(names: str, so: Any, reason: str) -> None:
        why.update(dict.fromkeys(names.split() if so else (), reason))

    compressor = compression.COMPRESSORS[compressor_name(flags)]
    idle("lr_schedule warmup", flags.lr == 0, "with --lr 0")
    idle("bn_weight_decay", flags.weight_decay == 0, "with --weight-decay 0")
    idle("bn_weight_decay", flags.arch in ("vgg16", "resnet18_convex"), f"with --arch {flags.arch}, which trains no "
         "batch norm")
    idle("model_config", flags.pretrained_weights and not flags.reset_head,
         "with --pretrained-weights, which are all weights")
    idle("model_config", goes_on(flags), "with --resume, whose checkpoint has all weights")
    idle("workers", flags.data_backend == "syntetic", "with --data-backend syntetic, which loads nothing")
    idle("static_loss_scale", flags.dynamic_loss_scale, "with --dynamic-loss-scale")
    idle("bb_num_parallel_steps", flags.bb_ratio == 1, "with --bb-ratio 1, which lets nothing be late")
    idle("compression_type", flags.dgc, "with --dgc, which is a top-k")
    idle("error_feedback", compressor.needs_feedback, "with a compressor that always has it")
    idle(TRAINING, flags.evaluate, "with --evaluate")
    idle(NOT_ADVISED, flags.advise, "with --advise")
    idle(IN_THE_FILE, flags.advise_from, "with --advise-from, whose file holds what was measured")
    idle("checkpoint_filename", flags.evaluate and flags.resume != "auto", "with --evaluate")
    idle(CALIBRATION, flags.evaluate and not flags.search, "with --evaluate")
    idle("lr", flags.evaluate and flags.search_measure != "loss", "with --evaluate")
    idle("popsize search_iterations", flags.search_measure == "loss",
         "with --search-measure loss, whose errors may be negative")
    return why


def in_one_line(idle: Mapping[str, str]) -> str:
    """A sentence about flags that have no effect, by reason."""
    reasons = {why: [spelled(name) for name in idle if idle[name] == why] for why in idle.values()}
    return "no effect: " + "; ".join(f"{', '.join(names)} {why}" for why, names in reasons.items())


# Builders


def compressor_name(flags: argparse.Namespace) -> str:
    """The registry's name of the compressor that the flags ask for."""
    if flags.dgc:
        return "dgc"
    return "powersgd" if flags.powersgd_rank and flags.compression_type == "none" else flags.compression_type


def compressor_of(flags: Plan) -> compression.Compressor:
    """The compressor that the flags ask for, with those of the flags that it takes."""
    if flags.search_families:
        names = flags.search_families.split(",")
        options = shared_options(flags, names[0])
        if compression.COMPRESSORS[names[0]].has_bits:
            options["bits"] = flags.quantization_bits
        return compression.mixed({}, (names[0], options), whole_layers="powersgd" in names)
    if flags.compression_scheme and (names := [*search.families_in(flags.compression_scheme)]):
        first = "maxmin"  # which the scheme replaces before the first step
        return compression.mixed({}, (first, shared_options(flags, first)), whole_layers="powersgd" in names)
    name = compressor_name(flags)
    takes = compression.COMPRESSORS[name].takes
    names = OPTIONS | {"momentum": "momentum", "nesterov": "nesterov"}
    options = {option: getattr(flags, flag) for flag, option in names.items() if option in takes}
    return compression.build(name, **{option: value for option, value in options.items() if value is not None})


def shared_options(flags: Plan, family: str) -> dict[str, Any]:
    """The options of a family that the flags give to all families which take them."""
    row = compression.COMPRESSORS[family]
    names = ("bucket_size", "error_feedback", "compressor_warmup_steps", "dense_dtype")
    always = {"error_feedback"} if row.needs_feedback else set()
    return {OPTIONS[name]: getattr(flags, name) for name in names if OPTIONS[name] in {*row.takes} - always}


def family_options(flags: Plan) -> tuple[search.Option, ...]:
    """What a search among families chooses from for each layer, float32 first."""
    names = ("none", *flags.search_families.split(","))
    widths = range(flags.search_min_bits, flags.search_max_bits + 1)
    common = {name: shared_options(flags, name) for name in names}
    return search.options_of(common, widths, KEPT_BY_TOPK, RANKS_OF_POWERSGD)


WISH_IN_FLAGS = {
    "objective": "--search-alpha {alpha:g} --search-beta {beta:g}",
    "bits": "--search-target-bits {target:g}",
    "error": "--search-target-error {target:g}",
    "balance": "--search-balance",
    "time": "--search-target-error {target:g} --search-objective time",
}


def search_space(flags: Plan) -> dict[str, Any]:
    """What a search is asked for, and the choices that it has."""
    if flags.search_target_bits:
        wish = search.Wish.bits(flags.search_target_bits)
    elif flags.search_target_error:
        within = search.Wish.time if flags.search_objective == "time" else search.Wish.error
        wish = within(flags.search_target_error)
    elif flags.search_balance:
        wish = search.Wish.balance()
    else:
        wish = search.Wish.objective(flags.search_alpha, flags.search_beta)
    return {
        "wish": wish,
        "widths": range(flags.search_min_bits, flags.search_max_bits + 1),
        "by": "square" if flags.search_balance else flags.search_measure,
        "pins": flags.search_pin or (),
    }


def build_model(
    flags: Plan, seed: int, tell: Callable[[str], None] = lambda line: None
) -> nn.Module:
    """The network with its first weights: seeded, then those of --pretrained-weights, of which a line may be told."""
    classification.reproducibility.seed_everything(seed)
    model = classification.models.build(flags.arch, flags.model_config, flags.num_classes)
    if flags.pretrained_weights:
        path = Path(flags.pretrained_weights)
        weights = classification.checkpoints.load_weights(path, tell)
        head = classification.models.head_of(model)
        classification.checkpoints.load_into(model, weights, path, head=head, reset_head=flags.reset_head)
    return model


def build_data(
    flags: Plan, seed: int, ranks: compression.World, *, alike: bool = False, validation: bool = True
) -> tuple[classification.data.Loader, classification.data.Loader]:
    """The train and the validation loader of this rank; with `alike`, a train loader of the same images on all.

    Without `validation`, its images need not be there.
    """
    backend, warning = classification.data.resolve_backend(
        flags.data_backend if "data_backend" in flags.given else None
    )
    if warning and ranks.rank == 0:
        print(warning, file=sys.stderr)
    options = classification.data.DataOptions(
        root=classification.data.root(flags.data),
        backend=backend,
        seed=seed,
        image_size=flags.image_size,
        crop_scale=flags.crop_scale,
        hflip=flags.hflip,
        batch_size=flags.batch_size,
        workers=flags.workers,
        rank=0 if alike else ranks.rank,
        world_size=1 if alike else ranks.size,
        num_classes=flags.num_classes,
        memory_format=classification.precision.MEMORY_FORMATS[flags.memory_format],
        device=ranks.device,
        skip_bad_images=flags.skip_bad_images,
        training=not flags.evaluate or flags.search,
        validation=validation and not flags.training_only and not alike,
    )
    return classification.data.build(options)


def build_precision(flags: Plan, ranks: compression.World) -> classification.precision.Precision:
    """Types of the weights and of the arithmetic, and the loss scale."""
    return classification.precision.Precision.choose(
        ranks.device,
        amp=flags.amp,
        opt_level=flags.opt_level,
        fp16=flags.fp16,
        static_loss_scale=flags.static_loss_scale,
        dynamic_loss_scale=flags.dynamic_loss_scale,
    )


def build_optimizer(
    flags: Plan,
    module: nn.Module,
    precision: classification.precision.Precision,
    without_momentum: frozenset[str],
) -> classification.precision.MixedPrecisionOptimizer:
    """SGD on the trainable parameters; those named have no momentum of the optimizer's."""
    groups = classification.optim.parameter_groups(
        module,
        weight_decay=flags.weight_decay,
        bn_weight_decay=flags.bn_weight_decay,
        without_momentum=without_momentum,
    )
    sgd = functools.partial(classification.optim.sgd, lr=flags.lr, momentum=flags.momentum, nesterov=flags.nesterov)
    return classification.precision.MixedPrecisionOptimizer(groups, sgd, precision)


def build_logger(
    flags: Plan, ranks: compression.World, iterations: int, start: classification.logs.Step
) -> classification.logs.Logger:
    """All sinks on rank 0, none elsewhere. `start` is where the run goes on."""
    logs = classification.logs
    if ranks.rank != 0:
        return logs.Logger()
    sinks: list[classification.logs.Sink] = [logs.Terminal(iterations)]
    if flags.tensorboard_dir:
        sinks.append(logs.TensorBoard(Path(flags.tensorboard_dir), iterations, start))
    # Last: it takes the place of an earlier run's, which must not happen where another sink fails.
    sinks.append(logs.Raport(Path(flags.workspace) / flags.raport_file, start))
    return logs.Logger(*sinks)


# Advice


def advise_among(flags: Plan, ranks: compression.World) -> int:
    """Measure, predict and say what to send; rank 0 prints and writes. Returns the exit status.

    Nothing in the workspace is touched before all is known, and nothing is trained.
    """
    if flags.advise_from:
        with ranks.fail_together():
            measured = advice_of_file(flags.advise_from)
            found = compression.on_paper(
                measured,
                flags.simulate,
                hierarchical=IN_LEVELS[flags.hierarchical],
                all_reduces_bfloat16=not flags.hvd,
            )
    else:
        found = measured_advice(flags, ranks)
    in_words = functools.partial(flags_of, several=found.cluster.hosts > 1 and found.cluster.ranks_per_host > 1)
    if ranks.rank == 0:
        print(found.in_words(in_words), flush=True)
    with ranks.fail_together():
        if ranks.rank == 0:
            workspace = Path(flags.workspace)
            workspace.mkdir(parents=True, exist_ok=True)
            content = json.dumps(found.to_json(in_words), indent=1, allow_nan=False).encode() + b"\n"
            written = {workspace / ADVICE: content, workspace / "advice.png": found.plot()}
            for path, content in written.items():
                with classification.atomic.replacing(path) as file:
                    file.write(content)
            print("wrote " + " ".join(map(str, written)), flush=True)
    return 0


def measured_advice(flags: Plan, ranks: compression.World) -> compression.Advice:
    """The advice on this model, with real batches and the optimizer at a learning rate of 0, which changes nothing."""
    if flags.deterministic:
        classification.reproducibility.use_deterministic_kernels()
    seed = flags.seed if flags.seed is not None else ranks.control.broadcast(secrets.randbelow(2**32))
    with ranks.fail_together():
        loader, _ = build_data(flags, seed, ranks, validation=False)
        module = build_model(flags, seed)
        module.train()
        classification.models.check_input_shape(module, flags.batch_size, flags.image_size)
        classification.training.last_iteration(len(loader))
    classification.reproducibility.seed_everything(seed + ranks.rank)
    precision = build_precision(flags, ranks)
    precision.convert(module, flags.memory_format)
    if flags.compile:
        module.compile()
    model = ranks.replicate(module)
    optimizer = build_optimizer(flags, module, precision, frozenset())
    optimizer.set_lr(0.0)
    finite = next(module.parameters()).detach().new_ones(()).bool()
    loss = classification.losses.training_loss(flags.label_smoothing)
    batches = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())

    def step() -> None:
        images, labels = next(batches)
        optimizer.scaled(loss(precision.logits(model, images), labels)).backward()

    try:
        return compression.advise(
            model,
            step,
            ranks.gradients,
            simulate=flags.simulate,
            update=lambda: optimizer.step(finite),
            hierarchical=IN_LEVELS[flags.hierarchical],
            ranks_per_host=None if ranks.groups else flags.ranks_per_host,
            groups=ranks.groups,
            all_reduces_bfloat16=not flags.hvd,
        )
    except ValueError as error:  # of all ranks alike
        raise compression.Failure(compression.one_line(error)) from error
    finally:
        loader.close()


def advice_of_file(path: str) -> compression.Measured:
    """What an advice.json says was measured. Raises ValueError where it is none."""
    try:
        content = json.loads(Path(path).read_text())["measured"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"--advise-from {path} is no advice.json ({type(error).__name__}); choose another") from error
    try:
        return compression.Measured.from_json(content)
    except ValueError as error:
        raise ValueError(f"--advise-from {path}: {error}") from error


def flags_of(choice: compression.Choice, several: bool) -> list[str]:
    """The flags that train with a choice. `several`: whether there are hosts of several ranks each."""
    compressor = choice.compressor
    options, words = dict(choice.given), []
    if compressor.name not in CHOSEN_BY:
        words += ["--compression-type", compressor.name]
    elif compressor.name == "dgc":
        words += ["--dgc"]
    for name in ("bits", "rank", "ratio"):
        if name in compressor.option_values:
            options.setdefault(name, compressor.option_values[name])
    for name, value in options.items():
        flag = spelled(FLAG_OF.get(name, name))
        words += [flag] if value is True else [flag, str(value)]
    if several and compressor.encodes:
        words += ["--hierarchical", "on" if choice.hierarchical else "off"]
    return words


# Run


class Run:
    """One run of the program on this rank: everything the flags build, and the loop over epochs."""

    # Orders
    flags: Plan
    ranks: compression.World
    workspace: Path
    seed: int
    iterations: int | None  # of each epoch at most
    accumulation: int  # batches of a rank in one optimizer step
    snapshot: Snapshot
    resumed: bool  # from a checkpoint

    # Data and model
    train_loader: classification.data.Loader
    val_loader: classification.data.Loader
    precision: classification.precision.Precision
    module: nn.Module  # the network itself
    model: nn.Module  # called forward: the network, or DDP around it

    # Exchange and optimizer
    compressor: compression.Compressor
    exchange: compression.Attached
    optimizer: classification.precision.MixedPrecisionOptimizer

    # Position: epochs done, and batches done of the next one
    epoch: int
    iteration: int
    best: float  # top-1, percent
    trained: bool  # the epoch's steps are all done, and its search and validation are still to come
    steps: int  # of this process
    interruption: classification.interruption.Interruption | None  # None in an evaluation

    # Logs
    log: classification.logs.Logger
    written: list[Path]
    said: set[str]  # the unreadable images that were named
    summary: dict[str, float]  # metrics of the last epoch
    sent: compression.Report  # by the steps of this epoch
    measured: compression.Measured | None  # what steps are predicted from, where a search is for their time
    timeline: search.Timeline | None  # their seconds at each width
    searches: dict[str, search.SearchResult]  # of this process, by the name in their files, on rank 0

    # Search
    searched: bool  # by this run or the one that it goes on with
    examples: list[tuple[Tensor, Tensor]]  # on which the loss is measured, once there are any

    def __init__(self, flags: Plan, ranks: compression.World) -> None:
        """Build everything. Nothing in the workspace is touched before all ranks have built all of it."""
        self.flags, self.ranks = flags, ranks
        self.workspace = Path(flags.workspace)
        self.iterations = None if flags.prof == -1 else flags.prof
        total = flags.optimizer_batch_size
        self.accumulation = 1 if total == -1 else total // (ranks.size * flags.batch_size)
        self.epoch, self.iteration, self.best = 0, 0, 0.0
        self.trained, self.steps, self.interruption = False, 0, None
        self.said = set()
        self.sent = compression.Report()
        self.searches, self.searched, self.examples = {}, False, []
        self.snapshot = Snapshot(flags, ranks)
        saved = self.snapshot.load()
        self.resumed = saved is not None
        fresh = ranks.control.broadcast(secrets.randbelow(2**32))
        self.seed = flags.seed if flags.seed is not None else saved["seed"] if saved else fresh
        # Before the random states are set: how many steps this takes depends on the time they take.
        self.measured = None
        if flags.search_objective == "time":
            self.measured = self.snapshot.measured(saved) or measured_advice(flags, ranks).measured
        self._build_data_and_model()
        self._build_exchange_and_optimizer()
        self._resume(saved)
        if flags.evaluate and not flags.pretrained_weights and not self.resumed:
            self.say("random weights are scored: no --pretrained-weights were given, and no checkpoint to --resume")
        self._open_logs(saved)

    def _build_data_and_model(self) -> None:
        """First step: the loaders and the converted network, seeded by rank from then on.

        The ranks agree once all that a host's files, memory or packages can spoil is built: images, weights, the
        sizes of a batch. The next step takes the network's collectives, in which a rank that failed would be missing.
        """
        flags = self.flags
        if flags.deterministic:
            classification.reproducibility.use_deterministic_kernels()
        with self.ranks.fail_together():
            self.train_loader, self.val_loader = build_data(flags, self.seed, self.ranks)
            self.module = build_model(flags, self.seed, self.say)
            self.module.train(not flags.evaluate or flags.search)
            classification.models.check_input_shape(self.module, flags.batch_size, flags.image_size)
            self.compressor = compressor_of(flags)
            loaders = {"training": self.train_loader, "validation": self.val_loader}
            images = {name: loader.fingerprint() if self.ranks.size > 1 else {} for name, loader in loaders.items()}
        for name, fingerprint in images.items():
            remedy = "give all hosts the same files, unpacked to their end"
            self.ranks.check_equal_across_ranks(fingerprint, f"the {name} images of {flags.data}", remedy)
        # Dropout and the like differ by rank; what must be equal on all ranks is drawn elsewhere.
        classification.reproducibility.seed_everything(self.seed + self.ranks.rank)
        self.precision = build_precision(flags, self.ranks)
        self.precision.convert(self.module, flags.memory_format)
        if flags.compile:
            self.module.compile()

    def _build_exchange_and_optimizer(self) -> None:
        """Second step: replicas, whose gradients a compressor averages, and the optimizer that steps them.

        The ranks agree once the bit widths are known to fit the layers: a scheme is a file, and each rank reads its
        own. Only an exchange that is complete can take up the state in a checkpoint.
        """
        flags, ranks = self.flags, self.ranks
        self.model = ranks.replicate(self.module)
        try:
            self.exchange = compression.attach(
                self.model,
                self.compressor,
                ranks.gradients,
                self.seed,
                hierarchical=IN_LEVELS[flags.hierarchical],
                ranks_per_host=None if ranks.groups else flags.ranks_per_host,
                groups=ranks.groups if self.compressor.encodes else None,
                barrier_fraction=flags.bb_ratio or 1.0,
                late_steps=flags.bb_num_parallel_steps,
                record=flags.search,
                verify_wire=flags.verify_wire,
            )
        except ValueError as error:  # of all ranks alike, which have told one another of their hosts
            raise compression.Failure(compression.one_line(error)) from error
        self.optimizer = build_optimizer(flags, self.module, self.precision, self.exchange.without_momentum)
        with ranks.fail_together():
            compressed = [layer for layer in self.exchange.layers if layer.compressed]
            refuse(
                flags.search and not compressed,
                f"--search chooses widths of compressed layers, and no layer has a bucket of {flags.bucket_size} "
                "values; lower --bucket-size",
            )
            takes = compression.COMPRESSORS[compressor_name(flags)].takes
            if "bucket_size" in takes and not compressed:
                self.say(f"nothing is compressed: no layer has a bucket of {flags.bucket_size} values")
            if flags.search_families:
                space = search_space(flags)
                tables = search.option_tables(self.exchange, None, family_options(flags), space["by"])
                search.search_options(tables, space["wish"])
            elif flags.search:
                search.check_search(self.exchange, **search_space(flags))
            self.timeline = self._timeline()
            if flags.compression_scheme:
                needing, names = ([layer.name for layer in some] for some in (compressed, self.exchange.layers))
                self._take_scheme(flags.compression_scheme, needing, names)
        if flags.compression_scheme:
            remedy = f"copy --compression-scheme {flags.compression_scheme} of rank 0 to all hosts"
            ranks.check_equal_across_ranks(self.exchange.widths, "the bit widths", remedy)
            ranks.check_equal_across_ranks(settings_of(self.exchange.compressor), "the routes", remedy)

    def _timeline(self) -> search.Timeline | None:
        """What the seconds of a step are made of at each width, where a search is for the least of them."""
        if self.measured is None:
            return None
        cluster, by_levels = self.measured.cluster, self.exchange.levels is not None
        if self.flags.simulate:
            by_levels = min(cluster.hosts, cluster.ranks_per_host) > 1 and self.flags.hierarchical != "off"
        nbytes = {width: self.exchange.encoded_bytes_at(width) for width in search_space(self.flags)["widths"]}
        plain = compression.step_by_widths(self.measured, self.compressor, nbytes, by_levels)
        return search.Timeline.from_json(plain)

    def _take_scheme(self, path: str, compressed: Sequence[str], names: Sequence[str]) -> None:
        """Send with the widths of a scheme, or with its options of several families."""
        inside = search.families_in(path)
        if not inside:
            self.exchange.set_widths(search.load_scheme(path, compressed, names))
            return
        known = ("none", *compression.with_bits(), *NO_QUANTIZERS)
        common = {name: shared_options(self.flags, name) for name in known}
        options = search.load_options(path, compressed, common, names)
        self.exchange.reroute({name: each.route for name, each in options.items()}, ("none", common["none"]))

    def _resume(self, saved: Mapping[str, Any] | None) -> None:
        """Third step: the state of a checkpoint, where there is one, and the batch to go on with.

        The ranks agree once each has taken up its own part: until here, nothing that an earlier run left has changed.
        """
        flags, ranks = self.flags, self.ranks
        with ranks.fail_together():
            if saved:
                try:
                    self.snapshot.restore(self, saved)
                except (KeyError, IndexError) as error:
                    raise ValueError(f"something is missing in the checkpoint ({error}); choose another") from error
            if not flags.evaluate and self.epoch < flags.epochs:
                self.snapshot.align_position(self, saved.get("images_per_iteration") if saved else None)
        if flags.hvd:  # Horovod's ranks may have read files of their own
            self.optimizer.load_state_dict(ranks.control.broadcast(self.optimizer.state_dict()))
        self.summary = dict(saved.get("metrics", {})) if saved and self.trained else {}

    def _open_logs(self, saved: Mapping[str, Any] | None) -> None:
        """Fourth step: the workspace, and the files that are written along the way.

        The ranks agree once rank 0, which alone writes, could open every file: before the first step is spent.
        """
        flags, ranks = self.flags, self.ranks
        self.written = []
        with ranks.fail_together():
            if ranks.rank == 0:
                self.workspace.mkdir(parents=True, exist_ok=True)
                if flags.save_weights:
                    Path(flags.save_weights).parent.mkdir(parents=True, exist_ok=True)
            ended = saved and (flags.evaluate or self.epoch >= flags.epochs)
            start = classification.logs.END if ended else (self.epoch, self.iteration)
            self.log = build_logger(flags, ranks, self.iterations or len(self.train_loader) or 1, start)
            parameters = {name: value for name, value in vars(flags).items() if name not in ("given", "idle")}
            self.log.parameters(parameters | {"version": compression.__version__})
            self.log.line(f"running {as_typed(flags)}")
            self.log.line(self._circumstances())
            if flags.compile:
                self.log.line("torch.compile compiles in the first steps: a minute or more, less from its own cache")
            if ranks.rank == 0 and not flags.evaluate:
                path, writers = self.workspace / STATISTICS, self.log.tensorboard_writers
                if compression.observe(self.exchange.averager, path, self.exchange.step, writers):
                    self.written.append(path)
        self.log.survive(self.say)

    def _circumstances(self) -> str:
        """What the run found or drew where it was not told: ranks, network, device, threads, seed."""
        ranks, hosts = self.ranks, self.exchange.hosts
        words = f"{hosts} ranks" if hosts.ranks_per_host else str(hosts)
        inside = " (float32 sums inside hosts)" if self.exchange.levels is not None else ""
        among = "one process" if ranks.size == 1 else f"{words} over {ranks.network}{inside}, each"
        return f"{among} on {ranks.computes_on}; seed {self.seed}"

    def say(self, line: str) -> None:
        """One line for who started the run, on standard error."""
        if self.ranks.rank == 0:
            print(line, file=sys.stderr)

    # The epochs

    def execute(self) -> int:
        """Do what the flags ask for. Returns the exit status."""
        flags = self.flags
        if not flags.evaluate:
            heartbeat = self.ranks.heartbeat
            hurry = heartbeat.hurry if heartbeat else lambda: None
            self.interruption = classification.interruption.Interruption(self.ranks.store, hurry)
        if flags.search and (flags.evaluate or (flags.pretrained_weights and not self.resumed)):
            self._calibrate()
            if self._stopped("after the calibration", "nothing has been trained"):
                return self._exit_status()
            self._search("calibration")
            if self._stopped("after the first search", "nothing has been trained"):
                return self._exit_status()
        if flags.evaluate:
            self._log_epoch(self._validate() or {})
            self._save_weights()
            return self._finish()
        if self.epoch >= flags.epochs:
            self.log.line(f"nothing is left to train: --epochs is {flags.epochs}, and the checkpoint has {self.epoch}")
        last = flags.epochs if flags.run_epochs == -1 else min(flags.epochs, self.epoch + flags.run_epochs)
        self._say_where_no_search_is_due(last)
        for epoch in range(self.epoch, last):
            if not self.trained and not self._train(epoch):
                return self._exit_status()
            self.trained = False
            if self._search_is_due(epoch):
                if self._stopped(f"before the search of epoch {epoch}"):
                    return self._exit_status()
                self._search(epoch)
                if self._stopped(f"after the search of epoch {epoch}"):
                    return self._exit_status()
            metrics = {} if flags.training_only else self._validate()
            if metrics is None:
                self.log.line(f"stopped by a signal in the validation of epoch {epoch}; {self.snapshot.way_on()}")
                return self._exit_status()
            self._log_epoch(metrics)
            best = metrics.get("val.top1", 0.0) > self.best
            self.best = max(self.best, metrics.get("val.top1", 0.0))
            self.epoch, self.iteration = epoch + 1, 0
            self._save(best)
            self._save_weights()
        return self._finish()

    def _train(self, epoch: int) -> bool:
        """One epoch of training; False where a signal ended it early, with a checkpoint written."""
        flags = self.flags
        mix = None if flags.mixup == 0 else self._mix
        schedule = classification.schedules.schedule(
            flags.lr_schedule, lr=flags.lr, epochs=flags.epochs, warmup=flags.warmup
        )
        self.sent = compression.Report()
        self.summary = {}  # of this epoch, there are none yet
        self.exchange.report()
        self._record_anew()
        try:
            result = classification.training.train_epoch(
                self.model,
                self.train_loader,
                classification.losses.training_loss(flags.label_smoothing),
                self.optimizer,
                self.exchange,
                epoch=epoch,
                lr=schedule(epoch),
                start=self.iteration,
                iterations=self.iterations,
                accumulation=self.accumulation,
                world_size=self.ranks.size,
                mix=mix,
                print_freq=flags.print_freq,
                log=lambda iteration, metrics: self.log.log((epoch, iteration), {**metrics, **self._traffic()}),
                should_stop=self._should_stop,
                sum_over_ranks=self.ranks.sum,
            )
        except classification.training.NonFiniteGradientError as error:
            raise compression.Failure(str(error), status=1) from error
        self._say_skipped(self.train_loader, f"training of epoch {epoch}")
        self._traffic()
        steps = {"step.count": result.iteration // self.accumulation}
        self.summary = {**result.metrics, **steps, **self._step_times(result), **self.sent.metrics()}
        self.epoch, self.iteration = epoch, result.iteration
        if not result.finished or flags.search or not flags.training_only:  # what follows may fail, or be stopped
            self._save(best=False)
        if not result.finished:
            self._save_weights()
            where = f"after iteration {result.iteration} of epoch {epoch}"
            self.log.line(f"stopped by a signal {where}; {self.snapshot.way_on()}")
        return result.finished

    def _should_stop(self) -> bool:
        """Whether a signal ends the epoch after this step. Where one asks for a checkpoint, it is written."""
        assert self.interruption is not None
        self.steps += 1
        self.iteration += self.accumulation
        if self._search_is_due_at_step():
            self._search(f"step{self.exchange.step}")
        self._record_anew()
        if self.flags.check_replicas != -1 and self.steps % self.flags.check_replicas == 0:
            self._check_replicas()
        if self.interruption.due(self.steps):
            return True
        if self.interruption.save_due(self.steps):
            self._save(best=False)
            where = f"a signal asked for a checkpoint after iteration {self.iteration} of epoch {self.epoch}"
            self.log.line(f"{where}; {self.snapshot.way_on()}")
        return False

    def _stopped(self, where: str, way_on: str | None = None) -> bool:
        """Whether a signal has asked any rank to stop. Every rank calls it, between phases that cannot be stopped."""
        if self.interruption is None or not any(self.ranks.control.collect(self.interruption.asked())):
            return False
        self.log.line(f"stopped by a signal {where}; {way_on or self.snapshot.way_on()}")
        return True

    def _exit_status(self) -> int:
        """The status of a run that a signal stops. Every rank calls it."""
        assert self.interruption is not None
        status = self.interruption.exit_status
        self.ranks.control.collect(None)  # rank 0 may hold the store, and others may still look at it
        return status

    def _check_replicas(self) -> None:
        """Raise Failure where the ranks have drifted apart: what they would go on to is no training of one model."""
        exchange = self.exchange
        weights = {**dict(self.module.named_parameters()), **self.optimizer.masters}
        numbers = {f"the bits of {name}": bits for name, bits in exchange.widths.items()} | {"the step": exchange.step}
        if found := compression.first_difference(weights, numbers, self.ranks.control):
            name, rank = found
            raise compression.Failure(
                f"the ranks have drifted apart in the last {self.steps} steps: {name} on rank {rank} is not what it is "
                "on rank 0; look for broken memory or other libraries on its host; the last checkpoint is from before: "
                f"{self.snapshot.way_on()}",
                status=1,
            )

    def _mix(self, images: Tensor, labels: Tensor, epoch: int, iteration: int) -> tuple[Tensor, Tensor]:
        seed = (self.seed, self.ranks.rank, epoch, iteration)
        return classification.data.mixup_labels(images, labels, self.flags.num_classes, self.flags.mixup, seed)

    def _validate(self) -> dict[str, float] | None:
        """Metrics of validation; None where a signal ended it early."""
        with classification.training.averaged_batch_norm(self.module, self.ranks.sum):
            metrics = classification.training.evaluate(
                self.module,
                self.val_loader,
                self.precision,
                iterations=self.iterations,
                should_stop=lambda: self.interruption is not None and self.interruption.asked(),
                sum_over_ranks=self.ranks.sum,
            )
        self._say_skipped(self.val_loader, "validation")
        return metrics

    def _say_skipped(self, loader: classification.data.Loader, where: str) -> None:
        """Name images that some rank could not read, each once in a run, and say how often that was."""
        if not self.flags.skip_bad_images:
            return
        skipped = [image for images in self.ranks.control.collect(loader.skipped) for image in images]
        loader.skipped.clear()
        new = [image for image in dict.fromkeys(skipped) if image not in self.said]
        self.said.update(new)
        for image in new:
            self.say(f"skipped: {image}")
        if skipped:
            self.say(f"{len(skipped)} unreadable images were skipped in the {where}")

    def _traffic(self) -> dict[str, float]:
        """Bytes and seconds per step since the last call, means over ranks; `sent` adds them up."""
        report = self.exchange.report().mean(self.ranks.sum, self.ranks.size, self.ranks.device)
        self.sent += report
        return report.metrics()

    def _step_times(self, result: classification.training.EpochResult) -> dict[str, float]:
        """Where the time of a step went, mean over ranks. On a GPU nobody waits where the host's clock could tell."""
        travels = self.ranks.size > 1 or self.compressor.encodes
        measured = travels and self.ranks.device.type == "cpu" and self.sent.steps > 0
        exchange = self.sent.exposed_seconds / self.sent.steps if measured else None
        return result.step_times(self.accumulation, exchange)

    # The search

    def _calibrate(self) -> None:
        """Record gradients of some training batches; weights, buffers and averager stay as they are."""
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        loss = classification.losses.training_loss(self.flags.label_smoothing)
        self.model.train()
        steps = min(self.flags.search_calibration_steps, len(self.train_loader))
        last = min(self.flags.search_last_steps or 0, steps)
        assert self.exchange.recorder is not None
        for step, (images, labels) in enumerate(itertools.islice(self.train_loader.epoch(self.epoch), steps)):
            if step == steps - last:
                self.exchange.recorder.restart()
            with self.exchange.no_sync():
                loss(self.precision.logits(self.model, images), labels).backward()
            self.exchange.record()
            self.model.zero_grad(set_to_none=True)
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])

    def _search_is_due(self, epoch: int) -> bool:
        """Whether a search follows the training of an epoch."""
        flags = self.flags
        if not flags.search or flags.search_every.endswith("steps") or (flags.search_once and self.searched):
            return False
        return (epoch + 1) % int(flags.search_every) == 0

    def _say_where_no_search_is_due(self, last: int) -> None:
        """Tell before the first step that none of the epochs up to `last`, excluded, ends in a search or has one."""
        flags, ends = self.flags, range(self.epoch + 1, last + 1)
        if not (flags.search and ends) or (flags.search_once and self.searched):
            return
        steps = classification.training.last_iteration(
            len(self.train_loader), iterations=self.iterations, accumulation=self.accumulation
        ) // self.accumulation
        every, in_steps = int(flags.search_every.removesuffix("steps")), flags.search_every.endswith("steps")
        done = self.exchange.step
        total = done + steps * len(ends) - self.iteration // self.accumulation
        due = total // every > done // every if in_steps else any(end % every == 0 for end in ends)
        if not due:
            until = f"step {total}" if in_steps else f"epoch {last}"
            self.say(f"no search is due: this run ends with {until}, and --search-every is {flags.search_every}")

    def _search_is_due_at_step(self) -> bool:
        """Whether a search follows the step that has just ended."""
        flags = self.flags
        if not flags.search or (flags.search_once and self.searched) or not flags.search_every.endswith("steps"):
            return False
        return self.exchange.step % int(flags.search_every.removesuffix("steps")) == 0

    def _record_anew(self) -> None:
        """Begin the mean of the last gradients, where the next search is as many steps away. Called between steps."""
        flags = self.flags
        if not flags.search_last_steps or (flags.search_once and self.searched):
            return
        every, in_steps = int(flags.search_every.removesuffix("steps")), flags.search_every.endswith("steps")
        if in_steps:
            steps_between, left = every, every - self.exchange.step % every
        else:
            end = classification.training.last_iteration(
                len(self.train_loader), iterations=self.iterations, accumulation=self.accumulation
            )
            steps_between = every * (end // self.accumulation)
            left = (end - self.iteration) // self.accumulation
            left += (-(self.epoch + 1) % every) * (end // self.accumulation)
        if left == min(flags.search_last_steps, steps_between):
            assert self.exchange.recorder is not None
            self.exchange.recorder.restart()

    def _search(self, when: int | str) -> None:
        """Choose bit widths from the averaged gradients, and apply them on every rank."""
        flags = self.flags
        by_loss = flags.search_measure == "loss"
        with self.ranks.fail_together():
            if by_loss and not self.examples:
                loader, _ = build_data(flags, self.seed, self.ranks, alike=True)
                self.examples = list(itertools.islice(loader.epoch(0), flags.search_loss_batches))
                loader.close()
        if flags.search_families:
            self._search_families(when)
            return
        with self.ranks.fail_together():
            result = search.search_exchange(
                self.exchange,
                **search_space(flags),
                loss=self._loss_on_examples if by_loss else None,
                step_size=flags.lr,
                method=flags.search_method,
                popsize=flags.popsize,
                iterations=flags.search_iterations,
                seed=self.seed,
                settings={"epoch": self.epoch, "iteration": self.iteration, "last_steps": flags.search_last_steps},
                timeline=self.timeline,
                network=self.ranks.control,
            )
        self.ranks.check_equal_across_ranks(self.exchange.widths, "the bit widths")
        self.searched = True
        with self.ranks.fail_together():
            if self.ranks.rank == 0:
                self._report(result, when)

    def _search_families(self, when: int | str) -> None:
        """Choose a family and its setting for each layer likewise, and route every layer so."""
        flags, space = self.flags, search_space(self.flags)
        with self.ranks.fail_together():
            result = search.search_families(
                self.exchange,
                family_options(flags),
                space["wish"],
                by=space["by"],
                settings={"epoch": self.epoch, "iteration": self.iteration, "last_steps": flags.search_last_steps},
                network=self.ranks.control,
            )
        self.ranks.check_equal_across_ranks(settings_of(self.exchange.compressor), "the routes")
        self.searched = True
        with self.ranks.fail_together():
            if self.ranks.rank == 0:
                self._report_families(result, when)

    def _report_families(self, result: search.FamilyResult, when: int | str) -> None:
        """Write the files of a search among families, and show it."""
        names = [layer.name for layer in self.exchange.layers if not layer.compressed]
        self._write_logs(search.family_logs(result, when, names))
        self.log.line(search.families_as_text(result, when))
        step = self._step_of(str(when), result)
        self.log.detail(step, {f"search.error/{name}": error for name, error in result.error_by_layer().items()})

    def _loss_on_examples(self) -> float:
        """The loss of the model as it is, on the same images on all ranks."""
        loss = classification.losses.training_loss(self.flags.label_smoothing)
        return classification.training.mean_loss(self.module, self.examples, loss, self.precision)

    def _report(self, result: search.SearchResult, when: int | str) -> None:
        """Write a search's files, and show it. Pictures are drawn at the end: they would hold up the training."""
        names = [layer.name for layer in self.exchange.layers if not layer.compressed]
        self._write_logs(search.logs(result, when, names))
        self.searches[str(when)] = result
        self.log.line(search.as_text(result, when, WISH_IN_FLAGS))
        seconds = (result.settings["measuring_seconds"], result.settings["search_seconds"])
        self.log.line("The errors were measured in {:.2f} s, and the search took {:.2f} s.".format(*seconds))
        step = self._step_of(str(when), result)
        self.log.detail(step, {f"search.bits/{name}": bits for name, bits in result.bits_by_layer().items()})
        self.log.detail(step, {f"search.error/{name}": error for name, error in result.error_by_layer().items()})

    def _step_of(self, when: str, result: search.SearchResult | search.FamilyResult) -> classification.logs.Step:
        """What a search is a record of: an epoch, or a step within one."""
        epoch, iteration = result.settings["epoch"], result.settings["iteration"]
        return (epoch, iteration) if when.startswith("step") else (epoch,)

    def _write_logs(self, files: Mapping[str, bytes]) -> None:
        """Write files of the search, which failures to write never stop."""
        folder = self.workspace / "adapt_logs"
        with self.log.surviving(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                with classification.atomic.replacing(folder / name) as file:
                    file.write(content)
        self.written += [folder / name for name in files]

    def _draw_searches(self) -> None:
        """The pictures of all searches of this run, and of the widths over time where there were several."""
        for when, result in self.searches.items():
            picture = search.plot(result)
            self._write_logs({f"search_{when}.png": picture})
            self.log.picture(self._step_of(when, result), "search.picture", picture)
        if len(self.searches) > 1:
            over_time = search.plot_bits_over_time(self.searches)
            self._write_logs({"bits_over_time.png": over_time})
            self.log.picture((self.epoch,), "search.bits_over_time", over_time)

    # Files

    def _log_epoch(self, metrics: Mapping[str, float]) -> None:
        self.summary.update(metrics)
        if self.summary:
            self.log.log((self.epoch,), self.summary)

    def _finish(self) -> int:
        """The summary: the last epoch's metrics, and where everything was written."""
        if self.summary:
            self.log.log((), {**self.summary, "best.top1": max(self.best, self.summary.get("val.top1", 0.0))})
        self._draw_searches()
        self.log.close()
        files = [self.workspace / self.flags.raport_file, *self.written]
        self.log.line("wrote " + " ".join(str(path) for path in dict.fromkeys(files) if path.exists()))
        incomplete = self.ranks.control.broadcast([*self.log.failures.values()])
        if incomplete:
            tell(f"all is done, but what it logged is incomplete: {'; '.join(incomplete)}", aloud=self.ranks.rank == 0)
        return 1 if incomplete else 0

    def _save(self, best: bool) -> None:
        """Write a checkpoint, unless none are wanted; a second one where it is the best so far."""
        if not self.flags.no_checkpoints:
            self._check_replicas()
            self.snapshot.save(self, best)
            if self.ranks.rank == 0:
                self.written.append(self.snapshot.path)

    def _save_weights(self) -> None:
        """Write the weights that validation scores, in float32 where a step rounds them to half precision.

        Batch-norm statistics are averaged over the ranks.
        """
        if self.flags.save_weights:
            path = Path(self.flags.save_weights)
            averaged = classification.training.averaged_batch_norm(self.module, self.ranks.sum)
            with averaged, self.ranks.fail_together():
                if self.ranks.rank == 0:
                    classification.checkpoints.save_weights(self.module, path, self.optimizer.masters)
                    self.written.append(path)

    def close(self) -> None:
        """End the loaders' workers and the communication thread, and complete the logs."""
        self.log.close()
        self.exchange.close()
        self.train_loader.close()
        self.val_loader.close()


# Resume

MEMORY_RESTS_ON = ("name", "error_feedback", "bucket_size", "rank")
"""Settings of a compressor without which what it remembered means nothing, or something else."""


EVERY_VERSION_SAVES = ("state_dict", "best_prec1", "optimizer", "widths", "seed", "world_size", "ranks")
"""Keys of a checkpoint that no version of this program has left out."""


def settings_of(compressor: compression.Compressor) -> dict[str, Any]:
    """The name and the options of a compressor, as a checkpoint keeps them."""
    return {"name": compressor.name, **dataclasses.asdict(compressor.options)}


def in_words(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """Some settings of a compressor, as users write them."""
    words = []
    for name in names:
        value, flag = settings[name], spelled(FLAG_OF.get(name, name))
        if name == "name":
            words.append(CHOSEN_BY.get(value, f"--compression-type {value}"))
        else:
            words.append({True: flag, False: f"no {flag}"}[value] if isinstance(value, bool) else f"{flag} {value}")
    return " ".join(words)


class Snapshot:
    """The checkpoint of a run: its content, and the way on from it.

    The keys of its content are those of the table in `image_classification/checkpoints.py`.
    """

    def __init__(self, flags: Plan, ranks: compression.World) -> None:
        self.flags, self.ranks = flags, ranks
        self.path = Path(flags.workspace) / flags.checkpoint_filename

    def load(self) -> dict[str, Any] | None:
        """The content of the checkpoint to go on from, None where the run starts anew. Every rank calls it."""
        flags, ranks = self.flags, self.ranks
        expected = {"arch": flags.arch, "num_classes": flags.num_classes}
        path = None if flags.resume in (None, "auto") else Path(flags.resume)
        if flags.resume == "auto":
            with ranks.fail_together():
                if ranks.rank == 0:
                    found = classification.checkpoints.newest_good(
                        self.path.parent, self.path.name, expected, lambda warning: print(warning, file=sys.stderr)
                    )
                    path = found and found[0]
            path = ranks.control.broadcast(path)
        if path is None:
            return None
        with ranks.fail_together():
            saved = classification.checkpoints.load(path, expected)
            missing = [key for key in EVERY_VERSION_SAVES if key not in saved]
            refuse(missing, f"checkpoint {path} lacks {', '.join(missing)}; choose another, or load its weights alone "
                            "with --pretrained-weights")
            content = {"content": classification.checkpoints.fingerprint(path)}
        ranks.check_equal_across_ranks(content, f"checkpoint {path}", "copy that of rank 0 to all hosts")
        return saved

    def measured(self, saved: Mapping[str, Any] | None) -> compression.Measured | None:
        """What the run that wrote a checkpoint measured for its searches, where as many ranks go on, on as many hosts.

        Its searches go on with the same predictions.
        """
        kept = saved and saved.get("measured")
        if not (saved and kept) or saved["world_size"] != self.ranks.size or kept["simulate"] != self.flags.simulate:
            return None
        with self.ranks.fail_together():
            measured = compression.Measured.from_json(kept["times"])
            hosts, cluster = self.ranks.hosts(self.flags.ranks_per_host), measured.cluster
        if self.flags.simulate:
            return measured
        return measured if (cluster.hosts, cluster.ranks_per_host) == (hosts.count, max(hosts.sizes)) else None

    def save(self, run: Run, best: bool) -> None:
        """Write the state after `run.epoch` epochs and `run.iteration` iterations. Every rank calls it.

        After the last iteration of an epoch its search and validation are still to come, and its metrics go along.
        """
        flags, ranks = self.flags, self.ranks
        own = {
            "random": classification.checkpoints.random_state(),
            "buffers": {name: buffer.cpu().clone() for name, buffer in run.module.named_buffers()},
            "exchange": run.exchange.state_dict(),
        }
        everyone = ranks.control.collect(own)
        averaged = classification.training.averaged_batch_norm(run.module, ranks.sum)  # what validation scores
        with averaged, ranks.fail_together():
            if ranks.rank == 0:
                content = {
                    "epoch": run.epoch,
                    "iteration": run.iteration,
                    "images_per_iteration": flags.batch_size * ranks.size,
                    "metrics": run.summary if run.iteration else {},
                    "arch": flags.arch,
                    "num_classes": flags.num_classes,
                    "memory_format": flags.memory_format,
                    "state_dict": run.module.state_dict(),
                    "best_prec1": run.best,
                    "optimizer": run.optimizer.state_dict(),
                    "widths": run.exchange.widths,
                    "searched": run.searched,
                    "compressor": settings_of(run.exchange.compressor),
                    "seed": run.seed,
                    "world_size": ranks.size,
                    "version": compression.__version__,
                    "arithmetic": compression.ARITHMETIC,
                    "measured": run.measured and {"times": run.measured.to_json(), "simulate": flags.simulate},
                    "ranks": everyone,
                }
                classification.checkpoints.save(
                    content, self.path.parent, self.path.name, best=best, gather=flags.gather_checkpoints
                )

    def restore(self, run: Run, saved: Mapping[str, Any]) -> None:
        """Let a run go on where a checkpoint ends. Each rank's own state is restored on as many ranks.

        An evaluation takes the weights and buffers, in whatever precision it computes, and of the rest what a search
        needs: the flags of training may be others, or none. Raises ValueError where the checkpoint does not fit the
        model, the optimizer or the compressor.
        """
        flags, ranks = self.flags, self.ranks
        weights = classification.checkpoints.full_precision(saved, saved["state_dict"])
        classification.checkpoints.load_into(run.module, weights, "of the checkpoint")
        run.epoch, run.iteration, run.best = saved["epoch"], saved["iteration"], saved["best_prec1"]
        run.searched = saved.get("searched", False)
        alike = saved["world_size"] == ranks.size
        own = saved["ranks"][ranks.rank if alike else 0]
        exchange, order = own["exchange"], saved.get("memory_format", flags.memory_format)
        if flags.evaluate:
            run.optimizer.set_masters(weights)
            recorded, recorder = (exchange.get(name, {}) if flags.search else {} for name in ("recorded", "recorder"))
            exchange = {"step": exchange["step"], "averager": {}, "recorded": recorded, "recorder": recorder}
        else:
            exchange = exchange | {"averager": self._restore_what_compressors_shape(run, saved, own, alike)}
        remembers = any(exchange["averager"].values()) or exchange["recorded"] or exchange.get("late")
        refuse(
            remembers and order != flags.memory_format,
            f"the checkpoint holds values in {order} order that compression or search remember, and --memory-format "
            f"is {flags.memory_format}; resume with --memory-format {order}",
        )
        position = run.exchange.position
        run.exchange.load_state_dict(exchange | {"position": position}, ranks_alike=alike)
        for name, buffer in run.module.named_buffers():
            if alike or not buffer.is_floating_point():
                buffer.copy_(own["buffers"][name])
            else:
                buffer.copy_(sum(rank["buffers"][name] for rank in saved["ranks"]) / saved["world_size"])
        if alike:
            classification.checkpoints.set_random_state(own["random"])
        elif not flags.evaluate:
            run.say(
                f"the checkpoint is of {saved['world_size']} ranks, and these are {ranks.size}: residuals and "
                "random states are dropped, and batch-norm statistics become their averages"
            )

    def _restore_what_compressors_shape(
        self, run: Run, saved: Mapping[str, Any], own: Mapping[str, Any], alike: bool
    ) -> Mapping[str, Any]:
        """Restore the optimizer and bit widths. Returns the averager's state, as far as this run can use it.

        Another compressor than the checkpoint's begins anew, and one line says what is dropped, or kept all the same.
        """
        flags = self.flags
        was = saved.get("compressor", {}) | {"seed": saved["seed"]}  # earlier code did not say which compressor
        mixed = isinstance(run.compressor, compression.Mixed)
        if flags.search_families and saved.get("searched", False) and was.get("name") == run.compressor.name:
            routes = {name: (each["name"], each["options"]) for name, each in was["by_layer"].items()}
            run.exchange.reroute(routes, (was["default"]["name"], was["default"]["options"]))
        now = settings_of(run.exchange.compressor) | {"seed": run.seed}
        if not mixed and compression.COMPRESSORS[run.compressor.name].needs_feedback:
            was.pop("error_feedback", None)  # whatever its flag was
        changed = [name for name in now if was.get(name, now[name]) != now[name]]
        changed = ["name"] if "name" in changed else changed
        useless = [name for name in changed if name in MEMORY_RESTS_ON]
        if run.exchange.levels is not None:  # other ranks of each host own the layers
            useless += [name for name in changed if name in ("big_grad", "clip")]
        dropped = []

        optimizer, momentum = saved["optimizer"], run.optimizer.state_dict()["momentum"]
        if useless and "dgc" in (was["name"], now["name"]) and momentum.keys() != optimizer["momentum"].keys():
            optimizer = optimizer | {"momentum": {n: optimizer["momentum"].get(n, new) for n, new in momentum.items()}}
            dropped.append("momentum that --dgc keeps by itself")
        run.optimizer.load_state_dict(optimizer)

        chosen = "quantization_bits" in flags.given and not flags.search
        if flags.compression_scheme:
            chosen = not (flags.search and saved.get("searched", False))
        if saved["widths"] and run.exchange.widths and not chosen:
            if not {"name", "bucket_size"} & {*useless}:
                run.exchange.set_widths(saved["widths"])
            elif saved["widths"] != run.exchange.widths:
                dropped.append("bit widths")
        elif useless and not run.exchange.widths and len({*saved["widths"].values()} - {compression.DENSE}) > 1:
            dropped.append("bit widths")  # chosen layer by layer: more than an option that is another now

        remembered = {} if useless else self._remembered(run, saved, alike)
        if mixed and remembered:
            remembered = run.exchange.carried_over(remembered)
        if useless and alike and any(own["exchange"]["averager"].values()):
            dropped.append("what compression remembered")
        kept = [name for name in changed if name in ("big_grad", "seed")] if any(remembered.values()) else []
        written = saved.get("arithmetic", 1)
        if written != compression.ARITHMETIC and run.compressor.encodes:
            run.say(
                f"the checkpoint was written with version {written} of the compressors' arithmetic, and goes on with "
                f"version {compression.ARITHMETIC}; CHANGELOG.md says what differs"
            )
        if dropped or kept:
            names, fate = (useless, "dropped: " + ", ".join(dropped)) if dropped else (kept, "residuals are kept")
            run.say(f"the checkpoint is of {in_words(was, names)}, and this run of {in_words(now, names)}; {fate}")
        return remembered

    def _remembered(self, run: Run, saved: Mapping[str, Any], alike: bool) -> Mapping[str, Any]:
        """What the averager of this rank's position remembered, whichever rank had it; nothing where none had it.

        A position is a place on a host, of so many hosts of so many ranks; where ranks average flat, the rank itself.
        """
        if not alike:
            return {}
        position, ranks = run.exchange.position, saved["ranks"]
        own = ranks[self.ranks.rank]["exchange"]
        for each in (own, *(rank["exchange"] for rank in ranks)):
            if each.get("position", {"ranks": self.ranks.size, "rank": self.ranks.rank}) == position:
                return each["averager"]
        if any(own["averager"].values()):
            run.say(
                "the checkpoint is of ranks that averaged in another arrangement of hosts: residuals are dropped; to "
                "keep them, choose --hierarchical and --ranks-per-host as they were"
            )
        return {}

    def align_position(self, run: Run, images_per_iteration: int | None) -> None:
        """Move a run to the last step that begins at or before its position.

        `images_per_iteration` is that of the checkpoint, over all ranks; None where there is no checkpoint. Raises
        ValueError where no step fits into an epoch, or none begins there.
        """
        last_iteration = functools.partial(
            classification.training.last_iteration,
            len(run.train_loader),
            iterations=run.iterations,
            accumulation=run.accumulation,
        )
        end, own = last_iteration(), self.flags.batch_size * self.ranks.size
        if images_per_iteration not in (None, own):
            seen = run.iteration * images_per_iteration
            run.iteration = min(seen // own // run.accumulation * run.accumulation, end)
            again = seen - run.iteration * own
            if again > 0:
                run.say(f"{again} images of epoch {run.epoch} are seen twice: the batches are others")
        run.trained = run.iteration == end
        if not run.trained:
            last_iteration(start=run.iteration)

    def way_on(self) -> str:
        """A sentence that says how to go on from the last checkpoint."""
        if self.flags.no_checkpoints:
            return "--no-checkpoints: nothing was saved"
        return f"go on with --resume {self.path}"


# Entry


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns its exit status."""
    try:
        return join_and_run(parse(argv))
    except Exception as error:  # a bug: Python prints its traceback
        launchers.note_failure(traceback.format_exception_only(error)[-1].rstrip("\n"))
        raise


def join_and_run(flags: Plan) -> int:
    """Join the other ranks and do what the flags ask for. Returns the exit status."""
    launcher = launcher_of(flags)
    classification.allocator.keep_freed_memory()
    try:
        classification.open_files.allow_open_files(flags.workers)
        with compression.join_ranks(
            flags.device,
            flags.local_rank,
            launcher=launcher,
            backend=flags.dist_backend,
            threads=flags.threads,
            ranks_per_host=flags.ranks_per_host,
            watch=compression.Watch(flags.timeout, functools.partial(end_without, flags)),
        ) as ranks:
            if apart := launcher.apart(joined=ranks.size):
                refuse_apart(apart, flags)
                return 2
            # Said before this rank parts from the others: a launcher ends all ranks once one has ended.
            try:
                return run_among(ranks, flags)
            except compression.Failure as failure:
                tell(in_flags(str(failure), flags), aloud=ranks.rank == 0)
                raise
            except (ValueError, OSError) as error:  # of this rank alone, and the others lose it
                tell(in_flags(compression.one_line(error), flags))
                return 2
    except compression.Failure as failure:
        return failure.status
    except (ValueError, OSError) as error:
        tell_before_ranks_have_met(in_flags(compression.one_line(error), flags))
        return 2
    except RuntimeError as error:
        if not launcher.is_lost_peer(error):
            raise
        reason = " ".join(str(error).splitlines()[0].split())
        tell(f"no way to the other ranks ({reason}); one that has ended says why", follows=True)
        return 1


def end_without(flags: Plan, silence: str, aloud: bool) -> NoReturn:
    """End this process at once, whose main thread may wait for a rank that is silent."""
    tell(in_flags(silence, flags), aloud=aloud, follows=not aloud)
    os._exit(1)


def run_among(ranks: compression.World, flags: Plan) -> int:
    """Do what the flags ask for among ranks that have joined. Returns the exit status."""
    if ranks.size > 1:
        ranks.check_equal_across_ranks(sources(), "the program", "install one version on all hosts")
    shared = {name: value for name, value in vars(flags).items() if name != "local_rank"}
    ranks.check_equal_across_ranks(shared, "the flags")
    if "compression_type" not in flags.given and (flags.search or flags.compression_scheme) and ranks.rank == 0:
        print("no --compression-type given: widths of maxmin are chosen", file=sys.stderr)
    if flags.idle and ranks.rank == 0:
        print(in_one_line(flags.idle), file=sys.stderr)
    if flags.advise:
        with shown_on_the_first(ranks), sole_user_of_workspace(flags, ranks):
            return advise_among(flags, ranks)
    with shown_on_the_first(ranks), sole_user_of_workspace(flags, ranks), contextlib.closing(Run(flags, ranks)) as run:
        return run.execute()


def sources() -> dict[str, str]:
    """The program's version, and a digest of each of its files."""
    files = {"main.py": Path(__file__)}
    for package in (compression, classification, search):
        folder = Path(package.__path__[0])
        files |= {f"{package.__name__}/{path.relative_to(folder)}": path for path in sorted(folder.rglob("*.py"))}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in files.items()}
    return {"version": compression.__version__, **digests}


@contextlib.contextmanager
def sole_user_of_workspace(flags: argparse.Namespace, ranks: compression.World) -> Iterator[None]:
    """A block in which no other run uses the workspace. Rank 0 sees to it, which alone reads and writes there."""
    with contextlib.ExitStack() as block:
        with ranks.fail_together():
            if ranks.rank == 0:
                warn = functools.partial(print, file=sys.stderr)
                block.enter_context(classification.locks.sole_user(Path(flags.workspace), warn))
        yield


@contextlib.contextmanager
def shown_on_the_first(ranks: compression.World) -> Iterator[None]:
    """A block in which rank 0 shows what the libraries tell of what takes long; warnings, every rank shows."""
    if ranks.rank != 0:
        yield
        return
    log, shown = logging.getLogger(compression.__name__), logging.StreamHandler()
    level = log.level
    log.addHandler(shown)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(shown)


if __name__ == "__main__":
    # Before a run says what a signal asks for, Ctrl-C ends the program, and not in the middle of an import.
    classification.interruption.end_without_traceback()
    sys.exit(main())
