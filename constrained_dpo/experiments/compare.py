"""Runs beside each other: which may be compared, what each reached on its test prompts, means over
seeds. numpy, scipy and pandas only.

Every number is recomputed from a run's tables or read from its round.json and exact.json; nothing
is sampled.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from constrained_dpo.dual.exact import share_of_gap_closed
from constrained_dpo.estimates.certificate import best_bound
from constrained_dpo.estimates.intervals import seeds_interval
from constrained_dpo.estimates.slack import changes
from constrained_dpo.problem import ConstrainedProblem
from constrained_dpo.recipe.methods import is_fixed, is_weighted_sum, method_labels, settings_line
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.selection import chosen_round, violated_on_dual
from data_prep.errors import UserError
from data_prep.prompts.templates import last_user_text
from data_prep.tables import read_parquet


@dataclass(frozen=True)
class Row:
    """One run at one round, on its test prompts; score units.

    name: its folder's name, or the path where two share one; number: the round shown; rounds: those
    played. changes: by objective, what `rescore.changes` gives (policy against π_ref); demanded: by
    constraint, the gain over π_ref that was asked for (b, or c − ḡ_ref), empty where λ was fixed
    beforehand; exact: the same quantities without sampling error, where the world can be
    enumerated. bound_gap: min_t D(λ_t) − objective on the dual prompts with its standard error, or
    None with the reason. whole: no phase's time is missing after a stop.
    """

    name: str
    run: RunDirectory
    recipe: Recipe
    number: int
    rounds: int
    identity: dict[str, object]
    lambda_: dict[str, float]
    changes: dict[str, dict[str, float]]
    demanded: dict[str, float]
    kl: float | None
    objective: float | None
    kl_reason: str | None
    bound_gap: float | None
    bound_gap_se: float | None
    bound_reason: str | None
    verdict: str
    seconds: float
    whole: bool
    exact: dict[str, object] | None

    @property
    def setting(self) -> tuple[object, ...]:
        """What tells the points of one method's line apart: margins and thresholds as asked for, or
        a weighted sum's weights."""
        if is_weighted_sum(self.recipe):
            return tuple(self.lambda_.values())
        constraints = [] if is_fixed(self.recipe) else self.recipe.objective.constraints
        return tuple(c.margin if c.threshold is None else c.threshold for c in constraints)

    def values(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "run": self.name,
            "path": str(self.run.path),
            "recipe": self.recipe.name,
            "settings": settings_line(self.recipe),
            "seed": self.recipe.seed,
            "beta": self.recipe.objective.beta,
            "reward": self.recipe.problem.reward,
            "round": self.number,
            "rounds": self.rounds,
            "lambda": self.lambda_,
            "demanded": self.demanded,
            "changes": self.changes,
            "kl": self.kl,
            "objective": self.objective,
            "kl_reason": self.kl_reason,
            "optimality_gap": self.bound_gap,
            "optimality_gap_se": self.bound_gap_se,
            "certificate_reason": self.bound_reason,
            "verdict": self.verdict,
            "seconds": self.seconds,
            "seconds_whole": self.whole,
            "exact": self.exact,
            "identity": self.identity,
        }


@dataclass(frozen=True)
class Group:
    """Runs that may be compared with each other. labels: method by row; apart: why they are not
    compared with group 1, or None."""

    rows: list[Row]
    labels: list[str]
    apart: str | None

    @property
    def reward(self) -> str:
        """The objective on the vertical axis: the reward of most runs (a run of one utility alone
        has that as its reward)."""
        rewards = [row.recipe.problem.reward for row in self.rows]
        return max(dict.fromkeys(rewards), key=rewards.count)

    @property
    def utilities(self) -> list[str]:
        """Every other objective of any run, in order."""
        names = dict.fromkeys(name for row in self.rows for name in row.recipe.problem.objectives)
        return [name for name in names if name != self.reward]


def read_row(path: Path, choice: str, name: str) -> Row:
    """A run at the round that `--round` means. Raises UserError where there is no such round or no
    run."""
    run = RunDirectory(path)
    recipe, number = run.recipe(), chosen_round(run, choice)
    problem, confidence = recipe.problem, recipe.dual.confidence
    records = [run.round_record(t) for t in range(number + 1)]
    record = records[-1]
    columns = ["prompt_id", "split", *problem.objectives]
    samples, reference = (
        read_parquet(file, columns) for file in (run.samples_file(number), run.reference_file)
    )
    moved = changes(
        samples[samples["split"] == "test"],
        reference[reference["split"] == "test"],
        problem.objectives,
        confidence,
    )
    levels = problem.levels(
        pd.Series({name: moved[name]["reference"] for name in problem.names}, dtype=float)
    )
    demanded = (
        {}
        if is_fixed(recipe)
        else {name: float(levels[name]) - moved[name]["reference"] for name in problem.names}
    )
    gap, error, reason = _bound_gap(records, confidence)
    phases = [s for r in records for s in r["seconds"].values()]
    return Row(
        name=name,
        run=run,
        recipe=recipe,
        number=number,
        rounds=run.rounds_done(),
        identity=identity(run),
        lambda_=record["lambda"],
        changes=moved,
        demanded=demanded,
        kl=record["test"]["kl"],
        objective=record["test"]["objective"],
        kl_reason=record.get("kl_reason"),
        bound_gap=gap,
        bound_gap_se=error,
        bound_reason=reason,
        verdict=record["verdict"],
        seconds=round(sum(s for s in phases if s is not None), 2),
        whole=all(r["seconds"][phase] is not None for r in records for phase in ("fit", "rescore")),
        exact=_exact(run, record, recipe),
    )


