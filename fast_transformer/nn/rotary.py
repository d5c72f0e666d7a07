"""Rotary position embeddings as a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fast_transformer import ops
from fast_transformer.ops.arguments import readable


class RotaryEmbedding(nn.Module):
    """Turns queries and keys by the angles of their positions, Su et al. 2021, section 3.2.2.

    Pair j of a row at position m turns by m · base^(−2j / dim).

    Args:
        dim: columns that turn, even and at most head_dim; the others pass through.
        base: how slowly the last pair turns.
        interleaved: pair j is the columns 2j and 2j + 1 (GPT-J); by default j and j + dim / 2
            (GPT-NeoX, LLaMA).
        positions: that are tabulated at once; the table grows where more are met.
        device: of the table.
        dtype: of the table, by default float32; `to(dtype)` leaves it as it is.

    The state_dict is empty. The table is computed in float64 and rounded once, so that far
    positions are as exact as near ones.

    Raises:
        TypeError, ValueError: dim, base or positions is not as above.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        positions: int = 2048,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("positions", positions)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(
                    f"RotaryEmbedding: {name} must be an int, got {type(value).__name__}."
                )
            if value < 0:
                raise ValueError(f"RotaryEmbedding: {name} is {value}; it must not be negative.")
        if dim % 2:
            raise ValueError(f"RotaryEmbedding: dim is {dim}; it must be even.")
        if not base > 0:
            raise ValueError(f"RotaryEmbedding: base is {base}; it must be positive.")
        self.dim, self.base, self.interleaved = dim, base, interleaved
        self._dtype = torch.float32 if dtype is None else dtype
        self.register_buffer("cos", torch.empty(0, device=device), persistent=False)
        self.register_buffer("sin", torch.empty(0, device=device), persistent=False)
        self._tabulate(positions)

    def extra_repr(self) -> str:
        """Say how it was made."""
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor | Any:  # a pair where there is a key
        """Turn both, or query alone; see `ft.rotary` for shapes, strides and dtypes.

        Args:
            query: (batch, heads, T, head_dim), or packed (tokens, heads, head_dim).
            key: the same with a number of heads of its own.
            position_ids: (T,), (batch, T) or, packed, (tokens,); integers ≥ 0. By default
                offset … offset + T − 1.
            offset: position of the first row: how much a cache of keys holds already.

        Raises:
            TypeError, ValueError: an argument is not as above.
        """
        if position_ids is None:
            if not isinstance(query, Tensor) or query.dim() not in (3, 4):
                return ops.rotary(query, key, self.cos, self.sin)  # which says what is wrong
            if offset < 0:
                raise ValueError(f"RotaryEmbedding: offset is {offset}; it must not be negative.")
            end = offset + query.shape[0 if query.dim() == 3 else 2]
            if end <= self.cos.shape[0] or self._grows(end):
                cos, sin = self.cos[offset:end], self.sin[offset:end]
            else:
                cos, sin = self._angles(torch.arange(offset, end, device=self.cos.device))
        else:
            cos, sin = self._chosen(position_ids, offset)
        return ops.rotary(query, key, cos, sin, interleaved=self.interleaved)

    def _chosen(self, position_ids: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        if not isinstance(position_ids, Tensor) or position_ids.dtype not in (
            torch.int32, torch.int64,
        ):  # fmt: skip
            got = getattr(position_ids, "dtype", type(position_ids).__name__)
            raise TypeError(
                f"RotaryEmbedding: position_ids must be an int32 or int64 tensor, got {got}."
            )
        if offset:
            raise ValueError(
                f"RotaryEmbedding: offset is {offset} beside position_ids; give one of them."
            )
        if not readable(position_ids):
            return self._angles(position_ids)
        if position_ids.numel():
            low, high = (int(x) for x in position_ids.aminmax())
            if low < 0:
                raise ValueError(
                    f"RotaryEmbedding: position_ids holds {low}; it must not be negative."
                )
            if high >= self.cos.shape[0]:
                self._grows(high + 1)
        return self.cos[position_ids], self.sin[position_ids]

    def _grows(self, positions: int) -> bool:
        """Tabulate more; not while a program is traced, which would keep the table it met."""
        if torch.compiler.is_compiling():
            return False
        self._tabulate(1 << (positions - 1).bit_length())
        return True

    def _tabulate(self, positions: int) -> None:
        self.cos, self.sin = self._angles(torch.arange(positions, device=self.cos.device))

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(0, self.dim, 2, dtype=torch.float64, device=positions.device)
        angles = positions.double()[..., None] * self.base ** (-pairs / max(self.dim, 1))
        return angles.cos().to(self._dtype), angles.sin().to(self._dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the table with the module, and make it anew: a cast would have rounded it."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tabulate(self.cos.shape[0])
        return self
