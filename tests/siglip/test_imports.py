"""What a machine with only jax, flax, optax and orbax can do, in a process of its own where all else is blocked."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

BLOCK = """
    import sys

    BLOCKED = ["tensorflow", "tensorflow_text", "grain", "PIL", "sentencepiece", "pyarrow", "safetensors", "matplotlib",
               "wandb", "tyro", "jaxtyping", "torch", "transformers", "array_record", "cv2", "ray", "ftfy", "pycld2", "xxhash",
               "simplejpeg", "cykooz", "fsspec", "google_crc32c", "tokenizers"]

    from importlib.machinery import PathFinder

    find = PathFinder.find_spec
    PathFinder.find_spec = lambda name, *args: None if name.split(".")[0] in BLOCKED else find(name, *args)
"""


def run_python(code: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_but_the_command_line_imports():
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "siglip").rglob("*.py")
        if "cli" not in path.parts and path.name != "__init__.py"
    )
    assert "siglip.training.loop" in modules and len(modules) > 20
    run_python(
        BLOCK + "\n    import importlib\n    for name in sys.argv[1:]:\n        importlib.import_module(name)", *modules
    )


def test_training_on_batches_handed_to_it(tmp_path):
    out = run_python(
        BLOCK
        + """
    from pathlib import Path
    from siglip.workdir.metrics import read_metrics
    from siglip.training.loop import train
    from tests.siglip.tiny_run import TinyBatches, tiny_config, use_devices
    import jax, pytest

    jax.config.update("jax_num_cpu_devices", 8)
    use_devices(pytest.MonkeyPatch(), 2)  # other tests' program, which is compiled once
    config = tiny_config(Path(sys.argv[1]))
    state = train(config, TinyBatches())
    assert not [name for name in BLOCKED if name in sys.modules]
    print(int(state.step), len(read_metrics(Path(sys.argv[1]))))
    """,
        str(tmp_path),
    )
    assert out.split() == ["8", "4"]


def test_help_does_not_wait_for_jax():
    code = "import sys; from siglip.cli import run; code = run(['--help']); assert 'jax' not in sys.modules; sys.exit(code)"
    out = run_python(code)
    assert out.startswith("usage: siglip COMMAND")


def test_importing_the_package_does_not_import_jax():
    run_python("import sys, siglip; assert 'jax' not in sys.modules")
