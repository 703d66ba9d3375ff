"""Every test sees eight CPU devices, exact float32 matmuls, no shapes that fit by chance and no network account."""

import os
import signal
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# A shape that fits by chance is a mistake that nothing else shows.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Many tests, workers of pytest-xdist and processes that tests start compile the same, and so does the next run: the second one
# finds it done. XLA's flags are part of a program's key.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# A program that runs once need not be fast: without optimizations it compiles in a third of the time. What compares numbers must
# hold for the programs that users have: `make test` runs those files with OPTIMIZED=1.
if os.environ.get("OPTIMIZED") != "1":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):  # later ones end the process at a flag that they no longer have
    # A program that is cut into 32 parts, for as many cores, costs a fifth more.
    os.environ["XLA_FLAGS"] = f"--xla_cpu_parallel_codegen_split_count=1 {os.environ.get('XLA_FLAGS', '')}"
    if os.environ.get("OPTIMIZED") != "1":
        os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ['XLA_FLAGS']}"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# What runs in the background (nohup, &) may have been told to ignore these, and so may the processes that tests start.
for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

FIXTURES = Path(__file__).parent / "fixtures"
PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "xla"
MAX_PROGRAMS_BYTES = 2**30
# By folder and name: what took ten CPU seconds and more, the longest first.
LONG = """
    models/test_models models/test_naflex siglip/test_losses cli/test_commands training/test_program formats/test_big_vision
    training/test_warm_start training/test_optim exporting/test_export siglip/test_image_encoder models/test_layers
    cli/test_naflex training/test_objective models/test_attention training/test_loop data_pipelines/test_curate
    training/test_accumulation planning/test_recipes exporting/test_naflex parallel/test_sharding siglip/test_encoder
    data_pipelines/test_workers evaluation/test_tasks parallel/test_processes exporting/test_model_card
    data_pipelines/test_curate_closest formats/test_infer_config evaluation/test_metrics training/test_lengths
    siglip/test_imports
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: pytest-xdist hands out files in this order, and the last one should be short."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(f"{item.path.parent.name}/{item.path.stem}", len(LONG)))


def pytest_sessionstart(session: pytest.Session) -> None:
    """The oldest programs go when they are too many. jax's own limit stops all caching once a process is killed at a write."""
    if hasattr(session.config, "workerinput"):  # pytest-xdist: the process that started the workers has done it
        return
    left_bytes = MAX_PROGRAMS_BYTES
    for path in sorted(PROGRAMS.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True):
        left_bytes -= path.stat().st_size
        if left_bytes < 0:
            path.unlink()


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of the reference numbers (tests/fixtures/README.md says where they come from)."""
    return FIXTURES
