"""The encoders that patchbank knows by name: what they are and where their weights are had.

Plain facts that need no torch. Sources: each module's docstring.
"""

from __future__ import annotations

from dataclasses import dataclass

PACKAGE = "patchbank.pipeline.encoders"
NOT_STATED = "not stated"
"""The licence of weights whose publisher names none."""


@dataclass(frozen=True)
class EncoderEntry:
    """One name that `load_encoder` takes; sizes are those of the published base model."""

    name: str
    module: str
    """With `load(weights, device)`."""
    summary: str
    licence: str
    """Of the weights."""
    sample_rate_hz: int
    grid: str
    """Time x frequency tokens, and of how much audio."""
    dim: int
    n_layers: int
    weights: str
    """Where the weights are had; empty where none are needed."""
    notes: str = ""
    has_fine_tuned: bool = False
    """Whether fine-tuned files load too; then the encoder's name is this one with a +."""

    @property
    def names(self) -> tuple[str, ...]:
        """What `load_encoder` takes for it."""
        return (self.name, f"{self.name}+") if self.has_fine_tuned else (self.name,)


def _entry(
    name: str,
    module: str,
    summary: str,
    *,
    licence: str = "Apache-2.0",
    rate: int = 16_000,
    grid: str,
    dim: int,
    n_layers: int,
    weights: str = "",
    notes: str = "",
    has_fine_tuned: bool = False,
) -> EncoderEntry:
    path = f"{PACKAGE}.{module}"
    return EncoderEntry(
        name, path, summary, licence, rate, grid, dim, n_layers, weights, notes, has_fine_tuned
    )


_ENTRIES = (
    _entry(
        "asit",
        "asit",
        "ASiT: local and global self-supervision on AudioSet; the teacher.",
        licence=NOT_STATED,
        grid="64 x 8 of 10 s, 37 x 8 of 6 s",
        dim=768,
        n_layers=12,
        weights="https://github.com/Sara-Ahmed/ASiT",
        notes="no licence in the publisher's repository: ask before passing tokens on",
    ),
    _entry(
        "audiomae",
        "audiomae",
        "AudioMAE: a masked autoencoder on AudioSet.",
        licence="CC-BY-NC-4.0",
        grid="64 x 8 of 10 s",
        dim=768,
        n_layers=12,
        weights="https://github.com/facebookresearch/AudioMAE",
        notes="non-commercial by the repository's LICENSE file (its README says CC-BY-4.0)",
        has_fine_tuned=True,
    ),
    _entry(
        "bat",
        "bat",
        "BAT: EAT with gated attention, trained on AudioSet.",
        licence="MIT",
        grid="64 x 8 of 10 s",
        dim=768,
        n_layers=12,
        weights="hf:lrauch/BAT-vit-b16-pretrainedAS2M",
        has_fine_tuned=True,
    ),
    _entry(
        "beats",
        "beats",
        "BEATs: pre-training with acoustic tokenizers on AudioSet; no CLS.",
        licence="MIT",
        grid="62 x 8 of 10 s",
        dim=768,
        n_layers=12,
        weights="https://github.com/microsoft/unilm/tree/master/beats",
        has_fine_tuned=True,
    ),
    _entry(
        "bird-mae",
        "bird_mae",
        "Bird-MAE: a masked autoencoder on bird recordings, 5 s clips.",
        licence=NOT_STATED,
        rate=32_000,
        grid="32 x 8 of 5 s",
        dim=768,
        n_layers=12,
        weights="hf:DBD-research-group/Bird-MAE-Base (also -Large, -Huge)",
        notes="no licence in the publisher's repository: ask before passing tokens on",
        has_fine_tuned=True,
    ),
    _entry(
        "dasheng",
        "dasheng",
        "Dasheng: a masked autoencoder on 272,000 hours of audio; no CLS.",
        grid="250 x 1 of 10 s",
        dim=768,
        n_layers=12,
        weights="https://zenodo.org/records/11511780, hf:mispeech/dasheng-base",
        notes="0.6B and 1.2B load too",
    ),
    _entry(
        "eat",
        "eat",
        "EAT: an efficient audio transformer, utterance and frame objectives on AudioSet.",
        licence="MIT",
        grid="64 x 8 of 10 s",
        dim=768,
        n_layers=12,
        weights="https://github.com/cwx-worst-one/EAT, hf:worstchan/EAT-base_epoch30_pretrain",
        notes="EAT-large loads too",
        has_fine_tuned=True,
    ),
    _entry(
        "sslam",
        "sslam",
        "SSLAM: EAT trained on mixtures of sounds.",
        licence="MIT",
        grid="64 x 8 of 10 s",
        dim=768,
        n_layers=12,
        weights="hf:ta012/SSLAM_pretrain, https://github.com/ta012/SSLAM",
        has_fine_tuned=True,
    ),
    _entry(
        "efficientat",
        "efficientat",
        "EfficientAT mn: convolutional taggers trained on AudioSet, any width; a layer is a stage.",
        licence="MIT",
        rate=32_000,
        grid="32 x 4 of 10 s",
        dim=384,
        n_layers=17,
        weights="https://github.com/fschmid56/EfficientAT/releases/tag/v0.0.1",
        notes="dim is that of mn04; it grows with the width",
    ),
    _entry(
        "fake",
        "fake",
        "A deterministic stand-in for an encoder, for tests.",
        grid="100 x 2 of 10 s",
        dim=12,
        n_layers=2,
    ),
    _entry(
        "logmel",
        "logmel",
        "Log-mel statistics: the features that an encoder has to beat. No weights.",
        grid="1 x 1 of any length",
        dim=128,
        n_layers=1,
    ),
    _entry(
        "tiny",
        "tiny",
        "The bundled encoder: a small patch transformer trained on synthetic scenes.",
        grid="62 x 4 of 10 s",
        dim=128,
        n_layers=4,
    ),
    _entry(
        "tiny-random",
        "tiny_random",
        "The bundled encoder's architecture with random weights: what training added.",
        grid="62 x 4 of 10 s",
        dim=128,
        n_layers=4,
    ),
)
ENCODERS = {entry.name: entry for entry in sorted(_ENTRIES, key=lambda entry: entry.name)}
"""Name -> entry, of the encoders that are shipped; by name."""


def shipped(name: str) -> EncoderEntry | None:
    """The entry of a name, also of one with a + for fine-tuned weights; None for others."""
    base = ENCODERS.get(name.removesuffix("+"))
    return None if base is None or name not in base.names else base
