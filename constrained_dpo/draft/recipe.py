"""The recipe itself: what was seen becomes keys, each with the reason for its value.

What the schema's defaults already say is left out.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from constrained_dpo.draft.lines import Line, shown
from constrained_dpo.draft.models import ModelFacts
from constrained_dpo.draft.prompts import PromptFacts
from constrained_dpo.draft.specs import MANY_PARAMETERS, NamedScorer
from constrained_dpo.draft.trial import ScoreFacts, Trial
from constrained_dpo.progress import duration
from constrained_dpo.recipe.fit import FitSettings
from constrained_dpo.recipe.objective import STD
from data_prep.errors import UserError
from data_prep.sampling.law import SamplingSettings

MAX_LENGTH = FitSettings().max_length
MAX_NEW_TOKENS = SamplingSettings().max_new_tokens
NEW_TOKENS_ON_CPU = 64

TEST_PROMPTS, DEFAULT_SHARE, LARGEST_SHARE = 100, 0.2, 0.4
"""What a verdict asks for; the schema's share of the prompts, and the most that it takes."""

MANY_PROMPTS, FIT_PROMPTS = 8000, 6000

BETA_SHARE, UNSEEN_BETA = 0.25, 0.1
"""β in std of the reward within a prompt, as on the worlds of docs/benchmarks.md; and where no
answer was seen."""

MARGINS = (0.5, 0.25, 0.1)
"""In std, the largest first."""

RESPONSES_OF_A_RUN = 150_000
"""About what the defaults of four rounds draw."""

PATIENCE = 2 * 3600.0
"""Seconds of drawing from which a first run is made smaller."""

MIN_NEW_TOKENS = 8


@dataclass(frozen=True)
class Seen:
    """All that was given and looked at. margins: as given, by constraint; trial: None where the
    models do not load in seconds."""

    name: str
    model: ModelFacts
    source: str
    prompts: PromptFacts
    reward: NamedScorer
    constraints: Mapping[str, NamedScorer]
    margins: Mapping[str, str]
    trial: Trial | None


def recipe_lines(seen: Seen) -> list[Line]:
    """Write the recipe."""
    new_tokens, why_new = new_tokens_of(seen)
    return [
        Line(0, "# Written by `cdpo new`: what it leaves open has the best settings known."),
        Line(0, f"name: {shown(seen.name)}"),
        *_policy_lines(seen.model),
        *_prompt_lines(seen, new_tokens),
        *_sampling_lines(seen, new_tokens, why_new),
        *_objective_lines(seen),
        *_size_lines(seen, new_tokens),
    ]


def _policy_lines(model: ModelFacts) -> list[Line]:
    size = f"{_millions(model.parameters)} parameters"
    lines = [Line(0, "policy:"), Line(1, f"model: {shown(model.source)}", size)]
    if model.published is not None:
        plain = "; it is turned back into plain weights" if model.published == "none" else ""
        why = f"its publisher quantized it{plain}"
        return [*lines, Line(1, f"quantization: {model.published}", why)]
    if model.gpu_bytes:
        small = 2 * model.parameters <= model.gpu_bytes / 5
        why = "its 16 bits take less than a fifth of the GPU's memory"
        return [*lines, Line(1, "quantization: none", why)] if small else lines
    lines.append(Line(1, "quantization: none", "no GPU here, and nf4 is slow without one"))
    if model.parameters < MANY_PARAMETERS:
        lines.append(Line(1, "dtype: float32", "small enough for exact log-probabilities"))
    return lines


def _prompt_lines(seen: Seen, new_tokens: int) -> list[Line]:
    prompts = seen.prompts
    again = f", {prompts.duplicates} more are duplicates" if prompts.duplicates else ""
    why = f"{prompts.count} prompts in `{prompts.column}`{again}"
    lines = [Line(0, "prompts:"), Line(1, f"source: {shown(seen.source)}", why)]
    if prompts.format == "chat":
        lines.append(Line(1, "format: chat", "the tokenizer has a chat template"))
    else:
        why = "# no chat template: the model reads a prompt as it is; see prompts.template"
        lines.append(Line(1, why))
    share, why = test_share(prompts.count)
    if why:
        lines.append(Line(1, f"test: {share:g}", why))
    if small_run(seen):
        lines.append(Line(1, "max_fit: 40", "a first run in minutes; take more once it looks well"))
        if share * prompts.count > TEST_PROMPTS:
            lines.append(Line(1, f"max_test: {TEST_PROMPTS}", "see max_fit"))
    elif prompts.count > MANY_PROMPTS:
        lines.append(Line(1, f"max_fit: {FIT_PROMPTS}", "bounds the time of sampling"))
    room = _longest_text(seen, new_tokens) - new_tokens
    if prompts.longest > room:
        over = int((prompts.lengths > room).sum())
        why = f"{over} prompts have more than {room} tokens"
        lines.append(Line(1, "too_long: drop", why))
    return lines


