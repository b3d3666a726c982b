"""A tiny policy and an adapter of it, for the scorers that ask a recipe's policy."""

import pytest

from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.prompts.settings import PromptSettings
from data_prep.scorers.implicit import PolicyHandle
from tests.helpers.models import save_adapter, save_tiny_causal_lm


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_tiny_causal_lm(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory):
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def handle(base):
    """The base as a recipe's policy, with a template."""
    policy = load_policy(PolicySettings(model=str(base), quantization="none", dtype="float32"))
    prompts = PromptSettings(source="none", template="w1 {prompt}")
    return PolicyHandle(lambda: policy, prompts, max_new_tokens=4)
