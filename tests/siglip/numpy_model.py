"""The two towers once more, in float64 numpy, written from the papers' equations: what the real ones are held against.

Takes the loop layout as a flat dict; every function is given a prefix and reads its arrays under it.
"""

import numpy as np


def image_tower(p, config, image):
    """-> (tokens after the final LayerNorm, normalised embedding or None)."""
    (ph, pw), (gh, gw), width = config.image.patch, config.image.grid, config.image.spec.width
    kernel = p["img/embedding/kernel"]
    x = np.zeros((len(image), gh, gw, width))
    for i in range(gh):
        for j in range(gw):
            window = image[:, i * ph : (i + 1) * ph, j * pw : (j + 1) * pw]
            x[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel) + p["img/embedding/bias"]
    x = x.reshape(len(image), gh * gw, width)
    x = x + (p["img/pos_embedding"] if config.image.posemb == "learn" else _moco_positions(gh, gw, width))
    if config.image.pool == "tok":
        x = np.concatenate([np.repeat(p["img/cls"], len(image), axis=0), x], axis=1)
    tokens = _encoder(p, "img/Transformer/", config.image.spec.depth, x)
    pool = config.image.pool
    if pool == "none":
        return tokens, None
    z = _map_head(p, "img/MAPHead_0/", tokens) if pool == "map" else tokens.mean(1) if pool == "gap" else tokens[:, 0]
    return tokens, _normalised(_dense(p, "img/head/", z) if config.out_dim[0] else z)


def text_tower(p, config, ids):
    """-> (tokens after the final LayerNorm, normalised embedding)."""
    x = p["txt/Embed_0/embedding"][ids]
    x = (x @ p["txt/embed_out/kernel"] if config.text.embed_bottleneck else x) + p["txt/pos_embedding"]
    tokens = _encoder(p, "txt/Encoder_0/", config.text.spec.depth, x)
    if config.text.pool == "map":
        z = _map_head(p, "txt/MAPHead_0/", tokens)
    else:
        z = {"last": tokens[:, -1], "first": tokens[:, 0], "mean": tokens.mean(1), "max": tokens.max(1)}[
            config.text.pool
        ]
    return tokens, _normalised(_dense(p, "txt/head/", z) if config.out_dim[1] else z)


def _moco_positions(gh, gw, width):
    table = np.zeros((gh, gw, width))
    quarter = width // 4
    for k in range(quarter):
        frequency = 1 / 10_000 ** (k / max(quarter - 1, 1))
        for i in range(gh):
            for j in range(gw):
                angles = (np.sin(j * frequency), np.cos(j * frequency), np.sin(i * frequency), np.cos(i * frequency))
                table[i, j, k::quarter] = angles
    return table.reshape(1, gh * gw, width)


def _encoder(p, prefix, depth, x):
    for i in range(depth):
        block = f"{prefix}encoderblock_{i}/"
        y = _layer_norm(p, block + "LayerNorm_0/", x)
        attended = _attention(p, block + "MultiHeadDotProductAttention_0/", y, y)
        if block + "LayerNorm_1/scale" in p:
            x = x + attended
            x = x + _mlp(p, block + "MlpBlock_0/", _layer_norm(p, block + "LayerNorm_1/", x))
        else:  # in parallel
            x = x + attended + _mlp(p, block + "MlpBlock_0/", y)
    return _layer_norm(p, prefix + "encoder_norm/", x)


def _map_head(p, prefix, x):
    probe = np.repeat(p[prefix + "probe"], len(x), axis=0)
    y = _attention(p, prefix + "MultiHeadDotProductAttention_0/", probe, x)
    return (y + _mlp(p, prefix + "MlpBlock_0/", _layer_norm(p, prefix + "LayerNorm_0/", y)))[:, 0]


def _attention(p, prefix, queries, x):
    def project(name, x):
        y = np.einsum("bnd,dhk->bhnk", x, p[f"{prefix}{name}/kernel"])
        y = y + p[f"{prefix}{name}/bias"][None, :, None] if f"{prefix}{name}/bias" in p else y
        return _layer_norm(p, f"{prefix}{name}_ln/", y) if f"{prefix}{name}_ln/scale" in p else y

    q, k, v = project("query", queries), project("key", x), project("value", x)
    logits = np.einsum("bhqk,bhnk->bhqn", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bhqn,bhnk->bhqk", weights, v)
    return np.einsum("bhqk,hkd->bqd", heads, p[prefix + "out/kernel"]) + p[prefix + "out/bias"]


def _mlp(p, prefix, x):
    y = _dense(p, prefix + "Dense_0/", x)
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return _dense(p, prefix + "Dense_1/", y)


def _dense(p, prefix, x):
    return x @ p[prefix + "kernel"] + p[prefix + "bias"]


def _layer_norm(p, prefix, x):
    if prefix + "bias" not in p:  # RMSNorm: arXiv:1910.07467, equation 4
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[prefix + "scale"]
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p[prefix + "scale"] + p[prefix + "bias"]


def _normalised(z):
    return z / (np.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)
