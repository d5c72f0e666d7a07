"""The RMS norms of transformers: one class a family, to the letter the same but for its name.

Stock, they round to the input's dtype between the norm and the product with weight; the fused op
rounds once, at the end. The accelerated classes are made on first use, subclasses of the stock ones
under the same names, and found again by `fast_transformer.integrations.rms.<name>`, which is how
pickle refers to them.
"""

import sys

from torch import Tensor, nn

from fast_transformer.ops import rms_norm

CLASSES = {  # transformers.models.<family>.modeling_<family> -> its class
    "llama": "LlamaRMSNorm",
    "mistral": "MistralRMSNorm",
    "qwen2": "Qwen2RMSNorm",
    "qwen3": "Qwen3RMSNorm",
    "t5": "T5LayerNorm",
}


class Norm(nn.Module):
    """(x / √(mean(x²) + eps)) · weight over the last dimension, (..., C) → (..., C)."""

    weight: nn.Parameter
    variance_epsilon: float

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Return why this stock norm cannot be taken over, or None."""
        return None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., C) → the same; stock where the dtypes differ, since the result's then depends."""
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def accelerated(stock: type) -> type | None:
    """Return the accelerated subclass of a stock norm of transformers, or None."""
    family = stock.__module__.rpartition(".modeling_")[2]
    if stock.__module__ != f"transformers.models.{family}.modeling_{family}":
        return None
    if stock.__name__ != CLASSES.get(family):
        return None
    made: type = getattr(sys.modules[__name__], stock.__name__)
    return made if issubclass(made, stock) else None


def __getattr__(name: str) -> type:
    """Make the accelerated class `name` on first use; its stock module is imported for that."""
    from importlib import import_module

    for family, kind in CLASSES.items():
        if kind == name:
            stock = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)
            fields = {"__module__": __name__, "__doc__": stock.__doc__}
            return globals().setdefault(name, type(name, (Norm, stock), fields))  # type: ignore[no-any-return]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
