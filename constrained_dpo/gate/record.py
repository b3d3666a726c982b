"""The record of a gate: gate.json, and what `--json` prints."""

from data_prep.records import Record

PASSED, FAILED, UNDECIDED = "passed", "failed", "undecided"


def check_title(kind: str, name: str) -> str:
    """Name a check in reports: by its kind, and its name where that is another word."""
    return kind if name == kind else f"{kind} {name}"


class CheckResult(Record):
    """What a gate says of one check.

    kind, name: as in gate.yaml; claim: in words; verdict: passed, failed or undecided. room: by how
    much the claim holds in the mean over prompts, > 0 holds, in the units of the check; se: its
    standard error; low, high: one-sided bounds of it, low at the gate's error probability, high at
    a share of it by the number of checks, both the sharpest of all looks. policy, reference: the
    means under both policies; of a capability, after and before. prompts: the set, null for a
    capability; num_prompts: looked at; decided_at: prompts at the look that decided it; bounded:
    whether the score's range is known, else the range seen took its place.
    """

    kind: str
    name: str
    claim: str
    verdict: str
    room: float
    se: float
    low: float | None
    high: float | None
    policy: float
    reference: float
    prompts: str | None
    num_prompts: int | None
    decided_at: int | None
    bounded: bool

    @property
    def title(self) -> str:
        """The check's name in reports."""
        return check_title(self.kind, self.name)


class Look(Record):
    """One look: the number of prompts of a set, and the error probability that it spent."""

    size: int
    error: float


class Session(Record):
    """A plan of looks up to a budget; done: prompts of earlier sessions; looks: those taken."""

    done: int
    plan: list[Look]
    looks: list[Look]

    @property
    def left(self) -> list[Look]:
        """The looks that are not taken yet."""
        return self.plan[len(self.looks) :]


class GateRecord(Record):
    """A gate's result (gate.json).

    key: its folder's name; verdict: passed, failed or undecided; confidence: of a pass; checks: the
    result of each; round, or adapter: the folder of one from elsewhere; available: prompts by set;
    sessions: how it looked; left_out: prompts left out, by reason.
    """

    key: str
    verdict: str
    confidence: float
    round: int | None
    adapter: str | None
    available: dict[str, int]
    left_out: dict[str, int]
    checks: list[CheckResult]
    sessions: list[Session]

    @property
    def size(self) -> int:
        """Prompts of the gate's own set that it has looked at."""
        looks = [look.size for session in self.sessions for look in session.looks]
        return max(looks, default=0)
