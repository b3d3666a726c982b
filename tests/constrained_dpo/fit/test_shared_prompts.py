"""Shared prompts: log-probabilities and gradients equal those of padded rows, or the layout is not
used."""

import copy
import re

import datasets
import numpy as np
import pytest
import torch
import transformers
from peft import get_peft_model_state_dict

from constrained_dpo.fit import shared_prompts
from constrained_dpo.fit.rows import LengthBuckets, PaddedCollator, row_lengths
from constrained_dpo.fit.shared_prompts import (
    SHARED_INPUTS,
    SharedPromptCollator,
    costs,
    why_not_shared,
)
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from tests.helpers.families import CONFIGS, REFUSED, SIZE, VOCABULARY, K, model_of
from tests.helpers.fits import built_trainer, ragged_rows
from tests.helpers.models import save_word_tokenizer


def rows_of(count: int = 4, seed: int = 0) -> datasets.Dataset:
    rng = np.random.default_rng(seed)
    ids = lambda low, high: rng.integers(1, VOCABULARY, rng.integers(low, high)).tolist()
    prompts, responses = (
        [ids(6, 14) for _ in range(count)],
        [[ids(1, 9) for _ in range(K)] for _ in range(count)],
    )
    return datasets.Dataset.from_dict(
        {
            "prompt_ids": prompts,
            "responses_ids": responses,
            "ref_logps": np.zeros((count, K), np.float32),
        }
    )


def shared_logps(model, rows) -> torch.Tensor:
    batch = SharedPromptCollator(0)(list(rows))
    return model(**{name: batch[name] for name in SHARED_INPUTS}, num_responses=K)


def padded_logps(model, rows, side: str) -> torch.Tensor:
    """The model's own forward on rows padded on either side; log-softmax and sum done here."""
    sequences = [(row["prompt_ids"], response) for row in rows for response in row["responses_ids"]]
    longest = max(len(p) + len(r) for p, r in sequences)
    ids, mask = (
        torch.zeros(len(sequences), longest, dtype=torch.long),
        torch.zeros(len(sequences), longest, dtype=torch.long),
    )
    begins = [longest - len(p) - len(r) if side == "left" else 0 for p, r in sequences]
    for row, ((prompt, response), begin) in enumerate(zip(sequences, begins, strict=True)):
        ids[row, begin : begin + len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[row, begin : begin + len(prompt) + len(response)] = 1
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).logits
    logps = logits.float().log_softmax(-1)
    sums = []
    for row, ((prompt, response), begin) in enumerate(zip(sequences, begins, strict=True)):
        at = torch.arange(begin + len(prompt) - 1, begin + len(prompt) + len(response) - 1)
        sums.append(logps[row, at, torch.tensor(response)].sum())
    return torch.stack(sums).view(-1, K)


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_shared_log_probabilities_are_the_padded_ones(name, attention, lora):
    model, rows = model_of(CONFIGS[name], attention, lora), rows_of()
    with torch.no_grad():
        shared = shared_logps(model, rows)
        for side in ("left", "right"):
            torch.testing.assert_close(
                shared, padded_logps(model, rows, side), atol=1e-5, rtol=1e-5
            )
    assert why_not_shared(model, rows, 0, 2e-5) is None


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_not_used(name):
    config, pattern = REFUSED[name]
    reason = why_not_shared(model_of(config), rows_of(), 0, 2e-5)
    assert reason is not None and re.search(pattern, reason), reason


def test_bfloat16_stays_within_its_tolerance_and_still_refuses_a_window():
    rows = rows_of()
    assert why_not_shared(model_of(CONFIGS["llama"]).bfloat16(), rows, 0, 0.05) is None
    assert "differ" in why_not_shared(
        model_of(REFUSED["mistral, window shorter than a row"][0]).bfloat16(), rows, 0, 0.05
    )


def test_a_response_that_others_leak_into_is_found(monkeypatch):
    """The second check alone: a mask that lets the last response see the others passes no exactness
    test, whatever the tolerance."""

    def causal(segments, dtype):
        length = segments.shape[1]
        return torch.full(
            (len(segments), 1, length, length), torch.finfo(dtype).min, dtype=dtype
        ).triu(1)

    monkeypatch.setattr(shared_prompts, "block_mask", causal)
    assert "depends on the other responses" in why_not_shared(
        model_of(CONFIGS["llama"]), rows_of(), 0, 1e9
    )


def test_gradients_are_the_padded_ones_also_in_pieces(monkeypatch):
    rows, shared = rows_of(), []
    for pieces in (False, True):
        if pieces:
            monkeypatch.setattr(
                shared_prompts, "LOGITS_AT_ONCE", 5 * VOCABULARY
            )  # five positions at a time
        model = model_of(CONFIGS["llama"], lora=True)
        (shared_logps(model, rows) * torch.arange(1.0, 1 + K)).sum().backward()
        named = model.named_parameters()
        shared.append({n: p.grad.clone() for n, p in named if p.requires_grad})
    model = model_of(CONFIGS["llama"], lora=True)
    (padded_logps(model, rows, "right") * torch.arange(1.0, 1 + K)).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = parameter.grad.abs().max()
            for gradients in shared:
                assert (gradients[name] - parameter.grad).abs().max() <= 1e-4 * scale, name


