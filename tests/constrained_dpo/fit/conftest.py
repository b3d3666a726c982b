"""Policies of the fits: most are about no quantization, so the base is plain."""

import pandas as pd
import pytest

from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from tests.helpers.fits import make_pool


@pytest.fixture(scope="session")
def plain_policy():
    """The embedded world's π_ref, unquantized in float32. A fit leaves it as it was."""
    return load_policy(PolicySettings(model="quickstart", quantization="none", dtype="float32"))


@pytest.fixture(scope="session")
def pool(plain_policy) -> pd.DataFrame:
    """Scored responses of `plain_policy`."""
    return make_pool(plain_policy)
