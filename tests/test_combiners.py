"""From scores to one utility per sample: each combiner, guards and hold-outs, against loops over samples."""

from __future__ import annotations

import math
from statistics import mean, stdev

import pytest
import torch
from scipy.stats import rankdata, spearmanr

from ds_inpaint.advantages import group_metrics, group_relative
from ds_inpaint.combiners.caen import CaEN
from ds_inpaint.combiners.normalized import Normalized
from ds_inpaint.combiners.rank_ensemble import RankEnsemble
from ds_inpaint.combiners.scale_aware import ScaleAware
from ds_inpaint.combiners.weighted_sum import WeightedSum
from ds_inpaint.heldout import HeldOut
from ds_inpaint.keys import Impossible
from ds_inpaint.preference import best_and_worst
from ds_inpaint.ranks import rank_correlation
from ds_inpaint.rewards import Rewards
from ds_inpaint.scores import Scores

B, G = 40, 7
WEIGHTS = {"hps": 2.0, "clip": -0.5, "seam": 1.0}
EPS = 1e-4
FLOORS = pytest.mark.parametrize("floors", [{}, {"clip": 0.9}], ids=["no floors", "floors"])
COMBINERS = {
    "weighted_sum": WeightedSum(),
    "normalized": Normalized(EPS),
    "scale_aware": ScaleAware(gamma=0.5),
    "rank_ensemble": RankEnsemble(),
    "caen": CaEN(),
}


def scores_of(valid_N: torch.Tensor | None = None, **values: list[float]) -> Scores:
    tensors = {name: torch.tensor(column) for name, column in values.items()}
    count = len(next(iter(tensors.values())))
    return Scores(tensors, {}, torch.ones(count, dtype=torch.bool) if valid_N is None else valid_N, ())


@pytest.fixture(scope="module")
def batch() -> tuple[Scores, torch.Tensor]:
    """Random scores with ties, on grids of 4 (clip's std is often below its floor) to 1000 values, and gaps."""
    draw = torch.Generator().manual_seed(0)
    valid_N = torch.rand(B * G, generator=draw) > torch.rand(B, generator=draw).repeat_interleave(G)
    values = {
        name: (torch.randint(0, size, (B * G,), generator=draw) / size).where(valid_N, torch.nan)
        for name, size in (("hps", 1000), ("clip", 4), ("seam", 8))
    }
    values["clip"] *= torch.randint(0, 5, (B,), generator=draw).repeat_interleave(G)
    areas_N = torch.rand(B, generator=draw).repeat_interleave(G)
    assert valid_N.view(B, G).sum(1).unique().tolist() == list(range(G + 1))
    return Scores(values, {}, valid_N, ()), areas_N


def groups_of(scores: Scores, areas_N: torch.Tensor) -> list[tuple[list[int], dict[str, list[float]], float]]:
    """Numbers, scores and hole of the valid samples of each group."""
    groups = []
    for start in range(0, B * G, G):
        numbers = [number for number in range(start, start + G) if scores.valid_N[number]]
        columns = {name: values[numbers].tolist() for name, values in scores.values.items()}
        groups.append((numbers, columns, float(areas_N[start])))
    return groups


def z(column: list[float]) -> list[float]:
    spread = stdev(column) if len(column) > 1 else 0.0
    return [(value - mean(column)) / (spread + EPS) for value in column]


def expected(name: str, columns: dict[str, list[float]], area: float, floors: dict[str, float]) -> list[float]:
    """Utilities of one group of valid samples, sample by sample."""
    count = len(columns["hps"])
    utilities = [0.0] * count
    semantic = min(max(area**0.5, 0.1), 0.9)
    shares = {"hps": semantic, "clip": semantic, "seam": 1 - semantic}
    for scorer, weight in WEIGHTS.items():
        column = columns[scorer]
        if count > 1 and stdev(column) < floors.get(scorer, 0.0):
            column = [mean(column)] * count
        for i in range(count):
            lower = [other for j, other in enumerate(column) if j != i and other < column[i]]
            ties = [other for j, other in enumerate(column) if j != i and other == column[i]]
            utilities[i] += (
                weight
                * {
                    "weighted_sum": column[i],
                    "normalized": z(column)[i],
                    "scale_aware": shares[scorer] * z(column)[i],
                    "rank_ensemble": len(set(lower)),
                    "caen": (len(lower) + len(ties) / 2) / max(1, count - 1) / 3.5,
                }[name]
            )
    return utilities


