"""The operations: argument checks and the choice of the backend. The formulas are in docs/mathematics.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import has_torch_function_variadic

from calseg import autograd, native
from calseg import checks as check
from calseg.backends.choice import choose, is_plain
from calseg.dice import DiceOptions
from calseg.operations import (
    AccumulateSpec,
    AceSpec,
    BlendSpec,
    GaussianTensors,
    Labels,
    LossSpec,
    LossTensors,
    SampleSpec,
    Sampling,
)
from calseg.tensors import FLOAT_DTYPES, compute_dtype, is_walkable, layout_like, plain, shape_of

WIDE_DTYPES = (torch.float32, torch.float64)  # the loss has the dtype of such logits, under autocast too


def _loss_dtype(scores: Tensor) -> torch.dtype:
    """Return the input's dtype, or float32 for low precision under autocast, as ``F.cross_entropy`` does."""
    if scores.dtype in WIDE_DTYPES or scores.is_meta:  # "meta" has no autocast
        return scores.dtype
    return torch.float32 if torch.is_autocast_enabled(scores.device.type) else scores.dtype


def _seed(seed: int | Tensor | None, device: torch.device) -> int | Tensor:
    return autograd.draw_seed(device) if seed is None else check.check_seed(seed, device)


def _sampling(
    num_samples: int, temperature: float, beta: float, prior_mu: float, prior_logvar: float, seed: int | Tensor
) -> Sampling:
    return Sampling(num_samples, float(temperature), float(beta), float(prior_mu), float(prior_logvar), seed)


def _owner(input: Tensor) -> Tensor:
    """Return the tensor whose memory the input is, which is the input itself unless it is of a subclass.

    An operation on a subclass makes a plain tensor, and its result is a view of all of that, which nobody else has.
    """
    logits = plain(input)
    base = logits._base
    if logits is input or base is None:
        return input
    is_whole = (base.shape, base.stride(), base.data_ptr()) == (logits.shape, logits.stride(), logits.data_ptr())
    return base if is_whole else input


def _check_reuse(input: Tensor, backend: str) -> None:
    """Refuse to reuse the logits' storage where somebody else could see it change."""
    problem, logits = None, _owner(input)
    if backend == "reference" or torch.compiler.is_compiling():
        problem = "it needs the CPU or Triton backend, in eager mode"
    elif logits.is_leaf:
        problem = "input is a leaf (a parameter or data of the caller's), which nobody expects to be overwritten"
    elif logits._is_view() or logits.untyped_storage().nbytes() != logits.numel() * logits.element_size():
        problem = "input shares its storage with another tensor"
    elif not is_walkable(logits):
        problem = "input has a memory layout that the kernels read through a copy"
    if problem:
        raise ValueError(f"reuse_logits: {problem}")


def _unchecked_cross_entropy(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    scale: float | Tensor = 1.0,
) -> Tensor | None:
    """Compute the loss of the commonest call without the checks, which take longer than a small loss itself.

    Returns None if the call is another one, or if the engine refuses a tensor. Then the checks find out why.
    """
    if type(input) is not Tensor or not input.is_cpu or native.extension is None or not is_plain():
        return None
    if type(label_smoothing) is not float or not 0.0 <= label_smoothing <= 1.0 or type(ignore_index) is not int:
        return None
    if type(scale) is not float or not -check.MAX <= scale <= check.MAX:
        return None
    dtype = input.dtype
    if dtype not in FLOAT_DTYPES:
        return None
    if dtype not in WIDE_DTYPES:
        dtype = _loss_dtype(input)
    labels = Labels(target, ignore_index)
    spec = LossSpec("cross_entropy", labels, None, reduction, dtype, label_smoothing, scale=scale)
    try:
        return autograd.loss("cpu", spec, LossTensors(input), traced=False)
    except native.Unreadable:
        return None


