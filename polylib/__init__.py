"""polylib: methods and fused kernels for neural networks beyond the plain neuron, shared by the chapters of the book.

Three kinds of module live here. `polylib.kernels` holds the fused GPU operations, one a file. `polylib.<part>` holds
the methods of that part of the book, under the names of their chapters. `polylib.lab` holds what notebooks share:
sweeps, claims, figures, training loops and data. Nothing heavy is imported before it is used.
"""

from importlib.metadata import PackageNotFoundError, version

from polylib._lazy import lazy

try:
    __version__ = version("polylib")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__getattr__, __dir__, __all__ = lazy(__name__, extra="notebooks")
