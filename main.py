"""Train ImageNet-style classifiers on many ranks with compressed gradients.

The one entry: the flags with their cross-checks. Everything below this file takes plain values; the parsed
namespace never leaves it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

# Flags that parse but cannot run yet: "--flag", or "--flag value" for one choice of a flag.
NOT_BUILT: tuple[str, ...] = ()


# Flags: types


def number(kind: Callable[[str], Any], words: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type for the numbers of one kind for which a rule holds; `words` name the rule."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
            if math.isfinite(value) and holds(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"expected {words}, got {text!r}")

    return read


bit_width = number(int, "an integer from 1 to 8", lambda n: 1 <= n <= 8)
count = number(int, "an integer of at least 1", lambda n: n >= 1)
count_or_off = number(int, "an integer of at least 1, or -1", lambda n: n >= 1 or n == -1)
count_or_none = number(int, "an integer of at least 0", lambda n: n >= 0)
seed = number(int, "an integer from 0 to 4294967295", lambda n: 0 <= n < 2**32)  # what numpy seeds with
amount = number(float, "a number of at least 0", lambda x: x >= 0)
positive = number(float, "a number above 0", lambda x: x > 0)
share = number(float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
below_one = number(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)
probability = number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def text(value: str) -> str:
    """An argparse type for names of files and folders: anything but nothing."""
    if not value:
        raise argparse.ArgumentTypeError("expected a name, got ''")
    return value


def data_backend(name: str) -> str:
    """An argparse type: `synthetic` is an alias of the spelling that recipes use."""
    return "syntetic" if name == "synthetic" else name


# Flags: the parser


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line and exit status 2; `--help` shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())}\n")


def build_parser() -> argparse.ArgumentParser:
    """Every flag, added in the order in which the usage line shows them; groups take turns where it does."""
    from compression import COMPRESSORS
    from image_classification.data import BACKENDS
    from image_classification.models import ARCHITECTURES, MODEL_CONFIGS

    parser = OneLineParser(prog="main.py", description=__doc__.splitlines()[0],
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group
    model, optimization = group("data and model"), group("optimization")
    precision, run = group("precision"), group("run control and output")
    ranks, compression = group("ranks"), group("gradient compression")
    search, extensions = group("bit-width search"), group("extensions")

    add = model.add_argument
    parser.add_argument("data", metavar="DIR", type=text,
                        help="folder with train/CLASS/* and val/CLASS/*, or the word digits: the embedded "
                        "data set of handwritten digits")
    add("--data-backend", metavar="BACKEND", type=data_backend, choices=tuple(BACKENDS), default="dali-cpu",
        help=f"data backend: {' | '.join(BACKENDS)}; synthetic is an alias (default: %(default)s; pytorch "
        "where DALI is not installed)")
    add("--arch", "-a", metavar="ARCH", choices=tuple(ARCHITECTURES), default="resnet50",
        help=f"model architecture: {' | '.join(ARCHITECTURES)}")
    add("--model-config", "-c", metavar="CONF", choices=tuple(MODEL_CONFIGS), default="classic",
        help=f"initialization: {' | '.join(MODEL_CONFIGS)}")
    add("--num-classes", metavar="N", type=count, default=1000, help="classes that the model tells apart")
    add("-j", "--workers", metavar="N", type=count_or_none, default=5,
        help="loader processes per rank, or DALI threads")

    add = optimization.add_argument
    add("--epochs", metavar="N", type=count, default=90, help="epochs of the whole training")
    add("--run-epochs", metavar="N", type=count_or_off, default=-1,
        help="stop this run after N epochs, never past --epochs (default: %(default)s, at --epochs)")
    add("-b", "--batch-size", metavar="N", type=count, default=256, help="images per rank")
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
        help="share of each training label spread over all classes")
    add("--mixup", metavar="ALPHA", type=amount, default=0.0,
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
        help="start from these weights: a state dict, a checkpoint of this program, a .safetensors file or "
        "torchvision's")

    add = precision.add_argument
    add("--fp16", action="store_true",
        help="half-precision model with float32 batch norms and master weights")
    add("--static-loss-scale", type=positive, default=1,
        help="constant loss scale, with --fp16 or --amp; a power of 2 is exact")
    add("--dynamic-loss-scale", action="store_true",
        help="let the loss scale follow the gradients, with --fp16 or --amp; goes before --static-loss-scale")
    run.add_argument("--prof", metavar="N", type=count_or_off, default=-1,
                     help="run the first N iterations of each epoch only (default: %(default)s, all)")
    add("--amp", action="store_true", help="automatic mixed precision as --opt-level says")

    add = run.add_argument
    add("--seed", type=seed, help="seed of all that is random; none differs from run to run")
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
        help="folder for all that is written, made where missing")
    model.add_argument("--memory-format", choices=("nchw", "nhwc"), default="nchw",
                       help="memory layout of the model and the batches; nhwc is channels-last")
    add("--tensorboard-dir", type=text, help="folder for TensorBoard's event files")
    precision.add_argument("--opt-level", choices=("O0", "O1", "O2", "O3"), default="O1",
                           help="with --amp: O0 float32, O1 autocast, O2 half-precision weights with float32 "
                           "batch norms and master weights, O3 all half precision")

    add = ranks.add_argument
    add("--hvd", action="store_true", help="average through Horovod, under horovodrun")
    add("--bb-ratio", type=share,
        help="broken barrier: a step waits for the layers that hold this share of the squared gradient norm; "
        "none waits for all")
    add("--bb-num-parallel-steps", type=count, default=10,
        help="with --bb-ratio: steps that a layer's average may come late")

    add = compression.add_argument
    add("--compression-type", choices=tuple(COMPRESSORS), default="none",
        help="what the gradients are encoded with (default: %(default)s; maxmin with --search or "
        "--compression-scheme)")
    add("--quantization-bits", type=bit_width, default=4,
        help="bits per value, 1 to 8, for types that have bits; with --search the widths before the "
        "first search")
    add("--bucket-size", type=count_or_off, default=512,
        help="values of a layer that share one scale, -1 for the whole layer; layers with fewer values stay "
        "float32")
    add("--error-feedback", action="store_true", help="add what an encoding lost to the next step's gradient")
    add("--efx-bits", type=bit_width,
        help="with top-k, in place of --error-feedback: send the dropped values too, in this many bits")
    add("--efx-randk", type=share,
        help="with top-k, in place of --error-feedback: send this share of the dropped values too, drawn at "
        "random")
    add("--topk-ratio", type=share, default=0.01, help="with top-k or --dgc: share of values sent")
    add("--big-grad", action="store_true",
        help="encode and average all gradients as one tensor after backward")
    add("--dgc", action="store_true", help="deep gradient compression: top-k with momentum correction")
    add("--compressor-warmup-steps", type=count_or_none, default=0,
        help="optimizer steps in float32 before compression begins; with --dgc the steps over which the "
        "share sent falls")
    ranks.add_argument("--local_rank", "--local-rank", type=count_or_none, default=0,
                       help="rank on this machine, given by the launcher; LOCAL_RANK in the environment wins")
    add("--powersgd-rank", type=count,
        help="PowerSGD of this rank; with --compression-type svd its rank (default: %(default)s; 4 for svd)")

    add = search.add_argument
    add("--search", action="store_true", help="search a bit width for each layer after each epoch")
    add("--search-alpha", type=positive, default=0.5, help="power of the error in the objective")
    add("--search-beta", type=positive, default=0.5, help="power of the compression ratio in the objective")
    add("--search-max-bits", type=bit_width, default=8, help="largest width, 1 to 8")
    add("--search-min-bits", type=bit_width, default=2, help="smallest width, 1 to 8")
    add("--popsize", type=count, default=5, help="population of the differential evolution, per layer")
    add("--search-iterations", type=count_or_none, default=2,
        help="generations after the first: popsize x layers x (iterations + 1) evaluations")

    add = extensions.add_argument
    add("--image-size", metavar="PIXELS", type=count, default=224, help="side of the square crop")
    add("--crop-scale", metavar="SHARE", type=share, default=0.08,
        help="least share of the image's area in a random crop")
    add("--hflip", metavar="P", type=probability, default=0.5,
        help="probability that a training image is flipped")
    add("--skip-bad-images", action="store_true",
        help="leave out images that cannot be read, and say which, in place of stopping")
    add("--deterministic", action="store_true", help="deterministic kernels only")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="where to train; auto takes a GPU where there is one")
    add("--dist-backend", choices=("auto", "gloo", "nccl"), default="auto",
        help="torch.distributed's backend; auto takes nccl on GPUs and gloo on CPUs")
    add("--dgc-clip", metavar="NORM", type=positive,
        help="with --dgc: clip each rank's gradient to this norm before momentum")
    add("--compression-scheme", metavar="FILE", type=text,
        help="train with the widths of a compress_scheme_N.json that a search wrote")
    add("--search-calibration-steps", metavar="STEPS", type=count, default=20,
        help="with --search and --pretrained-weights: steps of the calibration pass before the first search")
    add("--search-target-bits", metavar="BITS", type=positive,
        help="with --search: least error with at most this many bits a value on average")
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and cross-check a command line, by default this process's own.

    Besides the flags the namespace holds `given`, the sorted names of those that the command line spells out.
    With `--search` or `--compression-scheme` and no `--compression-type`, the type is maxmin. Exits with
    status 2 and one line on stderr where something is wrong.
    """
    parser = build_parser()
    defaults = vars(parser.parse_args(["DIR"]))
    absent = object()
    argv = sys.argv[1:] if argv is None else argv
    read = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, absent))))
    given = {name: value for name, value in read.items() if value is not absent}
    flags = argparse.Namespace(**defaults | given, given=tuple(sorted(given)))
    try:
        if "LOCAL_RANK" in os.environ:
            flags.local_rank = int(os.environ["LOCAL_RANK"])
        if (flags.search or flags.compression_scheme) and "compression_type" not in given:
            flags.compression_type = "maxmin"
        check(flags, {name for name, value in given.items() if value != defaults[name]})
        check_world(flags, int(os.environ.get("HOROVOD_SIZE" if flags.hvd else "WORLD_SIZE", 1)))
    except ValueError as error:
        parser.error(str(error))
    return flags


