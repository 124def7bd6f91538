"""Values in Markdown as text: whatever is in a name, it makes no markup, row or block."""

from __future__ import annotations

import re

SPECIAL = re.compile(r"([\\`*\[\]<>|~&#$]|(?<![^\W_])_|_(?![^\W_]))")
"""What CommonMark, tables or mathematics take for markup; an underscore within a word is none."""


def one_line(text: str) -> str:
    """`text` with single spaces for line breaks and whatever cannot be printed."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


def escaped(text: str) -> str:
    """`text` as a reader sees it."""
    return SPECIAL.sub(r"\\\1", one_line(text))


def code(text: str) -> str:
    """`text` as a code span, or escaped where a span cannot hold it, above all in a table."""
    line = one_line(text)
    return f"`{line}`" if line and not set(line) & set("`|\\") else escaped(line)


def code_block(language: str, text: str) -> str:
    """`text` in fences that nothing in it closes."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
