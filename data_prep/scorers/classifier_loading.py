"""Loading a sequence classifier: whole, quantized as asked, with a pad token that it knows."""

from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import UserError
from data_prep.models.checkpoints import (
    check_model_folder,
    check_tokenizer,
    explained_loading,
    resolve_device,
)
from data_prep.models.loading import LOADED_WITH, load_checkpoint, require_used
from data_prep.models.quantization import check_quantization, keep_exact_on_cpu
from data_prep.scorers.model_settings import ClassifierScorerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_classifier(
    settings: ClassifierScorerSettings, key: str
) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
    """Load tokenizer and model, whole and quantized as asked, on the device; key: names the scorer
    in messages.

    Raises UserError for what cannot be loaded, for weights that are not in the checkpoint and for
    weights that are not read from it.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(settings.model)
    device = resolve_device(settings.device, f"{key}: device")
    if folder.is_dir():
        loader = "AutoModelForSequenceClassification"
        check_model_folder(folder, key, loader, settings.allow_pickle)
    with explained_loading(key, settings.model):
        tokenizer = AutoTokenizer.from_pretrained(
            settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
        left = _left_unquantized(settings)
    model, loading = load_checkpoint(
        AutoModelForSequenceClassification,
        settings.model,
        key,
        device=device,
        keep=left,
        **settings.model_dump(include=LOADED_WITH),
    )
    check_tokenizer(tokenizer, settings.model, settings.revision, key)
    mismatched = {str(key) for key in loading.get("mismatched_keys", ())}
    if fresh := sorted(set(loading["missing_keys"]) | mismatched):
        raise UserError(
            f"scorer {settings.model}: weights {', '.join(fresh[:3])} are not in the "
            "checkpoint and were newly initialised, so its scores would be noise; use a "
            "checkpoint saved with its classification head"
        )
    require_used(loading, key, settings.model)
    if settings.quantization != "none":
        head = _head_modules(model)
        check_quantization(model, settings.quantization, f"{key}: quantization", head)
        keep_exact_on_cpu(model)
    return tokenizer, model.eval().to(device)


def set_padding(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", key: str) -> None:
    """Give model and tokenizer one pad id: decoder classifiers find the last token by it.

    Raises UserError where there is none that both know.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{key}: its tokenizer has neither a pad nor an EOS token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    pad, vocabulary = (
        tokenizer.pad_token_id,
        getattr(model.config.get_text_config(), "vocab_size", None),
    )
    if vocabulary is not None and pad >= vocabulary:
        raise UserError(
            f"{key}: its pad token {tokenizer.pad_token} ({pad}) lies outside the "
            f"model's vocabulary of {vocabulary}; save "
            "its tokenizer with a pad token that the model knows"
        )
    model.config.get_text_config().pad_token_id = pad


def _head_modules(model: "PreTrainedModel") -> list[str]:
    """What stands beside the base: the classification head, which is never quantized."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def _left_unquantized(settings: ClassifierScorerSettings) -> list[str] | None:
    """The modules that stay as they are where the rest is quantized; None where nothing is."""
    if settings.quantization == "none":
        return None
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    trusted = settings.trust_remote_code
    config = AutoConfig.from_pretrained(
        settings.model, revision=settings.revision, trust_remote_code=trusted
    )
    with torch.device("meta"):
        empty = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trusted)
    return _head_modules(empty)
