"""Small meshes whose figures can be worked out by hand."""

import numpy as np
import trimesh

from cad_mllm.cad.mesh import FloatArray, Mesh


def of_trimesh(mesh: trimesh.Trimesh) -> Mesh:
    return Mesh(np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces, dtype=np.int64))


def cube(at: tuple[float, float, float] = (0.0, 0.0, 0.0), side: float = 1.0) -> Mesh:
    """12 faces, from `at` upwards; corner i has the bits of i as its coordinates."""
    corners = np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)], dtype=np.float64)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))]
    return Mesh(corners * side + np.asarray(at), np.array(faces, dtype=np.int64))


def open_box() -> Mesh:
    """A unit cube without its face at z = 1."""
    mesh = cube()
    return Mesh(mesh.vertices, mesh.faces[:-2])


def joined(*meshes: Mesh) -> Mesh:
    """The meshes side by side in one, sharing no vertex."""
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)]),
    )


def crossed_prism() -> Mesh:
    """The four walls over a square whose sides are walked crosswise: two walls cross in their middle."""
    base = [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0)]
    vertices = np.array([(x, y, z) for z in (0.0, 1.0) for x, y in base])
    walls = [(i, (i + 1) % 4, (i + 1) % 4 + 4, i + 4) for i in range(4)]
    return Mesh(vertices, np.array([f for a, b, c, d in walls for f in ((a, b, c), (a, c, d))]))


def split(mesh: Mesh) -> Mesh:
    """The same faces, each with three vertices of its own, as in an STL file."""
    return Mesh(mesh.vertices[mesh.faces].reshape(-1, 3), np.arange(3 * len(mesh.faces)).reshape(-1, 3))


def moved(mesh: Mesh, matrix: FloatArray, shift: FloatArray) -> Mesh:
    return Mesh(mesh.vertices @ matrix.T + shift, mesh.faces)


def shuffled(mesh: Mesh, seed: int = 0) -> Mesh:
    """Other numbers for the vertices, another order of the faces, another first corner for each."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(mesh.vertices))
    faces = np.argsort(order)[mesh.faces][rng.permutation(len(mesh.faces))]
    return Mesh(mesh.vertices[order], np.stack([np.roll(face, rng.integers(3)) for face in faces]))


def rotation(seed: int = 0) -> FloatArray:
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))
