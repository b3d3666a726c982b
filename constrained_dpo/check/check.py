"""`cdpo check`: everything about a recipe that can be found wrong without training, all at once;
and what the run will cost and resolve.

Nothing is downloaded: what is neither in a local folder nor in the hub's cache is listed as not
checked.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from constrained_dpo.estimates.sampling_law import (
    COMPARED_ROWS,
    NOT_THE_POLICY,
    compare_sampler,
    why_not_the_policy,
)
from constrained_dpo.learners.dataset_answers import answer_counts, tokenized_answers
from constrained_dpo.progress import Announce, silent
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.tracking import require_trackers
from data_prep.errors import ServerUnreachable, UserError
from data_prep.models.checkpoints import check_adapter_folder
from data_prep.models.policy import Policy, load_policy
from data_prep.prompts.rows import DatasetSource
from data_prep.prompts.split import read_prompts, split_prompts
from data_prep.scorers.cache import ScoreCache
from data_prep.scorers.implicit import AskedPolicy
from data_prep.scorers.scoring import Scorer, make_scorer, score_texts
from data_prep.scorers.settings import ScorerOptions, ScorerSettings
from data_prep.settings import EMBEDDED, derive_seed

if TYPE_CHECKING:
    from constrained_dpo.learners.lora import LoraLearner


# (prompt, polite and helpful answer, rude and harmful answer); the embedded world has words of
# its own.
PROBE = (
    "My neighbour's music is too loud at night. What can I do?",
    "I am sorry to hear that. Try talking to them calmly first: explain that you need to sleep "
    "and agree on a time. I hope it helps!",
    "Shut up, you idiot. Smash their windows and beat them until they stop, and do not come back "
    "to me.",
)


# bfloat16 keeps 8 bits of a score of 11, and kernels differ; another EOS or template moves it
# further
GOLDEN_TOLERANCE = 0.2


QUICKSTART_PROBE = ("clerk open safe", "please ask help", "smash kick steal")


_MODEL_KEYS = (("model", ""), ("reference", "reference_"))
"""Keys of a scorer that may name a hub model, and what its revision's key begins with."""


@contextmanager
def _collected(errors: list[str], unchecked: list[str] | None = None) -> Iterator[None]:
    """A user's mistake inside the block is added to the list, line by line, and the check goes on;
    a server that is not there is listed in `unchecked`."""
    try:
        yield
    except UserError as error:
        if unchecked is not None and isinstance(error, ServerUnreachable):
            unchecked.append(str(error))
            return
        errors += [line for line in str(error).splitlines() if line not in errors]


