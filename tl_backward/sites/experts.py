"""Mixtures of experts in a bridge: sites of each expert's matrices, of routers and shared experts.

The experts of one module are read at its boundary: their common input and the sum of their outputs.
JetMoe's attention has no such module, so each of its stacks is read separately.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from tl_backward._precision import full_precision
from tl_backward.sites.adapters import adapted
from tl_backward.sites.mixture import Mixture, Routes
from tl_backward.sites.recomputed import recomputation
from tl_backward.sites.site import UnsupportedWeight, WeightSite, unchanged
from tl_backward.sites.stacked_experts import ExpertPlan, Matrix, StackedExperts
from tl_backward.sites.tap import Tap

Linear = Callable[[str, str, int, str | None, Any], Iterator[WeightSite | UnsupportedWeight]]
"""Makes the site of a linear layer from its name, kind, layer, component and module."""

SHARED = {
    **{"gate_proj": "W_gate", "up_proj": "W_in", "down_proj": "W_out"},
    **{"gate": "W_gate", "in": "W_in", "out": "W_out"},
}
"""Kinds of a shared expert's linear layers."""
ROUTER_LAYERS = ("gate", "proj", "layer")
"""Names of a router's linear layer, if it has one."""
LOGITS = {"Llama4Router": 1}
"""Index of the logits among a router's outputs, if not the first."""


class Owner(NamedTuple):
    """A part of a block that has experts.

    Attributes:
        path: Its path, e.g. ``"blocks.5.mlp"``.
        components: Paths of the block's components, by the ``id`` of the wrapped module.
        experts: Module of the experts.
        router: Module of the router.
        whole: Module of both; outputs the sum of the experts' outputs if no other module does.
    """

    path: str
    components: dict[int, str]
    experts: Any
    router: Any
    whole: Any


def expert_sites(
    block: Any, layer: int, linear: Linear, residual_tap: Callable[[], Tap] | None
) -> Iterator[WeightSite | UnsupportedWeight]:
    """The sites of every mixture of experts in a block: routers, experts, shared experts.

    Args:
        block: The block.
        layer: Its index.
        linear: Makes the site of a linear layer.
        residual_tap: Reads the MLP's output after a post-norm.
    """
    for owner in _owners(block, f"blocks.{layer}"):
        yield from _router(owner, layer, linear)
        yield from _experts(owner, layer, residual_tap)
        yield from _shared(owner, layer, linear)


def has_experts(part: Any) -> bool:
    """Whether a component wraps a mixture of experts in this layer."""
    whole = _unwrapped(part)
    return hasattr(whole, "experts") or type(whole).__name__ == "JetMoeMoE"


def _owners(block: Any, path: str) -> Iterator[Owner]:
    parts = {name: part for name, part in block._modules.items() if _is_component(part)}
    if not any(has_experts(part) or _is_decorated(_unwrapped(part)) for part in parts.values()):
        return
    components = dict(_components(block, path))
    for name, part in parts.items():
        whole = _unwrapped(part)
        if type(whole).__name__ == "JetMoeMoE":
            yield Owner(f"{path}.{name}", components, whole, _unwrapped(whole.router), whole)
        elif _is_decorated(whole) and "router" in parts:  # Gemma 4 has both next to its MLP
            yield Owner(f"{path}.mlp", components, whole, _unwrapped(parts["router"]), whole)
        elif hasattr(whole, "experts"):
            experts = _unwrapped(whole.experts)
            inner = experts if type(experts).__name__ == "JetMoeMoA" else whole
            router = getattr(inner, "router", None) or getattr(inner, "gate", None)
            yield Owner(f"{path}.{name}", components, experts, _unwrapped(router), whole)


def _components(module: Any, path: str) -> Iterator[tuple[int, str]]:
    """The paths of the components inside a module, by the ``id`` of the wrapped module."""
    for name, child in module._modules.items():
        if name != "_original_component" and _is_component(child):
            yield id(_unwrapped(child)), f"{path}.{name}"
            yield from _components(child, f"{path}.{name}")


def _unwrapped(module: Any) -> Any:
    """The module inside a bridge's components."""
    while _is_component(module):
        module = module.original_component
    return module


def _is_component(module: Any) -> bool:
    return isinstance(module, nn.Module) and "_original_component" in module._modules


