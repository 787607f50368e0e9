"""Fused GPU kernels in Triton, one operation a file, each with its definition in plain PyTorch beside it.

How to read an op file (`quadratic_linear.py` is the first; all others keep its order):

1. the docstring: the formula, the shapes and dtypes, what is saved for the backward pass and why, the source;
2. `<op>_reference`: the definition in a few lines of PyTorch. It is what the kernels are tested against, and what
   runs on a CPU;
3. the Triton kernels, forward first. They accumulate in float32 and mask every edge, so that any shape works;
4. the registration with `torch.library`, which is what makes `torch.compile`, `torch.func` and export work;
5. the public function: it checks its arguments, then picks the kernels or the reference (`backend=`);
6. `cost`: the least bytes and flops the operation can take.

The few lines between the comments `# excerpt: begin` and `# excerpt: end` are what a chapter shows of a kernel
(`excerpt`). What is timed, and what the compiler makes of each kernel, is in `benchmarks/` of the repository.

Everything imports and runs without a GPU and without Triton. With `TRITON_INTERPRET=1` set before the first import
the kernels themselves run on CPU tensors, slowly: that is how they are tested where there is no GPU.
"""

from polylib.kernels._excerpt import excerpt
from polylib.kernels.binary_linear import (
    binary_linear,
    binary_linear_reference,
    pack_signs,
    pack_signs_reference,
    unpack_signs,
)
from polylib.kernels.combiner_attention import combiner_attention, combiner_attention_reference
from polylib.kernels.delta_relu import delta_relu, delta_relu_reference
from polylib.kernels.evonorm_s0 import evonorm_s0, evonorm_s0_reference
from polylib.kernels.fake_quantize import code_range, fake_quantize, fake_quantize_reference
from polylib.kernels.fixed_point import fixed_point, fixed_point_codes, fixed_point_reference, raw_range
from polylib.kernels.group_rational import group_rational, group_rational_reference
from polylib.kernels.group_sort import group_sort, group_sort_reference
from polylib.kernels.ibp_linear import ibp_linear, ibp_linear_reference
from polylib.kernels.interval_affine_relu import interval_affine_relu, interval_affine_relu_reference
from polylib.kernels.kernel_attention_rpe import kernel_attention_rpe, kernel_attention_rpe_reference
from polylib.kernels.masked_gemm_reduce import (
    masked_gemm_adjoint,
    masked_gemm_adjoint_reference,
    masked_gemm_reduce,
    masked_gemm_reduce_reference,
    pack_mask,
)
from polylib.kernels.mkor_refresh import factor_arena, factors_of, mkor_refresh_, mkor_refresh_reference
from polylib.kernels.monarch_multiply import monarch_multiply, monarch_multiply_reference
from polylib.kernels.phm_linear import kronecker_weight, phm_linear, phm_linear_reference
from polylib.kernels.poly_norm import poly_norm, poly_norm_reference
from polylib.kernels.poly_relu import poly_relu, poly_relu_reference
from polylib.kernels.quadratic_linear import quadratic_linear, quadratic_linear_reference
from polylib.kernels.s4d_scan import s4d_scan, s4d_scan_reference
from polylib.kernels.sine_binarize import sine_binarize, sine_binarize_reference
from polylib.kernels.sparse_down import sparse_down, sparse_down_reference
from polylib.kernels.stats_quantize import stats_codes, stats_quantize, stats_quantize_reference
from polylib.kernels.sweep_step import (
    sweep_adam_step,
    sweep_adam_step_reference,
    sweep_sgd_step,
    sweep_sgd_step_reference,
)
from polylib.kernels.topk_residual import (
    topk_decompress_,
    topk_decompress_reference,
    topk_residual_,
    topk_residual_reference,
)
from polylib.kernels.topk_simplex import topk_simplex, topk_simplex_reference
from polylib.kernels.vandermonde import vandermonde, vandermonde_factored, vandermonde_reference

__all__ = [
    "binary_linear",
    "binary_linear_reference",
    "code_range",
    "combiner_attention",
    "combiner_attention_reference",
    "delta_relu",
    "delta_relu_reference",
    "evonorm_s0",
    "evonorm_s0_reference",
    "excerpt",
    "factor_arena",
    "factors_of",
    "fake_quantize",
    "fake_quantize_reference",
    "fixed_point",
    "fixed_point_codes",
    "fixed_point_reference",
    "group_rational",
    "group_rational_reference",
    "group_sort",
    "group_sort_reference",
    "ibp_linear",
    "ibp_linear_reference",
    "interval_affine_relu",
    "interval_affine_relu_reference",
    "kernel_attention_rpe",
    "kernel_attention_rpe_reference",
    "kronecker_weight",
    "masked_gemm_adjoint",
    "masked_gemm_adjoint_reference",
    "masked_gemm_reduce",
    "masked_gemm_reduce_reference",
    "mkor_refresh_",
    "mkor_refresh_reference",
    "monarch_multiply",
    "monarch_multiply_reference",
    "pack_mask",
    "pack_signs",
    "pack_signs_reference",
    "phm_linear",
    "phm_linear_reference",
    "poly_norm",
    "poly_norm_reference",
    "poly_relu",
    "poly_relu_reference",
    "quadratic_linear",
    "quadratic_linear_reference",
    "raw_range",
    "s4d_scan",
    "s4d_scan_reference",
    "sine_binarize",
    "sine_binarize_reference",
    "sparse_down",
    "sparse_down_reference",
    "stats_codes",
    "stats_quantize",
    "stats_quantize_reference",
    "sweep_adam_step",
    "sweep_adam_step_reference",
    "sweep_sgd_step",
    "sweep_sgd_step_reference",
    "topk_decompress_",
    "topk_decompress_reference",
    "topk_residual_",
    "topk_residual_reference",
    "topk_simplex",
    "topk_simplex_reference",
    "unpack_signs",
    "vandermonde",
    "vandermonde_factored",
    "vandermonde_reference",
]
