"""The command line: what it accepts, what it refuses, and with which words and exit codes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cad_mllm import cli
from cad_mllm.cli import COMMANDS, main, run_and_exit
from cad_mllm.commands import training
from cad_mllm.config import TrainConfig
from cad_mllm.errors import CadError, CheckpointError, ConfigError, DataError, ExitCode, PreflightError
from cad_mllm.settings import config_from_flat, flag_names, leaves, parse_train_args, read_yaml, to_flat

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "cad_mllm/train_curriculum.py"
ZERO3 = "configs/deepspeed/ds_zero3_config.json"


def parse(*argv: str) -> TrainConfig:
    return parse_train_args(argv, prog="test")


def run_entry(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ENTRY, *argv],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
    )


# --- the surface -----------------------------------------------------------------------------------


def test_flags_and_defaults_are_those_of_the_golden_list() -> None:
    """Removing, renaming or changing the default of a flag breaks somebody's launch script."""
    values = to_flat(TrainConfig())
    surface = "".join(f"--{leaf.name} {json.dumps(values[leaf.name])}\n" for _, leaf in leaves())
    assert surface == (ROOT / "tests/goldens/cli_flags.txt").read_text()


def test_no_flag_belongs_to_two_sections() -> None:
    names = [leaf.name for _, leaf in leaves()]
    assert len(names) == len(set(names))


QUICK_TEST = [
    *["--deepspeed", "--deepspeed_config", ZERO3, "--create_dummy_data", "--num_dummy_samples", "100"],
    *["--batch_size", "2", "--stage1_epochs", "1", "--stage2_epochs", "1", "--stage3_epochs", "1"],
    *["--use_gradient_checkpointing", "--attn_implementation", "flash_attention_2"],
]
RECOMMENDED = [
    *["--use_gradient_checkpointing", "--attn_implementation", "flash_attention_2"],
    *["--deepspeed", "--deepspeed_config", ZERO3, "--batch_size", "8"],
]


@pytest.mark.parametrize(
    "argv",
    [
        QUICK_TEST,
        RECOMMENDED,
        ["--deepspeed", "--deepspeed_config", "configs/deepspeed/ds_zero2_config.json"],
        ["--deepspeed", "--deepspeed_config", "configs/deepspeed/ds_zero3_offload.json"],
        ["--batch_size", "2", "--gradient_accumulation_steps", "8"],
        ["--local_rank=0", *QUICK_TEST],
        ["--local-rank=0", *QUICK_TEST],
    ],
)
def test_the_commands_of_the_quick_start_parse(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parse(*argv)


def test_quick_start_flags_mean_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = parse(*QUICK_TEST, "--local_rank=3")
    assert config.run.deepspeed and config.run.deepspeed_config == Path(ZERO3)
    assert config.data.create_dummy_data and config.data.num_dummy_samples == 100
    assert config.optim.batch_size == 2
    assert config.curriculum.stage3_epochs == 1
    assert config.model.use_gradient_checkpointing
    assert config.model.attn_implementation == "flash_attention_2"
    assert config.run.local_rank == 3


def test_switches_have_a_negative_form() -> None:
    assert parse("--use_lora").model.use_lora
    assert not parse("--no_use_lora").model.use_lora
    assert not parse("--no_enable_curriculum").curriculum.enable_curriculum


# --- YAML below the flags --------------------------------------------------------------------------


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("batch_size: 16\nlora_r: 4\nuse_lora: false\n")
    config = parse("--config", str(file), "--batch_size", "3")
    assert (config.optim.batch_size, config.model.lora_r, config.model.use_lora) == (3, 4, False)
    assert config.optim.warmup_steps == TrainConfig().optim.warmup_steps
    assert parse(f"--config={file}", "--use_lora").model.use_lora


@pytest.mark.parametrize(
    ("flags", "batch_size", "pack_tokens"),
    [
        ([], 2, 8192),
        (["--pack_tokens", "4096"], 2, 4096),
        (["--batch_size", "4"], 4, 0),
        (["--batch-size=4"], 4, 0),
        (["--batch_size", "4", "--pack_tokens", "4096"], 4, 4096),
        (["--gradient_accumulation_steps", "4"], 2, 8192),
        (["--output_dir", "a_batch_size"], 2, 8192),
    ],
)
def test_a_batch_size_takes_the_place_of_the_packs_of_the_file(
    flags: list[str], batch_size: int, pack_tokens: int, tmp_path: Path
) -> None:
    """The commands of the quick start, which name it, mean the same over a file that packs."""
    file = tmp_path / "run.yaml"
    file.write_text("pack_tokens: 8192\n")
    optim = parse("--config", str(file), *flags).optim
    assert (optim.batch_size, optim.pack_tokens) == (batch_size, pack_tokens)


def test_scientific_notation_that_yaml_reads_as_text_becomes_a_number(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("stage1_lr: 2e-5\n")
    assert yaml.safe_load(file.read_text())["stage1_lr"] == "2e-5"
    assert read_yaml(file).curriculum.stage1_lr == 2e-5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batchsize: 3", "unknown key 'batchsize'; did you mean batch_size?"),
        ("zzzzz: 3", "unknown key 'zzzzz'"),
        ("batch_size: 'yes'", "batch_size: input should be a valid integer"),
        ("batch_size: yes", "batch_size: expected a number, got true"),
        ("batch_size: 2.5", "batch_size: input should be a valid integer"),
        ("stage1_lr: fast", "stage1_lr: input should be a valid number"),
        (
            "attn_implementation: flash",
            "attn_implementation: input should be 'sdpa', 'eager' or ",
        ),
        ("model: {lora_r: 3}", "unknown key 'model'"),
        ("lora_r: {a: 3}", "lora_r: input should be a valid integer"),
        ("- batch_size", "expected lines of `flag_name: value`"),
        ("batch_size: [", "not valid YAML"),
        ("batch_size: -3", "--batch_size must be at least 1, got -3"),
        ("pack_tokens: 1024", "--pack_tokens 1024 has no room for a sample of --max_seq_length 2048"),
    ],
)
def test_bad_yaml_is_one_line_that_names_file_and_key(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(file))
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert str(file) in message or message.startswith(("--batch_size", "--pack_tokens"))


