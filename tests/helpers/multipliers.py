"""Ranges of multipliers, and scored responses with two utilities."""

import numpy as np
import pandas as pd

from data_prep.labels.multipliers import KAPPA, MultiplierRange, multiplier_columns
from tests.helpers.tables import scored_frame


def range_of(factor=3.0, kappa=None, **center_and_floor):
    center, floor = pd.DataFrame(center_and_floor).iloc
    return MultiplierRange(center, floor, factor, kappa)


RANGE = range_of(g=(0.4, 0.05), h=(0.0, 0.2), kappa=(0.5, 1.5))
DRAWN = [*multiplier_columns(["g", "h"]), KAPPA]


def frame_of(seed=0, prompts=40, responses=6):
    frame = scored_frame(seed, prompts, responses)
    return frame.assign(h=np.random.default_rng(seed + 9).normal(size=len(frame)))
