"""Step sizes, curvature and their cost: the methods of the book's part on optimization."""

from .curvature import LanczosResult as LanczosResult
from .curvature import SpectralDensity as SpectralDensity
from .curvature import flat_matvec as flat_matvec
from .curvature import ggn_vector_product as ggn_vector_product
from .curvature import hessian_matvec as hessian_matvec
from .curvature import hessian_vector_product as hessian_vector_product
from .curvature import lanczos as lanczos
from .curvature import spectral_density as spectral_density
from .learning_rate_batch_size import SpectralSGD as SpectralSGD
from .learning_rate_batch_size import batch_top_eigenvalue as batch_top_eigenvalue
from .learning_rate_batch_size import hessian_noise as hessian_noise
from .learning_rate_batch_size import lr_momentum_from_spectrum as lr_momentum_from_spectrum
from .learning_rate_batch_size import max_learning_rate as max_learning_rate
from .scaling import extrapolate as extrapolate
from .scaling import optimal_learning_rate as optimal_learning_rate
from .small_scale_proxies import AdamWIndependent as AdamWIndependent
from .small_scale_proxies import QKNormAttention as QKNormAttention
from .small_scale_proxies import cross_entropy_z_loss as cross_entropy_z_loss
from .small_scale_proxies import decay_groups as decay_groups
from .small_scale_proxies import initialise_ as initialise_
from .small_scale_proxies import lr_sensitivity as lr_sensitivity
from .small_scale_proxies import max_attention_logits as max_attention_logits
from .small_scale_proxies import mu_param_groups as mu_param_groups
from .small_scale_proxies import rope as rope
from .small_scale_proxies import warmup_cosine as warmup_cosine
