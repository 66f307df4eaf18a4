"""The online input transform in ONNX: scale, shift, and rotations as small dense products.

    x' = (x * inverse_scale - shift) R

A block product is Reshape -> MatMul with one [b, b] constant -> Reshape, which the runtime computes as a single matrix
product over all tokens and blocks; the stride permutation between two of them is a Transpose.
"""

from __future__ import annotations

import hashlib
import itertools
import json

import numpy as np
import onnx_ir as ir

from ditq.export.lowering.writer import Writer
from ditq.nn import InputTransform
from ditq.numerics.rotation import BlockStep, PermuteStep, Rotation


def fingerprint(transform: InputTransform | None) -> str:
    """Equal for transforms that compute the same; layers with one input then share it."""
    if transform is None:
        return ""
    digest = hashlib.sha256()
    for vector in (transform.inverse_scale, transform.shift):
        digest.update(b"-" if vector is None else vector.numpy().tobytes())
    for start, stop, rotation in transform.rotations:
        spec, tensors = rotation.spec()
        digest.update(json.dumps([start, stop, spec], sort_keys=True).encode())
        for tensor in tensors.values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def apply_transform(writer: Writer, x: ir.Value, rank: int, width: int, transform: InputTransform | None) -> ir.Value:
    """x [..., width] of that rank -> x'."""
    if transform is None:
        return x
    pieces = _pieces(writer, x, width, transform)
    ends = itertools.accumulate(size for _, size in pieces)
    done = []
    for (whole, size), stop in zip(pieces, ends, strict=True):
        piece, start = whole, stop - size
        if transform.inverse_scale is not None:
            factors = transform.inverse_scale[start:stop].numpy()
            piece = writer.op("Mul", piece, writer.constant(factors, name="inverse_scale"), name="scaled")
        if transform.shift is not None:
            offsets = transform.shift[start:stop].numpy()
            piece = writer.op("Sub", piece, writer.constant(offsets, name="shift"), name="centred")
        for first, last, rotation in transform.rotations:
            if (first, last) == (start, stop):
                piece = apply_rotation(writer, piece, rank, rotation)
        done.append(piece)
    return done[0] if len(done) == 1 else writer.op("Concat", *done, name="joined", axis=-1)


def _pieces(writer: Writer, x: ir.Value, width: int, transform: InputTransform) -> list[tuple[ir.Value, int]]:
    """x cut along its last axis wherever a rotation starts or ends, with the widths; in one piece without a cut."""
    cuts = sorted({0, width, *(cut for start, stop, _ in transform.rotations for cut in (start, stop))})
    widths = [stop - start for start, stop in itertools.pairwise(cuts)]
    if len(widths) == 1:
        return [(x, width)]
    whole = joined_from(x)
    if (
        whole and [None if value.shape is None else value.shape[-1] for value in whole] == widths
    ):  # the joints are the cuts
        return list(zip(whole, widths, strict=True))
    sizes = writer.constant(widths, np.int64, name="widths")
    return list(zip(writer.ops("Split", len(widths), x, sizes, name="piece", axis=-1), widths, strict=True))


def joined_from(x: ir.Value) -> list[ir.Value]:
    """What x was joined from along its last axis, as in FLUX's single blocks (attention, feed-forward); empty if it was not."""
    node = x.producer()
    if node is None or node.op_type != "Concat" or x.shape is None:
        return []
    if node.attributes["axis"].as_int() not in (-1, len(x.shape) - 1):
        return []
    return [value for value in node.inputs if value is not None]


def apply_rotation(writer: Writer, x: ir.Value, rank: int, rotation: Rotation) -> ir.Value:
    """x [..., n] of that rank -> x R."""
    leading = [0] * (rank - 1)  # in a Reshape, 0 keeps the dimension
    blocks: tuple[int, int] | None = None  # x is now [..., blocks, b]; None: [..., n]

    flat_shape = writer.constant([*leading, rotation.size], np.int64, name="shape")

    def shaped(value: ir.Value, wanted: tuple[int, int] | None) -> ir.Value:
        if wanted == blocks:
            return value
        shape = [*leading, *(wanted or (rotation.size,))]
        return writer.op("Reshape", value, writer.constant(shape, np.int64, name="shape"), name="rotation.reshape")

    for step in rotation.steps:
        if isinstance(step, BlockStep):
            b = step.matrix.shape[0]
            wanted = None if b == rotation.size else (rotation.size // b, b)
            x, blocks = shaped(x, wanted), wanted
            x = writer.op("MatMul", x, writer.constant(step.matrix.float().numpy(), name="rotation"), name="rotation")
        elif not isinstance(step, PermuteStep):
            raise TypeError(f"{type(step).__name__} is folded offline and has no online form")
        elif step.stride is not None:
            x = shaped(x, step.stride)
            order = [*range(rank - 1), rank, rank - 1]
            x = writer.op("Transpose", x, name="rotation.transpose", perm=order)
            # Flattened at once: a MatMul right behind a Transpose would be fused into many small products, one a token.
            blocks = None
            x = writer.op("Reshape", x, flat_shape, name="rotation.flat")
        else:
            x, blocks = shaped(x, None), None
            index = writer.constant(step.index.numpy(), np.int64, name="permutation")
            x = writer.op("Gather", x, index, name="rotation.permute", axis=-1)
    return shaped(x, None)
