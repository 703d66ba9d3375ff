"""Examples are written as their readers write: a vector is added to rows without saying so."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def broadcasting():
    with jax.numpy_rank_promotion("allow"):
        yield
