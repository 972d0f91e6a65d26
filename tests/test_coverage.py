"""The intervals hold what they promise; bench/coverage.py has the whole table."""

import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))


def test_19_of_20_intervals_hold_the_true_score_and_scans_taken_as_subjects_do_not():
    from coverage import coverage

    rows = coverage(num_subjects=150, auc=0.78, simulations=200, draws=300, seed=0)
    held = {(row["method"], row["metric"]): row["coverage"] for row in rows}
    # 0.95 within 2.6 standard errors of 200 studies, where the wrong way gives some 0.85
    for metric in ("macro_auc", "balanced_accuracy"):
        assert held["within", metric] == pytest.approx(0.95, abs=0.04)
    assert held["scans", "macro_auc"] < 0.91
