"""Device code for CUDA: the rule on one tile of one tensor, and launches that cover all tensors of a group.

A launch has one program per tile. `owners` says which tensor a tile belongs to, and row `owner` of `tensors` (int64)
where that tensor is: the addresses of its arrays, its size, its first tile and its key for stochastic rounding. So the
number of launches does not grow with the number of tensors. Everything is streamed once, so what counts is that enough
bytes are on their way: a tile whose arrays start at multiples of 16 bytes and that lies wholly inside its tensor is
read in 16-byte words without a mask (Triton splits a masked access wherever the mask could change); any other takes a
masked path.

Arithmetic is fp32. Names are those of Algorithm 3.
"""

# Triton compiles these functions from their source: it knows no annotations but constexpr, and has no types of its own.
# mypy: ignore-errors

import triton
import triton.language as tl

# Columns of a row of `tensors`.
FIRST_ARRAY = tl.constexpr(0)  # addresses of up to four arrays: θ, g, m, h for the step; h, ĥ for the curvature
SIZE = tl.constexpr(4)
FIRST_TILE = tl.constexpr(5)
KEY = tl.constexpr(6)
COLUMNS = tl.constexpr(8)  # 64 bytes a row

# sophia.optim.rounding has the specification.
ELEMENT_STRIDE = tl.constexpr(0x9E3779B1)
STEP_STRIDE = tl.constexpr(0x85EBCA77)
MIX_1 = tl.constexpr(0x85EBCA6B)
MIX_2 = tl.constexpr(0xC2B2AE35)


@triton.jit(do_not_specialize=["t"])  # else it would be compiled anew at t = 1 and at multiples of 16
def step_kernel(
    tensors,
    owners,
    clipped,
    found_inf,
    grad_scale,
    lr,
    lr_address,
    t,
    t_address,
    beta1,
    new_weight,
    gamma,
    eps,
    weight_decay,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
):
    """One step of Sophia. clipped, found_inf and grad_scale are addresses or None, as are those of lr and t."""
    if found_inf is not None:  # noqa: SIM102 - the first is known when compiling
        if tl.load(found_inf) != 0:
            return
    factor = 1.0
    if grad_scale is not None:
        factor = 1.0 / tl.load(grad_scale).to(tl.float32)
    if MAXIMIZE:
        factor = -factor
    if lr_address is not None:
        lr = tl.load(lr_address).to(tl.float32)
    row, start, rest = _place(tensors, owners, TILE)
    key = _key(row, t, t_address)
    aligned = _aligned(row, 0) & _aligned(row, 1) & _aligned(row, 2) & _aligned(row, 3)
    # fmt: off
    if aligned & (rest >= TILE):
        count = _step_tile(row, start, None, key, factor, lr, beta1, new_weight, gamma, eps, weight_decay,
                           P, G, M, H, STOCHASTIC, TILE)
    else:
        count = _step_tile(row, start, tl.arange(0, TILE) < rest, key, factor, lr, beta1, new_weight, gamma, eps,
                           weight_decay, P, G, M, H, STOCHASTIC, TILE)
    # fmt: on
    if clipped is not None:
        tl.atomic_add(clipped, count.to(tl.int64), sem="relaxed")


@triton.jit
def _step_tile(
    row,
    start,
    inside,
    key,
    factor,
    lr,
    beta1,
    new_weight,
    gamma,
    eps,
    weight_decay,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
):
    p = _addresses(row, 0, start, inside, P, TILE)
    m = _addresses(row, 2, start, inside, M, TILE)
    grad = _load(_addresses(row, 1, start, inside, G, TILE), inside) * factor
    momentum = _load(m, inside)
    curvature = _load(_addresses(row, 3, start, inside, H, TILE), inside)
    theta = _load(p, inside)

    momentum = beta1 * momentum + new_weight * grad
    bound = tl.maximum(gamma * curvature, eps, propagate_nan=tl.PropagateNan.ALL)
    update = tl.maximum(momentum / bound, -1.0, propagate_nan=tl.PropagateNan.ALL)
    update = tl.minimum(update, 1.0, propagate_nan=tl.PropagateNan.ALL)
    theta -= lr * weight_decay * theta
    theta -= lr * update

    tl.store(p, theta.to(P), mask=inside)
    tl.store(m, _rounded(momentum, start, key, M, STOCHASTIC, TILE), mask=inside)
    return tl.sum((tl.abs(momentum) > bound).to(tl.int32))


