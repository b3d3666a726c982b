"""What a model's config and tokenizer say of it, without its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from constrained_dpo.check.downloads import download_line, needs_download
from data_prep.errors import UserError
from data_prep.models.checkpoints import check_model_folder, explained_loading
from data_prep.models.loading import settle_published
from data_prep.models.quantization import Quantization
from data_prep.prompts.templates import lacking_template

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

OPTION = "--policy"


@dataclass(frozen=True)
class ModelFacts:
    """A causal language model.

    window: the longest sequence in tokens, None if its config does not say; gpu_bytes: of the GPU,
    0 without one; published: the quantization that a checkpoint needs which its publisher
    quantized (`none`: it is turned back into plain weights), None for plain weights.
    """

    source: str
    parameters: int
    chat: bool
    window: int | None
    published: Quantization | None
    gpu_bytes: int
    tokenizer: "PreTrainedTokenizerBase"


def read_model(source: str) -> ModelFacts:
    """Read what config and tokenizer say. Raises UserError where it is no language model."""
    import torch

    if Path(source).expanduser().is_dir():
        check_model_folder(Path(source).expanduser(), OPTION, "AutoModelForCausalLM")
    config = read_config(source, OPTION)
    kinds = config.architectures or []
    if kinds and not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        raise UserError(
            f"{OPTION}: {source} is a {kinds[0]}, which does not write; give a causal language "
            "model"
        )
    published = _published(getattr(config, "quantization_config", None))
    settle_published(config, "none", OPTION, source)
    tokenizer = read_tokenizer(source, OPTION)
    on_gpu = torch.cuda.is_available()
    return ModelFacts(
        source=source,
        parameters=count_parameters(config, OPTION),
        chat=lacking_template(tokenizer) is None,
        window=getattr(config.get_text_config(), "max_position_embeddings", None),
        published=published,
        gpu_bytes=torch.cuda.get_device_properties(0).total_memory if on_gpu else 0,
        tokenizer=tokenizer,
    )


def _published(facts: Any) -> Quantization | None:
    """The quantization of the recipe that a checkpoint's own asks for."""
    if not facts:
        return None
    facts = facts if isinstance(facts, dict) else facts.to_dict()
    if facts.get("load_in_4bit"):
        return "nf4"
    return "int8" if facts.get("load_in_8bit") else "none"


def read_config(source: str, where: str) -> "PretrainedConfig":
    """A model's config, from a folder or the hub's cache. Raises UserError where there is none."""
    from transformers import AutoConfig

    folder = Path(source).expanduser()
    if folder.is_file():
        raise UserError(f"{where}: {source} is a file; give a model's folder or a hub id")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{where}: {source} has no config.json; give the folder of a saved model")
    if not folder.is_dir() and (source.startswith((".", "/", "~")) or needs_download(source, None)):
        raise UserError(download_line(where, source))
    with explained_loading(where, source):
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else source)


def read_tokenizer(source: str, where: str) -> "PreTrainedTokenizerBase":
    """A model's tokenizer. Raises UserError where it cannot be loaded."""
    from transformers import AutoTokenizer

    folder = Path(source).expanduser()
    with explained_loading(where, source):
        return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else source)


def count_parameters(config: "PretrainedConfig", where: str) -> int:
    """Parameters of the model without a head, none of them allocated."""
    import torch
    from transformers import AutoModel

    with explained_loading(where, config.name_or_path), torch.device("meta"):
        return int(AutoModel.from_config(config).num_parameters())
