"""The two passes of the fused histogram loss, as launches of Triton kernels.

Forward: `prepare` writes unit rows and their norms, `bin_pairs` computes tiles of similarities and adds their pairs to
a table of integers, `finish_step` or `finish_matrix` turns the table into the loss and the slopes.
Backward: the matrix of the pairs' slopes is multiplied with the embeddings, and `through_norm` goes on through the
normalisation. If the pairs are few (KEPT_PAIRS), the place of each pair in the table of slopes is kept from the forward
pass, and `multiply` looks it up while it multiplies. Otherwise `find_slopes` computes the similarities again, one block
of the matrix of slopes at a time, which cuBLAS multiplies: memory does not grow with the number of pairs.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hloss.losses.checks import is_deferred, verify_or_defer
from hloss.losses.cuda_forms import swap_cuda_precision
from hloss.losses.densities import FLAGS, LANE_PAIRS, cost_matrix, kernel_matrix
from hloss.losses.settings import LossSettings, missing_pairs
from hloss.losses.streaming import checked_pairs
from hloss.numerics import LONGEST

KEPT_PAIRS = 2**22  # places of so many pairs are kept for the backward pass: 8 MiB
BLOCK_ROWS = 2**13  # most rows, and columns within one batch, of a block of slopes
BLOCK_PAIRS = 2**26  # most slopes held at once: 256 MiB
PROGRAMS_PER_PROCESSOR = 4
LANES_BYTES = 2**26  # most memory of the lanes
LEAST_PART = 64  # fewest columns that a program multiplies with
FORM_TILE = 16, 256  # rows and columns of a bilinear form that a program handles at once
HERE = nullcontext()


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


class Launch:
    """A kernel and the arguments of its launch, without the tensors. Their types are always the same.

    The compiled kernel is stored, because Triton's own cache takes longer. Triton's interpreter compiles nothing.
    Tensors must be `ready`: for an address that is not aligned, Triton compiles another kernel.
    """

    def __init__(
        self, name: str, grid: tuple[int, ...], tile: Tile | None, numbers: tuple[Any, ...], **constants: Any
    ) -> None:
        self.name, self.grid, self.tile, self.numbers, self.constants = name, grid, tile, numbers, constants
        self.rest = *numbers, *constants.values()
        self.program: Any = None

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on these tensors; the first call compiles."""
        if self.program is not None:
            self.program(*tensors, *self.rest)
            return
        compiled = _launch(self.name, self.grid, self.tile, *tensors, *self.numbers, **self.constants)
        if compiled is not None:
            self.program = compiled[(*self.grid, 1, 1)[:3]]


class Product(NamedTuple):
    """The launch of `multiply`, and the shape of its result: parts to be summed, rows, depth."""

    launch: Launch
    shape: tuple[int, int, int]


class Block(NamedTuple):
    """A block of the matrix of slopes and the launch that finds it."""

    launch: Launch
    rows: slice
    columns: slice
    mirrored: bool  # its transpose is another block, which is found no more


