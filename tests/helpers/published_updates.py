"""Updates of editors that the published implementations made on a tiny GPT-2."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

DATA = Path(__file__).parent / "data" / "editors"
STORED = json.loads((DATA / "updates.json").read_text())
UPDATES = load_file(DATA / "updates.safetensors")
