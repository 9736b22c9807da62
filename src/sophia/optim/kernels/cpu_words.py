"""Memory as compiled loops see it: numbers of every dtype, addresses, prefetches, the atomic counter.

numba has no bfloat16 or fp16: they are read as 16-bit words and converted in registers.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from sophia.optim import rounding

# What an element is read as.
WORDS: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.uint16,
    torch.float16: np.uint16,
}

_INFINITY = np.uint32(0x7F800000)
# The noise is written in LLVM's terms: numba widens integers to 64 bits, whose products take three times as long.
_WORD = ir.IntType(32)
_QUIET = np.uint16(0x7FC0)

_compiled = njit(nogil=True, fastmath={"contract"}, error_model="numpy")


# ---- single instructions


@intrinsic
def at(context: Any, address: Any, word: Any, index: Any) -> Any:
    """A pointer to element `index` of an array of words at an address."""
    pointer = types.CPointer(word.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = builder.inttoptr(arguments[0], context.get_value_type(pointer))
        return builder.gep(start, [arguments[2]])

    return pointer(types.int64, word, types.int64), generate


@intrinsic
def add_to(context: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address, atomically; its value before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", target, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def prefetch(context: Any, pointer: Any, index: Any) -> Any:
    """Begin to bring element `index` into the cache; it need not exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        instruction = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        target = builder.bitcast(builder.gep(arguments[0], [arguments[1]]), byte)
        builder.call(instruction, [target, number(0), number(3), number(1)])  # to read, keep it close, data
        return context.get_dummy_value()

    return types.void(pointer, types.int64), generate


@intrinsic
def _half_to_float(context: Any, word: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _float_to_half(context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def place(context: Any, element: Any, key: Any) -> Any:
    """Where the noise of an element comes from: its number, scattered, and the key of its tensor; uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i, key = (builder.trunc(argument, _WORD) for argument in arguments)
        return builder.add(builder.mul(i, _WORD(rounding.ELEMENT_STRIDE)), key)

    return types.uint32(types.int64, types.int64), generate


@intrinsic
def following(context: Any, place: Any) -> Any:
    """The place of the next element, by an addition in place of a product."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.add(arguments[0], _WORD(rounding.ELEMENT_STRIDE))

    return types.uint32(types.uint32), generate


@intrinsic
def _noise(context: Any, place: Any) -> Any:
    """16 random bits for a place, as `rounding` says."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x = arguments[0]
        x = builder.xor(x, builder.lshr(x, _WORD(16)))
        x = builder.mul(x, _WORD(rounding.MIX_1))
        x = builder.xor(x, builder.lshr(x, _WORD(13)))
        x = builder.mul(x, _WORD(rounding.MIX_2))
        x = builder.xor(x, builder.lshr(x, _WORD(16)))
        return builder.and_(x, _WORD(0xFFFF))

    return types.uint32(types.uint32), generate


# ---- from storage


@_compiled
def _load(number: Any) -> Any:
    return number


@_compiled
def _load_bfloat16(word: Any) -> Any:
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


LOADS: dict[torch.dtype, Any] = {
    torch.float32: _load,
    torch.float64: _load,
    torch.bfloat16: _load_bfloat16,
    torch.float16: _half_to_float,
}


# ---- to storage: element i of an array; stochastic rounding has the place of the element


@_compiled
def _store(array: Any, i: int, value: Any, place: Any) -> None:
    array[i] = value


@_compiled
def _store_half(array: Any, i: int, value: Any, place: Any) -> None:
    array[i] = _float_to_half(np.float32(value))


@_compiled
def _nearest(bits: Any) -> Any:
    """The bfloat16 nearest to an fp32, ties to even; a NaN stays one."""
    up = np.uint32(np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
    word = np.uint16(np.uint32(bits + up) >> np.uint32(16))
    return _QUIET if np.uint32(bits & np.uint32(0x7FFFFFFF)) > _INFINITY else word


@_compiled
def _store_bfloat16(array: Any, i: int, value: Any, place: Any) -> None:
    array[i] = _nearest(np.float32(value).view(np.uint32))


@_compiled
def store_stochastic(array: Any, i: int, value: Any, place: Any) -> None:
    """Round to bfloat16 as `rounding` says. A NaN from arithmetic takes no noise, which could wrap it to a zero."""
    number = np.float32(value)
    noise = np.uint32(0) if np.isnan(number) else _noise(place)
    array[i] = np.uint16(np.uint32(number.view(np.uint32) + noise) >> np.uint32(16))


STORES: dict[torch.dtype, Any] = {
    torch.float32: _store,
    torch.float64: _store,
    torch.bfloat16: _store_bfloat16,
    torch.float16: _store_half,
}
