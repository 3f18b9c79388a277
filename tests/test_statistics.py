"""Bootstrap intervals against scipy, an exact enumeration and closed forms; paired differences against plain loops."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from ds_inpaint import statistics
from ds_inpaint.statistics import compare, estimate, rows_by_class


def values(items=200, seeds=1, seed=0):
    """Skewed values, so that a percentile interval is not symmetric about the mean."""
    return torch.randn(items, seeds, generator=torch.Generator().manual_seed(seed)).double().exp()


def ends(found):
    return [found.low, found.high]


def test_mean_and_standard_error_are_the_usual_ones():
    sample = values()
    found = estimate(sample, 0)
    assert found.mean == pytest.approx(sample.mean().item())
    assert found.standard_error == pytest.approx(stats.sem(sample.flatten().numpy()))
    assert (found.items, found.failed) == (200, 0)


@pytest.mark.parametrize("level", [0.95, 0.68])
def test_the_interval_is_that_of_scipy(level):
    """Both are random: with 20,000 resamples an end varies by about 0.02 standard errors, or by 0.03 from the other."""
    sample = values()
    found = estimate(sample, 0, level, resamples=20_000)
    reference = stats.bootstrap(
        (sample.flatten().numpy(),),
        np.mean,
        confidence_level=level,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert ends(found) == pytest.approx([reference.low, reference.high], abs=0.08 * found.standard_error)


def test_the_interval_converges_to_that_of_all_resamples():
    """Of six items there are 6^6 = 46,656 equally likely resamples."""
    sample = torch.tensor([0.0, 1.0, 3.0, 7.0, 20.0, 21.0])
    means = [np.mean(drawn) for drawn in itertools.product(sample.tolist(), repeat=6)]
    found = estimate(sample.view(-1, 1), 1, resamples=50_000)
    assert ends(found) == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.1)


def test_equal_seeds_give_equal_intervals_and_other_seeds_others():
    sample = values()
    assert estimate(sample, 5) == estimate(sample, 5)
    assert ends(estimate(sample, 5)) != ends(estimate(sample, 6))


def test_the_chunks_of_the_resampling_change_nothing(monkeypatch):
    sample = values()
    whole = estimate(sample, 0)
    monkeypatch.setattr(statistics, "DRAWS_AT_ONCE", 601)  # three resamples, and one at the end
    assert estimate(sample, 0) == whole


def test_seeds_of_an_item_are_no_independent_evidence():
    """Five equal seeds of an item tell what one does; taken as items, they would narrow the interval by sqrt(5)."""
    one = values(60)
    many = one.expand(-1, 5)
    assert ends(estimate(many, 0)) == pytest.approx(ends(estimate(one, 0)))
    naive = estimate(many.reshape(-1, 1), 0)
    width, naive_width = (found.high - found.low for found in (estimate(many, 0), naive))
    assert width / naive_width == pytest.approx(math.sqrt(5), rel=0.1)


def test_independent_seeds_narrow_the_interval():
    """With no variance between items, S seeds each are worth N * S items."""
    several = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double()
    assert estimate(several, 0).standard_error == pytest.approx(1 / math.sqrt(800), rel=0.1)


def test_failed_values_are_left_out_and_counted():
    sample = torch.tensor([[1.0, 3.0], [math.nan, 6.0], [math.nan, math.nan], [math.inf, 10.0]])
    found = estimate(sample, 0)
    assert (found.mean, found.items, found.failed) == (6, 3, 4)
    assert found == dataclasses.replace(estimate(torch.tensor([[2.0], [6.0], [10.0]]), 0), failed=4)


def test_no_interval_without_two_items():
    nothing = estimate(torch.full((3, 2), math.nan), 0)
    assert (nothing.items, nothing.failed) == (0, 6)
    assert all(math.isnan(each) for each in (nothing.mean, *ends(nothing), nothing.standard_error))
    single = estimate(torch.tensor([[2.0, 4.0], [math.nan, math.nan]]), 0)
    assert (single.mean, single.items, single.failed) == (3, 1, 2)
    assert all(math.isnan(each) for each in (*ends(single), single.standard_error))


def test_equal_items_are_known_exactly():
    found = estimate(torch.full((9, 1), 0.25), 0)
    assert (found.low, found.mean, found.high, found.standard_error) == (0.25, 0.25, 0.25, 0)


def test_a_paired_difference_is_far_better_known_than_its_sides():
    items = 100 * values(80, 3)
    gains = 0.5 + 0.1 * torch.randn(80, 3, generator=torch.Generator().manual_seed(1))
    found = compare(items + gains, items, 0)
    assert found.difference.mean == pytest.approx(gains.mean().item())
    assert found.difference.low < found.difference.mean < found.difference.high
    assert found.difference.standard_error == pytest.approx(stats.sem(gains.mean(1).numpy()), rel=1e-6)
    assert estimate(items, 0).standard_error > 100 * found.difference.standard_error
    assert found.won == 1


def test_only_pairs_of_which_both_are_finite_count():
    ours = torch.tensor([[1.0, math.nan], [2.0, 5.0], [math.nan, 1.0], [4.0, 4.0], [0.0, 0.0]])
    theirs = torch.tensor([[3.0, 9.0], [1.0, 1.0], [0.0, math.nan], [4.0, 4.0], [-1.0, math.nan]])
    found = compare(ours, theirs, 0)
    differences = [1 - 3, (1 + 4) / 2, 0, 1]  # by item, the third has no pair
    assert found.difference.mean == pytest.approx(sum(differences) / 4)
    assert (found.difference.items, found.difference.failed) == (4, 4)
    assert found.won == (0 + 1 + 0.5 + 1) / 4


def test_turning_a_comparison_round_changes_its_sign():
    ours, theirs = values(seed=2), values(seed=3)
    found, turned = compare(ours, theirs, 0), compare(theirs, ours, 0)
    assert ends(found.difference) == pytest.approx([-end for end in reversed(ends(turned.difference))])
    assert found.won == pytest.approx(1 - turned.won)


def test_a_comparison_in_which_all_failed():
    found = compare(torch.full((2, 1), math.nan), torch.zeros(2, 1), 0)
    assert math.isnan(found.won)
    assert math.isnan(found.difference.mean)
    assert (found.difference.items, found.difference.failed) == (0, 2)


def test_means_by_class():
    sample = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
    rows = rows_by_class(["M", "S", "M", "S"])
    assert {name: rows_n.tolist() for name, rows_n in rows.items()} == {"M": [0, 2], "S": [1, 3]}
    assert {name: estimate(sample[rows_n], 0).mean for name, rows_n in rows.items()} == {"M": 2, "S": 4}
