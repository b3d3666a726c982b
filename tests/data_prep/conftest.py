"""The policy of tests that are about no quantization."""

import pytest

from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings


@pytest.fixture(scope="session")
def plain_policy():
    """The embedded world's π_ref, unquantized in float32. Tests leave it as it was."""
    return load_policy(PolicySettings(model="quickstart", quantization="none", dtype="float32"))
