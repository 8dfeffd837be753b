"""Ask a trained model: `python launch/predict.py run_dir=R input=FILE output=FILE [checkpoint=best|last|N]`, or
`model.path=DIR` in place of `run_dir=R`

Arguments are written as those of `launch/train.py`. `model.path` alone is a model directory, a hub id, a GGUF file or a
directory of adapters; beside `run_dir` it says where the run's base model has been moved to. `input` is anything that
`data.train` may be, or `-` for JSON Lines from standard input; `output=-` is standard output. Under a launcher all
ranks answer.
"""

import sys
from pathlib import Path
from typing import Any

from dsft.config import cli, load
from dsft.errors import UserError

OWN = {
    "run_dir": None,
    "checkpoint": "last",
    "model.path": None,
    "task": None,
    "input": None,
    "output": None,
    "scores": None,
    "language": "auto",
    "group_by": [],
}
"""Options, and what they are where they are not given."""

DECODING = {
    **dict.fromkeys(("max_new_tokens", "beams", "top_k", "answers", "seed"), int),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), float),
}
"""Those of generated texts that are numbers; `tasks.generate.Decoding` says what they mean. `stop` has strings."""

CHOICES = ("tokenizer", "normalize", "encoder", "layer")
"""Those of how scores are counted (`metrics.scores.Choices`)."""

LISTS = ("stop", "scores", "group_by")

SETTINGS = (
    "data.max_length data.on_overflow data.columns data.header data.ignore_fields "
    "data.prompt_template data.packing data.cache_dir eval.micro_batch_size precision model.revision "
    "model.chat_template model.attention task.overlap task.max_answer_tokens task.no_answer_threshold task.thresholds "
    "task.source_prefix task.source_language task.target_language"
).split()
"""Settings of `launch/train.py` that a prediction depends on."""


def parse(argv: list[str]) -> dict[str, Any]:
    """What `dsft.commands.predict.predict` is told: `wanted`, `who` and `given`.

    Raises:
        UserError: An unknown key, a value that is none of its choices, or one that is missing.
    """
    read = cli.read(argv, [*OWN, *DECODING, "stop", *CHOICES, *SETTINGS])
    own = {name: read.get(name, default) for name, default in OWN.items()}
    for name in ("input", "output"):
        if own[name] is None:
            raise UserError(f"Say {name}=FILE, or {name}=- for standard {name}")
    if own["run_dir"] is None and own["model.path"] is None:
        raise UserError("Say which model is asked: run_dir=DIR, or model.path=DIR_OR_HUB_ID_OR_GGUF")
    if own["run_dir"] is None and "checkpoint" in read:
        raise UserError(f"checkpoint={own['checkpoint']} does nothing without run_dir: leave it out")
    for name in ("task", "model.revision") if own["run_dir"] is not None else ():
        if name in read:
            raise UserError(f"{name}={read[name]} does nothing with run_dir, which says it itself: leave it out")
    said = frozenset(read.keys() & {*DECODING, *LISTS, *CHOICES, "language"})
    decoding: dict[str, Any] = {name: _number(name, read[name]) for name in DECODING if name in read}
    if "stop" in read:
        decoding["stop"] = tuple(_listed(read["stop"]))
    choices: dict[str, Any] = {name: str(read[name]) for name in ("tokenizer", "encoder") if name in read}
    choices |= {"layer": _number("layer", read["layer"])} if "layer" in read else {}
    choices |= {"normalize": tuple(_listed(read["normalize"]))} if "normalize" in read else {}
    return {
        "wanted": {
            "input": str(own["input"]),
            "output": str(own["output"]),
            "said": said,
            "scores": None if own["scores"] is None else tuple(_listed(own["scores"])),
            "language": str(own["language"]),
            "group_by": tuple(_listed(own["group_by"])),
        },
        "choices": choices,
        "decoding": decoding,
        "given": {name: read[name] for name in SETTINGS if name in read},
        "who": {
            "run_dir": own["run_dir"] and Path(own["run_dir"]),
            "checkpoint": str(own["checkpoint"]),
            "model_path": own["model.path"],
            "task": own["task"],
        },
    }


def _listed(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value])]


def _number(name: str, value: Any) -> float:
    """A number as its option wants it.

    Raises:
        UserError: It is none.
    """
    try:
        return DECODING.get(name, int)(str(value))
    except ValueError:
        kind = "a whole number" if DECODING.get(name, int) is int else "a number"
        raise UserError(f"{name}={value} is to be {kind}") from None


def main() -> None:
    """Predict, then say what became of the records."""
    with load.reporting():
        arguments = parse(cli.split_launcher_args(sys.argv[1:]))
        from dsft.runtime.failure import watched
        from dsft.runtime.place import discover

        place = discover()
        with watched(place, load.shown):
            from dsft.commands.predict import Wanted, predict
            from dsft.commands.trained import Who
            from dsft.metrics.scores import Choices
            from dsft.tasks.generate import Decoding

            decoding, choices = Decoding(**arguments["decoding"]), Choices(**arguments["choices"])
            wanted = Wanted(**arguments["wanted"], decoding=decoding, choices=choices)
            about = predict(place, wanted, Who(**arguments["who"]), arguments["given"])
        if place.rank == 0:
            scores = about.pop("scores", {})
            decision = about.pop("decision", {})
            print(", ".join(f"{count} {name}" for name, count in about.items()), file=sys.stderr)
            for name, value in decision.items():
                print(f"the model keeps {name}: {value}", file=sys.stderr)
            for name, value in scores.items():
                if isinstance(value, float | int):
                    print(f"{name}: {value:.4g}", file=sys.stderr)


if __name__ == "__main__":
    main()