@FLOORS
@pytest.mark.parametrize("name", COMBINERS)
def test_a_combiner_is_its_formula_over_the_valid_samples(name, floors, batch):
    scores, areas_N = batch
    judgement = Rewards(WEIGHTS, floors, combine=COMBINERS[name]).judge(scores, areas_N, G)
    assert judgement.utilities_N.dtype == torch.float32
    assert torch.equal(judgement.utilities_N.isnan(), ~scores.valid_N)
    for numbers, columns, area in groups_of(scores, areas_N):
        found = judgement.utilities_N[numbers].tolist()
        assert found == pytest.approx(expected(name, columns, area, floors), rel=1e-5, abs=1e-6)


def advantages_of_group(utilities: list[float], spread: float) -> list[float]:
    """Those of the valid samples of a group that has enough of them."""
    return [(utility - mean(utilities)) / (spread + EPS) for utility in utilities]


@FLOORS
@pytest.mark.parametrize("spread", ["group", "batch"])
@pytest.mark.parametrize("name", COMBINERS)
def test_advantages_follow_from_the_valid_samples_of_groups_with_enough(name, spread, floors, batch):
    scores, areas_N = batch
    judgement = Rewards(WEIGHTS, floors, combine=COMBINERS[name]).judge(scores, areas_N, G)
    found = group_relative(judgement, G, spread, EPS, 100.0)
    kept = [
        (numbers, expected(name, columns, area, floors))
        for numbers, columns, area in groups_of(scores, areas_N)
        if len(numbers) >= max(2, math.ceil(G / 2))
    ]
    everyone = stdev([utility - mean(utilities) for _, utilities in kept for utility in utilities])
    wanted = torch.zeros(B * G)
    for numbers, utilities in kept:
        of_group = stdev(utilities) if spread == "group" else everyone
        wanted[numbers] = torch.tensor(advantages_of_group(utilities, of_group))
    torch.testing.assert_close(found.advantages_N, wanted, rtol=1e-3, atol=1e-4)
    assert found.weights_N.nonzero().flatten().tolist() == [number for numbers, _ in kept for number in numbers]


def test_normalized_scores_over_the_spread_of_the_batch_are_gdpo():
    """2601.05242: standardise each reward in its group, add them up, standardise the sums over the batch."""
    draw = torch.Generator().manual_seed(1)
    hps, clip = torch.rand(2, 6, 5, generator=draw, dtype=torch.float64).float()
    judgement = Rewards({"hps": 0.3, "clip": 2.0}, combine=Normalized(EPS)).judge(
        scores_of(hps=hps.flatten().tolist(), clip=clip.flatten().tolist()), torch.full((30,), 0.2), 5
    )
    sums = sum(
        weight * (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + EPS)
        for weight, rewards in ((0.3, hps), (2.0, clip))
    )
    gdpo = (sums - sums.mean()) / (sums.std() + EPS)
    torch.testing.assert_close(group_relative(judgement, 5, "batch", EPS, 50.0).advantages_N, gdpo.flatten())


def test_normalized_scores_add_up_by_their_weights_however_wide_they_are():
    scores = scores_of(narrow=[0.1, 0.2, 0.3], wide=[300.0, 200.0, 400.0])
    judgement = Rewards({"narrow": 2.0, "wide": 1.0}, combine=Normalized(1e-9)).judge(scores, torch.ones(3), 3)
    torch.testing.assert_close(judgement.utilities_N, torch.tensor([-2.0, -1.0, 3.0]))


def test_the_weighted_sum_keeps_every_bit():
    values = torch.rand(2, 12, generator=torch.Generator().manual_seed(2))
    scores = scores_of(a=values[0].tolist(), b=values[1].tolist())
    rewards = Rewards({"a": 1.0, "b": 0.2})
    assert torch.equal(rewards.judge(scores, torch.ones(12), 4).utilities_N, scores.combined_N(rewards.scorers))


def test_rounding_does_not_tell_apart_samples_that_are_equal():
    """Two orders of adding .1, .2 and .3 differ in their last bit."""
    scores = scores_of(a=[1.0, 0.0], b=[1.0, 0.0], c=[0.0, 1.0])
    judgement = Rewards({"a": 0.1, "b": 0.2, "c": 0.3}, combine=RankEnsemble()).judge(scores, torch.ones(2), 2)
    assert 0.1 + 0.2 != 0.3
    assert judgement.utilities_N[0] == judgement.utilities_N[1]


