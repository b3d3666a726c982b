"""Where a run stands and what happens next."""

from collections.abc import Callable

from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.report.words import certificate_line
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.selection import best_dual_round, best_round
from data_prep.errors import UserError


def next_step(run: RunDirectory, recipe: Recipe) -> str:
    """What happens next, in words."""
    state, rounds = run.state(), recipe.dual.rounds
    if not state["lambda"]:
        return "prepare: sample and score the reference policy (cdpo prepare)"
    number = run.rounds_done()
    if number >= rounds:
        return (
            f"all {rounds} rounds of the recipe are done (cdpo report, evaluate or export; "
            "cdpo round plays another)"
        )
    labels = run.labels_file(number, recipe.fit.grouped)
    done = {
        "relabel": labels,
        "fit": run.adapter_folder(number),
        "rescore": run.samples_file(number),
    }
    for name, path in done.items():
        if not path.exists():
            return (
                f"round {number} of {rounds}: {name} (cdpo round, or cdpo run for all that are "
                "left)"
            )
    return f"round {number} of {rounds}: dual step (cdpo round)"


TEST_KEYS = ("u", "u_ci_low", "u_ci_high", "reward", "kl", "objective", "verdicts")


def expected_round_seconds(rounds: list[dict]) -> float | None:
    """Seconds of a round: the sum over phases of their mean in the rounds that ran them whole (a
    resumed round has none); None before.

    The phase off_policy is not there at temperature ≠ 1 or top_p < 1, nor in rounds of older
    releases.
    """
    total = 0.0
    for phase in ("relabel", "fit", "rescore", "off_policy"):
        known = [s for r in rounds if (s := r["seconds"].get(phase)) is not None]
        if not known and phase != "off_policy":
            return None
        total += sum(known) / max(len(known), 1)
    return round(total, 2)


def status(run: RunDirectory) -> dict[str, object]:
    """The run's state as JSON-ready values: rounds with λ, u, reward, KL, objective and verdict,
    and what happens next."""
    recipe, state = run.recipe(), run.state()
    keys = (
        "round",
        "lambda",
        "lambda_next",
        "u",
        "u_ci_low",
        "u_ci_high",
        "reward",
        "kl",
        "objective",
        "verdict",
        "step",
    )
    keys += (
        "dual_value",
        "lagrangian",
        "lagrangian_gap",
        "optimality_gap",
        "residual",
        "ess",
        "certificate_reason",
    )
    records = [run.round_record(t) for t in range(run.rounds_done())]
    rounds = [
        {k: r.get(k) for k in keys}
        | {"test": {k: r["test"][k] for k in TEST_KEYS}, "seconds": r["seconds"]}
        for r in records
    ]
    per_round = expected_round_seconds(rounds)
    left = max(recipe.dual.rounds - len(rounds), 0)
    return {
        "name": recipe.name,
        "problem": recipe.problem.describe(),
        "reward": recipe.problem.reward,
        "at_max_lambda": [
            n
            for n, v in (state["lambda"][-1] if state["lambda"] else {}).items()
            if v >= recipe.dual.max_lambda
        ],
        "lambda": state["lambda"][-1] if state["lambda"] else None,
        "left_out": state["left_out"],
        "dataset": run.dataset_record(),
        "rounds": rounds,
        "best": _or_none(best_round, records, recipe.dual.confidence),
        "best_dual": _or_none(best_dual_round, records),
        "certificate": certificate_line(records, recipe.dual.confidence) if records else None,
        "next": next_step(run, recipe),
        "rounds_left": left,
        "seconds_per_round": per_round,
        "seconds_left": None if per_round is None else round(left * per_round, 2),
    }


def _or_none(choose: Callable[..., int], *arguments: object) -> int | None:
    """The round that is chosen, or None where none qualifies."""
    try:
        return choose(*arguments)
    except UserError:
        return None
