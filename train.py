"""The entry that launchers run: `deepspeed train.py --ds_config ds_configs/digits.json`; see `--help`."""

import sys

from mpl_scale.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
