"""The keys of the recipe's `prompts` block."""

from typing import Literal

from pydantic import AliasChoices, Field

from data_prep.settings import LocalPath, Settings


class DatasetSource(Settings):
    """A hub dataset, a local folder of one, or prompts that ship with the toolkit (`dataset:
    quickstart`, the embedded world's; `dataset: everyday`, questions to a chat model)."""

    dataset: LocalPath = Field(
        description="hub id, folder (written by save_to_disk, or of parquet and jsonl files), "
        "`quickstart` or `everyday`"
    )
    name: str | None = Field(
        None, description="the hub dataset's configuration, e.g. alpaca-7b of PKU-SafeRLHF"
    )
    split: str = Field(
        "train", description="the dataset's split; in a folder of files those whose name holds it"
    )
    revision: str | None = Field(None, description="branch, tag or commit of the hub dataset")


class PromptSettings(Settings):
    """Where prompts come from and how they are put to the policy."""

    model_config = Settings.model_config | {"populate_by_name": True}

    source: LocalPath | DatasetSource = Field(
        validation_alias=AliasChoices("source", "train"),
        description="file (jsonl, ndjson, json, csv, tsv, txt, parquet; .gz), folder or "
        "{dataset: ...}",
    )
    format: Literal["text", "chat"] = Field(
        "text", description="text: put into `template`; chat: the tokenizer's chat template"
    )
    template: str = Field(
        "{prompt}", description="for format text: what the policy reads; must contain {prompt}"
    )
    max_fit: int | None = Field(
        None, ge=1, description="keep at most so many fit prompts (lowest hash first)"
    )
    max_test: int | None = Field(
        None, ge=2, description="keep at most so many test prompts (lowest hash first)"
    )
    test: LocalPath | DatasetSource | float = Field(
        0.2,
        validation_alias=AliasChoices("test", "eval"),
        description="file or dataset of test prompts, or the fraction held out",
    )
    too_long: Literal["error", "drop"] = Field(
        "error", description="prompts that do not fit: an error, or dropped and counted"
    )
