"""The model card of an export: problem, λ, verdict, sampling law, scorers, limits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from constrained_dpo.estimates.measure import Measurement
from constrained_dpo.evaluation.front_record import FrontPoint
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord

MERGED_DTYPE = "bfloat16"

TEMPLATES = Path(__file__).parent / "templates"


def model_card(
    run: RunDirectory, recipe: Recipe, record: RoundRecord, measured: Measurement, *, merged: bool
) -> str:
    """Write the README.md of an export: problem, λ, verdict on the test prompts, sampling law,
    scorers and their revisions, limits.

    measured: on the test prompts, of what is exported.
    """
    base, kind = recipe.policy, "a LoRA adapter (PEFT)"
    against = f"the base in {base.quantization}, {base.dtype}"
    if merged:
        kind = f"merged into the base in {MERGED_DTYPE} and measured again"
        against = f"the base in {MERGED_DTYPE}"
    kl = "not estimated (the samples are not from the policy itself)"
    if measured.kl is not None:
        kl = f"{measured.kl:.3f} nats"
    return _rendered(
        "model_card.md",
        name=recipe.name,
        round=record.round,
        base=base,
        merged=merged,
        kind=kind,
        against=against,
        reference=_reference_words(recipe),
        problem=recipe.problem.describe().splitlines(),
        verdict=measured.overall,
        confidence=recipe.dual.confidence,
        constraints=_constraint_rows(recipe, record, measured),
        reward=recipe.problem.reward,
        measured=measured,
        kl=kl,
        prompt_words=_prompt_words(recipe),
        law=record.sampling_law,
        temperature=base.temperature * record.sampling_law.temperature,
        scorers=_scorer_rows(run, recipe),
        rounds_played=run.rounds_done(),
    )


def members_card(
    run: RunDirectory,
    recipe: Recipe,
    members: Sequence[tuple[str, FrontPoint]],
    serve_line: str,
    notices: Sequence[str],
) -> str:
    """Write the README.md of one or several members of a run's family: levels, λ, verdict of each,
    and how to serve them together.

    members: by the adapter's name; notices: what a reader has to know of some of them.
    """
    points, problem = [point for _, point in members], recipe.problem
    rows = [(name, point, point.row(problem)) for name, point in members]
    return _rendered(
        "members_card.md",
        name=recipe.name,
        round=points[0].round,
        base=recipe.policy,
        reference=_reference_words(recipe),
        problem=problem,
        rows=rows,
        notices=notices,
        serve_line=serve_line,
        confidence=recipe.dual.confidence,
        prompt_words=_prompt_words(recipe),
        law=recipe.sampling,
        temperature=recipe.policy.temperature * recipe.sampling.temperature,
        scorers=_scorer_rows(run, recipe),
        heads="lm_head" in (recipe.policy.lora.target_modules or ()),
    )


def _rendered(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string((TEMPLATES / template).read_text(encoding="utf-8")).render(
        values
    )


def _reference_words(recipe: Recipe) -> str:
    base = recipe.policy
    words = f"`{base.model}`" + (f", revision `{base.revision}`" if base.revision else "")
    adapter = base.reference_adapter
    return words + (f" + adapter `{adapter}`, merged" if adapter else "")


def _prompt_words(recipe: Recipe) -> str:
    if recipe.prompts.format == "chat":
        return "through the tokenizer's chat template."
    return f"as `{recipe.prompts.template!r}`."


def _constraint_rows(
    recipe: Recipe, record: RoundRecord, measured: Measurement
) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "multiplier": record.policy_lambda[name],
            "u": measured.u[name],
            "low": measured.u_ci_low[name],
            "high": measured.u_ci_high[name],
            "verdict": measured.verdicts[name],
        }
        for name in recipe.problem.names
    ]


def _scorer_rows(run: RunDirectory, recipe: Recipe) -> list[dict[str, str]]:
    fingerprints = run.state().hashes["scorers"]
    rows = []
    for name, scorer in recipe.scorers.items():
        options, models = scorer.described(), scorer.models
        rows.append(
            {
                "name": name,
                "type": scorer.type,
                "place": scorer.place,
                "options": f", {options}" if options else "",
                "revision": (models[0][1] if models else None) or "–",
                "fingerprint": fingerprints[name],
            }
        )
    return rows
