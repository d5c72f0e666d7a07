"""Encoders of transformers in the inference runtimes that people use instead, where installed."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fast_transformer.benchmarks.races import reason

Runner = Callable[[Tensor, Tensor], Tensor]  # ids, mask (batch, length) -> (batch, length, C)
OPSET = 17


class _Positional(nn.Module):
    """What exporters trace: ids and mask in, last hidden state out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length) twice → (batch, length, C)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]


def runtimes(
    model: nn.Module, ids: Tensor, mask: Tensor, dtype: str
) -> tuple[dict[str, Runner], dict[str, str]]:
    """(name -> how it runs an encoder in fp32 weights, name -> why it does not)."""
    made, missing = {}, {}
    for name, make in RUNTIMES.items():
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                made[name] = make(model, ids, mask, dtype)
        except ModuleNotFoundError as error:
            missing[name] = f"{error.name} is not installed"
        except Exception as error:
            missing[name] = reason(error)
    return made, missing


def onnxruntime(model: nn.Module, ids: Tensor, mask: Tensor, dtype: str) -> Runner:
    """ONNX Runtime on the graph that torch.onnx exports."""
    import onnxruntime as ort

    if dtype != "fp32":
        raise NotImplementedError("its CPU kernels do not multiply bfloat16")
    names = ["input_ids", "attention_mask"]
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        torch.onnx.export(
            _Positional(model), (ids, mask), file, input_names=names, opset_version=OPSET,
            dynamic_axes={name: {0: "batch", 1: "length"} for name in names}, dynamo=False,
        )  # fmt: skip
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        return torch.from_numpy(session.run(None, inputs)[0])

    return run


def openvino(model: nn.Module, ids: Tensor, mask: Tensor, dtype: str) -> Runner:
    """OpenVINO on the traced model, for latency, in the precision asked for."""
    import openvino as ov

    converted = ov.convert_model(_Positional(model), example_input=(ids, mask))
    compiled = ov.Core().compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
        },
    )

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(compiled([ids.numpy(), mask.numpy()])[0])

    return run


def ctranslate2(model: nn.Module, ids: Tensor, mask: Tensor, dtype: str) -> Runner:
    """CTranslate2, whose own loader of BERT takes the weights; it is given the tokens alone."""
    import ctranslate2 as ct
    import numpy as np
    from ctranslate2.converters.transformers import BertLoader
    from transformers import BertModel

    whole = BertModel(model.config).eval()  # its loader wants a pooler
    whole.load_state_dict(model.state_dict(), strict=False)
    whole.config.position_embedding_type = "absolute"  # as every BERT of transformers 5 is
    spec = BertLoader().get_model_spec(whole)
    spec.register_vocabulary([str(i) for i in range(model.config.vocab_size)])
    spec.validate()
    spec.optimize()
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        encoder = ct.Encoder(
            folder, device="cpu", inter_threads=1, intra_threads=torch.get_num_threads(),
            compute_type={"fp32": "float32", "bf16": "bfloat16"}[dtype],
        )  # fmt: skip

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        tokens = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        out: Any = encoder.forward_batch(tokens).last_hidden_state
        states = torch.from_numpy(np.array(out.to(ct.DataType.float32)))
        return F.pad(states, (0, 0, 0, ids.shape[1] - states.shape[1]))  # which it has dropped

    return run


RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino, "ctranslate2": ctranslate2}
