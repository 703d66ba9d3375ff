"""The table of sizes, and the names that lead into it."""

import dataclasses
from typing import Literal

import pytest

from siglip.models.variants import SO400M_FLOPS, VARIANTS, Variant, check_choices, parse_variant, resolve, sovit


def test_names_are_size_and_patch():
    assert parse_variant("So400m/14") == (Variant(1152, 27, 4304, 16), 14)
    assert parse_variant("g-opt/16") == (Variant(1536, 40, 6144, 16), 16)
    assert parse_variant("B") == (Variant(768, 12, 3072, 12), None)
    assert list(VARIANTS) == ["mu", "Ti", "S", "M", "B", "L", "So400m", "H", "g", "g-opt", "G", "G-opt", "e", "22B"]


def test_every_size_has_a_name_of_its_own_and_equal_heads():
    for name, variant in VARIANTS.items():
        assert variant.fields() == {"variant": name}
        assert variant.width % variant.num_heads == 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("So400/14", "did you mean 'So400m'"),
        ("B/", "patch size"),
        ("B/0", "patch size"),
        ("B/x", "'B/16'"),
        ("", "known: mu"),
    ],
)
def test_names_that_lead_nowhere(name, words):
    with pytest.raises(ValueError, match=words):
        parse_variant(name)


def test_overrides():
    base = VARIANTS["mu"]
    assert resolve(base, {"width": 48, "depth": None}) == Variant(48, 1, 128, 2)
    with pytest.raises(ValueError, match="width=33 is not divisible by num_heads=2"):
        resolve(base, {"width": 33})
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        resolve(base, {"depth": 0})


def test_choices():
    @dataclasses.dataclass
    class Config:
        pool: Literal["map", "gap"] = "map"

    check_choices(Config(), ("pool",))
    with pytest.raises(ValueError, match="pool='mpa' is not one of 'map', 'gap'; did you mean 'map'"):
        check_choices(Config("mpa"), ("pool",))


def test_sovit_is_so400m_at_its_own_budget_and_grows_as_the_paper_says():
    assert sovit(SO400M_FLOPS) == VARIANTS["So400m"]
    small, large = sovit(SO400M_FLOPS / 10), sovit(10 * SO400M_FLOPS)
    parameters = lambda v: v.depth * (4 * v.width**2 + 2 * v.width * v.mlp_dim)  # noqa: E731
    for less, more in ((small, VARIANTS["So400m"]), (VARIANTS["So400m"], large)):
        assert 2.2 < parameters(more) / parameters(less) < 2.7  # 10 times the compute: 2.5 times the parameters
        # The MLP grows fastest, then depth, then width.
        assert more.mlp_dim / less.mlp_dim > more.depth / less.depth > more.width / less.width > 1
    assert all(v.width % v.num_heads == 0 for v in (sovit(10.0**n) for n in range(12, 26)))
    with pytest.raises(ValueError, match="must be positive"):
        sovit(0)
