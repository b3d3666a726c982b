"""The tiny model that completions servers serve."""

import pytest

from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from tests.helpers.models import save_tiny_causal_lm


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return save_tiny_causal_lm(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def policy(model_folder):
    settings = PolicySettings(model=str(model_folder), quantization="none", dtype="float32")
    return load_policy(settings)
