# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the histogram loss. `passes` launches them; read it first.

A program multiplies BM rows by BN columns to compute a tile of similarities. Each pair of a tile becomes a code: the
interval of its similarity, plus NODES for a positive pair. Entries that are no pair have the code 2 NODES. Tables
contain integers, so their sums do not depend on the order of the additions. No floating-point number is added
atomically.
"""

import triton
import triton.language as tl

from hloss.losses import densities

# A packed number contains a count, from bit 42 upwards, and a sum of 24-bit fractions in the bits below.
ONE_PAIR = tl.constexpr(densities.ONE_PAIR)
LOW_BITS = tl.constexpr(densities.ONE_PAIR - 1)
FRACTION_BITS = tl.constexpr(2.0**24)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
# Positions of the flags, which follow the counts and sums of a table. `prepare` sets the last two from class labels.
REFUSED_ROWS = tl.constexpr(0)
REFUSED_PAIRS = tl.constexpr(1)
SOME_NEGATIVE = tl.constexpr(2)
SOME_POSITIVE = tl.constexpr(3)
FLAGS = tl.constexpr(densities.FLAGS)


@triton.jit
def _find_groups(labels, other_labels, flags, r, n, m, WITHIN: tl.constexpr, BC: tl.constexpr):
    """Set the flag SOME_NEGATIVE if there is a negative pair, and SOME_POSITIVE if there is a positive pair.

    A program stops when both flags are set, also if another program has set them.
    """
    row_labels = tl.load(labels + r, mask=r < n, other=0)
    start = 0
    found = tl.zeros((), tl.int64)
    while (start < m) & (found < 2):
        c = start + tl.arange(0, BC)
        column_labels = tl.load(other_labels + c, mask=c < m, other=0)
        real = (r[:, None] < n) & (c[None, :] < m)
        if WITHIN:
            real = real & (r[:, None] != c[None, :])
        same = row_labels[:, None] == column_labels[None, :]
        if tl.sum(tl.sum((real & same).to(tl.int32), 1), 0) > 0:
            tl.store(flags + SOME_POSITIVE, 1)
        if tl.sum(tl.sum((real & (same == 0)).to(tl.int32), 1), 0) > 0:
            tl.store(flags + SOME_NEGATIVE, 1)
        found = tl.load(flags + SOME_NEGATIVE, volatile=True) + tl.load(flags + SOME_POSITIVE, volatile=True)
        start += BC


@triton.jit(do_not_specialize=["n", "m"])
def prepare(
    given,
    units,
    scales,
    table,
    labels,
    other_labels,
    n,
    m,
    depth,
    longest,
    NODES: tl.constexpr,
    FIND_GROUPS: tl.constexpr,
    WITHIN: tl.constexpr,
    WRITE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Store the inverse norms of the rows. If WRITE, also store the rows in float32, as unit rows if NORMALIZE.

    The number of refused rows is added to the table. If FIND_GROUPS, the table's flags SOME_NEGATIVE and SOME_POSITIVE
    are set.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    start = r.to(tl.int64)[:, None] * depth
    squares = tl.zeros((BR,), tl.float64)
    for k in range(0, depth, BD):
        kk = k + tl.arange(0, BD)
        mask = (r[:, None] < n) & (kk[None, :] < depth)
        x = tl.load(given + start + kk[None, :], mask=mask, other=0.0).to(tl.float64)
        squares += tl.sum(x * x, 1)
    norm = tl.sqrt(squares)
    good = norm <= longest
    if NORMALIZE:
        good = (norm > 0) & (norm <= LARGEST)
    bad = tl.sum(((r < n) & (good == 0)).to(tl.int64), 0)
    if bad > 0:
        tl.atomic_add(table + 4 * NODES + REFUSED_ROWS, bad, sem="relaxed")
    scale = 1.0 / tl.where(norm > 0, norm, 1.0)
    tl.store(scales + r, scale, mask=r < n)
    if WRITE:
        for k in range(0, depth, BD):
            kk = k + tl.arange(0, BD)
            mask = (r[:, None] < n) & (kk[None, :] < depth)
            x = tl.load(given + start + kk[None, :], mask=mask, other=0.0).to(tl.float64)
            if NORMALIZE:
                x = x * scale[:, None]
            tl.store(units + start + kk[None, :], x.to(tl.float32), mask=mask)
    if FIND_GROUPS:
        _find_groups(labels, other_labels, table + 4 * NODES, r, n, m, WITHIN, BD)


@triton.jit
def _similarities(
    rows,
    columns,
    r,
    c,
    n,
    m,
    depth,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    a_start = rows + r.to(tl.int64)[:, None] * depth
    b_start = columns + c.to(tl.int64)[:, None] * depth
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, depth, BK):
        kk = k + tl.arange(0, BK)
        a_mask = r[:, None] < n
        b_mask = c[:, None] < m
        if not EVEN:
            a_mask = a_mask & (kk[None, :] < depth)
            b_mask = b_mask & (kk[None, :] < depth)
        a = tl.load(a_start + kk[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_start + kk[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _position(similarity, NODES: tl.constexpr):
    """Return (s + 1) / Delta, limited to [0, n_bins]; 0 for NaN."""
    half: tl.constexpr = (NODES - 1) / 2.0
    top: tl.constexpr = NODES - 1.0
    u = similarity * half + half
    u = tl.where(u > 0.0, u, 0.0)
    return tl.where(u < top, u, top)


@triton.jit
def _codes(
    interval,
    labels,
    other_labels,
    r,
    c,
    n,
    m,
    stride_r,
    stride_c,
    NODES: tl.constexpr,
    WITHIN: tl.constexpr,
    MATRIX: tl.constexpr,
):
    real = (r[:, None] < n) & (c[None, :] < m)
    if MATRIX:
        place = r.to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
        sign = tl.load(labels + place, mask=real, other=0)
        positive = sign > 0
        real = real & (sign != 0)
    else:
        row_labels = tl.load(labels + r, mask=r < n, other=0)
        column_labels = tl.load(other_labels + c, mask=c < m, other=0)
        positive = row_labels[:, None] == column_labels[None, :]
    if WITHIN:
        real = real & (r[:, None] != c[None, :])
    return tl.where(real, tl.where(positive, interval + NODES, interval), 2 * NODES)


@triton.jit
def _check_matrix(labels, flags, r, c, n, m, stride_r, stride_c, WITHIN: tl.constexpr):
    """Count the entries of a tile of the matrix of pairs that are not +1, -1 or 0, or that break its symmetry."""
    real = (r[:, None] < n) & (c[None, :] < m)
    r, c = r.to(tl.int64), c.to(tl.int64)
    sign = tl.load(labels + r[:, None] * stride_r + c[None, :] * stride_c, mask=real, other=0)
    bad = (sign > 1) | (sign < -1)
    if WITHIN:
        bad = bad | (sign != tl.load(labels + c[None, :] * stride_r + r[:, None] * stride_c, mask=real, other=0))
    count = tl.sum(tl.sum(bad.to(tl.int64), 1), 0)
    if count > 0:
        tl.atomic_add(flags, count, sem="relaxed")


@triton.jit
def _flush(lane, wide, NODES: tl.constexpr, CHUNK: tl.constexpr):
    """Add a program's packed numbers to the counts and sums of fractions of all programs, and reset them."""
    tl.debug_barrier()
    for start in range(0, 2 * NODES, CHUNK):
        i = start + tl.arange(0, CHUNK)
        packed = tl.atomic_xchg(lane + i, tl.zeros((CHUNK,), tl.int64), mask=i < 2 * NODES, sem="relaxed")
        some = (i < 2 * NODES) & (packed != 0)
        tl.atomic_add(wide + i, packed >> 42, mask=some, sem="relaxed")
        tl.atomic_add(wide + 2 * NODES + i, packed & LOW_BITS, mask=some, sem="relaxed")
    tl.debug_barrier()


