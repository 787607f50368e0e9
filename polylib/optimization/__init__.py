"""Step sizes, curvature and their cost: the methods of the book's part on optimization."""

from polylib.optimization.curvature import (
    LanczosResult,
    SpectralDensity,
    flat_matvec,
    ggn_vector_product,
    hessian_matvec,
    hessian_vector_product,
    lanczos,
    spectral_density,
)
from polylib.optimization.learning_rate_batch_size import (
    SpectralSGD,
    batch_top_eigenvalue,
    hessian_noise,
    lr_momentum_from_spectrum,
    max_learning_rate,
)
from polylib.optimization.small_scale_proxies import (
    AdamWIndependent,
    QKNormAttention,
    cross_entropy_z_loss,
    decay_groups,
    initialise_,
    lr_sensitivity,
    max_attention_logits,
    mu_param_groups,
    rope,
    warmup_cosine,
)

__all__ = [
    "AdamWIndependent",
    "LanczosResult",
    "QKNormAttention",
    "SpectralDensity",
    "SpectralSGD",
    "batch_top_eigenvalue",
    "cross_entropy_z_loss",
    "decay_groups",
    "flat_matvec",
    "ggn_vector_product",
    "hessian_matvec",
    "hessian_noise",
    "hessian_vector_product",
    "initialise_",
    "lanczos",
    "lr_momentum_from_spectrum",
    "lr_sensitivity",
    "max_attention_logits",
    "max_learning_rate",
    "mu_param_groups",
    "rope",
    "spectral_density",
    "warmup_cosine",
]
