"""The interfaces of a model, and of a backend that knows one model class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from tl_backward._undo import Undo
    from tl_backward.sites.parameters import NamedParameter
    from tl_backward.sites.site import UnsupportedWeight, WeightSite

    class Model(Protocol):
        """A TransformerLens model: a ``TransformerBridge`` or a ``HookedTransformer``."""

        cfg: Any
        tokenizer: Any
        blocks: Any
        ln_final: Any
        unembed: Any

        @property
        def hook_dict(self) -> Mapping[str, Any]:
            """The HookPoints by name."""

        @property
        def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
            """The unembedding; a bridge copies it on each access."""

        def __call__(self, input: Tensor, **kwargs: Any) -> Any:
            """Run the model forward."""

        def to_tokens(self, input: str, **kwargs: Any) -> Tensor:
            """The token ids of a text."""

        def hooks(
            self, fwd_hooks: Sequence[Any] = ..., bwd_hooks: Sequence[Any] = ...
        ) -> AbstractContextManager[Any]:
            """Context with hooks on the model."""

        def generate(self, input: Any, **kwargs: Any) -> Any:
            """Continue a text."""

else:
    Model = Any  # a runtime check would compute the model's properties


@runtime_checkable
class Backend(Protocol):
    """The functions of a module that knows one model class."""

    def accepts(self, model: object) -> bool:
        """Whether the model is of this class."""

    def survey(self, model: Any) -> Iterator[WeightSite | UnsupportedWeight]:
        """Every weight matrix in the order of the forward pass: its site, or why it has none."""

    def named_parameters(self, model: Any) -> Iterator[NamedParameter]:
        """Every parameter, each once."""

    def reasons(self, model: Any) -> dict[int, str]:
        """Class-specific reasons why parameters have no site, by ``id``."""

    def unused_parameters(self, model: Any) -> dict[int, str]:
        """The parameters, by ``id``, of which the forward pass uses copies, and what copies."""

    def modules(self, model: Any) -> Iterator[tuple[str, nn.Module]]:
        """Every module of the forward pass, with its name."""

    def attach_hook_points(self, model: Any, undo: Undo) -> None:
        """Add the HookPoints of the sites that the model lacks, until undone."""

    def lazy_hook_points(self, model: Any) -> list[str]:
        """The residual-stream HookPoints that the model calls only if they have hooks."""

    def end_of_stream(self, model: Any) -> nn.Module | None:
        """The end of the residual stream, if not at the last block's own HookPoint."""

    def left_padding_obstacle(self, model: Any) -> str | None:
        """Why left-padded texts get other results than the texts alone; None if the same."""

    def unembedding(self, model: Any) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, if it is a single matrix."""

    def unembed(
        self, model: Any, vectors: Float[Tensor, "rows d_model"], apply_ln: bool
    ) -> Float[Tensor, "rows d_vocab"]:
        """Apply the final norm and the unembedding."""