def test_share(count: int) -> tuple[float, str]:
    """The share of test prompts, and why it is not the default; empty where it is."""
    most = 10 * TEST_PROMPTS
    wanted = min(max(count * DEFAULT_SHARE, TEST_PROMPTS), most)
    share = min(LARGEST_SHARE, float(f"{wanted / count:.2g}"))
    if share == DEFAULT_SHARE:
        return share, ""
    about = round(share * count)
    if share < DEFAULT_SHARE:
        return share, f"about {about} decide a verdict; the others are fitted on"
    enough = "" if share < LARGEST_SHARE else "; more prompts would make the verdict sharper"
    return share, f"about {about} test prompts{enough}"


def new_tokens_of(seen: Seen) -> tuple[int, str]:
    """max_new_tokens, and why; the reason is empty for the default.

    Raises UserError where the prompts leave no room for an answer.
    """
    window, trial = seen.model.window, seen.trial
    count = MAX_NEW_TOKENS if seen.model.gpu_bytes else NEW_TOKENS_ON_CPU
    why = "" if seen.model.gpu_bytes else "no GPU here: longer answers take longer"
    if trial is not None and trial.cut_off:
        share = f"{trial.cut_off} of {trial.answers} answers went on after that"
        why = f"{why}; {share}" if why else share
    elif trial is not None:
        needed = -(-2 * trial.longest // 16) * 16
        if needed < count:
            count, why = needed, f"the longest of {trial.answers} answers had {trial.longest}"
    if window is not None and window - seen.prompts.usual < count:
        count = window - seen.prompts.usual
        why = f"the model's window of {window} tokens, less a prompt's {seen.prompts.usual}"
    if count < MIN_NEW_TOKENS:
        raise UserError(
            f"--prompts: {seen.source}: prompts of {seen.prompts.usual} tokens leave the model's "
            f"window of {window} no room for an answer; give shorter prompts, or another model"
        )
    return count, why


def _sampling_lines(seen: Seen, new_tokens: int, why: str) -> list[Line]:
    lines = []
    if new_tokens != MAX_NEW_TOKENS or why:
        lines.append(Line(1, f"max_new_tokens: {new_tokens}", why))
    if seen.model.parameters < MANY_PARAMETERS:
        lines.append(Line(1, "batch_size: 128", "sequences at once; the model is small"))
    if small_run(seen):
        lines.append(Line(1, "responses_per_prompt: 8", "see max_fit"))
    return [Line(0, "sampling:"), *lines] if lines else []


def _objective_lines(seen: Seen) -> list[Line]:
    trial, reward = seen.trial, seen.reward
    beta, why = _beta(None if trial is None else trial.scores[reward.name])
    lines = [Line(0, "objective:"), Line(1, f"beta: {shown(beta)}", why), Line(1, "reward:")]
    lines += [Line(2, f"name: {reward.name}"), *_scorer_lines(seen, reward, 2)]
    lines.append(Line(1, "constraints:"))
    for name, scorer in seen.constraints.items():
        margin, why = _margin(seen, name)
        lines += [Line(2, f"- name: {name}"), Line(3, f"margin: {margin}", why)]
        lines += _scorer_lines(seen, scorer, 3)
    return lines


def _scorer_lines(seen: Seen, scorer: NamedScorer, depth: int) -> list[Line]:
    facts = None if seen.trial is None else seen.trial.scores[scorer.name]
    why = "not tried: its model is large; see what `cdpo check` says"
    if facts is not None:
        why = (
            f"{seen.trial.answers if seen.trial else 0} answers score {facts.low:.3g} to "
            f"{facts.high:.3g}, std {facts.std:.2g}"
        )
    elif not scorer.settings.models:
        why = "tried on two canned answers"
    lines = [Line(depth, "scorer:", why)]
    for key, value in scorer.block.items():
        lines.append(Line(depth + 1, f"{key}: {shown(value)}", scorer.why.get(key, "")))
    return lines


def _beta(facts: ScoreFacts | None) -> tuple[float, str]:
    if facts is None or not facts.std_within > 0:
        return UNSEEN_BETA, "not measured; look at what `cdpo check` says of β beside the scores"
    beta = float(f"{BETA_SHARE * facts.std_within:.1g}")
    return beta, (
        f"a quarter of the reward's std within a prompt, {facts.std_within:.2g}; smaller goes "
        "further from today's model"
    )


def _margin(seen: Seen, name: str) -> tuple[str, str]:
    """The margin of a constraint as YAML, and why."""
    given = seen.margins.get(name)
    facts = None if seen.trial is None else seen.trial.scores[name]
    if given is not None:
        return given, "as you gave it; above today's mean" + (
            f", {facts.mean:.3g}" if facts else ""
        )
    if facts is None or not facts.std > 0:
        return f"{MARGINS[0]:g}{STD}", "half a std of today's scores: a start; choose your own"
    within = [m for m in MARGINS if m * facts.std <= facts.reach / 2] or [MARGINS[-1]]
    margin = within[0]
    return f"{margin:g}{STD}", (
        f"about {margin * facts.std:.2g} above today's {facts.mean:.3g}; the best of 4 answers is "
        f"{facts.reach:.2g} above it. Choose your own"
    )


def small_run(seen: Seen) -> bool:
    """Whether the defaults would take hours here."""
    slow = seen.trial is not None and seen.trial.seconds * RESPONSES_OF_A_RUN > PATIENCE
    return slow and not seen.model.gpu_bytes


def _longest_text(seen: Seen, new_tokens: int) -> int:
    """fit.max_length: tokens of a prompt and its response."""
    prompts, window = seen.prompts, seen.model.window
    needed = max(MAX_LENGTH, -(-(prompts.usual + new_tokens) // 64) * 64)
    return needed if window is None else min(needed, window)


def _size_lines(seen: Seen, new_tokens: int) -> list[Line]:
    """How much is drawn and fitted, where that is not left open."""
    dual, fit, longest = [], [], _longest_text(seen, new_tokens)
    if small_run(seen) and seen.trial is not None:
        taken = duration(seen.trial.seconds * RESPONSES_OF_A_RUN)
        why = f"the defaults would take about {taken} here (an answer: {seen.trial.seconds:.2g} s)"
        dual = [
            Line(1, "rounds: 2", why),
            Line(1, "responses_per_prompt: 8", "see rounds"),
            Line(1, "trials: 4", "see rounds"),
        ]
        fit = [
            Line(1, "refresh: 1", "the fit's sizes are those of recipes/smollm2.yaml"),
            Line(1, "steps: 60", "see refresh"),
            Line(1, "batch_size: 2", "see refresh"),
            Line(1, "gradient_accumulation: 1", "see refresh"),
        ]
    elif seen.model.parameters >= MANY_PARAMETERS:
        fit = [
            Line(1, "batch_size: 1", "one group of answers at a time: memory"),
            Line(1, "gradient_accumulation: 16", "as many rows a step as by default"),
            Line(1, "gradient_checkpointing: true", "memory, a third slower"),
        ]
    if longest > MAX_LENGTH:
        fit.append(Line(1, f"max_length: {longest}", "tokens of a prompt and its answer"))
    blocks = {"dual:": dual, "fit:": fit}
    return [line for key, inner in blocks.items() if inner for line in (Line(0, key), *inner)]


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def placed(path: str, folder: Path) -> str:
    """A path as the recipe's folder finds it: relative where it lies below, else absolute; what is
    no file, such as a hub id, stays as it is."""
    name, colon, function = path.rpartition(":") if ".py:" in path else (path, "", "")
    here = Path(name).expanduser()
    if not here.exists():
        return path
    whole, folder = Path(os.path.abspath(here)), Path(os.path.abspath(folder))
    inside = whole.relative_to(folder) if whole.is_relative_to(folder) else whole
    return f"{inside}{colon}{function}"
