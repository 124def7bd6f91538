"""Weights from the Hugging Face hub: `hf:org/repo[@revision][:file]`.

A branch or a tag is resolved to the commit that it stands for, which is what gets recorded. Files
come through huggingface_hub, into its own cache and with its own credentials; `HF_HUB_OFFLINE`,
`HF_HOME` and `HF_ENDPOINT` work as everywhere. Code of a repository is never fetched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from patchbank.pipeline.errors import EncoderError

PREFIX = "hf:"
REFERENCE = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./ +-]+))?"
)
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Tried in this order where no file is named."""


@dataclass(frozen=True)
class Located:
    """Weights on this machine, and what to call them elsewhere."""

    path: Path
    """A file, or a folder with weights and config.json."""
    reference: str
    """`hf:org/repo@commit[:file]`, or the absolute path."""


def is_remote(weights: Path | str) -> bool:
    """Whether weights lie on the hub."""
    return str(weights).startswith(PREFIX)


def locate_weights(weights: Path | str) -> Located:
    """The local path of weights; those of the hub are fetched unless they are in its cache.

    Raises `EncoderError` where there is no such path, repository, revision or file, or no way to
    the hub.
    """
    if is_remote(weights):
        return _fetch(str(weights))
    path = Path(weights)
    if not path.exists():
        raise EncoderError(f"no weights at {path}; give the path of the checkpoint file")
    return Located(path, str(path.absolute()))


def _fetch(reference: str) -> Located:
    match = REFERENCE.fullmatch(reference)
    if match is None or ".." in reference:
        raise EncoderError(
            f"cannot read the reference {reference}; expected hf:org/repo, with @revision and "
            ":file where needed"
        )
    repo, revision, file = match["repo"], match["revision"] or "main", match["file"]
    for name in [file] if file else WEIGHTS:
        folder = _snapshot(repo, revision, [name, CONFIG], reference)
        if not (folder / name).is_file():
            continue
        pinned = f"{PREFIX}{repo}@{folder.name}" + (f":{file}" if file else "")
        return Located(folder / name if file else folder, pinned)
    raise EncoderError(
        f"{repo} at {revision} has no {file or ' or '.join(WEIGHTS)}, nor has the hub's cache "
        f"where there is no network; name the file: {PREFIX}{repo}@{revision}:FILE"
    )


def _snapshot(repo: str, revision: str, names: list[str], reference: str) -> Path:
    """The folder of a commit in the hub's cache, with these files where the commit has them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=[_literal(name) for name in names]
            )
        )
    except GatedRepoError as error:
        raise EncoderError(
            f"{repo} asks for its conditions to be accepted; do so on the hub, then: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise EncoderError(
            f"the hub has no repository {repo} that you may read; check the name, or: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise EncoderError(f"{repo} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        raise EncoderError(
            f"{reference} is not in the hub's cache, and the hub cannot be asked (no network, or "
            "HF_HUB_OFFLINE); fetch it where there is a network, or give a local file"
        ) from error
    except Exception as error:  # what a way through other people's machines raises is not bounded
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        raise EncoderError(
            f"cannot fetch {reference}: {type(error).__name__}: {reason}; try again, or give a "
            "local file"
        ) from error


def _literal(name: str) -> str:
    """A file name as a pattern that matches nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", name)
