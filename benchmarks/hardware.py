"""What a multiprocessor of each kind of GPU has, and how many warps of a kernel fit on it.

Source: NVIDIA, "CUDA C++ Programming Guide", table of technical specifications by compute capability.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Limits of one multiprocessor; shared memory in bytes, registers of 32 bits."""

    name: str
    shared_a_block: int
    shared: int
    warps: int
    blocks: int
    registers: int = 65536


GPUS = {
    "sm_80": GPU("A100", 163 * 1024, 164 * 1024, 64, 32),
    "sm_90": GPU("H100, H200", 227 * 1024, 228 * 1024, 64, 32),
    "sm_100": GPU("B200", 227 * 1024, 228 * 1024, 64, 32),
    "sm_120": GPU("RTX 50", 99 * 1024, 100 * 1024, 48, 24),
}


def occupancy(gpu: GPU, registers: int, shared: int, warps: int) -> int:
    """Return how many warps fit on a multiprocessor; blocks come whole.

    Registers are dealt out in units of 256 a warp, and each block takes 1 KB of shared memory for the system.
    """
    a_warp = 256 * -(-registers * 32 // 256)
    blocks = min(gpu.registers // (a_warp * warps), gpu.shared // (shared + 1024), gpu.warps // warps, gpu.blocks)
    return blocks * warps
