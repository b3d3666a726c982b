"""The embedded world's policy as a user's own model, and an adapter of another one."""

import pytest

from data_prep.quickstart import build_policy
from tests.helpers.models import save_adapter, save_tiny_causal_lm


@pytest.fixture(scope="session")
def base():
    """The embedded world's policy as a plain local model folder."""
    return build_policy()


@pytest.fixture(scope="session")
def foreign_base(tmp_path_factory):
    return save_tiny_causal_lm(tmp_path_factory.mktemp("foreign") / "base")


@pytest.fixture(scope="session")
def foreign_adapter(foreign_base):
    """A LoRA adapter of `foreign_base`."""
    return save_adapter(foreign_base, foreign_base.parent / "adapter")
