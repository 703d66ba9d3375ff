"""Walks over grids of devices that are made up here: every device once, neighbours one hop apart."""

import itertools
import math
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglip.parallel import topology


def grid_of(shape, seed=0):
    """Devices at every place of a box, in a shuffled order; a fourth axis is the core on its chip."""
    places = list(itertools.product(*map(range, shape)))
    np.random.default_rng(seed).shuffle(places)
    return [
        types.SimpleNamespace(coords=tuple(map(int, place[:3])), core_on_chip=int(place[3]) if len(place) > 3 else 0)
        for place in places
    ]


def hops(devices, order):
    places = np.array([(*devices[i].coords, devices[i].core_on_chip) for i in order])
    return np.abs(places - np.roll(places, -1, axis=0)).sum(axis=1)


@pytest.mark.parametrize(
    "shape", [(16, 16, 1), (2, 2, 1), (4, 8, 1), (4, 4, 4), (3, 4, 1), (4, 3, 1), (1, 4, 4), (2, 2, 1, 2), (4, 4, 4, 2)]
)
def test_the_ring_visits_every_device_and_closes_in_single_hops(shape):
    devices = grid_of(shape)
    ring = topology.ring(devices)
    assert sorted(ring.order) == list(range(math.prod(shape)))
    assert ring.one_hop
    assert hops(devices, ring.order).max() == 1


@pytest.mark.parametrize("shape", [(3, 3, 1), (1, 8, 1), (5, 1, 1)])
def test_a_grid_without_such_a_walk_says_so(shape):
    devices = grid_of(shape)
    ring = topology.ring(devices)
    assert sorted(ring.order) == list(range(math.prod(shape)))
    assert not ring.one_hop
    assert (hops(devices, ring.order) > 1).sum() == 1  # only the way back is long


@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.integers(1, 5)] * 3), st.integers(0, 99))
def test_any_box(shape, seed):
    devices = grid_of(shape, seed)
    ring = topology.ring(devices)
    assert sorted(ring.order) == list(range(len(devices)))
    if ring.one_hop and len(devices) > 1:
        assert hops(devices, ring.order).max() == 1


@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.integers(1, 4)] * 3), st.integers(0, 99))
def test_gathering_over_the_groups_of_every_axis_reaches_everybody(shape, seed):
    devices = grid_of(shape, seed)
    reached = [{i} for i in range(len(devices))]
    for groups in topology.axis_groups(devices):
        assert sorted(i for group in groups for i in group) == list(range(len(devices)))
        together = {i: set().union(*(reached[j] for j in group)) for group in groups for i in group}
        reached = [together[i] for i in range(len(devices))]
    assert all(r == set(range(len(devices))) for r in reached)


def test_devices_without_coordinates_or_of_several_slices_keep_their_order():
    plain = [types.SimpleNamespace(id=i) for i in range(4)]
    sliced = [types.SimpleNamespace(coords=(i % 2, 0, 0), slice_index=i // 2) for i in range(4)]
    for devices in (plain, sliced, grid_of((2, 3, 1))[:-1]):
        assert topology.ring(devices) == (tuple(range(len(devices))), False)
        assert topology.axis_groups(devices) == ((tuple(range(len(devices))),),)