@triton.jit
def _tile(t, across, TRIANGLE: tl.constexpr):
    """Return row and column of tile t; a row has `across` tiles. TRIANGLE: t counts only tiles with row <= column."""
    if TRIANGLE:  # Row `long` and a shorter row of the lower triangle together have `width` tiles.
        top = across // 2
        width = 2 * top + 1
        long = top + t // width
        place = t % width
        short = place > long
        c = tl.where(short, 2 * top - 1 - long, long)
        r = tl.where(short, place - long - 1, place)
    else:
        r = t // across
        c = t % across
    return r, c


@triton.jit(do_not_specialize=["n", "m", "tiles", "across"])
def bin_pairs(
    rows,
    columns,
    labels,
    other_labels,
    table,
    places,
    n,
    m,
    depth,
    stride_r,
    stride_c,
    place_stride,
    tiles,
    across,
    NODES: tl.constexpr,
    WITHIN: tl.constexpr,
    MATRIX: tl.constexpr,
    KEEP: tl.constexpr,
    TILES_TO_FLUSH: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fill the table with counts and sums of fractions.

    The table contains 2 NODES counts, 2 NODES sums of fractions, and FLAGS flags. It also contains one lane per
    program; a lane has 2 NODES packed numbers. A row has `across` tiles. Within one batch, only tiles on and above the
    diagonal are computed.

    A packed number can count 2^18 pairs. Before it overflows, it is added to the shared counts and sums.
    """
    program = tl.program_id(0)
    lane = table + 4 * NODES + FLAGS + program.to(tl.int64) * (2 * NODES)
    for t in range(program, tiles, tl.num_programs(0)):
        tile_r, tile_c = _tile(t, across, WITHIN)
        r = tile_r * BM + tl.arange(0, BM)
        c = tile_c * BM + tl.arange(0, BM)
        similarity = _similarities(rows, columns, r, c, n, m, depth, BM, BM, BK, EVEN, PRECISION)
        position = _position(similarity, NODES)
        interval = position.to(tl.int32)
        fraction = position - interval.to(tl.float32)
        code = _codes(interval, labels, other_labels, r, c, n, m, stride_r, stride_c, NODES, WITHIN, MATRIX)
        if MATRIX:
            _check_matrix(labels, table + 4 * NODES + REFUSED_PAIRS, r, c, n, m, stride_r, stride_c, WITHIN)
        counted = code < 2 * NODES
        if WITHIN:
            counted = counted & (r[:, None] < c[None, :])
        packed = (fraction * FRACTION_BITS).to(tl.int32).to(tl.int64) + ONE_PAIR
        tl.atomic_add(lane + code, packed, mask=counted, sem="relaxed")
        if KEEP:
            tl.store(places + r.to(tl.int64)[:, None] * place_stride + c[None, :], code)
            if WITHIN and tile_r != tile_c:
                tl.store(places + c.to(tl.int64)[:, None] * place_stride + r[None, :], tl.trans(code))
        if (t // tl.num_programs(0)) % TILES_TO_FLUSH == TILES_TO_FLUSH - 1:
            _flush(lane, table, NODES, CHUNK)
    _flush(lane, table, NODES, CHUNK)


@triton.jit
def _mass(table, i, NODES: tl.constexpr):
    """Return the mass of one group at the nodes i: 1 - f of the pairs above a node, f of those below (equation 2)."""
    real = (i >= 0) & (i < NODES)
    sums = table + 2 * NODES
    count = tl.load(table + i, mask=real, other=0).to(tl.float64)
    behind = tl.load(sums + i, mask=real, other=0).to(tl.float64)
    before = tl.load(sums + i - 1, mask=real & (i > 0), other=0).to(tl.float64)
    return count - (behind - before) / FRACTION_BITS


@triton.jit
def _total(counts, NODES: tl.constexpr, CHUNK: tl.constexpr):
    total = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, NODES, CHUNK):
        i = start + tl.arange(0, CHUNK)
        total += tl.load(counts + i, mask=i < NODES, other=0)
    return tl.sum(total, 0)


@triton.jit
def _report(table, checks, negatives, positives, NODES: tl.constexpr):
    tl.store(checks, negatives)
    tl.store(checks + 1, positives)
    tl.store(checks + 2, tl.load(table + 4 * NODES + REFUSED_ROWS))
    tl.store(checks + 3, tl.load(table + 4 * NODES + REFUSED_PAIRS))


@triton.jit
def finish_step(table, loss, slopes, checks, NODES: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr):
    """Compute loss and slopes in one program, for the triangular kernel and the step cost with margin SHIFT * Delta."""
    negatives = _total(table, NODES, CHUNK)
    positives = _total(table + NODES, NODES, CHUNK)
    _report(table, checks, negatives, positives, NODES)
    # Without positives or negatives all masses of one group are 0, and so are the loss and the slopes.
    n_negative = tl.maximum(negatives, 1).to(tl.float64)
    n_positive = tl.maximum(positives, 1).to(tl.float64)
    some = ((negatives > 0) & (positives > 0)).to(tl.float64)
    factor = some * ((NODES - 1) / 2.0) / n_negative / n_positive  # 1 / Delta
    begun = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, SHIFT, CHUNK):
        q = start + tl.arange(0, CHUNK)
        begun += tl.where(q < SHIFT, _mass(table + NODES, q, NODES), 0.0)
    cumulative = tl.sum(begun, 0)
    total = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, NODES, CHUNK):
        r = start + tl.arange(0, CHUNK)
        shifted = _mass(table + NODES, r + SHIFT, NODES)
        total += _mass(table, r, NODES) * (cumulative + tl.cumsum(shifted, 0))
        cumulative += tl.sum(shifted, 0)
        b = tl.minimum(r, NODES - 2)  # s = 1 has the slope of the last interval.
        by_negative = _mass(table + NODES, b + 1 + SHIFT, NODES) * factor
        by_positive = _mass(table, b - SHIFT, NODES) * (-factor)
        tl.store(slopes + r, by_negative.to(tl.float32), mask=r < NODES)
        tl.store(slopes + NODES + r, by_positive.to(tl.float32), mask=r < NODES)
    tl.store(slopes + 2 * NODES, 0.0)
    tl.store(loss, (tl.sum(total, 0) / n_negative / n_positive * some).to(tl.float32))


@triton.jit
def _product(matrix, table, r, NODES: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Return the product of rows r of a (NODES, NODES) float64 matrix with the masses of a group."""
    found = tl.zeros((BR,), tl.float64)
    for start in range(0, NODES, BC):
        c = start + tl.arange(0, BC)
        mask = (r[:, None] < NODES) & (c[None, :] < NODES)
        block = tl.load(matrix + r.to(tl.int64)[:, None] * NODES + c[None, :], mask=mask, other=0.0)
        found += tl.sum(block * _mass(table, c, NODES)[None, :], 1)
    return found


@triton.jit
def finish_matrix(
    table, matrices, loss, slopes, checks, NODES: tl.constexpr, CHUNK: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """Compute loss and slopes for any kernel and cost, from the three matrices of `passes.bilinear_forms`.

    Each program computes the slopes of BR intervals, except the last program, which computes the loss.
    """
    size: tl.constexpr = NODES * NODES
    negatives = _total(table, NODES, CHUNK)
    positives = _total(table + NODES, NODES, CHUNK)
    n_negative = tl.maximum(negatives, 1).to(tl.float64)
    n_positive = tl.maximum(positives, 1).to(tl.float64)
    factor = ((negatives > 0) & (positives > 0)).to(tl.float64) / n_negative / n_positive
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    by_negative = _product(matrices + size, table + NODES, r, NODES, BR, BC) * factor
    by_positive = _product(matrices + 2 * size, table, r, NODES, BR, BC) * factor
    tl.store(slopes + r, by_negative.to(tl.float32), mask=r < NODES)
    tl.store(slopes + NODES + r, by_positive.to(tl.float32), mask=r < NODES)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        _report(table, checks, negatives, positives, NODES)
        tl.store(slopes + 2 * NODES, 0.0)
        total = tl.zeros((BR,), tl.float64)
        for start in range(0, NODES, BR):
            i = start + tl.arange(0, BR)
            total += _mass(table, i, NODES) * _product(matrices, table + NODES, i, NODES, BR, BC)
        tl.store(loss, (tl.sum(total, 0) * factor).to(tl.float32))


@triton.jit(do_not_specialize=["first_row", "first_column", "n", "m", "across"])
def find_slopes(
    rows,
    columns,
    labels,
    other_labels,
    slopes,
    found,
    first_row,
    first_column,
    n,
    m,
    depth,
    stride_r,
    stride_c,
    found_stride,
    across,
    NODES: tl.constexpr,
    WITHIN: tl.constexpr,
    MATRIX: tl.constexpr,
    MIRROR: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a block of the matrix of slopes. MIRROR: the block lies on the diagonal, so it is symmetric.

    `found` has space for whole tiles.
    """
    tile_r, tile_c = _tile(tl.program_id(0), across, MIRROR)
    i = tile_r * BM + tl.arange(0, BM)
    j = tile_c * BM + tl.arange(0, BM)
    r, c = first_row + i, first_column + j
    similarity = _similarities(rows, columns, r, c, n, m, depth, BM, BM, BK, EVEN, PRECISION)
    interval = _position(similarity, NODES).to(tl.int32)
    code = _codes(interval, labels, other_labels, r, c, n, m, stride_r, stride_c, NODES, WITHIN, MATRIX)
    slope = tl.load(slopes + code)
    i, j = i.to(tl.int64), j.to(tl.int64)
    tl.store(found + i[:, None] * found_stride + j[None, :], slope)
    if MIRROR and tile_r != tile_c:
        tl.store(found + j[:, None] * found_stride + i[None, :], tl.trans(slope))


@triton.jit(do_not_specialize=["n", "m"])
def multiply(
    places,
    slopes,
    columns,
    parts,
    n,
    m,
    depth,
    part,
    stride_r,
    stride_c,
    NODES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply the matrix of slopes, read by code, by the embeddings of the columns.

    Each program sums over one part of the columns. `places` is padded to whole tiles with the code 2 NODES.
    """
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.program_id(2) * part
    code_start = places + r.to(tl.int64)[:, None] * stride_r
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(first, tl.minimum(first + part, m), BK):
        kk = k + tl.arange(0, BK)
        code = tl.load(code_start + kk.to(tl.int64)[None, :] * stride_c).to(tl.int32)
        slope = tl.load(slopes + code)
        y_mask = kk[:, None] < m
        if not EVEN:
            y_mask = y_mask & (d[None, :] < depth)
        y = tl.load(columns + kk.to(tl.int64)[:, None] * depth + d[None, :], mask=y_mask, other=0.0)
        acc = tl.dot(slope, y, acc, input_precision=PRECISION)
    out = parts + (tl.program_id(2) * n + r).to(tl.int64)[:, None] * depth + d[None, :]
    mask = r[:, None] < n
    if not EVEN:
        mask = mask & (d[None, :] < depth)
    tl.store(out, acc, mask=mask)


@triton.jit
def _sum_parts(parts, place, size, n_parts, mask, BR: tl.constexpr, BD: tl.constexpr):
    total = tl.zeros((BR, BD), tl.float32)
    for p in range(n_parts):
        total += tl.load(parts + p * size + place, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["n", "n_parts"])
def through_norm(
    parts,
    units,
    scales,
    upstream,
    out,
    n,
    depth,
    n_parts,
    NORMALIZE: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute the gradient of the given rows from the parts of the gradient of the unit rows."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    size = n.to(tl.int64) * depth
    start = r.to(tl.int64)[:, None] * depth
    scale = tl.load(upstream).to(tl.float64) + tl.zeros((BR,), tl.float64)
    along = tl.zeros((BR,), tl.float32)
    if NORMALIZE:
        scale = scale * tl.load(scales + r, mask=r < n, other=0.0)
        for k in range(0, depth, BD):
            kk = k + tl.arange(0, BD)
            mask = (r[:, None] < n) & (kk[None, :] < depth)
            gradient = _sum_parts(parts, start + kk[None, :], size, n_parts, mask, BR, BD)
            along += tl.sum(gradient * tl.load(units + start + kk[None, :], mask=mask, other=0.0), 1)
    for k in range(0, depth, BD):
        kk = k + tl.arange(0, BD)
        mask = (r[:, None] < n) & (kk[None, :] < depth)
        gradient = _sum_parts(parts, start + kk[None, :], size, n_parts, mask, BR, BD)
        if NORMALIZE:
            gradient -= along[:, None] * tl.load(units + start + kk[None, :], mask=mask, other=0.0)
        tl.store(out + start + kk[None, :], (gradient.to(tl.float64) * scale[:, None]).to(tl.float32), mask=mask)
