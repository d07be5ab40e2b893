"""The LoRA adapters of ``peft`` as updates of weights, exact and without merging."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tl_backward._precision import upcast
from tl_backward.factors import GradientFactors
from tl_backward.sites import (
    Model,
    WeightSite,
    find_sites,
    weights_processing,
)
from tl_backward.sites.adapters import applied_adapters, base_layer
from tl_backward.sites.hugging_face import original_name, parts_of_modules

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_WEIGHT = ".base_layer.weight"
"""``peft`` stores the embeddings beside their adapters."""
MATRIX = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")
WITHOUT_EFFECT = {
    *("arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "lora_dropout"),
    *("layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules"),
    *("task_type", "ensure_weight_tying", "peft_type", "init_lora_weights"),
}
"""Settings that say nothing of what the matrices add, or only of how they began."""
USED = {"lora_alpha", "r", "use_rslora", "alpha_pattern", "rank_pattern"}
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base weights as they are."""
MEANT = {"bias": "none"}
"""Values other than false and empty ones that change nothing."""
MERGE = "merge it into the base (merge_and_unload() of peft), and use WeightEdit.from_difference"


class Lora(NamedTuple):
    """What an adapter adds to one module: ``y + scale * (x A^T) B^T``.

    Attributes:
        module: Name of the module in the Hugging Face model.
        A: Its first matrix.
        B: Its second one.
        scale: ``lora_alpha / r``, or what it is for this module.
    """

    module: str
    A: Float[Tensor, "r d_in"]
    B: Float[Tensor, "d_out r"]
    scale: float


class Contents(NamedTuple):
    """What there is in an adapter.

    Attributes:
        loras: What it adds.
        source: Where it comes from.
        base: The model that it says it was made for.
        base_weights: By module, weights of the base that are stored with it.
    """

    loras: list[Lora]
    source: str
    base: str | None
    base_weights: dict[str, Tensor]


@dataclass(frozen=True)
class AdapterReport:
    """Where an edit comes from.

    Attributes:
        source: The folder or file, or the names of the adapters of a ``PeftModel``.
        base: The model that the adapter says it was trained on, if it does.
        modules: By the name of the module, the scale of what the adapter adds.
    """

    source: str
    base: str | None
    modules: dict[str, float]


def adapter_factors(model: Model, adapter: Any) -> tuple[dict[str, GradientFactors], AdapterReport]:
    """See :meth:`WeightEdit.from_peft`."""
    found = find_sites(model)
    if not hasattr(model, "original_model"):
        raise NotImplementedError(
            "an adapter names the modules of a Hugging Face model, which a HookedTransformer does "
            "not have; boot a TransformerBridge, or compare with the merged model by "
            "WeightEdit.from_difference"
        )
    processing = weights_processing(model)
    if processing != "raw":
        raise ValueError(
            f"an adapter is made for raw weights, and those of the model are {processing}; boot "
            "the bridge anew and leave out enable_compatibility_mode()"
        )
    contents = _read(adapter)
    _require_without(model, contents.loras)
    _require_base(model, contents.base_weights)
    scales = {lora.module: lora.scale for lora in contents.loras}
    report = AdapterReport(contents.source, contents.base, scales)
    reasons = {id(one.parameter): one.reason for one in found.unsupported}
    return factors_of(model, found.sites, contents.loras, reasons), report


def factors_of(
    model: Any, sites: list[WeightSite], loras: list[Lora], reasons: Mapping[int, str]
) -> dict[str, GradientFactors]:
    """The updates of the sites of a bridge.

    Args:
        model: The bridge.
        sites: Its sites.
        loras: What to add to which modules.
        reasons: Why parameters have no site, by ``id``.

    Raises:
        ValueError: When the model lacks a module, or has it in another shape, or has the adapter
            already.
        NotImplementedError: When a module has no site.
    """
    parts, modules = parts_of_modules(model, sites), _modules(model)
    factors: dict[str, GradientFactors] = {}
    for lora in loras:
        module = modules.get(lora.module)
        if module is None:
            raise ValueError(
                f"adapter: the model has no module {lora.module}; load the adapter's own base model"
            )
        weight = getattr(base_layer(module), "weight", None)
        if not parts[lora.module] or weight is None:
            why = reasons.get(id(weight), f"it is a {type(module).__name__}")
            raise NotImplementedError(f"adapter: {lora.module} has no site: {why}")
        for site, columns in parts[lora.module]:
            n_outputs = weight.numel() // site.d_in
            if (*lora.A.shape, *lora.B.shape) != (len(lora.A), site.d_in, n_outputs, len(lora.A)):
                raise ValueError(
                    f"adapter: {lora.module} is [{site.d_in}, {n_outputs}] in the model, and the "
                    f"adapter has matrices of {list(lora.A.shape)} and {list(lora.B.shape)} for it"
                )
            if site.tied_to:
                raise NotImplementedError(
                    f"adapter: {lora.module} shares its weight with {', '.join(site.tied_to)}, and "
                    "the adapter acts in one of them alone; give each a parameter of its own"
                )
            B = lora.B if columns is None else lora.B[columns.to(lora.B.device)]
            update = GradientFactors(upcast(lora.A), lora.scale * upcast(B.mT))
            before = factors.get(site.name)
            factors[site.name] = update if before is None else before + update
    return factors


