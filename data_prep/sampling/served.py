"""Responses that completions servers draw (`data_prep.sampling.completions`), as a responses table.

A server only draws. Token ids are the server's own where it gives them (`return_token_ids` of vLLM
and SGLang), else the text's tokenization, and then counted where their number is not the server's;
log-probabilities always come from a forward pass here, and the server's are kept beside them
(`server_logp`) so that its law can be compared with the policy
(`constrained_dpo.estimates.draws`).
"""

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from data_prep.errors import UserError
from data_prep.models.adapters import attached_adapter
from data_prep.models.policy import Policy
from data_prep.models.tokens import embedded_rows
from data_prep.sampling.completions import CompletionServers
from data_prep.sampling.generate import Sampler, decode
from data_prep.tables import DRAWS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """A response as a server gave it.

    server_logp: its log-probability in nats, or NaN; exact: whether the ids are surely those that
    were drawn; told: whether the server gave them itself.
    """

    ids: list[int]
    text: str
    server_logp: float
    exact: bool
    told: bool


def read_choice(policy: Policy, choice: dict) -> Drawn:
    """Read a server's choice.

    Ids are the server's, with the EOS that some leave out; or else the text's tokenization, with
    EOS where it stopped by itself. Raises UserError for a token that the policy does not embed.
    """
    ids, text = choice.get("token_ids"), choice["text"]
    stopped = choice.get("finish_reason") == "stop"
    if ids:
        ids = [int(i) for i in ids]
        if stopped and ids[-1] not in policy.eos_ids:
            ids.append(_stop_token(policy, choice))
        _require_embedded(policy, ids)
        return Drawn(ids, decode(policy, [ids])[0], _server_logp(choice, len(ids)), True, True)
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    counted = choice.get("completion_tokens")
    # transformers serve says `length` of a response whose EOS is its last allowed token, too;
    # and an empty one was an EOS.
    if stopped or not ids or counted == len(ids) + 1:
        ids = [*ids, _stop_token(policy, choice)]
    return Drawn(ids, text, math.nan, counted == len(ids), False)


def _require_embedded(policy: Policy, ids: list[int]) -> None:
    rows = embedded_rows(policy.model)
    if max(ids) >= rows:
        raise UserError(
            f"sampling.server: drew token {max(ids)}, and the policy embeds {rows}: it serves "
            "another model, or one with a larger vocabulary; serve policy.model"
        )


def _stop_token(policy: Policy, choice: dict) -> int:
    """The EOS that ended it: the one that the server names (vLLM: stop_reason, SGLang:
    matched_stop), else the tokenizer's."""
    for key in ("stop_reason", "matched_stop"):
        if choice.get(key) in policy.eos_ids:
            return choice[key]
    eos_id = policy.tokenizer.eos_token_id
    return eos_id if eos_id in policy.eos_ids else policy.eos_ids[0]


def _server_logp(choice: dict, length: int) -> float:
    """Sum of the tokens' log-probabilities; NaN unless there is one for each."""
    logps = (choice.get("logprobs") or {}).get("token_logprobs") or []
    return (
        float(sum(logps))
        if len(logps) == length and all(isinstance(value, int | float) for value in logps)
        else math.nan
    )


@dataclass
class SamplingCost:
    """Seconds that sampling took: until the servers had answered, and in the policy's forward here
    (log-probabilities, KL, tests of the draws); responses: how many."""

    server_seconds: float = 0.0
    forward_seconds: float = 0.0
    responses: int = 0

    def add(self, server: float, forward: float, responses: int) -> None:
        self.server_seconds += server
        self.forward_seconds += forward
        self.responses += responses

    def taken(self) -> dict[str, float]:
        """Give the costs so far, log them in words, and begin anew."""
        total = self.server_seconds + self.forward_seconds
        log.info(
            "%d responses by servers: %.1f s until they answered, %.1f s in the policy's forward "
            "here for log-probabilities, KL and the tests of the draws (%.0f %%)",
            self.responses,
            self.server_seconds,
            self.forward_seconds,
            100 * self.forward_seconds / total if total else 0.0,
        )
        costs = {
            "server_seconds": round(self.server_seconds, 3),
            "forward_seconds": round(self.forward_seconds, 3),
            "responses": self.responses,
        }
        self.server_seconds, self.forward_seconds, self.responses = 0.0, 0.0, 0
        return costs


@dataclass(frozen=True)
class ServedSampler:
    """What draws responses on servers; their log-probabilities are computed by `local`, whose
    policy is π_ref as it is loaded here. The servers' model has to be the same one."""

    servers: CompletionServers
    local: Sampler
    cost: SamplingCost = field(default_factory=SamplingCost)

    def draw(
        self,
        prompts: pd.DataFrame,
        *,
        responses_per_prompt: int,
        adapter: Path | None,
        source: str,
        seed: int,
    ) -> pd.DataFrame:
        """Draw responses as `Sampler.draw` does, with columns more.

        server_logp: nats, NaN where not given; exact_ids: false where the text had to be tokenized
        again and gave another number of tokens than were drawn; server_url: who drew it;
        `data_prep.tables.DRAWS`: what tests the draws, NaN where the ids are not the server's own.
        """
        policy, ids = self.local.policy, prompts["prompt_id"].tolist()
        begun = time.perf_counter()
        choices, drawn_by = self.servers.complete(
            policy,
            [self.local.prompt_tokens[pid] for pid in ids],
            responses_per_prompt,
            self.local.settings,
            adapter,
            seed,
        )
        answered = time.perf_counter()
        drawn = [read_choice(policy, choice) for choice in choices]
        rows = [pid for pid in ids for _ in range(responses_per_prompt)]
        tokens, told = [self.local.prompt_tokens[pid] for pid in rows], [d.told for d in drawn]
        with attached_adapter(policy, adapter) as model:
            logps = self.local.logps(
                model, tokens, [d.ids for d in drawn], adapter, tested=any(told)
            )
        self.cost.add(answered - begun, time.perf_counter() - answered, len(drawn))
        table = self.local.table(
            rows, [d.ids for d in drawn], [d.text for d in drawn], logps, source
        )
        sums = {n: np.where(told, logps.draws.get(n, np.nan), np.nan) for n in DRAWS}
        return table.assign(
            server_logp=np.array([d.server_logp for d in drawn], dtype=np.float64),
            exact_ids=[d.exact for d in drawn],
            server_url=drawn_by,
            **sums,
        )
