"""The two passes of the fused histogram loss: which Triton kernel is launched on what.

Forward: `prepare` writes unit rows and their norms, `bin_pairs` computes tiles of similarities and adds their pairs to
a table of integers, `finish_step` or `finish_matrix` turns the table into the loss and the slopes.
Backward: the matrix of the pairs' slopes is multiplied with the embeddings, and `through_norm` goes on through the
normalisation. If the pairs are few (KEPT_PAIRS), the place of each pair in the table of slopes is kept from the forward
pass, and `multiply` looks it up while it multiplies. Otherwise `find_slopes` computes the similarities again, one block
of the matrix of slopes at a time, which cuBLAS multiplies: memory does not grow with the number of pairs.
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
from hloss.numerics import LONGEST, exact_products

KEPT_PAIRS = 2**21  # places of so many pairs are kept for the backward pass: 4 MiB
BLOCK_ROWS = 2**13  # most rows, and columns within one batch, of a block of slopes
BLOCK_PAIRS = 2**26  # most slopes held at once: 256 MiB
PROGRAMS_PER_PROCESSOR = 4
LANES_BYTES = 2**26  # most memory of the lanes
LEAST_PART = 64  # fewest columns that a program multiplies with
FORM_TILE = 16, 256  # rows and columns of a bilinear form that a program handles at once


_compiled: dict[tuple[Any, ...], Any] = {}


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
            CHUNK=max(512, _chunk(2 * nodes)),  # no two threads hold the same number
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
    with _on(kept.slopes.device):
        references = None if kept.columns is None else kept.columns.units
        pairs = _pair_labels(labels, reference_labels, kept.rows.units, references)
        if kept.places is None:
            sums = _sums_of_blocks(kept, pairs, wanted, s, precision)
        else:
            sums = _sums_of_places(kept, kept.places, wanted, s, precision)
        return [
            None if parts is None else _through_norm(parts, side, upstream, dtype, s)
            for parts, side in zip(sums, (kept.rows, kept.columns or kept.rows), strict=True)
        ]


def _sums_of_places(
    kept: Kept, places: Tensor, wanted: tuple[bool, bool], s: LossSettings, precision: str
) -> list[Tensor | None]:
    """Gradients of the unit rows of both sides, each in parts (parts, rows, d), by the places that are kept."""
    rows, columns = kept.rows, kept.columns
    return [
        _multiply(places, kept.slopes, columns or rows, len(rows.units), s, precision) if wanted[0] else None,
        _multiply(places.T, kept.slopes, rows, len(columns.units), s, precision) if columns and wanted[1] else None,
    ]


def _sums_of_blocks(
    kept: Kept, pairs: PairLabels, wanted: tuple[bool, bool], s: LossSettings, precision: str
) -> list[Tensor | None]:
    """Gradients of the unit rows of both sides, each as (1, rows, d), by blocks of slopes.

    Within one batch the blocks on and above the diagonal are computed; a block's mirror is its transpose.
    """
    rows, columns = kept.rows.units, (kept.columns or kept.rows).units
    by_rows = torch.zeros_like(rows) if wanted[0] else None
    by_columns = by_rows if pairs.within else torch.zeros_like(columns) if wanted[1] else None
    height = min(BLOCK_ROWS, _filled(len(rows)))
    width = height if pairs.within else min(max(FILL, BLOCK_PAIRS // height // FILL * FILL), _filled(len(columns)))
    memory = torch.empty(height, width, device=rows.device)
    with exact_products(rows.device):
        for i in _blocks(len(rows), height):
            for j in _blocks(len(columns), width):
                mirror = pairs.within and i == j
                if pairs.within and j.start < i.start:
                    continue
                found = _find_slopes(memory, kept, pairs, i, j, mirror, s, precision)
                if by_rows is not None:
                    by_rows[i].addmm_(found, columns[j])
                if by_columns is not None and not mirror:
                    by_columns[j].addmm_(found.T, rows[i])
    return [x if x is None else x[None] for x in (by_rows, None if pairs.within else by_columns)]


def _find_slopes(
    memory: Tensor, kept: Kept, pairs: PairLabels, i: slice, j: slice, mirror: bool, s: LossSettings, precision: str
) -> Tensor:
    """The slopes of rows i with columns j, written to `memory`."""
    rows, columns, tile = kept.rows.units, (kept.columns or kept.rows).units, LARGE_TILE
    down, across = _cdiv(i.stop - i.start, tile.rows), _cdiv(j.stop - j.start, tile.rows)
    _launch(
        "find_slopes",
        (down * (down + 1) // 2 if mirror else down * across,),
        tile,
        *(rows, columns, pairs.rows, pairs.columns, kept.slopes, memory, i.start, j.start, i.stop, j.stop),
        *(rows.shape[1], pairs.stride_r, pairs.stride_c, memory.stride(0), across),
        NODES=s.n_bins + 1,
        WITHIN=pairs.within,
        MATRIX=pairs.is_matrix,
        MIRROR=mirror,
        **_product_constants(tile, rows.shape[1], precision),
    )
    return memory[: i.stop - i.start, : j.stop - j.start]


def _blocks(size: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]


def _through_norm(parts: Tensor, side: Side, upstream: Tensor, dtype: torch.dtype, s: LossSettings) -> Tensor:
    n, depth = side.units.shape
    gradient = torch.empty(n, depth, dtype=dtype, device=parts.device)
    _launch(
        "through_norm",
        (_cdiv(n, _row_tile(depth)),),
        None,
        *(parts, side.units, side.scales, upstream, gradient, n, depth, len(parts)),
        NORMALIZE=s.normalize,
        BR=_row_tile(depth),
        BD=_chunk(depth),
    )
    return gradient


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
    if s.kernel == "triangular" and s.order_cost == "step":
        constants = {"NODES": nodes, "SHIFT": s.margin_nodes, "CHUNK": _chunk(nodes)}
        _launch("finish_step", (1,), None, table, loss, slopes, checks, **constants)
    else:
        grid, matrices = (_cdiv(nodes, FORM_TILE[0]) + 1,), bilinear_forms(s, device)
        constants = {"NODES": nodes, "CHUNK": _chunk(nodes), "BR": FORM_TILE[0], "BC": FORM_TILE[1]}
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
    """Launch a kernel, its constants in order. What it was compiled to is remembered: Triton finds it more slowly.

    In Triton's interpreter there is nothing to remember.
    """
    key = name, tile, *constants.values(), *map(_kind, arguments), arguments[0].device
    program = _compiled.get(key)
    if program is not None:
        program[(*grid, 1, 1)[:3]](*arguments, *constants.values())
        return
    from hloss.losses import kernels  # needs Triton

    options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    _compiled[key] = getattr(kernels, name)[grid](*arguments, **constants, **options)


def _kind(argument: Any) -> Any:
    """What Triton compiles another program for: a tensor's type and alignment; a number that is 1, or divisible."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument if argument == 1 else (argument % 16 == 0, argument < 2**31)
