"""Swaps our modules into models that exist already, undoes it, and tells what it did."""

from fast_transformer.integrations.explanation import Explanation, explain
from fast_transformer.integrations.prepared import repack
from fast_transformer.integrations.swap import accelerate, restore

__all__ = ["Explanation", "accelerate", "explain", "repack", "restore"]
