"""Experts whose weights are stacked in parameters of one module, and their factors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tl_backward._content import Content
from tl_backward._precision import full_precision


class Matrix(NamedTuple):
    """The place of a kind of weight in a stack.

    Attributes:
        stack: Path of the parameter, relative to the module.
        columns: Its columns in ``[expert, d_in, columns]``.
        bias: Path of its bias, likewise; None if there is none.
    """

    stack: str
    columns: slice
    bias: str | None = None


@dataclass(frozen=True)
class ExpertPlan:
    """The computation of each expert: ``activate(x W_gate, x W_in) W_out``, with biases.

    Attributes:
        matrices: Place of each kind of weight: ``W_gate``, if there is one, ``W_in`` and ``W_out``.
        activate: ``activate(module, a)`` maps ``a``, the stacked outputs of ``W_gate`` and
            ``W_in``, to the input of ``W_out``.
        is_out_in: Whether the stacks are ``[expert, d_out, d_in]``.
        scales_input: Whether the routing weight multiplies an expert's input, not its output.
    """

    matrices: Mapping[str, Matrix]
    activate: Callable[[Any, Tensor], Tensor]
    is_out_in: bool = True
    scales_input: bool = False

    def index(self, kind: str, expert: int) -> Any:
        """The index of a matrix in its stack."""
        columns = self.matrices[kind].columns
        if columns == slice(None):
            return expert
        return (expert, columns) if self.is_out_in else (expert, slice(None), columns)

    def factors(
        self,
        module: nn.Module,
        expert: int,
        h: Float[Tensor, "row d_in"],
        weights: Float[Tensor, "row"],
        delta: Float[Tensor, "row d_out"],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs and VJPs of each of an expert's matrices, for the tokens routed to it.

        Args:
            module: The module.
            expert: The expert.
            h: Inputs of the experts for these tokens.
            weights: The routing weights.
            delta: VJPs at the sum of the experts' outputs.
        """
        W_out = self._whole(module, self.matrices["W_out"].stack, expert)
        of_row = rearrange(weights, "row -> row 1")
        with torch.inference_mode(False), torch.enable_grad(), full_precision(W_out.device):
            x, a, inner = self._inner(module, expert, h, of_row)
            d = (delta if self.scales_input else of_row * delta).to(inner.dtype)
            back = d @ W_out.mT
            (at_a,) = torch.autograd.grad(inner, a, back)
        found = {
            kind: (x, at_a[:, matrix.columns])
            for kind, matrix in self.matrices.items()
            if kind != "W_out"
        }
        return found | {"W_out": (inner.detach(), d)}

    def keys(
        self,
        module: nn.Module,
        expert: int,
        h: Float[Tensor, "row d_in"],
        weights: Float[Tensor, "row"],
    ) -> Float[Tensor, "row d_mlp"]:
        """The inputs of an expert's ``W_out``, times the routing weights."""
        of_row = rearrange(weights, "row -> row 1")
        with full_precision(h.device):
            inner = self._inner(module, expert, h, of_row)[-1].detach()
        return inner if self.scales_input else of_row * inner

    def _inner(
        self,
        module: nn.Module,
        expert: int,
        h: Float[Tensor, "row d_in"],
        of_row: Float[Tensor, "row 1"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs of W_in, the outputs of W_in and W_gate, and the inputs of W_out."""
        into = self.matrices["W_in"]
        W_in = self._whole(module, into.stack, expert)
        x = (of_row * h if self.scales_input else h).to(W_in.dtype)
        a = x @ W_in
        if into.bias is not None:
            a = a + attrgetter(into.bias)(module).detach()[expert]
        a = a.detach().requires_grad_()
        return x, a, self.activate(module, a)

    def _whole(self, module: nn.Module, stack: str, expert: int) -> Float[Tensor, "d_in d_out"]:
        W = attrgetter(stack)(module).detach()[expert]
        return W.mT if self.is_out_in else W


class StackedExperts:
    """The experts of one module.

    Args:
        name: Name of the mixture, e.g. ``"blocks.5.mlp.experts"``.
        module: The module that holds the stacks and that the plan's functions use.
        plan: The computation of each expert.
    """

    def __init__(self, name: str, module: nn.Module, plan: ExpertPlan) -> None:
        self.name, self.module, self.plan = name, module, plan

    def keys(
        self, expert: int, h: Float[Tensor, "row d_in"], weights: Float[Tensor, "row"]
    ) -> Float[Tensor, "row d_mlp"]:
        """As :meth:`ExpertPlan.keys`."""
        return self.plan.keys(self.module, expert, h, weights)

    def remembered(self) -> RememberedExperts:
        """The experts with their current weights."""
        return RememberedExperts(self)


class RememberedExperts:
    """Experts with their weights of a run, without keeping the module alive.

    Args:
        experts: The experts with their current weights.
    """

    def __init__(self, experts: StackedExperts) -> None:
        self._name, self._plan = experts.name, experts.plan
        self._module = weakref.ref(experts.module)
        paths = {p for one in experts.plan.matrices.values() for p in (one.stack, one.bias) if p}
        self._contents = {path: Content(attrgetter(path)(experts.module)) for path in paths}

    def factors(
        self,
        expert: int,
        h: Float[Tensor, "row d_in"],
        weights: Float[Tensor, "row"],
        delta: Float[Tensor, "row d_out"],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """As :meth:`ExpertPlan.factors`, on the device of ``h``.

        Raises:
            RuntimeError: If the model is gone, or its weights changed after the run.
            NotImplementedError: If the weights are offloaded.
        """
        module = self._unchanged()
        device = attrgetter(self._plan.matrices["W_in"].stack)(module).device
        moved = (one.to(device) for one in (h, weights, delta))
        found = self._plan.factors(module, expert, *moved)
        return {kind: (x.to(h.device), d.to(h.device)) for kind, (x, d) in found.items()}

    def _unchanged(self) -> nn.Module:
        module = self._module()
        what = f"the factors of {self._name} are computed from the model's weights on access, but"
        if module is None:
            raise RuntimeError(f"{what} the model is gone; keep it, or save() the cache before")
        for path, content in self._contents.items():
            stack = attrgetter(path)(module)
            if stack.device.type == "meta":
                raise NotImplementedError(f"{what} these are offloaded")
            if not content.is_that_of(stack):
                raise RuntimeError(
                    f"{what} these changed after the run; capture again, revert the edit, or "
                    "access the factors before changing the weights"
                )
        return module
