"""Train, examine the machines for it, show a configuration."""

from collections.abc import Sequence

from cad_mllm.errors import ExitCode
from cad_mllm.settings import leaves, parse_doctor_args, parse_train_args, show, to_flat


def train(argv: Sequence[str], prog: str = "cad-mllm train") -> ExitCode:
    """Train the three-stage curriculum."""
    config = parse_train_args(argv, prog)
    from cad_mllm.train.trainer import train as train_curriculum

    return train_curriculum(config)


def doctor(argv: Sequence[str]) -> ExitCode:
    """Check that the machines can run a training; takes its flags."""
    config, json_file = parse_doctor_args(argv, prog="cad-mllm doctor")
    from cad_mllm.train.doctor import examine

    return examine(config, json_file)


def show_config(argv: Sequence[str]) -> ExitCode:
    """Print the training configuration that the flags and --config give, as YAML."""
    import yaml

    config = parse_train_args(argv, prog="cad-mllm show-config")
    values = to_flat(config)
    section = None
    lines: list[str] = []
    for owner, leaf in leaves():
        if owner != section:
            section = owner
            lines.append(f"# {section}")
        lines.append(yaml.safe_dump({leaf.name: values[leaf.name]}).rstrip())
    show("\n".join(lines))
    return ExitCode.DONE
