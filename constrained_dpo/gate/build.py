"""From gate.yaml and the run to the claims, by name."""

from dataclasses import replace

from constrained_dpo.gate.claims import CUT_OFF, LENGTH, TEST, Claim
from constrained_dpo.gate.settings import ChecksSettings, GateSettings
from constrained_dpo.problem import Constraint
from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError
from data_prep.tables import RESERVED_NAMES

REFUSAL = "gate_refusal"
"""The responses' column with 1 for a refusal."""


def build_claims(recipe: Recipe, settings: GateSettings) -> list[Claim]:
    """List the claims on samples that the gate makes, in the order of its keys.

    Raises UserError for a constraint that the recipe does not have, for a second opinion whose name
    is in use, and where nothing is checked.
    """
    checks, responses_end = settings.checks, float(recipe.sampling.max_new_tokens)
    claims = [_constraint(recipe, c) for c in _constraints(recipe, checks)]
    if checks.reward is not None:
        claims.append(_reward(recipe, checks.reward.drop))
    claims += _second_opinions(recipe, checks)
    if checks.refusal is not None:
        increase = checks.refusal.increase
        words = f"refuses at most {100 * increase:g} points more benign prompts than π_ref"
        claims.append(
            Claim("refusal", "refusal", words, REFUSAL, -1, 1, increase, (0, 1), "refusal")
        )
    if checks.length is not None:
        claims.append(_length(checks.length.ratio, checks.length.increase, responses_end))
    if checks.cut_off is not None:
        claims.append(_cut_off(checks.cut_off.share, checks.cut_off.increase))
    if not claims and not checks.capability:
        raise UserError("checks: the gate checks nothing; give it a constraint or another check")
    return claims


def _constraints(recipe: Recipe, checks: ChecksSettings) -> list[Constraint]:
    """The run's constraints that are checked, at the gate's levels."""
    by_name = {c.name: c for c in recipe.problem.constraints}
    if checks.constraints == "all":
        return list(by_name.values())
    chosen = []
    for check in checks.constraints:
        if check.name not in by_name:
            raise UserError(
                f"checks.constraints: the run has no constraint {check.name}; it has "
                f"{', '.join(by_name) or '(none)'}"
            )
        constraint = by_name[check.name]
        chosen.append(constraint if check.level is None else constraint.at(check.level))
    return chosen


def _constraint(recipe: Recipe, constraint: Constraint) -> Claim:
    name, column = constraint.name, constraint.column
    range_ = recipe.score_ranges[name]
    if constraint.threshold is not None:
        words = f"{name} at least {constraint.threshold:g}"
        claim = Claim("constraint", name, words, column, 1, 0, -constraint.threshold, range_)
    else:
        margin = float(constraint.margin or 0.0)
        words = f"{name} at least {margin:g} above π_ref"
        claim = Claim("constraint", name, words, column, 1, -1, -margin, range_)
    return replace(claim, measure=constraint.measure)


def _change(demanded: float) -> str:
    """A demanded change against π_ref, in words."""
    if demanded > 0:
        return f"at least {demanded:g} above π_ref"
    return "not below π_ref" if demanded == 0 else f"at most {-demanded:g} below π_ref"


def _reward(recipe: Recipe, drop: float) -> Claim:
    name = recipe.problem.reward
    words = f"{name} {_change(-drop)}"
    return Claim("reward", name, words, name, 1, -1, drop, recipe.score_ranges[name])


def _second_opinions(recipe: Recipe, checks: ChecksSettings) -> list[Claim]:
    claims = []
    for check in checks.second_opinion:
        taken = {*RESERVED_NAMES, *recipe.scorers, TEST, "refusal"}
        taken |= {REFUSAL, LENGTH, CUT_OFF}
        if check.name in taken:
            raise UserError(
                f"checks.second_opinion.{check.name}: is a reserved name or one of the run's "
                "objectives; choose another"
            )
        prompts = TEST if check.prompts is None else check.name
        words = f"{check.name} {_change(check.demanded)}"
        range_, offset = check.scorer.score_range, -check.demanded
        claims.append(
            Claim("second_opinion", check.name, words, check.name, 1, -1, offset, range_, prompts)
        )
    return claims


def _length(ratio: float | None, increase: float | None, longest: float) -> Claim:
    if ratio is None:
        more = float(increase or 0.0)
        words = f"at most {more:g} tokens longer than π_ref"
        return Claim("length", "length", words, LENGTH, -1, 1, more, (0, longest))
    words = f"at most {ratio:g} times as long as π_ref"
    return Claim("length", "length", words, LENGTH, -1, ratio, 0, (0, longest))


def _cut_off(share: float | None, increase: float | None) -> Claim:
    if share is None:
        more = float(increase or 0.0)
        words = f"at most {100 * more:g} points more responses cut off than π_ref"
        return Claim("cut_off", "cut_off", words, CUT_OFF, -1, 1, more, (0, 1))
    words = f"at most {100 * share:g} % of responses cut off"
    return Claim("cut_off", "cut_off", words, CUT_OFF, -1, 0, share, (0, 1))
