"""The intervals hold what they promise; bench/coverage.py has the whole table."""

import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))


def test_19_of_20_intervals_hold_the_true_score_and_scans_taken_as_subjects_do_not():
    from coverage import coverage

    rows = coverage(num_classes=2, num_subjects=150, auc=0.78, simulations=200, draws=300, seed=0)
    held = {(row["method"], row["metric"]): row["coverage"] for row in rows}
    # 0.95 within 2.6 standard errors of 200 studies, where the wrong way gives some 0.85
    for metric in ("macro_auc", "balanced_accuracy", "macro_f1", "recall"):
        assert held["taken", metric] == pytest.approx(0.95, abs=0.04)
    assert held["scans", "macro_auc"] < 0.91


def test_few_subjects_who_are_nearly_all_told_apart_have_wide_intervals():
    from coverage import coverage

    rows = coverage(num_classes=2, num_subjects=14, auc=0.99, simulations=200, draws=200, seed=0)
    held = {(row["method"], row["metric"]): row for row in rows}
    for metric in ("macro_auc", "balanced_accuracy", "macro_f1"):
        assert held["taken", metric]["coverage"] >= 0.91 and held["taken", metric]["no_width"] == 0
        assert held["percentiles", metric]["coverage"] < 0.8  # draws alone: no width in a third of the studies