@pytest.mark.parametrize("name", ["normalized", "scale_aware", "rank_ensemble", "caen"])
def test_jitter_below_the_floor_changes_no_utility(name):
    draw = torch.Generator().manual_seed(3)
    hps, seam = torch.rand(2, B * G, generator=draw)
    clip = torch.rand(B, generator=draw).repeat_interleave(G)
    jittered = clip + 1e-5 * (2 * torch.rand(B * G, generator=draw) - 1)
    still, moved = (
        Scores({"hps": hps, "clip": values, "seam": seam}, {}, torch.ones(B * G, dtype=torch.bool), ())
        for values in (clip, jittered)
    )

    def utilities_N(scores: Scores, floors: dict[str, float]) -> torch.Tensor:
        return Rewards(WEIGHTS, floors, combine=COMBINERS[name]).judge(scores, torch.full((B * G,), 0.3), G).utilities_N

    assert torch.equal(utilities_N(moved, {"clip": 1e-4}), utilities_N(still, {}))
    assert not torch.allclose(utilities_N(moved, {}), utilities_N(still, {}), atol=1e-2)


def test_floors_keep_every_bit_of_the_groups_above_them(batch):
    scores, areas_N = batch
    low = Rewards(WEIGHTS, dict.fromkeys(WEIGHTS, 1e-9), combine=Normalized(EPS)).judge(scores, areas_N, G)
    none = Rewards(WEIGHTS, combine=Normalized(EPS)).judge(scores, areas_N, G)
    torch.testing.assert_close(low.utilities_N, none.utilities_N, rtol=0, atol=0, equal_nan=True)


def test_a_guard_looks_at_the_raw_scores_of_a_group_below_its_floor():
    scores = scores_of(hps=[0.49, 0.51, 0.52])
    judgement = Rewards({"hps": 1.0}, {"hps": 0.1}, guards={"hps": 0.5}).judge(scores, torch.ones(3), 3)
    assert judgement.vetoed_N.tolist() == [True, False, False]
    assert len(judgement.utilities_N.unique()) == 1


def test_a_hole_decides_which_kind_of_scorer_leads():
    scores = scores_of(hps=[0.0, 1.0] * 3, seam=[1.0, 0.0] * 3)
    areas = torch.tensor([0.02, 0.02, 0.5, 0.5, 0.98, 0.98])
    found = Rewards({"hps": 1.0, "seam": 1.0}, combine=ScaleAware(eps=1e-9)).judge(scores, areas, 2).utilities_N
    half = math.sqrt(0.5)
    torch.testing.assert_close(found, torch.tensor([0.8, -0.8, 0.0, 0.0, -0.8, 0.8]) * half)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"combine": ScaleAware()}, "combine.boundary: found seam, which rewards.scorers does not reward; name some"),
        ({"combine": ScaleAware(["hps", "clip"])}, "some must judge the boundary and some must not"),
        ({"combine": ScaleAware([])}, "some must judge the boundary and some must not"),
        ({"floors": {"hps": 0.1, "seam": 0.1}}, "floors: found seam, which rewards.scorers does not reward; name some"),
        ({"guards": {"small_masks": 0.0}}, "guards: found small_masks, but .* served under another, as ANOTHER=small"),
        ({"holdout": ["pick", "hps"]}, "holdout: found hps, which rewards.scorers weighs or rewards.guards names"),
        ({"holdout": ["kept"], "guards": {"kept": 0.0}}, "holdout: found kept, which"),
    ],
)
def test_scorers_that_do_not_go_together_are_refused(section, message):
    with pytest.raises(Impossible, match=message):
        Rewards({"hps": 1.0, "clip": 1.0, "seam": 0.0}, **section)
    with pytest.raises(Impossible, match=r"found 0\.6, above most_semantic, 0\.5"):
        ScaleAware(least_semantic=0.6, most_semantic=0.5)


