"""3x3 convolutions of stride 1 by Winograd's algorithm: 36 multiplications for 16 pixels, where direct ones take 144.

A tile of 4x4 outputs depends on 6x6 inputs. With ``B``, ``G`` and ``A`` from Toom and Cook's scheme for polynomials,

    outputs = A^T [(G weight G^T) * (B^T inputs B)] A,

where ``*`` is element by element, and the sum over channels goes inside the brackets. So there are 36 independent
matrix products, one for each element, of as many rows as there are tiles. ``B`` and ``A`` are applied to a tile as one
matrix, their Kronecker square, because small dense products are what torch and oneDNN are good at. The 36 products are
one grouped 1x1 convolution over the tiles, whose weights oneDNN orders as it likes.

The gradient to the input is the same convolution of the output's gradient by the turned weights. The gradient to the
weights is ``G^T [sum over tiles of (B^T inputs B) * (A gradients A^T)] G``.

The scheme is free in the points at which the polynomials are evaluated. Usual are 0, 1, -1, 2, -2 and infinity; those
here (``POINTS``) halve the error. Errors of the output of 256 channels against float64, random inputs after a ReLU:

                             float32, largest    bfloat16, norm
    direct                   1.4e-6              2.9e-3
    0, +-1, +-2              5.2e-6              2.7e-2
    0, +-3/4, +-3/2          1.6e-6              1.3e-2
    0, +-2/3, +-3/2          1.4e-6              1.4e-2 (its squares are not exact in bfloat16; 1.2e-2 if they were)
    2x2 outputs: 0, +-1      0.4e-6              4.3e-3 (64 multiplications for 16 pixels)
    3x3 outputs: 0, +-1, 2   2.0e-6              1.5e-2 (44 for 16)

On 2 cores of an AMD EPYC (Zen 4), 256 channels at 100x136: 31 ms for 70 direct in float32, 16 for 35 in bfloat16. The
products take 20 and 10 of these, at the rate of direct convolutions; the two transforms 8 and 4, copies 3 and 2. What
did not pay, in the same setting or in a whole network:

* The products as ``torch.bmm`` over elements: 170 GFLOP/s for the grouped convolution's 205 in float32, as fast in
  bfloat16; the gradient to the weights is computed so, where oneDNN's grouped convolution has 55 for bfloat16's 340.
* A transform as one product over all tiles, ``[P, P] @ [P, T * C]``: 95 to 118 GFLOP/s for 155 in float32.
* Bands of 64 to 150 tiles of 256 channels (3 to 8 % slower), of 400 (the same); transforms in bands of their own that
  stay in a core's cache (2 to 9 % slower, by the number of operations); huge pages (the same).
* 6x6 outputs: 21 % fewer products and 52 % more multiplications in dense transforms. By count 5 % in all.
* The shortcut added in place, in the 1x1 convolutions between: 0 to 2 % of inference.
* Both transforms as compiled loops (numba 0.68), row by column with a third of the multiplications, bias and ReLU in
  the same pass, float32, beside the above: 256 channels at 100x136 35 to 41 ms for 33, at 200x272 138 to 152 for 132;
  128 channels at 100x136 9.3 to 10.4 for 10.3; 64 channels at 200x272 13 to 20 for 15. Alone the loops take 7 of the 38
  ms; between products both they and the small products wait for the third-level cache.
* NNPACK's (``torch._nnpack_spatial_convolution``, 6x6 outputs, float32): 125 ms for 256 channels at 200x304 where this
  takes some 155 and a direct one 374, with an error of 1.4e-5, but in NCHW: bringing the maps there and back takes 60.

Limited to AVX2 on that processor (``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2``), in float32: 256 channels at
200x304 155 ms for 323, 128 at 100x136 9.8 for 18.0, 64 at 200x272 14.6 for 18.2. bfloat16 has no instructions there.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), section 4; gradients:
their section 4.3 turned around. Points: Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd
Convolution for Deep Neural Networks" (arXiv:1803.10986), whose ``x, -x, 1/x, -1/x`` was searched for rounded values.

Legend: ``B`` images, ``I, O`` input and output channels, ``H, W`` pixels, ``T`` tiles, ``P`` the 36 elements of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 4
"""Outputs along each side of a tile."""

WINDOW = TILE + 2
"""Inputs along each side."""

ELEMENTS = WINDOW * WINDOW

POINTS = tuple(Fraction(*point) for point in ((0, 1), (3, 4), (-3, 4), (3, 2), (-3, 2)))
"""Where the polynomials are evaluated, apart from infinity."""

_Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
Product = Callable[[Tensor], Tensor]
"""Maps ``[T, P, I]`` to ``[T, P, O]``, each element by a matrix of its own."""


class _Matrices(NamedTuple):
    inputs: Tensor  # B^T (x) B^T, [P, P]
    weights: Tensor  # G (x) G, [P, 9]
    outputs: Tensor  # A^T (x) A^T, [16, P]


@cache
def _matrices(dtype: torch.dtype) -> _Matrices:
    """Compute the Kronecker squares of the three matrices, exactly, and round them once."""
    to_outputs = [[point**power for point in POINTS] + [Fraction(power == TILE - 1)] for power in range(TILE)]
    to_inputs: list[list[Fraction]] = []
    to_weights: list[list[Fraction]] = []
    for point in POINTS:
        others = [other for other in POINTS if other != point]
        to_inputs.append([*_with_roots(others), Fraction(0)])
        scale = Fraction(1)
        for other in others:
            scale *= point - other
        to_weights.append([point**power / scale for power in range(3)])
    to_inputs.append(_with_roots(POINTS))
    to_weights.append([Fraction(0), Fraction(0), Fraction(1)])
    return _Matrices(*(_kronecker_square(matrix, dtype) for matrix in (to_inputs, to_weights, to_outputs)))


def _with_roots(roots: tuple[Fraction, ...] | list[Fraction]) -> list[Fraction]:
    """Return the coefficients, constant first, of the product of ``x - root``."""
    polynomial = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *polynomial], [-root * value for value in polynomial] + [Fraction(0)]
        polynomial = [one + other for one, other in zip(shifted, scaled, strict=True)]
    return polynomial


def _kronecker_square(matrix: list[list[Fraction]], dtype: torch.dtype) -> Tensor:
    exact = torch.tensor([[float(value) for value in row] for row in matrix], dtype=torch.float64)
    return torch.kron(exact, exact).to(dtype)


def pays(x: Tensor, weight: Tensor, geometry: _Geometry, *, kept: bool) -> bool:
    """Return whether a convolution of ``x``, ``[B, I, H, W]``, is faster so, in the type of ``x``.

    A rule of shapes, type and processor, and not a measurement, so that a run is the same each time. Costs are counted
    in multiplications of the direct convolution, whose rate the 36 products reach too.

    Args:
        x: The input.
        weight: ``[O, I, kh, kw]``.
        geometry: How its kernel moves.
        kept: Whether the transformed weight is kept, and costs nothing.
    """
    moves = (weight.shape[2:], *geometry)
    if moves != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    transform = _transform_cost(x.dtype)
    if transform is None:
        return False
    (batch, num_in, height, width), num_out = x.shape, weight.shape[0]
    tiles = batch * -(-height // TILE) * -(-width // TILE)
    products = ELEMENTS * num_in * num_out
    transforms = ELEMENTS * (ELEMENTS * num_in + TILE * TILE * num_out)
    cost = tiles * (products + transform * transforms) + (0 if kept else _WEIGHT_COST * products)
    return cost < batch * height * width * 9 * num_in * num_out


# Of an element of the transformed weight, transformed and reordered, in multiplications.
_WEIGHT_COST = 100


@cache
def _transform_cost(dtype: torch.dtype) -> float | None:
    """Return how many multiplications of a direct convolution one of a transform takes as long as; None for never.

    With AMX products in bfloat16 are some eight times as fast as here and transforms are not: the direct convolution
    stays. That is not measured.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    if dtype == torch.float32:
        return 3.0
    return None if torch.cpu._is_amx_tile_supported() else 4.0


