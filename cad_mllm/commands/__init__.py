"""The subcommands of `cad-mllm`, by what they are about: flags, their ranges, and the call of what does it.

Nothing heavy is imported before it is needed, so that `--help` and a mistyped flag answer at once.
"""
