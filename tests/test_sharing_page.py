"""docs/sharing.md: its commands and options exist, its places and settings are all there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from patchbank.cli.main import app
from patchbank.pipeline.sharing.settings import VARIABLES
from patchbank.pipeline.sharing.stores import KINDS

PAGE = (Path(__file__).parents[1] / "docs/sharing.md").read_text("utf-8")


def options_of(*names: str) -> set[str]:
    """The options of a command, by its names."""
    command = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts}


def commands() -> list[str]:
    """Lines of code blocks that begin with the program."""
    lines = [line.strip().removeprefix("$ ") for line in PAGE.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.startswith("patchbank ")]


@pytest.mark.parametrize("line", commands())
def test_every_option_of_every_command_exists(line: str) -> None:
    _, *words = line.split()
    names = words[:2] if words[0] == "bank" else words[:1]
    typed = set(re.findall(r"(?<=\s)--[a-z-]+", line))
    assert typed <= options_of(*names)


def test_the_page_shows_the_commands_that_move_banks() -> None:
    shown = {" ".join(line.split()[1:3]) for line in commands()}
    assert shown >= {f"bank {name}" for name in ("push", "pull", "ls", "sign", "verify", "gc")}


def test_every_option_in_the_text_is_one_of_a_command() -> None:
    known = {"--measure"} | set().union(
        *(
            options_of("bank", name)
            for name in ("push", "pull", "ls", "sign", "verify", "gc", "rm")
        ),
        options_of("bank", "pin"),
        options_of("train-probe"),
        options_of("predict"),
    )
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) <= known


def test_every_place_and_every_setting_is_told() -> None:
    told = set(re.findall(r"\b([a-z0-9]+)(?:\(s\))?://", PAGE.split("## Push and pull")[0]))
    assert told | {"https"} == set(KINDS)
    table = PAGE.split("## Settings")[1]
    assert set(re.findall(r"^\| `(\w+)` \| `(\w+)`", table, flags=re.MULTILINE)) == set(
        VARIABLES.items()
    )
