"""Whether the responses that a server drew are the policy's: its log-probabilities beside ours, and
the draws themselves.

A server that looks right may draw from another law: it ignores an adapter, serves other weights, or
lets one request's adapter leak into another's. u is then that of no policy, so such a table is
refused before anything is estimated from it.
"""

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd

from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError
from data_prep.models.settings import ROUNDING
from data_prep.tables import DRAWS

log = logging.getLogger(__name__)

QUANTIZED = 0.5
"""In place of the dtype's ROUNDING where the policy is quantized and the server's weights are not,
or otherwise."""

REFUSED_Z, WARNED_Z = 5.0, 4.0
"""Evidence that refuses a table, and that is worth a warning (`DrawTest.evidence`)."""

STEPS = {"surprisal": 1.25, "eos": 1 / 3}
"""How much a single step may add to a sum beyond what its variance says (c of Bernstein's
inequality): steps of at most 1 have 1/3; a surprisal has the tail e^−s, which has little over 1."""

OUTSIDE = 0.005
"""Fraction of tokens outside the nucleus that rounding at its edge explains."""

COMPARED = 16
"""Responses with the server's log-probability that a comparison needs."""


@dataclass(frozen=True)
class DrawRule:
    """What a server's table must hold to. rounding: nats per token (root mean square); strict:
    whether the draws' law is known to be ours, so that the tests of the draws refuse."""

    rounding: float
    strict: bool


def draw_rule(recipe: Recipe) -> DrawRule | None:
    """Give the rule for a recipe's tables; None where they are drawn here."""
    server, policy = recipe.sampling.server, recipe.policy
    if server is None:
        return None
    quantized = policy.quantization != "none"
    rounding = server.rounding or (QUANTIZED if quantized else ROUNDING[policy.dtype])
    return DrawRule(rounding, strict=not quantized and server.kind != "openai")


@dataclass(frozen=True)
class DrawTest:
    """Sums of a table in units of their standard deviation (`data_prep.sampling.draws`).

    surprisal, eos: z = S/√V, standard normal where the responses were drawn from the law that is
    stated and tokens are many; None where nothing varies. outside: fraction of tokens with
    probability 0. evidence: the larger |S|/√(V + c|S|), which is z where tokens are many and less
    where few could make a large sum by chance: such a sum has probability ≤ 2 exp(−evidence²/2)
    (Freedman, On Tail Probabilities for Martingales, 1975, theorem 1.6).
    """

    surprisal: float | None
    eos: float | None
    outside: float
    evidence: float


def draw_test(table: pd.DataFrame) -> DrawTest | None:
    """Test the draws of a responses table; None unless every response has the sums: those whose
    tokens are not known would be left out by what was drawn."""
    if not set(DRAWS) <= set(table) or table[list(DRAWS)].isna().any(axis=None) or table.empty:
        return None
    sums = table[list(DRAWS)].sum()

    def z(name: str) -> float | None:
        variance = float(sums[f"{name}_variance"])
        return float(sums[f"{name}_excess"]) / variance**0.5 if variance > 0 else None

    def evidence(name: str) -> float:
        total, variance = abs(float(sums[f"{name}_excess"])), float(sums[f"{name}_variance"])
        return total / (variance + STEPS[name] * total) ** 0.5 if variance > 0 else 0.0

    outside = float(sums["outside_tokens"]) / int(table["token_ids"].map(len).sum())
    return DrawTest(z("surprisal"), z("eos"), outside, max(map(evidence, STEPS)))


def rounding(table: pd.DataFrame, column: str = "policy_logp") -> float | None:
    """Root mean square of the server's log-probabilities less ours, nats per token: √(Σ D² / Σ L)
    over responses of L tokens whose log-probabilities differ by D; None with fewer than COMPARED.
    """
    if "server_logp" not in table:
        return None
    difference = (table["server_logp"] - table[column]).to_numpy(np.float64)
    present = np.isfinite(difference)
    if present.sum() < COMPARED:
        return None
    tokens = table["token_ids"].map(len).to_numpy()[present].sum()
    return float(np.sqrt((difference[present] ** 2).sum() / tokens))


def describe_draws(table: pd.DataFrame) -> dict[str, float | None]:
    """Give the comparison in a record's words: `rounding` (nats per token), `eos_z`, `surprisal_z`;
    null where they are not known."""
    test = draw_test(table)
    return {
        "rounding": rounding(table),
        "eos_z": None if test is None else test.eos,
        "surprisal_z": None if test is None else test.surprisal,
    }


def require_policy_draws(table: pd.DataFrame, rule: DrawRule | None, where: str) -> None:
    """Raise UserError, in one line, where a server drew from another law than the policy's; log a
    warning where that is likely. Every server's responses are judged by themselves.

    where: names the table. A table without a server's columns passes.
    """
    if rule is None or "server_url" not in table:
        return
    for url, rows in table.groupby("server_url"):
        test = draw_test(rows)
        if problem := _other_weights(rows, rule) or _other_draws(test, rule):
            raise UserError(f"{where}: {url} {problem}")
        if test is not None and test.evidence > WARNED_Z:
            log.warning("%s: %s: %s; look at the server", where, url, _words(test))


def _other_weights(rows: pd.DataFrame, rule: DrawRule) -> str | None:
    distance, to_base = rounding(rows), rounding(rows, "ref_logp")
    if distance is None or to_base is None:
        return None
    moved = (rows["policy_logp"] - rows["ref_logp"]).abs().max() > rule.rounding / 10
    if moved and 2 * to_base**2 < distance**2:
        return (
            "answers with the base's log-probabilities where the adapter was asked for: it ignores "
            "adapters; start it with adapters enabled, or set sampling.server.adapter_model"
        )
    if distance > rule.rounding:
        return (
            f"has log-probabilities that are {distance:.2g} nats per token from the policy's (at "
            f"most {rule.rounding:g}): it serves another model, other weights or another "
            "precision, or vLLM has loaded an adapter with a layer on the head, which stays in "
            "the base's answers until it is restarted; restart it with policy.model, or set "
            "sampling.server.rounding"
        )
    return None


def _other_draws(test: DrawTest | None, rule: DrawRule) -> str | None:
    if test is None or not rule.strict:
        return None
    if test.evidence > REFUSED_Z:
        return (
            f"did not draw from the policy: {_words(test)}; are adapters of others on it (vLLM: "
            "one slot more than adapters, --max-loras), or its own top_k, penalties or logit "
            "bias? Restart it"
        )
    if test.outside > OUTSIDE:
        return (
            f"did not draw from the policy's nucleus: {100 * test.outside:.2g} % of its tokens "
            "lie outside; does it obey top_p?"
        )
    return None


def _words(test: DrawTest) -> str:
    parts = []
    if test.eos is not None:
        often = "too often" if test.eos > 0 else "too seldom"
        parts.append(f"responses end {often} (z = {test.eos:+.1f})")
    if test.surprisal is not None:
        much = "too unlikely" if test.surprisal > 0 else "too likely"
        parts.append(f"tokens are {much} (z = {test.surprisal:+.1f})")
    return ", ".join(parts)
