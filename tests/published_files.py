"""Small random checkpoints in the publishers' file layouts.

Depth 2, 128 channels, 2 heads of 64, real patch and mel geometry. Norms and biases are perturbed,
so that one that is left out shows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

DIM, DEPTH, HEADS, HIDDEN = 128, 2, 2, 256
State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def random_state(shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0) -> State:
    """Tensors of these shapes from NumPy's generator; norms' weights are around 1."""
    rng = np.random.default_rng(seed)
    state = {}
    for key, shape in shapes.items():
        values = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        is_norm = key.endswith("weight") and len(shape) == 1
        scale = 0.1 if len(shape) < 2 else 1.0 / np.sqrt(np.prod(shape[1:]))
        state[key] = values * float(scale) + float(is_norm)
    return state


def block_shapes(prefix: str, *, dim: int = DIM, hidden: int = HIDDEN) -> Shapes:
    """A transformer block with timm's names."""
    sizes: Shapes = {
        "norm1": (dim,),
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "norm2": (dim,),
        "mlp.fc1": (hidden, dim),
        "mlp.fc2": (dim, hidden),
    }
    shapes: Shapes = {}
    for name, shape in sizes.items():
        shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
    return shapes


def vit_shapes(n_times: int, *, dim: int = DIM, depth: int = DEPTH, hidden: int = HIDDEN) -> Shapes:
    """AudioMAE, ASiT, Bird-MAE."""
    shapes: Shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + 8 * n_times, dim),
        "patch_embed.proj.weight": (dim, 1, 16, 16),
        "patch_embed.proj.bias": (dim,),
    }
    for index in range(depth):
        shapes |= block_shapes(f"blocks.{index}", dim=dim, hidden=hidden)
    return shapes | {"norm.weight": (dim,), "norm.bias": (dim,)}


def eat_shapes(
    n_positions: int = 1024, *, dim: int = DIM, depth: int = DEPTH, hidden: int = HIDDEN
) -> Shapes:
    """EAT and SSLAM under the names of a folder, without the prefix `model.`."""
    shapes: Shapes = {
        "extra_tokens": (1, 1, dim),
        "local_encoder.proj.weight": (dim, 1, 16, 16),
        "local_encoder.proj.bias": (dim,),
        "fixed_positional_encoder.positions": (1, n_positions, dim),
        "pre_norm.weight": (dim,),
        "pre_norm.bias": (dim,),
    }
    for index in range(depth):
        shapes |= block_shapes(f"blocks.{index}", dim=dim, hidden=hidden)
    return shapes


def bat_shapes(*, dim: int = DIM, depth: int = DEPTH, hidden: int = HIDDEN) -> Shapes:
    shapes: Shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 512, dim),
        "patch_embed.proj.weight": (dim, 1, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "pre_norm.weight": (dim,),
        "pre_norm.bias": (dim,),
    }
    for index in range(depth):
        gate = f"blocks.{index}.attn.gate"
        shapes |= block_shapes(f"blocks.{index}", dim=dim, hidden=hidden)
        shapes |= {f"{gate}.weight": (dim, dim), f"{gate}.bias": (dim,)}
    return shapes


def dasheng_shapes() -> Shapes:
    shapes: Shapes = {
        "time_pos_embed": (1, DIM, 1, 252),
        "freq_pos_embed": (1, DIM, 1, 1),
        "init_bn.1.weight": (64,),
        "init_bn.1.bias": (64,),
        "init_bn.1.running_mean": (64,),
        "init_bn.1.running_var": (64,),
        "patch_embed.proj.weight": (DIM, 1, 64, 4),
        "patch_embed.proj.bias": (DIM,),
    }
    for index in range(DEPTH):
        shapes |= block_shapes(f"blocks.{index}")
    return shapes | {"norm.weight": (DIM,), "norm.bias": (DIM,)}


def dasheng_state(*, seed: int = 0) -> State:
    state = random_state(dasheng_shapes(), seed=seed)
    # As after training on decibels.
    state["init_bn.1.running_mean"] = state["init_bn.1.running_mean"] * 50 - 20
    state["init_bn.1.running_var"] = state["init_bn.1.running_var"].abs() * 1_000 + 100
    return state | {"init_bn.1.num_batches_tracked": torch.tensor(7)}


BEATS_CFG: dict[str, Any] = {
    "input_patch_size": 16,
    "embed_dim": 64,
    "conv_bias": False,
    "encoder_layers": DEPTH,
    "encoder_embed_dim": DIM,
    "encoder_ffn_embed_dim": HIDDEN,
    "encoder_attention_heads": HEADS,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "deep_norm": True,
    "dropout": 0.1,
    "encoder_layerdrop": 0.05,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "relative_position_embedding": True,
    "num_buckets": 320,
    "max_distance": 800,
    "gru_rel_pos": True,
    "finetuned_model": False,
}


