"""Every op and model against PyTorch's best way, side by side: `python -m benchmarks --help`."""
