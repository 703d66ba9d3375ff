"""What bfloat16 costs the towers' outputs: products alone, or the residual stream as well, by depth.

    python benchmarks/residual_dtype.py --depths 12 27 48 --out benchmarks/results/residual_dtype.json

Fresh parameters, random images; errors are relative, in the norm, against the same tower in float32: of the tokens after the last
LayerNorm, of the normalised embedding, and of the gradient of all kernels for a random direction of the embedding. Runs anywhere;
on a CPU bfloat16 products round as an accelerator's do. Fresh towers are mild: streams of trained ones have larger outliers.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from siglip import trees
from siglip.models.two_tower import ImageConfig, ModelConfig, init_params, make_model

KINDS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 + stream": {"dtype": "bfloat16", "residual_dtype": "bfloat16"},
}


def outputs(image, params, pixels, direction):
    """Tokens, embedding and kernels' gradients, in float64."""
    module = make_model(ModelConfig(image, text=None))

    def project(params):
        zimg, _, out = module.apply({"params": params}, {"image": pixels})
        return (zimg * direction).sum(), (out["img/encoded"], zimg)

    grads, (tokens, zimg) = jax.jit(jax.grad(project, has_aux=True))(params)
    kernels = [np.ravel(leaf) for path, leaf in trees.flatten(grads).items() if path.endswith("kernel")]
    found = {"tokens": tokens, "embedding": zimg, "kernel gradients": np.concatenate(kernels)}
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


def measure(depth, args):
    """A row per kind but float32."""
    sizes = {"width": args.width, "mlp_dim": 4 * args.width, "num_heads": args.width // 64, "depth": depth}
    image = ImageConfig("B/16", **sizes, image_size=(args.image_size, args.image_size), scan=True)
    key = jax.random.key(args.seed)
    params = jax.jit(lambda key: init_params(ModelConfig(image, text=None, out_dim=(None, None)), key))(key)
    pixels = jax.random.uniform(key, (args.images, *image.image_size, 3), jnp.float32, -1, 1)
    direction = jax.random.normal(key, (args.images, args.width))
    found = {
        kind: outputs(ImageConfig(**(vars(image) | fields)), params, pixels, direction)
        for kind, fields in KINDS.items()
    }
    exact = found.pop("float32")
    errors = {
        kind: {
            name: float(np.linalg.norm(value - exact[name]) / np.linalg.norm(exact[name])) for name, value in of.items()
        }
        for kind, of in found.items()
    }
    return [{"depth": depth, "kind": kind, **row} for kind, row in errors.items()]


def main():
    """Prints a row per depth and kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 27, 48])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="also write the rows to this JSON file")
    args = parser.parse_args()
    rows = []
    print(f"{'depth':>5s}  {'kind':18s} {'tokens':>9s} {'embedding':>9s} {'kernel gradients':>16s}")
    for depth in args.depths:
        for row in measure(depth, args):
            rows.append(row)
            values = (row["tokens"], row["embedding"], row["kernel gradients"])
            print(f"{depth:5d}  {row['kind']:18s} {values[0]:9.2e} {values[1]:9.2e} {values[2]:16.2e}", flush=True)
    if args.out:
        about = {name: value for name, value in vars(args).items() if name != "out"}
        about |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
