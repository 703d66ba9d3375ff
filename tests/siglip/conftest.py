"""Tests of siglip see the packages that `.[test]` installs, whatever else is there."""

from importlib.util import find_spec

import pytest


@pytest.fixture(autouse=True)
def without_transformers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests marked `interop` have exports read by transformers, which takes seconds to import."""
    if request.node.get_closest_marker("interop") is None:
        from siglip.exporting import export  # not before jaxtyping's import hook

        hidden = ("torch", "transformers")
        monkeypatch.setattr(export, "find_spec", lambda name: None if name in hidden else find_spec(name))
