"""The streaming histogram loss under torch.compile and torch.export, as one operator.

The compiler cannot trace the passes over blocks of pairs, because they depend on the values of the labels. The operator
computes the loss and its gradient together, and the backward pass multiplies this gradient by the upstream gradient.
`hloss.losses.fused` has the operators of the CUDA kernels.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hloss.losses.settings import LossSettings
from hloss.losses.streaming import StreamedLoss, checked_pairs
from hloss.numerics import full_precision


def loss(
    embeddings: Tensor, labels: Tensor, references: Tensor | None, reference_labels: Tensor | None, s: LossSettings
) -> Tensor:
    """Return the loss by a custom operator, which compilers do not trace.

    The Beta density raises RuntimeError, because its derivative uses autograd. Without fullgraph=True, torch.compile
    then runs the loss uncompiled.
    """
    if s.density == "beta":
        raise RuntimeError('density="beta" cannot be compiled or exported: call the loss outside the compiled function')
    return _loss_and_gradients(embeddings, labels, references, reference_labels, *s.of_histogram)[0]


def refuse_transforms() -> None:
    """Raise RuntimeError within a transform of torch.func, because the loss defines no rules for these transforms."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "the histogram loss does not support torch.func (vmap, grad, ...): call it once per batch, and use "
            "backward() or torch.autograd.grad"
        )


@torch.library.custom_op("hloss::loss_and_gradients", mutates_args=())
def _loss_and_gradients(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its gradients with respect to embeddings and references, in full precision.

    Without references, their gradient is an empty tensor.
    """
    s = LossSettings(n_bins, kernel, bandwidth, order_cost, margin, alpha, "histogram", normalize, on_degenerate)
    rows, columns = full_precision(embeddings), None if references is None else full_precision(references)
    given = checked_pairs(rows, labels, columns, reference_labels, normalize=s.normalize)
    context: Any = SimpleNamespace(needs_input_grad=(True, True))
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    with torch.no_grad():
        value = StreamedLoss.forward(context, *given, s)
        by_rows, by_columns, *_ = StreamedLoss.backward(context, torch.ones_like(value))
    by_rows = _by_given(by_rows, given[0], rows)
    if columns is None or given[1] is None:
        return value, by_rows, value.new_empty(0)
    return value, by_rows, _by_given(by_columns, given[1], columns)


def _by_given(by_prepared: Tensor, prepared: Tensor, given: Tensor) -> Tensor:
    """Return the gradient with respect to `given` from that with respect to `prepared`, whose rows may be scaled."""
    if prepared is given:
        return by_prepared
    return by_prepared * (prepared.abs().amax(1, keepdim=True) / given.abs().amax(1, keepdim=True))


@_loss_and_gradients.register_fake
def _shapes(embeddings, labels, references, *rest):  # type: ignore[no-untyped-def]
    value = full_precision(embeddings[:0]).new_empty(())
    sides = (x.shape if x is not None else (0,) for x in (embeddings, references))
    return value, *(value.new_empty(shape) for shape in sides)


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*output[1:])
    ctx.is_within, ctx.dtype, ctx.n_inputs = inputs[2] is None, inputs[0].dtype, len(inputs)


def _backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
    by_embeddings, by_references = ((gradient * upstream).to(ctx.dtype) for gradient in ctx.saved_tensors)
    return by_embeddings, None, None if ctx.is_within else by_references, *(None,) * (ctx.n_inputs - 3)


_loss_and_gradients.register_autograd(_backward, setup_context=_save_for_backward)
