"""Convert weights as MindFormers' users know it.

python convert_weight.py --model llava_next --input_path DIR --output_path OUT.ckpt

Needs NumPy alone. `--help` lists everything; `unillava convert` does more.
"""

import sys

from weight_convert.legacy_cli import main

if __name__ == "__main__":
    sys.exit(main())