def _require_base(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that brings other base weights than the model has."""
    modules = _modules(model)
    for name, weight in weights.items():
        own = getattr(base_layer(modules.get(name)), "weight", None)
        if own is None or not torch.equal(own.detach().cpu(), weight.to(own.dtype)):
            raise ValueError(
                f"adapter: it brings a weight of its own for {name}, and that of the model is "
                "another; load the adapter's own base model"
            )


def _require_without(model: Any, loras: list[Lora]) -> None:
    """Refuse to add an adapter to a model that has one beside the same weight."""
    modules = _modules(model)
    for name, *_ in loras:
        module = modules.get(name)
        applied = [*applied_adapters(module), *getattr(module, "merged_adapters", ())]
        if applied:
            raise ValueError(
                f"model: its {name} has the adapter {applied[0]!r} already, so the edit would add "
                "it twice; boot a bridge of the base model, or call disable_adapter_layers()"
            )


def _modules(model: Any) -> dict[str, Any]:
    """The outermost module under each Hugging Face name, those of bridges left out."""
    found: dict[str, Any] = {}
    for name, module in model.original_model.named_modules(remove_duplicate=False):
        found[original_name(name)] = module
    return found


def _read(adapter: Any) -> Contents:
    """The contents of an adapter, wherever it is."""
    if hasattr(adapter, "peft_config") and hasattr(adapter, "active_adapters"):
        return _of_model(adapter)
    if not isinstance(adapter, str | Path):
        raise TypeError(
            "adapter must be the folder or the safetensors file of a LoRA adapter, or a PeftModel, "
            f"got {type(adapter).__name__}"
        )
    return _of_folder(Path(adapter))


def _of_model(adapter: Any) -> Contents:
    """The active adapters of a ``PeftModel``, with their scales as they are now."""
    names = list(adapter.active_adapters)
    for name in names:
        _require_plain_lora(f"adapter {name!r}", adapter.peft_config[name].to_dict())
    loras = []
    modules: Iterator[tuple[str, Any]] = adapter.get_base_model().named_modules()
    for path, layer in modules:
        for name in names:
            for stored in ("lora_", "lora_embedding_"):
                if name in getattr(layer, f"{stored}A", ()):
                    loras.append(_of_layer(original_name(path), layer, name, stored))
    if not loras:
        raise ValueError(f"adapter: the PeftModel has no matrices of {', '.join(names)}")
    base = adapter.peft_config[names[0]].base_model_name_or_path
    return Contents(loras, " and ".join(names), base, {})


def _of_layer(path: str, layer: Any, name: str, stored: str) -> Lora:
    """One adapter of one layer of ``peft``."""
    if layer.use_dora.get(name) or getattr(layer, "lora_variant", {}).get(name) is not None:
        raise NotImplementedError(f"adapter {name!r} is no plain LoRA at {path} (DoRA, say)")
    A, B = (_matrix(getattr(layer, f"{stored}{side}")[name]) for side in "AB")
    return Lora(path, A, B, float(layer.scaling[name]))


def _matrix(held: nn.Linear | Tensor) -> Tensor:
    return (held.weight if isinstance(held, nn.Linear) else held).detach()


def _of_folder(path: Path) -> Contents:
    """The adapter in a folder, or in a safetensors file with its config beside it."""
    folder, file = (path, path / WEIGHTS) if path.is_dir() else (path.parent, path)
    if not (folder / CONFIG).is_file():
        others = [found.parent.name for found in sorted(folder.glob(f"*/{CONFIG}"))]
        there = f"; there are adapters in {', '.join(others)}" if others else ""
        raise FileNotFoundError(
            f"adapter: there is no {CONFIG} in {folder}, which has the scale of the adapter{there}"
        )
    if not file.is_file():
        raise FileNotFoundError(f"adapter: there is no file {file}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(file)
    except (SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"adapter: {folder} is damaged ({error})") from error
    _require_plain_lora(f"adapter in {folder.name}", config)
    pairs: dict[str, dict[str, Tensor]] = {}
    base_weights = {}
    for key, tensor in tensors.items():
        if key.endswith(BASE_WEIGHT):
            module = key.removeprefix(PREFIX).removesuffix(BASE_WEIGHT)
            base_weights[original_name(module)] = tensor
            continue
        found = MATRIX.fullmatch(key)
        if found is None:
            raise NotImplementedError(
                f"adapter: {key} is none of the two matrices of a LoRA; {MERGE}"
            )
        pairs.setdefault(found["module"].removeprefix(PREFIX), {})[found["side"]] = tensor
    loras = []
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"adapter: {file.name} has one matrix only for {module}")
        scale = _scale(config, module, len(pair["A"]))
        loras.append(Lora(original_name(module), pair["A"], pair["B"], scale))
    if not loras:
        raise ValueError(f"adapter: {file.name} has no LoRA matrices")
    return Contents(loras, str(path), config.get("base_model_name_or_path"), base_weights)


def _require_plain_lora(what: str, config: Mapping[str, Any]) -> None:
    """Refuse every setting by which an adapter is more than two matrices beside a weight."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        raise NotImplementedError(f"{what} is no LoRA (peft_type={kind}); {MERGE}")
    beginning = config.get("init_lora_weights")
    if beginning not in KEEPS_BASE:
        raise NotImplementedError(
            f"{what}: init_lora_weights={beginning!r} has changed the base weights; {MERGE}"
        )
    for name, value in config.items():
        if name not in WITHOUT_EFFECT | USED and value and value != MEANT.get(name):
            named = "use_dora=True (DoRA)" if name == "use_dora" else f"{name}={value!r}"
            raise NotImplementedError(f"{what} is no plain LoRA: {named}; {MERGE}")


def _scale(config: Mapping[str, Any], module: str, r: int) -> float:
    """``lora_alpha / r`` with the patterns that name the module, as ``peft`` matches them."""
    patterns = config.get("alpha_pattern") or {}
    matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
    alpha = patterns.get(next(matching, None), config["lora_alpha"])
    return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)
