"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def at_least(lowest: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below `lowest`."""

    def whole_number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} on")
        return int(text)

    return whole_number


def number_from_zero(text: str) -> float:
    """An argparse type: a finite number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def check_place(option: str, path: str | None) -> None:
    """Refuses a file to be written where none can be, before the work that it is for.

    Raises:
        ValueError: if its folder does not exist, or it is a folder itself.
    """
    if path is None:
        return
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--{option} {path}: there is no folder {Path(path).parent}")
    if Path(path).is_dir():
        raise ValueError(f"--{option} {path}: this is a folder; name a file")


def add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds the options that name a model and where it goes."""
    parser.add_argument(
        "--model",
        required=default is None,
        default=default,
        metavar="M",
        help="zoo name, folder or Hub id" + (f" (default: {default})" if default else ""),
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--action-space", metavar="NAME", help="of a model of several robots: whose actions are given")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="convert the weights (default: float32)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options of sampling."""
    parser.add_argument("--temperature", type=number_from_zero, default=1.0, help="0 is argmax (default: 1)")
    parser.add_argument("--top-k", type=at_least(1), default=100, help="likeliest tokens to sample from (default: 100)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="the same seed gives the same video (default: 0)")
