"""Every test sees eight CPU devices, exact float32 matmuls and no network account."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
# Many tests train the same tiny model: the second one finds its program compiled.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="siglip-tests-xla-"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of the reference numbers (tests/fixtures/README.md says where they come from)."""
    return FIXTURES