def _is_decorated(module: Any) -> bool:
    """Whether ``transformers`` runs these experts with its exchangeable implementations."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "down_proj"))


def _experts(
    owner: Owner, layer: int, residual_tap: Callable[[], Tap] | None
) -> Iterator[WeightSite | UnsupportedWeight]:
    name, module = f"{owner.path}.experts", owner.experts
    plan = _plan(module)
    if type(module).__name__ == "JetMoeMoA":
        yield from _attention_experts(owner, layer)
    elif plan is None:
        reason = f"its {type(module).__name__} is a mixture of experts of an unknown kind"
        stacks = dict(module.named_parameters())
        for kind in ("W_gate", "W_in", "W_out"):
            yield UnsupportedWeight(f"{name}.{kind}", kind, layer, reason)
        for stored, stack in stacks.items():
            yield UnsupportedWeight(f"{name}.{stored}", stored, layer, reason, stack)
    elif (why := _obstacle(module, plan)) is not None:
        for kind, matrix in plan.matrices.items():
            parameter = getattr(*_stack(module, matrix.stack))
            yield UnsupportedWeight(f"{name}.{kind}", kind, layer, why, parameter)
    else:
        mixture = _mixture(owner, plan, residual_tap)
        for expert in range(mixture.n_experts):
            for kind, matrix in plan.matrices.items():
                yield _site(mixture, layer, expert, kind, _stack(module, matrix.stack), plan)


def _plan(module: Any) -> ExpertPlan | None:
    """The computation of a module's experts; None if unknown."""
    kind = type(module).__name__
    if _is_decorated(module):
        into = "gate_up_proj" if module.has_gate else "up_proj"
        columns = _columns(module.is_concatenated, _width(module)) if module.has_gate else {}
        return ExpertPlan(
            _matrices(columns, into, "down_proj", module.has_bias),
            _apply_gate if module.has_gate else _activate,
            is_out_in=not module.is_transposed,
        )
    if kind == "Llama4TextExperts":
        columns = _columns(True, module.gate_up_proj.shape[-1])
        matrices = _matrices(columns, "gate_up_proj", "down_proj")
        activate = partial(_gated, "act_fn")
        return ExpertPlan(matrices, activate, is_out_in=False, scales_input=True)
    if kind == "JetMoeMoE":
        columns = _columns(True, module.input_linear.weight.shape[1])
        matrices = _matrices(columns, "input_linear.weight", "output_linear.weight")
        return ExpertPlan(matrices, partial(_gated, "activation"))
    return None


def _width(module: Any) -> int:
    """Number of columns in the stack of ``W_gate`` and ``W_in``."""
    return module.gate_up_proj.shape[-1 if module.is_transposed else 1]


