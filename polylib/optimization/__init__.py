"""Step sizes, curvature and their cost: the methods of the book's part on optimization."""

from polylib._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, extra="notebooks")
