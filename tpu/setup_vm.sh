#!/bin/sh
# Sets trimline up on a Cloud TPU VM (Ubuntu 22.04), in .venv-tpu below the checkout. Not run on one yet: see docs/tpu.md.
#
#   sh tpu/setup_vm.sh
#
# PyPI's tensorflow has no kernels for TPUs. tensorflow-tpu has, and its newest release is 2.20.0: it takes the place of tensorflow,
# with the Keras, tf_keras and TensorBoard that go with it.
set -eu

cd "$(dirname "$0")/.."
python=$(command -v python3.12 || command -v python3.11 || true)
[ -n "$python" ] || { echo "setup_vm: Python 3.11 or 3.12 was expected: sudo apt-get install python3.11-venv" >&2; exit 1; }

"$python" -m venv .venv-tpu
pip=".venv-tpu/bin/python -m pip --disable-pip-version-check"
$pip install --quiet "tensorflow-tpu==2.20.0" "tf-keras==2.20.*" "tensorboard==2.20.*" \
  --find-links "https://storage.googleapis.com/libtpu-tf-releases/index.html"
# All that setup.cfg asks for but tensorflow, which tensorflow-tpu is.
.venv-tpu/bin/python - <<'PY' > .venv-tpu/requirements.txt
import configparser

read = configparser.ConfigParser()
read.read("setup.cfg")
for line in read["options"]["install_requires"].split("\n"):
    if line and not line.startswith(("tensorflow>", "tf-keras", "tensorboard")):
        print(line)
PY
$pip install --quiet -r .venv-tpu/requirements.txt
$pip install --quiet --no-deps -e .

.venv-tpu/bin/python - <<'PY'
import os

from tpu.resolve import make_tpu_strategy

strategy = make_tpu_strategy(None, dict(os.environ))
print(f"setup_vm: {strategy.num_replicas_in_sync} TPU cores are ready. Next: .venv-tpu/bin/trimline run CONFIG --set strategy.name=tpu")
PY