def _bound_gap(
    records: list[dict], confidence: float
) -> tuple[float | None, float | None, str | None]:
    """How much higher any policy's objective that meets the constraints may be, with its standard
    error (dual prompts); or None and why."""
    record, best = records[-1], best_bound(records)
    if best is None or record["objective"] is None:
        return (
            None,
            None,
            record.get("certificate_reason") or record.get("kl_reason") or "none was computed",
        )
    if violated_on_dual(record, confidence):
        return (
            None,
            None,
            "the constraints are violated on the dual prompts, so the objective is compared with "
            "no bound",
        )
    return (
        best["dual_value"] - record["objective"],
        float(np.hypot(best["dual_value_se"], record["lagrangian_se"])),
        None,
    )


def _exact(run: RunDirectory, record: dict, recipe: Recipe) -> dict[str, object] | None:
    """Exact gains by objective and those of the optimal policy, KL, objective, P* and the share of
    the way to it, on the test prompts; None where there are none."""
    if not record.get("exact") or not run.exact_file.exists():
        return None
    optimum = json.loads(run.exact_file.read_text())
    here, best = (part.get("test") or part["all"] for part in (record["exact"], optimum))
    start, problem = best["reference"], recipe.problem
    share = None if is_fixed(recipe) else share_of_gap_closed(here, best)
    return {
        "changes": _exact_changes(here, start, problem),
        "best": _exact_changes(best["optimal"], start, problem),
        "kl": here["kl"],
        "objective": here["objective"],
        "optimum": best["objective"],
        "share": share if share is not None and np.isfinite(share) else None,
        "lambda_star": best["lambda"],
    }


def _exact_changes(values: dict, start: dict, problem: ConstrainedProblem) -> dict[str, float]:
    """Exact gains over π_ref by objective."""
    gains = {name: values["utilities"][name] - start["utilities"][name] for name in problem.names}
    return {problem.reward: values["reward"] - start["reward"]} | gains


def identity(run: RunDirectory) -> dict[str, object]:
    """What two runs must share for their numbers to mean the same: hashes of π_ref, of the sampling
    law, of the test prompts, and of every objective's scorer."""
    hashes, prompts = run.state()["hashes"], run.prompts()
    test = (
        prompts.loc[prompts["split"] == "test", ["prompt_id", "prompt"]]
        .sort_values("prompt_id")
        .to_numpy()
        .tolist()
    )
    content = hashlib.sha256(json.dumps(test).encode()).hexdigest()[:16]
    return {
        "policy": hashes["policy"],
        "law": hashes["law"],
        "test prompts": content,
        "scorers": hashes.get("scorers", {}),
    }


def why_not_comparable(one: dict[str, object], other: dict[str, object]) -> str | None:
    """In words what differs between two identities, or None where the runs may be compared (on the
    objectives they share)."""
    words = {
        "policy": "another reference policy",
        "law": "another sampling law",
        "test prompts": "other test prompts",
    }
    found = [
        f"{said} ({other[key]} against {one[key]})"
        for key, said in words.items()
        if one[key] != other[key]
    ]
    mine, theirs = one["scorers"], other["scorers"]
    shared = [name for name in mine if name in theirs]
    found += [
        f"another scorer of {name} ({theirs[name]} against {mine[name]})"
        for name in shared
        if mine[name] != theirs[name]
    ]
    if mine and theirs and not shared:
        found.append(f"no objective in common ({', '.join(theirs)} against {', '.join(mine)})")
    return ", ".join(found) or None


def read_groups(paths: list[Path], choice: str) -> tuple[list[Group], list[tuple[str, str]]]:
    """The runs in groups that may be compared, in the order given; and the runs left out (no such
    round), with the reason.

    Raises UserError where a path is no run, a run is given twice, or nothing is left to compare.
    """
    rows, left_out = [], []
    names = [path.resolve().name for path in paths]
    for path, name in zip(paths, names, strict=True):
        if sum(other.resolve() == path.resolve() for other in paths) > 1:
            raise UserError(f"{path}: is given twice; give every run once")
        RunDirectory(path).recipe()  # not a run: refused, not left out
        name = name if names.count(name) == 1 else str(path)
        try:
            rows.append(read_row(path, choice, name))
        except UserError as error:
            left_out.append((name, str(error)))
    if not rows:
        raise UserError(
            "\n".join(f"{name}: cannot be compared: {reason}" for name, reason in left_out)
        )
    parts: list[list[Row]] = []
    for row in rows:
        home = next(
            (
                part
                for part in parts
                if all(why_not_comparable(other.identity, row.identity) is None for other in part)
            ),
            None,
        )
        if home is None:
            parts.append([row])
        else:
            home.append(row)
    first = parts[0][0]
    apart = [None] + [
        "; ".join(
            dict.fromkeys(
                filter(None, (why_not_comparable(first.identity, row.identity) for row in part))
            )
        )
        for part in parts[1:]
    ]
    groups = [
        Group(part, method_labels([row.recipe for row in part]), why)
        for part, why in zip(parts, apart, strict=True)
    ]
    return groups, left_out


