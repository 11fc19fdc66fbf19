"""The histogram loss on CUDA by fused Triton kernels: conditions of use, autograd function and custom operators.

Read `hloss.losses.histogram` first. `hloss.losses.passes` describes the kernels.
"""

import importlib.util
import warnings
from functools import lru_cache, partial

import torch
from torch import Tensor

from hloss.losses.passes import (
    Kept,
    Side,
    backward_pass,
    find_plan,
    forward_pass,
    is_copied,
    places_dtype,
    places_shape,
    ready,
)
from hloss.losses.settings import LossSettings

PRECISION = "tf32x3"  # of matrix products on tensor cores, as exact as float32; "ieee" uses no tensor cores
MOST_PAIRS = 2**39  # the sum of this many 24-bit fractions fits into 63 bits
MOST_ROWS = 2**30  # most rows or columns, so that 32-bit indices also reach the end of the last tile
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
TRITON = importlib.util.find_spec("triton") is not None


def serves(
    embeddings: Tensor, labels: Tensor, references: Tensor | None, reference_labels: Tensor | None, s: LossSettings
) -> bool:
    """Return whether the fused kernels compute this loss.

    For wrong shapes, the result is False, and the streaming implementation raises the error.
    """
    return (
        embeddings.is_cuda
        and s.density == "histogram"
        and _fits(embeddings, labels, references, reference_labels)
        and is_available(embeddings.device)
    )


def _fits(embeddings: Tensor, labels: Tensor, references: Tensor | None, reference_labels: Tensor | None) -> bool:
    columns = embeddings if references is None else references
    if embeddings.ndim != 2 or embeddings.dtype not in DTYPES or columns.ndim != 2 or columns.dtype != embeddings.dtype:
        return False
    n, depth = embeddings.shape
    m = columns.shape[0]
    if n == 0 or m == 0 or depth == 0 or columns.shape[1] != depth or columns.device != embeddings.device:
        return False
    if n * m > MOST_PAIRS or max(n, m) > MOST_ROWS or labels.dtype not in INTEGERS:
        return False
    if labels.ndim == 2 or references is None:
        return reference_labels is None and labels.shape in ((n, m), (n,))
    if labels.shape != (n,) or reference_labels is None or reference_labels.shape != (m,):
        return False
    return reference_labels.dtype == labels.dtype


def is_available(device: torch.device) -> bool:
    """Whether Triton can compile for this GPU; warns once if not."""
    return _is_available(device)


# This has the effect of torch.compiler.assume_constant_result, whose import takes seconds.
is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _is_available(device: torch.device) -> bool:
    reason = _obstacle(device)
    if reason:
        warnings.warn(
            f"the histogram loss runs without its fused CUDA kernels, several times slower: {reason}", stacklevel=2
        )
    return not reason


def _obstacle(device: torch.device) -> str:
    if not TRITON:
        return "Triton is not installed"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (7, 5):
        return f"{torch.cuda.get_device_name(device)} is not an NVIDIA GPU of compute capability 7.5 or later"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # needs a C compiler the first time
    except Exception as error:
        return f"Triton does not start ({error})"
    return ""


def loss(
    embeddings: Tensor, labels: Tensor, references: Tensor | None, reference_labels: Tensor | None, s: LossSettings
) -> Tensor:
    """Return the histogram loss. `serves` must be true for these arguments."""
    if torch.compiler.is_compiling():
        return _operator(embeddings, labels, references, reference_labels, *s.of_histogram, PRECISION)[0]
    return _Fused.apply(embeddings, references, labels, reference_labels, s, PRECISION)


class _Fused(torch.autograd.Function):
    """Autograd function for eager mode: for a small batch, calling `_operator` takes longer than its kernels."""

    @staticmethod
    def forward(ctx, embeddings, references, labels, reference_labels, s, precision):  # type: ignore[no-untyped-def]
        ctx.plan = find_plan(embeddings, references, labels, s, precision)
        loss, kept = forward_pass(embeddings, references, labels, reference_labels, ctx.plan)
        rows, columns = kept.rows, kept.columns or (None, None)
        ctx.save_for_backward(labels, reference_labels, *rows, *columns, kept.slopes, kept.places)
        return loss

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the histogram loss has no second derivatives (its gradient is piecewise constant in the "
                "similarities); call backward without create_graph=True"
            )
        labels, reference_labels, units, scales, column_units, column_scales, slopes, places = ctx.saved_tensors
        columns = None if column_units is None else Side(column_units, column_scales)
        kept = Kept(Side(units, scales), columns, slopes, places)
        gradients = backward_pass(upstream, kept, labels, reference_labels, ctx.needs_input_grad[:2], ctx.plan)
        return *gradients, None, None, None, None


