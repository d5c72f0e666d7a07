"""Takes the padding out of a batch before the layers, and puts zeros back behind them."""

import torch
from torch import Tensor


def readable(x: Tensor) -> bool:
    """Tell whether the values of `x` may steer Python: not while anything traces the call."""
    return (
        type(x) is Tensor
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()  # torch.jit.trace
        and not torch._C._are_functorch_transforms_active()
    )


class Packing:
    """Where the tokens of a padded batch lie, so that layers see tokens and no padding.

    Attributes:
        batch, length: of the padded batch.
        cu_seqlens: (batch + 1,) int32; sequence b holds packed tokens [cu_seqlens[b],
            cu_seqlens[b + 1]), in the order they have in the batch.
        max_seqlen: tokens of the longest sequence.
        keep: (batch, length) bool, True where there is a token.
        tokens: (tokens,) int64, the position of each packed token in the batch flattened.
    """

    def __init__(self, keep: Tensor) -> None:
        """`keep`: (batch, length) bool, True where there is a token."""
        self.keep = keep
        self.batch, self.length = keep.shape
        lengths = keep.sum(1, dtype=torch.int32)
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self.max_seqlen = int(lengths.max()) if lengths.numel() else 0
        self.tokens = keep.reshape(-1).nonzero().squeeze(1)

    @classmethod
    def of_lengths(cls, lengths: list[int], device: torch.device) -> "Packing":
        """For sequences that are packed already, as a nested tensor's are."""
        longest = max(lengths, default=0)
        length = torch.tensor(lengths, device=device).view(-1, 1)
        return cls(torch.arange(longest, device=device) < length)

    def pack(self, x: Tensor) -> Tensor:
        """(batch, length, C) → (tokens, C)."""
        return x.reshape(self.batch * self.length, x.shape[-1]).index_select(0, self.tokens)

    def unpack(self, x: Tensor) -> Tensor:
        """(tokens, C) → (batch, length, C), zero where there is padding."""
        padded = x.new_zeros(self.batch * self.length, x.shape[-1])
        return padded.index_copy(0, self.tokens, x).view(self.batch, self.length, x.shape[-1])