def check_recipe(
    recipe: Recipe,
    *,
    pilot: bool,
    target_se: dict[str, float],
    announce: Announce = silent,
    show_progress: bool = False,
) -> dict[str, object]:
    """What `cdpo check` found, JSON-ready: prompts, lengths, policy, scorers, the pilot's
    precision, seconds and peak, not_checked.

    target_se: wanted standard error of u by constraint (score units). Raises UserError with every
    mistake found, one per line.
    """
    from constrained_dpo.learners.lora import LoraLearner

    errors: list[str] = []
    unchecked: list[str] = []
    warnings: list[str] = []
    with _collected(errors):
        require_trackers(recipe.fit.report_to)
    for name, value in target_se.items():
        if name not in recipe.problem.names or not value > 0:
            errors.append(
                f"--target-se {name}={value:g}: name a constraint "
                f"({', '.join(recipe.problem.names) or 'there is none'}) and a value > 0"
            )
    prompts, left_out = _check_prompts(recipe, errors, unchecked)
    policy = _check_policy(recipe, errors, unchecked)
    scorers = _check_scorers(recipe, policy, errors, unchecked)
    report: dict[str, object] = {"name": recipe.name}
    with tempfile.TemporaryDirectory() as folder:
        # Texts scored by the pilot are neither kept nor looked up: the time they take is
        # measured.
        learner = None
        if prompts is not None and policy is not None:
            learner = LoraLearner(recipe, RunDirectory(Path(folder)), prompts, show_progress)
            learner.policy, learner.scorers, learner.cache = policy, scorers, ScoreCache(None)
            with _collected(errors):
                left_out |= learner.restrict(recipe.fit.max_length)
            report["lengths"] = _lengths(learner, errors)
            if recipe.pool.source != "reference":
                with _collected(errors):
                    answers, table = tokenized_answers(learner, label=recipe.fit.label_column)
                    num_prompts = int((learner.prompts["split"] != "test").sum())
                    report["dataset"] = answer_counts(table, num_prompts, answers.left_out)
            if (
                recipe.prompts.format == "text"
                and recipe.prompts.template == "{prompt}"
                and policy.tokenizer.chat_template
            ):
                warnings.append(
                    "prompts.format is text with a bare template, but the tokenizer has a chat "
                    "template: a chat model wants format: chat"
                )
        for name, scorer in list(scorers.items()):
            before = len(unchecked)
            with _collected(errors, unchecked):
                _try_scorer(name, scorer, recipe, learner)
            if len(unchecked) > before:
                del scorers[name]  # its server is not there
        sampled = recipe.sampling.server is None
        if learner is not None and not sampled:
            with _collected(errors, unchecked):
                report["sampler"] = _try_server(learner, warnings)
                sampled = True
        if errors:
            raise UserError("\n".join(errors))
        if prompts is not None:
            kept = prompts if learner is None else learner.prompts
            report["prompts"] = {split: int(n) for split, n in kept["split"].value_counts().items()}
            report["left_out"] = left_out
        if policy is not None:
            report["policy"] = {
                "model": recipe.policy.model,
                "quantization": recipe.policy.quantization,
                "fingerprint": policy.fingerprint,
                "overridden_generation": policy.overridden,
            }
        report["scorers"] = {
            name: _describe_scorer(name, scorer, recipe.scorers[name], recipe)
            for name, scorer in scorers.items()
        }
        report["golden"] = _golden_lines(recipe, scorers)
        complete = learner is not None and len(scorers) == len(recipe.scorers) and sampled
        if complete and pilot:
            from constrained_dpo.check.pilot import run_pilot

            given = report["dataset"]["responses"] if "dataset" in report else 0
            report["pilot"] = run_pilot(learner, target_se, announce, given)
            report["pilot"]["peak_gib"] = measured_peak()
            warnings += report["pilot"].pop("warnings")
    report["warnings"], report["not_checked"] = warnings, unchecked
    return report


def measured_peak() -> float:
    """GiB: the peak of this process so far, of tensors on the GPU where there is one, else of
    resident memory with the libraries."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _check_prompts(
    recipe: Recipe, errors: list[str], unchecked: list[str]
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
                unchecked.append(f"prompts.{key}: dataset {source.dataset} needs a download")
            else:
                errors += [line for line in str(error).splitlines() if line not in errors]
    if not broken:
        with _collected(errors):
            return split_prompts(settings, recipe.dual.prompts_per_round)
    return None, {}


def needs_download(model: str, revision: str | None) -> bool:
    """True for what is neither a local path nor, with its weights, in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if model == EMBEDDED or model.startswith((".", "/", "~")) or Path(model).exists():
        return False

    def cached(name: str) -> bool:
        return isinstance(try_to_load_from_cache(model, name, revision=revision), str)

    try:
        weights = (
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        )
        return not (cached("config.json") and any(cached(name) for name in weights))
    except HFValidationError:
        return False  # no hub id either: loading it says what is wrong


def _download_line(key: str, model: str) -> str:
    return (
        f"{key}: {model} needs a download (no such folder here; `hf download {model}` fetches it)"
    )


def _not_here(path: str) -> str:
    return "" if Path(path).exists() else " (no such folder here yet)"


