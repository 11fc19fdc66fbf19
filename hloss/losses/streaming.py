"""The streaming histogram loss: passes over blocks of pairs, as an autograd function."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hloss.losses.batch import Batch
from hloss.losses.densities import DENSITY_CLASSES, Density
from hloss.losses.pairs import Buffers, LabelPairs, MatrixPairs, PairBlock, Pairs, block_rows
from hloss.losses.settings import LossSettings
from hloss.numerics import exact_products, full_precision, to_normalize, to_use_as_units

KEPT_PAIRS = 2**20  # Most pairs whose intervals are stored for the backward pass, in 8 MiB.
Norms = tuple[Tensor | None, Tensor | None]  # Norms of embeddings and references; None if these are not normalised.


class Sides:
    """The rows and columns of the matrix of similarities, sorted as the blocks of `Pairs` require."""

    def __init__(self, embeddings: Tensor, references: Tensor | None, norms: Norms, pairs: Pairs, n_bins: int) -> None:
        self.half_bins = n_bins / 2
        self.rows = arrange(embeddings, norms[0], pairs.row_order)
        self.columns = self.rows if references is None else arrange(references, norms[1], pairs.column_order)

    def blocks(self, pairs: Pairs, buffers: Buffers) -> Iterator[tuple[PairBlock, Tensor]]:
        """Yield blocks of pairs with their positions (s + 1) / Delta, clipped to [0, n_bins], in a shared buffer."""
        # On a GPU, new_full does not wait for the device.
        half = self.rows.new_full((), self.half_bins)
        for block in pairs.blocks():
            rows, columns = self.rows[block.rows], self.columns[block.columns]
            position = buffers.take("position", (len(rows), len(columns)), rows.dtype, rows.device)
            torch.addmm(half, rows, columns.T, alpha=self.half_bins, out=position)
            yield block, position.clamp_(0, 2 * self.half_bins)


def collect_density(
    embeddings: Tensor, references: Tensor | None, norms: Norms, pairs: Pairs, s: LossSettings
) -> tuple[Density, list[tuple[PairBlock, Tensor]]]:
    """Return the density of all pairs, and a list of blocks with the places of their pairs (see `Density.add`).

    The list is empty for more than `KEPT_PAIRS` pairs.
    """
    density, buffers, kept = DENSITY_CLASSES[s.density](s, embeddings.device), Buffers(), []
    with exact_products(embeddings.device):
        sides = Sides(embeddings, references, norms, pairs, s.n_bins)
        few = len(sides.rows) * len(sides.columns) <= KEPT_PAIRS
        for block, position in sides.blocks(pairs, buffers):
            places = density.add(position, block, Buffers() if few else buffers)
            if few:
                kept.append((block, places))
        density.finish()
    return density, kept


class StreamedLoss(torch.autograd.Function):
    """The loss as an autograd function.

    The forward pass computes the slopes dL/ds. For more than `KEPT_PAIRS` pairs, the backward pass computes the
    similarities again, in blocks.
    """

    @staticmethod
    def forward(ctx, embeddings, references, norms, pairs, s):  # type: ignore[no-untyped-def]
        """Return the loss."""
        density, kept = collect_density(embeddings, references, norms, pairs, s)
        if density.undefined and s.on_degenerate == "raise":
            raise ValueError(density.undefined)
        ctx.save_for_backward(embeddings, references, *norms)
        ctx.pairs, ctx.density, ctx.kept = pairs, density, kept
        dtype = full_precision(embeddings[:0]).dtype
        if density.undefined:
            return embeddings.new_zeros((), dtype=dtype)
        loss, ctx.slopes = density.loss_and_slopes()
        return loss.to(dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Return the gradients of embeddings and references."""
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("the histogram loss has no second derivatives; call backward without create_graph=True")
        embeddings, references, *norms = ctx.saved_tensors
        if ctx.density.undefined:
            return (*(x if x is None else torch.zeros_like(x) for x in (embeddings, references)), *(None,) * 3)
        pairs = ctx.pairs
        with exact_products(embeddings.device):
            sides = Sides(embeddings, references, norms, pairs, ctx.density.s.n_bins)
            by_rows = torch.zeros_like(sides.rows)
            by_columns = by_rows if references is None else torch.zeros_like(sides.columns)
            slopes, buffers = (ctx.slopes * grad).to(sides.rows.dtype), Buffers()
            recomputed = ((b, ctx.density.places(p, b, buffers)) for b, p in sides.blocks(pairs, buffers))
            for block, places in ctx.kept or recomputed:
                slope = ctx.density.slope(slopes, places, block, buffers)
                rows, columns, below = block.rows, block.columns, slope
                # A block on the diagonal begins with a square that contains both (i, j) and (j, i).
                if references is None and columns.start == rows.start:
                    square, below = slope.split([len(slope), slope.shape[1] - len(slope)], dim=1)
                    square += square.T.clone()
                if ctx.needs_input_grad[0]:
                    by_rows[rows].addmm_(slope, sides.columns[columns])
                if references is None or ctx.needs_input_grad[1]:
                    by_columns[columns.stop - below.shape[1] : columns.stop].addmm_(below.T, sides.rows[rows])
            gradients = [_through_norm(by_rows, sides.rows, norms[0], pairs.row_order, embeddings), None]
            if references is not None:
                gradients[1] = _through_norm(by_columns, sides.columns, norms[1], pairs.column_order, references)
        return *gradients, None, None, None


def arrange(embeddings: Tensor, norms: Tensor | None, order: Tensor) -> Tensor:
    """Return the embeddings in the order of the pairs, divided by their norms (n, 1) unless these are None."""
    arranged = full_precision(embeddings).index_select(0, order)
    return arranged if norms is None else arranged.div_(norms.index_select(0, order))


def _through_norm(grad: Tensor, unit: Tensor, norms: Tensor | None, order: Tensor, like: Tensor) -> Tensor:
    """Return the gradient with respect to `like` from that of the arranged rows. Overwrites `grad` and `unit`."""
    if norms is not None:
        rows = block_rows(grad.device)
        for g, u in zip(grad.split(rows), unit.split(rows), strict=True):
            g.addcmul_(u, torch.linalg.vecdot(g, u)[:, None], value=-1)
        grad.div_(norms.index_select(0, order))
    return torch.index_select(grad, 0, order.argsort(), out=unit).to(like.dtype)


def checked_pairs(
    embeddings: Tensor, labels: Tensor, *references: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor | None, Norms, Pairs]:
    """Return embeddings, references, norms and pairs, checked; raise ValueError that lists the invalid rows."""
    batch = Batch(embeddings, labels, *references)
    batch.verify(to_normalize if normalize else to_use_as_units)
    norms = (batch.norms[0], batch.norms[-1]) if normalize else (None, None)
    return batch.embeddings, batch.references, norms, (MatrixPairs if batch.is_matrix else LabelPairs)(batch)
