"""Both stages of the captioner at smoke size, on the shipped sample: what is seen, what is trained, what is written."""

import dataclasses
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import siglip
from examples.captioner import data, decoder, model, saved, train
from examples.captioner.__main__ import PROMPT, main
from examples.captioner.decoder import DecoderConfig
from examples.captioner.train import StageConfig
from siglip.formats import big_vision
from siglip.parallel import sharding
from tests.siglip.tiny import random_params, square_model

# Training the two stages takes longer than a fast test may.
pytestmark = [pytest.mark.slow]

SHARDS = f"{data.SAMPLE}/emoji-train-00000.tar"
BATCH = 16
STAGE_1 = StageConfig(steps=25, lr=6e-3, warmup_steps=3)
TINY = DecoderConfig(data.vocab_size(), width=32, depth=2, mlp_dim=48, num_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path, config = tmp_path_factory.mktemp("encoder") / "m.npz", square_model()
    big_vision.write(path, random_params(config), config)
    return path


@pytest.fixture(scope="module")
def mesh():
    return devices(1)


@pytest.fixture(scope="module")
def stage_1(source, mesh):
    """A captioner after stage 1, and the losses on the way."""
    return trained(model.init_captioner(siglip.load_encoder(source), TINY, seed=0), STAGE_1, mesh)


def devices(count):
    return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:count])


def trained(captioner, stage, mesh, *, blind=False):
    size = captioner.encoder.spec.image_size
    batches = data.training_batches(SHARDS, image_size=size, batch_size=BATCH, seed=0)
    try:
        return train.train_stage(captioner, stage, batches=batches, prompt=prompt(), mesh=mesh, blind=blind)
    finally:
        batches.close()


def prompt():
    return data.prompt_tokens(PROMPT)


def test_images_are_resized_as_the_encoders_were():
    found = {
        how: data.read_heldout(SHARDS, image_size=(16, 16), limit=2, resample=how).images
        for how in ("bilinear", "bicubic")
    }
    assert np.abs(found["bilinear"].astype(int) - found["bicubic"]).max() > 5


def random_images(captioner, count=8):
    size = captioner.encoder.spec.image_size
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def random_suffix(count, length=9):
    return np.random.default_rng(1).integers(2, TINY.vocab_size, (count, length), dtype=np.int32)


def same_bits(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32)) for a, b in leaves)


def test_at_the_start_the_image_is_not_seen(source, stage_1):
    start, suffix = model.init_captioner(siglip.load_encoder(source), TINY, seed=0), random_suffix(8)
    images = random_images(start)
    scores = jax.jit(model.suffix_logits)
    np.testing.assert_array_equal(
        scores(start, images, prompt(), suffix), scores(start, images[::-1].copy(), prompt(), suffix)
    )
    after, _ = stage_1
    changed = scores(after, images, prompt(), suffix) - scores(after, images[::-1].copy(), prompt(), suffix)
    assert np.abs(changed).max(axis=(1, 2)).min() > 1e-3


def test_stage_1_learns_and_leaves_the_encoder_alone(source, stage_1):
    captioner, losses = stage_1
    assert len(losses) == STAGE_1.steps and losses[0] > 8 and np.mean(losses[-5:]) < losses[0] - 2
    assert captioner.encoder.frozen and same_bits(captioner.encoder, siglip.load_encoder(source))
    assert np.any(captioner.connector["kernel"]) and np.any(captioner.connector["bias"])


def test_stage_2_trains_the_encoder_at_a_higher_resolution(source, stage_1, mesh):
    captioner, losses = stage_1
    larger = siglip.load_encoder(source, 48, frozen=False)
    captioner = dataclasses.replace(captioner, encoder=larger)
    stage = StageConfig(steps=6, lr=1e-3, warmup_steps=1, encoder_lr=1e-3, encoder_warmup_steps=5)
    assert larger.spec.tokens == 36
    after, more = trained(captioner, stage, mesh)
    # More image tokens than ever, of a larger image, and it goes on where it was.
    assert np.mean(more) < losses[0] - 2
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.encoder.params, larger.params)
    moved.pop("MAPHead_0")  # behind the tokens
    assert min(jax.tree.leaves(moved)) > 0


def test_the_encoders_learning_rate_has_a_warm_up_of_its_own(source, stage_1):
    captioner = dataclasses.replace(stage_1[0], encoder=siglip.load_encoder(source, frozen=False))
    gradients = jax.jit(jax.grad(model.caption_loss))
    images, suffix = random_images(captioner), random_suffix(8)

    def drift(warmup_steps):
        """How far the encoder is from where it was, after each of four steps."""
        stage = StageConfig(steps=40, lr=1e-3, warmup_steps=0, encoder_lr=1e-3, encoder_warmup_steps=warmup_steps)
        optimizer = train.make_optimizer(stage, captioner)
        now, state, update, found = captioner, jax.jit(optimizer.init)(captioner), jax.jit(optimizer.update), []
        for _ in range(4):
            changes, state = update(gradients(now, images, prompt(), suffix), state, now)
            now = optax.apply_updates(now, changes)
            assert not same_bits(now.decoder, captioner.decoder)
            change = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), now.encoder.params, captioner.encoder.params)
            found.append(float(sum(jax.tree.leaves(change))) ** 0.5)
        return found

    slow, at_once = drift(30), drift(0)
    assert slow[0] == 0 < at_once[0]
    # Four updates at 0, 1, 2 and 3 thirtieths of the way up, against four at the top.
    assert 0 < slow[3] < 0.1 * at_once[3]


