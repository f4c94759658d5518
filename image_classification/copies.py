"""Copies of a checkpoint: which ones are kept besides the last, and their names. No torch is needed to know them."""

import re

BEST = "model_best.pth.tar"


def names_of_copies(epoch: int, iteration: int, *, best: bool, gather: bool) -> list[str]:
    """Copies to keep of a checkpoint of the state after `epoch` epochs and `iteration` iterations.

    `best`: it has the best score so far. `gather`: epochs below 10 and every tenth, counted from 0, are kept as
    `checkpoint-{epoch + 1}.pth.tar`.
    """
    names = [BEST] if best else []
    done = epoch - 1
    if gather and iteration == 0 and (done < 10 or done % 10 == 0):
        names.append(f"checkpoint-{done + 1}.pth.tar")
    return names


def is_name_of_copy(name: str) -> bool:
    return name == BEST or re.fullmatch(r"checkpoint-[0-9]+\.pth\.tar", name) is not None
