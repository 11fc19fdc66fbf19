"""The histogram loss on CUDA by fused Triton kernels, for the histogram density and up to float32.

Read `hloss.losses.histogram` first. Forward: `prepare` writes unit rows and their norms, `bin_pairs` computes tiles of
similarities and adds their pairs to a table of integers, `finish_*` turns the table into the loss and the slopes.
Backward: `multiply` looks the slope of each pair up and multiplies with the embeddings, `through_norm` sums the parts
and goes through the norm. The place of each pair in the table of slopes is kept from the forward pass if the pairs are
few (KEPT_PAIRS), else computed again (`find_places`), a block of rows at a time: memory is O(block x n).
"""

import importlib.util
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hloss.losses.checks import verify_or_defer
from hloss.losses.densities import cost_matrix, kernel_matrix, missing_pairs
from hloss.losses.pairs import find_pairs
from hloss.losses.settings import LossSettings
from hloss.losses.streaming import checked_sides
from hloss.numerics import LONGEST

PRECISION = "tf32x3"  # of matrix products: as exact as float32 on tensor cores; "ieee" computes them in plain float32
KEPT_PAIRS = 2**24  # places of so many pairs are kept for the backward pass: 32 MiB
BLOCK_PAIRS = 2**25  # pairs whose places are held at once if they are computed again
LANE_PAIRS = 2**18  # most pairs in a lane of the table: a sum of so many fractions of 24 bits fits below their count
MOST_PAIRS = 2**39  # most pairs whose sum of 24-bit fractions surely fits into 63 bits
PROGRAMS_PER_PROCESSOR = 4
LANES_BYTES = 2**26  # most memory of the lanes
LEAST_PART = 64  # fewest columns that a program multiplies with
FORM_TILE = 32, 256  # rows and columns of a bilinear form that a program handles at once
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
TRITON = importlib.util.find_spec("triton") is not None


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
FILL = 128  # a multiple of the sides of all tiles


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


class Outcome(NamedTuple):
    """The loss and what its backward pass needs."""

    loss: Tensor
    rows: Side
    columns: Side | None  # None: the rows
    slopes: Tensor  # (2 n_bins + 3,) float32: of negatives, of positives, and 0 for what is no pair
    places: Tensor | None


def serves(
    embeddings: Tensor, labels: Tensor, references: Tensor | None, reference_labels: Tensor | None, s: LossSettings
) -> bool:
    """Whether the fused kernels compute this loss. Wrong shapes are left to the plain path, which says what is wrong."""
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
    if n * m > MOST_PAIRS or labels.dtype not in INTEGERS:
        return False
    if labels.ndim == 2 or references is None:
        return reference_labels is None and labels.shape in ((n, m), (n,))
    if labels.shape != (n,) or reference_labels is None or reference_labels.shape != (m,):
        return False
    return reference_labels.dtype == labels.dtype


@torch.compiler.assume_constant_result
@lru_cache
def is_available(device: torch.device) -> bool:
    """Whether Triton can compile for this GPU; warns once if not."""
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
    """The histogram loss of what `serves` accepts."""
    if torch.compiler.is_compiling():
        costs = s.order_cost, float(s.margin), float(s.alpha)
        settings = s.n_bins, s.kernel, s.bandwidth, *costs, s.normalize, s.on_degenerate
        return _operator(embeddings, labels, references, reference_labels, *settings, PRECISION)[0]
    return _Fused.apply(embeddings, references, labels, reference_labels, s, PRECISION)


class _Fused(torch.autograd.Function):
    """The eager form of `_operator`: the dispatch of an operator costs a small batch more than its kernels."""

    @staticmethod
    def forward(ctx, embeddings, references, labels, reference_labels, s, precision):  # type: ignore[no-untyped-def]
        outcome = _forward(embeddings, references, labels, reference_labels, s, precision)
        rows, columns = outcome.rows, outcome.columns or (None, None)
        ctx.save_for_backward(labels, reference_labels, *rows, *columns, outcome.slopes, outcome.places)
        ctx.settings, ctx.precision, ctx.dtype = s, precision, embeddings.dtype
        return outcome.loss

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the histogram loss has no second derivatives (its gradient is piecewise constant in the "
                "similarities); call backward without create_graph=True"
            )
        labels, reference_labels, units, scales, column_units, column_scales, slopes, places = ctx.saved_tensors
        columns = None if column_units is None else Side(column_units, column_scales)
        outcome = Outcome(upstream, Side(units, scales), columns, slopes, places)
        wanted = ctx.needs_input_grad[:2]
        gradients = _backward(outcome, labels, reference_labels, ctx.dtype, wanted, ctx.settings, ctx.precision)
        return *gradients, None, None, None, None