def test_who_sees_whom():
    params, prefix, total = decoder.init_decoder(TINY, jax.random.key(3)), 5, 9
    run = jax.jit(lambda x: decoder.run_blocks(params, x, decoder.prefix_mask(prefix, total))[0])
    x = jax.random.normal(jax.random.key(4), (1, total, TINY.width))
    sees = np.zeros((total, total), bool)
    for j in range(total):
        moved = run(x.at[0, j].add(0.5)) != run(x)
        sees[:, j] = np.any(moved[0], axis=-1)
    expected = np.tril(np.ones((total, total), bool))
    expected[:, :prefix] = True
    np.testing.assert_array_equal(sees, expected)


def test_greedy_writing_is_teacher_forcing(stage_1):
    captioner, _ = stage_1
    images = data.read_heldout(SHARDS, image_size=captioner.encoder.spec.image_size, limit=8).images
    # After so few steps it ends at once; one whose end token scores 0 writes on.
    table = captioner.decoder["embedding"].at[model.END].set(0)
    talkative = dataclasses.replace(captioner, decoder={**captioner.decoder, "embedding": table})
    for writer in (captioner, talkative):
        written = np.asarray(model.write_captions(writer, images, prompt(), batch=8, length=data.CAPTION_LENGTH))
        best = np.argmax(model.suffix_logits(writer, images, prompt(), written), axis=-1)
        ended_before = np.cumsum(written == model.END, axis=1) - (written == model.END) > 0
        assert np.all(written[ended_before] == model.END)
        np.testing.assert_array_equal(written[~ended_before], best[~ended_before])
    assert not ended_before[:, 1:4].any()


def test_the_loss_is_of_the_suffix_up_to_its_first_end(stage_1):
    captioner, _ = stage_1
    images, suffix = random_images(captioner, 2), random_suffix(2)
    suffix[0, 4] = suffix[0, 7] = model.END
    scores = np.asarray(model.suffix_logits(captioner, images, prompt(), suffix), np.float64)
    nats = np.log(np.exp(scores).sum(-1)) - np.take_along_axis(scores, suffix[..., None], -1)[..., 0]
    found, tokens = model.caption_losses(captioner, images, prompt(), suffix)
    np.testing.assert_array_equal(tokens, [5, 9])
    np.testing.assert_allclose(found, [nats[0, :5].sum(), nats[1].sum()], rtol=1e-5)
    padded = suffix.copy()
    padded[0, 5:] = model.END
    np.testing.assert_array_equal(model.caption_losses(captioner, images, prompt(), padded)[0][0], found[0])


def test_blind_decoders_see_captions_alone(source, mesh):
    stage = StageConfig(steps=2, lr=1e-3, warmup_steps=0)
    captioner, _ = trained(model.init_captioner(siglip.load_encoder(source), TINY, seed=0), stage, mesh, blind=True)
    assert not np.any(captioner.connector["kernel"])
    heldout = data.read_heldout(SHARDS, image_size=captioner.encoder.spec.image_size, limit=9)
    metrics, written = train.evaluate(captioner, heldout, prompt(), mesh=mesh, batch_size=8, blind=True)
    assert metrics["loss"] == metrics["wrong_image"] and len(written) == 9 and len(set(written)) == 1


def test_measured_over_all_images_whatever_the_batch(stage_1, mesh):
    captioner, _ = stage_1
    heldout = data.read_heldout(SHARDS, image_size=captioner.encoder.spec.image_size, limit=20)
    found = [train.evaluate(captioner, heldout, prompt(), mesh=mesh, batch_size=size) for size in (8, 24)]
    assert found[0][1] == found[1][1]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][0]["loss"] < 7 and heldout.captions[0] == "flag: san marino"


def test_many_devices_train_as_one_does(source, stage_1):
    _, losses = trained(model.init_captioner(siglip.load_encoder(source), TINY, seed=0), STAGE_1, devices(2))
    np.testing.assert_allclose(losses[:4], stage_1[1][:4], rtol=1e-5)


