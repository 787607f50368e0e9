"""Computing only what matters: the methods of the book's part on sparsity."""

from polylib._lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, extra="notebooks")