def test_no_scorer_may_have_the_name_of_a_metric_or_column(batch):
    scores, areas_N = batch
    judgement = Rewards(WEIGHTS).judge(scores, areas_N, G)
    metrics = [
        *group_metrics(scores.combined_N(WEIGHTS), judgement, areas_N, G),
        *HeldOut(torch.ones(2), torch.ones(2), {}, 0.0).metrics(),
    ]
    taken = {name.split("/")[1] for name in metrics if name.startswith(("reward/", "heldout/"))}
    assert {"group_std", "medium_masks", "loss_error"} < taken
    for name in taken | {"id", "prompt", "area"}:
        with pytest.raises(Impossible, match=f"holdout: found {name}, but"):
            Rewards({"hps": 1.0}, holdout=[name])
    Rewards({"area_masks2": 1.0, "mean_hue": 1.0, "masks": 1.0})


def test_who_is_asked_and_who_is_required():
    rewards = Rewards({"hps": 1.0, "seam": 0.0}, guards={"kept": 0.5, "hps": 0.1}, holdout=["pick", "seam", "pick"])
    assert rewards.names == ["hps", "seam", "kept", "pick"]
    assert rewards.required == {"hps", "kept"}
    assert rewards.weights == {"hps": 1.0}


@pytest.fixture(scope="module")
def guarded() -> Rewards:
    return Rewards({"hps": 1.0}, guards={"kept": 0.5})


def test_a_vetoed_sample_is_never_reinforced(guarded):
    scores = scores_of(
        torch.tensor([True, True, True, False]), hps=[3.0, 1.0, 2.0, math.nan], kept=[0.4, 0.1, 0.5, 0.1]
    )
    judgement = guarded.judge(scores, torch.ones(4), 4)
    assert judgement.vetoed_N.tolist() == [True, True, False, False]
    found = group_relative(judgement, 4, "group", 1e-9, 5.0)
    torch.testing.assert_close(found.advantages_N, torch.tensor([0.0, -1.0, 0.0, 0.0]))
    assert found.weights_N.tolist() == [1, 1, 1, 0]
    metrics = guarded.metrics(scores, judgement, torch.ones(4), 4)
    assert metrics["reward/vetoed_fraction"] == 0.5
    assert metrics["reward/mean"] == 2.0


def test_a_vetoed_sample_is_never_the_best_of_its_group(guarded):
    scores = scores_of(
        hps=[3.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0],
        kept=[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0],
    )
    found = best_and_worst(guarded.judge(scores, torch.ones(12), 3), 3, 1e-6)
    assert found.weights_B.tolist() == [1, 0, 0, 1]  # only the worst of the second may win, none of the third
    assert (found.best_B[0], found.worst_B[0]) == (2, 1)
    assert (found.best_B[3], found.worst_B[3]) == (9, 10)


def test_the_rank_correlation_is_spearmans_over_groups_that_have_one(batch):
    scores, areas_N = batch
    a_N, b_N = scores.values["seam"], scores.values["clip"]
    each = [
        spearmanr(columns["seam"], columns["clip"]).statistic
        for _, columns, _ in groups_of(scores, areas_N)
        if len(columns["seam"]) >= 3 and len(set(columns["seam"])) > 1 and len(set(columns["clip"])) > 1
    ]
    assert 10 < len(each) < B
    assert rank_correlation(a_N, b_N, scores.valid_N, G) == pytest.approx(mean(each))
    assert math.isnan(rank_correlation(torch.zeros(6), torch.arange(6.0), torch.ones(6, dtype=torch.bool), 3))


def test_wins_are_the_average_ranks_of_scipy(batch):
    scores, areas_N = batch
    rewards = Rewards({"seam": 1.0}, combine=CaEN())
    found = rewards.judge(scores, areas_N, G).utilities_N
    for numbers, columns, _ in groups_of(scores, areas_N):
        if len(numbers) > 1:
            ranks = (rankdata(columns["seam"]) - 1) / (len(numbers) - 1)
            assert found[numbers].tolist() == pytest.approx(ranks.tolist())


def test_a_hold_out_is_logged_apart_and_its_gaps_change_nothing():
    rewards = Rewards({"hps": 1.0}, holdout=["pick"])
    scores = scores_of(hps=[1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0], pick=[9.0, math.nan, 7.0, 5.0, *[math.nan] * 4])
    judgement = rewards.judge(scores, torch.ones(8), 4)
    metrics = rewards.metrics(scores, judgement, torch.ones(8), 4)
    assert torch.equal(judgement.utilities_N, scores.values["hps"])
    assert metrics["holdout/pick"] == 7.0
    assert metrics["holdout/pick/rank_correlation"] == pytest.approx(-1.0)
    assert metrics["reward/hps"] == 2.5
    assert "reward/pick" not in metrics
