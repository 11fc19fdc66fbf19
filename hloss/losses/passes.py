"""The two passes of the fused histogram loss: which Triton kernel is launched on what.

Forward: `prepare` writes unit rows and their norms, `bin_pairs` computes tiles of similarities and adds their pairs to
a table of integers, `finish_step` or `finish_matrix` turns the table into the loss and the slopes.
Backward: `multiply` looks up the slope of each pair and multiplies the slopes with the embeddings, `through_norm` sums
the parts and applies the derivative of the normalisation. The place of each pair in the table of slopes is kept from
the forward pass if the pairs are few (KEPT_PAIRS). Otherwise `find_places` computes it again, a block of rows at a
time: memory is O(block x n).
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hloss.losses.checks import verify_or_defer
from hloss.losses.densities import LANE_PAIRS, cost_matrix, kernel_matrix, missing_pairs
from hloss.losses.pairs import find_pairs
from hloss.losses.settings import LossSettings
from hloss.losses.streaming import checked_sides
from hloss.numerics import LONGEST

KEPT_PAIRS = 2**24  # places of so many pairs are kept for the backward pass: 32 MiB
BLOCK_PAIRS = 2**25  # most places held at once if they are computed again: 64 MiB
PROGRAMS_PER_PROCESSOR = 4
LANES_BYTES = 2**26  # most memory of the lanes
LEAST_PART = 64  # fewest columns that a program multiplies with
FORM_TILE = 16, 256  # rows and columns of a bilinear form that a program handles at once


class Tile(NamedTuple):
    """Shape of a program's tile and how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


SMALL_TILE = Tile(32, 32, 64, 4, 3)  # similarities of at most SMALL rows and columns
LARGE_TILE = Tile(64, 64, 32, 4, 3)
GRADIENT_TILE = Tile(64, 64, 32, 4, 3)
SMALL = 512
FILL = 64  # places come in multiples of this, as the sides of all tiles divide it


class Side(NamedTuple):
    """The rows or the columns of the matrix of similarities."""

    units: Tensor  # (n, d) float32
    scales: Tensor  # (n,) float64, inverse norms


class PairLabels(NamedTuple):
    """Labels of the rows and of the columns, or a matrix of pairs with its strides."""

    rows: Tensor
    columns: Tensor
    stride_r: int
    stride_c: int
    within: bool

    @property
    def is_matrix(self) -> bool:
        return self.rows.ndim == 2

    def mirrored(self) -> "PairLabels":
        return PairLabels(self.columns, self.rows, self.stride_c, self.stride_r, self.within)


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    rows: Side
    columns: Side | None  # None: the rows
    slopes: Tensor  # (2 n_bins + 3,) float32: of negatives, of positives, and 0 for what is no pair
    places: Tensor | None