def _check_policy(recipe: Recipe, errors: list[str], unchecked: list[str]) -> Policy | None:
    settings = recipe.policy
    if needs_download(settings.model, settings.revision):
        unchecked.append(_download_line("policy.model", settings.model))
        if (adapter := settings.reference_adapter) is not None:
            if Path(adapter).exists():
                with _collected(errors):
                    check_adapter_folder(Path(adapter), "policy.reference_adapter")
            unchecked.append(
                f"policy.reference_adapter: whether {adapter} fits the base is seen with the base"
                + _not_here(adapter)
            )
        return None
    with _collected(errors):
        return load_policy(settings)
    return None


def _check_scorers(
    recipe: Recipe, policy: Policy | None, errors: list[str], unchecked: list[str]
) -> dict[str, Scorer]:
    scorers: dict[str, Scorer] = {}
    asked = (
        None
        if policy is None
        else AskedPolicy(lambda: policy, recipe.prompts, recipe.sampling.max_new_tokens)
    )
    for name, settings in recipe.scorers.items():
        served = settings.type == "http"
        models = (
            []
            if served
            else [
                (getattr(settings, key, None), getattr(settings, f"{p}revision", None))
                for key, p in _MODEL_KEYS
            ]
        )
        absent = [
            model
            for model, revision in models
            if model is not None and needs_download(model, revision)
        ]
        unchecked += [_download_line(f"scorer of {name}", model) for model in absent]
        if settings.type == "implicit" and asked is None:
            unchecked.append(f"scorer of {name}: it asks the policy, which could not be loaded")
        elif not absent:
            with _collected(errors, unchecked):
                scorers[name] = make_scorer(settings, asked)
    return scorers


def _lengths(learner, errors: list[str]) -> dict[str, object]:
    """Longest prompt + max_new_tokens beside every window, in tokens; a model scorer counts prompts
    in its own tokens and responses in the policy's. What does not fit a scorer that must not
    truncate is an error."""
    recipe, new = learner.recipe, learner.recipe.sampling.max_new_tokens
    kept = learner.prompts["prompt_id"]
    longest = max(len(learner.prompt_tokens[pid]) for pid in kept)
    windows = {}
    for name, scorer in learner.scorers.items():
        if hasattr(scorer, "score_tokens") and scorer.max_length is not None:
            prompt, truncate = longest, False
        elif hasattr(scorer, "text_length"):
            prompt, truncate = (
                max(scorer.text_length(learner.prompt_texts[pid], "") for pid in kept),
                recipe.scorers[name].truncate,
            )
        else:
            continue
        windows[name] = {
            "longest_prompt": prompt,
            "window": scorer.max_length,
            "truncate": truncate,
        }
        if prompt + new > scorer.max_length and not truncate:
            errors.append(
                f"scorer of {name}: the longest prompt has {prompt} of its tokens, with "
                f"max_new_tokens {new} over its window of "
                f"{scorer.max_length}; set truncate: true, lower sampling.max_new_tokens or "
                "shorten the prompts"
            )
    return {
        "longest_prompt": longest,
        "max_new_tokens": new,
        "max_length": recipe.fit.max_length,
        "policy_window": learner.policy.window,
        "scorers": windows,
        "example": learner.policy.tokenizer.decode(learner.prompt_tokens[kept.iloc[0]]),
    }


def _try_scorer(name: str, scorer: Scorer, recipe: Recipe, learner: "LoraLearner | None") -> None:
    """Scores two answers to one of the user's own prompts; raises UserError where the run's first
    shard would."""
    canned, polite, rude = _probe(recipe)
    prompt = canned if learner is None else learner.prompt_texts.iloc[0]
    score_texts(
        scorer,
        [prompt] * 2,
        [polite, rude],
        options=ScorerOptions(),
        name=name,
        cache=ScoreCache(None),
    )


