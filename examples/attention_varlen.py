"""Sequences of different lengths, packed one after another: no padding is stored or computed.

    python examples/attention_varlen.py

The formulas are in docs/attention.md.
"""

import torch

import fast_transformer as ft

heads, head_dim = 12, 64
lengths = torch.tensor([7, 128, 31, 64])
offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
tokens, longest = int(lengths.sum()), int(lengths.max())

query, key, value = (torch.randn(tokens, heads, head_dim, requires_grad=True) for _ in range(3))
out = ft.attention_varlen(query, key, value, offsets, offsets, longest, longest, causal=True)
out.square().mean().backward()
print("out", tuple(out.shape), "dquery", tuple(query.grad.shape))

# The second sequence alone gives the same numbers: sequences do not see each other.
start, end = offsets[1], offsets[2]
alone = ft.attention(
    *(x[start:end].transpose(0, 1)[None] for x in (query, key, value)), causal=True
)
print("same as alone:", torch.equal(alone[0].transpose(0, 1), out[start:end]))
