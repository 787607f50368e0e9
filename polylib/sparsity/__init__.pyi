"""Computing only what matters: the methods of the book's part on sparsity."""
