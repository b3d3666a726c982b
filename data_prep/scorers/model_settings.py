"""The `scorer` blocks of scorers that load a model and read texts: classifier, beaver, guard."""

import math
from typing import Literal

from pydantic import Field, model_validator

from data_prep.scorers.options import ScorerOptions
from data_prep.settings import LocalPath


class LoadedScorerSettings(ScorerOptions):
    """A scorer with a model of its own."""

    model: LocalPath = Field(description="local folder or hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    max_length: int | None = Field(None, ge=8, description="window in tokens; default: the model's")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where it runs; auto: the GPU where there is one"
    )
    allow_pickle: bool = Field(
        False,
        description="accept pickled weights (pytorch_model.bin) where there are no safetensors",
    )

    @property
    def place(self) -> str:
        return self.model

    @property
    def models(self) -> list[tuple[str, str | None]]:
        return [(self.model, self.revision)]


class ClassifierScorerSettings(LoadedScorerSettings):
    """Any AutoModelForSequenceClassification with its tokenizer."""

    type: Literal["classifier"]
    label: str | int | None = Field(
        None,
        description="which label's output is the score (name or index); needed with several labels",
    )
    text: Literal["pair", "template", "chat"] = Field(
        "pair", description="(prompt, response) pair, `template`, or its chat template"
    )
    template: str | None = Field(
        None,
        description="for text: template; with {response}, and {prompt} unless the response is "
        "judged alone",
    )
    append_eos: bool = Field(
        False, description="append the tokenizer's EOS text (reward models trained with it need it)"
    )
    truncate: bool = Field(
        False,
        description="cut the prompt's side of texts over max_length, counted; false: such texts "
        "are an error",
    )
    batch_size: int = Field(64, ge=1, description="texts per forward")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="the model's dtype"
    )
    trust_remote_code: bool = Field(
        False, description="run modelling code that comes with the checkpoint"
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="storage of the weights below the head; `check` and `prepare` measure how far "
        "scores move from those in `dtype`",
    )
    output: Literal["logit", "log_probability", "probability"] = Field(
        "logit",
        description="of the label: its logit, or by softmax over the labels (sigmoid where the "
        "config's problem_type is multi_label)",
    )

    @property
    def raw_range(self) -> tuple[float, float]:
        if self.output == "logit":
            return -math.inf, math.inf
        return (0.0, 1.0) if self.output == "probability" else (-math.inf, 0.0)


class BeaverScorerSettings(LoadedScorerSettings):
    """PKU's Beaver reward and cost models (Safe-RLHF, arXiv:2310.12773), read from their
    checkpoints without the safe-rlhf package."""

    type: Literal["beaver"]
    model: LocalPath = Field(
        description="local folder or hub id, e.g. PKU-Alignment/beaver-7b-v1.0-reward"
    )
    negate: bool = Field(
        False,
        description="true for a cost (higher is worse); needed for a checkpoint that says it is "
        "one",
    )
    template: str = Field(
        "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}",
        description="what it reads; contains {prompt} and {response}",
    )
    append_eos: bool = Field(
        True,
        description="end the text with EOS: the models were trained so, their cards' examples "
        "leave it out",
    )
    truncate: bool = Field(
        False,
        description="cut the beginning of texts over max_length, counted; false: such texts are "
        "an error",
    )
    batch_size: int = Field(16, ge=1, description="texts per forward")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="the backbone's dtype; head and score are float32"
    )


class GuardScorerSettings(LoadedScorerSettings):
    """A generative guard (Llama-Guard, Qwen3Guard style): log p(safe) − log p(unsafe) where it
    writes its verdict, in nats."""

    type: Literal["guard"]
    model: LocalPath = Field(description="local folder or hub id of a causal language model")
    safe: str | list[str] = Field(
        "safe", description="the word of its verdict that says safe, or several (Qwen3Guard: Safe)"
    )
    unsafe: str | list[str] = Field(
        "unsafe",
        description="the word that says unsafe, or several (Qwen3Guard: [Unsafe, Controversial])",
    )
    template: str | None = Field(
        None,
        description="what it reads, with {prompt} and {response}; null: its chat template with a "
        "user and an assistant message",
    )
    verdict_prefix: str | None = Field(
        None,
        description="text between what it reads and its verdict; null: found by letting it answer "
        "on two canned texts",
    )
    min_mass: float = Field(
        0.5,
        gt=0,
        le=1,
        description="least p(safe) + p(unsafe) at the verdict on the canned texts; below it the "
        "guard is refused",
    )
    truncate: bool = Field(
        False,
        description="cut the beginning of prompts whose text is over max_length, counted; false: "
        "an error",
    )
    batch_size: int = Field(16, ge=1, description="texts per forward")
    quantization: Literal["nf4", "int8", "none"] = Field(
        "none", description="storage of its weights"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="compute dtype; the score is float32"
    )
    trust_remote_code: bool = Field(
        False, description="run modelling code that comes with the checkpoint"
    )

    @model_validator(mode="after")
    def _readable(self) -> "GuardScorerSettings":
        for field in ("{prompt}", "{response}"):
            if self.template is not None and field not in self.template:
                raise ValueError(f"template does not contain {field}")
        words = [*self.safe_words, *self.unsafe_words]
        if not (
            self.safe_words and self.unsafe_words and all(word.strip() for word in words)
        ) or len(set(words)) < len(words):
            raise ValueError(
                "safe and unsafe each name at least one word, none empty and none twice"
            )
        return self

    @property
    def safe_words(self) -> list[str]:
        return [self.safe] if isinstance(self.safe, str) else self.safe

    @property
    def unsafe_words(self) -> list[str]:
        return [self.unsafe] if isinstance(self.unsafe, str) else self.unsafe
