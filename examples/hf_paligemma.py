"""Hugging Face's PaliGemma with our image tower in it.

    python -m examples.hf_paligemma SRC --out DIR

    features = projector(tower(pixels))       tower(pixels) = our tokens: after the last LayerNorm, without pooling head

SRC's image tower is exported for transformers without its pooling head and read back by it (`siglip.exporting`), put into the
`vision_tower` of a PaliGemma whose Gemma is small and random, and compared with ours. The whole model is then saved, loaded
again by transformers and, its tower alone, by `siglip.load_encoder`. Needs the `interop` extra (torch, transformers 4.57 or 5).

The trap: transformers fills weights that it does not find with random numbers and warns. transformers 5 saves the tower as
`vision_tower.…`, which version 4 does not find; so what is saved here has version 4's names, which both find.
"""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from examples.captioner.data import SAMPLE, read_heldout
from siglip.atomic import new_folder
from siglip.cli import describe
from siglip.cli.arguments import parse
from siglip.exporting.export import export
from siglip.exporting.verification import compare
from siglip.formats.export_format import ExportMismatch
from siglip.formats.hf_export import check_all_loaded
from siglip.image_encoder import ImageEncoder, load_encoder
from siglip.models.vit import normalize_pixels

NEW_TOKENS = 8

_IMAGES = 4
_VOCAB = 1024
_BEGIN = 2
_PROMPT = (_BEGIN, 17, 23, 108)
_TOWER = "vision_tower."
_TOWER_V4 = "vision_tower.vision_model."


@dataclasses.dataclass(frozen=True)
class PaliGemmaArgs:
    """Build a small PaliGemma on an encoder, compare and save it.

    Attributes:
        src: a run's workdir, a checkpoint inside it, a big_vision .npz, or a Hugging Face folder.
        out: folder to make; must not exist.
        image_size: side in pixels; positions are resampled to it.
    """

    src: tyro.conf.Positional[str]
    out: str
    image_size: int | None = None


def build(tower: str | Path, *, seed: int = 0) -> Any:
    """A PaliGemma with a small random Gemma and projector, and the vision tower of an exported folder.

    Raises:
        ExportMismatch: the tower's keys are not those of the folder.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    weights, loading = transformers.SiglipVisionModel.from_pretrained(tower, output_loading_info=True)
    check_all_loaded(loading)
    config = transformers.PaliGemmaConfig(
        vision_config=weights.config.to_dict(),
        text_config={
            "model_type": "gemma",
            "vocab_size": _VOCAB,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": _BEGIN,
        },
        image_token_index=_VOCAB - 1,
        projection_dim=64,
        hidden_size=64,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    found = model.model.vision_tower.load_state_dict(weights.state_dict(), strict=False)
    check_all_loaded({"missing_keys": found.missing_keys, "unexpected_keys": found.unexpected_keys})
    return model.eval()


def image_features(model: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """float32 [b, h, w, 3] in [-1, 1] -> "image_tokens" of the tower [b, n, d], "features" that Gemma reads [b, n, e]."""
    import torch

    pixels = _pixels(images)
    with torch.no_grad():
        tokens = model.model.vision_tower(pixels).last_hidden_state
        features = model.model.get_image_features(pixels)
    if not isinstance(features, torch.Tensor):
        return {"image_tokens": tokens.numpy(), "features": features.pooler_output.numpy()}
    # Version 4 divides them by what its Gemma then multiplies all embeddings with.
    scale = model.config.text_config.hidden_size**0.5
    return {"image_tokens": tokens.numpy(), "features": features.numpy() * scale}


def expected_features(encoder: ImageEncoder, model: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """The same from our encoder and the model's projector."""
    tokens = np.asarray(encoder.tokens(images))
    projector = model.model.multi_modal_projector.linear
    kernel, bias = (parameter.detach().numpy() for parameter in (projector.weight, projector.bias))
    return {"image_tokens": tokens, "features": tokens @ kernel.T + bias}


def generate(model: Any, images: np.ndarray) -> np.ndarray:
    """float32 [b, h, w, 3] -> int [b, NEW_TOKENS]: the tokens after the image and a prompt; nonsense, as Gemma is random."""
    import torch

    tokens = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    prompt = torch.tensor([[model.config.image_token_id] * tokens + list(_PROMPT)] * len(images))
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            token_type_ids=torch.zeros_like(prompt),
            pixel_values=_pixels(images),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    return out[:, prompt.shape[1] :].numpy()


def save(model: Any, folder: str | Path) -> None:
    """`save_pretrained` under version 4's names, whichever version is running.

    Raises:
        FileExistsError: the folder exists.
    """
    with new_folder(Path(folder)) as partial:
        model.save_pretrained(partial, max_shard_size="100GB")
        _rename_tower(partial / "model.safetensors")


def load(folder: str | Path) -> Any:
    """The whole model again.

    Raises:
        ExportMismatch: transformers did not find a weight, or found one that it does not know.
    """
    import transformers

    model, loading = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    check_all_loaded(loading)
    return model.eval()


def _rename_tower(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(file)
    renamed = {_version_4_name(key): tensor for key, tensor in state.items()}
    if renamed.keys() != state.keys():
        save_file(renamed, file, metadata={"format": "pt"})


def _version_4_name(key: str) -> str:
    before, found, after = key.partition(_TOWER)
    if not found or key.startswith(before + _TOWER_V4):
        return key
    return f"{before}{_TOWER_V4}{after}"


def _pixels(images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def run(args: PaliGemmaArgs) -> None:
    """Builds, compares, saves, loads again; nothing is left of a run that fails.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError, UserError: no encoder, or one that PaliGemma cannot have.
        ExportMismatch: the two sides differ, or transformers does not load all weights.
    """
    encoder = load_encoder(args.src, args.image_size)
    images = {"image_size": encoder.spec.image_size, "resample": encoder.config.pixels.resample}
    heldout = read_heldout(f"{SAMPLE}/emoji-heldout-*.tar", limit=_IMAGES, **images)
    images = np.asarray(normalize_pixels(heldout.images))
    with new_folder(Path(args.out)) as out:
        export(args.src, format="hf", out=out / "tower", tower="image", head=False, image_size=args.image_size)
        model = build(out / "tower")
        expected = expected_features(encoder, model, images)
        for name, difference in compare(expected, image_features(model, images)).items():
            print(f"{name:<16}{difference:.1e}")
        save(model, out / "paligemma")
        again = load(out / "paligemma")
        compare(expected, image_features(again, images))
        written = generate(again, images)
        if not np.array_equal(written, generate(model, images)):
            raise ExportMismatch("the saved PaliGemma writes other tokens than the one that was saved")
        tokens = load_encoder(out / "paligemma").tokens(images)
        compare({"image_tokens": expected["image_tokens"]}, {"image_tokens": np.asarray(tokens)})
    print(f"wrote {args.out}: the same after loading it again, in transformers and in siglip")


def main(args: list[str]) -> int:
    """Returns the exit code: 0, 1 for a failed run, 2 for bad input."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs much
    try:
        run(parse(PaliGemmaArgs, args, prog="python -m examples.hf_paligemma"))
    except (Exception, KeyboardInterrupt) as error:
        code, line = describe(error)
        print(f"hf_paligemma: error: {line}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
