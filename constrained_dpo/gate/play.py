"""A gate under way: looks at more and more prompts, until it is decided or its budget is spent."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from constrained_dpo.gate.capability import Capability
from constrained_dpo.gate.claims import CUT_OFF, LENGTH, TEST, Claim
from constrained_dpo.gate.decide import judge_capability, judge_claim, open_sets, overall
from constrained_dpo.gate.expected import expectation, pilot_tables
from constrained_dpo.gate.record import FAILED, UNDECIDED, GateRecord, Look, Session
from constrained_dpo.gate.sampling import Sampling
from constrained_dpo.gate.settings import GateSettings
from constrained_dpo.gate.spending import look_errors, look_sizes, session_error
from data_prep.files import write_json
from data_prep.readers.tables import read_parquet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Play:
    """A gate under way: what draws, and what is judged."""

    sampling: Sampling
    claims: Sequence[Claim]
    capabilities: Sequence[Capability]

    @property
    def settings(self) -> GateSettings:
        return self.sampling.settings

    @property
    def checks(self) -> int:
        return len(self.claims) + len(self.capabilities)

    def play(self, fresh: GateRecord, budget: int | None, until_decided: bool) -> GateRecord:
        """Take looks until the gate is decided, or the budget is spent; keep gate.json.

        fresh: the record of a gate that has not looked; budget: prompts (None: all there are), in
        one look, or in several that grow (`until_decided`).
        """
        file = self.sampling.run.gate_folder(fresh.key) / "gate.json"
        if file.exists():
            record = GateRecord.read(file)
        else:
            record = self._with_capabilities(fresh)
            write_json(file, record.to_json())
        if record.verdict != UNDECIDED or not self.claims:  # results of another tool do not grow
            return record
        record = self._with_session(record, budget, until_decided)
        self._say_expected(record)
        rooms = self._rooms_of_rounds()
        while record.verdict == UNDECIDED and record.sessions[-1].left:
            record = self._looked(record, rooms)
            write_json(file, record.to_json())
        return record

    def _with_capabilities(self, record: GateRecord) -> GateRecord:
        error = 1 - self.settings.confidence
        results = [judge_capability(c, error, self.checks) for c in self.capabilities]
        words = [result.verdict for result in results]
        verdict = UNDECIDED if self.claims and FAILED not in words else overall(words)
        return record.model_copy(update={"checks": results, "verdict": verdict})

    def _with_session(
        self, record: GateRecord, budget: int | None, until_decided: bool
    ) -> GateRecord:
        """The record with the looks to come; as it is where the budget is spent already."""
        most = max(record.available[claim.prompts] for claim in self.claims)
        if budget is not None and budget > most:
            log.warning("gate: only %d prompts are there, not %d", most, budget)
        end = most if budget is None else min(budget, most)
        sessions, done = record.sessions, record.size
        last = sessions[-1] if sessions else None
        going_on = last is not None and last.left and last.plan[-1].size == end
        if end <= done or going_on:
            return record
        sizes = look_sizes(done, end) if until_decided else [end]
        errors = look_errors(session_error(record.confidence, len(sessions) + 1), done, sizes)
        plan = [Look(size=n, error=e) for n, e in zip(sizes, errors, strict=True)]
        session = Session(done=done, plan=plan, looks=[])
        return record.model_copy(update={"sessions": [*sessions, session]})

    def _say_expected(self, record: GateRecord) -> None:
        """Say beforehand how many prompts are needed, as the round's dual prompts show."""
        session = record.sessions[-1]
        if len(session.plan) < 2 or session.looks:
            return
        tables = pilot_tables(self.sampling.run, record.round)
        if tables is None:
            log.info("gate: how many prompts it needs is said after the first look")
            return
        samples, reference = tables
        there = {*samples.columns, LENGTH, CUT_OFF}
        claims = [c for c in self.claims if c.prompts == TEST and c.column in there]
        rooms = {claim.title: claim.room(samples, reference) for claim in claims}
        log.info("gate: %s", expectation(rooms, session.plan, "the dual prompts"))

    def _looked(self, record: GateRecord, rooms: dict[str, list[pd.Series]]) -> GateRecord:
        """The record after the next look of its last session."""
        session = record.sessions[-1]
        look = session.left[0]
        results = {result.title: result for result in record.checks}
        for name in open_sets(self.claims, results):
            samples, reference = self.sampling.tables(name, look.size)
            for claim in self.claims:
                earlier = results.get(claim.title)
                if claim.prompts == name and (earlier is None or earlier.verdict == UNDECIDED):
                    results[claim.title] = judge_claim(
                        claim,
                        samples,
                        reference,
                        look.error,
                        self.checks,
                        earlier,
                        rooms.get(claim.title, []),
                    )
        session = session.model_copy(update={"looks": [*session.looks, look]})
        ordered = [results[claim.title] for claim in self.claims]
        ordered += [result for result in record.checks if result.kind == "capability"]
        update = {
            "checks": ordered,
            "verdict": overall([result.verdict for result in ordered]),
            "sessions": [*record.sessions[:-1], session],
        }
        record = record.model_copy(update=update)
        self._say_progress(record)
        return record

    def _say_progress(self, record: GateRecord) -> None:
        session = record.sessions[-1]
        undecided = [result for result in record.checks if result.verdict == UNDECIDED]
        words = ", ".join(f"{result.title} {result.verdict}" for result in record.checks)
        log.info("gate: %d prompts: %s", record.size, words)
        if len(session.looks) == 1 and session.left and undecided and record.verdict == UNDECIDED:
            rooms = {r.title: (r.room, r.se * (r.num_prompts or 0) ** 0.5) for r in undecided}
            log.info("gate: %s", expectation(rooms, session.left, "the first look"))

    def _rooms_of_rounds(self) -> dict[str, list[pd.Series]]:
        """Rooms by prompt in the tables of the run, for claims on scores without a range."""
        run, recipe = self.sampling.run, self.sampling.recipe
        claims = [c for c in self.claims if not c.bounded and c.column in recipe.scorers]
        if not claims:
            return {}
        reference = read_parquet(run.reference_file)
        tables = [read_parquet(run.samples_file(t)) for t in range(run.rounds_done())]
        return {
            claim.title: [
                claim.reference_room(reference),
                *(claim.room(samples, reference) for samples in tables),
            ]
            for claim in claims
        }