def transform_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype, *, turned: bool = False) -> Tensor:
    """Transform ``weight * scale``, ``[O, I, 3, 3]``, to ``[P * O, I, 1, 1]`` of ``dtype``.

    ``turned`` is for the gradient to the input: rows and columns turned, and inputs for outputs, ``[P * I, O, 1, 1]``.
    bfloat16 is transformed in bfloat16, which adds a twentieth to the error of the convolution.
    """
    kernels = weight.detach()
    if scale is not None:
        kernels = kernels * scale.view(-1, 1, 1, 1)
    matrix = _matrices(dtype).weights
    if turned:
        kernels, matrix = kernels.transpose(0, 1), matrix.flip(1)
    num_out, num_in = kernels.shape[:2]
    kernels = kernels.to(dtype=dtype, memory_format=torch.contiguous_format)
    return (matrix @ kernels.reshape(-1, 9).t()).view(ELEMENTS * num_out, num_in, 1, 1)


def convolve_tiles(
    x: Tensor,  # [B, I, H, W]
    product: Product,
    num_out: int,
    *,
    bias: Tensor | None = None,  # [O]
    residual: Tensor | None = None,  # [B, O, H, W]
    relu: bool = False,
) -> Tensor:
    """Compute ``relu(conv(x) + bias + residual)``, ``[B, O, H, W]``, channels-last, zeros around ``x``.

    It goes over bands of tiles that stay in the cache from the first transform to the last addition.
    """
    batch, channels, height, width = x.shape
    out = torch.empty((batch, num_out, height, width), dtype=x.dtype, memory_format=torch.channels_last)
    matrices = _matrices(x.dtype)
    bands = _Bands(x.permute(0, 2, 3, 1), pad=1, most=_band_tiles(channels, num_out, x.dtype))
    shape = (bands.most_tiles, ELEMENTS)
    windows, transformed = (torch.empty((*shape, channels), dtype=x.dtype) for _ in range(2))
    results = torch.empty((bands.most_tiles, TILE * TILE, num_out), dtype=x.dtype)
    to_inputs = matrices.inputs.expand(bands.most_tiles, -1, -1)
    to_outputs = matrices.outputs.expand(bands.most_tiles, -1, -1)
    pixels, added = out.permute(0, 2, 3, 1), None if residual is None else residual.permute(0, 2, 3, 1)
    for images, rows, view in bands:
        tiles = view.shape[0] * view.shape[1] * view.shape[2]
        windows[:tiles].view(view.shape).copy_(view)
        torch.bmm(to_inputs[:tiles], windows[:tiles], out=transformed[:tiles])
        result = torch.bmm(to_outputs[:tiles], product(transformed[:tiles]), out=results[:tiles])
        sums = result.view(*view.shape[:3], TILE, TILE, num_out)
        _lay_out(sums, pixels[images, rows], bias, None if added is None else added[images, rows], relu)
    return out


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Compute the gradient to the weight, ``[O, I, 3, 3]``, from ``[B, I, H, W]`` and ``[B, O, H, W]`` of one type."""
    matrices = _matrices(x.dtype)
    total: Tensor | None = None  # [P, O, I]
    inputs, outputs = (_Bands(map_.permute(0, 2, 3, 1), pad, _GRADIENT_TILES) for map_, pad in ((x, 1), (grad, 0)))
    for (_, _, window), (_, _, tile) in zip(inputs, outputs, strict=True):
        left = _by_element(tile, matrices.outputs.t())  # [P, T, O]
        right = _by_element(window, matrices.inputs)  # [P, T, I]
        part = torch.bmm(left.transpose(1, 2), right)
        total = part if total is None else total.float().add_(part)
    assert total is not None
    gradient = matrices.weights.t() @ total.to(x.dtype).view(ELEMENTS, -1)  # [9, O * I]
    return gradient.view(3, 3, grad.shape[1], x.shape[1]).permute(2, 3, 0, 1)


def _by_element(view: Tensor, matrix: Tensor) -> Tensor:
    """Apply a matrix to tiles ``[b, h, w, side, side, C]``; return ``[P, T, C]``."""
    elements = view.permute(3, 4, 0, 1, 2, 5).reshape(view.shape[3] ** 2, -1)  # copies
    return (matrix @ elements).view(len(matrix), -1, view.shape[5])


_GRADIENT_TILES = 1024  # of which a band's part of the weight's gradient, rounded to the inputs' type, is summed


def _band_tiles(num_in: int, num_out: int, dtype: torch.dtype) -> int:
    """Return how many tiles a band has at most.

    Few stay near to the core, but each band reads all weights and costs some ten operations: 4 MB of transformed inputs
    are best for up to 128 channels; for more, as many tiles as there are outputs.
    """
    return max(_BAND_BYTES // (ELEMENTS * num_in * dtype.itemsize), num_out)


_BAND_BYTES = 4 * 1024 * 1024


class _Bands:
    """A map ``[B, H, W, C]`` in bands of rows of tiles, or of whole images where they are small.

    It yields the images and rows of pixels of each band, and its windows as a view of a padded copy of the band that
    the next one overwrites, ``[b, h, w, side, side, C]``, ``side`` being ``TILE + 2 * pad``. Beyond the map are zeros.
    """

    def __init__(self, pixels: Tensor, pad: int, most: int) -> None:
        self._pixels, self._pad = pixels, pad
        batch, height, width, _ = pixels.shape
        self._rows, self._columns = -(-height // TILE), -(-width // TILE)
        in_image = self._rows * self._columns
        self._images_at_once = min(batch, max(1, most // in_image))
        most_rows = self._rows if in_image <= most else max(1, most // self._columns)
        num_bands = -(-self._rows // most_rows)
        self._rows_at_once = -(-self._rows // num_bands)
        self.most_tiles = self._images_at_once * self._rows_at_once * self._columns

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        batch, height, width, channels = self._pixels.shape
        pad, side = self._pad, TILE + 2 * self._pad
        shape = (self._rows_at_once * TILE + 2 * pad, self._columns * TILE + 2 * pad, channels)
        buffer = self._pixels.new_zeros((self._images_at_once, *shape))
        to_image, to_row, to_column, _ = buffer.stride()
        strides = (to_image, TILE * to_row, TILE * to_column, to_row, to_column, 1)
        for start in range(0, batch, self._images_at_once):
            images = slice(start, min(start + self._images_at_once, batch))
            count = images.stop - start
            for first in range(0, self._rows, self._rows_at_once):
                rows = min(self._rows_at_once, self._rows - first)
                top, bottom = max(first * TILE - pad, 0), min((first + rows) * TILE + pad, height)
                above = pad if first == 0 else 0
                filled = above + bottom - top
                buffer[:count, :above] = 0
                buffer[:count, above:filled, pad : pad + width] = self._pixels[images, top:bottom]
                buffer[:count, filled:] = 0
                view = buffer.as_strided((count, rows, self._columns, side, side, channels), strides)
                yield images, slice(first * TILE, min((first + rows) * TILE, height)), view


def _lay_out(tiles: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> None:
    """Write ``relu(tiles + bias + residual)``, tiles ``[b, h, w, 4, 4, O]``, to pixels ``[b, H, W, O]``.

    What lies beyond the pixels is dropped; ``tiles`` is used up. Each pass but the last is over what is in the cache.
    """
    if bias is not None and (relu or residual is not None):
        tiles += bias
        bias = None
    for rows, inside_rows, of_tiles in _parts(out.shape[1]):
        for columns, inside_columns, of_columns in _parts(out.shape[2]):
            source = tiles[:, of_tiles, of_columns, :inside_rows, :inside_columns].transpose(2, 3)
            target = out[:, rows, columns].view(source.shape)  # [b, h, inside rows, w, inside columns, O]
            added = bias if residual is None else residual[:, rows, columns].view(source.shape)
            if added is not None:
                torch.add(source, added, out=target)
                if relu:
                    target.relu_()
            elif relu:
                torch.clamp_min(source, 0, out=target)
            else:
                target.copy_(source)


def _parts(length: int) -> Iterator[tuple[slice, int, slice]]:
    """Yield the pixels of the full tiles and those of a cut one, the pixels in each tile, and the tiles."""
    full = length // TILE
    if full:
        yield slice(0, full * TILE), TILE, slice(0, full)
    if length > full * TILE:
        yield slice(full * TILE, length), length - full * TILE, slice(full, full + 1)