@pytest.mark.interop
def test_the_decoder_is_gemma():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, vocab_size=50)
    params = decoder.init_decoder(config, jax.random.key(5))
    blocks = {
        name: leaf + 0.1 * jax.random.normal(jax.random.key(6), leaf.shape) for name, leaf in params["blocks"].items()
    }
    params = params | {"blocks": blocks, "norm": params["norm"] + 0.3}
    sizes = {"hidden_size": config.width, "intermediate_size": config.mlp_dim, "num_hidden_layers": config.depth}
    heads = {"num_attention_heads": config.num_heads, "num_key_value_heads": 1, "head_dim": config.head_dim}
    theirs = transformers.GemmaForCausalLM(transformers.GemmaConfig(vocab_size=50, **sizes, **heads)).eval()
    state = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["norm"]}
    state["lm_head.weight"] = params["embedding"]
    for i in range(config.depth):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
        of_block = {
            "input_layernorm": p["attention_norm"],
            "self_attn.q_proj": p["query"].reshape(config.width, -1).T,
            "self_attn.k_proj": p["key"].T,
            "self_attn.v_proj": p["value"].T,
            "self_attn.o_proj": p["out"].reshape(-1, config.width).T,
            "post_attention_layernorm": p["mlp_norm"],
            "mlp.gate_proj": p["gate_up"][0].T,
            "mlp.up_proj": p["gate_up"][1].T,
            "mlp.down_proj": p["down"].T,
        }
        state |= {f"model.layers.{i}.{name}.weight": leaf for name, leaf in of_block.items()}
    theirs.load_state_dict({name: torch.from_numpy(np.array(leaf)) for name, leaf in state.items()})
    tokens = np.random.default_rng(7).integers(0, 50, (2, 11))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    x, _ = decoder.run_blocks(params, decoder.embed(params, tokens), decoder.prefix_mask(0, 11))
    np.testing.assert_allclose(decoder.logits(params, x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_saved_and_loaded(stage_1, tmp_path):
    captioner, _ = stage_1
    saved.save_captioner(tmp_path / "out", captioner, prompt=PROMPT, metrics={"stage 1": {"loss": 1.0}})
    again, words = saved.load_captioner(tmp_path / "out")
    assert words == PROMPT and same_bits(again.encoder.params, captioner.encoder.params)
    assert same_bits((again.connector, again.decoder), (captioner.connector, captioner.decoder))
    images = random_images(captioner, 2)
    scores = [np.asarray(model.suffix_logits(c, images, prompt(), random_suffix(2))) for c in (again, captioner)]
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)
    # The tower is a SRC again.
    assert siglip.load_encoder(tmp_path / "out" / saved.ENCODER).spec == captioner.encoder.spec
    with pytest.raises(FileExistsError, match="exists; name a new one"):
        saved.save_captioner(tmp_path / "out", captioner, prompt=PROMPT, metrics={})
    with pytest.raises(FileNotFoundError, match="has no captioner.json; make one"):
        saved.load_captioner(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_command_line(source, tmp_path, capsys):
    heldout = tmp_path / "few.tar"
    with tarfile.open(SHARDS) as whole, tarfile.open(heldout, "w") as few:
        for member in whole.getmembers()[:36]:
            few.addfile(member, whole.extractfile(member))
    short = ["--stage1.steps", "3", "--stage1.warmup-steps", "1", "--stage2.steps", "2", "--stage2.warmup-steps", "1"]
    short += ["--stage2.encoder-warmup-steps", "1", "--batch-size", "8", "--heldout", str(heldout)]
    assert main([str(source), "--out", str(tmp_path / "out"), *short]) == 0
    printed = capsys.readouterr().out
    assert "stage 2: 2 steps, (48, 48) px, 36 image tokens" in printed and "flag: san marino" in printed
    assert {"encoder.npz", "decoder.safetensors", "captioner.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    captioner, _ = saved.load_captioner(tmp_path / "out")
    assert captioner.encoder.spec.image_size == (48, 48)
    assert not same_bits(captioner.encoder.params, siglip.load_encoder(source, 48).params)

    for args, message in (
        ([str(source), "--out", str(tmp_path / "out")], "exists; name a new folder"),
        (["absent.npz", "--out", str(tmp_path / "new")], "no file"),
        ([str(source), "--out", str(tmp_path / "new"), "--stage1.steps", "0"], "steps=0 must be at least 1"),
        ([str(source), "--out", str(tmp_path / "new"), "--stage1.encoder-lr", "1"], "stage 1 keeps the encoder frozen"),
        ([str(source), "--out", str(tmp_path / "new"), "--batch-size", "9"], "9 does not divide"),
    ):
        assert main(args) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_frozen_or_not_is_the_stages_choice(source, mesh):
    captioner = model.init_captioner(siglip.load_encoder(source), TINY, seed=0)
    stage = StageConfig(steps=2, lr=1e-3, warmup_steps=0, encoder_lr=1e-3)
    with pytest.raises(ValueError, match="encoder_lr=0.001 but the encoder is frozen; use encoder.unfrozen"):
        train.train_stage(captioner, stage, batches=[], prompt=prompt(), mesh=mesh)
    for wrong in ({"steps": 0}, {"lr": 0}, {"warmup_steps": 2}, {"encoder_lr": -1}):
        with pytest.raises(ValueError, match="must be"):
            dataclasses.replace(stage, **wrong)
    with pytest.raises(ValueError, match="head_dim=3 must be even"):
        DecoderConfig(10, head_dim=3)
