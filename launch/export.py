"""Write a checkpoint's model: `python launch/export.py run_dir=R checkpoint=best|last|N merge=true|false output=DIR
model.path=DIR`

Arguments are written as those of `launch/train.py`. One process, no launcher, no accelerator. Only `run_dir` is needed;
the rest is `last`, `true` and `run_dir/model`. The base model is looked for where the run had it, unless `model.path`
says where it has been moved to.
"""

import sys
from pathlib import Path

from dsft.config import cli, load
from dsft.errors import UserError

DEFAULTS = {"run_dir": None, "checkpoint": "last", "merge": True, "output": None, "model.path": None}


def parse(argv: list[str]) -> dict:
    """Arguments of `dsft.commands.export.export`.

    Raises:
        UserError: An unknown key or a value that is none of its choices.
    """
    given = DEFAULTS | cli.read(argv, DEFAULTS)
    if not given["run_dir"]:
        raise UserError("Say which run to export: run_dir=DIR")
    if str(given["merge"]).lower() not in ("true", "false"):
        raise UserError(f"merge={given['merge']}: give true or false")
    return {
        "run_dir": Path(given["run_dir"]),
        "which": str(given["checkpoint"]),
        "merge": str(given["merge"]).lower() == "true",
        "output": given["output"] and Path(given["output"]),
        "model_path": given["model.path"],
    }


def main() -> None:
    """Export, then say where the model is and how well it agrees."""
    with load.reporting():
        arguments = parse(sys.argv[1:])
        from dsft.commands.export import export

        output, report = export(**arguments)
        print(f"{output}: {report}")


if __name__ == "__main__":
    main()
