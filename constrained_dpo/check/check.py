"""`cdpo check`: everything about a recipe that can be found wrong without training, all at once;
and what the run will cost and resolve.

Nothing is downloaded: what is neither in a local folder nor in the hub's cache is listed as not
checked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from constrained_dpo.check.downloads import download_line, needs_download, not_here
from constrained_dpo.check.limits import certificate_limits, verdict_limits
from constrained_dpo.check.pilot import Pilot, run_pilot
from constrained_dpo.check.scorers import (
    CheckedScorer,
    ScorerWindow,
    checked_scorer,
    golden_lines,
    scorer_windows,
    try_scorer,
)
from constrained_dpo.check.servers import try_servers
from constrained_dpo.estimates.score_scale import loss_by_scale
from constrained_dpo.learners.dataset_answers import answer_counts, tokenized_answers
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.categories import categorized
from constrained_dpo.recipe.defaults import choices, sized, split_counts
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.tracking import require_trackers
from data_prep.errors import ServerUnreachable, UserError
from data_prep.models.checkpoints import check_adapter_folder
from data_prep.models.policy import Policy, load_policy
from data_prep.prompts.rows import DatasetSource
from data_prep.prompts.split import read_prompts, split_prompts
from data_prep.prompts.templates import TEMPLATE_CLOCK, reads_clock
from data_prep.records import Record
from data_prep.scorers.implicit import PolicyHandle
from data_prep.scorers.protocol import Scorer
from data_prep.scorers.scoring import make_scorer


class Lengths(Record):
    """Lengths in tokens beside every window; example: a prompt as the policy reads it."""

    longest_prompt: int
    max_new_tokens: int
    max_length: int
    policy_window: int | None
    scorers: dict[str, ScorerWindow]
    example: str


class CheckReport(Record):
    """What a check has seen of a recipe. What could not be checked is None, and listed in
    `not_checked`.

    name: the recipe's; prompts: by split; left_out: prompts by reason; dataset: its responses in
    the pool; lengths: in tokens, beside the windows; policy: its facts; scorers: by objective;
    sampler: the servers' identity and their log-probabilities beside ours; golden: a published
    score beside ours, in words; choices: what the recipe leaves to the toolkit, in words; pilot:
    times, memory and precision of a small trial; warnings: in words.
    """

    name: str
    prompts: dict[str, int] | None
    left_out: dict[str, int]
    dataset: dict[str, Any] | None
    lengths: Lengths | None
    policy: dict[str, Any] | None
    scorers: dict[str, CheckedScorer]
    sampler: dict[str, Any] | None
    golden: list[str]
    choices: list[str]
    pilot: Pilot | None
    warnings: list[str]
    not_checked: list[str]


@dataclass
class _Findings:
    """What goes into the report besides facts: mistakes, warnings, what is not here."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @contextmanager
    def collected(self, servers: bool = False) -> Iterator[None]:
        """A user's mistake inside the block is added to the errors, line by line, and the check
        goes on; with `servers` one that is not there is unchecked."""
        try:
            yield
        except UserError as error:
            if servers and isinstance(error, ServerUnreachable):
                self.unchecked.append(str(error))
                return
            self.errors += [line for line in str(error).splitlines() if line not in self.errors]


def check_recipe(recipe: Recipe, *, pilot: bool, target_se: dict[str, float]) -> CheckReport:
    """Check a recipe without training.

    pilot: sample, score and fit a little, for the precision of u, the time and the memory of a run;
    target_se: standard error of u to aim at, by constraint (score units). Raises UserError with
    every mistake, one per line.
    """
    findings = _Findings()
    with findings.collected():
        require_trackers(recipe.fit.report_to)
    for name, value in target_se.items():
        if name not in recipe.problem.names or not value > 0:
            findings.errors.append(
                f"--target-se {name}={value:g}: name a constraint "
                f"({', '.join(recipe.problem.names) or 'there is none'}) and a value > 0"
            )
    prompts, left_out = _check_prompts(recipe, findings)
    as_written = recipe
    if prompts is not None:
        recipe = sized(recipe, split_counts(prompts))
        with findings.collected():
            recipe = categorized(recipe, prompts)
    policy = _check_policy(recipe, findings)
    scorers = _check_scorers(recipe, policy, findings)
    learner, lengths, dataset, sampler = None, None, None, None
    if prompts is not None and policy is not None:
        # Scores are neither kept nor looked up: the time they take is measured.
        learner = LoraLearner(recipe, prompts)
        learner.policy, learner.scorers = policy, scorers
        with findings.collected():
            left_out |= learner.restrict(recipe.fit.max_length)
        lengths = _lengths(learner, findings)
        dataset = _check_dataset(learner, findings)
        _check_template(learner, findings)
    for name, scorer in list(scorers.items()):
        before = len(findings.unchecked)
        with findings.collected(servers=True):
            try_scorer(name, scorer, recipe, learner)
        if len(findings.unchecked) > before:
            del scorers[name]  # its server is not there
    if learner is not None and learner.servers is not None:
        with findings.collected(servers=True):
            sampler, warnings = try_servers(learner)
            findings.warnings += warnings
    if findings.errors:
        raise UserError("\n".join(findings.errors))
    findings.warnings += certificate_limits(recipe)
    if prompts is not None and not recipe.problem.unresolved:
        tested = prompts if learner is None else learner.prompts
        findings.warnings += verdict_limits(recipe, recipe.problem, tested)
    pilot_report = None
    complete = len(scorers) == len(recipe.scorers)
    if learner is not None and complete and not (learner.servers and sampler is None) and pilot:
        given = 0 if dataset is None else dataset["responses"]
        pilot_report, warnings = run_pilot(learner, target_se, given)
        findings.warnings += warnings
    kept = prompts if learner is None else learner.prompts
    return CheckReport(
        name=recipe.name,
        prompts=None if kept is None else kept["split"].value_counts().to_dict(),
        left_out=left_out,
        dataset=dataset,
        lengths=lengths,
        policy=None if policy is None else _describe_policy(recipe, policy),
        scorers={n: checked_scorer(n, s, recipe.scorers[n], recipe) for n, s in scorers.items()},
        sampler=sampler,
        golden=golden_lines(recipe, scorers),
        choices=[] if prompts is None else choices(recipe, as_written, _loss(recipe, pilot_report)),
        pilot=pilot_report,
        warnings=findings.warnings,
        not_checked=findings.unchecked,
    )


