"""A trained probe on disk: `probe.safetensors` holds its arrays, `probe.json` all that explains it.

The description names the encoder field by field, so that a probe refuses tokens of another one
and can say in what they differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor

from patchbank.pipeline.errors import BankMismatch, TrialError
from patchbank.pipeline.specs import differing_fields
from patchbank.probing.atomic import write_json, write_tensors
from patchbank.probing.batch import Batch
from patchbank.probing.calibration import probabilities_of
from patchbank.probing.description import FORMAT, damaged, label_map, read_description
from patchbank.probing.passes import BatchTokens
from patchbank.probing.plan import sequential
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.base import Probe, ProbeShape, Weights
from patchbank.probing.probes.probe_files import file_sha256, is_file
from patchbank.probing.probes.tokens import Buffers
from patchbank.probing.settings import TrainSettings
from patchbank.probing.thresholds import DEFAULT_THRESHOLD

PREDICT_BATCH_SIZE = 64
NEEDED_FOR_AUDIO = {
    "encoder": ("name", "frontend"),
    "window": ("window_s",),
    "tokens": ("stored_dtype", "mask_padding"),
}
ArrayLike = Any
"""A numpy array or a torch tensor."""


@dataclass(frozen=True)
class ProbeArtefact:
    """One trained probe and everything that is needed to apply it."""

    probe: str
    options: dict[str, Any]
    classes: tuple[str, ...]
    multi_label: bool
    shape: ProbeShape
    weights: Weights = field(repr=False, compare=False)
    layers: tuple[int, ...] = ()
    """Several are mixed; none where the tokens came from no bank."""
    encoder_id: str = ""
    encoder: dict[str, Any] = field(default_factory=dict)
    """Identity of the encoder, as its card states it."""
    window: dict[str, Any] = field(default_factory=dict)
    """How recordings were cut into clips."""
    tokens: dict[str, Any] = field(default_factory=dict)
    """How tokens were stored: `stored_dtype`, `mask_padding`."""
    plugin: str = field(default="", compare=False)
    """The Python file that builds the probe, "" where it is none."""
    plugin_sha256: str = ""
    """Its digest when it was run; what is saved."""
    temperature: float = 1.0
    """What logits are divided by, chosen on validation data."""
    thresholds: tuple[float, ...] = ()
    """One a class, chosen on validation data of a multi-label task; else none."""
    default_thresholds: tuple[str, ...] = ()
    """Classes whose threshold nothing chose: no validation clip has them."""
    validation: dict[str, Any] = field(default_factory=dict)
    """What the temperature and the thresholds reach where they were chosen."""
    training: dict[str, Any] = field(default_factory=dict)
    """Bank, settings, environment, command and the like: never needed to predict."""

    def predict_proba(
        self,
        patches: ArrayLike,
        prefix: ArrayLike | None = None,
        n_patches: ArrayLike | None = None,
    ) -> Float[np.ndarray, "clip class"]:
        """Probabilities, float32, of logits / temperature: a sigmoid a class, or a softmax for
        multi-class tasks.

        patches (clip, patch, dim), prefix (clip, prefix, dim), n_patches (clip), of any float
        type. Trained with the asymmetric loss they rank clips but are no frequencies, and no
        temperature makes them such: cut them at `thresholds`. Raises `TrialError` for tokens of
        another shape.
        """
        tokens = [None if array is None else _tensor(array) for array in (prefix, n_patches)]
        self._check_shapes(tuple(patches.shape), has_prefix=prefix is not None)
        batch = Batch.of(np.arange(len(patches)), _tensor(patches), *tokens)
        parts = [
            self.predict_batch(_slice(batch, rows))
            for rows in sequential(batch.rows, batch_size=PREDICT_BATCH_SIZE)
        ]
        empty = np.zeros((0, len(self.classes)), dtype=np.float32)
        return np.concatenate(parts) if parts else empty

    def predict_batch(self, batch: Batch) -> Float[np.ndarray, "clip class"]:
        """Probabilities of a batch, which holds all of `layers`, or one layer of any name."""
        found = probabilities_of(
            self.logits(batch), multi_label=self.multi_label, temperature=self.temperature
        )
        return found.numpy()

    def decide(
        self, probabilities: Float[np.ndarray, "clip class"]
    ) -> Bool[np.ndarray, "clip class"]:
        """Which classes are there: those at or above their threshold, one half where none was
        chosen; of a multi-class task the likeliest alone."""
        if not self.multi_label:
            best: np.ndarray = probabilities.argmax(axis=1)[:, None]
            is_there: np.ndarray = np.arange(len(self.classes)) == best
            return is_there
        # As an array: a Python number would be rounded to the type of the probabilities.
        chosen = self.thresholds or (DEFAULT_THRESHOLD,) * len(self.classes)
        reaches: np.ndarray = probabilities >= np.array(chosen, dtype=np.float64)
        return reaches

    def layers_of(self, batch: Batch) -> tuple[int, ...]:
        """The layers of a batch that the probe reads; `TrialError` where one is missing."""
        layers = self.layers
        if len(layers) < 2 and not (layers and layers[0] in batch.layers):
            layers = tuple(batch.layers)[-1:]
        missing = sorted(set(layers) - set(batch.layers))
        if missing:
            raise TrialError(
                f"found no layer {', '.join(map(str, missing))} in the batch, expected "
                f"{self._layer}, which this probe mixes; hand predict_batch() a batch of them"
            )
        return layers

    @torch.no_grad()
    def logits(self, batch: Batch) -> Float[Tensor, "clip class"]:
        """Logits of a batch, float32 on the CPU, before the temperature."""
        settings = TrainSettings(device="cpu")
        tokens = BatchTokens(batch, settings, Buffers()).of(self.layers_of(batch))
        self._check_shapes(tokens.shape, has_prefix=tokens.prefix is not None)
        stacked = {key: value[None] for key, value in self.weights.items()}
        return self.family.logits(stacked, tokens)[0]

    def check_encoder(self, identity: Mapping[str, Any], encoder_id: str) -> None:
        """Raises `BankMismatch`, naming every differing field, for tokens of another encoder."""
        if encoder_id == self.encoder_id:
            return
        self._check_is_of_a_bank()
        found = json.loads(json.dumps(identity))
        differences = differing_fields(found, self.encoder)
        raise BankMismatch(
            f"probe {self.probe!r} was trained on tokens of another encoder "
            f"({self.encoder.get('name', self.encoder_id)}, {self._layer}); extract with that "
            "one, or train again: patchbank train-probe",
            differences or {"encoder_id": (encoder_id, self.encoder_id)},
        )

    def check_origin(self) -> None:
        """Raises `TrialError` where nothing says how audio becomes tokens for this probe."""
        self._check_is_of_a_bank()
        missing = [
            f"{part}.{key}"
            for part, keys in NEEDED_FOR_AUDIO.items()
            for key in keys
            if key not in getattr(self, part)
        ]
        if missing:
            raise TrialError(
                f"found no {', '.join(missing)} in the probe's description, expected what its bank "
                "states; train again: patchbank train-probe"
            )

    def _check_is_of_a_bank(self) -> None:
        if not (self.encoder or self.encoder_id):
            raise TrialError(
                "this probe was trained on an array, no encoder is known; fit it on a bank's "
                "tokens, ProbeClassifier().fit(bank.rows_view(), y), or use predict_proba()"
            )

    def _check_shapes(self, shape: tuple[int, ...], *, has_prefix: bool) -> None:
        trained_on = f"this probe is trained on {self.encoder.get('name', 'an encoder')}"
        dim = self.shape.dim
        if len(shape) != 3 or shape[2] != dim:
            raise TrialError(
                f"expected patches (clip, patch, dim={dim}), found {shape}: {trained_on}, "
                f"{self._layer}"
            )
        if not has_prefix and self.family.uses_prefix:
            raise TrialError(f"expected prefix tokens beside the patches, found none: {trained_on}")

    @property
    def _layer(self) -> str:
        return f"layer {'+'.join(map(str, self.layers))}"

    @cached_property
    def family(self) -> Probe:
        """The probe without its weights."""
        shape = replace(self.shape, n_classes=len(self.classes))
        return build_probe(self.plugin or self.probe, shape, self.options)


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
    write_tensors(folder / "probe.safetensors", weights)
    facts = {one.name: getattr(artefact, one.name) for one in fields(artefact)}
    del facts["weights"], facts["plugin"]
    facts |= {"classes": label_map(artefact.classes), "shape": asdict(artefact.shape)}
    write_json(folder / "probe.json", {"format": FORMAT, **facts})


def load_probe(folder: Path, plugin: Path | None = None) -> ProbeArtefact:
    """The probe that `save_probe` left in `folder`; raises `TrialError` where there is none.

    A probe of a Python file needs that file, `plugin`, as it was: no path is stored, and nothing
    that a folder of results names is ever run.
    """
    description = read_description(folder)
    digest = description.get("plugin_sha256", "")
    if "plugin" in description or is_file(str(description.get("probe"))):
        raise TrialError(
            f"{folder / 'probe.json'} names a file to run, expected the name of a probe; only you "
            "may name a file: --plugin FILE.py"
        )
    if digest:
        _check_plugin(folder, description.get("probe"), digest, plugin)
        description["plugin"] = str(plugin)
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
        artefact = ProbeArtefact(**description, weights=weights)
    except TypeError as error:
        raise damaged(folder, error) from error
    _check_weights(folder, artefact)
    return artefact


def _check_plugin(folder: Path, name: object, digest: str, plugin: Path | None) -> None:
    if plugin is None:
        raise TrialError(
            f"the probe in {folder} is built by a file of your own, {name}.py; name it: "
            "--plugin FILE.py"
        )
    found = file_sha256(plugin)
    if found != digest:
        raise TrialError(
            f"{plugin} is not what built the probe in {folder}: found sha256 {found[:12]}, "
            f"expected {digest[:12]}; restore the file or train again: patchbank train-probe"
        )


def array_shapes(artefact: ProbeArtefact) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of the arrays that an artefact has, and of those that its family expects."""
    first = artefact.family.first_weights(torch.Generator())
    expected = {key: _shown(value) for key, value in first.items()}
    found = {
        # A probe that remembers has as many clips as it was shown.
        key: (None, *value.shape[1:]) if expected.get(key, ())[:1] == (None,) else _shown(value)
        for key, value in artefact.weights.items()
    }
    return found, expected


def _check_weights(folder: Path, artefact: ProbeArtefact) -> None:
    try:
        found, expected = array_shapes(artefact)
    except (RuntimeError, MemoryError) as error:
        if artefact.plugin:
            raise
        raise damaged(folder, error) from error  # sizes that no memory holds
    if found != expected:
        raise TrialError(
            f"found arrays {found} in {folder / 'probe.safetensors'}, expected {expected}; the "
            "files are not of one run, train again: patchbank train-probe"
        )


def _shown(value: torch.Tensor) -> tuple[int | None, ...]:
    """Its shape, with None for any number of clips."""
    return tuple(None if size == 0 else size for size in value.shape)
