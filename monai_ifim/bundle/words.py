# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Texts for a terminal, a shell, the command line of ``monai.bundle run``, and expressions in a config."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

# A list of plain names, which is easier to read so; shlex closes and opens single quotes around each.
_NEEDS_ONLY_DOUBLE_QUOTES = re.compile(r"(--\w+=)?\['[\w./', -]*'\]", re.ASCII)

# An expression with this word in it is no expression for MONAI, where it also refers to something.
IMPORT = "import"
_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def shown(text: Any) -> str:
    r"""A text on one line without control characters, line breaks of any kind and other invisible ones: escaped.

    Example:
        >>> print(shown("red \x1b[31m, two\nlines"))
        red \x1b[31m, two\nlines
    """
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in str(text))


def say(line: str = "") -> None:
    """Print lines, each as it can be shown by the terminal."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = "\n".join(map(shown, line.split("\n")))
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def argument(value: Any) -> str:
    r"""What ``monai.bundle run`` reads as a value: names of letters as they are, else a Python literal.

    Raises:
        ValueError: When no text on the command line stands for it.

    Example:
        >>> print(argument("evaluating"), argument("True"), argument("a # b"), argument([1, "x"]))
        evaluating 'True' 'a # b' [1, 'x']
    """
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_./][\w./]*", value, re.ASCII) and parsed(value) == value:
        return value
    text = repr(value)
    if parsed(text) != value:
        raise ValueError(f"{text} cannot be given on the command line; put it into a config file.")
    return text


def parsed(text: str) -> Any:
    """The value that ``monai.bundle run`` reads in a text.

    Raises:
        ValueError: When it cannot be read.
    """
    from fire.parser import DefaultParseValue

    try:
        return DefaultParseValue(text)
    except (RecursionError, MemoryError, TypeError) as error:
        raise ValueError(f"The value {text[:60]!r} cannot be read ({type(error).__name__}).") from error


def command_line(words: Sequence[str]) -> str:
    """Words for a shell, which takes each as it is."""
    return " ".join(f'"{word}"' if _NEEDS_ONLY_DOUBLE_QUOTES.fullmatch(word) else shlex.quote(word) for word in words)


def literal(text: str) -> str:
    r"""A text within an expression of a config, in which MONAI finds no reference.

    Example:
        >>> print(literal("mail@home#1"))
        'mail\x40home\x231'
    """
    quoted = "".join(_escaped(letter) if letter in "@#%" else letter for letter in repr(text))
    return quoted.replace(IMPORT, r"im\x70ort")


def _escaped(letter: str) -> str:
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    return f"\\x{ord(letter):02x}" if ord(letter) < 128 else letter.encode("ascii", "backslashreplace").decode()
