"""Publishers' weight files: every layout loads, a misfit is refused, nothing is executed."""

from __future__ import annotations

import argparse
import fractions
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from published_files import (
    BEATS_CFG,
    DEPTH,
    DIM,
    LAYOUTS,
    NATURAL_S,
    audiomae_fine_tuned,
    beats,
    beats_state,
    eat_half,
    eat_shapes,
    folder,
    prefixed,
    random_state,
    torch_file,
    vit_shapes,
)
from torch import Tensor

from patchbank.pipeline import load_encoder
from patchbank.pipeline.encoders import reload_encoder
from patchbank.pipeline.encoders.base import Encoder
from patchbank.pipeline.errors import EncoderError

LAYOUT_CASES = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]
"""Files whose encoders were never fine-tuned have no + in their name."""


def clip(encoder: Encoder, name: str, *, seed: int = 0) -> Tensor:
    """Noise of the length that an encoder is fed by default."""
    n_samples = round(NATURAL_S.get(name, 10.0) * encoder.spec.sample_rate_hz)
    return 0.1 * torch.randn(1, n_samples, generator=torch.Generator().manual_seed(seed))


def last_patches(encoder: Encoder, name: str) -> Tensor:
    return encoder.encode(encoder.frontend(clip(encoder, name)), [DEPTH])[DEPTH].patches


@pytest.mark.parametrize(("name", "layout"), LAYOUT_CASES)
def test_every_layout_gives_the_same_tokens(name: str, layout: str, tmp_path: Path) -> None:
    first = next(iter(LAYOUTS[name]))
    (tmp_path / "first").mkdir()
    (tmp_path / "this").mkdir()
    reference = load_encoder(name, weights=LAYOUTS[name][first](tmp_path / "first"))
    encoder = load_encoder(name, weights=LAYOUTS[name][layout](tmp_path / "this"))
    assert torch.equal(last_patches(encoder, name), last_patches(reference, name))
    assert encoder.spec.name == (f"{name}+" if "fine-tuned" in layout else name)
    assert encoder.spec.config["heads" if name != "beats" else "encoder_attention_heads"] == 2
    assert encoder.spec.layer(DEPTH).dim == DIM


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_encoder_is_loaded_again_from_its_description(name: str, tmp_path: Path) -> None:
    path = next(iter(LAYOUTS[name].values()))(tmp_path)
    encoder = load_encoder(name, weights=path)
    again = reload_encoder(encoder.spec.identity(), weights=path, device="cpu")
    assert again.spec == encoder.spec


def test_a_fine_tuned_audiomae_has_no_final_norm(tmp_path: Path) -> None:
    encoder = load_encoder("audiomae", weights=audiomae_fine_tuned(tmp_path))
    assert encoder.spec.name == "audiomae+"
    assert encoder.spec.layer(DEPTH).meaning == "block output"
    out = encoder.encode(encoder.frontend(clip(encoder, "audiomae")))
    # A norm would leave a mean of about 0 in every token.
    assert out[DEPTH].patches.mean(-1).abs().max() > 0.1


def test_half_precision_is_widened(tmp_path: Path) -> None:
    halves = load_encoder("eat", weights=eat_half(tmp_path))
    state = {key: value.half().float() for key, value in random_state(eat_shapes()).items()}
    config = {"num_heads": 2}
    wide = load_encoder("eat", weights=folder(tmp_path / "wide", prefixed(state, "model."), config))
    assert torch.equal(last_patches(halves, "eat"), last_patches(wide, "eat"))


def test_depth_and_width_are_the_files(tmp_path: Path) -> None:
    state = prefixed(random_state(eat_shapes(512, dim=192, depth=3)), "model.")
    encoder = load_encoder("eat", weights=folder(tmp_path / "large", state, {}))
    assert len(encoder.spec.layers) == 3
    assert encoder.spec.config["heads"] == 3
    assert encoder.spec.config["stored_positions"] == 512
    assert encoder.encode(encoder.frontend(clip(encoder, "eat")))[3].patches.shape == (1, 512, 192)


