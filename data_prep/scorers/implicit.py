"""The `implicit` scorer: the reward that a DPO policy stands for, s(x, y) = β log π(y|x)/π_ref(y|x)
= r(x, y) − β log Z(x).

Source: DPO (arXiv:2305.18290); as reward and utilities of a constrained problem PeCAN
(arXiv:2405.19544) and PeCAID (arXiv:2505.19387). β belongs in it: PeCAN's public code labels with σ
of the bare log-ratios, which is 1/β too sharp. What is scored are the sampled token ids; only texts
from elsewhere (labelled pairs, the direction probe) are tokenized here.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from data_prep.errors import UserError
from data_prep.models.adapters import (
    attached_adapter,
    check_adapter_config,
    check_all_loaded,
    fingerprint_adapter,
)
from data_prep.models.checkpoints import check_adapter_folder, fingerprint_model
from data_prep.models.policy import Policy, load_policy, resolve_model
from data_prep.models.settings import PolicySettings
from data_prep.models.temperature import temperature_of, untempered
from data_prep.prompts.messages import Prompt, as_messages
from data_prep.prompts.preference_rows import turn_end
from data_prep.prompts.settings import PromptSettings
from data_prep.prompts.templates import tokenize_prompts
from data_prep.sampling.logprobs import response_logps
from data_prep.scorers.calibration import read_labelled_pairs, reliability
from data_prep.scorers.functions import table_prompts
from data_prep.scorers.protocol import TokenScorer
from data_prep.scorers.settings import ImplicitScorerSettings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PolicyHandle:
    """The recipe's policy for scorers that ask it.

    load: gives the loaded policy, whose owner may drop it and load it again; prompts: how texts are
    put to it; max_new_tokens: a response with so many tokens was cut off and has no EOS.
    """

    load: Callable[[], Policy]
    prompts: PromptSettings
    max_new_tokens: int


class ImplicitScorer(TokenScorer):
    """β·log-ratio of an adapter or a model to its reference, float64. Raises UserError for one that
    does not belong to the reference.

    An adapter is attached to the recipe's loaded policy while it scores, at temperature 1 whatever
    `policy.temperature` is: DPO's reward is defined by the models as they are. A `model` or an
    explicit `reference` is loaded beside it, in the policy's quantization and dtype, so that a
    log-ratio holds no quantization error of one side alone.
    """

    reads_conversation = True

    def __init__(self, settings: ImplicitScorerSettings, handle: PolicyHandle | None) -> None:
        self.settings, self.key = settings, f"scorer {settings.adapter or settings.model}"
        if handle is None:
            raise UserError(
                f"{self.key}: an implicit scorer asks the recipe's policy; use it in a recipe or "
                "with `cdpo evaluate RUN --scorer`"
            )
        self.handle = handle
        self._model = (
            None if settings.model is None else self._load(settings.model, settings.revision)
        )
        self._reference = (
            None
            if settings.reference is None
            else self._load(settings.reference, settings.reference_revision)
        )
        target = self._model.fingerprint if self._model else self._check_adapter()
        # Of a tempered policy no stored log-probability is handed to it.
        tempered = temperature_of(self.reference.model) != 1.0
        self.reference_fingerprint = self.reference.fingerprint + "@1" * tempered
        policies = [self.reference] if self._model is None else [self.reference, self._model]
        windows = [policy.window for policy in policies if policy.window is not None]
        self.window = min(windows, default=None)
        prompts = handle.prompts
        # Sampled tokens are in the cache's key; of texts, what tokenizes them.
        shape = [
            settings.beta,
            prompts.format,
            prompts.template,
            handle.max_new_tokens,
            handle.load().fingerprint,
        ]
        digest = hashlib.sha256(
            json.dumps([target, self.reference_fingerprint, shape]).encode()
        ).hexdigest()[:16]
        self.fingerprint = f"implicit:{'model' if self._model else 'adapter'}:{digest}"

    @property
    def reference(self) -> Policy:
        return self._reference or self.handle.load()

    @property
    def loaded(self) -> list["torch.nn.Module"]:
        """Models that this scorer holds beside the recipe's policy."""
        return [policy.model for policy in (self._model, self._reference) if policy is not None]

    def _load(self, model: str, revision: str | None) -> Policy:
        policy, settings = self.handle.load(), self.settings
        changed = {
            "model": model,
            "revision": revision,
            "reference_adapter": None,
            "temperature": 1.0,
            "trust_remote_code": settings.trust_remote_code,
            "allow_pickle": settings.allow_pickle,
        }
        loaded = load_policy(
            PolicySettings.model_validate(policy.settings.model_dump() | changed), self.key
        )
        vocabulary, expected = loaded.tokenizer.get_vocab(), policy.tokenizer.get_vocab()
        odd = next(
            (word for word, number in expected.items() if vocabulary.get(word) != number), None
        )
        if odd is not None:
            raise UserError(
                f"{self.key}: {model} does not read the policy's tokens (e.g. {odd!r}), so their "
                "log-probabilities mean nothing to it; "
                "use a model with the policy's tokenizer"
            )
        return loaded

    def _check_adapter(self) -> str:
        """The adapter's fingerprint; raises UserError where it was trained on another base than the
        reference."""
        adapter, reference = Path(self.settings.adapter or ""), self.reference
        check_adapter_folder(adapter, self.key)
        base = resolve_model(reference.settings)
        whose = "reference" if self._reference else "policy.model"
        advice = f"set {whose} to that base" if self._reference else "set reference to that base"
        check_adapter_config(
            adapter, base, fingerprint_model(base, reference.settings.revision), self.key, advice
        )
        with attached_adapter(reference, adapter) as model:
            check_all_loaded(model, adapter, base, self.key)
        return fingerprint_adapter(adapter)

    @contextlib.contextmanager
    def _target(self) -> Iterator["torch.nn.Module"]:
        if self._model is not None:
            yield self._model.model
            return
        with attached_adapter(self.reference, Path(self.settings.adapter or "")) as model:
            yield model

    def score_tokens(
        self, prompts: list[list[int]], responses: list[list[int]], ref_logp: np.ndarray | None
    ) -> np.ndarray:
        """Scores of token ids, (num_responses,); ref_logp as in `scoring.TokenScorer`."""
        window = self.window
        longest = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
        if window is not None and longest > window:
            raise UserError(
                f"{self.key}: prompt and response have {longest} tokens, over its window of "
                f"{window}; shorten the prompts"
            )
        how = {
            "pad_id": self.handle.load().tokenizer.pad_token_id,
            "batch_size": self.settings.batch_size,
        }
        with self._target() as model, untempered(model):
            target = response_logps(model, prompts, responses, **how)
        reference = (
            np.full(len(responses), np.nan)
            if ref_logp is None
            else np.array(ref_logp, dtype=np.float64)
        )
        unknown = np.flatnonzero(np.isnan(reference))
        if len(unknown):
            rows = [prompts[i] for i in unknown], [responses[i] for i in unknown]
            with untempered(self.reference.model):
                reference[unknown] = response_logps(self.reference.model, *rows, **how)
        return self.settings.beta * (target - reference)

    def score(self, prompts: Sequence[Prompt], responses: list[str]) -> np.ndarray:
        """Scores of texts, tokenized as `tokenize` says."""
        return self.score_tokens(*self.tokenize(prompts, responses), None)

    def tokenize(
        self, prompts: Sequence[Prompt], responses: list[str]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Turn texts from elsewhere into token ids: prompts (a text, or a list of chat messages) in
        the recipe's format, responses closed by the token that ends a turn there, unless they have
        max_new_tokens tokens already, as a sampled one would have been cut off there."""
        policy, chat = self.handle.load(), self.handle.prompts.format == "chat"
        tokenizer = policy.tokenizer
        closing = turn_end(self.handle.prompts, tokenizer, policy.eos_ids)
        written = [json.dumps(as_messages(p)) if chat else p for p in prompts]
        if not all(isinstance(p, str) for p in written):
            raise UserError(
                f"{self.key}: a prompt is a list of messages, but prompts.format is text; give "
                "texts"
            )
        names = [str(number) for number in range(len(written))]
        table = pd.DataFrame({"prompt_id": names, "prompt": written})
        ids = tokenize_prompts(table, self.handle.prompts, tokenizer)
        drawn = []
        for response in responses:
            tokens = list(tokenizer(response, add_special_tokens=False)["input_ids"])
            ended = [] if len(tokens) >= self.handle.max_new_tokens else [closing]
            drawn.append(tokens + ended)
        return [ids[name] for name in names], drawn

    def exact_scores(self, prompt_tokens: dict[str, list[int]]) -> np.ndarray:
        """Scores of every response of the embedded world, (num_prompts, num_responses), rows as in
        `enumeration.enumerate_responses`."""
        from data_prep.sampling.enumeration import exact_logps

        adapter = None if self.settings.adapter is None else Path(self.settings.adapter or "")
        with untempered(self.reference.model):
            target = exact_logps(self._model or self.reference, adapter, prompt_tokens)
            reference = exact_logps(self.reference, None, prompt_tokens)
        return self.settings.beta * (target - reference)

    def agreement(self) -> dict[str, object] | None:
        """`calibration.reliability` on the labelled pairs of `calibrate`, with what was read; None
        where no table is given."""
        if self.settings.calibrate is None:
            return None
        pairs, facts = read_labelled_pairs(Path(self.settings.calibrate))
        prompts = table_prompts(pairs, self.settings.calibrate)
        sign = -1.0 if self.settings.negate else 1.0
        chosen, rejected = (
            self.score(prompts, pairs[side].tolist()) for side in ("chosen", "rejected")
        )
        return facts | reliability(sign * (chosen - rejected))
