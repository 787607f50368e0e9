"""Sequence models at less than quadratic cost: the methods of the book's part on sequences."""

from polylib._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, extra="notebooks")