def _columns(is_concatenated: bool, width: int) -> dict[str, slice]:
    if is_concatenated:
        return {"W_gate": slice(0, width // 2), "W_in": slice(width // 2, width)}
    return {"W_gate": slice(0, width, 2), "W_in": slice(1, width, 2)}


def _matrices(
    columns: Mapping[str, slice],
    into: str,
    out: str,
    has_bias: bool = False,
) -> dict[str, Matrix]:
    into_bias, out_bias = [f"{one}_bias" if has_bias else None for one in (into, out)]
    found = {kind: Matrix(into, part, into_bias) for kind, part in columns.items()}
    found = found or {"W_in": Matrix(into, slice(None), into_bias)}
    return found | {"W_out": Matrix(out, slice(None), out_bias)}


def _apply_gate(module: Any, a: Tensor) -> Tensor:
    return module._apply_gate(a)


def _activate(module: Any, a: Tensor) -> Tensor:
    return module.act_fn(a)


def _gated(activation: str, module: Any, a: Tensor) -> Tensor:
    gate, up = a.chunk(2, dim=-1)
    return getattr(module, activation)(gate) * up


def _stack(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name there."""
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent), name


def _obstacle(module: Any, plan: ExpertPlan) -> str | None:
    """Why the matrices of these experts have no sites; None if they have."""
    kind = type(module).__name__
    if getattr(module, "_is_expert_parallel", False):
        return f"the experts of its {kind} are distributed over processes (expert parallelism)"
    if getattr(module, "has_post_expert_norm", False):
        return f"its {kind} has a norm after each expert"
    if adapted(module.named_modules()):
        return f"its {kind} has a peft adapter; merge it"
    for matrix in plan.matrices.values():
        holder, name = _stack(module, matrix.stack)
        how, stack = recomputation(holder, name), getattr(holder, name)
        if how is not None:
            return f"its {kind} has {name} recomputed in every forward pass by {how.by}"
        if type(stack.data) is not Tensor or not stack.is_floating_point() or stack.ndim != 3:
            return f"its {kind} stores {name} quantised or sharded ({type(stack.data).__name__})"
    return None


def _site(
    mixture: Mixture,
    layer: int,
    expert: int,
    kind: str,
    holder: tuple[nn.Module, str],
    plan: ExpertPlan,
    tap: nn.Module | None = None,
) -> WeightSite:
    index = plan.index(kind, expert)
    matrix = getattr(*holder)[index]
    d_out, d_in = matrix.shape if plan.is_out_in else matrix.shape[::-1]
    return WeightSite(
        name=f"{mixture.name}.{expert}.{kind}",
        kind=kind,
        layer=layer,
        hook_in=None,
        hook_out=None,
        d_in=d_in,
        d_out=d_out,
        x_tap=_no_tap if tap is None else lambda: Tap(tap, "input"),
        y_tap=_no_tap if tap is None else lambda: Tap(tap, "output"),
        holder=holder,
        layout=_transposed if plan.is_out_in else unchanged,
        expert=expert,
        index=index,
        mixture=mixture,
    )


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.mT


def _no_tap() -> Tap:
    raise NotImplementedError(
        "the matrices of single experts have no modules of their own to read at; get their factors "
        "from a cache of run_with_backward_cache"
    )


def _mixture(owner: Owner, plan: ExpertPlan, residual_tap: Callable[[], Tap] | None) -> Mixture:
    name, module = f"{owner.path}.experts", owner.experts
    n_experts = len(getattr(*_stack(module, plan.matrices["W_out"].stack)))
    stacked = StackedExperts(name, module, plan)
    if _is_decorated(module):
        taps = ("input", "experts", "weights")
        return Mixture(
            name,
            n_experts,
            {tap: partial(Tap, module, "input", item) for item, tap in enumerate(taps)},
            partial(Tap, module, "output"),
            lambda seen: Routes(seen["experts"], seen["weights"]),
            stacked,
            residual_tap=residual_tap,
        )
    router = owner.router
    if type(module).__name__ == "Llama4TextExperts":
        return Mixture(
            name,
            n_experts,
            {"input": partial(Tap, router, "input"), "scores": partial(Tap, router, "output")},
            partial(Tap, owner.whole, "output"),
            partial(_llama4_routes, router.top_k),
            stacked,
            residual_tap=residual_tap,
        )
    return Mixture(
        name,
        n_experts,
        _jetmoe_taps(router),
        partial(Tap, owner.whole, "output"),
        _jetmoe_routes,
        stacked,
        residual_tap=residual_tap,
    )


def _llama4_routes(k: int, seen: Mapping[str, Tensor]) -> Routes:
    """The routes of the ``k`` highest scores; all other scores are zero."""
    weights, experts = seen["scores"].topk(k, dim=-1)
    return Routes(experts, weights)


def _jetmoe_taps(router: nn.Module) -> dict[str, Callable[[], Tap]]:
    """The taps of JetMoe's router, which sorts pairs of token and place by expert.

    Its weights are in this order. A token's ``k`` highest logits determine its experts.
    """
    return {
        "input": partial(Tap, router, "input"),
        **{
            name: partial(Tap, router, "output", item)
            for item, name in {0: "order", 2: "weights", 4: "logits"}.items()
        },
    }


def _jetmoe_routes(seen: Mapping[str, Tensor]) -> Routes:
    n_tokens = len(seen["logits"])
    by_place = torch.empty_like(seen["weights"])
    by_place[seen["order"]] = seen["weights"]
    weights = rearrange(by_place, "(token k) -> token k", token=n_tokens)
    return Routes(seen["logits"].topk(weights.shape[1], dim=1).indices, weights)


def _jetmoe_rows(seen: Mapping[str, Tensor], expert: int) -> tuple[Tensor, Tensor]:
    experts = _jetmoe_routes(seen).experts
    rows = rearrange(experts, "token k -> (token k)")[seen["order"]].eq(expert).nonzero().squeeze(1)
    return rows, seen["order"][rows].div(experts.shape[1], rounding_mode="trunc")


def _attention_experts(owner: Owner, layer: int) -> Iterator[WeightSite]:
    """JetMoe's attention experts: the query and output matrices, each read separately."""
    module = owner.experts
    mixture = Mixture(
        f"{owner.path}.experts",
        module.num_experts,
        _jetmoe_taps(owner.router),
        partial(Tap, owner.whole, "output"),
        _jetmoe_routes,
        rows=_jetmoe_rows,
    )
    layers = {"W_Q": module.input_linear, "W_O": module.output_linear}
    plan = ExpertPlan({kind: Matrix("weight", slice(None)) for kind in layers}, _activate)
    for expert in range(mixture.n_experts):
        for kind, linear in layers.items():
            yield _site(mixture, layer, expert, kind, (linear, "weight"), plan, linear)


def _router(owner: Owner, layer: int, linear: Linear) -> Iterator[WeightSite | UnsupportedWeight]:
    name, router = f"{owner.path}.W_router", owner.router
    if router is None:
        return
    inner = next((getattr(router, one) for one in ROUTER_LAYERS if hasattr(router, one)), router)
    component = owner.components.get(id(_unwrapped(inner)))
    if inner is not router:
        yield from linear(name, "W_router", layer, component, _unwrapped(inner))
        return
    item = _logits_item(router)
    if item is None:
        reason = f"its {type(router).__name__} does not return the logits x W + b"
        yield UnsupportedWeight(name, "W_router", layer, reason, getattr(router, "weight", None))
        return
    d_out, d_in = router.weight.shape
    yield WeightSite(
        name=name,
        kind="W_router",
        layer=layer,
        hook_in=None if component is None else f"{component}.hook_in",
        hook_out=None,
        d_in=d_in,
        d_out=d_out,
        x_tap=lambda: Tap(router, "input"),
        y_tap=lambda: Tap(router, "output", item),
        holder=(router, "weight"),
        layout=_transposed,
        has_inner_output=True,
    )


def _logits_item(router: Any) -> int | None:
    """Index of the logits ``x W + b`` among a router's outputs, tested on one vector."""
    weight, item = getattr(router, "weight", None), LOGITS.get(type(router).__name__, 0)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    if weight.device.type == "meta":
        return item
    x = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    given = [x.unsqueeze(0)]
    for name in list(inspect.signature(router.forward).parameters)[1:]:
        of_ids = name == "input_ids"
        given.append(x.new_zeros(1 if of_ids else len(weight)).long() if of_ids else 0 * x[:1])
    with torch.no_grad(), full_precision(x.device):
        expected = nn.functional.linear(x.float(), weight.float(), _float_bias(router))
        try:
            logits = router.forward(*given)[item]
        except (IndexError, RuntimeError, TypeError, ValueError):
            return None
        return item if torch.allclose(logits[0].float(), expected, rtol=0.02, atol=0.02) else None


def _float_bias(router: Any) -> Tensor | None:
    bias = getattr(router, "bias", None)
    return None if bias is None else bias.float()


def _shared(owner: Owner, layer: int, linear: Linear) -> Iterator[WeightSite | UnsupportedWeight]:
    """The shared experts, which every token uses, and the gate of their output."""
    for attribute in ("shared_experts", "shared_expert"):
        shared = getattr(owner.whole, attribute, None)
        if shared is None:
            continue
        for name, module in _unwrapped(shared).named_children():
            kind = SHARED.get(name)
            if kind is not None:
                component = owner.components.get(id(_unwrapped(module)))
                site = f"{owner.path}.shared_experts.{kind}"
                yield from linear(site, kind, layer, component, _unwrapped(module))
    gate = getattr(owner.whole, "shared_expert_gate", None)
    if gate is not None:
        name = f"{owner.path}.W_shared_gate"
        component = owner.components.get(id(_unwrapped(gate)))
        yield from linear(name, "W_shared_gate", layer, component, _unwrapped(gate))
