"""Which model classes the installed TransformerLens has, and the tests that need them."""

from __future__ import annotations

from importlib.metadata import version
from itertools import product

import pytest

TL_VERSION = int(version("transformer-lens").split(".")[0])
HAS_BRIDGE, HAS_HOOKED_TRANSFORMER = TL_VERSION >= 3, TL_VERSION < 4

NO_BRIDGE = "TransformerLens 2 has no TransformerBridge"
NO_HOOKED_TRANSFORMER = "TransformerLens 4 has no HookedTransformer"
NEEDS_BRIDGE = pytest.mark.skipif(not HAS_BRIDGE, reason=NO_BRIDGE)
NEEDS_HOOKED_TRANSFORMER = pytest.mark.skipif(
    not HAS_HOOKED_TRANSFORMER, reason=NO_HOOKED_TRANSFORMER
)
NEEDS_BOTH_CLASSES = pytest.mark.skipif(
    not (HAS_BRIDGE and HAS_HOOKED_TRANSFORMER),
    reason="only TransformerLens 3 has both model classes",
)

CLASSES = ["bridge"] * HAS_BRIDGE + ["hooked"] * HAS_HOOKED_TRANSFORMER
MODELS = [f"{cls}-{kind}" for cls, kind in product(CLASSES, ("llama", "gpt2"))]
MODELS += ["bridge-gpt2-compatibility"] * HAS_BRIDGE