def _try_server(learner: "LoraLearner", warnings: list[str]) -> dict[str, object]:
    """The sampling server's fingerprint, and its log-probabilities beside ours on COMPARED_ROWS
    responses of π_ref; a law that takes the certificate is a warning. Raises UserError where the
    server refuses a request."""
    prompts = learner.prompts.head(8)
    drawn = learner.sample(
        prompts,
        responses_per_prompt=-(-COMPARED_ROWS // len(prompts)),
        adapter=None,
        source="check",
        seed=derive_seed(learner.recipe.seed, 0, "check"),
    )
    reason = why_not_the_policy(learner.recipe.sampling, drawn)
    if reason not in (None, NOT_THE_POLICY):
        warnings.append(f"no certificate, KL and objective: {reason}")
    return {"fingerprint": learner.server.fingerprint()} | compare_sampler(drawn)


def _probe(recipe: Recipe) -> tuple[str, str, str]:
    return QUICKSTART_PROBE if recipe.policy.model == EMBEDDED else PROBE


def _describe_scorer(
    name: str, scorer: Scorer, settings: ScorerSettings, recipe: Recipe
) -> dict[str, object]:
    """`_direction`, the options in words and, where the scorer is quantized, how far that moves its
    scores."""
    drift = scorer.quantization_drift() if hasattr(scorer, "quantization_drift") else None
    found = _direction(name, scorer, settings, recipe) | {"options": settings.described()}
    return found if drift is None else found | {"quantization_drift": drift}


def _golden_lines(recipe: Recipe, scorers: dict[str, Scorer]) -> list[str]:
    """For recipes with Beaver scorers: the reward model's published value, beside ours where that
    model is here, else how to get ours."""
    if not any(settings.type == "beaver" for settings in recipe.scorers.values()):
        return []
    from data_prep.scorers.beaver import GOLDEN_MODEL, GOLDEN_SCORE, GOLDEN_TEXT

    lines = []
    for name, scorer in scorers.items():
        if recipe.scorers[name].type == "beaver" and (ours := scorer.golden_score()) is not None:
            near = (
                "agrees"
                if abs(ours - GOLDEN_SCORE) < GOLDEN_TOLERANCE
                else "DIFFERS: other weights, or other libraries than ours"
            )
            lines.append(
                f"scorer of {name}: the model card's text scores {ours:.4f}, published "
                f"{GOLDEN_SCORE} in bfloat16: {near}"
            )
    row = json.dumps(dict(zip(("prompt", "response"), GOLDEN_TEXT, strict=True)))
    return lines or [
        f"Beaver's published value, {GOLDEN_SCORE}, is not checked ({GOLDEN_MODEL} is not a "
        "scorer here); with its weights: "
        f"echo '{row}' > golden.jsonl; cdpo data score golden.jsonl --name score -o golden.parquet "
        f"--scorer '{{type: beaver, model: {GOLDEN_MODEL}, append_eos: false}}'"
    ]


def _direction(
    name: str, scorer: Scorer, settings: ScorerSettings, recipe: Recipe
) -> dict[str, object]:
    """Scores of the two canned answers, negated where the recipe says so, before an indicator or
    clip; and which is higher. Never an error."""
    prompt, polite, rude = _probe(recipe)
    found: dict[str, object] = {
        "type": settings.type,
        "negate": settings.negate,
        "notes": getattr(scorer, "notes", []),
    }
    try:
        signed = ScorerOptions(negate=settings.negate)
        scores = score_texts(
            scorer, [prompt] * 2, [polite, rude], options=signed, name=name, cache=ScoreCache(None)
        )
    except UserError as error:
        return found | {
            "polite": None,
            "rude": None,
            "direction": f"the probe says nothing here: {error}",
        }
    words = "the same for both answers"
    if scores[0] != scores[1]:
        higher, other = ("polite", "rude") if scores[0] > scores[1] else ("rude", "polite")
        switch = str(not settings.negate).lower()
        words = f"higher for the {higher} answer"
        if settings.type != "python":  # a function of one's own mostly judges something else
            words += f"; if {name} should be higher for the {other} one, set negate: {switch}"
    return found | {"polite": float(scores[0]), "rude": float(scores[1]), "direction": words}
