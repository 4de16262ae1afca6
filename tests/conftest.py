"""What every test process needs before torch is imported."""

from __future__ import annotations

import os

# Ranks share few cores: with more threads than one each, they spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
