"""Files that describe a shape, whatever they hold: a shape comes out, or a CadError that says why not."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import trimesh

from cad_mllm.cad import omnicad, solid
from cad_mllm.cad.codec import encode
from cad_mllm.cad.grammar import LEVELS
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.shapefile import parse_text, program_text, read_shape
from cad_mllm.errors import CadError
from tests.cad.shapes import CUBE, DRILLED

PLATE = "NZ0,0,127,254,254E60P0,0H254V254H0"
HEADER = (
    "ply\nformat {}\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\n"
    "element face {}\nproperty list uchar int vertex_indices\nend_header\n"
)
POINTS_PLY = "\n".join([*HEADER.format("ascii 1.0", 1, 0).splitlines()[:6], "end_header", "0 0 0", ""])
ASCII_PLY = HEADER.format("ascii 1.0", 3, 1) + "0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_program_is_the_same_shape_from_every_kind_of_file(tmp_path: Path) -> None:
    standard = normalise(DRILLED).program
    built = solid.build(standard)
    built.write_step(tmp_path / "a.step")
    mesh = built.mesh()
    exported = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    for kind in ("stl", "ply", "obj"):
        exported.export(tmp_path / f"a.{kind}")
    written(tmp_path / "a.json", json.dumps(omnicad.to_json(DRILLED)))
    written(tmp_path / "a.txt", encode(standard) + "\n")
    for path in sorted(tmp_path.iterdir()):
        shape = read_shape(path)
        assert shape.mesh.volume == pytest.approx(mesh.volume, rel=1e-2), path  # 8 bits round the hole
        assert len(np.unique(shape.mesh.vertices, axis=0)) == len(shape.mesh.vertices), path
        assert (shape.text is not None) == (path.suffix in (".json", ".txt")), path


@pytest.mark.parametrize("bits", sorted(LEVELS))
def test_a_text_is_read_with_the_bits_that_it_was_written_with(bits: int) -> None:
    text = encode(normalise(DRILLED).program, bits=bits)
    assert encode(parse_text(text), bits=bits) == text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", "", "empty"),
        ("a.txt", "\n", "wrong at|breaks off"),
        ("a.txt", PLATE[:20], "breaks off"),
        ("a.txt", "I am sorry, I cannot do that", "wrong at character 0"),
        ("a.txt", b"\xff\xfe\x00N", "wrong at character 0"),
        ("a.txt", "N" * 500_000, "at most"),
        ("a.txt", PLATE.replace("254", "9" * 5000, 1), "wrong at"),
        ("a.json", "", "empty"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[" * 100_000, "nested too deep"),
        ("a.json", '{"a":' * 100_000, "nested too deep"),
        ("a.json", "[1]", "list"),
        ("a.json", '{"entities": {}, "sequence": []}', "builds nothing"),
        ("a.json", '{"entities": 1' + "0" * 5000 + "}", "not valid JSON"),
        ("a.step", "ISO-10303-21;\nnonsense", "STEP|no solid"),
        ("a.step", b"\0" * 1000, "STEP|no solid"),
        ("a.stl", "solid x\nendsolid x\n", "no faces"),
        ("a.stl", b"\0" * 80 + struct.pack("<I", 2**31), "no faces|STL"),
        ("a.stl", b"x" * 83, "STL|no faces"),
        ("a.ply", "not a ply", "PLY"),
        ("a.ply", ASCII_PLY[:-12], "PLY|no faces"),
        ("a.ply", ASCII_PLY.replace("3 0 1 2", "3 0 1 9"), "names vertex 9 of 3"),
        ("a.ply", ASCII_PLY.replace("1 0 0", "nan 0 0"), "not finite"),
        ("a.ply", ASCII_PLY.replace("1 0 0", "1e30 0 0"), "beyond"),
        ("a.ply", HEADER.format("ascii 1.0", 3, 0) + "0 0 0\n1 0 0\n0 1 0\n", "no faces"),
        ("a.ply", HEADER.format("binary_little_endian 1.0", 3 * 10**9, 10**9), "PLY"),
        ("a.ply", POINTS_PLY, "no faces"),
        ("a.obj", "v 0 0 0\nv 1 0 0\n", "no faces|OBJ"),
        ("a.obj", "f 1 2 3\n", "no faces|OBJ|names vertex"),
        ("a.obj", "v 0 0 0\nv 1 0 inf\nv 0 1 0\nf 1 2 3\n", "not finite"),
        ("a.obj", "PK\x03\x04" + "\0" * 100, "no faces|OBJ"),
    ],
)  # fmt: skip
def test_what_is_no_shape_says_why(name: str, content: str | bytes, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(CadError, match=reason) as caught:
        read_shape(path)
    assert len(str(caught.value)) < 500
    assert str(tmp_path) not in str(caught.value)


def test_an_obj_file_opens_no_other_file(tmp_path: Path) -> None:
    """A material library may have any path, and textures of it any size."""
    secret = written(tmp_path / "secret.mtl", "newmtl a\nmap_Kd secret.png\n")
    secret.chmod(0)
    body = f"mtllib {secret}\nmtllib ../../../etc/passwd\nusemtl a\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
    assert len(read_shape(written(tmp_path / "a.obj", body)).mesh.faces) == 1


def test_unused_vertices_may_be_anything(tmp_path: Path) -> None:
    text = ASCII_PLY.replace("vertex 3", "vertex 4").replace("3 0 1 2", "nan nan nan\n3 0 1 2")
    assert len(read_shape(written(tmp_path / "a.ply", text)).mesh.vertices) == 3


def test_a_file_that_is_gone_or_too_large_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CadError, match="cannot be read: No such file"):
        read_shape(tmp_path / "a.txt")
    monkeypatch.setattr("cad_mllm.cad.shapefile.MAX_FILE_BYTES", 10)
    with pytest.raises(CadError, match="35 bytes are more than the 10"):
        read_shape(written(tmp_path / "a.stl", "x" * 35))


def test_programs_alone_have_a_text(tmp_path: Path) -> None:
    assert program_text(PLATE) == program_text(written(tmp_path / "a.txt", PLATE))
    with pytest.raises(CadError, match="no program"):
        program_text(written(tmp_path / "a.stl", "x"))
    assert program_text(written(tmp_path / "c.json", json.dumps(omnicad.to_json(CUBE)))).startswith("NZ")