def group_values(group: Group) -> dict[str, object]:
    """JSON-ready: why it stands apart, its runs, and the means over seeds (NaN as null)."""
    runs = [
        {"method": label} | row.values()
        for row, label in zip(group.rows, group.labels, strict=True)
    ]
    means = points(group).astype(object)
    return {
        "apart": group.apart,
        "reward": group.reward,
        "utilities": group.utilities,
        "runs": runs,
        "points": means.where(means.notna(), None).to_dict("records"),
    }


def points(group: Group) -> pd.DataFrame:
    """One row per method and setting, seeds taken together; score units.

    Columns: method, setting, fixed (λ given beforehand), runs, alone (the one objective with a
    weight, or None), and by objective NAME of the group (NaN where not known): gain_NAME, low_NAME,
    high_NAME, demanded_NAME, exact_NAME and best_NAME, the exact gain of the optimal policy at
    these margins. Several runs: their mean with Student's t-interval over them, at the first run's
    confidence; one run: its own interval, clustered by prompt.
    """
    table = []
    for label in dict.fromkeys(group.labels):
        mine = [row for row, other in zip(group.rows, group.labels, strict=True) if other == label]
        for setting in dict.fromkeys(row.setting for row in mine):
            alike = [row for row in mine if row.setting == setting]
            recipe = alike[0].recipe
            alone = (
                recipe.problem.reward if is_fixed(recipe) and not is_weighted_sum(recipe) else None
            )
            point = {
                "method": label,
                "setting": setting,
                "fixed": is_fixed(recipe),
                "runs": len(alike),
                "alone": alone,
            }
            for name in [group.reward, *group.utilities]:
                values = zip(("gain", "low", "high"), _mean_interval(alike, name), strict=True)
                point |= {f"{key}_{name}": value for key, value in values}
                point[f"demanded_{name}"] = _mean(row.demanded.get(name) for row in alike)
                known = [row.exact or {} for row in alike]
                point[f"exact_{name}"] = _mean(
                    exact.get("changes", {}).get(name) for exact in known
                )
                point[f"best_{name}"] = _mean(
                    None if is_fixed(recipe) else exact.get("best", {}).get(name) for exact in known
                )
            table.append(point)
    return pd.DataFrame(table)


def _mean(values: Iterable[float | None]) -> float:
    """Mean of the values, NaN where one is missing."""
    values = list(values)
    return float("nan") if any(v is None for v in values) else float(np.mean(values))


def _mean_interval(rows: list[Row], name: str) -> tuple[float, float, float]:
    known = [row.changes.get(name) for row in rows]
    if any(change is None for change in known):
        return (float("nan"),) * 3
    if len(known) == 1:
        return known[0]["difference"], known[0]["ci_low"], known[0]["ci_high"]
    return seeds_interval(
        [change["difference"] for change in known], rows[0].recipe.dual.confidence
    )


def side_by_side(group: Group, count: int) -> list[dict[str, object]]:
    """The first draw of π_ref and of every run for the first `count` test prompts: prompt_id,
    prompt, and answers (who, response, scores, tokens, cut_off). π_ref's is that of the group's
    first run."""
    first = group.rows[0]
    prompts = first.run.prompts()
    prompts = prompts[prompts["split"] == "test"].head(count)
    tables = [("π_ref", first, first.run.reference_file)]
    tables += [(row.name, row, row.run.samples_file(row.number)) for row in group.rows]
    drawn: list[tuple[str, list[str], pd.DataFrame]] = []
    for who, row, file in tables:
        names = row.recipe.problem.objectives
        table = read_parquet(file, ["prompt_id", "response", "token_ids", "ended", *names])
        drawn.append(
            (
                who,
                names,
                table[table["prompt_id"].isin(prompts["prompt_id"])]
                .drop_duplicates("prompt_id")
                .set_index("prompt_id"),
            )
        )

    def answer(who: str, names: list[str], row: pd.Series) -> dict[str, object]:
        scores = {name: float(row[name]) for name in names}
        return {
            "who": who,
            "response": row["response"],
            "scores": scores,
            "tokens": len(row["token_ids"]),
            "cut_off": not row["ended"],
        }

    return [
        {
            "prompt_id": pid,
            "prompt": last_user_text(prompt, first.recipe.prompts.format),
            "answers": [answer(who, names, table.loc[pid]) for who, names, table in drawn],
        }
        for pid, prompt in zip(prompts["prompt_id"], prompts["prompt"], strict=True)
    ]