def test_beats_is_built_as_its_cfg_says(tmp_path: Path) -> None:
    cfg = BEATS_CFG | {
        "encoder_layers": 3,
        "deep_norm": False,
        "max_distance": 1_280,
        "conv_pos": 64,
        "num_buckets": 64,
    }
    path = torch_file(tmp_path / "b.pt", {"cfg": cfg, "model": beats_state(cfg)})
    encoder = load_encoder("beats", weights=path)
    assert encoder.spec.config["max_distance"] == 1_280
    assert sorted(encoder.encode(encoder.frontend(clip(encoder, "beats")))) == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_norm_first": True}, "layer_norm_first = True, only False"),
        ({"gru_rel_pos": False}, "gru_rel_pos = False, only True"),
        ({"encoder_layers": "12"}, "encoder_layers = '12'"),
        ({"encoder_attention_heads": 3}, "does not divide 128 channels"),
        ({"deep_norm": 1}, "deep_norm = 1"),
    ],
)
def test_a_beats_cfg_of_another_kind_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    content = {"cfg": BEATS_CFG | change, "model": beats_state()}
    with pytest.raises(EncoderError, match=message):
        load_encoder("beats", weights=torch_file(tmp_path / "b.pt", content))


def test_a_beats_file_without_cfg_or_with_tables_that_differ_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="no entry cfg"):
        load_encoder("beats", weights=torch_file(tmp_path / "a.pt", {"model": beats_state()}))
    state = beats_state()
    state["encoder.layers.1.self_attn.relative_attention_bias.weight"] = torch.zeros(320, 2)
    content = {"cfg": BEATS_CFG, "model": state}
    with pytest.raises(EncoderError, match="differs from that of another layer"):
        load_encoder("beats", weights=torch_file(tmp_path / "b.pt", content))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_that_does_not_fit_is_refused_with_the_keys(name: str, tmp_path: Path) -> None:
    path = next(iter(LAYOUTS[name].values()))(tmp_path)
    changed = changed_file(path, tmp_path)
    with pytest.raises(EncoderError) as caught:
        load_encoder(name, weights=changed)
    message = str(caught.value)
    assert "1 missing (" in message
    assert "1 unexpected (" in message
    assert "strange.key" in message
    assert "1 mis-shaped (" in message
    assert "norm2.bias" in message or "final_layer_norm.bias" in message
    assert "expected " in message


def changed_file(path: Path, folder: Path) -> Path:
    """A key of block 0 is dropped, one of block 1 is shorter, and one more is there."""
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors" if path.is_dir() else path
    is_safe = file.suffix == ".safetensors"
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = load_file(file) if is_safe else torch.load(file, weights_only=False)
    state = content if is_safe else content.get("teacher", content.get("model"))
    lost = next(k for k in state if k.endswith(("blocks.0.norm1.bias", "layers.0.fc1.bias")))
    short = next(
        k for k in state if k.endswith(("blocks.1.norm2.bias", "layers.1.final_layer_norm.bias"))
    )
    state[short] = state[short][:-1].clone()
    prefix = lost.partition("blocks.0.")[0] if "blocks.0." in lost else ""
    state[f"{prefix}strange.key"] = torch.zeros(3)
    del state[lost]
    if is_safe:
        save_file(content, file)
    else:
        torch.save(content, file)
    return path


@pytest.mark.parametrize("reader", LAYOUTS)
def test_another_encoders_file_is_refused(reader: str, tmp_path: Path) -> None:
    same = {"eat", "sslam"} if reader in ("eat", "sslam") else {reader}
    for other in set(LAYOUTS) - same:
        for layout, write in LAYOUTS[other].items():
            place = tmp_path / other / layout
            place.mkdir(parents=True)
            with pytest.raises(EncoderError, match="expected "):
                load_encoder(reader, weights=write(place))


def test_a_rank_or_a_kind_of_number_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    for key, value in (
        ("pos_embed", torch.zeros(513)),
        ("patch_embed.proj.weight", torch.tensor(1.0)),
        ("blocks.0.norm1.weight", torch.ones(DIM, dtype=torch.int64)),
    ):
        state = random_state(vit_shapes(64)) | {key: value}
        path = torch_file(tmp_path / "x.pth", {"model": state})
        with pytest.raises(EncoderError, match=f"1 mis-shaped .{key}"):
            load_encoder("audiomae", weights=path)


def test_keys_with_and_without_a_prefix_are_refused(tmp_path: Path) -> None:
    state = random_state(vit_shapes(64))
    path = torch_file(tmp_path / "x.pth", {"model": state | prefixed(state, "model.")})
    with pytest.raises(EncoderError, match=r"with and without the prefix 'model\.'"):
        load_encoder("audiomae", weights=path)


