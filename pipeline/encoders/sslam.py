"""SSLAM: EAT trained on mixtures of sounds (arXiv:2506.12222).

Takes ta012/SSLAM's fairseq files and the folders ta012/SSLAM_pretrain and
ta012/SSLAM_AS2M_Finetuned; the architecture, the files and the front end are EAT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from patchbank.pipeline.encoders.eat import load_as
from patchbank.pipeline.encoders.patch_encoder import PatchEncoder

EXPECTED = "a fairseq file of ta012/SSLAM, or the folder of a ta012/SSLAM_* repository"


def load(
    weights: Path | None,
    device: torch.device | str,
    *,
    preset: str | None = None,
    frontend: Mapping[str, Any] | None = None,
) -> PatchEncoder:
    """The encoder in a file or folder; decoder and head are left out. Raises `EncoderError`."""
    return load_as("sslam", EXPECTED, weights, device, preset=preset, frontend=frontend)