class Plan:
    """Both passes without the tensors, for all batches of the same shapes and types.

    Args:
        shape: of the embeddings.
        reference_shape: of the references, None for the pairs within one batch.
        matrix: whether the labels are a matrix of pairs.
        types: dtypes of the embeddings and of the labels.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        reference_shape: tuple[int, int] | None,
        matrix: bool,
        types: tuple[torch.dtype, torch.dtype],
        device: torch.device,
        s: LossSettings,
        precision: str,
    ) -> None:
        self.device, self.s, self.precision = device, s, precision
        self.within, self.matrix = reference_shape is None, matrix
        self.n, self.depth = shape
        self.m = (reference_shape or shape)[0]
        self.dtype, self.nodes = types[0], s.n_bins + 1
        self.is_copied = is_copied(self.dtype, s.normalize)
        self.places_shape = places_shape(self.n, self.m)
        self.places_dtype = places_dtype(self.nodes)
        self._plan_forward()
        if self.places_shape is None:
            self._plan_blocks()
        else:
            width = self.places_shape[1]
            self.product = self._multiply(self.n, self.m, (width, 1))
            self.column_product = self._multiply(self.m, self.n, (1, width))
        parts = (1, 1) if self.places_shape is None else (self.product.shape[0], self.column_product.shape[0])
        self.through_norm = self._by_rows("through_norm", self.n, (self.n, self.depth, parts[0]))
        self.column_through_norm = self._by_rows("through_norm", self.m, (self.m, self.depth, parts[1]))

    def _plan_forward(self) -> None:
        n, m, nodes, s = self.n, self.m, self.nodes, self.s
        tile = SMALL_TILE if max(n, m) <= SMALL else LARGE_TILE
        down, across = _filled(n) // tile.rows, _filled(m) // tile.rows
        tiles = down * (down + 1) // 2 if self.within else down * across
        programs = max(1, min(tiles, _programs(self.device), LANES_BYTES // (16 * nodes)))
        # 2 nodes counts, 2 nodes sums of fractions, flags, and 2 nodes packed numbers per program
        self.table_size = 4 * nodes + FLAGS + programs * 2 * nodes
        self.flags = slice(4 * nodes, 4 * nodes + FLAGS)
        self.prepare = self._prepare(n, m, not self.matrix)
        self.column_prepare = self._prepare(m, n, False)
        stride = 0 if self.places_shape is None else self.places_shape[1]
        self.bin_pairs = Launch(
            "bin_pairs",
            (programs,),
            tile,
            (n, m, self.depth, *self._label_strides(), stride, tiles, across),
            NODES=nodes,
            WITHIN=self.within,
            MATRIX=self.matrix,
            KEEP=self.places_shape is not None,
            TILES_TO_FLUSH=max(1, LANE_PAIRS // tile.rows**2),
            CHUNK=max(512, _chunk(2 * nodes)),  # no two threads hold the same number
            **self._product_constants(tile),
        )
        self.forms: tuple[Tensor, ...] = ()
        if s.kernel == "triangular" and s.order_cost == "step":
            constants = {"NODES": nodes, "SHIFT": s.margin_nodes, "CHUNK": _chunk(nodes)}
            self.finish = Launch("finish_step", (1,), None, (), **constants)
        else:
            self.forms = (bilinear_forms(s, self.device),)
            constants = {"NODES": nodes, "CHUNK": _chunk(nodes), "BR": FORM_TILE[0], "BC": FORM_TILE[1]}
            self.finish = Launch("finish_matrix", (_cdiv(nodes, FORM_TILE[0]) + 1,), None, (), **constants)

    def _plan_blocks(self) -> None:
        """Within one batch the blocks on and above the diagonal; a block's mirror is its transpose."""
        height = min(BLOCK_ROWS, _filled(self.n))
        width = height if self.within else min(max(FILL, BLOCK_PAIRS // height // FILL * FILL), _filled(self.m))
        self.memory_shape = height, width
        self.blocks = [
            self._block(i, j)
            for i in _blocks(self.n, height)
            for j in _blocks(self.m, width)
            if not self.within or j.start >= i.start
        ]

    def _block(self, i: slice, j: slice) -> Block:
        tile, on_diagonal = LARGE_TILE, self.within and i == j
        down, across = _cdiv(i.stop - i.start, tile.rows), _cdiv(j.stop - j.start, tile.rows)
        launch = Launch(
            "find_slopes",
            (down * (down + 1) // 2 if on_diagonal else down * across,),
            tile,
            (i.start, j.start, i.stop, j.stop, self.depth, *self._label_strides(), self.memory_shape[1], across),
            NODES=self.nodes,
            WITHIN=self.within,
            MATRIX=self.matrix,
            MIRROR=on_diagonal,
            **self._product_constants(tile),
        )
        return Block(launch, i, j, self.within and not on_diagonal)

    def _multiply(self, rows: int, m: int, strides: tuple[int, int]) -> Product:
        """The slopes of all rows times the other side, in enough parts to occupy the GPU."""
        tile = GRADIENT_TILE
        grid = _cdiv(rows, tile.rows), _cdiv(self.depth, tile.columns)
        wanted = max(1, _programs(self.device) // (grid[0] * grid[1]))
        part = _cdiv(max(_cdiv(m, wanted), LEAST_PART), tile.depth) * tile.depth
        parts = _cdiv(m, part)
        launch = Launch(
            "multiply",
            (*grid, parts),
            tile,
            (rows, m, self.depth, part, *strides),
            NODES=self.nodes,
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.depth,
            EVEN=self.depth % tile.columns == 0,
            PRECISION=self.precision,
        )
        return Product(launch, (parts, rows, self.depth))

    def _prepare(self, rows: int, others: int, find_groups: bool) -> Launch:
        constants = {"NODES": self.nodes, "FIND_GROUPS": find_groups, "WITHIN": self.within, "WRITE": self.is_copied}
        return self._by_rows("prepare", rows, (rows, others, self.depth, LONGEST), **constants)

    def _by_rows(self, name: str, rows: int, numbers: tuple[Any, ...], **constants: Any) -> Launch:
        constants |= {"NORMALIZE": self.s.normalize, "BR": _row_tile(self.depth), "BD": _chunk(self.depth)}
        return Launch(name, (_cdiv(rows, _row_tile(self.depth)),), None, numbers, **constants)

    def _label_strides(self) -> tuple[int, int]:
        return (self.m, 1) if self.matrix else (0, 0)

    def _product_constants(self, tile: Tile) -> dict[str, Any]:
        return {
            "BM": tile.rows,
            "BK": tile.depth,
            "EVEN": self.depth % tile.depth == 0,
            "PRECISION": self.precision,
        }


_find_plan = lru_cache(maxsize=64)(Plan)


def find_plan(embeddings: Tensor, references: Tensor | None, labels: Tensor, s: LossSettings, precision: str) -> Plan:
    """The plan for these inputs. It is computed once and cached."""
    shape = None if references is None else references.shape
    types = embeddings.dtype, labels.dtype
    return _find_plan(embeddings.shape, shape, labels.ndim == 2, types, embeddings.device, s, precision)


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    rows: Side
    columns: Side | None  # None: the rows
    slopes: Tensor  # (2 n_bins + 3,) float32: of negatives, of positives, and 0 for what is no pair
    places: Tensor | None


def forward_pass(
    embeddings: Tensor, references: Tensor | None, labels: Tensor, reference_labels: Tensor | None, plan: Plan
) -> tuple[Tensor, Kept]:
    """Return the loss, a scalar float32, and what the backward pass needs."""
    device, s = plan.device, plan.s
    with _on(device):
        table = torch.zeros(plan.table_size, dtype=torch.int64, device=device)
        both_labels = row_labels, column_labels = _both_labels(labels, reference_labels, device)
        rows = _prepare(plan.prepare, embeddings, table, both_labels, plan)
        columns = None
        if references is not None:
            columns = _prepare(plan.column_prepare, references, table, both_labels, plan)
        # Norms and class labels tell whether the batch is refused: the host does not wait for the products.
        is_checked = not (plan.matrix or is_deferred() or _is_refused(table[plan.flags]))
        places = None
        if plan.places_shape:
            places = torch.empty(plan.places_shape, dtype=plan.places_dtype, device=device)
        column_units = (columns or rows).units
        plan.bin_pairs(rows.units, column_units, row_labels, column_labels, table, table if places is None else places)
        loss, slopes, checks = _finish(table, plan)
        if not is_checked:
            verify_or_defer(checks, _verify, s, embeddings, labels, references, reference_labels)
    return loss, Kept(rows, columns, slopes, places)


def backward_pass(
    upstream: Tensor,
    kept: Kept,
    labels: Tensor,
    reference_labels: Tensor | None,
    wanted: tuple[bool, bool],
    plan: Plan,
) -> list[Tensor | None]:
    """Gradients of the embeddings and of the references, None where they are not wanted."""
    rows, columns = kept.rows, kept.columns or kept.rows
    with _on(plan.device):
        if kept.places is None:
            sums = _sums_of_blocks(kept, labels, reference_labels, wanted, plan)
        else:
            sums = _sums_of_places(kept, kept.places, wanted, plan)
        upstream = ready(upstream, plan.device)
        return [
            _through_norm(plan.through_norm, sums[0], rows, upstream, plan),
            _through_norm(plan.column_through_norm, sums[1], columns, upstream, plan),
        ]


def _sums_of_places(kept: Kept, places: Tensor, wanted: tuple[bool, bool], plan: Plan) -> list[Tensor | None]:
    """Gradients of the unit rows of both sides, (parts, rows, d), from the stored places."""
    rows, columns = kept.rows, kept.columns or kept.rows
    return [
        _multiply(plan.product, places, kept.slopes, columns) if wanted[0] else None,
        _multiply(plan.column_product, places, kept.slopes, rows) if wanted[1] else None,
    ]


def _multiply(product: Product, places: Tensor, slopes: Tensor, others: Side) -> Tensor:
    parts = torch.empty(product.shape, device=slopes.device)
    product.launch(places, slopes, others.units, parts)
    return parts


def _sums_of_blocks(
    kept: Kept, labels: Tensor, reference_labels: Tensor | None, wanted: tuple[bool, bool], plan: Plan
) -> list[Tensor | None]:
    """Gradients of the unit rows of both sides, each (rows, d), by blocks of slopes.

    The first product of a row overwrites it (beta = 0). Autocast leaves products in place as they are.
    """
    row_labels, column_labels = _both_labels(labels, reference_labels, plan.device)
    rows, columns = kept.rows.units, (kept.columns or kept.rows).units
    memory = torch.empty(plan.memory_shape, device=plan.device)
    by_rows = torch.empty_like(rows) if wanted[0] else None
    by_columns = by_rows if plan.within else torch.empty_like(columns) if wanted[1] else None
    precision = swap_cuda_precision("ieee")
    try:
        for launch, i, j, mirrored in plan.blocks:
            launch(rows, columns, row_labels, column_labels, kept.slopes, memory)
            found = _part(memory, slice(0, i.stop - i.start), slice(0, j.stop - j.start))
            if by_rows is not None:
                _part(by_rows, i).addmm_(found, _part(columns, j), beta=int(j.start > 0))
            if by_columns is not None and (mirrored or not plan.within):
                _part(by_columns, j).addmm_(found.T, _part(rows, i), beta=int(i.start > 0))
    finally:
        swap_cuda_precision(precision)
    return [by_rows, None if plan.within else by_columns]


def _part(x: Tensor, rows: slice, columns: slice | None = None) -> Tensor:
    """Some rows and columns of x. Returns x itself for all of them, because a view takes as long as a launch."""
    if rows.stop - rows.start < x.shape[0]:
        x = x[rows]
    return x if columns is None or columns.stop - columns.start == x.shape[1] else x[:, columns]


def _blocks(size: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]


def _through_norm(launch: Launch, parts: Tensor | None, side: Side, upstream: Tensor, plan: Plan) -> Tensor | None:
    if parts is None:
        return None
    gradient = torch.empty(side.units.shape, dtype=plan.dtype, device=plan.device)
    launch(parts, side.units, side.scales, upstream, gradient)
    return gradient


def _prepare(launch: Launch, given: Tensor, table: Tensor, labels: tuple[Tensor, Tensor], plan: Plan) -> Side:
    given = ready(given, plan.device)
    units = torch.empty(given.shape, device=plan.device) if plan.is_copied else given
    scales = torch.empty(given.shape[0], dtype=torch.float64, device=plan.device)
    launch(given, units, scales, table, *labels)
    return Side(units, scales)


def _is_refused(flags: Tensor) -> bool:
    """Read the flags: whether the batch is refused."""
    refused_rows, refused_pairs, some_negative, some_positive = flags.tolist()
    return bool(refused_rows or refused_pairs or not (some_negative and some_positive))


def _finish(table: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, slopes, and checks: number of negative pairs, positive pairs, refused rows, refused entries of a matrix."""
    loss, slopes = torch.empty((), device=plan.device), torch.empty(2 * plan.nodes + 1, device=plan.device)
    checks = torch.empty(4, dtype=torch.int64, device=plan.device)
    plan.finish(table, *plan.forms, loss, slopes, checks)
    return loss, slopes, checks


def ready(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on the device, contiguous, and beginning at a multiple of 16 bytes."""
    if x.device != device:
        x = x.to(device, non_blocking=True)
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _both_labels(labels: Tensor, reference_labels: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    labels = ready(labels, device)
    return labels, labels if reference_labels is None else ready(reference_labels, device)


@lru_cache(maxsize=8)
def bilinear_forms(s: LossSettings, device: torch.device) -> Tensor:
    """Return three matrices that give loss and slopes from the masses at the nodes, before any kernel.

    Shape (3, n_bins + 1, n_bins + 1), float64. With masses n of the negatives and p of the positives, the first is A in
    the loss n' A p. The products of the others with p and n are the slopes of the negatives and of the positives.
    """
    form = cost_matrix(s, device)
    if s.kernel != "triangular":
        kernel = kernel_matrix(s, device)
        form = kernel.T @ form @ kernel
    slopes = [form.diff(dim=0) / s.delta, form.diff(dim=1).T / s.delta]
    return torch.stack([form, *(torch.cat([x, x[-1:]]) for x in slopes)])  # s = 1 belongs to the last interval


def _verify(
    checks: list[int],
    s: LossSettings,
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
) -> None:
    """Raise what the plain path raises, which names the rows."""
    negatives, positives, refused_rows, refused_pairs = checks
    if refused_rows or refused_pairs:
        checked_pairs(embeddings, labels, references, reference_labels, normalize=s.normalize)
    if (undefined := missing_pairs(negatives, positives)) and s.on_degenerate == "raise":
        raise ValueError(undefined)


def is_copied(dtype: torch.dtype, normalize: bool) -> bool:
    """Whether the unit rows are a copy; otherwise they are the embeddings."""
    return normalize or dtype != torch.float32


def places_shape(n: int, m: int) -> tuple[int, int] | None:
    """Shape of the places that are kept for the backward pass, in whole tiles; None if they are too many."""
    return (_filled(n), _filled(m)) if n * m <= KEPT_PAIRS else None


def places_dtype(nodes: int) -> torch.dtype:
    """Smallest integer type that holds all places."""
    return torch.int16 if 2 * nodes < 2**15 else torch.int32


def _filled(size: int) -> int:
    return _cdiv(size, FILL) * FILL


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
        return HERE
    return torch.cuda.device(device)


def _launch(name: str, grid: tuple[int, ...], tile: Tile | None, *arguments: Any, **constants: Any) -> Any:
    """Launch a kernel with its constants in order. Returns the compiled kernel; None in Triton's interpreter."""
    from hloss.losses import triton_kernels  # needs Triton

    options = {} if tile is None else {"num_warps": tile.warps, "num_stages": tile.stages}
    return getattr(triton_kernels, name)[grid](*arguments, **constants, **options)
