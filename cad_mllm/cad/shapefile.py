"""Any file that describes a shape, as a mesh: programs (JSON, command text), STEP, and triangle meshes.

What is in the files comes from outside and may be anything: whatever is no shape raises CadError. A kernel
can still hang on it, or swallow all memory: files that are not known to be good are read in a worker process
(`cad_mllm.cad.worker`). Without OpenCASCADE programs are read as polygon models, and STEP files not at all.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh

from cad_mllm.cad import codec, omnicad
from cad_mllm.cad.grammar import LEVELS
from cad_mllm.cad.jsonfile import loads
from cad_mllm.cad.mesh import LARGEST, Mesh
from cad_mllm.cad.metrics import weld
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.program import CadProgram
from cad_mllm.cad.program_metrics import canonical
from cad_mllm.cad.surface import Kernel, installed_kernel, surface_of
from cad_mllm.errors import CadError

SUFFIXES = (".json", ".txt", ".step", ".stp", ".stl", ".ply", ".obj")
"""What is read; of several files with one name the first in this order, which says most."""
MAX_FILE_BYTES = 200_000_000

POLYGON_SEGMENTS = 64
"""Facets of a full circle where programs are polygon models: off by 6e-4 of the longest side at most, the
meshes of OpenCASCADE by 1e-3. With more, the search for intersections takes most of the time."""

_MESHES = (".stl", ".ply", ".obj")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a file describes."""

    mesh: Mesh
    """Welded, finite, with at least one face. Of programs in [-1, 1]^3, else in the unit of the file."""
    text: str | None
    """Canonical command text; None for what is no program, or too fine for the grid of that text."""


def read_shape(given: Path | bytes) -> Shape:
    """Read one file by its suffix, or Omni-CAD JSON.

    Raises CadError, without the file's name, for whatever is no shape.
    """
    if isinstance(given, bytes):
        return _shape_of(normalise(omnicad.parse(loads(given))).program)
    path = given
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CadError(f"{size:,} bytes are more than the {MAX_FILE_BYTES:,} that are read")
        if size == 0:
            raise CadError("the file is empty")
        suffix = path.suffix.lower()
        if suffix in _MESHES:
            return Shape(mesh=_read_mesh(path, suffix), text=None)
        if suffix in (".step", ".stp"):
            return Shape(mesh=weld(_read_step(path)), text=None)
        program = _read_program(path, suffix)
    except OSError as error:
        raise CadError(f"cannot be read: {error.strerror or error}") from error
    return _shape_of(program)


def _shape_of(program: CadProgram) -> Shape:
    mesh = surface_of(program, installed_kernel(), POLYGON_SEGMENTS).mesh()
    return Shape(mesh=weld(mesh), text=_canonical_or_none(program))


def program_text(given: Path | str) -> str:
    """The canonical text of a program file (JSON, command text), or of a command text.

    Raises CadError if it is none.
    """
    try:
        if isinstance(given, str):
            return canonical(parse_text(given))
        suffix = given.suffix.lower()
        if suffix not in (".json", ".txt"):
            raise CadError("a mesh or STEP file holds no program")
        return canonical(_read_program(given, suffix))
    except OSError as error:
        raise CadError(f"cannot be read: {error.strerror or error}") from error


def parse_text(text: str) -> CadProgram:
    """The program of a command text of any number of bits: of the fewest whose grid holds its numbers."""
    # Of a number of thousands of digits the first ones say enough.
    largest = max((int(number[:9]) for number in re.findall("[0-9]+", text)), default=0)
    bits = next((bits for bits, sizes in sorted(LEVELS.items()) if largest <= sizes.grid), max(LEVELS))
    return codec.decode(text, bits=bits)


def _read_program(path: Path, suffix: str) -> CadProgram:
    """In [-1, 1]^3."""
    if suffix == ".json":
        try:
            program = omnicad.read(path)
        except CadError as error:
            raise CadError(str(error).removeprefix(f"{path}: ")) from error
    else:
        assert suffix == ".txt", suffix
        with path.open("rb") as file:
            data = file.read(codec.MAX_TEXT + 100)  # more is refused by its length
        program = parse_text(data.decode("utf-8", errors="replace").strip())
    return normalise(program).program


def _canonical_or_none(program: CadProgram) -> str | None:
    try:
        return canonical(program)
    except CadError:  # the solid is there all the same
        return None


def _read_step(path: Path) -> Mesh:
    if installed_kernel() is Kernel.POLYGONS:
        raise CadError("a STEP file can be read with OpenCASCADE alone, which is not installed")
    from cad_mllm.cad import solid  # imports OpenCASCADE

    return solid.read_step(path).mesh()


def _read_mesh(path: Path, suffix: str) -> Mesh:
    try:
        # From memory and without a resolver: an OBJ or PLY file names further files, which are not opened.
        loaded = trimesh.load_mesh(
            io.BytesIO(path.read_bytes()), file_type=suffix[1:], process=False, skip_materials=True
        )
        vertices = np.asarray(loaded.vertices, dtype=np.float64)
        faces = np.asarray(getattr(loaded, "faces", ()), dtype=np.int64)  # none: a cloud of points
    except MemoryError:
        raise
    except OSError:
        raise
    except Exception as error:  # its readers raise many types on broken bytes
        raise CadError(f"is not a {suffix[1:].upper()} file that can be read: {error}") from error
    if not len(faces):
        raise CadError("the mesh has no faces")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise CadError(f"a face names vertex {faces.max()} of {len(vertices)}")
    vertices_used = vertices[np.unique(faces)]
    if not np.isfinite(vertices_used).all():
        raise CadError("the mesh has vertices that are not finite (NaN or infinite)")
    if np.abs(vertices_used).max() > LARGEST:
        raise CadError(f"the mesh has a coordinate beyond {LARGEST:g}")
    return weld(Mesh(vertices, faces))
