"""Neurons beyond the inner product: the methods of the book's first part."""

from polylib._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, extra="notebooks")
