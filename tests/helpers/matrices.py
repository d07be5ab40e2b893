"""Which share of a model's matrices has a site."""

from __future__ import annotations

import re
from itertools import takewhile
from math import prod
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import tl_backward as tlb
from helpers.families import FAMILIES, bridge_of, name_architecture

NO_MATRIX = re.compile("gain or bias of a norm|^bias:")
NOT_IN_USE = re.compile("no longer used|through which no text passes")
DENSE = tuple(takewhile(lambda family: family != "mixtral", FAMILIES))
"""The families of attention and MLPs alone."""


def matrix_share(model: Any) -> float:
    """The share of the parameters in matrices that has a site.

    A matrix is every parameter with two axes or more that takes part in the forward pass, stacked
    experts and the filters of convolutions included; gains and biases are none, head by head or
    not.
    """
    numbers = with_site = 0
    for row in tlb.coverage(model).itertuples():
        has_site = isinstance(row.site, str)
        reason = "" if has_site else row.reason
        if len(row.shape) < 2 or NO_MATRIX.search(reason) or NOT_IN_USE.search(reason):
            continue
        numbers += prod(row.shape)
        with_site += prod(row.shape) * has_site
    return with_site / numbers


def default_size(model_type: str, tokenizer: Any) -> Any:
    """The bridge of a model as large as its config is by default, without values.

    Raises:
        NotImplementedError, TypeError: For the few whose weights TransformerLens splits at boot,
            and whose config is not complete by default.
    """
    with torch.device("meta"):
        config = CONFIG_MAPPING[model_type]()
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return bridge_of(name_architecture(hf), tokenizer, device="meta")
