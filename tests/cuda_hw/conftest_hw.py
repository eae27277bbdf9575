"""What the hardware tests need while they are collected."""

from __future__ import annotations

import os

ON_CPU = os.environ.get("NSA_HW_TESTS_ON_CPU") == "1"
TARGET = "cuda:sim" if ON_CPU else "cuda:hw"