def _loss(recipe: Recipe, pilot: Pilot | None) -> str | None:
    """What `fit.loss: auto` comes to by the pilot's scores."""
    return None if pilot is None else loss_by_scale(recipe.fit.grouped, pilot.scale)


def _describe_policy(recipe: Recipe, policy: Policy) -> dict[str, Any]:
    return {
        "model": recipe.policy.model,
        "quantization": recipe.policy.quantization,
        "fingerprint": policy.fingerprint,
        "overridden_generation": policy.overridden,
    }


def _check_prompts(
    recipe: Recipe, findings: _Findings
) -> tuple[pd.DataFrame | None, dict[str, int]]:
    """The prompts with their split and the counts left out; None where a source is broken or not
    here."""
    settings, broken = recipe.prompts, False
    for key, source in (("source", settings.source), ("test", settings.test)):
        if isinstance(source, float):
            continue
        try:
            read_prompts(source, settings.format)
        except UserError as error:
            broken = True
            # The hub's library raises OSError kinds for what it cannot reach, ValueError for
            # what it has and cannot use.
            if isinstance(source, DatasetSource) and isinstance(error.__cause__, OSError):
                findings.unchecked.append(
                    f"prompts.{key}: dataset {source.dataset} needs a download"
                )
            else:
                with findings.collected():
                    raise
    if not broken:
        with findings.collected():
            return split_prompts(settings, recipe.dual.prompts_per_round, recipe.category_columns)
    return None, {}


def _check_policy(recipe: Recipe, findings: _Findings) -> Policy | None:
    settings = recipe.policy
    if needs_download(settings.model, settings.revision):
        findings.unchecked.append(download_line("policy.model", settings.model))
        if (adapter := settings.reference_adapter) is not None:
            if Path(adapter).exists():
                with findings.collected():
                    check_adapter_folder(Path(adapter), "policy.reference_adapter")
            findings.unchecked.append(
                f"policy.reference_adapter: whether {adapter} fits the base is seen with the base"
                + not_here(adapter)
            )
        return None
    with findings.collected():
        return load_policy(settings)
    return None


def _check_scorers(recipe: Recipe, policy: Policy | None, findings: _Findings) -> dict[str, Scorer]:
    """The scorers that are here, loaded."""
    scorers: dict[str, Scorer] = {}
    handle = None
    if policy is not None:
        handle = PolicyHandle(lambda: policy, recipe.prompts, recipe.sampling.max_new_tokens)
    for name, settings in recipe.scorers.items():
        absent = [model for model, revision in settings.models if needs_download(model, revision)]
        findings.unchecked += [download_line(f"scorer of {name}", model) for model in absent]
        if settings.type == "implicit" and handle is None:
            findings.unchecked.append(
                f"scorer of {name}: it asks the policy, which could not be loaded"
            )
        elif not absent:
            with findings.collected(servers=True):
                scorers[name] = make_scorer(settings, handle)
    return scorers


def _check_dataset(learner: LoraLearner, findings: _Findings) -> dict[str, Any] | None:
    """Counts of the dataset's responses in the pool, where it takes them."""
    recipe = learner.recipe
    if recipe.pool.source == "reference":
        return None
    with findings.collected():
        answers, table = tokenized_answers(learner, label=recipe.fit.label_column)
        num_prompts = int((learner.prompts["split"] != "test").sum())
        return answer_counts(table, num_prompts, answers.left_out)
    return None


def _check_template(learner: LoraLearner, findings: _Findings) -> None:
    prompts = learner.recipe.prompts
    bare = prompts.format == "text" and prompts.template == "{prompt}"
    if bare and learner.policy.tokenizer.chat_template:
        findings.warnings.append(
            "prompts.format is text with a bare template, but the tokenizer has a chat template: a "
            "chat model wants format: chat"
        )
    if prompts.format == "chat" and reads_clock(learner.policy.tokenizer):
        findings.warnings.append(
            f"the policy's chat template writes the date; it is {TEMPLATE_CLOCK:%d %b %Y} on every "
            "day, so that prompts stay the same"
        )


def _lengths(learner: LoraLearner, findings: _Findings) -> Lengths:
    recipe, kept = learner.recipe, learner.prompts["prompt_id"]
    windows, errors = scorer_windows(learner)
    findings.errors += errors
    return Lengths(
        longest_prompt=max(len(learner.prompt_tokens[pid]) for pid in kept),
        max_new_tokens=recipe.sampling.max_new_tokens,
        max_length=recipe.fit.max_length,
        policy_window=learner.policy.window,
        scorers=windows,
        example=learner.policy.tokenizer.decode(learner.prompt_tokens[kept.iloc[0]]),
    )
