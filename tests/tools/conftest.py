"""Puts the tools and the peers' harness on the path, as running them by file does."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for folder in ("tools", "tools/peers"):
    if str(ROOT / folder) not in sys.path:
        sys.path.append(str(ROOT / folder))
