"""Compile the kernels that some code launches, without a GPU: `python compile_for_gpu.py CODE CAPABILITY`.

The interpreter accepts kernels that the compiler rejects. Here the compiler runs to the end, to machine code, for every
tile that the autotuner may try, and only the launch is left out: CODE calls registered ops on CPU tensors, and gets
uninitialised results. Prints the names of the kernels.
"""

import sys

from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from triton.runtime.autotuner import Autotuner


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0


def main(code: str, capability: str) -> None:
    driver.set_active(Driver(int(capability)))
    compiled, run = set(), JITFunction.run

    def compile_only(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs | {"warmup": True})
        assert len(kernel.asm["cubin"]) > 0
        compiled.add(self.fn.__name__)

    def compile_every_tile(self, *args, **kwargs):
        for config in self.configs:
            self.fn.run(*args, **kwargs | config.all_kwargs())

    JITFunction.run, Autotuner.run = compile_only, compile_every_tile
    exec(code, {})
    print(*sorted(compiled))


if __name__ == "__main__":
    main(*sys.argv[1:])
