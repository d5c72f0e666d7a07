"""Triton kernels, one file a family, installed as `fast_transformer.kernels`."""

if __name__ != "fast_transformer.kernels":
    # Found by its folder, from the top of the source tree. That alone is no error: transformers
    # imports whatever is called `kernels` to read its version. To take something from it is one.
    __path__ = []

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"these kernels are imported as fast_transformer.kernels, not as {__name__}: "
            "pip install -e . makes that name, and the folder alone does not."
        )
