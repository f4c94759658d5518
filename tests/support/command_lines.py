"""Command lines of any flags, drawn from the program's own parser: a flag that is new is among them."""

import argparse
from collections.abc import Mapping

import main

NUMBERS = (
    "0", "1", "2", "3", "4", "8", "32", "64", "90", "256", "512", "1024", "0.01", "0.1", "0.5", "0.9", "-1", "-2",
    "1e-9", "1e9", "1e38", "1e300", "nan", "inf", "x", str(10**12), str(10**30),
)  # fmt: skip
"""Values in and out of every range."""

NAMES = {
    "checkpoint_filename": ("c.pth.tar", "model_best.pth.tar", "experiment_raport.json", "a/b"),
    "compression_scheme": ("s.json", "checkpoint.pth.tar"),
    "pretrained_weights": ("w.pth", "checkpoint.pth.tar"),
    "raport_file": ("r.json", "checkpoint.pth.tar", "gradient_stats.jsonl"),
    "resume": ("auto", "c.pth", "experiment_raport.json"),
    "search_every": ("1", "2", "1steps", "2steps", "0steps", "x"),
    "search_pin": ("*=4", "3.*=2-8", "nothing=4", "x"),
    "save_weights": ("w.safetensors", "w.pth"),
    "tensorboard_dir": ("events",),
    "workspace": ("./", "elsewhere"),
}
"""Values of the flags that take something else than numbers: most name files."""


def flags() -> dict[str, argparse.Action]:
    """The flags of the program by the name of their value."""
    left_out = ("data", "help", "version")
    return {action.dest: action for action in main.build_parser()._actions if action.dest not in left_out}


def values(action: argparse.Action, names: Mapping[str, tuple[str, ...]] = NAMES) -> tuple[str | None, ...]:
    """Values to try a flag with; None is that of a switch."""
    if action.nargs == 0:
        return (None,)
    if action.choices is not None:
        return tuple(action.choices)
    return names.get(action.dest, NUMBERS)


def word(action: argparse.Action, value: str | None) -> str:
    """A flag with its value, as users write it."""
    spelling = max(action.option_strings, key=len)
    return spelling if value is None else f"{spelling}={value}"
