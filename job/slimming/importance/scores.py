"""Scores: the importance of each channel."""

from __future__ import annotations

from typing import Any

import numpy as np

Scores = np.ndarray[Any, np.dtype[np.float64]]  # (count,) by channel number; nan: not ranked
