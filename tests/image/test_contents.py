"""What is in the image, and what is not."""

import json
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from .containers import RESTRICTED, inspect, output_of, podman

pytestmark = [pytest.mark.image, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
PLANTED = b"password-that-was-planted-for-the-test"
MAX_GB = 3.0

# AVX-512 has wide registers, registers above 15, and mask registers.
AVX512 = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b")
GUARDED = re.compile(r"reduce_(bf16|fp16)_buffers")
"""Of DeepSpeed's shared-memory op: it runs these only where the CPU says that it has AVX-512."""

ON_THE_INSIDE = """
import json, os, pwd, shutil
def writable(folder):
    try:
        open(os.path.join(folder, "probe"), "w").close()
    except OSError:
        return False
    return True
print(json.dumps({
    "user": [os.getuid(), os.getgid(), pwd.getpwuid(os.getuid()).pw_name],
    "folder": os.getcwd(),
    "writable": [f for f in ("/", "/tmp", "/opt/venv", "/home/mpiuser", "/scratch") if writable(f)],
    "caches": [v for k, v in os.environ.items() if k.endswith(("_DIR", "HOME")) and v[:8] != "/scratch"],
    "compilers": [c for c in ("cc", "gcc", "g++", "c++", "clang", "nvcc") if shutil.which(c)],
}))
"""

LOAD_OPS = """
import sys, torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
weight = torch.nn.Parameter(torch.ones(64))
weight.grad = torch.ones(64)
DeepSpeedCPUAdam([weight], lr=0.5).step()
assert torch.allclose(weight, torch.full((64,), 0.5), atol=1e-3), weight
get_accelerator().create_op_builder("ShareMemCommBuilder").load()
ours = (module for name, module in sorted(sys.modules.items()) if name.startswith("deepspeed."))
print(*(module.__file__ for module in ours if str(module.__file__).endswith(".so")))
"""


def facts(image: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads(output_of(image, "python", "-c", ON_THE_INSIDE))
    return found


def test_it_runs_as_uid_1000_and_writes_to_scratch_alone(image: str) -> None:
    found = facts(image)
    assert found["user"] == [1000, 1000, "mpiuser"]
    assert found["folder"] == "/opt/cad-mllm"
    assert found["writable"] == ["/scratch"]
    assert found["caches"] == []


def test_there_is_no_compiler_and_the_ops_load_all_the_same(image: str) -> None:
    assert facts(image)["compilers"] == []
    loaded = output_of(image, "python", "-c", LOAD_OPS).splitlines()[-1].split()
    assert len(loaded) == 2
    assert all(path.startswith("/opt/venv/") for path in loaded)


def test_the_entry_is_the_launcher_and_says_what_it_takes(image: str) -> None:
    shown = podman("run", "--rm", *RESTRICTED, image).stdout
    assert "cad_mllm.launch" in shown
    assert "PET_NNODES" in shown
    assert "train" in output_of(image, "cad-mllm", "--help")


def test_the_tools_of_an_mpi_job_are_there(image: str) -> None:
    assert "(Open MPI) 4.1." in output_of(image, "mpirun", "--version")
    assert output_of(image, "stat", "-c", "%A", "/usr/sbin/sshd").startswith("-rwxr-xr-x")


def test_it_holds_the_configurations_and_no_tests(image: str) -> None:
    listed = output_of(image, "find", "/opt/cad-mllm", "-type", "f").split()
    wanted = [
        f"/opt/cad-mllm/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*") if path.is_file()
    ]
    assert sorted(listed) == sorted(wanted)
    package = output_of(
        image, "find", "/opt/venv/lib", "-path", "*/site-packages/cad_mllm/*", "-name", "*.py"
    )
    assert len(package.split()) == len(list((ROOT / "cad_mllm").rglob("*.py")))
    assert "import tests" not in output_of(image, "python", "-c", "import sys; print(sys.path)")


def test_it_says_where_it_comes_from(image: str) -> None:
    found = inspect(image)
    labels = found["Labels"]
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert labels["org.opencontainers.image.revision"].removesuffix("-dirty") == revision
    assert labels["org.opencontainers.image.title"] == "cad-mllm"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["cad-mllm.accelerator"] == "cpu"
    assert labels["cad-mllm.min-driver"] == ""
    assert f"CAD_MLLM_GIT_REVISION={labels['org.opencontainers.image.revision']}" in found["Config"]["Env"]
    assert found["Config"]["User"] == "1000:1000"


def test_it_is_smaller_than_3_gb(image: str) -> None:
    size = inspect(image)["Size"] / 1e9
    print(f"{size:.2f} GB")
    assert size < MAX_GB


# ------------------------------------------------------------------------------------------------- layers


def files_of_layers(archive: IO[bytes]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Name and contents, in pieces, of each file in each layer of a saved image, and of its description."""
    with tarfile.open(fileobj=archive, mode="r|") as image:
        for outer in image:
            stream = image.extractfile(outer) if outer.isreg() else None
            if stream is None:
                continue
            if not outer.name.endswith(".tar"):
                yield outer.name, iter([stream.read()])
                continue
            with tarfile.open(fileobj=stream, mode="r|") as layer:
                for member in layer:
                    inner = layer.extractfile(member) if member.isreg() else None
                    yield (
                        f"{outer.name[:12]}:/{member.name.removeprefix('./')}",
                        iter(lambda inner=inner: inner.read(1 << 20), b"") if inner else iter([]),
                    )


def secrets(archive: IO[bytes]) -> list[str]:
    """Files in a saved image that must not be there."""
    forbidden = re.compile(
        r"(^|:)/(root/\.|etc/pip\.conf|etc/ssh/ssh_host_|home/mpiuser/\.ssh/.|.*/(\.netrc|\.git)$)"
    )
    found = []
    for name, pieces in files_of_layers(archive):
        if forbidden.search(name) and not name.endswith(("/root/.bashrc", "/root/.profile")):
            found.append(name)
        tail = b""
        for piece in pieces:
            if PLANTED in tail + piece:
                found.append(f"{name}: the planted secret")
            tail = piece[-len(PLANTED) :]
    return found


def test_no_layer_keeps_a_secret(image: str, tmp_path: Path) -> None:
    """Not the pip configuration of the build, no host keys of sshd, no history with values."""
    archive = tmp_path / "image.tar"
    podman("save", "--format=docker-archive", f"--output={archive}", image, timeout=500)
    with archive.open("rb") as stream:
        names = [name for name, _ in files_of_layers(stream)]
    assert any(name.endswith("/opt/cad-mllm/configs/train/tiny.yaml") for name in names)
    assert any(name.endswith(".json") for name in names), "the description was not looked at"
    with archive.open("rb") as stream:
        assert secrets(stream) == []
    archive.unlink()


def test_a_kept_secret_would_be_found(image: str, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        f"FROM {image}\nUSER 0\nRUN echo {PLANTED.decode()} > /etc/pip.conf && touch /etc/ssh/ssh_host_key\n"
        "RUN rm /etc/pip.conf /etc/ssh/ssh_host_key\n"
    )
    runtime = shutil.which("runc")
    name = "localhost/cad-mllm:with-a-secret"
    subprocess.run(
        ["buildah", "build", "--runtime", str(runtime), "--layers", "-t", name, str(tmp_path)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    try:
        archive = tmp_path / "image.tar"
        podman("save", "--format=docker-archive", f"--output={archive}", name, timeout=500)
        with archive.open("rb") as stream:
            found = secrets(stream)
    finally:
        podman("rmi", name)
    assert {text.partition(":/")[2] for text in found if ":/" in text} == {
        "etc/pip.conf",
        "etc/pip.conf: the planted secret",
        "etc/ssh/ssh_host_key",
    }
    assert any(text.endswith(".json: the planted secret") for text in found)


def layers(image: str) -> list[str]:
    """Digests of what each layer of an image adds, the lowest first."""
    root: Any = inspect(image)["RootFS"]
    return list(root["Layers"])


def test_a_change_of_the_code_leaves_the_layers_below_it_as_they_are(image: str, tmp_path: Path) -> None:
    """Nothing is installed or compiled again, nor pulled again: its files would be others, by date at least.

    What the build prints does not tell: it works at its stages by turns, and "Using cache" may stand far from
    the step that is meant.
    """
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    with (tmp_path / "cad_mllm/__init__.py").open("a") as code:
        code.write(f"# changed at {time.time_ns()}\n")
    built = subprocess.run(
        ["make", "image-cpu", "TAG=changed"], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    log = built.stdout + built.stderr
    assert built.returncode == 0, log
    try:
        before, after = layers(image), layers("localhost/cad-mllm:changed-cpu")
    finally:
        podman("rmi", "localhost/cad-mllm:changed-cpu")
    # The code, and the start that tries it, are the last two.
    assert len(after) == len(before)
    assert after[:-2] == before[:-2], log
    assert after[-2] != before[-2]


# ------------------------------------------------------------------------------------------------ AVX-512


def avx512_functions(library: Path) -> set[str]:
    """The functions of a library that hold AVX-512 instructions."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found, function = set(), ""
    assert "<" in listing
    for line in listing.splitlines():
        if heading := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = heading[1]
        elif AVX512.search(line):
            found.add(function)
    return found


def test_the_ops_run_on_cpus_without_avx512(image: str, tmp_path: Path) -> None:
    listed = output_of(image, "find", "/opt/venv/lib", "-path", "*/deepspeed/ops/*", "-name", "*.so").split()
    container = podman("create", image).stdout.strip()
    try:
        for path in listed:
            podman("cp", f"{container}:{path}", str(tmp_path))
    finally:
        podman("rm", container)
    found = {
        library.name.partition(".")[0]: avx512_functions(library) for library in sorted(tmp_path.iterdir())
    }
    assert found.keys() == {"cpu_adam_op", "deepspeed_shm_comm_op"}
    assert found["cpu_adam_op"] == set()
    assert all(GUARDED.match(function) for function in found["deepspeed_shm_comm_op"])


@pytest.mark.parametrize("flags", ["-mavx512f", "-march=x86-64-v4"])
def test_avx512_would_be_found(flags: str, tmp_path: Path) -> None:
    source = tmp_path / "add.c"
    source.write_text("void add(float *a, float *b) { for (int i = 0; i < 1024; i++) a[i] += b[i]; }\n")
    command = ["gcc", "-O3", "-shared", "-fPIC", "-mprefer-vector-width=512"]
    library = tmp_path / "add.so"
    subprocess.run([*command, flags, str(source), "-o", str(library)], check=True)
    assert avx512_functions(library) == {"add"}
    subprocess.run([*command, "-march=x86-64-v3", str(source), "-o", str(library)], check=True)
    assert avx512_functions(library) == set()