def test_a_file_of_no_settings_is_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("# nothing\n")
    assert parse("--config", str(file)) == TrainConfig()


def test_show_config_prints_yaml_that_reads_back_as_the_same_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--batch_size", "7", "--stage2_lr", "3e-4", "--output_dir", "somewhere", "--no_use_lora"]
    with pytest.raises(SystemExit) as exit_request:
        main(["show-config", *argv])
    assert exit_request.value.code == 0
    file = tmp_path / "shown.yaml"
    file.write_text(capsys.readouterr().out)
    assert read_yaml(file) == parse(*argv)


@given(
    st.dictionaries(
        st.sampled_from([leaf.name for _, leaf in leaves()]) | st.text(max_size=8),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.lists(st.integers()),
        max_size=4,
    )
)
def test_any_mapping_is_a_config_or_a_config_error(values: dict[str, object]) -> None:
    try:
        config = config_from_flat(values, source="anything")
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, TrainConfig)


# --- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--batch_siz", "3"], "unknown flag --batch_siz; did you mean --batch_size?"),
        (["--batch-siz=3"], "did you mean --batch_size?"),
        (["--attn_implementatoin", "sdpa"], "did you mean --attn_implementation?"),
        (["--batch_size", "two"], "--batch_size: invalid literal for int() with base 10: 'two'"),
        (["--batch_size"], "--batch_size"),
        (["--attn_implementation", "flash"], "('sdpa', 'eager', 'flash_attention_2')"),
        (["--start_from_stage", "4"], "--start_from_stage"),
        (["--deepspeed", "True"], "unexpected argument `True`: a switch such as --deepspeed takes no value"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["--config"], "--config"),
        (["--deepspeed"], "--deepspeed needs --deepspeed_config"),
        (["--deepspeed_config", ZERO3], "--deepspeed_config is given without --deepspeed"),
        (["--deepspeed", "--deepspeed_config", "no.json"], "--deepspeed_config no.json: no such file"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--stage1_lr", "nan"], "--stage1_lr must be between 0 and 1, got nan"),
        (["--projector_lr_multiplier", "inf"], "--projector_lr_multiplier must be between 0 and 1e+06"),
        (["--max_skipped_fraction", "1.5"], "--max_skipped_fraction must be between 0 and 1, got 1.5"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_ends_the_process_with_code_2_one_line_and_no_traceback() -> None:
    done = run_entry("--batch_siz", "3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: unknown flag --batch_siz; did you mean --batch_size? (see `train_curriculum.py --help`)\n"
    )


def test_under_a_launcher_the_line_names_the_rank_and_the_last_line_the_code() -> None:
    done = run_entry("--foo", env={"RANK": "1", "WORLD_SIZE": "2"})
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "[rank 1] error: unknown flag --foo (see `train_curriculum.py --help`)",
        "[rank 1] exit code 2",
    ]


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (ConfigError("x"), 2),
        (DataError("x"), 3),
        (CadError("x"), 3),
        (CheckpointError("x"), 4),
        (PreflightError("x"), 5),
        (OSError(errno.ENOSPC, "No space left on device", "out/x.json"), 5),
        (OSError(errno.EROFS, "Read-only file system"), 5),
        (KeyboardInterrupt(), 130),
        (RuntimeError("a bug"), 1),
        (FileNotFoundError(errno.ENOENT, "a bug too"), 1),
    ],
)
def test_each_kind_of_mistake_has_its_exit_code(
    raised: BaseException, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)

    def body() -> ExitCode:
        raise raised

    with pytest.raises(SystemExit) as exit_request:
        run_and_exit(body)
    assert exit_request.value.code == code
    stderr = capsys.readouterr().err
    assert ("Traceback" in stderr) == (code == 1)
    assert code == 1 or len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB.", 6),
        (torch.AcceleratorError, "CUDA error: out of memory", 6),
        (torch.distributed.DistBackendError, "ncclUnhandledCudaError: Cuda failure 2 'out of memory'", 6),
        (
            torch.distributed.DistBackendError,
            "ncclRemoteError: A call failed possibly due to a network",
            170,
        ),
        (torch.distributed.DistNetworkError, "The client socket has timed out after 60000ms", 170),
        (torch.distributed.DistStoreError, "Timed out after 4 seconds waiting for clients. 1/2", 170),
        (
            RuntimeError,
            "[/p/gloo/transport/tcp/pair.cc:537] Read error [::1]: Connection reset by peer",
            170,
        ),
        (RuntimeError, "[/p/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2", 170),
        (
            RuntimeError,
            "[/p/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv",
            170,
        ),
        (RuntimeError, "Gloo connectFullMesh failed with [...] no error", 170),
        (torch.distributed.DistBackendError, "ncclInvalidUsage: Duplicate GPU detected", 1),
        (torch.AcceleratorError, "CUDA error: device-side assert triggered", 1),
        (RuntimeError, "mat1 and mat2 shapes cannot be multiplied", 1),
        (ValueError, "Connection closed by peer", 1),
    ],
)
def test_what_torch_raises_for_a_full_gpu_and_a_lost_peer_has_a_code(
    error: type[Exception],
    message: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = torch.distributed
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(os, "_exit", sys.exit)  # see the next test
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    try:
        with pytest.raises(SystemExit) as exit_request:
            run_and_exit(lambda: fail(error(message)))
    finally:
        group.destroy_process_group()
    assert exit_request.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"[rank 3] exit code {code}"
    if code == 1:
        assert lines[0].startswith("Traceback")
    else:
        assert len(lines) == 2 and lines[0].startswith("[rank 3] error: ") and message in lines[0]
        assert {6: "half of --pack_tokens", 170: "--resume_from_ckpt auto"}[code] in lines[0]


def test_a_rank_that_fails_in_a_process_group_leaves_without_tear_down() -> None:
    """Which could hang or abort with another code; what it said is on the console all the same."""
    program = (
        "import atexit, torch; from cad_mllm.cli import run_and_exit\n"
        "from cad_mllm.errors import DataError\n"
        "store = torch.distributed.HashStore()\n"
        "torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)\n"
        "atexit.register(print, 'torn down')\n"
        "def body():\n"
        "    print('said')\n"
        "    raise DataError('x')\n"
        "run_and_exit(body)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "error: x\n")


def test_gloo_words_outside_a_process_group_are_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_request:
        run_and_exit(lambda: fail(RuntimeError("Connection closed by peer")))
    assert exit_request.value.code == 1
    assert "Traceback" in capsys.readouterr().err


def fail(error: Exception) -> ExitCode:
    raise error


def test_a_stop_after_a_checkpoint_is_143() -> None:
    with pytest.raises(SystemExit) as exit_request:
        run_and_exit(lambda: ExitCode.STOPPED)
    assert exit_request.value.code == 143


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["trian"], "unknown command 'trian'"),
        (["prepare", "--out", "x"], "--json_root"),
        (["prepare", "--json_root", "a", "--out", "b", "--views", "9"], "--views must be from 0 to 8, got 9"),
        (["prepare", "--json_root", "a", "--archive", "b", "--out", "c"], "and not both"),
        (["prepare", "--archive", "a", "--txt_root", "b", "--out", "c"], "--txt_root goes with --json_root"),
        (["prepare", "--json_root", "a", "--out", "b", "--part", "0/2"], "--part is for shards"),
        (["prepare", "--archive", "a.zip", "--out", "b", "--layout", "files"], "needs a folder"),
        (["prepare", "--archive", "a", "--out", "b", "--part", "2/2"], "parts count from 0 to 1"),
        (["make-dummy", "--out", "x", "--num_samples", "0"], "--num_samples must be at least 1, got 0"),
        (["make-dummy", "--out", "x", "--views", "9"], "--views must be from 0 to 8, got 9"),
        (["make-dummy", "--out", "x", "--size", "0"], "--size must be at least 1, got 0"),
        (["generate", "--checkpoint", "c", "--out", "o"], "give --text, --points or --image"),
        (["generate", "--checkpoint", "c", "--out", "o", "--txt", "x"], "did you mean --text?"),
        (["generate", "--checkpoint", "c", "--out", "o", "--text", "x", "--folder", "f"], "one or the other"),
        (
            [
                "generate",
                "--checkpoint",
                "c",
                "--out",
                "o",
                "--text",
                "x",
                "--best_of",
                "4",
                "--temperature",
                "0",
            ],
            "--best_of with --temperature 0",
        ),
    ],
)
def test_mistakes_in_the_other_commands(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_request:
        main(argv)
    assert exit_request.value.code == 2
    stderr = capsys.readouterr().err
    assert expected in stderr
    assert stderr.count("\n") == 1


def test_make_dummy_writes_the_kind_of_parts_and_the_views_that_it_is_told(tmp_path: Path) -> None:
    words = ["make-dummy", "--out", str(tmp_path), "--num_samples", "1", "--workers", "1"]
    with pytest.raises(SystemExit) as exit_request:
        main([*words, "--complexity", "simple", "--views", "0"])
    assert exit_request.value.code == 0
    written = json.loads((tmp_path / "dummy_data.json").read_text())
    assert (written["complexity"], written["views"], written["complete"]) == ("simple", 0, True)
    assert len(list(tmp_path.glob("pcd/*/*.npz"))) == 1
    assert not list(tmp_path.glob("img/*/*.png"))


@pytest.mark.parametrize(
    ("argv", "command", "passed"),
    [
        (["doctor", "--seed", "1"], "doctor", ["--seed", "1"]),
        (["--local_rank=1", "doctor", "--seed", "1"], "doctor", ["--local_rank=1", "--seed", "1"]),
        (["--wandb_run_name", "doctor"], "train", ["--wandb_run_name", "doctor"]),
        ([], "train", []),
    ],
)
def test_what_launches_a_training_launches_its_examination(
    argv: list[str], command: str, passed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, list[str]]] = []
    for name in ("doctor", "train"):
        monkeypatch.setattr(training, name, lambda argv, prog="", name=name: called.append((name, argv)) or 0)
    monkeypatch.setattr(sys, "argv", ["train_curriculum.py", *argv])
    with pytest.raises(SystemExit):
        cli.train_main()
    assert called == [(command, passed)]


# --- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_request:
        main([*command.split(), "--help"])
    assert exit_request.value.code == 0
    shown = capsys.readouterr().out
    assert "example" in shown.rsplit("--", 1)[0]
    assert "cad-mllm " in shown


def test_help_lists_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    for flag in flag_names(TrainConfig):
        assert flag in shown
    assert " ".join(shown.split()).count("(default: ") == len(list(leaves())) + 1  # and --config


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_request:
        main([])
    assert exit_request.value.code == 2
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


# --- imports ---------------------------------------------------------------------------------------


def test_help_and_flag_errors_need_no_torch() -> None:
    code = "import sys, cad_mllm.cli; print(sorted({'torch', 'deepspeed', 'OCP'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_launched_script_does_not_put_its_own_folder_on_the_path() -> None:
    """`data`, `model`, `train` in it would shadow modules of those names."""
    code = (
        "import runpy, sys; sys.path[0] = 'cad_mllm';"
        f"runpy.run_path('{ENTRY}', run_name='imported');"
        "from pathlib import Path;"
        "assert Path('cad_mllm').resolve() not in [Path(p).resolve() for p in sys.path];"
        "assert Path(sys.path[0]).resolve() == Path.cwd().resolve()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
