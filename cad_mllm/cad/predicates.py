"""On which side a point lies: the sign of a determinant, exact for every input, for many points at once.

A floating-point result is taken where its error bound proves the sign; the rest is computed in integers of
Python, which have no rounding. Bounds: J. R. Shewchuk, Adaptive Precision Floating-Point Arithmetic and Fast
Robust Geometric Predicates, Discrete & Computational Geometry 18 (1997), stage A of Orient2D and Orient3D.

Shape suffixes: N tests, C coordinates.
"""

from functools import reduce

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
SignArray = NDArray[np.int8]
"""(N,) of -1, 0, 1."""

_EPSILON = 2.0**-53
_BOUND_2D = (3 + 16 * _EPSILON) * _EPSILON
_BOUND_3D = (7 + 56 * _EPSILON) * _EPSILON
_DIGITS = 53
_TINY = 2.0**-260
"""Smaller coordinates, in sizes of the model, are zero: products of three differences must not underflow."""

_shift = np.frompyfunc(lambda number, by: int(number) << int(by), 2, 1)
_sign = np.frompyfunc(lambda number: (number > 0) - (number < 0), 1, 1)


def prepared(points: FloatArray) -> FloatArray:
    """Points scaled by a power of two (exact) to at most 1, which the predicates can take.

    Every sign among them is that of the points as they were. They must be finite.
    """
    largest = float(np.abs(points).max(initial=0.0))
    if largest == 0.0:
        return np.zeros_like(points)
    scaled = np.ldexp(points, -int(np.frexp(largest)[1]))
    return np.where(np.abs(scaled) < _TINY, 0.0, scaled)


def orient2d(a_NC: FloatArray, b_NC: FloatArray, c_NC: FloatArray) -> SignArray:
    """+1 where a, b, c (each (N, 2)) turn counter-clockwise, -1 clockwise, 0 where they are on one line."""
    (ux, uy), (vx, vy) = (b_NC - a_NC).T, (c_NC - a_NC).T
    left, right = ux * vy, uy * vx
    return _settled(left - right, _BOUND_2D * (np.abs(left) + np.abs(right)), (a_NC, b_NC, c_NC))


def orient3d(a_NC: FloatArray, b_NC: FloatArray, c_NC: FloatArray, d_NC: FloatArray) -> SignArray:
    """+1 where d is on the side of the plane a, b, c (each (N, 3)) to which (b - a) x (c - a) points.

    -1 on the other side, 0 where the four points lie in one plane.
    """
    (ux, uy, uz), (vx, vy, vz), (wx, wy, wz) = (b_NC - a_NC).T, (c_NC - a_NC).T, (d_NC - a_NC).T
    vw, wv, wu, uw, uv, vu = vx * wy, vy * wx, wx * uy, wy * ux, ux * vy, uy * vx
    determinant = uz * (vw - wv) + vz * (wu - uw) + wz * (uv - vu)
    permanent = (
        np.abs(uz) * (np.abs(vw) + np.abs(wv))
        + np.abs(vz) * (np.abs(wu) + np.abs(uw))
        + np.abs(wz) * (np.abs(uv) + np.abs(vu))
    )
    return _settled(determinant, _BOUND_3D * permanent, (a_NC, b_NC, c_NC, d_NC))


def _settled(value_N: FloatArray, bound_N: FloatArray, points: tuple[FloatArray, ...]) -> SignArray:
    """Signs of the values; computed again without rounding where they lie within their bounds.

    A bound of zero needs no second look: then every product has a factor that is zero.
    """
    sign_N = np.sign(value_N).astype(np.int8)
    (open_N,) = np.nonzero((np.abs(value_N) <= bound_N) & (bound_N > 0))
    if len(open_N):
        sign_N[open_N] = _exact([point[open_N] for point in points])
    return sign_N


def _exact(points: list[FloatArray]) -> SignArray:
    """Sign of the determinant of the points' differences to the first one, by integers."""
    mantissa, exponent = np.frexp(np.stack(points))
    integers = np.ldexp(mantissa, _DIGITS).astype(np.int64)
    lowest = exponent[integers != 0].min(initial=0)
    origin, *others = _shift(integers, np.where(integers != 0, exponent - lowest, 0))
    rows = [(point - origin).T for point in others]
    if len(rows) == 2:
        (ux, uy), (vx, vy) = rows
        determinant = ux * vy - uy * vx
    else:
        (ux, uy, uz), (vx, vy, vz), (wx, wy, wz) = rows
        determinant = uz * (vx * wy - vy * wx) + vz * (wx * uy - wy * ux) + wz * (ux * vy - uy * vx)
    signs: SignArray = _sign(determinant).astype(np.int8)
    return signs


def collinear(a_NC: FloatArray, b_NC: FloatArray, c_NC: FloatArray) -> NDArray[np.bool_]:
    """Whether the points of each triangle (each (N, 3)) lie on one line, or are fewer than three, (N,)."""
    flat = (orient2d(a_NC[:, axes], b_NC[:, axes], c_NC[:, axes]) == 0 for axes in ([0, 1], [1, 2], [2, 0]))
    return reduce(np.logical_and, flat)
