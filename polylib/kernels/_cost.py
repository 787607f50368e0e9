"""The roofline: how fast an operation could be at best on a machine with a known bandwidth and flop rate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Bytes moved to and from memory, and floating-point operations."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def floor(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Return the least time in seconds: memory and arithmetic overlap at best, so the slower of the two counts."""
        if bytes_per_second <= 0 or flops_per_second <= 0:
            raise ValueError(f"rates must be positive, got {bytes_per_second} bytes/s and {flops_per_second} flop/s")
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)
