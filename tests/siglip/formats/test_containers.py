"""npz and safetensors, read and written one array at a time: equal to numpy's and safetensors' own, and proof against damage."""

import contextlib
import json
import tracemalloc
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from siglip.errors import UserError
from siglip.formats import big_vision, hugging_face
from siglip.formats.containers import LazyArray, open_npz, open_safetensors, write_npz, write_safetensors
from tests.siglip.tiny import random_params, square_model

RNG = np.random.default_rng(0)
ARRAYS = {
    "a/kernel": RNG.normal(size=(3, 5, 7)).astype(np.float32),
    "scalar": np.array(3, np.float32),
    "none": np.zeros((0, 4), np.float32),
    "half": RNG.normal(size=(9,)).astype(np.float16),
    "double": RNG.normal(size=(2, 2)),
    "bf16": np.asarray(jnp.asarray(RNG.normal(size=(4, 3)), jnp.bfloat16)),
}


def lazy(arrays: dict[str, np.ndarray]) -> dict[str, LazyArray]:
    return {key: LazyArray(array.shape, lambda array=array: array) for key, array in arrays.items()}


def read_all(opened: contextlib.AbstractContextManager) -> dict[str, np.ndarray]:
    with opened as stored:
        arrays = {key: array.read() for key, array in stored.items()}
        for key, array in stored.items():
            assert array.shape == arrays[key].shape
    return arrays


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].dtype == np.float32 and found[key].flags.c_contiguous
        np.testing.assert_array_equal(found[key], np.asarray(array).astype(np.float32))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes(tmp_path, save):
    save(tmp_path / "m.npz", **ARRAYS, columns=np.asfortranarray(ARRAYS["double"]), big_endian=np.array([1.5], ">f4"))
    found = read_all(open_npz(tmp_path / "m.npz"))
    same(found, ARRAYS | {"columns": ARRAYS["double"], "big_endian": np.array([1.5])})


def test_what_safetensors_writes(tmp_path):
    names = ["a/kernel", "scalar", "none", "half"]
    save_file({key: ARRAYS[key] for key in names}, tmp_path / "1.safetensors", metadata={"format": "pt"})
    save_file({"double": ARRAYS["double"], "bf16": ARRAYS["bf16"]}, tmp_path / "2.safetensors")
    same(read_all(open_safetensors([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])), ARRAYS)


def test_what_they_read(tmp_path):
    arrays = {key: ARRAYS[key] for key in ("a/kernel", "scalar", "none")} | {"t": ARRAYS["a/kernel"].T}
    write_npz(tmp_path / "m.npz", lazy(arrays))
    with np.load(tmp_path / "m.npz") as found:
        assert set(found) == set(arrays)
        for key, array in arrays.items():
            np.testing.assert_array_equal(found[key], array)
    write_safetensors(tmp_path / "m.safetensors", lazy(arrays))
    same(load_file(tmp_path / "m.safetensors"), arrays)
    with safe_open(tmp_path / "m.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("write", [write_npz, write_safetensors])
def test_a_write_that_fails_leaves_nothing(tmp_path, write):
    def fail() -> np.ndarray:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "m", lazy({"a": np.ones(3, np.float32)}) | {"b": LazyArray((3,), fail)})
    assert not list(tmp_path.iterdir())


def test_types_that_are_no_parameters_are_described_only(tmp_path):
    np.savez(tmp_path / "m.npz", objects=np.array([{}], object), count=np.int32(3), w=ARRAYS["a/kernel"])
    with open_npz(tmp_path / "m.npz") as stored:
        assert {key: array.dtype for key, array in stored.items()} == {
            "objects": "object",
            "count": "int32",
            "w": "float32",
        }
    save_file({"ids": np.arange(3), "w": ARRAYS["a/kernel"]}, tmp_path / "m.safetensors")
    with open_safetensors([tmp_path / "m.safetensors"]) as stored:
        assert {key: array.dtype for key, array in stored.items()} == {"ids": "I64", "w": "float32"}
        with pytest.raises(UserError, match="ids of .*m.safetensors is of a type that no parameter has"):
            stored["ids"].read()


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_only_what_is_read_is_in_memory(tmp_path, suffix):
    arrays = {f"large{i}": np.zeros((1 << 20,), np.float32) for i in range(8)} | {"small": np.ones(1 << 18, np.float32)}
    file = tmp_path / f"m.{suffix}"
    (write_npz if suffix == "npz" else write_safetensors)(file, lazy(arrays))
    tracemalloc.start()
    with open_npz(file) if suffix == "npz" else open_safetensors([file]) as stored:
        array = stored["small"].read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.sum() == 1 << 18
    assert peak < 4 * array.nbytes  # zipfile makes copies of a chunk; the 32 MiB beside are never read


