"""Every op and model against PyTorch's best way, side by side: `fast-transformer bench --help`.

Installed as `fast_transformer.benchmarks`.
"""
