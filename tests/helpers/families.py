"""Tiny random models: architectures that take the shared layout, and those that refuse it."""

import torch
import transformers
from peft import LoraConfig, get_peft_model

from constrained_dpo.fit.shared_prompts import add_shared_forward

VOCABULARY, K = 97, 3


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


SIZE = SMALL | {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.3,
    "n_positions": 128,
}


WIDE = {"sliding_window": 64}


CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZE),
    "qwen2": transformers.Qwen2Config(**SIZE),
    "qwen3": transformers.Qwen3Config(**SIZE, head_dim=8),
    "gpt2": transformers.GPT2Config(**GPT2),
    "mistral": transformers.MistralConfig(**SIZE, sliding_window=None),
    "mistral, window longer than a row": transformers.MistralConfig(**SIZE, **WIDE),
    "gemma": transformers.GemmaConfig(**SIZE, head_dim=8),
    "gemma3, window longer than a row": transformers.Gemma3TextConfig(**SIZE, head_dim=8, **WIDE),
}


REFUSED = {
    "mistral, window shorter than a row": (
        transformers.MistralConfig(**SIZE, sliding_window=8),
        "differ from padded rows",
    ),
    "qwen2, window in the second layer": (
        transformers.Qwen2Config(
            **SIZE, use_sliding_window=True, sliding_window=8, max_window_layers=1
        ),
        "differ from padded rows",
    ),
    "gemma2, capped logits": (
        transformers.Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=2.0),
        "differ from padded rows",
    ),
    "mamba, recurrent": (
        transformers.MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            initializer_range=0.3,
        ),
        "the model refuses it|differ from padded rows",
    ),
}


def model_of(config, attention: str | None = None, lora: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention
    ).eval()
    add_shared_forward(model)
    if lora:
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model
