"""What measures the kernels: times against their peers, and what the compiler makes of them.

`python -m benchmarks.run [op ...]` times; `python -m benchmarks.compile_report [op ...]` compiles without a GPU. Both
run from the root of a checkout; neither is part of the installed package. `ops/<op>.py` holds the sizes and the peers.
"""