def test_a_cpu_takes_the_arrays_as_they_are(tmp_path):
    """Otherwise a model would be in memory twice while it is loaded."""
    write_npz(tmp_path / "m.npz", lazy({"w": np.ones(1 << 16, np.float32)}))
    write_safetensors(
        tmp_path / "m.safetensors", lazy({"x": np.ones(3, np.float32), "w": np.ones(1 << 16, np.float32)})
    )
    for opened in (open_npz(tmp_path / "m.npz"), open_safetensors([tmp_path / "m.safetensors"])):
        array = read_all(opened)["w"]
        assert jax.device_put(array, jax.devices("cpu")[0]).unsafe_buffer_pointer() == array.ctypes.data


def test_a_key_that_is_there_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of it, and does it
        for value in (1.0, 2.0):
            with archive.open("w.npy", "w") as stream:
                np.lib.format.write_array(stream, np.array([value]))
    with pytest.raises(ValueError, match="m.npz holds w twice"), open_npz(tmp_path / "m.npz"):
        pass
    for name in ("1", "2"):
        save_file({"w": np.ones(2), name: np.ones(2)}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    with pytest.raises(ValueError, match="w is in .*1.safetensors and in .*2.safetensors"), open_safetensors(files):
        pass
    header = (
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    files[0].write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with (
        pytest.raises(ValueError, match=r"1.safetensors cannot be read at its header \(w twice\)"),
        open_safetensors(files[:1]),
    ):
        pass


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}, "w: 16 bytes do not make float32 of shape"),
        ({"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}, r"w has shape \(-2, -2\) at bytes 0 to 16"),
        (
            {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]},
            "where the header describes 4000",
        ),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "bytes where the header describes"),
        ({"dtype": "F32", "shape": 3, "data_offsets": [0, 12]}, "w is described as"),
        ([], r"w is described as \[\]"),
    ],
)
def test_headers_that_lie(tmp_path, entry, words):
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match=words), open_safetensors([tmp_path / "m.safetensors"]):
        pass


@pytest.mark.parametrize(
    "places",
    [
        {"v": (0, 8), "w": (0, 8)},
        {"v": (0, 8), "w": (4, 12)},
        {"v": (0, 8), "w": (12, 20)},
        {"v": (4, 12), "w": (12, 20)},
        {"v": (0, 8), "w": (8, 4)},
        {"v": (0, 8), "ids": (8, 24), "w": (16, 24)},
        {"v": (0, 8), "w": (8, 16.0)},
    ],
    ids=str,
)
def test_offsets_that_leave_gaps_or_overlap_are_refused(tmp_path, places):
    kinds = {"v": ("F32", [2]), "w": ("F32", [2]), "ids": ("I64", [2])}
    header = {
        key: {"dtype": kinds[key][0], "shape": kinds[key][1], "data_offsets": offsets}
        for key, offsets in places.items()
    }
    text, end = json.dumps(header).encode(), int(max(last for _, last in places.values()))
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"m.safetensors cannot be read at its header \((v|w)\b"):
        with open_safetensors([tmp_path / "m.safetensors"]):
            pass


def test_an_npy_header_that_lies(tmp_path):
    write_npz(tmp_path / "m.npz", lazy({"w": np.ones((3, 4), np.float32)}))
    with zipfile.ZipFile(tmp_path / "m.npz") as archive:
        member = archive.read("w.npy")
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("w.npy", member.replace(b"(3, 4)", b"(3, 9)"))
    with (
        pytest.raises(ValueError, match=r"at w \(48 bytes do not make float32 of shape \(3, 9\)\)"),
        open_npz(tmp_path / "m.npz"),
    ):
        pass


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    config = square_model(image={"depth": 1}, text={"depth": 1})
    params = random_params(config)
    hugging_face.write(folder, params, config)
    big_vision.write(folder / "m.npz", params, config)
    with np.load(folder / "m.npz") as stored:
        np.savez_compressed(folder / "packed.npz", **stored)
    return folder


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(["m.npz", "packed.npz", "model.safetensors"]))
def test_damage_is_one_line_or_nothing(models, tmp_path_factory, data, name):
    """Cut anywhere, or with bits flipped anywhere, mostly where the headers are: a ValueError, or a model."""
    whole = bytearray((models / name).read_bytes())
    # The index of a zip is at its end, a safetensors header at the start.
    end = len(whole) - 1
    position = st.one_of(st.integers(0, 4000), st.integers(end - 4000, end), st.integers(0, end))
    if data.draw(st.booleans(), label="cut"):
        del whole[data.draw(position, label="length") :]
    else:
        for at in data.draw(st.lists(position, min_size=1, max_size=4, unique=True), label="flips"):
            whole[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((models / "config.json").read_bytes())
    (folder / name).write_bytes(whole)
    try:
        params, _ = hugging_face.read(folder) if name == "model.safetensors" else big_vision.read(folder / name)
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error) and str(folder) in str(error)
    else:
        # Flipped numbers of a safetensors file go unnoticed, as does a flip in what a zip file says twice or for nothing.
        assert set(params) >= {"img"}


@pytest.mark.parametrize("read", [open_npz, lambda file: open_safetensors([file])])
def test_a_note_of_git_lfs_is_named(tmp_path, read):
    file = tmp_path / "model"
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 12345\n")
    with pytest.raises(UserError, match="is not the file, but Git LFS' note .*; get it with 'git lfs pull'"):
        with read(file):
            pass
