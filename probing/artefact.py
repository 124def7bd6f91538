"""A trained probe on disk: `probe.safetensors` holds its arrays, `probe.json` all that explains it.

The description names the encoder field by field, so that a probe refuses tokens of another one
and can say in what they differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError

from patchbank.pipeline.errors import BankMismatch, TrialError
from patchbank.pipeline.specs import differing_fields
from patchbank.probing.atomic import write_atomically, write_json
from patchbank.probing.batch import Batch
from patchbank.probing.plan import sequential
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.base import Probe, ProbeShape, Weights
from patchbank.probing.probes.tokens import Buffers, convert

FORMAT = 1
PREDICT_BATCH_SIZE = 64
ArrayLike = Any
"""A numpy array or a torch tensor."""


@dataclass(frozen=True)
class ProbeArtefact:
    """One trained probe and everything that is needed to apply it."""

    probe: str
    options: dict[str, Any]
    classes: tuple[str, ...]
    multi_label: bool
    dim: int
    n_prefix: int
    weights: Weights = field(repr=False, compare=False)
    layer: int | None = None
    encoder_id: str = ""
    encoder: dict[str, Any] = field(default_factory=dict)
    """Identity of the encoder, as its card states it."""
    window: dict[str, Any] = field(default_factory=dict)
    """How recordings were cut into clips."""
    tokens: dict[str, Any] = field(default_factory=dict)
    """How tokens were stored: `stored_dtype`, `mask_padding`."""
    training: dict[str, Any] = field(default_factory=dict)
    """Learning rate, seed, bank and the like: never needed to predict."""

    def predict_proba(
        self,
        patches: ArrayLike,
        prefix: ArrayLike | None = None,
        n_patches: ArrayLike | None = None,
    ) -> Float[np.ndarray, "clip class"]:
        """Probabilities, float32: a sigmoid a class, or a softmax for multi-class tasks.

        patches (clip, patch, dim), prefix (clip, prefix, dim), n_patches (clip), of any float
        type. Trained with the asymmetric loss they rank clips but lie above the frequencies: one
        half is then no threshold. Raises `TrialError` for tokens of another shape.
        """
        tokens = [None if array is None else _tensor(array) for array in (prefix, n_patches)]
        self._check_shapes(tuple(patches.shape), has_prefix=prefix is not None)
        batch = Batch.of(np.arange(len(patches)), _tensor(patches), *tokens)
        parts = [
            self._probabilities(_slice(batch, rows))
            for rows in sequential(batch.rows, batch_size=PREDICT_BATCH_SIZE)
        ]
        empty = np.zeros((0, len(self.classes)), dtype=np.float32)
        return np.concatenate(parts) if parts else empty

    def check_encoder(self, identity: Mapping[str, Any], encoder_id: str) -> None:
        """Raises `BankMismatch`, naming every differing field, for tokens of another encoder."""
        if encoder_id == self.encoder_id:
            return
        found = json.loads(json.dumps(identity))
        differences = differing_fields(found, self.encoder)
        raise BankMismatch(
            f"probe {self.probe!r} was trained on tokens of another encoder "
            f"({self.encoder.get('name', self.encoder_id)}, layer {self.layer}); extract with that "
            "one, or train again: patchbank train-probe",
            differences or {"encoder_id": (encoder_id, self.encoder_id)},
        )

    def _check_shapes(self, shape: tuple[int, ...], *, has_prefix: bool) -> None:
        trained_on = f"this probe is trained on {self.encoder.get('name', 'an encoder')}"
        if len(shape) != 3 or shape[2] != self.dim:
            raise TrialError(
                f"expected patches (clip, patch, dim={self.dim}), found {shape}: {trained_on}, "
                f"layer {self.layer}"
            )
        if self.probe == "linear-cls" and not has_prefix:
            raise TrialError(f"expected prefix tokens beside the patches, found none: {trained_on}")

    def _family(self) -> Probe:
        shape = ProbeShape(self.dim, len(self.classes), self.n_prefix)
        return build_probe(self.probe, shape, self.options)

    @torch.no_grad()
    def _probabilities(self, batch: Batch) -> Float[np.ndarray, "clip class"]:
        device = torch.device("cpu")
        tokens = convert(batch, dtype=torch.float32, device=device, buffers=Buffers())
        stacked = {key: value[None] for key, value in self.weights.items()}
        logits = self._family().logits(stacked, tokens)[0]
        probabilities = torch.sigmoid(logits) if self.multi_label else logits.softmax(dim=-1)
        return probabilities.numpy()


def _tensor(array: ArrayLike) -> torch.Tensor:
    """A tensor over `array`, without a copy where the memory may be written."""
    if isinstance(array, torch.Tensor):
        return array
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _slice(batch: Batch, rows: Int[np.ndarray, " clip"]) -> Batch:
    part = slice(int(rows[0]), int(rows[-1]) + 1)
    return Batch.of(
        rows,
        batch.patches[part],
        None if batch.prefix is None else batch.prefix[part],
        None if batch.n_patches is None else batch.n_patches[part],
    )


def save_probe(folder: Path, artefact: ProbeArtefact) -> None:
    """Writes both files, the description last: where it exists, the probe is complete."""
    (folder / "probe.json").unlink(missing_ok=True)
    weights = {key: value.float().contiguous() for key, value in artefact.weights.items()}
    write_atomically(
        folder / "probe.safetensors", lambda path: safetensors.torch.save_file(weights, path)
    )
    fields = {**artefact.__dict__, "classes": list(artefact.classes)}
    del fields["weights"]
    write_json(folder / "probe.json", {"format": FORMAT, **fields})


def load_probe(folder: Path) -> ProbeArtefact:
    """The probe that `save_probe` left in `folder`; raises `TrialError` where there is none."""
    description = _read_description(folder)
    try:
        stored = safetensors.torch.load_file(folder / "probe.safetensors")
    except (OSError, SafetensorError) as error:
        raise TrialError(
            f"cannot read {folder / 'probe.safetensors'} ({error}), expected the arrays that "
            "train-probe writes there; train again: patchbank train-probe"
        ) from error
    # In the file an array starts where another ends. Products of memory that is not aligned round
    # in another way, and a loaded probe is to predict the same to the last bit.
    weights = {key: value.clone() for key, value in stored.items()}
    try:
        classes = tuple(description.pop("classes"))
        artefact = ProbeArtefact(**description, classes=classes, weights=weights)
    except (KeyError, TypeError) as error:
        raise _damaged(folder, error) from error
    _check_weights(folder, artefact)
    return artefact


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "probe.json"
    if not path.is_file():
        nested = sorted(found.parent.name for found in folder.glob("*/probe.json"))
        hint = f"; it has probes {', '.join(nested)}: name one of these folders" if nested else ""
        raise TrialError(f"found no probe.json in {folder}, expected a probe's folder{hint}")
    try:
        description: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise _damaged(folder, error) from error
    found = description.pop("format", None)
    if found != FORMAT:
        raise TrialError(
            f"found format {found!r} in {path}, expected {FORMAT}; update patchbank or train again"
        )
    return description


def _damaged(folder: Path, error: Exception) -> TrialError:
    return TrialError(
        f"{folder / 'probe.json'} is damaged ({error!r}); train again: patchbank train-probe"
    )


def _check_weights(folder: Path, artefact: ProbeArtefact) -> None:
    family = artefact._family()
    expected = {
        key: tuple(value.shape) for key, value in family.first_weights(torch.Generator()).items()
    }
    found = {key: tuple(value.shape) for key, value in artefact.weights.items()}
    if found != expected:
        raise TrialError(
            f"found arrays {found} in {folder / 'probe.safetensors'}, expected {expected}; the "
            "files are not of one run, train again: patchbank train-probe"
        )