def beats_shapes(cfg: Mapping[str, Any] = BEATS_CFG) -> Shapes:
    dim, hidden, heads = (
        cfg[f"encoder_{name}"] for name in ("embed_dim", "ffn_embed_dim", "attention_heads")
    )
    narrow = cfg["embed_dim"]
    shapes: Shapes = {
        "post_extract_proj.weight": (dim, narrow),
        "post_extract_proj.bias": (dim,),
        "patch_embedding.weight": (narrow, 1, 16, 16),
        "encoder.pos_conv.0.bias": (dim,),
        "encoder.pos_conv.0.weight_g": (1, 1, cfg["conv_pos"]),
        "encoder.pos_conv.0.weight_v": (dim, dim // cfg["conv_pos_groups"], cfg["conv_pos"]),
        "encoder.layer_norm.weight": (dim,),
        "encoder.layer_norm.bias": (dim,),
        "layer_norm.weight": (narrow,),
        "layer_norm.bias": (narrow,),
    }
    for index in range(cfg["encoder_layers"]):
        layer = f"encoder.layers.{index}"
        sizes: Shapes = {
            "self_attn.grep_linear": (8, dim // heads),
            "self_attn_layer_norm": (dim,),
            "fc1": (hidden, dim),
            "fc2": (dim, hidden),
            "final_layer_norm": (dim,),
        }
        sizes |= {f"self_attn.{name}_proj": (dim, dim) for name in ("q", "k", "v", "out")}
        for name, shape in sizes.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        shapes[f"{layer}.self_attn.grep_a"] = (1, heads, 1, 1)
        shapes[f"{layer}.self_attn.relative_attention_bias.weight"] = (cfg["num_buckets"], heads)
    return shapes


def beats_state(cfg: Mapping[str, Any] = BEATS_CFG, *, seed: int = 0) -> State:
    state = random_state(beats_shapes(cfg), seed=seed)
    state["encoder.pos_conv.0.weight_g"] = state["encoder.pos_conv.0.weight_g"].abs() + 0.5
    table = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
    for index in range(cfg["encoder_layers"]):
        state[table.format(index)] = state[table.format(0)]
        # So that gates and biases matter.
        state[f"encoder.layers.{index}.self_attn.grep_linear.weight"] *= 4
    state |= {key: value * 8 for key, value in state.items() if key.endswith("bias.weight")}
    return state


def prefixed(state: Mapping[str, Tensor], prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def head(prefix: str = "", *, dim: int = DIM) -> State:
    """What fine-tuning adds."""
    shapes: Shapes = {
        f"{prefix}fc_norm.weight": (dim,),
        f"{prefix}fc_norm.bias": (dim,),
        f"{prefix}head.weight": (527, dim),
        f"{prefix}head.bias": (527,),
    }
    return random_state(shapes, seed=9)


def folder(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """A folder of the Hugging Face hub."""
    path.mkdir()
    save_file({key: value.contiguous() for key, value in state.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def torch_file(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


ARGUMENTS = argparse.Namespace(model="x", output_dir=PosixPath("/checkpoint/x"), lr=2e-4)


def beats(path: Path) -> Path:
    return torch_file(path / "beats.pt", {"cfg": BEATS_CFG, "model": beats_state()})


def beats_fine_tuned(path: Path) -> Path:
    predictor = random_state({"predictor.weight": (527, DIM), "predictor.bias": (527,)})
    content = {
        "cfg": BEATS_CFG | {"finetuned_model": True, "predictor_class": 527, "dropout": 0.0},
        "model": beats_state() | predictor,
        "label_dict": {0: "/m/09x0r"},
    }
    return torch_file(path / "beats_plus.pt", content)


def fairseq_names(state: Mapping[str, Tensor]) -> State:
    """Names of a folder of EAT as those of its fairseq files."""
    image = "modality_encoders.IMAGE."
    return {
        key
        if key.startswith("blocks.")
        else image + key.replace("pre_norm", "context_encoder.norm"): value
        for key, value in state.items()
    }


FAIRSEQ_CFG = {
    "_name": None,
    "common": {"fp16": True},
    "model": {"num_heads": HEADS, "depth": DEPTH},
}


def eat(path: Path, *, half: bool = False) -> Path:
    state = fairseq_names(random_state(eat_shapes()))
    decoder = random_state({"modality_encoders.IMAGE.decoder.proj.weight": (DIM, DIM)})
    model: dict[str, Any] = {k: v.half() if half else v for k, v in (state | decoder).items()}
    model["_ema"] = {key: torch.full_like(value, torch.nan) for key, value in state.items()}
    return torch_file(path / f"eat_{half}.pt", {"args": None, "cfg": FAIRSEQ_CFG, "model": model})


def eat_half(path: Path) -> Path:
    return eat(path, half=True)


def eat_fine_tuned(path: Path) -> Path:
    # Its head stands beside the encoder.
    model = prefixed(fairseq_names(random_state(eat_shapes())), "model.") | head()
    return torch_file(path / "eat_plus.pt", {"args": None, "cfg": FAIRSEQ_CFG, "model": model})


EAT_CONFIG = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "model_type": "eat"}


def eat_folder(path: Path) -> Path:
    return folder(path / "eat", prefixed(random_state(eat_shapes()), "model."), EAT_CONFIG)


def eat_folder_fine_tuned(path: Path) -> Path:
    state = prefixed(random_state(eat_shapes()), "model.") | head("model.")
    return folder(path / "eat_plus", state, EAT_CONFIG)


def audiomae(path: Path) -> Path:
    decoder = random_state({"mask_token": (1, 1, 64), "decoder_pos_embed": (1, 513, 64)})
    decoder |= random_state(block_shapes("decoder_blocks.0", dim=64))
    content = {"model": random_state(vit_shapes(64)) | decoder, "args": ARGUMENTS, "epoch": 32}
    return torch_file(path / "audiomae.pth", content)


def audiomae_fine_tuned(path: Path) -> Path:
    state = random_state(vit_shapes(64))
    del state["norm.weight"], state["norm.bias"]
    return torch_file(path / "audiomae_plus.pth", {"model": state | head(), "args": ARGUMENTS})


def audiomae_folder(path: Path) -> Path:
    place = path / "audiomae"
    place.mkdir()
    torch.save(random_state(vit_shapes(64)), place / "pytorch_model.bin")
    config = {"architecture": "vit_base_patch16_224", "model_args": {"num_heads": HEADS}}
    (place / "config.json").write_text(json.dumps(config))
    return place


def asit(path: Path) -> Path:
    teacher = prefixed(random_state(vit_shapes(37)), "backbone.")
    heads = random_state(
        {"head_cls.mlp.0.weight": (64, DIM), "head_recons.mlp.0.weight": (48, DIM)}
    )
    student = prefixed(random_state(vit_shapes(37), seed=5), "module.backbone.")
    content = {"student": student, "teacher": teacher | heads, "epoch": 3, "args": ARGUMENTS}
    return torch_file(path / "asit.pth", content)


def asit_student_names(path: Path) -> Path:
    """A teacher that was wrapped for several devices."""
    teacher = prefixed(random_state(vit_shapes(37)), "module.backbone.")
    return torch_file(path / "asit_wrapped.pth", {"teacher": teacher})


def dasheng(path: Path) -> Path:
    from torchaudio.functional import melscale_fbanks

    front_end = {
        "front_end.0.spectrogram.window": torch.hann_window(512),
        "front_end.0.mel_scale.fb": melscale_fbanks(257, 0.0, 8_000.0, 64, 16_000),
    }
    config = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
    return torch_file(path / "dasheng.pt", {"model": dasheng_state() | front_end, "config": config})


def dasheng_folder(path: Path) -> Path:
    config = {"name": "dasheng-base", "encoder_kwargs": {"num_heads": HEADS, "embed_dim": DIM}}
    return folder(path / "dasheng", prefixed(dasheng_state(), "encoder."), config)


def bird_mae_folder(path: Path) -> Path:
    state = random_state(vit_shapes(32))
    return folder(path / "bird", state, {"num_heads": HEADS, "global_pool": "mean"})


def bird_mae_folder_prefixed(path: Path) -> Path:
    state = prefixed(random_state(vit_shapes(32)), "model.")
    return folder(path / "bird_model", state, {"num_heads": HEADS})


def bird_mae_lightning(path: Path) -> Path:
    decoder = random_state(
        {"decoder.decoder_pred.weight": (256, 64), "decoder.mask_token": (1, 1, 64)}
    )
    state = prefixed(random_state(vit_shapes(32)), "encoder.") | decoder
    return torch_file(path / "bird.ckpt", {"state_dict": state, "epoch": 1, "global_step": 2})


def bat(path: Path) -> Path:
    save_file(random_state(bat_shapes()), path / "model.safetensors")
    return path / "model.safetensors"


def bat_training(path: Path) -> Path:
    state = random_state(bat_shapes())
    teacher = prefixed(random_state(bat_shapes(), seed=3), "teacher.encoder.")
    return torch_file(
        path / "bat.pt", {"state_dict": prefixed(state, "student.encoder.") | teacher}
    )


LAYOUTS: dict[str, dict[str, Callable[[Path], Path]]] = {
    "beats": {"file": beats, "fine-tuned": beats_fine_tuned},
    "eat": {
        "fairseq": eat,
        "fairseq, fine-tuned": eat_fine_tuned,
        "folder": eat_folder,
        "folder, fine-tuned": eat_folder_fine_tuned,
    },
    "sslam": {"fairseq": eat, "folder": eat_folder, "folder, fine-tuned": eat_folder_fine_tuned},
    "audiomae": {"file": audiomae, "folder": audiomae_folder},
    "asit": {"file": asit, "wrapped": asit_student_names},
    "dasheng": {"file": dasheng, "folder": dasheng_folder},
    "bird-mae": {
        "folder": bird_mae_folder,
        "folder, prefixed": bird_mae_folder_prefixed,
        "lightning": bird_mae_lightning,
    },
    "bat": {"file": bat, "training": bat_training},
}
"""Encoder -> layout -> its file or folder; all of an encoder hold the same weights."""
NATURAL_S = {"asit": 6.0, "bird-mae": 5.0}
"""Seconds of a clip, where not 10."""
