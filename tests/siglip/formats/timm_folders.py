"""Folders as timm and open_clip write them, of a tiny model's parameters."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from siglip.trees import flatten
from tests.siglip.tiny import square_model

CONFIG = square_model(text={"width": 36, "num_heads": 4, "mlp_dim": 72})
ARGS = {"embed_dim": 36, "depth": 2, "num_heads": 3, "mlp_ratio": 128 / 36, "patch_size": 8, "img_size": [32, 32]}
TIMM = {
    "architecture": "vit_base_patch16_siglip_224", "num_classes": 0, "num_features": 36, "global_pool": "map",
    "model_args": ARGS | {"act_layer": "gelu_tanh", "drop_path_rate": 0.1, "in_chans": 3, "num_classes": 0},
    "pretrained_cfg": {
        "tag": "webli", "input_size": [3, 32, 32], "crop_pct": 0.9, "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
    },
}  # fmt: skip
TEXT = {
    "context_length": 7, "vocab_size": 61, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "width": 36, "heads": 4, "layers": 2,
    "mlp_ratio": 2.0, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"}, "tokenizer_kwargs": {"clean": "canonicalize"},
}  # fmt: skip
PIXELS = {"mean": [0.4, 0.5, 0.6], "std": [0.5, 0.5, 0.25], "interpolation": "bicubic", "resize_mode": "squash"}


def timm_state(params: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """The image tower as timm names it, written from its modules (Block, Attention, AttentionPoolLatent)."""
    p = {path: np.asarray(array) for path, array in flatten(params).items() if path.startswith("img/")}
    state = {
        "pos_embed": p["img/pos_embedding"],
        "patch_embed.proj.weight": p["img/embedding/kernel"].transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": p["img/embedding/bias"],
        **norm(p, "img/Transformer/encoder_norm", "norm"),
    }
    for i in range(CONFIG.image.spec.depth):
        here, there = f"img/Transformer/encoderblock_{i}/", f"blocks.{i}."
        state |= norm(p, here + "LayerNorm_0", there + "norm1") | norm(p, here + "LayerNorm_1", there + "norm2")
        state |= dense(p, here + "MlpBlock_0/Dense_0", there + "mlp.fc1") | dense(
            p, here + "MlpBlock_0/Dense_1", there + "mlp.fc2"
        )
        state |= stacked(p, here, ("query", "key", "value"), there + "attn.qkv.") | out(p, here, there + "attn.proj")
    if "img/MAPHead_0/probe" in p:
        here, there = "img/MAPHead_0/", "attn_pool."
        state |= {"attn_pool.latent": p["img/MAPHead_0/probe"]} | norm(p, here + "LayerNorm_0", there + "norm")
        state |= dense(p, here + "MlpBlock_0/Dense_0", there + "mlp.fc1") | dense(
            p, here + "MlpBlock_0/Dense_1", there + "mlp.fc2"
        )
        state |= stacked(p, here, ("query",), there + "q.") | stacked(p, here, ("key", "value"), there + "kv.")
        state |= out(p, here, there + "proj")
    return {prefix + key: np.array(array, order="C") for key, array in state.items()}


def open_clip_state(params: dict) -> dict[str, np.ndarray]:
    """Both towers as open_clip names them (TextTransformer, whose blocks have torch's MultiheadAttention)."""
    p = {path: np.asarray(array) for path, array in flatten(params).items()}
    state = {
        "logit_scale": p["t"][0],
        "logit_bias": p["b"][0],
        "text.positional_embedding": p["txt/pos_embedding"][0],
        "text.token_embedding.weight": p["txt/Embed_0/embedding"],
        **norm(p, "txt/Encoder_0/encoder_norm", "text.ln_final"),
        **dense(p, "txt/head", "text.text_projection"),
    }
    for i in range(CONFIG.text.spec.depth):
        here, there = f"txt/Encoder_0/encoderblock_{i}/", f"text.transformer.resblocks.{i}."
        state |= norm(p, here + "LayerNorm_0", there + "ln_1") | norm(p, here + "LayerNorm_1", there + "ln_2")
        state |= dense(p, here + "MlpBlock_0/Dense_0", there + "mlp.c_fc") | dense(
            p, here + "MlpBlock_0/Dense_1", there + "mlp.c_proj"
        )
        state |= stacked(p, here, ("query", "key", "value"), there + "attn.in_proj_") | out(
            p, here, there + "attn.out_proj"
        )
    return {key: np.array(array, order="C") for key, array in state.items()} | timm_state(params, "visual.trunk.")


def norm(p: dict, ours: str, theirs: str) -> dict[str, np.ndarray]:
    return {f"{theirs}.weight": p[f"{ours}/scale"], f"{theirs}.bias": p[f"{ours}/bias"]}


def dense(p: dict, ours: str, theirs: str) -> dict[str, np.ndarray]:
    return {f"{theirs}.weight": p[f"{ours}/kernel"].T, f"{theirs}.bias": p[f"{ours}/bias"]}


def stacked(p: dict, ours: str, parts: tuple[str, ...], theirs: str) -> dict[str, np.ndarray]:
    mha = f"{ours}MultiHeadDotProductAttention_0/"
    kernels = [p[f"{mha}{part}/kernel"].reshape(36, 36).T for part in parts]
    return {
        f"{theirs}weight": np.concatenate(kernels),
        f"{theirs}bias": np.concatenate([p[f"{mha}{part}/bias"].ravel() for part in parts]),
    }


def out(p: dict, ours: str, theirs: str) -> dict[str, np.ndarray]:
    mha = f"{ours}MultiHeadDotProductAttention_0/out"
    return {f"{theirs}.weight": p[f"{mha}/kernel"].reshape(36, 36).T, f"{theirs}.bias": p[f"{mha}/bias"]}


def timm_folder(folder: Path, params: dict, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TIMM | changes))
    save_file(timm_state(params), folder / "model.safetensors")
    return folder


def open_clip_folder(
    folder: Path, params: dict, *, text: dict | None = None, vision: dict | None = None, pixels: dict | None = None
) -> Path:
    """The published sizes are not ours, so the name of timm's model is changed for one that the test makes tiny."""
    folder.mkdir(exist_ok=True)
    vision = {
        "image_size": 32,
        "timm_model_name": "vit_tiny_patch8_siglip_32",
        "timm_pool": "map",
        "timm_proj": "none",
    } | (vision or {})
    model = {
        "embed_dim": 36,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision,
        "text_cfg": TEXT | (text or {}),
    }
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": PIXELS | (pixels or {})})
    )
    save_file(open_clip_state(params), folder / "open_clip_model.safetensors")
    return folder


def naflex_folder(folder: Path, params: dict, **args) -> Path:
    """As timm keeps a `NaFlexVit`: the patch embedding is a matrix over (row, column, channel), positions are a grid."""
    state = timm_state(params)
    flat = flatten(params)
    for name in ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"):
        del state[name]
    state["embeds.proj.weight"] = np.ascontiguousarray(flat["img/embedding/kernel"].reshape(-1, 36).T)
    state["embeds.proj.bias"] = flat["img/embedding/bias"]
    state["embeds.pos_embed"] = flat["img/pos_embedding"].reshape(1, 4, 4, 36)
    folder.mkdir(exist_ok=True)
    args = TIMM["model_args"] | {"pos_embed_grid_size": [4, 4]} | args
    args.pop("img_size")
    tree = TIMM | {"architecture": "naflexvit_base_patch16_siglip", "model_args": args}
    (folder / "config.json").write_text(json.dumps(tree))
    save_file(state, folder / "model.safetensors")
    return folder
