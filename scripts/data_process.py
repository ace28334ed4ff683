"""MindFormers' `data_process.py`: training data as its LLaVA-NeXT recipes read it.

    python scripts/data_process.py --data_yaml data_process.yaml --output_file train.json

The YAML file is the one that MindFormers takes (see unillava/data/mixture.py). unillava itself
trains on the original files; this is for those who train with MindFormers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from unillava.data.mixture import SEED, process, read_mixture
from unillava.errors import UnillavaError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_yaml", default="data_process.yaml", help="what is mixed")
    parser.add_argument("--output_file", default="XX.json", help="a new file")
    parser.add_argument("--seed", type=int, default=SEED, help="of every random choice")
    options = parser.parse_args()
    try:
        process(read_mixture(options.data_yaml), options.output_file, options.seed)
    except UnillavaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
