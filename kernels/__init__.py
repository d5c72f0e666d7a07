"""Triton kernels, one file a family, installed as `fast_transformer.kernels`."""

if __name__ != "fast_transformer.kernels":
    raise ImportError(
        f"these kernels are imported as fast_transformer.kernels, not as {__name__}: "
        "pip install -e . makes that name, and the folder alone does not."
    )
