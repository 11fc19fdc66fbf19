"""The passes over all pairs, block by block, as an autograd function.

Read `hloss.losses.densities` first.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hloss.losses.densities import DENSITY_CLASSES, BetaDensity, HistogramDensity
from hloss.losses.pairs import Buffers, LabelPairs, MatrixPairs, PairBlock, block_rows
from hloss.losses.settings import LossSettings
from hloss.numerics import checked_norms, exact_products, full_precision

KEPT_PAIRS = 2**20  # so few pairs are kept for the backward pass, in at most 8 MiB: to recompute them costs more


class Sides:
    """The rows and columns of the matrix of similarities, in the order of the pairs."""

    def __init__(
        self,
        embeddings: Tensor,
        references: Tensor | None,
        norms: Tensor | None,
        reference_norms: Tensor | None,
        pairs: LabelPairs | MatrixPairs,
        s: LossSettings,
    ) -> None:
        self.half_bins = s.n_bins / 2
        self.rows = arrange(embeddings, norms, pairs.row_order)
        self.columns = self.rows if references is None else arrange(references, reference_norms, pairs.column_order)

    def blocks(self, pairs: LabelPairs | MatrixPairs, buffers: Buffers) -> Iterator[tuple[PairBlock, Tensor]]:
        """Blocks of pairs with their positions (s + 1) / Delta, clipped to [0, n_bins]: each until the next."""
        half = self.rows.new_tensor(self.half_bins)
        for block in pairs.blocks():
            rows, columns = self.rows[block.rows], self.columns[block.columns]
            position = buffers.take("position", (len(rows), len(columns)), rows.dtype, rows.device)
            torch.addmm(half, rows, columns.T, alpha=self.half_bins, out=position)
            yield block, position.clamp_(0, 2 * self.half_bins)


def collect_density(
    sides: Sides, pairs: LabelPairs | MatrixPairs, s: LossSettings
) -> tuple[HistogramDensity | BetaDensity, list[tuple[PairBlock, Tensor]]]:
    """One pass over all pairs; if they are few, the blocks are kept with the places of their pairs."""
    density, buffers, kept = DENSITY_CLASSES[s.density](s, sides.rows.device), Buffers(), []
    few = len(sides.rows) * len(sides.columns) <= KEPT_PAIRS
    for block, position in sides.blocks(pairs, buffers):
        places = density.add(position, block, Buffers() if few else buffers)
        if few:
            kept.append((block, places))
    density.finish()
    return density, kept


class StreamedLoss(torch.autograd.Function):
    """Forward keeps the slopes of the loss; backward recomputes the pairs block by block, unless they are few."""

    @staticmethod
    def forward(ctx, embeddings, references, norms, reference_norms, pairs, s):  # type: ignore[no-untyped-def]
        with exact_products(embeddings.device):
            density, kept = collect_density(Sides(embeddings, references, norms, reference_norms, pairs, s), pairs, s)
        if density.undefined and s.on_degenerate == "raise":
            raise ValueError(density.undefined)
        ctx.save_for_backward(embeddings, references, norms, reference_norms)
        ctx.pairs, ctx.settings, ctx.density, ctx.kept = pairs, s, density, kept
        dtype = full_precision(embeddings[:0]).dtype
        if density.undefined:
            return embeddings.new_zeros((), dtype=dtype)
        loss, ctx.slopes = density.loss_and_slopes()
        return loss.to(dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the histogram loss has no second derivatives (its gradient is piecewise constant in the "
                "similarities); call backward without create_graph=True"
            )
        embeddings, references, norms, reference_norms = ctx.saved_tensors
        if ctx.density.undefined:
            return (*(x if x is None else torch.zeros_like(x) for x in (embeddings, references)), *(None,) * 4)
        pairs = ctx.pairs
        with exact_products(embeddings.device):
            sides = Sides(embeddings, references, norms, reference_norms, pairs, ctx.settings)
            by_rows = torch.zeros_like(sides.rows)
            by_columns = by_rows if references is None else torch.zeros_like(sides.columns)
            slopes, buffers = (ctx.slopes * grad).to(sides.rows.dtype), Buffers()
            recomputed = ((b, ctx.density.places(p, b, buffers)) for b, p in sides.blocks(pairs, buffers))
            for block, places in ctx.kept or recomputed:
                slope = ctx.density.slope(slopes, places, block, buffers)
                rows, columns, below = block.rows, block.columns, slope
                if references is None and columns.start == rows.start:  # pairs among these rows: their slopes mirrored
                    square, below = slope.split([len(slope), slope.shape[1] - len(slope)], dim=1)
                    square += square.T.clone()
                if ctx.needs_input_grad[0]:
                    by_rows[rows].addmm_(slope, sides.columns[columns])
                if references is None or ctx.needs_input_grad[1]:
                    by_columns[columns.stop - below.shape[1] : columns.stop].addmm_(below.T, sides.rows[rows])
            by_embeddings = _through_norm(by_rows, sides.rows, norms, pairs.row_order, embeddings)
            if references is None:
                return by_embeddings, *(None,) * 5
            by_references = _through_norm(by_columns, sides.columns, reference_norms, pairs.column_order, references)
        return by_embeddings, by_references, *(None,) * 4


def arrange(embeddings: Tensor, norms: Tensor | None, order: Tensor) -> Tensor:
    """The embeddings in the order of the pairs, divided by their norms (n, 1) if there are any."""
    arranged = full_precision(embeddings).index_select(0, order)
    return arranged if norms is None else arranged.div_(norms.index_select(0, order))


def _through_norm(grad: Tensor, unit: Tensor, norms: Tensor | None, order: Tensor, like: Tensor) -> Tensor:
    """From the gradient by arranged embeddings (used up) to the one by the embeddings given."""
    if norms is not None:
        rows = block_rows(grad.device)
        for g, u in zip(grad.split(rows), unit.split(rows), strict=True):
            g.addcmul_(u, torch.linalg.vecdot(g, u)[:, None], value=-1)
        grad.div_(norms.index_select(0, order))
    return torch.index_select(grad, 0, order.argsort(), out=unit).to(like.dtype)  # no longer needed: `unit`


def checked_sides(
    embeddings: Tensor, references: Tensor | None, normalize: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Norms of both sides, None where they are not to be divided by."""
    norms = checked_norms("embeddings", embeddings, normalize)
    if references is None:
        return norms, None
    reference_norms = checked_norms("reference_embeddings", references, normalize)
    if references.shape[1] != embeddings.shape[1] or references.dtype != embeddings.dtype:
        raise ValueError(
            f"reference_embeddings must be (m, {embeddings.shape[1]}) of {embeddings.dtype}, "
            f"got {tuple(references.shape)} of {references.dtype}"
        )
    return norms, reference_norms
