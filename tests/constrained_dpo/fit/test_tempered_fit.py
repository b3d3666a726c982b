"""A fit of a tempered policy: in every layout log π_θ is that of the model's logits over T."""

import numpy as np
import pytest
import torch

from data_prep.models.policy import load_policy
from data_prep.models.settings import LoraSettings, PolicySettings
from data_prep.models.temperature import untempered
from tests.helpers.fits import LORA, built_trainer, ragged_rows, randomize

T = 0.7
HEAD = LoraSettings(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "lm_head"])


@pytest.fixture(scope="module")
def tempered():
    settings = PolicySettings(
        model="quickstart", quantization="none", dtype="float32", temperature=T
    )
    return load_policy(settings)


def logps_by_hand(model, rows) -> np.ndarray:
    """Of the untempered logits over T, (num_rows, 2)."""
    table = []
    with torch.no_grad(), untempered(model):
        for row in rows:
            for response in row["responses_ids"]:
                logits = model(torch.tensor([row["prompt_ids"] + response])).logits[0].double()
                steps = (logits[len(row["prompt_ids"]) - 1 : -1] / T).log_softmax(-1)
                table.append(steps.gather(1, torch.tensor(response)[:, None]).sum().item())
    return np.reshape(table, (len(rows), -1))


@pytest.mark.parametrize(("lora", "shared"), [(LORA, False), (LORA, True), (HEAD, False)])
def test_a_fit_sees_the_tempered_policy(tempered, lora, shared, tmp_path):
    """Padded rows through TRL's fused head, shared prompts, and a head with an adapter."""
    rows = ragged_rows(tempered, 6, seed=0)
    settings = {"lora": lora, "batch_size": 6, "shared_prompts": shared}
    with built_trainer(tempered, rows, tmp_path, **settings) as trainer:
        assert (trainer.padded_because is None) == shared
        randomize(trainer)
        trainer.model.eval()
        with torch.no_grad():
            inputs = trainer.data_collator(list(rows))
            logps = trainer._log_probabilities(trainer.model, inputs)
        expected = logps_by_hand(trainer.model, rows)
    assert np.abs(expected - np.asarray(rows["ref_logps"])).max() > 0.1
    np.testing.assert_allclose(logps.numpy(), expected, atol=1e-4)
