"""The keys of the recipe's `pool` block: which scored responses there are, and which of them a
round trains on."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from data_prep.labels.pool import responses_taken
from data_prep.settings import Settings


class PoolShares(Settings):
    """How much of what a round trains on comes from where; the shares sum to 1."""

    reference: float = Field(
        ge=0,
        le=1,
        description="π_ref's own responses; 0 only where the pool has none, so that none of its "
        "answers goes out of view",
    )
    dataset: float = Field(
        0.0, ge=0, le=1, description="the dataset's responses (pool.source: dataset, both)"
    )
    recent: float = Field(0.0, ge=0, le=1, description="the last round's samples")
    hard: float = Field(
        0.0,
        ge=0,
        le=1,
        description="the last round's samples, with odds proportional to how wrong its policy was "
        "on them",
    )
    earlier: float = Field(0.0, ge=0, le=1, description="samples of the rounds before")

    @model_validator(mode="after")
    def _whole(self) -> "PoolShares":
        total = self.reference + self.dataset + self.recent + self.hard + self.earlier
        if abs(total - 1) > 1e-9:
            raise ValueError(f"pool.shares sum to {total:g}; they must sum to 1")
        return self


class PoolSettings(Settings):
    """The scored responses that pairs are drawn from."""

    source: Literal["reference", "dataset", "both"] = Field(
        "reference",
        description="reference: π_ref's samples on the fit prompts; dataset: the responses in the "
        "rows of prompts.source (PKU-SafeRLHF, "
        "HH-RLHF, UltraFeedback), scored like samples; both. λ_0, baselines and the certificate "
        "come from π_ref's samples in any case",
    )
    grow: bool = Field(
        True,
        description="add each round's samples on dual prompts to the pool (they are scored "
        "already)",
    )
    shares: PoolShares | None = Field(
        PoolShares(reference=0.1, recent=0.7, earlier=0.2),
        description="shares of the sources in what a round trains on; null: every response alike "
        "(the default where the pool does not grow, or has a dataset's)",
    )
    max_per_prompt: int | None = Field(
        None,
        ge=2,
        description="most responses of a prompt that a round trains on, drawn anew each round",
    )

    @model_validator(mode="before")
    @classmethod
    def _alike(cls, content: Any) -> Any:
        """A fixed pool, or a dataset's, has no default shares."""
        if not isinstance(content, Mapping) or "shares" in content:
            return content
        plain = (
            content.get("grow", True) is True and content.get("source", "reference") == "reference"
        )
        return content if plain else {**content, "shares": None}

    @model_validator(mode="after")
    def _grown(self) -> "PoolSettings":
        if (
            self.shares is not None
            and not self.grow
            and self.shares.reference + self.shares.dataset < 1
        ):
            raise ValueError(
                "pool.shares: pool.grow: false adds no responses; set recent, hard and earlier to "
                "0, or drop the shares"
            )
        return self

    @model_validator(mode="after")
    def _shared_out(self) -> "PoolSettings":
        for kind in ("reference", "dataset") if self.shares is not None else ():
            drawn, share = self.source in (kind, "both"), getattr(self.shares, kind)
            if drawn and not share:
                raise ValueError(
                    f"pool.shares.{kind} is 0, but pool.source {self.source} has such responses; "
                    "give them a share above 0"
                )
            if share and not drawn:
                raise ValueError(
                    f"pool.shares.{kind} is {share:g}, but pool.source {self.source} has no such "
                    "responses; set it to 0"
                )
        return self

    def too_few(self, group_size: int, drawn: int, measured: int, rounds: int) -> list[str]:
        """Why some round of a run would find nothing to compare in rows of `group_size`: a line, or
        none. drawn: π_ref's responses to every prompt; measured: each round's to a dual prompt.
        Nothing is said of a dataset's responses, whose numbers differ."""
        row = "pair to compare" if group_size == 2 else f"group of fit.group_size {group_size}"
        drawn, measured = drawn or group_size, measured or 8 * group_size  # 0: set by the prompts
        if drawn < group_size and self.source == "reference":
            return [f"sampling.responses_per_prompt: {drawn} gives the first round no {row}"]
        if self.max_per_prompt is not None and self.max_per_prompt < group_size:
            return [f"pool.max_per_prompt: {self.max_per_prompt} gives no {row}"]
        if self.shares is None or not self.grow or self.source != "reference":
            return []
        for number in range(
            1, min(rounds, 3)
        ):  # from the third on there is only more of what is earlier
            pool = {"reference": drawn, "last": measured, "earlier": measured * (number - 1)}
            taken = responses_taken(pool, self.shares.model_dump(), self.max_per_prompt)
            if taken < group_size:
                return [
                    f"pool.shares: of {drawn} responses of π_ref and {measured} of each round "
                    f"they leave a dual prompt {taken} in round "
                    f"{number}, no {row}; raise dual.responses_per_prompt, or give the last "
                    "round's a smaller share"
                ]
        return []
