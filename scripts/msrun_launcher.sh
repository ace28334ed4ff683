#!/usr/bin/env bash
# Starts a command on many Ascend cards, with the arguments of MindFormers' script of this name:
# exactly 1, 2, 6 or 9. COMMAND is `train RECIPE.yaml …`, or a script and its arguments.
#
#   bash scripts/msrun_launcher.sh "train configs/llava_next_video/stage2_7b.yaml" 8
#
#   "COMMAND" [WORKER_NUM]
#   "COMMAND" WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
#   "COMMAND" WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK LOG_DIR JOIN CLUSTER_TIME_OUT
set -eu -o pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$ROOT/.venv/bin/python" ] && echo "$ROOT/.venv/bin/python" || echo python3)}
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
# As MindFormers does; where the system does not allow it, it stays as it is.
ulimit -u unlimited 2>/dev/null || true
exec "$PYTHON" -m unillava.launch msrun "$@"