def test_long_responses_to_a_short_prompt_are_padded():
    """Σ length² of one sequence outgrows the prompt's saving; the costs are those of a hand
    calculation."""
    config = CONFIGS["llama"]
    row = {"prompt_ids": [list(range(4))], "responses_ids": [[list(range(40))] * K]}
    shared, alone = costs(*row_lengths(row), config)
    assert shared == 6 * 32 * (3 + 3 * 41) + 126**2 and alone == 6 * 32 * 132 + 3 * 44**2
    rows = datasets.Dataset.from_dict(row | {"ref_logps": np.zeros((1, K))})
    assert "times the padded sequences" in why_not_shared(model_of(config), rows, 0, 2e-5)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_fit_chooses_shared_prompts_and_its_loss_is_the_padded_one(quantization, tmp_path):
    policy = load_policy(
        PolicySettings(model="quickstart", quantization=quantization, dtype="float32")
    )
    rows, losses = ragged_rows(policy, 24, seed=1), {}
    for shared in (True, False):
        settings = {"steps": 4, "learning_rate": 2e-3, "shared_prompts": shared}
        with built_trainer(copy.deepcopy(policy), rows, tmp_path, seed=3, **settings) as trainer:
            reason = None if shared else "fit.shared_prompts is false"
            assert trainer.padded_because == reason
            collator = SharedPromptCollator if shared else PaddedCollator
            assert isinstance(trainer.data_collator, collator)
            trainer.train()
            losses[shared] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    np.testing.assert_allclose(losses[True], losses[False], atol=1e-4)


@pytest.mark.parametrize(("longest", "reason"), [(8, None), (40, "differ from padded rows")])
def test_the_layout_is_decided_by_held_out_rows_too(longest, reason, tmp_path):
    """A window longer than every fitted row and shorter than a held-out one: the measured residual
    would be wrong."""
    size = save_word_tokenizer(tmp_path / "model", " ".join(f"w{i}" for i in range(60)))
    config = transformers.MistralConfig(
        **SIZE | {"vocab_size": size}, sliding_window=24, bos_token_id=1, eos_token_id=2
    )
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    policy = load_policy(
        PolicySettings(model=str(tmp_path / "model"), quantization="none", dtype="float32")
    )
    fitted, held_out = (
        datasets.Dataset.from_dict(
            {
                "prompt_ids": [[5] * n] * 3,
                "responses_ids": [[[6, 7], [8, 9]]] * 3,
                "ref_logps": np.zeros((3, 2), np.float32),
            }
        )
        for n in (8, longest)
    )
    with built_trainer(policy, fitted, tmp_path, held_out=held_out, batch_size=2) as trainer:
        layout = trainer.padded_because
        assert layout is None if reason is None else reason in layout


def test_accumulated_steps_equal_one_large_batch(plain_policy, tmp_path):
    """1 × 8 and 8 × 1, with shared prompts and with rows grouped by length."""
    rows, weights = ragged_rows(plain_policy, 40, seed=2), []
    settings = {"steps": 5, "learning_rate": 1e-3, "group_by_length": True}
    for batch, accumulation in ((8, 1), (1, 8)):
        sizes = {"batch_size": batch, "gradient_accumulation": accumulation}
        policy = copy.deepcopy(plain_policy)
        with built_trainer(policy, rows, tmp_path, seed=3, **settings, **sizes) as trainer:
            trainer.train()
            state = get_peft_model_state_dict(trainer.model)
            weights.append({name: value.clone() for name, value in state.items()})
    moved = max(value.abs().max() for name, value in weights[0].items() if "lora_B" in name)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=float(0.02 * moved), rtol=1e-3)


def test_length_buckets_are_a_permutation_of_rows_of_about_equal_length():
    rng = np.random.default_rng(0)
    order = LengthBuckets(rng.integers(5, 204, 403), 8, seed=1)
    epochs = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert sorted(epochs[-1]) == list(range(403)) and len(order) == 403
    assert epochs[0] == epochs[2] != epochs[1]
    waste = lambda batches: np.mean([1 - np.mean(b) / np.max(b) for b in batches])
    batches = np.split(order.lengths[epochs[0]][:400], 50)
    assert waste(batches) < 0.05 < 0.3 < waste(np.split(order.lengths[:400], 50))
    assert (
        np.corrcoef(np.arange(50), [np.max(b) for b in batches])[0, 1] < 0.5
    )  # no trend from short to long

    last = []
    for epoch in range(
        60
    ):  # the three rows of the last step, which weigh more than others, are any three
        order.set_epoch(epoch)
        last += list(order)[-3:]
    assert (
        0.4 < np.mean(order.lengths[last]) / np.mean(order.lengths) < 1.6 and len(set(last)) > 100
    )
