"""The `classifier` scorer: any AutoModelForSequenceClassification, batched by length."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.errors import UserError
from data_prep.models.checkpoints import fingerprint_model
from data_prep.models.tokens import OPEN, as_text, encode, encode_pair, window_of
from data_prep.prompts.messages import Prompt, conversation_text
from data_prep.prompts.templates import lacking_template
from data_prep.scorers.calibration import measure_drift
from data_prep.scorers.chats import chat_text
from data_prep.scorers.classifier_loading import load_classifier, set_padding
from data_prep.scorers.model_settings import ClassifierScorerSettings
from data_prep.scorers.options import OUTSIDE_FINGERPRINT
from data_prep.scorers.protocol import Scorer
from data_prep.scorers.settings import fill_template

CUSTOM_TOLERANCE = 1e-2
"""How far a text's output may move with its batch, in shares of its size, before modelling code of
a checkpoint's own is refused."""


class ClassifierScorer(Scorer):
    """One label's output of a sequence classifier, as float64. Raises UserError for a missing head,
    an ambiguous label, a text over its window, and a model whose output is not one logit per text
    and label."""

    window: int

    def __init__(self, settings: ClassifierScorerSettings) -> None:
        self.settings, self.key = settings, f"scorer {settings.model}"
        self.reads_conversation = settings.text != "pair"
        self.tokenizer, self.model = load_classifier(settings, self.key)
        self.label = self._label_index()
        self._check_output()
        set_padding(self.tokenizer, self.model, self.key)
        self._check_layout()
        window = window_of(self.model)
        self.truncates = settings.truncate
        self.window = min(
            v for v in (settings.max_length, window, self.tokenizer.model_max_length) if v
        )
        if not type(self.model).__module__.startswith("transformers."):
            self._check_custom_code()
        shape = settings.model_dump_json(exclude=OUTSIDE_FINGERPRINT)
        weights = fingerprint_model(settings.model, settings.revision)
        self.fingerprint = f"classifier:{weights}:{self.label}:{shape}"

    def _check_layout(self) -> None:
        settings = self.settings
        if settings.text == "template" and "{response}" not in (settings.template or ""):
            raise UserError(
                f"scorer {settings.model}: text: template needs a template with {{response}} (and "
                "mostly {prompt})"
            )
        if settings.text == "chat" and (problem := lacking_template(self.tokenizer)):
            raise UserError(
                f"scorer {settings.model}: text: chat, but its tokenizer has {problem}; "
                "use pair or template"
            )

    def quantization_drift(self) -> dict[str, Any] | None:
        """`measure_drift` against the unquantized weights in the scorer's dtype, loaded now and
        freed after; None where not quantized.

        Where they cannot be loaded beside the rest (often the reason for quantizing), `reason` says
        so instead.
        """
        import torch

        if self.settings.quantization == "none":
            return None
        drift: dict[str, Any] = {
            "quantization": self.settings.quantization,
            "against": self.settings.dtype,
        }
        try:
            drift |= measure_drift(
                self, ClassifierScorer(self.settings.model_copy(update={"quantization": "none"}))
            )
        except (
            UserError,
            RuntimeError,
            MemoryError,
        ) as error:  # torch's out of memory is a RuntimeError
            drift["reason"] = (str(error) or type(error).__name__).splitlines()[0]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return drift

    def _label_index(self) -> int:
        config, label = self.model.config, self.settings.label
        if label is None:
            if config.num_labels != 1:
                names = ", ".join(f"{i}={n}" for i, n in config.id2label.items())
                raise UserError(
                    f"scorer {self.settings.model}: it has {config.num_labels} labels ({names}); "
                    "set `label`"
                )
            return 0
        named = config.label2id.get(str(label), -1)
        index = label if isinstance(label, int) else named
        if named not in (-1, index):
            raise UserError(
                f"scorer {self.settings.model}: label: {label} is the name of index {named}, and "
                f'as an index it is not that label; write the name in quotes, as in "{label}"'
            )
        if not 0 <= index < config.num_labels:
            raise UserError(
                f"scorer {self.settings.model}: no label {label!r}; it has "
                f"{', '.join(map(str, config.label2id))}"
            )
        return index

    def _check_output(self) -> None:
        """A softmax over one label is 1 for every text."""
        if (
            self.settings.output != "logit"
            and self.model.config.num_labels == 1
            and not self._independent_labels
        ):
            raise UserError(
                f"{self.key}: output: {self.settings.output} needs several labels (it has one); "
                "use output: logit"
            )

    @property
    def _independent_labels(self) -> bool:
        """Whether each label has a probability of its own, as transformers trains
        `multi_label_classification`."""
        return self.model.config.problem_type == "multi_label_classification"

    def _check_custom_code(self) -> None:
        """Modelling code of the checkpoint's own may find its last token in its own way: a text's
        output must not depend on its batch."""
        texts = [
            self._tokenize("Hello", "Hello! How can I help you today?"),
            self._tokenize("Hi", "Hi"),
        ]
        together, alone = (
            self._forward(texts),
            np.concatenate([self._forward([text]) for text in texts]),
        )
        worst, architecture = np.abs(together - alone).argmax(), type(self.model).__name__
        if (
            abs(together - alone)[worst] > CUSTOM_TOLERANCE * np.abs(alone).max()
            and self.settings.batch_size > 1
        ):
            raise UserError(
                f"{self.key}: its own modelling code ({architecture}) gives a text "
                f"{together[worst]:.4g} "
                "in a padded batch and "
                f"{alone[worst]:.4g} alone; set batch_size: 1"
            )

    def text_length(self, prompt: Prompt, response: str) -> int:
        """Tokens that the model would read for this text, its format's own included; nothing is
        cut."""
        return len(self._tokenize(prompt, self._closed(response))["input_ids"])

    def _closed(self, response: str) -> str:
        """The response, control tokens in it marked as text, with the EOS that the recipe asks
        for."""
        closing = self.tokenizer.eos_token or "" if self.settings.append_eos else ""
        return as_text(self.tokenizer, response) + closing

    def _tokenize(self, prompt: Prompt, response: str) -> dict[str, list[int]]:
        """Token ids of a prompt and a response as `_closed` gives it."""
        settings, told = self.settings, as_text(self.tokenizer, conversation_text(prompt))
        if settings.text == "pair":
            if OPEN in told + response:
                return encode_pair(self.tokenizer, told, response)
            return self.tokenizer(told, response)
        if settings.text == "template":
            text = fill_template(settings.template or "", told, response)
            has_bos = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
            return encode(self.tokenizer, text, not has_bos)
        text = chat_text(
            self.tokenizer, prompt, response, key=self.key, advice="use text: template"
        )
        return encode(self.tokenizer, text, add_special_tokens=False)

    def _encode(self, prompt: Prompt, response: str) -> dict[str, list[int]]:
        settings, response = self.settings, self._closed(response)
        encoded = self._tokenize(prompt, response)
        length = len(encoded["input_ids"])
        if length > self.window:
            if not self.truncates:
                raise UserError(
                    f"scorer {settings.model}: a text of {length} tokens exceeds its window of "
                    f"{self.window} "
                    f"(response {response[:40]!r}); set truncate: true or shorten the prompts"
                )
            self.truncated += 1
            encoded = self._truncate(encoded, prompt, response)
        return dict(encoded)

    def _truncate(
        self, encoded: dict[str, list[int]], prompt: Prompt, response: str
    ) -> dict[str, list[int]]:
        """The response is what is judged, so the prompt's beginning goes first."""
        if self.settings.text == "pair":
            told = conversation_text(prompt)
            marked = as_text(self.tokenizer, told)
            if OPEN in marked + response:
                return encode_pair(self.tokenizer, marked, response, self.window)
            side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "left"
            response_fits = len(self.tokenizer("", response)["input_ids"]) < self.window
            strategy = "only_first" if response_fits else "longest_first"
            try:
                return self.tokenizer(told, response, truncation=strategy, max_length=self.window)
            finally:
                self.tokenizer.truncation_side = side
        return {key: values[-self.window :] for key, values in encoded.items()}

    def score(self, prompts: Sequence[Prompt], responses: list[str]) -> np.ndarray:
        encoded = [self._encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        pad = self.tokenizer.pad_token_id
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
        # A decoder finds the last token as the last that is not padding; a text that really
        # ends in the pad token (often EOS) would lose it, so it is scored alone and unpadded.
        alone = [i for i in order if encoded[i]["input_ids"][-1] == pad]
        batched = [i for i in order if encoded[i]["input_ids"][-1] != pad]
        scores = np.empty(len(encoded))
        size = self.settings.batch_size
        # in tokens: the texts come by their length
        total = sum(len(encoded[i]["input_ids"]) for i in batched)
        with tqdm(total=total, desc="score", unit="token", disable=None, leave=False) as bar:
            for begin in range(0, len(batched), size):
                rows = batched[begin : begin + size]
                scores[rows] = self._forward([encoded[i] for i in rows])
                bar.update(sum(len(encoded[i]["input_ids"]) for i in rows))
        config = self.model.config.get_text_config()
        config.pad_token_id = None
        for i in alone:
            scores[i] = self._forward([encoded[i]])[0]
        config.pad_token_id = pad
        return scores

    def _forward(self, batch: list[dict[str, list[int]]]) -> np.ndarray:
        """The label's `output` for one padded batch, (batch,)."""
        import torch

        inputs = self.tokenizer.pad(batch, padding_side="right", return_tensors="pt")
        with torch.no_grad():
            logits = getattr(self.model(**inputs.to(self.model.device)), "logits", None)
        expected = (len(batch), self.model.config.num_labels)
        shape = None if logits is None else tuple(logits.shape)
        if logits is None or shape != expected:
            raise UserError(
                f"{self.key}: {type(self.model).__name__} gives "
                f"{'no logits' if shape is None else f'logits of shape {shape}'} for "
                f"{expected[0]} texts and {expected[1]} labels, not {expected}; wrap it in a "
                "python scorer that picks its score"
            )
        logits = logits.float()
        if self.settings.output != "logit":
            logits = (
                torch.nn.functional.logsigmoid(logits)
                if self._independent_labels
                else logits.log_softmax(-1)
            )
        chosen = logits[:, self.label].cpu().numpy()
        return np.exp(chosen) if self.settings.output == "probability" else chosen
