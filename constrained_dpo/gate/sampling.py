"""The responses of a gate: who samples and scores which set of prompts, and the tables that grow
from look to look."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from constrained_dpo.estimates.draws import draw_rule
from constrained_dpo.estimates.sampling_law import NOT_THE_POLICY, why_not_the_policy
from constrained_dpo.evaluation.fresh import stored_reference
from constrained_dpo.gate.build import REFUSAL
from constrained_dpo.gate.claims import TEST
from constrained_dpo.gate.prompts import PromptSet
from constrained_dpo.gate.refusals import refuses
from constrained_dpo.gate.settings import GateSettings
from constrained_dpo.learners.collect import Collection, collect
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.prepare import require_same_inputs
from data_prep.errors import UserError
from data_prep.readers.tables import read_parquet, write_parquet
from data_prep.scorers.scoring import make_scorer
from data_prep.scorers.settings import ScorerSettings

log = logging.getLogger(__name__)

SIDES = ("samples", "reference")


def set_scorers(settings: GateSettings, prompts: str) -> dict[str, ScorerSettings]:
    """Give the scorers beside the recipe's that a set of prompts needs, by column."""
    checks = settings.checks
    if prompts == "refusal":
        rule = checks.refusal.scorer if checks.refusal is not None else None
        return {} if rule is None else {REFUSAL: rule}
    return {
        check.name: check.scorer
        for check in checks.second_opinion
        if (TEST if check.prompts is None else check.name) == prompts
    }


def open_learners(
    run: RunDirectory, recipe: Recipe, settings: GateSettings, sets: Mapping[str, PromptSet]
) -> tuple[dict[str, LoraLearner], dict[str, int]]:
    """Load one policy and the scorers: a learner for every set, and the prompts left out by reason.

    The run must be held. Raises UserError where policy, scorers, sampling law or prompts are not
    those the run was prepared with, and for a second opinion that training has seen.
    """
    gates = LoraLearner(recipe, sets[TEST].table, run.score_cache, set_scorers(settings, TEST))
    require_same_inputs(run, gates)
    learners = {TEST: gates}
    for name in sets:
        if name != TEST:
            extra = set_scorers(settings, name)
            learner = LoraLearner(recipe, sets[name].table, run.score_cache, extra)
            learner.policy = gates.policy
            learner.scorers = {n: make_scorer(s, learner.handle) for n, s in extra.items()}
            learners[name] = learner
    _require_unseen_scorers(recipe, learners)
    left_out = {"duplicates": sum(s.duplicates for s in sets.values()), "too_long": 0}
    for learner in learners.values():
        left_out["too_long"] += learner.restrict(recipe.fit.max_length)["too_long"]
    return learners, left_out


def _require_unseen_scorers(recipe: Recipe, learners: Mapping[str, LoraLearner]) -> None:
    trained = {learners[TEST].scorers[name].fingerprint: name for name in recipe.scorers}
    for learner in learners.values():
        for name, scorer in learner.scorers.items():
            if name not in recipe.scorers and scorer.fingerprint in trained:
                raise UserError(
                    f"checks: the scorer of {name.removeprefix('gate_')} is the run's own of "
                    f"{trained[scorer.fingerprint]}; give one that training never saw"
                )


@dataclass(frozen=True)
class Sampling:
    """What a gate's responses are drawn with.

    key: of the gate; adapter: of the policy; seeds of draws depend on the recipe, the gate's seed,
    the set, the side and the look alone.
    """

    run: RunDirectory
    recipe: Recipe
    settings: GateSettings
    key: str
    adapter: Path
    learners: Mapping[str, LoraLearner]

    @property
    def responses(self) -> int:
        return self.settings.responses or self.recipe.dual.responses_per_prompt

    def tables(self, prompts: str, size: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Give both policies' scored responses to the first `size` prompts of a set (all where it
        has fewer), drawn now where they are missing.

        Killed at any moment, the same call goes on. Raises UserError where a server's law is not
        the run's.
        """
        learner = self.learners[prompts]
        chosen = learner.prompts.head(size)
        samples, reference = (self._side(prompts, side, chosen, size) for side in SIDES)
        reason = why_not_the_policy(self.recipe.sampling, samples)
        if reason not in (None, NOT_THE_POLICY):
            raise UserError(f"{self.run.path}: the gate's responses are not the policy's: {reason}")
        return samples, reference

    def _side(self, prompts: str, side: str, chosen: pd.DataFrame, size: int) -> pd.DataFrame:
        file = self.run.gate_folder(self.key) / f"{prompts}-{side}.parquet"
        stored = read_parquet(file) if file.exists() else None
        there = set() if stored is None else set(stored["prompt_id"])
        missing = chosen[~chosen["prompt_id"].isin(there)].reset_index(drop=True)
        if len(missing):
            phase = f"{self.key}-{prompts}-{side}-{size}"
            fresh = self._drawn(prompts, side, missing, phase)
            parts = [fresh] if stored is None else [stored, fresh]
            stored = pd.concat(parts, ignore_index=True)
            write_parquet(stored, file)
            shutil.rmtree(self.run.shard_folder(phase), ignore_errors=True)
        assert stored is not None
        return stored[stored["prompt_id"].isin(chosen["prompt_id"])].reset_index(drop=True)

    def _drawn(self, prompts: str, side: str, missing: pd.DataFrame, phase: str) -> pd.DataFrame:
        learner = self.learners[prompts]
        job = Collection(
            phase=phase,
            folder=self.run.shard_folder(phase),
            source=phase,
            responses_per_prompt=self.responses,
            shard_size=self.recipe.sampling.shard_size,
            objectives=list(learner.scorers),
            rule=draw_rule(self.recipe),
            seed=self.recipe.seed + self.settings.seed,
            adapter=self.adapter if side == "samples" else None,
            given=stored_reference(self.run, missing) if side == "reference" else None,
        )
        responses = collect(learner, missing, job)
        refusal = self.settings.checks.refusal
        if prompts == "refusal" and refusal is not None and refusal.scorer is None:
            rule = refuses(responses["response"].tolist(), refusal.phrases)
            responses = responses.assign(**{REFUSAL: rule})
        return responses
