"""What tests over a bank of the fake encoder share."""

from __future__ import annotations

from patchbank.pipeline.extraction import ExtractionSettings
from patchbank.pipeline.specs import WindowSpec

SETTINGS = ExtractionSettings(window=WindowSpec(1.0, 1.0), layers="all")
N_CLIPS = 40

KILLED_RUN = """
import os, sys
from pathlib import Path
from patchbank.pipeline import shard_rows
from patchbank.pipeline.extraction import ExtractionSettings, extract
from patchbank.pipeline.specs import WindowSpec
import patchbank.pipeline.bank.commit as commit_module
import patchbank.pipeline.bank.assembly as assembly_module
import patchbank.pipeline.bank.seal as seal_module

table, out, moment = sys.argv[1:]
counter = [0]

def die_at(name, wanted, real):
    def wrapped(*args, **kwargs):
        if name == moment:
            counter[0] += 1
            if counter[0] == wanted:
                os._exit(9)
        return real(*args, **kwargs)
    return wrapped

shard_rows.part_table = die_at("before a commit", 2, shard_rows.part_table)
commit_module._publish = die_at("after the link", 2, commit_module._publish)
assembly_module._assemble_clips = die_at("while assembling", 1, assembly_module._assemble_clips)
seal_module.write_seal = die_at("before the seal", 1, seal_module.write_seal)
extract(table, encoder="fake", out=out,
        settings=ExtractionSettings(window=WindowSpec(1.0, 1.0), layers="all"))
"""
"""A script that dies at a moment of an extraction: `python -c KILLED_RUN table out moment`."""
