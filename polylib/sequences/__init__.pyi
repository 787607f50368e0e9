"""Sequence models at less than quadratic cost: the methods of the book's part on sequences."""