def forward_pass(
    embeddings: Tensor,
    references: Tensor | None,
    labels: Tensor,
    reference_labels: Tensor | None,
    s: LossSettings,
    precision: str,
) -> tuple[Tensor, Kept]:
    with _on(embeddings.device):
        given = [x.detach().contiguous() for x in (embeddings, references) if x is not None]
        pairs = _pair_labels(labels, reference_labels, embeddings, references)
        n, m, nodes = len(embeddings), len(given[-1]), s.n_bins + 1
        tile = SMALL_TILE if max(n, m) <= SMALL else LARGE_TILE
        down, across = _filled(n) // tile.rows, _filled(m) // tile.rows
        tiles = down * (down + 1) // 2 if pairs.within else down * across
        programs = max(1, min(tiles, _programs(embeddings.device), LANES_BYTES // (16 * nodes)))
        # 2 nodes counts, 2 nodes sums of fractions, 2 flags, and 2 nodes packed numbers per program
        size = 4 * nodes + 2 + programs * 2 * nodes
        table = torch.zeros(size, dtype=torch.int64, device=embeddings.device)
        sides = [_prepare(x, table[4 * nodes :], s.normalize) for x in given]
        places = kept_places(n, m, nodes, embeddings.device)
        into = (table, 0) if places is None else (places, places.stride(0))
        _launch(
            "bin_pairs",
            (programs,),
            tile,
            *(sides[0].units, sides[-1].units, pairs.rows, pairs.columns, table, into[0], n, m, given[0].shape[1]),
            *(pairs.stride_r, pairs.stride_c, into[1], tiles, across),
            NODES=nodes,
            WITHIN=pairs.within,
            MATRIX=pairs.is_matrix,
            KEEP=places is not None,
            TILES_TO_FLUSH=max(1, LANE_PAIRS // tile.rows**2),
            CHUNK=_chunk(2 * nodes),
            **_product_constants(tile, given[0].shape[1], precision),
        )
        loss, slopes, checks = _finish(table, s)
        verify_or_defer(checks, partial(_verify, embeddings.detach(), labels, references, reference_labels, s))
    return loss, Kept(sides[0], None if references is None else sides[1], slopes, places)


def backward_pass(
    upstream: Tensor,
    kept: Kept,
    labels: Tensor,
    reference_labels: Tensor | None,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
    s: LossSettings,
    precision: str,
) -> list[Tensor | None]:
    """Gradients of the embeddings and of the references, None where they are not wanted."""
    rows, columns, places = kept.rows, kept.columns or kept.rows, kept.places
    with _on(rows.units.device):
        pairs = _pair_labels(labels, reference_labels, rows.units, None if kept.columns is None else columns.units)
        gradient_of = partial(_gradient, upstream=upstream, slopes=kept.slopes, dtype=dtype, s=s, precision=precision)
        mirrored = None if places is None else places.T
        return [
            gradient_of(rows, columns, pairs, places) if wanted[0] else None,
            gradient_of(columns, rows, pairs.mirrored(), mirrored) if kept.columns and wanted[1] else None,
        ]


def _gradient(
    own: Side,
    others: Side,
    pairs: PairLabels,
    places: Tensor | None,
    upstream: Tensor,
    slopes: Tensor,
    dtype: torch.dtype,
    s: LossSettings,
    precision: str,
) -> Tensor:
    """The gradient of the embeddings of one side."""
    (n, depth), m, device = own.units.shape, len(others.units), own.units.device
    gradient = torch.empty(n, depth, dtype=dtype, device=device)
    block = n if places is not None else min(n, max(FILL, BLOCK_PAIRS // m // FILL * FILL))
    found = _empty_places(block, m, s.n_bins + 1, device) if places is None else places
    for first in range(0, n, block):
        rows = min(block, n - first)
        if places is None:
            _find_places(found, own, others, pairs, first, rows, s, precision)
        parts = _multiply(found, slopes, others, rows, s, precision)
        _launch(
            "through_norm",
            (_cdiv(rows, _row_tile(depth)),),
            None,
            *(parts, own.units, own.scales, upstream, gradient, first, rows, depth, len(parts)),
            NORMALIZE=s.normalize,
            BR=_row_tile(depth),
            BD=_chunk(depth),
        )
    return gradient


def _find_places(
    places: Tensor, own: Side, others: Side, pairs: PairLabels, first: int, rows: int, s: LossSettings, precision: str
) -> None:
    m, depth = others.units.shape
    tile = LARGE_TILE
    _launch(
        "find_places",
        (_cdiv(rows, tile.rows), _cdiv(m, tile.rows)),
        tile,
        *(own.units, others.units, pairs.rows, pairs.columns, places, first, first + rows, m, depth),
        *(pairs.stride_r, pairs.stride_c, places.stride(0)),
        NODES=s.n_bins + 1,
        WITHIN=pairs.within,
        MATRIX=pairs.is_matrix,
        **_product_constants(tile, depth, precision),
    )


def _multiply(places: Tensor, slopes: Tensor, others: Side, rows: int, s: LossSettings, precision: str) -> Tensor:
    """The slopes of a block of rows times the other side, as (parts, rows, d) to be summed: enough work for a GPU."""
    m, depth = others.units.shape
    tile = GRADIENT_TILE
    grid = _cdiv(rows, tile.rows), _cdiv(depth, tile.columns)
    wanted = max(1, _programs(slopes.device) // (grid[0] * grid[1]))
    part = _cdiv(max(_cdiv(m, wanted), LEAST_PART), tile.depth) * tile.depth
    parts = torch.empty(_cdiv(m, part), rows, depth, device=slopes.device)
    _launch(
        "multiply",
        (*grid, len(parts)),
        tile,
        *(places, slopes, others.units, parts, rows, m, depth, part, *places.stride()),
        NODES=s.n_bins + 1,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        EVEN=depth % tile.columns == 0,
        PRECISION=precision,
    )
    return parts


def _prepare(given: Tensor, flags: Tensor, normalize: bool) -> Side:
    n, depth = given.shape
    copied = is_copied(given, normalize)
    units = torch.empty(n, depth, device=given.device) if copied else given
    scales = torch.empty(n, dtype=torch.float64, device=given.device)
    _launch(
        "prepare",
        (_cdiv(n, _row_tile(depth)),),
        None,
        *(given, units, scales, flags, n, depth, LONGEST),
        NORMALIZE=normalize,
        WRITE=copied,
        BR=_row_tile(depth),
        BD=_chunk(depth),
    )
    return Side(units, scales)


def _finish(table: Tensor, s: LossSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, slopes, and checks: number of negative pairs, positive pairs, refused rows, refused entries of a matrix."""
    nodes, device = s.n_bins + 1, table.device
    loss, slopes = torch.empty((), device=device), torch.empty(2 * nodes + 1, device=device)
    checks = torch.empty(4, dtype=torch.int64, device=device)
    constants = {"NODES": nodes, "CHUNK": _chunk(nodes)}
    if s.kernel == "triangular" and s.order_cost == "step":
        _launch("finish_step", (1,), None, table, loss, slopes, checks, SHIFT=s.margin_nodes, **constants)
    else:
        grid, matrices = (_cdiv(nodes, FORM_TILE[0]) + 1,), bilinear_forms(s, device)
        constants |= {"BR": FORM_TILE[0], "BC": FORM_TILE[1]}
        _launch("finish_matrix", grid, None, table, matrices, loss, slopes, checks, **constants)
    return loss, slopes, checks


@lru_cache(maxsize=8)
def bilinear_forms(s: LossSettings, device: torch.device) -> Tensor:
    """(3, n_bins + 1, n_bins + 1) float64: A, so that the loss is n' A p for masses n, p of negatives and positives at
    the nodes, before any kernel; and the two matrices whose products with p and n are the slopes of the negatives and
    of the positives."""
    form = cost_matrix(s, device)
    if s.kernel != "triangular":
        kernel = kernel_matrix(s, device)
        form = kernel.T @ form @ kernel
    slopes = [form.diff(dim=0) / s.delta, form.diff(dim=1).T / s.delta]
    return torch.stack([form, *(torch.cat([x, x[-1:]]) for x in slopes)])  # s = 1 belongs to the last interval


def _verify(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    s: LossSettings,
    checks: list[int],
) -> None:
    """Raise what the plain path raises, which names the rows."""
    negatives, positives, refused_rows, refused_pairs = checks
    if refused_rows:
        checked_sides(embeddings, references, s.normalize)
    if refused_pairs:
        find_pairs(embeddings, labels, references, reference_labels)
    if not (negatives and positives) and s.on_degenerate == "raise":
        raise ValueError(missing_pairs(positives, negatives))


def is_copied(embeddings: Tensor, normalize: bool) -> bool:
    """Whether the unit rows are others than the embeddings themselves."""
    return normalize or embeddings.dtype != torch.float32


def _pair_labels(
    labels: Tensor, reference_labels: Tensor | None, embeddings: Tensor, references: Tensor | None
) -> PairLabels:
    labels = labels.to(embeddings.device, non_blocking=True).contiguous()
    if labels.ndim == 2:
        return PairLabels(labels, labels, labels.stride(0), 1, references is None)
    if reference_labels is None:
        return PairLabels(labels, labels, 0, 0, True)
    return PairLabels(labels, reference_labels.to(embeddings.device, non_blocking=True).contiguous(), 0, 0, False)


def kept_places(n: int, m: int, nodes: int, device: torch.device) -> Tensor | None:
    """Memory for the places that are kept for the backward pass, None if they are too many."""
    return _empty_places(n, m, nodes, device) if n * m <= KEPT_PAIRS else None


def _empty_places(n: int, m: int, nodes: int, device: torch.device) -> Tensor:
    """Memory for (n, m) places in whole tiles."""
    dtype = torch.int16 if 2 * nodes < 2**15 else torch.int32
    return torch.empty(_filled(n), _filled(m), dtype=dtype, device=device)


def _filled(size: int) -> int:
    return _cdiv(size, FILL) * FILL


def _product_constants(tile: Tile, depth: int, precision: str) -> dict[str, Any]:
    return {"BM": tile.rows, "BK": tile.depth, "EVEN": depth % tile.depth == 0, "PRECISION": precision}


@lru_cache
def _programs(device: torch.device) -> int:
    """Programs that a GPU works on at once."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return processors * PROGRAMS_PER_PROCESSOR


def _row_tile(depth: int) -> int:
    return 2048 // _chunk(depth)


def _chunk(size: int) -> int:
    """Numbers of a vector that a program handles at once: a power of two."""
    return min(1024, max(16, 1 << (size - 1).bit_length()))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _launch(name: str, grid: tuple[int, ...], tile: Tile | None, *arguments: Any, **constants: Any) -> None:
    from hloss.losses import kernels  # needs Triton

    if tile is not None:
        constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
    getattr(kernels, name)[grid](*arguments, **constants)
