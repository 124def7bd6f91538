"""Values that options take, as enumerations that typer can print."""

from __future__ import annotations

from enum import Enum


class Pad(Enum):
    """Rules of `WindowSpec.pad`."""

    zero = "zero"
    repeat = "repeat"


class StoredDType(Enum):
    """Types that tokens are stored in."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    int8 = "int8"
    int4 = "int4"


class Compute(Enum):
    """Types that an encoder computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class DecodeIn(Enum):
    """Where audio is decoded."""

    threads = "threads"
    processes = "processes"


class TaskKind(Enum):
    """What labels mean: any number of classes a clip, or exactly one."""

    auto = "auto"
    multilabel = "multilabel"
    multiclass = "multiclass"


class Loss(Enum):
    """Losses of `TrainSettings.loss`."""

    auto = "auto"
    asymmetric = "asymmetric"
    bce = "bce"
    cross_entropy = "cross-entropy"


class Tier(Enum):
    """Tiers of `BatchLoader`."""

    auto = "auto"
    device = "device"
    ram = "ram"
    map = "map"
    read = "read"
    direct = "direct"


class ExportBatch(Enum):
    """Clips that an exported program takes at once."""

    dynamic = "dynamic"
    one = "1"


class LabelFormat(Enum):
    """How `predict` writes labels."""

    text = "text"
    csv = "csv"
    json = "json"
    audacity = "audacity"
