"""Which round is meant by best, best-dual or last, and when no further round should be played.

Nothing here looks at test prompts, so that a choice leaves the test's verdict as valid as for a
round chosen blindly.
"""

import numpy as np
import pandas as pd

from constrained_dpo.dual.feasibility import INFEASIBLE, Feasibility, diagnose_feasibility
from constrained_dpo.dual.scores import ScoreTable
from constrained_dpo.estimates.certificate import best_bound
from constrained_dpo.estimates.verdict import SATISFIED, VIOLATED
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.multipliers import demanded
from constrained_dpo.run.record import RoundRecord, read_records
from data_prep.errors import UserError
from data_prep.readers.tables import read_parquet

CHOICES = ("best", "best-dual", "last")


def best_round(records: list[RoundRecord], confidence: float) -> int:
    """Choose the round of the highest objective among those satisfied on the dual prompts.

    Where the sampling law leaves no objective E[r] − β KL, of the highest reward. Raises UserError
    when no round is satisfied.
    """
    satisfied = [r for r in records if r.overall == SATISFIED]
    if not satisfied:
        raise UserError(
            f"--round best: no round of {len(records)} is satisfied on the dual prompts at "
            f"{100 * confidence:g} %; play more rounds, steer on the lower bound "
            "(dual.confidence_side: lower), or take --round last"
        )
    return max(satisfied, key=lambda r: r.reward if r.objective is None else r.objective).round


def best_dual_round(records: list[RoundRecord]) -> int:
    """Choose argmin_t D(λ_t), the best iterate of CAID's convergence result (arXiv:2505.19387,
    App. B.10).

    D is the dual function itself, not L(π_θt, λ_t), which is smallest where the fit is worst.
    Raises UserError where no round has an estimate of it.
    """
    values = {r.round: r.dual_value for r in records if r.dual_value is not None}
    if not values:
        raise UserError(
            "--round best-dual: no round has a dual value (round.json says why); take --round "
            "best or last"
        )
    return min(values, key=values.__getitem__)


def chosen_round(run: RunDirectory, choice: str) -> int:
    """Find the round that `--round K`, `best`, `best-dual` or `last` means.

    Raises UserError where there is none.
    """
    played = run.rounds_done()
    if not played:
        raise UserError(
            f"{run.path}: no round has been played yet; `cdpo round {run.path}` plays one"
        )
    if choice == "last":
        return played - 1
    if choice == "best":
        return best_round(read_records(run), run.recipe().dual.confidence)
    if choice == "best-dual":
        return best_dual_round(read_records(run))
    if not choice.isdigit() or int(choice) >= played:
        raise UserError(
            f"--round {choice}: give a round from 0 to {played - 1}, or {', '.join(CHOICES)}"
        )
    return int(choice)


def converged(
    record: RoundRecord,
    needed: pd.Series,
    unit: pd.Series,
    tolerance: float,
    target_gap: float | None,
    bound: float | None,
) -> bool:
    """Tell whether a round met the constraints with complementary slackness and left λ alone.

    needed: by constraint, the rise of the utility over π_ref that is demanded (score units); unit:
    λ at which the utility weighs as much as the reward, std(r)/std(g). Met: v − SE ≥ −tolerance ·
    needed for the slack v that was steered on, and where λ > 0 also v + SE ≤ tolerance · needed, so
    that luck alone ends no run; |Δλ| ≤ tolerance · max(λ, unit/10). With target_gap (score units of
    the reward) also bound − objective ≤ target_gap, bound being the smallest D so far; without a
    bound that is not met.
    """
    v, error, lam, after = (
        pd.Series(values, dtype=float)
        for values in (record.steered_on, record.u_se, record.lambda_, record.lambda_next)
    )
    room = tolerance * needed.reindex(v.index)
    met = (v - error >= -room) & ((v + error <= room) | (lam <= 0))
    still = (after - lam).abs() <= tolerance * np.maximum(lam, unit.reindex(v.index) / 10)
    if target_gap is not None:
        gap = None if bound is None or record.objective is None else bound - record.objective
        if gap is None or gap > target_gap:
            return False
    return bool(met.all() and still.all())


def diagnose_run(run: RunDirectory, recipe: Recipe) -> Feasibility:
    """Ask all responses seen so far whether the constraints can be met.

    π_ref's and every round's on the dual prompts, levels from π_ref's. Each response counts once: a
    policy that repeats itself is no evidence that nothing better exists.
    """
    problem = recipe.problem
    columns = ["prompt_id", "split", "response", *problem.columns]
    files = [run.reference_file, *map(run.samples_file, range(run.rounds_done()))]
    tables = [read_parquet(path, columns) for path in files]
    dual = [table[table["split"] == "dual"] for table in tables]
    means = problem.reference_scores(dual[0]).groupby("prompt_id")[problem.names].mean().mean()
    levels = problem.levels(means)
    seen = pd.concat(dual, ignore_index=True).drop_duplicates(["prompt_id", "response"])
    ranges = recipe.score_ranges
    ceilings = {c.name: c.measure.bounds(*ranges[c.name])[1] for c in problem.constraints}
    return diagnose_feasibility(ScoreTable.from_frame(seen, problem), problem, levels, ceilings)


def reason_to_stop(run: RunDirectory, recipe: Recipe, until_converged: bool) -> str | None:
    """Say in a line why no further round should be played; None where one should.

    While a constraint is violated on the dual prompts: all responses seen so far show that no
    policy can meet it (infeasible), or its λ rests at dual.max_lambda.
    """
    records, dual = read_records(run), recipe.dual
    last, bound = records[-1], dual.max_lambda
    if dual.method not in ("one_shot", "fixed") and last.overall == VIOLATED:
        feasibility = diagnose_run(run, recipe)
        stuck = [n for n, u in last.u.items() if u < 0 and last.lambda_[n] >= bound]
        if feasibility.verdict == INFEASIBLE or stuck:
            where = f"λ of {' and '.join(stuck)} is at dual.max_lambda {bound:g} and violated "
            where = f"{where}still. " if stuck else ""
            return f"stopped after round {last.round}: {where}{feasibility.sentence()}"
    if until_converged:
        needed, unit = demanded(run, recipe)
        best = best_bound(records)
        lowest = None if best is None else best.dual_value
        if converged(last, needed, unit, dual.tolerance, dual.target_gap, lowest):
            return (
                f"converged in round {last.round}: the constraints are met within "
                f"{100 * dual.tolerance:g} % and λ rests"
            )
    return None
