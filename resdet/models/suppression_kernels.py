"""Suppression of rows of boxes on a CUDA device, in two kernels of Triton, without a wait.

Legend: ``R`` rows of ``N`` boxes; ``W`` words of 32 bits, a power of two, that hold a bit for each box of a row.

The first kernel compares each box with the earlier ones of its row and packs the answers into bits ``[R, N, W]``. The
second goes through a row in order, 32 boxes at a time: what is kept of the earlier boxes is a vector of words in
registers, so that one step is a product of bits with the rows of the 32 and a loop over the bits among themselves.
The arithmetic is that of torchvision's kernel for a CPU to the last bit: no multiplication is fused with an addition,
the division is rounded as IEEE 754 asks. Features of Triton 3.2, which is torch 2.6's, suffice.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64  # boxes of a program of the first kernel
_CHUNK = 8  # words of earlier boxes that it compares them with
_LARGEST_TILE = 16384  # words that the second kernel loads at once: 64 registers of each of 256 threads


def suppress_on_cuda(boxes: Tensor, used: Tensor, iou_threshold: float, groups: Tensor | None) -> Tensor:
    """Suppress as ``resdet.models.suppression.suppress_rows`` does, on the device that is current.

    Boxes are float32 ``[R, N, 4]``, ``used`` bool ``[R, N]``, ``groups`` int64 ``[R, N]``. Returns bool ``[R, N]``.
    Beside the result it takes ``R * N * W * 4`` bytes while it runs: 512 KB for a row of 2,000 boxes.
    """
    rows, size = used.shape
    kept = torch.empty_like(used, memory_format=torch.contiguous_format)
    if not kept.numel():
        return kept
    words = triton.next_power_of_2(triton.cdiv(size, 32))
    # Kernels leave out what no used box asks for, so that not all of it is written.
    bits = torch.empty(rows, size, words, dtype=torch.int32, device=boxes.device)
    used = used.contiguous().view(torch.uint8)
    programs = rows * triton.cdiv(size, _BLOCK) * triton.cdiv(size, 32 * _CHUNK)
    compare_kernel[(programs,)](
        boxes.contiguous(),
        used,
        used if groups is None else groups.contiguous(),
        bits,
        size,
        rounded_down(iou_threshold),
        WORDS=words,
        GROUPED=groups is not None,
        BLOCK=_BLOCK,
        CHUNK=_CHUNK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    keep_kernel[(rows,)](
        bits,
        used,
        kept.view(torch.uint8),
        size,
        WORDS=words,
        PART=min(32, max(1, _LARGEST_TILE // words)),
        num_warps=min(8, max(1, words // 8)),  # up to 2,048 boxes each thread has one word of each of the 8 rows
    )
    return kept


def rounded_down(value: float) -> float:
    """Return the largest number of float32 that is not above ``value``.

    A float32 is above it exactly where it is above ``value``: torchvision compares in float64 on a CPU.
    """
    nearest = np.float32(value)
    return float(nearest if float(nearest) <= value else np.nextafter(nearest, np.float32(-np.inf)))


@triton.jit
def sides(box: tl.tensor, used: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Load the sides of the boxes at the addresses ``box``; zeros of those not used."""
    left = tl.load(box, mask=used, other=0.0)
    top = tl.load(box + 1, mask=used, other=0.0)
    right = tl.load(box + 2, mask=used, other=0.0)
    bottom = tl.load(box + 3, mask=used, other=0.0)
    return left, top, right, bottom