@triton.jit(do_not_specialize=["t"])
def fold_kernel(
    tensors,
    owners,
    t,
    t_address,
    beta2,
    new_weight,
    H: tl.constexpr,
    E: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
):
    """h ← β2 h + (1 − β2) ĥ. The arguments are those of the step."""
    row, start, rest = _place(tensors, owners, TILE)
    key = _key(row, t, t_address)
    if _aligned(row, 0) & _aligned(row, 1) & (rest >= TILE):
        _fold_tile(row, start, None, key, beta2, new_weight, H, E, STOCHASTIC, TILE)
    else:
        inside = tl.arange(0, TILE) < rest
        _fold_tile(row, start, inside, key, beta2, new_weight, H, E, STOCHASTIC, TILE)


@triton.jit
def _fold_tile(
    row,
    start,
    inside,
    key,
    beta2,
    new_weight,
    H: tl.constexpr,
    E: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
):
    h = _addresses(row, 0, start, inside, H, TILE)
    estimate = _load(_addresses(row, 1, start, inside, E, TILE), inside)
    curvature = beta2 * _load(h, inside) + new_weight * estimate
    tl.store(h, _rounded(curvature, start, key, H, STOCHASTIC, TILE), mask=inside)


@triton.jit
def floor_kernel(
    tensors,
    owners,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    TILE: tl.constexpr,
):
    """The memory traffic of a step and next to no arithmetic: read four arrays, write two."""
    row, start, rest = _place(tensors, owners, TILE)
    aligned = _aligned(row, 0) & _aligned(row, 1) & _aligned(row, 2) & _aligned(row, 3)
    if aligned & (rest >= TILE):
        _floor_tile(row, start, None, P, G, M, H, TILE)
    else:
        _floor_tile(row, start, tl.arange(0, TILE) < rest, P, G, M, H, TILE)


@triton.jit
def _floor_tile(
    row,
    start,
    inside,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    TILE: tl.constexpr,
):
    p = _addresses(row, 0, start, inside, P, TILE)
    m = _addresses(row, 2, start, inside, M, TILE)
    first = 0.5 * (_load(p, inside) + _load(_addresses(row, 1, start, inside, G, TILE), inside))
    second = 0.5 * (_load(m, inside) + _load(_addresses(row, 3, start, inside, H, TILE), inside))
    tl.store(p, first.to(P), mask=inside)
    tl.store(m, second.to(M), mask=inside)


# ---- where a tile is


@triton.jit
def _place(tensors, owners, TILE: tl.constexpr):
    """This program's row of `tensors`, its tile's first element, and how many are left of the tensor from there."""
    tile = tl.program_id(0)
    row = tensors + tl.load(owners + tile).to(tl.int64) * COLUMNS
    start = (tile - tl.load(row + FIRST_TILE)) * TILE
    return row, start, tl.load(row + SIZE) - start


@triton.jit
def _key(row, t, t_address):
    """Of the noise in this tensor at t: uint32."""
    if t_address is not None:
        t = tl.load(t_address)
    return tl.load(row + KEY).to(tl.uint32) + t.to(tl.uint32) * STEP_STRIDE


@triton.jit
def _aligned(row, number: tl.constexpr):
    return (tl.load(row + FIRST_ARRAY + number) & 15) == 0


@triton.jit
def _addresses(row, number: tl.constexpr, start, inside, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """The addresses of the tile's elements in an array. Without a mask they are known to begin a 16-byte word."""
    array = tl.load(row + FIRST_ARRAY + number).to(tl.pointer_type(DTYPE))
    if inside is None:
        array = tl.multiple_of(array, 16)
    return array + start + tl.arange(0, TILE)


# ---- between what is stored and fp32


@triton.jit
def _load(addresses, inside):
    if inside is None:  # noqa: SIM108 - known when compiling
        value = tl.load(addresses)
    else:
        value = tl.load(addresses, mask=inside, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _rounded(value, start, key, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, TILE: tl.constexpr):
    """The value as it is stored: rounded to nearest, or stochastically as sophia.optim.rounding specifies it."""
    stored = value.to(DTYPE)
    if STOCHASTIC:
        x = (start.to(tl.uint32) + tl.arange(0, TILE).to(tl.uint32)) * ELEMENT_STRIDE + key
        x ^= x >> 16
        x *= MIX_1
        x ^= x >> 13
        x *= MIX_2
        x ^= x >> 16
        bits = value.to(tl.uint32, bitcast=True)
        moved = ((bits + (x & 0xFFFF)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        # Infinity and NaN take no noise: it would turn one into the other, or wrap a NaN to a zero.
        stored = tl.where((bits & 0x7F800000) != 0x7F800000, moved, stored)
    return stored
