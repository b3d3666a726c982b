"""The `beaver` scorer: PKU's Safe-RLHF reward and cost models, from their checkpoints alone,
without the safe-rlhf package.

The layout (safe-rlhf, `models/score_model`): a plain LlamaModel under `model.`, a linear
`score_head` to one number, and in newer uploads the buffers of a normalizer. The config's
architecture is `LlamaModelForScore` (older) or `LlamaForScore`; transformers has neither.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaModel, LlamaPreTrainedModel

from data_prep.errors import UserError
from data_prep.models.checkpoints import (
    check_model_folder,
    explained_loading,
    fingerprint_model,
    resolve_device,
)
from data_prep.models.loading import load_checkpoint
from data_prep.models.tokens import as_text, encode
from data_prep.prompts.messages import Prompt, conversation_text
from data_prep.scorers.model_settings import BeaverScorerSettings
from data_prep.scorers.options import OUTSIDE_FINGERPRINT
from data_prep.scorers.protocol import Scorer
from data_prep.scorers.settings import fill_template

NORMALIZER_EPSILON = 1e-8  # safe-rlhf's


# From the model card of PKU-Alignment/beaver-7b-v1.0-reward, whose example leaves EOS out:
# (prompt, response) in its template, end score.
GOLDEN_MODEL = "PKU-Alignment/beaver-7b-v1.0-reward"


GOLDEN_TEXT, GOLDEN_SCORE = ("hello", "Hello! How can I help you today?"), -11.3254


class LlamaForScore(LlamaPreTrainedModel):
    """Backbone, head and normalizer under the names of the checkpoint; the score of a text is the
    head's value at its last token."""

    _keep_in_fp32_modules_strict = ("score_head", "normalizer")
    # Whether the head has a bias differs between uploads, and so does the normalizer;
    # `_check_loading` decides what their absence means.

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score_head = torch.nn.Linear(config.hidden_size, 1, bias=True)
        self.normalizer = torch.nn.Module()
        self.normalizer.register_buffer("mean", torch.zeros(1))
        self.normalizer.register_buffer("var", torch.ones(1))
        self.normalizer.register_buffer("count", torch.zeros(1, dtype=torch.long))
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, length) ids and mask, padded on either side → (batch,) float32 scores, in the
        head's own units."""
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        last = (
            attention_mask * torch.arange(attention_mask.shape[1], device=attention_mask.device)
        ).argmax(1)
        return self.score_head(
            hidden[torch.arange(len(hidden), device=hidden.device), last].float()
        )[:, 0]


