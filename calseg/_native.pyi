"""The CPU and CUDA kernels (csrc/module.cpp). Arguments come checked from calseg/ops.py."""

from typing import Any

View = tuple[int, int, int, int, int] | None
Shape = tuple[int, int, int]
Labels = tuple[View, int, bool] | None
Gaussian = tuple[Any, ...]
Outcome = tuple[float, int, int]

POOLED_BYTES: int
CUDA_ARCHITECTURES: list[str]  # empty where the CUDA kernels were not built

def cross_entropy(
    shape: Shape,
    logits: View,
    soft_labels: View,
    labels: Labels,
    weight: View,
    label_smoothing: float,
    grad_output: View,
    loss: View,
    grad_logits: View,
    grad_soft_labels: View,
    reduction: int,
    num_threads: int,
    /,
) -> Outcome: ...
def small_cross_entropy(
    logits: object,
    target: object,
    ignore_index: object,
    reduction: object,
    label_smoothing: object,
    with_gradient: bool,
    num_threads: int,
    /,
) -> tuple[float, Any] | None: ...
def vls_cross_entropy(
    shape: Shape,
    logits: View,
    gaussian: Gaussian,
    labels: Labels,
    weight: View,
    label_smoothing: float,
    alpha: float,
    grad_output: View,
    loss: View,
    grad_logits: View,
    grad_mu: View,
    grad_logvar: View,
    reduction: int,
    num_threads: int,
    /,
) -> Outcome: ...
def vls_elbo(
    shape: Shape,
    gaussian: Gaussian,
    labels: Labels,
    weight: View,
    grad_output: View,
    loss: View,
    grad_mu: View,
    grad_logvar: View,
    reduction: int,
    num_threads: int,
    /,
) -> Outcome: ...
def gaussian_kl(
    shape: Shape,
    gaussian: Gaussian,
    grad_output: View,
    loss: View,
    grad_mu: View,
    grad_logvar: View,
    reduction: int,
    num_threads: int,
    /,
) -> Outcome: ...
def sample_soft_labels(
    shape: Shape, gaussian: Gaussian, labels: Labels, alpha: float, soft_labels: View, num_threads: int, /
) -> Outcome: ...
def sample_soft_labels_backward(
    shape: Shape,
    gaussian: Gaussian,
    labels: Labels,
    alpha: float,
    grad_output: View,
    grad_mu: View,
    grad_logvar: View,
    num_threads: int,
    /,
) -> Outcome: ...
def accumulate_softmax(shape: Shape, logits: View, temperature: float, total: View, num_threads: int, /) -> None: ...
def accumulate_softmax_backward(
    shape: Shape, logits: View, temperature: float, grad_output: View, grad_logits: View, num_threads: int, /
) -> None: ...
def blend_soft_labels(
    shape: Shape, estimate: View, labels: Labels, alpha: float, scale: float, blended: View, num_threads: int, /
) -> Outcome: ...
def calibration_bins(
    shape: Shape,
    scores: View,
    labels: Labels,
    mask: View,
    n_bins: int,
    first_class: int,
    from_logits: bool,
    class_wise: bool,
    skip_background: bool,
    per_item: bool,
    right_closed: bool,
    tolerance: float,
    sums: View,
    totals: View,
    num_threads: int,
    /,
) -> tuple[int, int, int, float, float]: ...
def cuda_calibration_bins(
    shape: Shape,
    scores: View,
    labels: Labels,
    mask: View,
    n_bins: int,
    first_class: int,
    from_logits: bool,
    class_wise: bool,
    skip_background: bool,
    per_item: bool,
    right_closed: bool,
    tolerance: float,
    sums: View,
    totals: View,
    faults: View,
    device: int,
    stream: int,
    /,
) -> None: ...
def ace_moments(
    shape: Shape,
    logits: View,
    labels: Labels,
    n_bins: int,
    first_class: int,
    soft: bool,
    sums: View,
    nans: View,
    num_threads: int,
    /,
) -> Outcome: ...
def ace_moments_backward(
    shape: Shape,
    logits: View,
    labels: Labels,
    n_bins: int,
    first_class: int,
    soft: bool,
    slopes: View,
    grad_logits: View,
    num_threads: int,
    /,
) -> None: ...
def empty_pooled(dtype: int, sizes: tuple[int, ...], strides: tuple[int, ...], /) -> Any: ...
def pool_trim() -> None: ...
def pool_held_bytes() -> int: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def set_isa(name: str, /) -> None: ...
def threading_layer() -> str: ...