def vls_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    soft_labels: Tensor | None = None,
    alpha: float = 0.1,
    temperature: float = 1.0,
    num_samples: int = 4,
    beta: float = 1.0,
    prior_mu: float = 0.0,
    prior_logvar: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
    reuse_logits: bool = False,
    scale: float | Tensor = 1.0,
) -> Tensor:
    r"""Cross-entropy on variational soft labels; a drop-in for :func:`torch.nn.functional.cross_entropy`.

    Without ``mu, logvar`` and ``soft_labels`` this *is* ``F.cross_entropy``, in value and gradient, class-probability
    targets included. With them, per voxel,

    .. math::
        Y = (1 - \alpha)\,\mathrm{onehot}(y) + \frac{\alpha}{m} \sum_k \mathrm{softmax}\left(
            (\mu + e^{\mathrm{logvar}/2} \epsilon_k) / \tau\right), \qquad
        \ell = -\sum_c w_c \left((1 - ls) Y_c + ls / C\right) \log \mathrm{softmax}(x)_c
            + \beta\, \mathrm{KL}(N(\mu, e^{\mathrm{logvar}}) \,\|\, N(\mu_0, e^{\mathrm{logvar}_0})).

    Args:
        input: logits ``[C]``, ``[N, C]`` or ``[N, C, *S]``; float32, float64, bfloat16 or float16. Channel-first and
            channels-last are read as they are.
        target: class indices ``[N, *S]`` or ``[N, 1, *S]``, of any integer dtype, bool, or a floating dtype that holds
            whole numbers; or, without the arguments of VLS, class probabilities of the shape of ``input``.
        weight: class weights ``[C]``; default ones.
        size_average: deprecated, as in PyTorch.
        ignore_index: voxels with this label add nothing to loss and gradients. Default -100.
        reduce: deprecated, as in PyTorch.
        reduction: ``"mean"`` (the loss over the sum of ``weight[target]``, the KL over the number of voxels that
            count), ``"sum"`` or ``"none"`` (``[N, *S]``). Default ``"mean"``.
        label_smoothing: uniform smoothing in [0, 1] on top. Default 0.
        mu: mean of the Gaussian over the logits, the shape of ``input``.
        logvar: its log-variance, the shape of ``input``.
        soft_labels: soft labels ``Y`` of the shape of ``input`` (from :func:`sample_soft_labels`,
            :func:`accumulate_soft_labels` or several raters), taken as they are, instead of ``mu, logvar``. uint8 and
            uint16 are fractions of 255 and of 65535, as ``calseg soft-labels`` writes them.
        alpha: share of the estimate in the sampled soft label, in [0, 1]. Default 0.1; with it and temperature 1 the
            one-stage method hardly differs from cross-entropy, and alpha 0.3 with temperature 2 has a lower foreground
            ECE and a higher NLL (benchmarks/README.md, "Does it calibrate?").
        temperature: of the sampled softmax, above 0. Default 1; see ``alpha``.
        num_samples: noise samples per voxel, at least 1. Default 4.
        beta: factor of the KL term; 0 leaves it out. Default 1, that of the evidence lower bound; ``calseg train``
            takes 0.001, since the prior holds for the logits of every voxel and flattens confident ones.
        prior_mu: mean of the prior. Default 0.
        prior_logvar: log-variance of the prior. Default 0.
        seed: 64-bit seed of the noise, an int or a 0-d int64 tensor; default: drawn from PyTorch's default generator,
            in a CUDA graph anew at every replay. The processes of ``torch.distributed`` make different seeds of the
            same draw.
        backend: ``"cpu"`` (native), ``"triton"`` (GPU) or ``"reference"`` (plain PyTorch, differentiable to any
            order); default: the fastest that there is. On a GPU float64 takes the reference.
        reuse_logits: let backward write the gradient of ``input`` over ``input`` itself, which saves memory of its
            size; ``input`` then holds no logits after backward. Needs an ``input`` that is not a leaf and shares its
            storage with no other tensor (one of a subclass may be a view of all of a plain tensor). A backward that
            keeps the graph takes new memory. Default False.
        scale: factor of the loss and of its gradients, a number or a 0-d tensor: the weight of a level of deep
            supervision, or 1 / steps of gradient accumulation. It costs no pass over the gradient. Default 1.

    Returns:
        A 0-d tensor, or ``[N, *S]`` with ``reduction="none"``; the dtype of ``input`` (float32 for low precision
        under autocast). It is a plain tensor, also where an argument is of a subclass with memory of its own, such as
        MONAI's ``MetaTensor``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range.
        IndexError: a label that is neither a class nor ``ignore_index``; no argument has been written to then. On a GPU
            the loss and the gradients of such a voxel are NaN instead, for an error would have to wait for the GPU;
            with CALSEG_CHECK_LABELS=1 in the environment it does.

    Note:
        A class with probability 0 in the soft label and logit -inf adds 0 (the limit), where ``F.cross_entropy`` with
        class probabilities gives NaN.

    Example:
        >>> import torch, calseg
        >>> logits = torch.randn(2, 3, 8, 8, 8, requires_grad=True)
        >>> mu, logvar = torch.randn(2, 3, 8, 8, 8), torch.zeros(2, 3, 8, 8, 8)
        >>> target = torch.randint(0, 3, (2, 8, 8, 8), dtype=torch.uint8)
        >>> loss = calseg.vls_cross_entropy(logits, target, mu=mu, logvar=logvar, alpha=0.2)
        >>> loss.backward()
        >>> logits.grad.shape
        torch.Size([2, 3, 8, 8, 8])

    Source: Guo et al., *CALSeg*, ICASSP 2024, doi 10.1109/ICASSP48485.2024.10446030.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    given = input
    if has_torch_function_variadic(input, target, weight, mu, logvar, soft_labels):
        input, target, weight, mu, logvar, soft_labels = map(plain, (input, target, weight, mu, logvar, soft_labels))
    if weight is mu is logvar is soft_labels is None and backend is None and not reuse_logits:
        loss = _unchecked_cross_entropy(input, target, ignore_index, reduction, label_smoothing, scale)
        if loss is not None:
            return loss
    chosen, spec, tensors = _vls_loss(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, mu=mu,
        logvar=logvar, soft_labels=soft_labels, alpha=alpha, temperature=temperature, num_samples=num_samples,
        beta=beta, prior_mu=prior_mu, prior_logvar=prior_logvar, seed=seed, backend=backend, scale=scale,
    )  # fmt: skip
    if reuse_logits:
        _check_reuse(given, chosen)
    return autograd.loss(chosen, spec, tensors, reuse_logits)


def _vls_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, *, ignore_index: int, reduction: str, label_smoothing: float,
    mu: Tensor | None, logvar: Tensor | None, soft_labels: Tensor | None, alpha: float, temperature: float,
    num_samples: int, beta: float, prior_mu: float, prior_logvar: float, seed: int | Tensor | None,
    backend: str | None, scale: float | Tensor,
) -> tuple[str, LossSpec, LossTensors]:  # fmt: skip
    """Check the arguments of :func:`vls_cross_entropy`, and return backend, spec and tensors of the loss."""
    check.check_scores("input", input)
    check.check_reduction(reduction)
    check.check_number("label_smoothing", label_smoothing, 0.0, 1.0, "in [0, 1]")
    check.check_integer("ignore_index", ignore_index)
    check.check_weight(weight, input)
    scale = check.check_scale(scale, input)
    sampled = mu is not None or logvar is not None
    if sampled:
        if soft_labels is not None:
            raise ValueError("soft_labels: got both soft_labels and mu, logvar; wanted one or the other")
        if mu is None or logvar is None:
            missing = "mu" if mu is None else "logvar"
            raise ValueError(f"{missing}: got None, wanted mu and logvar together")
        check.check_like("mu", mu, "input", input)
        check.check_like("logvar", logvar, "input", input)
        check.check_number("alpha", alpha, 0.0, 1.0, "in [0, 1]")
        check.check_sampling(num_samples, temperature)
        check.check_prior(beta, prior_mu, prior_logvar)
    elif soft_labels is not None:
        check.check_soft_labels("soft_labels", soft_labels, input)

    spec = LossSpec("cross_entropy", None, weight, reduction, _loss_dtype(input), float(label_smoothing), scale=scale)
    if not sampled and soft_labels is None and _is_probabilities(target, input):
        if ignore_index >= 0:
            raise ValueError(f"ignore_index: got {ignore_index}, wanted none with class probabilities as target")
        check.check_soft_labels("target", target, input)
        return choose(input, backend), spec, LossTensors(input, target)
    spec = spec._replace(labels=check.check_labels("target", target, input, ignore_index))
    seed_value: int | Tensor = _seed(seed, input.device) if sampled and alpha else 0
    chosen = choose(input, backend)
    if not (sampled and (alpha or beta)):
        return chosen, spec, LossTensors(input, soft_labels)
    spec = spec._replace(
        operation="vls_cross_entropy",
        alpha=float(alpha),
        sampling=_sampling(num_samples, temperature, beta, prior_mu, prior_logvar, seed_value),
    )
    return chosen, spec, LossTensors(input, None, mu, logvar)


def vls_dice_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    include_background: bool = False,
    batch_dice: bool = False,
    smooth: float | tuple[float, float] = 1e-5,
    dice_class_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    soft_labels: Tensor | None = None,
    alpha: float = 0.1,
    temperature: float = 1.0,
    num_samples: int = 4,
    beta: float = 1.0,
    prior_mu: float = 0.0,
    prior_logvar: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
    scale: float | Tensor = 1.0,
    process_group: Any = None,
) -> Tensor:
    r"""Dice plus cross-entropy on variational soft labels; the loss of nnU-Net and MONAI in one operation.

    With :math:`p = \mathrm{softmax}(x)` and the labels :math:`Y` of :func:`vls_cross_entropy` (hard, given or sampled),
    over the voxels that count, for every batch item :math:`n` and class :math:`c`,

    .. math::
        S = \sum_v (p_{vc} + Y_{vc}), \quad D = \sum_v |p_{vc} - Y_{vc}|, \quad
        \mathrm{dice} = 1 - \frac{S - D + \mathrm{smooth}}{S + \mathrm{smooth}}, \quad
        L = w_{ce}\, \ell + w_{dice}\, \mathrm{mean}_{n,c}\, \mathrm{dice}.

    :math:`\ell` is the mean of :func:`vls_cross_entropy`. On hard labels the overlap term equals the soft Dice loss of
    nnU-Net (whose loss is smaller by ``dice_weight``) and of MONAI. On soft labels, soft Dice is least where
    :math:`p` is 0 or 1; this term, the Dice semimetric loss, is least where :math:`p = Y`. ``Y`` is held fixed in it:
    mu and logvar get their gradients from the cross-entropy and the KL term alone.

    The logits are read once in the forward and once in the backward pass. Beyond the gradients, no memory of the size
    of the logits is needed: sampled labels wait in the memory of the gradient.

    Args:
        input: logits ``[C]``, ``[N, C]`` (one item of N voxels) or ``[N, C, *S]``, as in :func:`vls_cross_entropy`.
        target: as in :func:`vls_cross_entropy`.
        weight: class weights of the cross-entropy ``[C]``; default ones.
        dice_weight: factor of the overlap term. Default 1.
        ce_weight: factor of cross-entropy and KL term. Default 1.
        include_background: whether the overlap of class 0 counts. Default False.
        batch_dice: whether S and D are summed over the items of the batch. Default False.
        smooth: number added to numerator and denominator, at least 0; or one for each, ``(numerator, denominator)``.
            Default 1e-5.
        dice_class_weight: factor of the dice of each class ``[C]``, whose mean is not divided by the factors. Default
            ones.
        reduction: ``"mean"``, or ``"sum"`` of dice over items and classes, and of the rest over voxels. Default
            ``"mean"``.
        ignore_index: as in :func:`vls_cross_entropy`. The loss is 0 where all voxels are ignored.
        label_smoothing: uniform smoothing in the cross-entropy. Default 0.
        mu: as in :func:`vls_cross_entropy`; so are all further arguments but the last.
        logvar: log-variance, the shape of ``input``.
        soft_labels: soft labels instead of ``mu, logvar``.
        alpha: share of the estimate in the sampled soft label. Default 0.1.
        temperature: of the sampled softmax. Default 1.
        num_samples: noise samples per voxel. Default 4.
        beta: factor of the KL term. Default 1.
        prior_mu: mean of the prior. Default 0.
        prior_logvar: log-variance of the prior. Default 0.
        seed: 64-bit seed of the noise.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; default: the fastest that there is.
        scale: factor of the loss and of its gradients, a number or a 0-d tensor. Default 1.
        process_group: a ``torch.distributed`` process group over which S and D are summed (nnU-Net's ``ddp``); needs
            ``batch_dice``. As for any collective operation, gradients are those of the sum of the ranks' losses, which
            ``DistributedDataParallel`` divides by the number of ranks. Default None: this process alone.

    Returns:
        A 0-d tensor in the dtype of ``input`` (float32 for low precision under autocast).

    Raises:
        TypeError, ValueError, IndexError: as :func:`vls_cross_entropy`.

    Example:
        >>> import torch, calseg
        >>> logits = torch.randn(2, 3, 8, 8, 8, requires_grad=True)
        >>> target = torch.randint(0, 3, (2, 8, 8, 8), dtype=torch.uint8)
        >>> loss = calseg.vls_dice_cross_entropy(logits, target, batch_dice=True)
        >>> loss.backward()
        >>> logits.grad.shape
        torch.Size([2, 3, 8, 8, 8])

    Source: Wang et al., *Dice Semimetric Losses*, MICCAI 2023, arXiv 2303.16296 (the overlap term); Isensee et al.,
    *nnU-Net*, 2021 (the sum with cross-entropy); Guo et al., *CALSeg*, ICASSP 2024 (the labels).
    """
    if has_torch_function_variadic(input, target, weight, dice_class_weight, mu, logvar, soft_labels):
        input, target, weight, dice_class_weight = map(plain, (input, target, weight, dice_class_weight))
        mu, logvar, soft_labels = map(plain, (mu, logvar, soft_labels))
    for name, value in (("dice_weight", dice_weight), ("ce_weight", ce_weight)):
        check.check_finite(name, value)
    smooth_pair = check.check_pair("smooth", smooth)
    check.check_weight(dice_class_weight, input, "dice_class_weight")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {check.describe(reduction)}, wanted 'mean' or 'sum'")
    check.check_flag("include_background", include_background)
    check.check_flag("batch_dice", batch_dice)
    if process_group is not None and not batch_dice:
        raise ValueError("process_group: got one without batch_dice=True, which sums S and D over the batch")
    chosen, spec, tensors = _vls_loss(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, mu=mu,
        logvar=logvar, soft_labels=soft_labels, alpha=alpha, temperature=temperature, num_samples=num_samples,
        beta=beta, prior_mu=prior_mu, prior_logvar=prior_logvar, seed=seed, backend=backend, scale=scale,
    )  # fmt: skip
    if not include_background and shape_of(input)[1] == 1:
        raise ValueError(f"include_background: got False for one class ({check.describe(input)}), wanted 2 or more")
    options = DiceOptions(
        dice_weight, ce_weight, include_background, batch_dice, smooth_pair, dice_class_weight, reduction, spec.scale,
        spec.dtype, process_group,
    )  # fmt: skip
    spec = spec._replace(dtype=compute_dtype(input.dtype), scale=1.0)
    return autograd.dice_loss(chosen, spec, options, tensors)


def soft_cross_entropy(
    input: Tensor,
    soft_target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_mask: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    r"""Cross-entropy against probabilities: ``-sum_c w[c] * soft_target[c] * log softmax(input)[c]``.

    ``F.cross_entropy`` with class probabilities, plus a mask of voxels to leave out. Both arguments get gradients.

    Args:
        input: logits ``[C]``, ``[N, C]`` or ``[N, C, *S]``.
        soft_target: probabilities of the shape of ``input``, of any floating dtype; or of uint8 or uint16, as fractions
            of 255 or of 65535.
        weight: class weights ``[C]``; default ones.
        ignore_mask: bool ``[N, *S]`` or ``[N, 1, *S]``, True where a voxel is left out. Default: none is.
        label_smoothing: uniform smoothing in [0, 1] on top. Default 0.
        reduction: ``"mean"`` (over the voxels that count), ``"sum"`` or ``"none"``. Default ``"mean"``.
        backend: see :func:`vls_cross_entropy`.
        scale: see :func:`vls_cross_entropy`.

    Returns:
        A 0-d tensor, or ``[N, *S]`` with ``reduction="none"``, in the dtype of ``input``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range.

    Example:
        >>> import torch, calseg
        >>> raters = torch.softmax(torch.randn(1, 2, 16, 16), 1)
        >>> calseg.soft_cross_entropy(torch.zeros(1, 2, 16, 16), raters)
        tensor(0.6931)
    """
    if has_torch_function_variadic(input, soft_target, weight, ignore_mask):
        input, soft_target, weight, ignore_mask = map(plain, (input, soft_target, weight, ignore_mask))
    check.check_scores("input", input)
    check.check_soft_labels("soft_target", soft_target, input)
    check.check_reduction(reduction)
    check.check_number("label_smoothing", label_smoothing, 0.0, 1.0, "in [0, 1]")
    check.check_weight(weight, input)
    scale = check.check_scale(scale, input)
    labels: Labels | None = None
    if ignore_mask is not None:
        labels = Labels(check.check_mask("ignore_mask", ignore_mask, input), 1, True)
    spec = LossSpec("cross_entropy", labels, weight, reduction, _loss_dtype(input), float(label_smoothing), scale=scale)
    return autograd.loss(choose(input, backend), spec, LossTensors(input, soft_target))


def _is_probabilities(target: Any, input: Tensor) -> bool:
    return isinstance(target, Tensor) and target.is_floating_point() and target.shape == input.shape


def vls_elbo(
    mu: Tensor,
    logvar: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    num_samples: int = 4,
    beta: float = 1.0,
    prior_mu: float = 0.0,
    prior_logvar: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    seed: int | Tensor | None = None,
    backend: str | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    r"""The stage-1 objective in dense form: the negative evidence lower bound of the labels.

    .. math::
        E = -\frac{1}{m} \sum_k w_y \log \mathrm{softmax}(\mu + e^{\mathrm{logvar}/2} \epsilon_k)_y
            + \beta\, \mathrm{KL}(N(\mu, e^{\mathrm{logvar}}) \,\|\, N(\mu_0, e^{\mathrm{logvar}_0})).

    Args:
        mu: mean of the Gaussian over the logits, ``[C]``, ``[N, C]`` or ``[N, C, *S]``.
        logvar: its log-variance, the shape of ``mu``.
        target: class indices ``[N, *S]`` or ``[N, 1, *S]``, of the dtypes of :func:`vls_cross_entropy`.
        weight: class weights ``[C]``; default ones.
        num_samples: noise samples per voxel. Default 4.
        beta: factor of the KL term. Default 1.
        prior_mu: mean of the prior. Default 0.
        prior_logvar: log-variance of the prior. Default 0.
        ignore_index: label of voxels that do not count. Default -100.
        reduction: as in :func:`vls_cross_entropy`. Default ``"mean"``.
        seed: as in :func:`vls_cross_entropy`.
        backend: as in :func:`vls_cross_entropy`.
        scale: as in :func:`vls_cross_entropy`.

    Returns:
        A 0-d tensor, or ``[N, *S]`` with ``reduction="none"``, in the dtype of ``mu``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`vls_cross_entropy`.

    Example:
        >>> import torch, calseg
        >>> mu = torch.zeros(1, 3, 4, 4, 4, requires_grad=True)
        >>> logvar = torch.zeros(1, 3, 4, 4, 4, requires_grad=True)
        >>> calseg.vls_elbo(mu, logvar, torch.zeros(1, 4, 4, 4, dtype=torch.int16)).backward()
        >>> bool((mu.grad[:, 0] < 0).all())
        True
    """
    if has_torch_function_variadic(mu, logvar, target, weight):
        mu, logvar, target, weight = map(plain, (mu, logvar, target, weight))
    check.check_scores("mu", mu)
    check.check_like("logvar", logvar, "mu", mu)
    check.check_reduction(reduction)
    check.check_integer("ignore_index", ignore_index)
    check.check_integer("num_samples", num_samples, 1)
    check.check_prior(beta, prior_mu, prior_logvar)
    check.check_weight(weight, mu)
    labels = check.check_labels("target", target, mu, ignore_index)
    sampling = _sampling(num_samples, 1.0, beta, prior_mu, prior_logvar, _seed(seed, mu.device))
    scale = check.check_scale(scale, mu)
    spec = LossSpec("vls_elbo", labels, weight, reduction, _loss_dtype(mu), sampling=sampling, scale=scale)
    return autograd.loss(choose(mu, backend), spec, LossTensors(mu=mu, logvar=logvar))


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: float = 0.0,
    prior_logvar: float = 0.0,
    reduction: str = "mean",
    *,
    backend: str | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    r"""``KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar)))``, summed over the class axis.

    Args:
        mu: mean, ``[C]``, ``[N, C]`` or ``[N, C, *S]`` (a latent code is ``[N, L]``).
        logvar: log-variance, the shape of ``mu``.
        prior_mu: mean of the prior. Default 0.
        prior_logvar: log-variance of the prior. Default 0.
        reduction: ``"mean"`` over ``[N, *S]`` (not over classes: the KL is additive in them), ``"sum"`` or
            ``"none"``. Default ``"mean"``.
        backend: as in :func:`vls_cross_entropy`.
        scale: as in :func:`vls_cross_entropy`.

    Returns:
        A 0-d tensor, or ``[N, *S]`` with ``reduction="none"``, in nats, in the dtype of ``mu``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range.

    Example:
        >>> import torch, calseg
        >>> calseg.gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3))
        tensor(1.5000)

    Source: Kingma and Welling, *Auto-Encoding Variational Bayes*, 2014, appendix B.
    """
    if has_torch_function_variadic(mu, logvar):
        mu, logvar = plain(mu), plain(logvar)
    check.check_scores("mu", mu)
    check.check_like("logvar", logvar, "mu", mu)
    check.check_reduction(reduction)
    check.check_prior(1.0, prior_mu, prior_logvar)
    sampling = _sampling(1, 1.0, 1.0, prior_mu, prior_logvar, 0)
    scale = check.check_scale(scale, mu)
    spec = LossSpec("gaussian_kl", None, None, reduction, _loss_dtype(mu), sampling=sampling, scale=scale)
    return autograd.loss(choose(mu, backend), spec, LossTensors(mu=mu, logvar=logvar))


def ace_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    n_bins: int = 20,
    binning: str = "hard",
    include_background: bool = True,
    ignore_empty_classes: bool = True,
    empty_weight: float = 0.01,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    r"""Marginal L1 average calibration error (mL1-ACE), differentiable: an auxiliary loss beside Dice or cross-entropy.

    For every batch item and class, over its :math:`B` bins :math:`b` of the class's probability that are not empty,
    of mass :math:`n_b`, with :math:`p` the probability and :math:`h` 1 where the class is the label, else 0,

    .. math::
        \mathrm{ACE} = \frac{1}{B} \sum_b \frac{1}{n_b} \Big| \sum_v s_b(p_v)\,(p_v - h_v) \Big|, \qquad
        n_b = \sum_v s_b(p_v).

    Hard bins: :math:`s_b` is 1 for the probabilities in the bin, and no gradient flows through it. Soft bins: a voxel
    is shared between the two bins whose centres are nearest, in proportion to the distance, and the gradient flows
    through the shares too. Beyond the logits, memory is needed for their gradient and a table per item and class.

    Args:
        input: logits ``[C]``, ``[N, C]`` (one item of N voxels) or ``[N, C, *S]``; float32, float64, bfloat16 or
            float16. Their softmax is taken.
        target: class indices ``[N, *S]`` or ``[N, 1, *S]``, of the dtypes of :func:`vls_cross_entropy`.
        weight: a factor of the error of each class, ``[C]``. Default ones.
        n_bins: bins of equal width over [0, 1], 1 to 65536. Default 20.
        binning: ``"hard"`` or ``"soft"``. Default ``"hard"``.
        include_background: False leaves class 0 out. Default True.
        ignore_empty_classes: whether a class that no label of the item has counts 0. Default True.
        empty_weight: a bin with less mass than this is empty (soft bins; a hard one holds whole voxels). Default 0.01.
        ignore_index: voxels with this label add nothing to loss and gradient. Default -100.
        reduction: ``"mean"`` or ``"sum"`` over items and classes, or ``"none"``. Default ``"mean"``.
        backend: ``"cpu"`` (native) or ``"reference"`` (plain PyTorch, on a GPU too, differentiable to any order);
            default: the fastest that there is.
        scale: as in :func:`vls_cross_entropy`.

    Returns:
        A 0-d tensor, or ``[N, C]`` with ``reduction="none"`` (``[N, C - 1]`` without background; N is 1 for ``[C]``
        and ``[N, C]``); the dtype of ``input`` (float32 for low precision under autocast). 0 where all is ignored.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range.
        IndexError: a label that is neither a class nor ``ignore_index``.

    Example:
        >>> import torch, calseg
        >>> logits = torch.randn(2, 3, 8, 8, 8, requires_grad=True)
        >>> target = torch.randint(0, 3, (2, 8, 8, 8), dtype=torch.uint8)
        >>> loss = calseg.vls_cross_entropy(logits, target) + calseg.ace_loss(logits, target, binning="soft")
        >>> loss.backward()

    Source: Barfoot et al., *Average Calibration Error: A Differentiable Loss for Improved Reliability in Image
    Segmentation*, MICCAI 2024 (hard bins); *Average Calibration Losses for Reliable Uncertainty in Medical Image
    Segmentation*, 2025, arXiv 2506.03942 (soft bins, classes without labels).
    """
    if has_torch_function_variadic(input, target, weight):
        input, target, weight = map(plain, (input, target, weight))
    check.check_scores("input", input)
    labels = check.check_labels("target", target, input, ignore_index)
    check.check_weight(weight, input)
    check.check_bins(n_bins)
    if binning not in ("hard", "soft"):
        raise ValueError(f"binning: got {check.describe(binning)}, wanted 'hard' or 'soft'")
    check.check_flag("include_background", include_background)
    check.check_flag("ignore_empty_classes", ignore_empty_classes)
    check.check_number("empty_weight", empty_weight, 0.0, math.inf, "of at least 0")
    check.check_integer("ignore_index", ignore_index)
    check.check_reduction(reduction)
    soft, first_class = binning == "soft", 0 if include_background else 1
    if shape_of(input)[1] <= first_class:
        raise ValueError(f"include_background: got False for one class ({check.describe(input)}), wanted 2 or more")
    scale = check.check_scale(scale, input)
    spec = AceSpec(labels, n_bins, first_class, soft)
    bins = autograd.ace_bins(choose(input, backend, "ace_loss"), spec, input)
    return _ace_from_bins(
        *bins, weight, empty_weight=empty_weight if soft else 0.0, ignore_empty_classes=ignore_empty_classes,
        reduction=reduction, out_dtype=_loss_dtype(input), scale=scale,
    )  # fmt: skip


def _ace_from_bins(
    mass: Tensor,
    confidence: Tensor,
    hits: Tensor,
    weight: Tensor | None,
    *,
    empty_weight: float,
    ignore_empty_classes: bool,
    reduction: str,
    out_dtype: torch.dtype,
    scale: float | Tensor,
) -> Tensor:
    """Per item and class the mean of |confidence - accuracy| over the bins that are not empty, ``[N, kinds]``; reduced.

    A bin is empty below a mass of ``empty_weight``. A class that no label has counts 0 if ``ignore_empty_classes``.
    """
    filled = ~((mass == 0) | (mass < empty_weight))  # a NaN is not empty: it reaches the loss
    gap = torch.where(filled, (confidence - hits).abs() / torch.where(filled, mass, 1.0), 0.0)
    error = gap.sum(-1) / filled.sum(-1).clamp(min=1)
    if ignore_empty_classes:
        error = torch.where(hits.sum(-1) > 0, error, 0.0)
    if weight is not None:
        error = error * weight.to(error.dtype)[-error.shape[1] :]
    return (scale * {"none": error, "mean": error.mean(), "sum": error.sum()}[reduction]).to(out_dtype)


def sample_soft_labels(
    mu: Tensor,
    logvar: Tensor,
    target: Tensor | None = None,
    *,
    num_samples: int = 4,
    temperature: float = 1.0,
    alpha: float = 0.1,
    ignore_index: int = -100,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Soft labels from a Gaussian over the logits of every voxel.

    ``mean_k softmax((mu + exp(logvar / 2) * eps_k) / temperature)``, and with a target
    ``(1 - alpha) * onehot(target) + alpha`` times that. No noise is stored: backward draws it again.

    Args:
        mu: mean, ``[C]``, ``[N, C]`` or ``[N, C, *S]``.
        logvar: log-variance, the shape of ``mu``.
        target: class indices ``[N, *S]`` or ``[N, 1, *S]``. Default None: the estimate alone.
        num_samples: noise samples per voxel. Default 4.
        temperature: of the softmax, above 0. Default 1.
        alpha: share of the estimate where there is a target, in [0, 1]. Default 0.1.
        ignore_index: label of voxels whose soft label is zero in every class (they add nothing to a soft
            cross-entropy). Default -100.
        seed: as in :func:`vls_cross_entropy`.
        backend: as in :func:`vls_cross_entropy`.

    Returns:
        Probabilities of the shape and dtype of ``mu``.

    Raises:
        TypeError, ValueError, IndexError: as :func:`vls_cross_entropy`.

    Example:
        >>> import torch, calseg
        >>> mu, logvar = torch.randn(1, 4, 8, 8, 8), torch.zeros(1, 4, 8, 8, 8)
        >>> soft = calseg.sample_soft_labels(mu, logvar, num_samples=8, temperature=2.0, seed=0)
        >>> torch.allclose(soft.sum(1), torch.ones(1, 8, 8, 8))
        True
    """
    check.check_scores("mu", mu)
    check.check_like("logvar", logvar, "mu", mu)
    check.check_sampling(num_samples, temperature)
    check.check_number("alpha", alpha, 0.0, 1.0, "in [0, 1]")
    check.check_integer("ignore_index", ignore_index)
    labels = None if target is None else check.check_labels("target", target, mu, ignore_index)
    sampling = Sampling(num_samples, float(temperature), seed=_seed(seed, mu.device))
    spec = SampleSpec(labels, float(alpha), sampling)
    return autograd.sample_soft_labels(choose(mu, backend), spec, GaussianTensors(mu, logvar))