@torch.library.custom_op("hloss::histogram_loss", mutates_args=())
def _operator(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    n_bins: int,
    kernel: str,
    bandwidth: float | None,
    order_cost: str,
    margin: float,
    alpha: float,
    normalize: bool,
    on_degenerate: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, then what the backward pass needs: unit rows and scales of both inputs, slopes and places.

    An empty tensor stands for None, or for unit rows that are the embeddings themselves.
    """
    s = LossSettings(n_bins, kernel, bandwidth, order_cost, margin, alpha, "histogram", normalize, on_degenerate)
    plan = find_plan(embeddings, references, labels, s, precision)
    loss, (rows, columns, slopes, places) = forward_pass(embeddings, references, labels, reference_labels, plan)
    empty = partial(torch.empty, 0, device=embeddings.device)
    # Otherwise the unit rows are the embeddings, and an operator must not return its input.
    copied = plan.is_copied
    sides = [
        rows.units if copied else empty(),
        rows.scales,
        columns.units if columns and copied else empty(),
        columns.scales if columns else empty(dtype=torch.float64),
    ]
    return loss, *sides, slopes, empty(dtype=torch.int16) if places is None else places  # type: ignore[return-value]


@_operator.register_fake
def _operator_shapes(embeddings, labels, references, reference_labels, n_bins, *settings):  # type: ignore[no-untyped-def]
    normalize, device = settings[5], embeddings.device
    columns = embeddings if references is None else references
    copied = is_copied(embeddings.dtype, normalize)
    sides = []
    for x in (embeddings, references):
        sides.append(torch.empty(x.shape if x is not None and copied else 0, device=device))
        sides.append(torch.empty(0 if x is None else len(x), dtype=torch.float64, device=device))
    shape = places_shape(len(embeddings), len(columns))
    places = torch.empty(shape or 0, dtype=places_dtype(n_bins + 1) if shape else torch.int16, device=device)
    loss, slopes = torch.empty((), device=device), torch.empty(2 * n_bins + 3, device=device)
    return loss, *sides, slopes, places


# torch before 2.7 does not infer a schema from the types list[bool] and list[Tensor].
BACKWARD_SCHEMA = (
    "(Tensor upstream, Tensor embeddings, Tensor labels, Tensor? references, Tensor? reference_labels, Tensor units, "
    "Tensor scales, Tensor column_units, Tensor column_scales, Tensor slopes, Tensor places, SymInt n_bins, "
    "bool normalize, str precision, bool[] wanted) -> Tensor[]"
)


@torch.library.custom_op("hloss::histogram_loss_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def _backward_operator(
    upstream: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    units: Tensor,
    scales: Tensor,
    column_units: Tensor,
    column_scales: Tensor,
    slopes: Tensor,
    places: Tensor,
    n_bins: int,
    normalize: bool,
    precision: str,
    wanted: list[bool],
) -> list[Tensor]:
    """Return the requested gradients, with respect to the embeddings and to the references."""
    copied, device = is_copied(embeddings.dtype, normalize), embeddings.device
    rows = Side(units if copied else ready(embeddings, device), scales)
    columns = None
    if references is not None:
        columns = Side(column_units if copied else ready(references, device), column_scales)
    kept = Kept(rows, columns, slopes, places if places.numel() else None)
    s = LossSettings(n_bins, "triangular", None, "step", 0.0, 1.0, "histogram", normalize, "raise")
    plan = find_plan(embeddings, references, labels, s, precision)
    both = backward_pass(upstream, kept, labels, reference_labels, (wanted[0], wanted[1]), plan)
    return [gradient for gradient in both if gradient is not None]


@_backward_operator.register_fake
def _backward_shapes(upstream, embeddings, labels, references, *rest):  # type: ignore[no-untyped-def]
    given = zip((embeddings, references), rest[-1], strict=True)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x, wanted in given if wanted]


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.settings = inputs[4], inputs[10], inputs[12]


def _operator_backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    gradients = iter(_backward_operator(upstream, *ctx.saved_tensors, *ctx.settings, wanted))
    by_embeddings, by_references = (next(gradients) if is_wanted else None for is_wanted in wanted)
    return by_embeddings, None, by_references, *(None,) * 10


_operator.register_autograd(_operator_backward, setup_context=_save_for_backward)
