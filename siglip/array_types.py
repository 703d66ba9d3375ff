"""Array types for signatures: `Float[Array, "b e"]`, and nothing at all where jaxtyping is not installed.

The axes are one alphabet throughout: `b` pairs in the global batch, `bl` pairs on one device, `h w c` image, `n`
patches, `l` text tokens, `d` width, `e` shared embedding, `k` classes, `m` prompts.

The trap: GPU machines may hold only jax, flax, optax and orbax, so nothing else in siglip may import jaxtyping
directly.
"""

__all__ = ["Array", "Bool", "Float", "Int", "UInt8"]

try:
    from jaxtyping import Array, Bool, Float, Int, UInt8
except ImportError:
    from jax import Array

    class _Unchecked:
        """Stands for a jaxtyping dtype: `Float[Array, "b e"]` is then plain `Array`."""

        def __class_getitem__(cls, item: tuple[type, str]) -> type:
            return item[0]

    Bool = Float = Int = UInt8 = _Unchecked
