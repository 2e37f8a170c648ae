"""Checks of command line arguments that several data commands share."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError


def part(text: str) -> tuple[int, int]:
    """The i-th of n parts of a job array, from 1.

    >>> part("2/8")
    (2, 8)
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ArgumentTypeError(f"{text!r} is no part such as 1/8 to 8/8")
    return int(match[1]), int(match[2])
