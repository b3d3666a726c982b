"""`cdpo gate`: whether a policy passes every check, by fresh samples on prompts that the run never
trained on. RUN/gates/KEY/gate.json has how it looked and what it said; the same question again goes
on from there."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from constrained_dpo.evaluation.fresh import checked_adapter, round_or_adapter
from constrained_dpo.gate.build import build_claims
from constrained_dpo.gate.capability import read_capability
from constrained_dpo.gate.claims import TEST
from constrained_dpo.gate.play import Play
from constrained_dpo.gate.prompts import prompt_sets
from constrained_dpo.gate.record import UNDECIDED, GateRecord
from constrained_dpo.gate.sampling import Sampling, open_learners
from constrained_dpo.gate.settings import GateSettings
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.run.directory import RunDirectory
from data_prep.errors import UserError
from data_prep.files import hash_file
from data_prep.models.adapters import fingerprint_adapter


@dataclass(frozen=True)
class GateOptions:
    """Which policy is judged, and how long.

    round: a number, best, best-dual or last; adapter: instead of a round, a LoRA adapter from
    elsewhere on the run's base; until_decided: look at more and more prompts until every check is
    decided; budget: at most so many prompts of each set (None: all there are).
    """

    round: str = "last"
    adapter: Path | None = None
    until_decided: bool = False
    budget: int | None = None


def gate(run: RunDirectory, settings: GateSettings, options: GateOptions) -> GateRecord:
    """Judge a policy by a gate; hold the run meanwhile. A decided gate's record is given again.

    Raises UserError for options that exclude each other, for a prompt that the run trained on, a
    scorer, a sampling law or a policy that is not the run's, and for anything that is missing.
    """
    if options.budget is not None and not options.until_decided:
        raise UserError("--budget: is read with --until-decided only; give both, or `size` in gate")
    number, recipe = round_or_adapter(run, options.round, options.adapter), run.recipe()
    claims = build_claims(recipe, settings)
    capabilities = [read_capability(check) for check in settings.checks.capability]
    sets = prompt_sets(run, recipe, settings)
    with run.locked():
        learners, left_out = open_learners(run, recipe, settings, sets)
        if number is None:
            adapter = Path(options.adapter or "")
            who = checked_adapter(run, recipe, learners[TEST], adapter)
        else:
            adapter = run.adapter_folder(number)
            who = fingerprint_adapter(adapter)
        key = _key(settings, learners, who, number, options)
        record = GateRecord(
            key=key,
            verdict=UNDECIDED,
            confidence=settings.confidence,
            round=number,
            adapter=None if number is not None else str(adapter),
            available={name: len(learner.prompts) for name, learner in learners.items()},
            left_out=left_out,
            checks=[],
            sessions=[],
        )
        sampling = Sampling(run, recipe, settings, key, adapter, learners)
        budget = options.budget if options.until_decided else settings.size
        return Play(sampling, claims, capabilities).play(record, budget, options.until_decided)


def _key(
    settings: GateSettings,
    learners: dict[str, LoraLearner],
    who: str,
    number: int | None,
    options: GateOptions,
) -> str:
    """Name the gate's folder by its question: policy, checks, prompts and scorers, but not how many
    prompts it may take."""
    capabilities = settings.checks.capability
    identity = [
        who,
        settings.model_dump(mode="json", exclude={"size"}),
        {name: learner.prompts["prompt_id"].tolist() for name, learner in learners.items()},
        {n: s.fingerprint for each in learners.values() for n, s in each.scorers.items()},
        [hash_file(Path(file)) for check in capabilities for file in (check.before, check.after)],
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    name = Path(options.adapter or "").resolve().name if number is None else f"round-{number:03d}"
    return f"{name}-{digest}"
