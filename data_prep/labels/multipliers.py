"""The law of label rows' multipliers: each row of a labels table may have a λ (and a κ) of its own.

Floors keep a multiplier of 0 moving: below its floor λ has no scale of its own, and a range that
goes below it reaches 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_prep.errors import UserError
from data_prep.labels.prompt_rows import hashed_uniforms
from data_prep.settings import derive_seed
from data_prep.tables import MULTIPLIER_PREFIX, require_columns, require_ids, require_scores

KAPPA = "kappa"
"""The column of a labels table that holds each row's κ = β_recipe/β."""

PEAK = 3
"""How strongly rows gather at the center: they are off by x^PEAK of the range, x uniform."""

FLOOR_SHARE = 0.1
"""The floor of λ in units of std(reward)/std(utility) within prompts, where none is given."""


def multiplier_columns(names: Iterable[str]) -> list[str]:
    """Name the columns of a labels table that hold each row's λ, by utility."""
    return [f"{MULTIPLIER_PREFIX}{name}" for name in names]


@dataclass(frozen=True, eq=False)
class MultiplierRange:
    """The law that a label row's multipliers are drawn from: around `center`, within a factor w,
    half of them within w^(1/8) of it.

    center: by utility, ≥ 0. floor: by utility, > 0: around a smaller center λ goes from 0 to
    floor·w. factor: w > 1. kappa: range of κ = β_recipe/β, or None. λ is in units of
    reward per utility. Raises UserError on other values.
    """

    center: pd.Series
    floor: pd.Series
    factor: float
    kappa: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        names = self.center.index
        if not names.is_unique or sorted(names) != sorted(self.floor.index):
            raise UserError(
                f"range of λ: center is of {_listed(self.center)}, floor of {_listed(self.floor)}; "
                "give both for every utility, once"
            )
        for name, value in self.center.items():
            if not np.isfinite(value) or value < 0:
                raise UserError(f"lambda of {name} is {value}; multipliers are finite and ≥ 0")
        for name, value in self.floor.items():
            if not np.isfinite(value) or value <= 0:
                raise UserError(f"floor of {name} is {value}; give a finite number > 0")
        if not np.isfinite(self.factor) or self.factor <= 1:
            raise UserError(
                f"range of λ: the factor is {self.factor}; give a finite number > 1, as 3"
            )
        if self.kappa is not None:
            low, high = self.kappa
            if not (np.isfinite(high) and 0 < low < high):
                raise UserError(
                    f"range of κ is {low} to {high}; give 0 < low < high, as 0.5 to 1.5"
                )

    @property
    def low(self) -> pd.Series:
        """Give the lower end by utility: max(center, floor)/factor, or 0 where that is at most the
        floor."""
        bottom = self._middle / self.factor
        return bottom.where(bottom > self._floor, 0.0)

    @property
    def high(self) -> pd.Series:
        """Give the upper end by utility: max(center, floor)·factor."""
        return self._middle * self.factor

    def draw(self, seed: int, *keys: np.ndarray) -> pd.DataFrame:
        """Draw each row's multipliers.

        keys: (num_rows,) uint64 each; a row's draws depend on (seed, column name, its keys) alone.
        Returns `multiplier_columns` of the utilities, and `KAPPA` where κ has a range, (num_rows,)
        float64 each. λ = center·factor^(x³), x uniform on [−1, 1]: the member that is needed lies
        near the center, and the ends are there for when it does not. Where the lower end is 0,
        what falls below the floor is stretched linearly so that it reaches 0. A center below the
        floor has no scale of its own: λ = center − center·|x|³ or center + (high − center)·x³. κ is
        log-uniform on its range.
        """
        columns = {}
        names = [str(name) for name in self.center.index]
        for name, column in zip(names, multiplier_columns(names), strict=True):
            uniform = hashed_uniforms(derive_seed(seed, 0, column), *keys)
            columns[column] = _around(
                (2 * uniform - 1) ** PEAK,
                float(self.center[name]),
                self.factor,
                float(self._floor[name]),
            )
        if self.kappa is not None:
            uniform = hashed_uniforms(derive_seed(seed, 0, KAPPA), *keys)
            columns[KAPPA] = _log_uniform(uniform, *self.kappa)
        return pd.DataFrame(columns, index=pd.RangeIndex(len(keys[0])), copy=False)

    @property
    def _floor(self) -> pd.Series:
        return self.floor[self.center.index].astype(float)

    @property
    def _middle(self) -> pd.Series:
        return self.center.astype(float).clip(lower=self._floor)


def multiplier_floor(responses: pd.DataFrame, reward: str, utilities: Iterable[str]) -> pd.Series:
    """Measure the floor of each utility's λ: a tenth of std(reward)/std(utility) within prompts.

    responses: (num_responses,) rows with prompt_id, the reward's and the utilities' columns.
    Variances are pooled over prompts: Σ(x − prompt's mean)²/Σ(K − 1), K the prompt's responses.
    Raises UserError on a missing column, a score that is not finite, a score that is constant
    within prompts, or where no prompt has two responses.
    """
    names = [*dict.fromkeys(utilities)]
    require_columns(responses, ["prompt_id", reward, *names], "responses")
    require_ids(responses, ["prompt_id"], "responses")
    require_scores(responses, [reward, *names], "responses")
    if not responses["prompt_id"].duplicated().any():
        raise UserError(
            "responses: no prompt has two responses, so there is no scale for the floor of λ; "
            "sample more per prompt"
        )
    std = {name: _within_prompts(responses, name) for name in [reward, *names]}
    for name, value in std.items():
        if value == 0:
            raise UserError(
                f"responses: column {name} is constant within prompts, so there is no scale for "
                "the floor of λ; give the floor of every utility (relabel: --floor NAME=VALUE)"
            )
    floors = {name: FLOOR_SHARE * std[reward] / std[name] for name in names}
    # Twelve digits: the order of the rows, which moves the last bits of a sum, moves no floor.
    return pd.Series({name: float(f"{value:.12g}") for name, value in floors.items()}, dtype=float)


def _within_prompts(responses: pd.DataFrame, name: str) -> float:
    """Standard deviation within prompts, score units; 0 where rounding is all that differs."""
    responses = responses[responses[name].notna()]
    score = responses[name].astype(float)
    by_prompt = score.groupby(responses["prompt_id"].to_numpy())
    deviation = score - by_prompt.transform("mean")
    std = float(np.sqrt((deviation**2).sum() / (len(score) - by_prompt.ngroups)))
    return std if std > 1e-12 * float(score.abs().max()) else 0.0


def _around(share: np.ndarray, center: float, factor: float, floor: float) -> np.ndarray:
    """λ of one utility at a share of the way, −1 to 1, to either end: `MultiplierRange.draw`."""
    if center < floor:
        return center + share * np.where(share < 0, center, floor * factor - center)
    bottom = center / factor
    value = np.clip(center * factor**share, bottom, center * factor)
    if bottom >= floor:
        return value
    return np.where(value <= floor, (value - bottom) / (floor - bottom) * floor, value)


def _log_uniform(uniform: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip(low * (high / low) ** uniform, low, high)


def _listed(series: pd.Series) -> str:
    return ", ".join(map(str, series.index)) or "none"
