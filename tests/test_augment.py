"""Augmentation: what is drawn, and what it does to a volume."""

import dataclasses
import random

import pytest
import torch

from medblip.augment import ROTATION_DEG, SHIFT, apply_change, draw_change

EDGE = 24


def plain(**changes):
    """A change that changes nothing, but for `changes`."""
    identity = ((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0))
    nothing = dataclasses.replace(
        draw_change(random.Random(0)), matrix=identity, gain=1.0, gamma=1.0, bias=((0.0, 0.0),) * 3, noise=0.0
    )
    return dataclasses.replace(nothing, **changes)


def blob() -> torch.Tensor:
    """A box of voxels that all differ, with background around it."""
    volume_XYZ = torch.zeros(EDGE, EDGE, EDGE)
    volume_XYZ[6:17, 7:18, 8:16] = 0.2 + 0.6 * torch.rand(11, 11, 8, generator=torch.Generator().manual_seed(0))
    return volume_XYZ


def test_no_change_changes_nothing():
    assert torch.allclose(apply_change(blob(), plain()), blob(), atol=1e-6)


def test_the_first_axis_is_the_one_that_is_flipped():
    flipped = plain(matrix=((-1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0)))
    assert torch.allclose(apply_change(blob(), flipped), blob().flip(0), atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shift_moves_along_its_axis(axis):
    matrix = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]]
    matrix[axis][3] = 2 * 3 / EDGE  # three voxels: the volume's edges are at -1 and 1
    moved = apply_change(blob(), plain(matrix=tuple(map(tuple, matrix))))
    assert torch.allclose(moved, blob().roll(-3, axis), atol=1e-5)


def test_background_stays_zero_whatever_happens_to_the_head():
    changed = apply_change(blob(), plain(gain=1.3, gamma=0.7, bias=((0.2, -0.1),) * 3, noise=0.05))
    assert (changed[blob() == 0] == 0).all()
    inside = changed[blob() > 0]
    assert not torch.allclose(inside, blob()[blob() > 0], atol=0.02) and inside.min() >= 0 and inside.isfinite().all()


def test_draws_cover_their_ranges_and_stay_in_them():
    changes = [draw_change(random.Random(number)) for number in range(300)]
    matrix_N34 = torch.tensor([change.matrix for change in changes])
    turn_N33, shift_N3 = matrix_N34[..., :3], matrix_N34[..., 3]
    flipped_N = torch.linalg.det(turn_N33) < 0
    assert 110 < flipped_N.sum() < 190
    assert shift_N3.abs().max() <= 2 * SHIFT and shift_N3.std(0).min() > SHIFT
    assert turn_N33[:, 1, 1].min() > 0.8 and turn_N33[:, 1, 1].max() < 1.2
    sine = torch.sin(torch.tensor(ROTATION_DEG * torch.pi / 180))
    assert 0.5 * sine < turn_N33[:, 0, 1].abs().max() < 2.5 * sine
    for name in ("gain", "gamma"):
        values = [getattr(change, name) for change in changes]
        assert min(values) < 0.93 < 1.07 < max(values)
    assert len({change.noise_seed for change in changes}) == 300
