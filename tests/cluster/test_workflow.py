"""The CI workflow of the smoke job: every command in it exists, and it may do no more than it must."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cad_mllm import cli
from cad_mllm.commands.cluster import SmokeArguments
from cad_mllm.settings import flag_names

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / ".github/workflows/gpu-smoke.yaml"
WORKFLOW: dict[str, Any] = yaml.load(FILE.read_text(), Loader=yaml.BaseLoader)  # `on` stays a word
JOBS: dict[str, Any] = WORKFLOW["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]
COMMANDS = [
    shlex.split(line)
    for step in STEPS
    for line in step.get("run", "").splitlines()
    if line.strip() and "|" not in line
]


def commands_of(program: str) -> list[list[str]]:
    found = [words for words in COMMANDS if words[0] == program]
    assert found, f"the workflow runs no {program}"
    return found


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {words[1] for words in commands_of("make")}
    assert used == {"image", "push", "k8s-image"}
    assert used <= targets


def test_every_make_variable_is_one_that_the_makefile_knows() -> None:
    known = set(re.findall(r"^([A-Z_]+) *\?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {word.partition("=")[0] for words in commands_of("make") for word in words[2:]}
    assert used == {"IMAGE", "TAG"} and used <= known


def test_the_smoke_command_parses_and_its_overlay_is_there() -> None:
    ((_, command, *arguments),) = commands_of("cad-mllm")
    assert command in cli.COMMANDS
    flags = [word for word in arguments if word.startswith("--")]
    assert set(flags) <= set(flag_names(SmokeArguments))
    overlay = ROOT / arguments[arguments.index("--overlay") + 1]
    assert (overlay / "kustomization.yaml").is_file()


def test_the_job_may_take_less_time_than_the_runner() -> None:
    ((*_, arguments),) = [commands_of("cad-mllm")]
    minutes = float(arguments[arguments.index("--minutes") + 1])
    assert minutes + 15 <= float(JOBS["smoke"]["timeout-minutes"])


def test_what_it_installs_is_enough_for_the_cluster_commands() -> None:
    """Without torch and its gigabytes."""
    installed = next(words for words in COMMANDS if "constraints.txt" in words)
    packages = {*installed[installed.index("constraints.txt") + 1 :], "urllib3", "cad_mllm"}
    assert packages >= {"kubernetes", "pydantic", "pyyaml", "rich", "tyro"}
    code = (
        "import sys, cad_mllm.cli, cad_mllm.cluster.run;"
        "print(sorted({'torch', 'deepspeed', 'OCP', 'numpy', 'transformers', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_has_no_rights_but_those_that_a_job_asks_for() -> None:
    assert WORKFLOW["permissions"] == {}
    assert JOBS["image"]["permissions"] == {"contents": "read", "packages": "write"}
    assert JOBS["smoke"]["permissions"] == {"contents": "read"}
    assert JOBS["smoke"]["environment"] == "gpu-cluster"
    assert "pull_request_target" not in WORKFLOW["on"] and "pull_request" not in WORKFLOW["on"]


def test_every_job_ends_and_no_two_runs_meet() -> None:
    assert all(int(job["timeout-minutes"]) <= 180 for job in JOBS.values())
    assert WORKFLOW["concurrency"] == {"group": "gpu-smoke", "cancel-in-progress": "false"}


def test_actions_are_pinned_to_a_commit_and_keep_no_credentials() -> None:
    uses = [step for step in STEPS if "uses" in step]
    assert uses
    for step in uses:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
        if step["uses"].startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"


def test_secrets_reach_a_command_by_the_environment_of_its_step_alone() -> None:
    for step in STEPS:
        assert "${{" not in step.get("run", ""), "an expression in a script is pasted into it unquoted"
    holders = [step["name"] for step in STEPS if "secrets." in str(step.get("env", {}))]
    assert holders == ["Push", "Kubeconfig"]
    assert "secrets." not in str({key: value for key, value in WORKFLOW.items() if key != "jobs"})


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/workflows").glob("*.y*ml")), ids=lambda path: path.name
)
def test_every_workflow_is_valid_yaml_with_jobs(path: Path) -> None:
    workflow = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    assert {"name", "on", "jobs", "permissions"} <= set(workflow)
    assert all({"runs-on", "steps", "timeout-minutes"} <= set(job) for job in workflow["jobs"].values())
