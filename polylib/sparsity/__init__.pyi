"""Computing only what matters: the methods of the book's part on sparsity."""

from .routing import SparseOTRouter as SparseOTRouter
from .sparse_transport import SparseOTResult as SparseOTResult
from .sparse_transport import sparse_ot as sparse_ot
from .topk_simplex import topk_simplex_projection as topk_simplex_projection
