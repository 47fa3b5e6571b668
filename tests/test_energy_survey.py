"""How much a projection keeps, and how much the best one would: against singular values."""

from __future__ import annotations

import pytest
import torch
from thinpipe.compress.energy_survey import SURVEY_EVERY, EnergySurvey
from thinpipe.compress.stiefel import random_orthonormal

D, R = 24, 5


def some_states(seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(3, 40, D, generator=draws) * torch.linspace(3, 0.1, D)


def some_projector(seed: int = 0) -> torch.Tensor:
    import numpy as np

    return random_orthonormal(D, R, np.random.Philox(seed))


def test_shares_are_those_of_singular_values() -> None:
    x_BTD, a_DR, survey = some_states(), some_projector(), EnergySurvey()
    survey.see(x_BTD)
    shares = survey.shares(a_DR)
    x_ND = x_BTD.flatten(0, 1).double()
    squares = torch.linalg.svdvals(x_ND).square()
    assert shares["energy_best"] == pytest.approx((squares[:R].sum() / squares.sum()).item(), rel=1e-5)
    kept = (x_ND @ a_DR.double()).square().sum() / squares.sum()
    assert shares["energy_kept"] == pytest.approx(kept.item(), rel=1e-5)
    best_DR = torch.linalg.svd(x_ND, full_matrices=False).Vh[:R].T.float()
    again = EnergySurvey()
    again.see(x_BTD)
    found = again.shares(best_DR)
    assert found["energy_kept"] == pytest.approx(found["energy_best"], rel=1e-5)


def test_it_looks_at_the_first_microbatch_of_every_sixteenth_step() -> None:
    survey, a_DR, seen = EnergySurvey(), some_projector(), []
    for step in range(2 * SURVEY_EVERY + 1):
        for microbatch in range(2):
            survey.see(some_states(2 * step + microbatch))
        seen.append(survey.shares(a_DR)["energy_kept"])
    assert [i for i in range(1, len(seen)) if seen[i] != seen[i - 1]] == [SURVEY_EVERY, 2 * SURVEY_EVERY]


def test_nothing_seen_and_nothing_there_to_keep_say_nothing() -> None:
    survey = EnergySurvey()
    assert survey.shares(some_projector()) == {}
    survey = EnergySurvey()
    survey.see(torch.zeros(1, 4, D))
    assert survey.shares(some_projector()) == {}
