"""The LoRA learner: what `rounds` asks for (fit, sample, score), done with real models. Models are
loaded when first needed."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from constrained_dpo.fit.family import read_family, write_member
from constrained_dpo.launch import shards_base
from constrained_dpo.learners.embedded import EmbeddedValues
from constrained_dpo.learners.protocol import FitJob
from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError
from data_prep.models.adapters import attached_adapter
from data_prep.models.policy import Policy, load_policy
from data_prep.prompts.messages import Prompt, conversation_text, stored_prompt
from data_prep.prompts.templates import tokenize_prompts
from data_prep.sampling.completions import CompletionServers
from data_prep.sampling.generate import Sampler
from data_prep.sampling.law import check_lengths, law_hash
from data_prep.sampling.logprobs import response_logps
from data_prep.sampling.served import SamplingCost, ServedSampler
from data_prep.scorers.cache import ScoreCache
from data_prep.scorers.implicit import PolicyHandle
from data_prep.scorers.protocol import Scorer, TokenScorer
from data_prep.scorers.scoring import make_scorer, score_texts, score_tokens
from data_prep.scorers.settings import ScorerSettings
from data_prep.settings import EMBEDDED, derive_seed
from data_prep.tables import TOKEN_IDS


class LoraLearner:
    """Fit LoRA adapters with TRL, sample and score with the recipe's policy and scorers.

    prompts: the prompts table; score_cache: the file of scores that are computed already (None: in
    memory); extra_scorers: scores beside the recipe's objectives, by name.
    """

    def __init__(
        self,
        recipe: Recipe,
        prompts: pd.DataFrame,
        score_cache: Path | None = None,
        extra_scorers: dict[str, ScorerSettings] | None = None,
    ) -> None:
        self.recipe, self.prompts, self.score_cache = recipe, prompts, score_cache
        self.scorer_settings = recipe.scorers | (extra_scorers or {})

    @cached_property
    def policy(self) -> Policy:
        return load_policy(self.recipe.policy)

    @cached_property
    def servers(self) -> CompletionServers | None:
        """What samples, where the recipe has it sampled by servers; a run's adapters there carry
        its hash."""
        settings, cache = self.recipe.sampling.server, self.score_cache
        owner = None if cache is None else str(cache.resolve())
        return None if settings is None else CompletionServers(settings, owner)

    @cached_property
    def _cost(self) -> SamplingCost:
        return SamplingCost()

    def sampling_cost(self) -> dict[str, float] | None:
        """Give the seconds that servers took for responses and our forward took beside them, since
        the last call (`SamplingCost`); None where nothing was sampled by servers."""
        return self._cost.taken() if self._cost.responses else None

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        return {
            name: make_scorer(settings, self.handle)
            for name, settings in self.scorer_settings.items()
        }

    @property
    def handle(self) -> PolicyHandle:
        """This learner's policy for scorers that ask it; still the learner's to unload."""
        return PolicyHandle(
            lambda: self.policy, self.recipe.prompts, self.recipe.sampling.max_new_tokens
        )

    @cached_property
    def cache(self) -> ScoreCache:
        return ScoreCache(self.score_cache)

    @cached_property
    def prompt_tokens(self) -> dict[str, list[int]]:
        """Token ids by prompt_id: those that `prepare` kept."""
        if TOKEN_IDS in self.prompts:
            kept = zip(self.prompts["prompt_id"], self.prompts[TOKEN_IDS], strict=True)
            return {pid: [int(i) for i in ids] for pid, ids in kept}
        return tokenize_prompts(self.prompts, self.recipe.prompts, self.policy.tokenizer)

    @cached_property
    def prompt_texts(self) -> pd.Series:
        """What a judge is told the request was, by prompt_id: the text, or the conversation."""
        texts = [conversation_text(prompt) for prompt in self._stored_prompts]
        return pd.Series(texts, index=self.prompts["prompt_id"])

    def told(self, scorer: Scorer) -> pd.Series:
        """What a scorer is told of every prompt, by prompt_id: a text, or messages."""
        told = scorer.told(self._stored_prompts)
        return pd.Series(told, index=self.prompts["prompt_id"], dtype=object)

    @property
    def _stored_prompts(self) -> list[Prompt]:
        return [stored_prompt(p, self.recipe.prompts.format) for p in self.prompts["prompt"]]

    def keep_tokens(self) -> None:
        """Put the prompts' token ids into their table, which stays as it is from then on."""
        if TOKEN_IDS not in self.prompts:
            tokens = [np.array(self.prompt_tokens[p], np.int32) for p in self.prompts["prompt_id"]]
            kept = pd.Series(tokens, index=self.prompts.index, dtype=object)
            self.prompts = self.prompts.assign(**{TOKEN_IDS: kept})

    def unload(self) -> None:
        """Free the policy; it loads again when next needed."""
        self.__dict__.pop("policy", None)

    def restrict(self, limit: int) -> dict[str, int]:
        """Apply the length limit (tokens of prompt + response) to the prompts; return how many were
        dropped.

        Raises UserError for prompts that are too long where the recipe does not say to drop them.
        """
        names = "fit.max_length"
        if self.policy.window is not None and self.policy.window < limit:
            limit, names = self.policy.window, "the policy's window"
        if self.recipe.prompts.too_long == "error":
            check_lengths(self.prompt_tokens, self.recipe.sampling, limit, names)
            return {"too_long": 0}
        room = limit - self.recipe.sampling.max_new_tokens
        fits = self.prompts["prompt_id"].map(lambda pid: len(self.prompt_tokens[pid]) <= room)
        dropped, splits = int((~fits).sum()), set(self.prompts["split"]) - {"fit"}
        self.prompts = self.prompts[fits].reset_index(drop=True)
        counts = self.prompts["split"].value_counts()
        if min(counts.get(split, 0) for split in splits) < 2:
            raise UserError(
                f"prompts: {dropped} of {len(fits)} are too long for {names} {limit}; too few are "
                "left"
            )
        return {"too_long": dropped}

    def identity(self) -> dict[str, Any]:
        """Hash what the run's numbers depend on; say the sampling law in words."""
        identity: dict[str, Any] = {
            "policy": self.policy.fingerprint,
            "scorers": {name: self.scorers[name].fingerprint for name in self.recipe.scorers},
            "law": law_hash(self.recipe.sampling, self.policy.eos_ids),
            "overridden_generation": self.policy.overridden,
        }
        if self.servers is not None:
            identity["sampler"] = self.servers.identity()
        return identity

    def fit(self, job: FitJob) -> None:
        """Write one round's adapter or family; the multipliers are in the labels already."""
        from constrained_dpo.fit.adapter import fit_adapter
        from constrained_dpo.fit.trainer import FitPlan

        recipe = self.recipe
        plan = FitPlan(
            settings=recipe.fit.in_round(job.round_number).model_copy(update={"loss": job.loss}),
            lora=recipe.policy.lora,
            beta=recipe.objective.beta,
            seed=job.seed,
            output=job.output,
            previous_adapter=job.previous,
            logs=job.logs,
            checkpoints=job.checkpoints,
            holdout_seed=derive_seed(recipe.seed, 0, "holdout"),
            run_name=f"{recipe.name}-{job.logs.name}",
            family=job.family,
            stretch=job.stretch,
        )
        fit_adapter(self.policy, job.labels, job.pool, self.prompt_tokens, plan)
        if shards_base():
            self.unload()

    def write_member(self, family: Path, lambda_: pd.Series, kappa: float, output: Path) -> None:
        """Write a family's member at λ and κ as an ordinary adapter; where constraints by category
        share a block it is fitted (`distill`)."""
        if not read_family(family).shared:
            write_member(family, lambda_, kappa, output)
            return
        from constrained_dpo.fit.distill import distill_member

        seed = derive_seed(self.recipe.seed, 0, "distill")
        distill_member(self.policy, family, lambda_, kappa, self.recipe.fit, seed, output)

    @property
    def sampler(self) -> Sampler | ServedSampler:
        local = Sampler(self.policy, self.prompt_tokens, self.recipe.sampling)
        if self.servers is None:
            return local
        return ServedSampler(self.servers, local, self._cost)

    def sample(
        self,
        prompts: pd.DataFrame,
        *,
        responses_per_prompt: int,
        adapter: Path | None,
        source: str,
        seed: int,
    ) -> pd.DataFrame:
        """Draw responses to prompts, here or on the recipe's server."""
        return self.sampler.draw(
            prompts,
            responses_per_prompt=responses_per_prompt,
            adapter=adapter,
            source=source,
            seed=seed,
        )

    def log_probabilities(self, responses: pd.DataFrame, adapter: Path | None) -> np.ndarray:
        """log π_θ (adapter) or log π_ref (None) of stored responses by their token ids (nats, T =
        1), shape (num_responses,)."""
        tokens = [self.prompt_tokens[pid] for pid in responses["prompt_id"]]
        drawn = [ids.tolist() for ids in responses["token_ids"]]
        with attached_adapter(self.policy, adapter) as model:
            pad_id, size = self.policy.tokenizer.pad_token_id, self.recipe.sampling.batch_size
            return response_logps(model, tokens, drawn, pad_id=pad_id, batch_size=size)

    def score(self, responses: pd.DataFrame) -> pd.DataFrame:
        texts = responses["response"].tolist()
        columns = {}
        for name, scorer in self.scorers.items():
            options = self.scorer_settings[name]
            if isinstance(scorer, TokenScorer):
                tokens = [self.prompt_tokens[pid] for pid in responses["prompt_id"]]
                drawn = [ids.tolist() for ids in responses["token_ids"]]
                # A table's ref_logp is this learner's policy's; a merged export has another
                # than the run's scorers ask.
                same = scorer.reference_fingerprint == self.policy.fingerprint
                columns[name] = score_tokens(
                    scorer,
                    tokens,
                    drawn,
                    texts=texts,
                    ref_logp=responses["ref_logp"].to_numpy(np.float64) if same else None,
                    options=options,
                    name=name,
                    cache=self.cache,
                )
            else:
                prompts = responses["prompt_id"].map(self.told(scorer)).tolist()
                columns[name] = score_texts(
                    scorer, prompts, texts, options=options, name=name, cache=self.cache
                )
        return self.recipe.problem.with_categories(responses.assign(**columns), self.prompts)

    def truncated(self) -> dict[str, int]:
        """Texts cut to a scorer's window in this process, by objective; only scorers that
        truncate."""
        return {n: s.truncated for n, s in self.scorers.items() if s.truncated}

    def measured_scorers(self, pool: pd.DataFrame) -> dict[str, dict[str, Any]]:
        """By objective: `quantization_drift` of quantized scorers, `calibration` of implicit ones;
        pool: π_ref's scored responses."""
        drifts = {name: scorer.quantization_drift() for name, scorer in self.scorers.items()}
        measured = {
            name: {"quantization_drift": drift}
            for name, drift in drifts.items()
            if drift is not None
        }
        return measured | {
            name: {"calibration": record} for name, record in self.calibrations(pool).items()
        }

    def calibrations(self, pool: pd.DataFrame) -> dict[str, dict[str, Any]]:
        """By implicit objective of the recipe: `beta`, `std_within` (score units, within a prompt
        on π_ref's scored responses; None with one response each) and `labelled`, the agreement with
        its table of labelled pairs (None without one)."""
        records = {}
        for name, settings in self.recipe.scorers.items():
            if settings.type == "implicit":
                within = np.sqrt(pool.groupby("prompt_id")[name].var(ddof=1).mean())
                std = float(within) if np.isfinite(within) else None
                records[name] = {
                    "beta": settings.beta,
                    "std_within": std,
                    "labelled": self.scorers[name].agreement(),
                }
        return records

    @cached_property
    def exact(self) -> EmbeddedValues | None:
        """Exact values, where every response is listed: on the embedded world alone."""
        return EmbeddedValues(self) if self.recipe.policy.model == EMBEDDED else None