def _forward(
    embeddings: Tensor,
    references: Tensor | None,
    labels: Tensor,
    reference_labels: Tensor | None,
    s: LossSettings,
    precision: str,
) -> Outcome:
    from hloss.losses import kernels

    with _on(embeddings.device):
        given = [x.detach().contiguous() for x in (embeddings, references) if x is not None]
        pairs = _pair_labels(labels, reference_labels, embeddings, references)
        n, m, nodes = len(embeddings), len(given[-1]), s.n_bins + 1
        tile = _similarity_tile(n, m)
        tiles = _tile_count(n, m, tile.rows, pairs.within)
        programs = max(1, min(tiles, _programs(embeddings.device), LANES_BYTES // (16 * nodes)))
        # 2 nodes counts, 2 nodes sums of fractions, 2 flags, lanes of 2 nodes
        table = given[0].new_zeros(4 * nodes + 2 + programs * 2 * nodes, dtype=torch.int64)
        sides = [_prepare(x, table[4 * nodes :], s.normalize) for x in given]
        keep = n * m <= KEPT_PAIRS
        places = _empty_places(n, m, nodes, embeddings.device) if keep else None
        _launch(
            kernels.bin_pairs,
            (programs,),
            tile,
            *(sides[0].units, sides[-1].units, pairs.rows, pairs.columns, table, places if keep else table),
            *(n, m, given[0].shape[1], pairs.stride_r, pairs.stride_c, places.stride(0) if keep else 0, tiles),
            NODES=nodes,
            WITHIN=pairs.within,
            MATRIX=pairs.is_matrix,
            KEEP=keep,
            TILES_TO_FLUSH=max(1, LANE_PAIRS // tile.rows**2),
            CHUNK=_chunk(2 * nodes),
            **_product_constants(tile, given[0].shape[1], precision),
        )
        loss, slopes, checks = _finish(table, s)
        verify = partial(_verify, embeddings.detach(), labels, references, reference_labels, s)
        verify_or_defer(checks, verify)
    return Outcome(loss, sides[0], None if references is None else sides[1], slopes, places)


def _backward(
    outcome: Outcome,
    labels: Tensor,
    reference_labels: Tensor | None,
    dtype: torch.dtype,
    wanted: tuple[bool, bool],
    s: LossSettings,
    precision: str,
) -> list[Tensor | None]:
    """Gradients of the embeddings and of the references, None where they are not wanted."""
    rows, columns, places = outcome.rows, outcome.columns or outcome.rows, outcome.places
    with _on(rows.units.device):
        pairs = _pair_labels(labels, reference_labels, rows.units, None if outcome.columns is None else columns.units)
        to_rows = partial(_gradient, outcome=outcome, dtype=dtype, s=s, precision=precision)
        mirrored = None if places is None else places.T
        return [
            to_rows(rows, columns, pairs, places) if wanted[0] else None,
            to_rows(columns, rows, pairs.mirrored(), mirrored) if outcome.columns and wanted[1] else None,
        ]


def _gradient(
    own: Side,
    others: Side,
    pairs: PairLabels,
    places: Tensor | None,
    outcome: Outcome,
    dtype: torch.dtype,
    s: LossSettings,
    precision: str,
) -> Tensor:
    """The gradient of the embeddings of one side."""
    from hloss.losses import kernels

    (n, depth), m, device = own.units.shape, len(others.units), own.units.device
    gradient = torch.empty(n, depth, dtype=dtype, device=device)
    block = n if places is not None else min(n, max(FILL, BLOCK_PAIRS // m // FILL * FILL))
    found = _empty_places(block, m, s.n_bins + 1, device) if places is None else places
    for first in range(0, n, block):
        rows = min(block, n - first)
        if places is None:
            _find_places(found, own, others, pairs, first, rows, s, precision)
        parts = _multiply(found, outcome.slopes, others, rows, s, precision)
        _launch(
            kernels.through_norm,
            (_cdiv(rows, _row_tile(depth)),),
            None,
            *(parts, own.units, own.scales, outcome.loss, gradient, first, rows, depth, len(parts)),
            NORMALIZE=s.normalize,
            BR=_row_tile(depth),
            BD=_chunk(depth),
        )
    return gradient


def _find_places(
    places: Tensor, own: Side, others: Side, pairs: PairLabels, first: int, rows: int, s: LossSettings, precision: str
) -> None:
    from hloss.losses import kernels

    m, depth = others.units.shape
    tile = LARGE_TILE
    _launch(
        kernels.find_places,
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
    from hloss.losses import kernels

    m, depth = others.units.shape
    tile = GRADIENT_TILE
    grid = _cdiv(rows, tile.rows), _cdiv(depth, tile.columns)
    wanted = max(1, _programs(slopes.device) // (grid[0] * grid[1]))
    part = _cdiv(max(_cdiv(m, wanted), LEAST_PART), tile.depth) * tile.depth
    parts = torch.empty(_cdiv(m, part), rows, depth, device=slopes.device)
    _launch(
        kernels.multiply,
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
    from hloss.losses import kernels

    n, depth = given.shape
    copied = _is_copied(given, normalize)
    units = torch.empty(n, depth, device=given.device) if copied else given
    scales = torch.empty(n, dtype=torch.float64, device=given.device)
    _launch(
        kernels.prepare,
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
    """The loss, the slopes, and the checks: negative pairs, positive pairs, refused rows, refused entries of a matrix."""
    from hloss.losses import kernels

    nodes, device = s.n_bins + 1, table.device
    loss, slopes = torch.empty((), device=device), torch.empty(2 * nodes + 1, device=device)
    checks = torch.empty(4, dtype=torch.int64, device=device)
    constants = {"NODES": nodes, "CHUNK": _chunk(nodes)}
    if s.kernel == "triangular" and s.order_cost == "step":
        _launch(kernels.finish_step, (1,), None, table, loss, slopes, checks, SHIFT=s.margin_nodes, **constants)
    else:
        grid, matrices = (_cdiv(nodes, FORM_TILE[0]),), bilinear_forms(s, device)
        constants |= {"BR": FORM_TILE[0], "BC": FORM_TILE[1]}
        _launch(kernels.finish_matrix, grid, None, table, matrices, loss, slopes, checks, **constants)
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


def _is_copied(embeddings: Tensor, normalize: bool) -> bool:
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


def _empty_places(n: int, m: int, nodes: int, device: torch.device) -> Tensor:
    """Memory for (n, m) places in whole tiles."""
    dtype = torch.int16 if 2 * nodes < 2**15 else torch.int32
    return torch.empty(_cdiv(n, FILL) * FILL, _cdiv(m, FILL) * FILL, dtype=dtype, device=device)


def _similarity_tile(n: int, m: int) -> Tile:
    return SMALL_TILE if max(n, m) <= SMALL else LARGE_TILE


def _tile_count(n: int, m: int, side: int, within: bool) -> int:
    down, across = _cdiv(n, side), _cdiv(m, side)
    return down * (down + 1) // 2 if within else down * across


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


def _launch(kernel: Any, grid: tuple[int, ...], tile: Tile | None, *arguments: Any, **constants: Any) -> None:
    if tile is not None:
        constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
    kernel[grid](*arguments, **constants)


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
    """Loss, and for the backward pass unit rows and inverse norms of both sides, slopes, places; empty if not needed."""
    s = LossSettings(
        n_bins, kernel, bandwidth, order_cost, margin, alpha, normalize=normalize, on_degenerate=on_degenerate
    )
    loss, rows, columns, slopes, places = _forward(embeddings, references, labels, reference_labels, s, precision)
    empty = partial(torch.empty, 0, device=embeddings.device)
    copied = _is_copied(embeddings, normalize)  # else the units are the embeddings: no operator returns its input
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
    copied = _is_copied(embeddings, normalize)
    sides = []
    for x in (embeddings, references):
        sides.append(torch.empty(x.shape if x is not None and copied else 0, device=device))
        sides.append(torch.empty(0 if x is None else len(x), dtype=torch.float64, device=device))
    kept = len(embeddings) * len(columns) <= KEPT_PAIRS
    places = _empty_places(len(embeddings), len(columns), n_bins + 1, device) if kept else None
    nothing = torch.empty(0, dtype=torch.int16, device=device)
    loss, slopes = torch.empty((), device=device), torch.empty(2 * n_bins + 3, device=device)
    return loss, *sides, slopes, nothing if places is None else places


@torch.library.custom_op("hloss::histogram_loss_backward", mutates_args=())
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
    """The gradients that are wanted, of the embeddings and of the references."""
    copied = _is_copied(embeddings, normalize)
    rows = Side(units if copied else embeddings.contiguous(), scales)
    columns = None
    if references is not None:
        columns = Side(column_units if copied else references.contiguous(), column_scales)
    outcome = Outcome(upstream, rows, columns, slopes, places if places.numel() else None)
    s = LossSettings(n_bins, normalize=normalize)
    both = _backward(outcome, labels, reference_labels, embeddings.dtype, (wanted[0], wanted[1]), s, precision)
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
