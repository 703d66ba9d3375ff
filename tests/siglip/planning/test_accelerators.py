"""Names of topologies, and what they mean."""

import pytest

from siglip.errors import UserError
from siglip.planning.accelerators import ACCELERATORS, parse_topology


@pytest.mark.parametrize(
    ("name", "devices", "hosts"),
    [
        ("v5e:16x16", 256, 64),
        ("v5e:1x1", 1, 1),
        ("v4:2x2x1", 4, 1),
        ("v5p:16x16x24", 6144, 1536),
        ("v6e:8x16", 128, 32),
        ("tpu7x:2x2x1", 8, 1),  # jax shows each half of a chip as a device
        ("h100:8", 8, 1),
        ("h100:1", 1, 1),
        ("h100:8x128", 1024, 128),
        ("gb200:72", 72, 1),
    ],
)
def test_a_name_is_so_many_devices(name, devices, hosts):
    topology = parse_topology(name)
    assert (topology.devices, topology.hosts) == (devices, hosts)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9:4", "known are, in any size, v4:2x2x1, v5e:16x16"),
        ("h10:8", "did you mean 'h100'"),
        ("v5e:3x3", "use one of 1x1, 2x2, 2x4"),
        ("v5e", "not a slice"),
        ("v4:4x4", "three sides"),
        ("v4:3x4x4", "multiple of 4"),
        ("v4:4x4x32", "up to 16x16x16"),
        ("h100:16", "h100:N with 1 to 8 GPUs"),
        ("h100:4x2", "h100:8xHOSTS"),
        ("h100:0", "not a cluster"),
        ("", "unknown"),
    ],
)
def test_other_names_are_one_line(name, words):
    with pytest.raises(UserError, match=words) as error:
        parse_topology(name)
    assert "\n" not in str(error.value)


def test_every_accelerator_has_a_peak_and_memory():
    for name, accelerator in ACCELERATORS.items():
        assert accelerator.peak_flops > 1e14, name
        # jax takes a part of a GPU's memory, a TPU's compiler all that there is.
        assert accelerator.usable_bytes == pytest.approx(accelerator.memory_bytes * (1 if accelerator.sides else 0.92))


def test_collectives_beyond_a_host_have_the_network_only():
    assert parse_topology("h100:8").link_bytes_per_s == 450e9
    assert parse_topology("h100:8x2").link_bytes_per_s == 50e9
    assert parse_topology("v5e:16x16").link_bytes_per_s == parse_topology("v5e:1x1").link_bytes_per_s