def test_the_same_bytes_are_the_same_encoder_in_a_folder_and_by_their_name(tmp_path: Path) -> None:
    state = prefixed(random_state(eat_shapes()), "model.")
    place = folder(tmp_path / "four", state, {"num_heads": 4})
    by_folder = load_encoder("eat", weights=place)
    by_name = load_encoder("eat", weights=place / "model.safetensors")
    assert by_folder.spec == by_name.spec
    assert by_name.spec.config["heads"] == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_heads": "4"}, "num_heads = '4', expected a whole number"),
        ({"layer_norm_first": True}, "layer_norm_first = True, only False is known"),
        ({"norm_eps": 1e-5}, "norm_eps = 1e-05, only 1e-06 is known"),
    ],
)
def test_settings_of_another_architecture_are_refused(
    config: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = folder(tmp_path / "x", prefixed(random_state(eat_shapes()), "model."), config)
    with pytest.raises(EncoderError, match=message):
        load_encoder("eat", weights=path)


def test_pre_trained_weights_are_not_taken_for_fine_tuned_ones(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="pre-trained weights of beats"):
        load_encoder("beats+", weights=beats(tmp_path))


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (Harmful(), r"posix\.system"),
        (fractions.Fraction(1, 2), r"fractions\.Fraction"),
        (Path, r"pathlib\.Path"),
    ],
)
def test_a_file_that_holds_more_than_tensors_is_never_loaded(
    extra: object, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = random_state(vit_shapes(64))
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pth"
        torch.save(
            {"model": state, "extra": extra}, path, _use_new_zipfile_serialization=not legacy
        )
        with pytest.raises(EncoderError, match=f"holds {named}, which is more than") as caught:
            load_encoder("audiomae", weights=path)
        assert "\x1b" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "harmed").exists()


def test_a_plain_pickle_and_garbage_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"model": Harmful()}))
    (tmp_path / "b.pt").write_bytes(b"\x00" * 100)
    (tmp_path / "c.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "d.pt").write_bytes(b"")
    for name in ("a.pt", "b.pt", "c.safetensors", "d.pt"):
        with pytest.raises(EncoderError, match=r"damaged or no file of torch|holds posix"):
            load_encoder("eat", weights=tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(EncoderError, match="holds a list"):
        load_encoder("eat", weights=tmp_path / "list.pt")


def test_the_allowed_classes_are_allowed_in_our_files_only(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    load_encoder("audiomae", weights=audiomae_fine_tuned(tmp_path))
    assert set(torch.serialization.get_safe_globals()) == set(before)
    assert argparse.Namespace not in before


def test_a_legacy_torch_file_loads(tmp_path: Path) -> None:
    state = random_state(vit_shapes(64))
    torch.save({"model": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_encoder("audiomae", weights=tmp_path / "old.pth").spec.name == "audiomae"


def test_a_loaded_encoder_does_not_change_with_its_file(tmp_path: Path) -> None:
    path = beats(tmp_path)
    encoder = load_encoder("beats", weights=path)
    before = last_patches(encoder, "beats")
    with path.open("r+b") as file:
        file.write(b"\x7f" * path.stat().st_size)
    assert torch.equal(last_patches(encoder, "beats"), before)


def test_no_weights_and_folders_without_any_say_what_is_expected(tmp_path: Path) -> None:
    for name in LAYOUTS:
        with pytest.raises(
            EncoderError, match=f"{name} has no bundled weights; it takes .*; pass it with --w"
        ):
            load_encoder(name)
    with pytest.raises(EncoderError, match=r"holds neither model\.safetensors nor pytorch_model"):
        load_encoder("eat", weights=tmp_path)
    place = LAYOUTS["eat"]["folder"](tmp_path)
    (place / "config.json").write_text("{")
    with pytest.raises(EncoderError, match=r"cannot read .*config\.json"):
        load_encoder("eat", weights=place)
    shutil.rmtree(place)


def test_heads_that_do_not_divide_the_channels_are_refused(tmp_path: Path) -> None:
    state = prefixed(random_state(eat_shapes()), "model.")
    path = folder(tmp_path / "x", state, {"num_heads": 5})
    with pytest.raises(EncoderError, match="128 channels do not make 5 attention heads"):
        load_encoder("eat", weights=path)
