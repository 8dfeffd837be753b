"""Fine-tune a model: `deepspeed --num_accelerators 2 launch/train.py [group=choice] [section.knob=value] ...`

Without a launcher (`python launch/train.py ...`) it is a world of one. `--cfg job` prints the composed config,
`-m` sweeps over comma-separated values.
"""

import sys

import hydra
from omegaconf import DictConfig

from dsft.config import cli, load


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(composed: DictConfig) -> None:
    """Type the composed config, then hand it on; heavy imports wait until it is known to be sound."""
    with load.reporting():
        config = load.from_hydra(composed)
        from dsft.runtime.failure import watched
        from dsft.runtime.place import discover

        place = discover()
        with watched(place, load.shown):
            from dsft.commands.train import run

            code = run(config, place)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    sys.argv[1:] = cli.quote_text(cli.split_launcher_args(sys.argv[1:]))
    load.register()
    with load.reporting():
        main()
