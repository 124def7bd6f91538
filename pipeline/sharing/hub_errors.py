"""Errors of the Hugging Face hub and of its client, in our words: no token, no signed address."""

from __future__ import annotations

import re

from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.errors import NotInStore, StoreError

PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)
"""Answers after which the same question may succeed: busy, too many at once, moved meanwhile."""


def store_error(
    error: BaseException, *, name: str, revision: str, path: str | None = None
) -> StoreError:
    """What an error about the data set `name` means, and what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"hf://datasets/{name}"
    if isinstance(error.__cause__, Exception) and isinstance(error, RuntimeError):
        error = error.__cause__  # the client's own words about one of several files
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, OfflineModeIsEnabled):
        return StoreError(f"{where} cannot be asked: HF_HUB_OFFLINE is set; unset it")
    if isinstance(error, GatedRepoError):
        return StoreError(
            f"{where} asks for its conditions to be accepted; do so on its page, then: "
            "hf auth login"
        )
    if isinstance(error, RevisionNotFoundError):
        return StoreError(
            f"{where} has no revision {shown(revision)}; make the branch on the hub, or "
            "leave it out"
        )
    if isinstance(error, EntryNotFoundError):
        return NotInStore(f"{where} has no file {path or 'of that name'}")
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return StoreError(
            f"the hub has no data set {name} that you may read; check the name, or: hf auth login"
        )
    if status == 403:
        return StoreError(
            f"{where}: you may not do that{_said(error)}; ask its owners, or use a token that "
            "may write: hf auth login"
        )
    if status is not None:
        advice = "; wait, and run the same command again" if status in PASSING else ""
        return StoreError(
            f"{where}: the hub answered {status}{_said(error)}{advice}",
            may_pass=status in PASSING,
        )
    kind = type(error)
    is_network = kind.__module__.split(".")[0].startswith("httpx") or isinstance(
        error, ConnectionError | TimeoutError
    )
    if is_network:
        return StoreError(f"{where} cannot be reached: {kind.__name__}", may_pass=True)
    return StoreError(f"{where}: {kind.__name__}: {_without_secrets(str(error))}")


def _said(error: BaseException) -> str:
    """What the hub's answer says, in brackets."""
    words = _without_secrets(str(getattr(error, "server_message", None) or ""))
    return f" ({words})" if words else ""


def _without_secrets(text: str) -> str:
    line = " ".join(text.split())
    return shown(re.sub(r"https?://\S+|hf_\w+|Bearer \S+", "...", line))
