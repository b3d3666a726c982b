"""Tiny random models and tokenizers, saved as users save theirs."""

from pathlib import Path

import torch


def save_word_tokenizer(
    folder: Path, words: str, padding_side: str = "right", pad: bool = True
) -> int:
    """A word tokenizer that puts <s> in front, with <s>, </s> and <unk>; returns the vocabulary's
    size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        w: i for i, w in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", "<pad>", *words.split()]))
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | (
        {"pad_token": "<pad>"} if pad else {}
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side=padding_side, **special
    ).save_pretrained(folder)
    return len(vocabulary)


def tiny_llama_config(vocab_size: int, **more: object) -> object:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        **more,
    )


def save_tiny_causal_lm(folder: Path, seed: int = 0, layers: int = 2, width: int = 32) -> Path:
    from transformers import LlamaForCausalLM

    size = save_word_tokenizer(folder, " ".join(f"w{i}" for i in range(60)))
    config = tiny_llama_config(size)
    config.num_hidden_layers, config.hidden_size = layers, width
    config.head_dim = width // 4
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_classifier(folder: Path, words: str, labels: int = 1, **config_keys: object) -> Path:
    """A random Llama that scores texts of these words, far apart."""
    from transformers import LlamaForSequenceClassification

    size = save_word_tokenizer(folder, words)
    torch.manual_seed(0)
    config = tiny_llama_config(size, num_labels=labels, **config_keys)
    model = LlamaForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.score.weight, std=2.0)
    model.save_pretrained(folder)
    return folder


def save_adapter(base, folder, seed=0, targets=("q_proj", "down_proj")):
    """A LoRA adapter that changes the model visibly."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM"),
    )
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def tiny_adapter(policy, folder, seed=0):
    """A real LoRA adapter with weights away from zero, saved in PEFT's format."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(
        policy.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    model.unload()
    return folder
