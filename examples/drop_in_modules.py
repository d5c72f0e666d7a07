"""ft.nn's modules take the place of torch.nn's: same arguments, same state_dict, same results.

    python examples/drop_in_modules.py

To swap the modules of a model that exists already, see accelerate_bert.py.
"""

import torch
from torch import nn

import fast_transformer as ft

options = {"d_model": 256, "nhead": 4, "dim_feedforward": 1024, "batch_first": True}
stock = nn.TransformerEncoder(nn.TransformerEncoderLayer(**options), 2, enable_nested_tensor=False)
ours = ft.nn.TransformerEncoder(ft.nn.TransformerEncoderLayer(**options), 2)
ours.load_state_dict(stock.state_dict())
print("a TransformerEncoder:", isinstance(ours, nn.TransformerEncoder))

x = torch.randn(8, 100, 256)
padding = torch.arange(100) >= torch.randint(20, 101, (8, 1))  # True where there is no token

stock.eval(), ours.eval()
with torch.no_grad():
    difference = ours(x, src_key_padding_mask=padding) - stock(x, src_key_padding_mask=padding)
print("largest difference on tokens:", difference[~padding].abs().max().item())

# Training: dropout, gradients and any optimizer as usual.
ours.train()
optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
for step in range(3):
    loss = ours(x, src_key_padding_mask=padding)[~padding].square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")
