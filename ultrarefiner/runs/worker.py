"""A process that `runs.launch` has started beside the first one: `python -m ultrarefiner.runs.worker config.yaml`."""

import sys

from omegaconf import DictConfig, OmegaConf

from ultrarefiner.errors import UserError
from ultrarefiner.extras import import_lightning


def main() -> None:
    """Run the experiment of a configuration file in step with the first process."""
    import_lightning()
    from ultrarefiner.runs.experiment import run
    from ultrarefiner.runs.launch import processes

    cfg = OmegaConf.load(sys.argv[1])
    assert isinstance(cfg, DictConfig)
    try:
        with processes(cfg):
            run(cfg)
    except (UserError, KeyboardInterrupt, SystemExit):
        sys.exit(1)  # the first process says why


if __name__ == "__main__":
    main()