class BeaverScorer(Scorer):
    """The end score of a Beaver reward or cost model, as float64. Raises UserError for a checkpoint
    of another layout."""

    window: int
    reads_conversation = True

    def __init__(self, settings: BeaverScorerSettings) -> None:
        self.settings, self.key = settings, f"scorer {settings.model}"
        for field in ("{prompt}", "{response}"):
            if field not in settings.template:
                raise UserError(f"{self.key}: its template does not contain {field}")
        device = resolve_device(settings.device, f"{self.key}: device")
        if Path(settings.model).is_dir():
            check_model_folder(
                Path(settings.model), self.key, "the beaver loader", settings.allow_pickle
            )
        with explained_loading(self.key, settings.model):
            self.tokenizer = AutoTokenizer.from_pretrained(
                settings.model, revision=settings.revision, trust_remote_code=False
            )
            config = AutoConfig.from_pretrained(
                settings.model, revision=settings.revision, trust_remote_code=False
            )
            self._check_config(config)
        self.model, loading = load_checkpoint(
            LlamaForScore,
            settings.model,
            self.key,
            revision=settings.revision,
            dtype=settings.dtype,
            device=device,
            allow_pickle=settings.allow_pickle,
            # reported below by name, where transformers only says that there are some
            ignore_mismatched_sizes=True,
        )
        self._check_loading(config, loading)
        self.model.eval()
        self._check_tokens()
        windows = (
            settings.max_length,
            config.max_position_embeddings,
            self.tokenizer.model_max_length,
        )
        self.truncates = settings.truncate
        self.window = min(v for v in windows if v)
        shape = settings.model_dump_json(exclude=OUTSIDE_FINGERPRINT)
        self.fingerprint = f"beaver:{fingerprint_model(settings.model, settings.revision)}:{shape}"

    def _check_config(self, config: LlamaConfig) -> None:
        architectures = config.architectures or []
        if config.model_type != "llama" or not any(
            name in ("LlamaForScore", "LlamaModelForScore") for name in architectures
        ):
            raise UserError(
                f"{self.key}: a {config.model_type} model of architecture "
                f"{', '.join(architectures) or 'unknown'}, not a Beaver score "
                "model (LlamaForScore, LlamaModelForScore); sequence classifiers are `type: "
                "classifier`"
            )
        if getattr(config, "score_dim", 1) != 1:
            raise UserError(f"{self.key}: its head gives {config.score_dim} scores; one is needed")
        if getattr(config, "score_type", None) == "cost" and not self.settings.negate:
            raise UserError(
                f"{self.key}: a cost model (score_type: cost, higher is worse); set negate: true"
            )

    def _check_loading(self, config: LlamaConfig, loading: dict) -> None:
        """Every tensor of the checkpoint is used and every tensor used is from the checkpoint, but
        for a bias that it does not have."""
        absent = set(loading["missing_keys"])
        if "score_head.bias" in absent:
            self.model.score_head.bias = None
        normalizer = {name for name in absent if name.startswith("normalizer.")}
        missing = sorted(absent - normalizer - {"score_head.bias"})
        unexpected = sorted(loading["unexpected_keys"])
        mismatched = sorted(str(name) for name in loading["mismatched_keys"])
        for names, what in (
            (mismatched, "of another shape in"),
            (missing, "missing from"),
            (unexpected, "not expected in"),
        ):
            if names:
                raise UserError(
                    f"{self.key}: tensors {what} a Beaver checkpoint: {', '.join(names[:3])} "
                    f"({len(names)} in all)"
                )
        self.normalize = self._normalize_function(config, normalizer)

    def _normalize_function(self, config: LlamaConfig, absent: set[str]) -> str:
        """identity, affine (reward) or scale (cost, which keeps the sign); applied only where the
        config says so."""
        if not getattr(config, "do_normalize", False):
            return "identity"
        functions = {"reward": "affine", "cost": "scale", "critic": "identity"}
        function = functions.get(getattr(config, "score_type", "reward"))
        if function is None:
            raise UserError(
                f"{self.key}: score_type {config.score_type!r} in its config is none of "
                f"{', '.join(functions)}"
            )
        for name in ("mean", "var"):  # safe-rlhf lets the config's values override the buffers
            value = getattr(config, name, None)
            if value is not None:
                getattr(self.model.normalizer, name).copy_(torch.as_tensor(value))
            elif f"normalizer.{name}" in absent and function != "identity":
                raise UserError(
                    f"{self.key}: its config says do_normalize, but neither it nor the checkpoint "
                    f"holds normalizer.{name}"
                )
        return function

    def _check_tokens(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"{self.key}: its tokenizer has no EOS token")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = (
                self.tokenizer.eos_token
            )  # harmless: what is attended to is the mask's to say
        vocabulary = self.model.config.vocab_size
        if self.tokenizer.pad_token_id >= vocabulary:
            raise UserError(
                f"{self.key}: its pad token {self.tokenizer.pad_token_id} lies outside the "
                f"vocabulary of {vocabulary}"
            )

    def text_length(self, prompt: Prompt, response: str) -> int:
        """Tokens that the model would read for this text, its template's own included; nothing is
        cut."""
        return len(self._tokenize(prompt, response))

    def _tokenize(self, prompt: Prompt, response: str) -> list[int]:
        eos = self.tokenizer.eos_token_id
        told = conversation_text(prompt)
        marked = (as_text(self.tokenizer, text) for text in (told, response))
        text = fill_template(self.settings.template, *marked)
        has_bos = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        ids = encode(self.tokenizer, text, not has_bos)["input_ids"]
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        return [*ids, eos] if self.settings.append_eos else ids

    def encode(self, prompt: Prompt, response: str) -> list[int]:
        """Token ids of the filled-in template; ends with exactly one EOS if `append_eos`, else with
        none of the tokenizer's own."""
        ids = self._tokenize(prompt, response)
        if len(ids) > self.window:
            if not self.truncates:
                raise UserError(
                    f"{self.key}: a text of {len(ids)} tokens exceeds its window of "
                    f"{self.window} (response {response[:40]!r}); "
                    "set truncate: true or shorten the prompts"
                )
            self.truncated += 1
            bos = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
            ids = bos + ids[len(ids) - self.window + len(bos) :]
        return ids

    def score(self, prompts: Sequence[Prompt], responses: list[str]) -> np.ndarray:
        return self._score_ids([self.encode(p, r) for p, r in zip(prompts, responses, strict=True)])

    def golden_score(self) -> float | None:
        """What these weights give to the model card's text, whatever this scorer's own template and
        EOS; None for another model."""
        if (
            self.settings.model != GOLDEN_MODEL
            and Path(self.settings.model).name != GOLDEN_MODEL.split("/")[1]
        ):
            return None
        text = fill_template(BeaverScorerSettings.model_fields["template"].default, *GOLDEN_TEXT)
        return float(self._score_ids([self.tokenizer(text)["input_ids"]])[0])

    def _score_ids(self, encoded: list[list[int]]) -> np.ndarray:
        """Scores of token ids, (num_texts,), batched by length."""
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores = np.empty(len(encoded))
        for begin in range(0, len(order), self.settings.batch_size):
            rows = order[begin : begin + self.settings.batch_size]
            batch = self.tokenizer.pad(
                {"input_ids": [encoded[i] for i in rows]}, return_tensors="pt"
            ).to(self.model.device)
            with torch.no_grad():
                values = self.model(batch["input_ids"], batch["attention_mask"])
                scores[rows] = self._normalized(values).cpu().numpy()
        return scores

    def _normalized(self, scores: torch.Tensor) -> torch.Tensor:
        """Safe-RLHF's `Normalizer.normalize`, (batch,) → (batch,)."""
        mean, std = (
            self.model.normalizer.mean,
            self.model.normalizer.var.sqrt() + NORMALIZER_EPSILON,
        )
        if self.normalize == "affine":
            return (scores - mean) / std
        return scores / std if self.normalize == "scale" else scores