@triton.jit(do_not_specialize=["size"])
def compare_kernel(
    boxes: tl.tensor,  # float32 [R, N, 4]
    used: tl.tensor,  # uint8 [R, N]
    groups: tl.tensor,  # int64 [R, N] if GROUPED
    bits: tl.tensor,  # int32 [R, N, WORDS]: of a box, those of the earlier boxes that would suppress it
    size: tl.tensor,  # N
    threshold: tl.tensor,
    WORDS: tl.constexpr,  # noqa: N803
    GROUPED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
) -> None:
    """Compare a block of boxes with up to ``32 * CHUNK`` earlier ones of its row."""
    chunks = tl.cdiv(size, 32 * CHUNK)
    blocks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0)
    first_word = (program % chunks) * CHUNK
    block = (program // chunks) % blocks
    start = (program // (chunks * blocks)).to(tl.int64) * size  # of the row
    lanes = tl.arange(0, 32)
    own = block * BLOCK + tl.arange(0, BLOCK)
    own_used = tl.load(used + start + own, mask=own < size, other=0) != 0
    if tl.max(own_used.to(tl.int32), axis=0) > 0:
        left, top, right, bottom = sides(boxes + (start + own) * 4, own_used)
        area = (right - left) * (bottom - top)
        last_word = tl.minimum(tl.minimum(first_word + CHUNK, tl.cdiv(size, 32)), tl.cdiv((block + 1) * BLOCK, 32))
        for word in range(first_word, last_word):
            other = word * 32 + lanes
            other_used = tl.load(used + start + other, mask=other < size, other=0) != 0
            other_left, other_top, other_right, other_bottom = sides(boxes + (start + other) * 4, other_used)
            other_area = (other_right - other_left) * (other_bottom - other_top)
            width = tl.minimum(right[:, None], other_right[None, :]) - tl.maximum(left[:, None], other_left[None, :])
            height = tl.minimum(bottom[:, None], other_bottom[None, :]) - tl.maximum(top[:, None], other_top[None, :])
            shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)  # [BLOCK, 32]
            iou = tl.div_rn(shared, other_area[None, :] + area[:, None] - shared)
            suppresses = (iou > threshold) & other_used[None, :] & (other[None, :] < own[:, None])
            if GROUPED:
                own_group = tl.load(groups + start + own, mask=own_used, other=0)
                other_group = tl.load(groups + start + other, mask=other_used, other=0)
                suppresses = suppresses & (other_group[None, :] == own_group[:, None])
            packed = tl.sum(suppresses.to(tl.int32) << lanes[None, :], axis=1)  # [BLOCK]
            tl.store(bits + (start + own) * WORDS + word, packed, mask=own_used)


@triton.jit(do_not_specialize=["size"])
def keep_kernel(
    bits: tl.tensor,  # int32 [R, N, WORDS]
    used: tl.tensor,  # uint8 [R, N]
    kept: tl.tensor,  # uint8 [R, N]
    size: tl.tensor,  # N
    WORDS: tl.constexpr,  # noqa: N803
    PART: tl.constexpr,  # noqa: N803
) -> None:
    """Go through a row in order and keep what no kept box suppresses, 32 boxes at a time.

    Among the 32, what is kept follows from what is kept of the earlier ones: asked again and again, at least one more
    answer is final each time, and when none changes all are. Mostly a few times suffice.
    """
    start = tl.program_id(0).to(tl.int64) * size
    lanes = tl.arange(0, 32)
    words = tl.arange(0, WORDS)
    kept_words = tl.zeros([WORDS], tl.int32)
    own_used = tl.load(used + start + lanes, mask=lanes < size, other=0).to(tl.int32)
    for word in range(0, tl.cdiv(size, 32)):
        own = word * 32 + lanes
        next_used = tl.load(used + start + own + 32, mask=own + 32 < size, other=0).to(tl.int32)  # while this one runs
        keep = tl.zeros([], tl.int32)
        if tl.max(own_used, axis=0) > 0:
            among = tl.load(bits + (start + own) * WORDS + word, mask=own_used != 0, other=0)  # [32]
            free = tl.zeros([], tl.int32)  # which of the 32 are used and not suppressed by earlier words
            for first in tl.static_range(0, 32, PART):
                part_lanes = first + tl.arange(0, PART)
                part = word * 32 + part_lanes
                part_used = tl.load(used + start + part, mask=part < size, other=0).to(tl.int32)
                tile = tl.load(
                    bits + (start + part)[:, None] * WORDS + words[None, :],
                    mask=(part_used != 0)[:, None] & (words[None, :] < word),
                    other=0,
                )
                hits = tl.max(((tile & kept_words[None, :]) != 0).to(tl.int32), axis=1)  # [PART]
                free += tl.sum((part_used & (1 - hits)) << part_lanes, axis=0)
            keep = free
            before = ~free
            while keep != before:
                before = keep
                keep = tl.sum(tl.where((among & before) == 0, (free >> lanes) & 1, 0) << lanes, axis=0)
            kept_words = tl.where(words == word, keep, kept_words)
        tl.store(kept + start + own, ((keep >> lanes) & 1).to(tl.uint8), mask=own < size)
        own_used = next_used
