"""Augmentation: what is drawn, and what it does to a volume."""

import random

import pytest
import torch

from medblip.augment import LOG_GAIN, LOG_SCALE, ROTATION_DEG, Change, apply_change, draw_change

EDGE = 24


def blob() -> torch.Tensor:
    """A box of voxels that all differ, with background around it."""
    volume_XYZ = torch.zeros(EDGE, EDGE, EDGE)
    volume_XYZ[6:17, 7:18, 8:16] = 0.2 + 0.6 * torch.rand(11, 11, 8, generator=torch.Generator().manual_seed(0))
    return volume_XYZ


def test_no_change_changes_nothing():
    assert torch.equal(apply_change(blob(), Change()), blob())
    assert torch.allclose(apply_change(blob(), Change(matrix=((1, 0, 0), (0, 1, 0), (0, 0, 1.0)))), blob(), atol=1e-6)


def test_the_first_axis_is_the_one_that_is_flipped():
    assert torch.equal(apply_change(blob(), Change(is_flipped=True)), blob().flip(0))


@pytest.mark.parametrize("shift", [(3, 0, 0), (0, -3, 0), (0, 0, 3), (2, -1, -3)])
def test_a_shift_moves_along_its_axes(shift):
    assert torch.equal(apply_change(blob(), Change(shift_voxels=shift)), blob().roll(shift, (0, 1, 2)))


def test_what_is_shifted_out_of_the_grid_does_not_come_in_on_the_other_side():
    full = torch.ones(4, 4, 4)
    moved = apply_change(full, Change(shift_voxels=(1, 0, -2)))
    assert (moved[0] == 0).all() and (moved[1:, :, :2] == 1).all() and (moved[:, :, 2:] == 0).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_quarter_turn_is_the_one_of_numpy(axis):
    """The axes' order of grid_sample is the other way round; a wrong one would turn about another axis."""
    first, second = [other for other in range(3) if other != axis]
    turn = [[float(row == column) for column in range(3)] for row in range(3)]
    turn[first][first] = turn[second][second] = 0.0
    turn[first][second], turn[second][first] = -1.0, 1.0  # new (f, s) comes from old (-s, f)
    turned = apply_change(blob(), Change(matrix=tuple(map(tuple, turn))))
    assert torch.allclose(turned, torch.rot90(blob(), 1, (second, first)), atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_scale_works_along_its_axis(axis):
    volume_XYZ = torch.zeros(EDGE, EDGE, EDGE)
    volume_XYZ[(slice(6, 18),) * 3] = 1
    matrix = [[float(row == column) for column in range(3)] for row in range(3)]
    matrix[axis][axis] = 2.0  # looks twice as far from the centre: half as large
    smaller = apply_change(volume_XYZ, Change(matrix=tuple(map(tuple, matrix))))
    extent = [int((smaller.amax([other for other in range(3) if other != a]) > 0.5).sum()) for a in range(3)]
    assert extent == [6 if a == axis else 12 for a in range(3)]


def test_background_stays_zero_whatever_happens_to_the_head():
    change = Change(gain=1.3, gamma=0.7, bias=((0.2, -0.1),) * 3, noise=0.05, noise_seed=1)
    changed = apply_change(blob(), change)
    assert (changed[blob() == 0] == 0).all()
    inside = changed[blob() > 0]
    assert not torch.allclose(inside, blob()[blob() > 0], atol=0.02) and inside.min() >= 0 and inside.isfinite().all()


def test_the_bias_field_is_smooth_and_the_product_of_its_axes():
    even = torch.full((EDGE, EDGE, EDGE), 0.5)
    bias = ((0.1, 0.0), (0.0, -0.1), (0.05, 0.05))
    field = apply_change(even, Change(bias=bias)) / 0.5
    place_N = (torch.arange(EDGE) + 0.5) / EDGE
    x, y, z = (
        torch.exp(first * torch.cos(torch.pi * place_N) + second * torch.cos(2 * torch.pi * place_N))
        for first, second in bias
    )
    assert torch.allclose(field, x[:, None, None] * y[:, None] * z, atol=1e-6)


def test_noise_has_its_deviation_and_its_seed():
    even = torch.full((EDGE, EDGE, EDGE), 0.5)
    first, again, other = (apply_change(even, Change(noise=0.03, noise_seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first - 0.5).std() == pytest.approx(0.03, rel=0.03)


def test_draws_cover_their_ranges_and_stay_in_them():
    changes = [draw_change(random.Random(number), 96) for number in range(600)]
    assert 240 < sum(change.is_flipped for change in changes) < 360
    assert {shift for change in changes for shift in change.shift_voxels} == {-2, -1, 0, 1, 2}
    assert {s for n in range(50) for s in draw_change(random.Random(n), 24).shift_voxels} == {-1, 0, 1}
    gain_N = torch.tensor([change.gain for change in changes]).log()
    assert gain_N.min() < -0.9 * LOG_GAIN and 0.9 * LOG_GAIN < gain_N.max() <= LOG_GAIN
    posed, contrasted = ([c for c in changes if getattr(c, name) is not None] for name in ("matrix", "bias"))
    noisy = [change for change in changes if change.noise]
    assert all(60 < len(some) < 120 for some in (posed, contrasted)) and 35 < len(noisy) < 85
    matrix_N33 = torch.tensor([change.matrix for change in posed])
    scale_N3 = matrix_N33.norm(dim=1).log()
    assert 0.9 * LOG_SCALE < scale_N3.abs().max() <= LOG_SCALE + 1e-6
    turn_N33 = matrix_N33 / matrix_N33.norm(dim=1, keepdim=True)
    assert torch.allclose(turn_N33 @ turn_N33.mT, torch.eye(3).expand_as(turn_N33), atol=1e-5)
    assert torch.allclose(torch.linalg.det(turn_N33), torch.ones(len(posed)), atol=1e-5)
    degrees_N = torch.rad2deg(torch.arccos((turn_N33.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2))
    assert 0.9 * ROTATION_DEG < degrees_N.max() < 1.8 * ROTATION_DEG  # three turns, one after the other
    assert len({change.noise_seed for change in noisy}) == len(noisy)
