"""`cdpo check`'s look at each scorer: which way it points, its options, its window, its published
value."""

import json
from typing import TYPE_CHECKING, Any

from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError
from data_prep.records import Record
from data_prep.scorers.cache import ScoreCache
from data_prep.scorers.options import ScorerOptions
from data_prep.scorers.protocol import Scorer, TokenScorer
from data_prep.scorers.scoring import score_texts
from data_prep.scorers.settings import ScorerSettings
from data_prep.settings import EMBEDDED

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


class CheckedScorer(Record):
    """A scorer as the check saw it.

    polite, rude: the scores of two canned answers, negated where the recipe says so, before an
    indicator or clip; direction: which is higher, in words; notes: what loading it has shown;
    options: in words.
    """

    type: str
    negate: bool
    notes: list[str]
    polite: float | None
    rude: float | None
    direction: str
    options: str
    quantization_drift: dict[str, Any] | None


class ScorerWindow(Record):
    """The longest prompt of a scorer, in its own tokens, beside its window."""

    longest_prompt: int
    window: int
    truncate: bool


def probe(recipe: Recipe) -> tuple[str, str, str]:
    """Give (prompt, polite answer, rude answer) in the words of the recipe's world."""
    return QUICKSTART_PROBE if recipe.policy.model == EMBEDDED else PROBE


def try_scorer(name: str, scorer: Scorer, recipe: Recipe, learner: "LoraLearner | None") -> None:
    """Score two answers to one of the user's own prompts.

    Raises UserError where the run's first shard would.
    """
    canned, polite, rude = probe(recipe)
    prompt = canned if learner is None else learner.told(scorer).iloc[0]
    _scores(name, scorer, [prompt] * 2, [polite, rude], negate=False)


def _scores(
    name: str, scorer: Scorer, prompts: list[str], answers: list[str], *, negate: bool
) -> list[float]:
    options = ScorerOptions.model_validate({"negate": negate})
    cache = ScoreCache(None)
    return list(score_texts(scorer, prompts, answers, options=options, name=name, cache=cache))


def checked_scorer(
    name: str, scorer: Scorer, settings: ScorerSettings, recipe: Recipe
) -> CheckedScorer:
    """Describe a scorer by two canned answers; never an error."""
    prompt, *answers = probe(recipe)
    polite, rude = None, None
    try:
        polite, rude = _scores(name, scorer, [prompt] * 2, answers, negate=settings.negate)
        direction = _direction(name, settings, polite, rude)
    except UserError as error:
        direction = f"the probe says nothing here: {error}"
    return CheckedScorer(
        type=settings.type,
        negate=settings.negate,
        notes=scorer.notes,
        polite=polite,
        rude=rude,
        direction=direction,
        options=settings.described(),
        quantization_drift=scorer.quantization_drift(),
    )


def _direction(name: str, settings: ScorerSettings, polite: float, rude: float) -> str:
    if polite == rude:
        return "the same for both answers"
    higher, other = ("polite", "rude") if polite > rude else ("rude", "polite")
    words = f"higher for the {higher} answer"
    if settings.type == "python":  # a function of one's own mostly judges something else
        return words
    switch = str(not settings.negate).lower()
    return f"{words}; if {name} should be higher for the {other} one, set negate: {switch}"


def scorer_windows(learner: "LoraLearner") -> tuple[dict[str, ScorerWindow], list[str]]:
    """Give the windows by objective, and an error for each scorer that must not truncate and would.

    A model scorer counts prompts in its own tokens and responses in the policy's.
    """
    new, kept = learner.recipe.sampling.max_new_tokens, learner.prompts["prompt_id"]
    windows, errors = {}, []
    for name, scorer in learner.scorers.items():
        if scorer.window is None:
            continue
        if isinstance(scorer, TokenScorer):
            longest, truncate = max(len(learner.prompt_tokens[pid]) for pid in kept), False
        else:
            told = learner.told(scorer)
            lengths = [scorer.text_length(told[pid], "") for pid in kept]
            longest = max(n for n in lengths if n is not None)
            truncate = scorer.truncates
        window = ScorerWindow(longest_prompt=longest, window=scorer.window, truncate=truncate)
        windows[name] = window
        if longest + new > scorer.window and not truncate:
            errors.append(
                f"scorer of {name}: the longest prompt has {longest} of its tokens, with "
                f"max_new_tokens {new} over its window of {scorer.window}; set truncate: true, "
                "lower sampling.max_new_tokens or shorten the prompts"
            )
    return windows, errors


def golden_lines(recipe: Recipe, scorers: dict[str, Scorer]) -> list[str]:
    """Give the published value of Beaver's reward model, beside ours where that model is here, else
    how to get ours; nothing for recipes without Beaver scorers."""
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