def accumulate_soft_labels(
    logit_maps: Iterable[Tensor],
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 0.1,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    r"""Soft labels from logit maps that arrive one at a time (the paper's decoder, run once per latent sample).

    ``y_hat = mean_k softmax(nu_k / temperature)``, and with a target ``(1 - alpha) * onehot(target) + alpha * y_hat``.
    Only the running sum is held, so memory does not grow with the number of maps; pass a generator. Where a map
    requires a gradient, the result does too (autograd then keeps the maps).

    Args:
        logit_maps: logits ``nu_k``, each ``[C]``, ``[N, C]`` or ``[N, C, *S]``, all of one shape; at least one.
        target: class indices ``[N, *S]`` or ``[N, 1, *S]``. Default None: the estimate alone.
        temperature: of the softmax, above 0. Default 1.
        alpha: share of the estimate where there is a target, in [0, 1]. Default 0.1.
        ignore_index: label of voxels whose soft label is zero in every class. Default -100.
        backend: as in :func:`vls_cross_entropy`.

    Returns:
        Probabilities of the shape of the maps, in their dtype, float32 at least.

    Raises:
        TypeError, ValueError, IndexError: as :func:`vls_cross_entropy`.

    Example:
        >>> import torch, calseg
        >>> decoder = torch.nn.Conv3d(3, 4, 1)
        >>> latents = (torch.randn(1, 3, 8, 8, 8) for _ in range(5))
        >>> with torch.no_grad():
        ...     soft = calseg.accumulate_soft_labels((decoder(z) for z in latents), temperature=2.0)
        >>> torch.allclose(soft.sum(1), torch.ones(1, 8, 8, 8))
        True

    Source: Guo et al., *CALSeg*, ICASSP 2024, section 2.
    """
    check.check_sampling(1, temperature)
    check.check_number("alpha", alpha, 0.0, 1.0, "in [0, 1]")
    check.check_integer("ignore_index", ignore_index)
    if not isinstance(logit_maps, Iterable):
        raise TypeError(f"logit_maps: got {check.describe(logit_maps)}, wanted maps of logits, one after another")
    maps = _checked_maps(logit_maps)
    first = next(maps, None)
    if first is None:
        raise ValueError("logit_maps: got none, wanted at least one map of logits")
    maps = chain((first,), maps)
    labels = None if target is None else check.check_labels("target", target, first, ignore_index)
    chosen = choose(first, backend)
    total = torch.zeros_like(
        first, dtype=compute_dtype(first.dtype), memory_format=layout_like(first), requires_grad=False
    )
    step = AccumulateSpec(labels, float(temperature))
    count = 0
    for count, logits in enumerate(maps, 1):
        total = autograd.accumulate_softmax(chosen, step, total, logits)
    return autograd.blend_soft_labels(chosen, BlendSpec(labels, float(alpha), count), total)


def _checked_maps(logit_maps: Iterable[Tensor]) -> Iterator[Tensor]:
    shape = None
    for index, logits in enumerate(logit_maps):
        check.check_scores(f"logit_maps[{index}]", logits)
        if shape is not None and (logits.shape, logits.device) != shape:
            raise ValueError(
                f"logit_maps[{index}]: got {check.describe(logits)}, wanted {list(shape[0])} on {shape[1]} as before"
            )
        shape = logits.shape, logits.device
        yield logits