# Flags: what goes with what


def refuse(wrong: Any, words: str) -> None:
    """Raise ValueError with these words where something is wrong."""
    if wrong:
        raise ValueError(words)


def check(flags: argparse.Namespace, changed: set[str]) -> None:
    """Hold the flags against one another; `changed` names those that differ from their defaults.

    A flag that could have no effect is an error that says what it goes with: nothing that a user set is
    silently ignored. A default spelled out is never refused, nor are training flags with --evaluate.

    Raises:
        ValueError: one line that names the flags and the way out.
    """
    from compression import COMPRESSORS

    def goes_with(names: str, useful: Any, what: str) -> None:
        for name in names.split():
            spelled = "--" + name.replace("_", "-")
            refuse(name in changed and not useful, f"{spelled} has no effect without {what}")

    def only_one(*names: str) -> None:
        chosen = [name for name in names if name.lstrip("-").replace("-", "_") in changed]
        refuse(len(chosen) > 1, f"{' and '.join(chosen)} exclude each other; drop one")

    for entry in NOT_BUILT:
        name, _, value = entry.partition(" ")
        name = name.lstrip("-").replace("-", "_")
        asked = getattr(flags, name) == value if value else name in changed
        refuse(asked, f"{entry} is not built yet; drop it")

    # optimization and precision
    refuse(flags.warmup >= flags.epochs, f"--warmup {flags.warmup} must be below --epochs {flags.epochs}")
    refuse(flags.nesterov and not flags.momentum, "--nesterov needs a --momentum above 0")
    only_one("--amp", "--fp16")
    goes_with("opt_level", flags.amp, "--amp")
    goes_with("static_loss_scale dynamic_loss_scale", flags.amp or flags.fp16, "--fp16 or --amp")

    # data, devices and ranks
    goes_with("crop_scale hflip skip_bad_images", flags.data_backend != "syntetic",
              "images; choose a --data-backend that reads them")
    refuse(flags.device == "cpu" and flags.data_backend == "dali-gpu",
           "--data-backend dali-gpu needs a GPU, and --device is cpu; use dali-cpu")
    refuse(flags.device == "cpu" and flags.dist_backend == "nccl",
           "--dist-backend nccl needs a GPU, and --device is cpu; use gloo")
    only_one("--hvd", "--dist-backend")
    goes_with("bb_num_parallel_steps", flags.bb_ratio, "--bb-ratio")
    only_one("--bb-ratio", "--big-grad")

    # run control
    only_one("--evaluate", "--training-only")
    only_one("--no-checkpoints", "--gather-checkpoints")

    # compression
    kind, row = flags.compression_type, COMPRESSORS[flags.compression_type]
    with_bits = [name for name, other in COMPRESSORS.items() if other.has_bits]
    these = f"{', '.join(with_bits[:-1])} or {with_bits[-1]}"
    for flag, asked in (("--search", flags.search), ("--compression-scheme", flags.compression_scheme)):
        refuse(asked and not row.has_bits,
               f"{flag} chooses bit widths, and --compression-type {kind} has none; use {these}")
    refuse(flags.dgc and kind not in ("none", "topk"),
           f"--dgc is a top-k, and --compression-type is {kind}; use topk")
    refuse(flags.powersgd_rank and kind not in ("none", "svd"),
           f"--powersgd-rank goes with --compression-type none or svd, got {kind}")
    only_one("--dgc", "--powersgd-rank")
    only_one("--dgc", "--error-feedback", "--efx-bits", "--efx-randk")
    top_k = kind in ("topk", "topk_rmsprop")
    goes_with("efx_bits efx_randk", top_k, "--compression-type topk or topk_rmsprop")
    goes_with("topk_ratio", top_k or flags.dgc, "--compression-type topk or topk_rmsprop, or --dgc")
    goes_with("dgc_clip", flags.dgc, "--dgc")
    refuse("quantization_bits" in changed and not row.has_bits,
           f"--quantization-bits has no effect with --compression-type {kind}; use {these}")
    encodes = kind not in ("none", "sanity", "stats") or flags.dgc or flags.powersgd_rank
    goes_with("bucket_size error_feedback compressor_warmup_steps", encodes,
              "a --compression-type that encodes")
    refuse(flags.powersgd_rank and flags.big_grad and kind == "none",
           "--powersgd-rank factors each layer's matrix, and --big-grad leaves one long vector; drop one")

    # search
    goes_with("search_alpha search_beta search_max_bits search_min_bits popsize search_iterations "
              "search_target_bits search_calibration_steps", flags.search, "--search")
    goes_with("search_calibration_steps", flags.pretrained_weights or flags.evaluate,
              "--pretrained-weights or --evaluate")
    only_one("--search", "--compression-scheme")
    only_one("--search", "--big-grad")
    only_one("--compression-scheme", "--big-grad")
    refuse(flags.search_min_bits > flags.search_max_bits,
           f"--search-min-bits {flags.search_min_bits} is above --search-max-bits {flags.search_max_bits}")
    least = "search_min_bits" if flags.search else "quantization_bits"
    refuse(row.has_bits and getattr(flags, least) < row.min_bits,
           f"--compression-type {kind} needs at least {row.min_bits} bits, one of them the sign; "
           f"raise --{least.replace('_', '-')}")


def check_world(flags: argparse.Namespace, world_size: int) -> None:
    """Hold the flags against the number of ranks.

    Raises:
        ValueError: `--optimizer-batch-size` is no multiple of ranks x batch.
    """
    batch, total = world_size * flags.batch_size, flags.optimizer_batch_size
    refuse(total != -1 and total % batch,
           f"--optimizer-batch-size {total} is no multiple of ranks x --batch-size = {world_size} x "
           f"{flags.batch_size} = {batch}")
