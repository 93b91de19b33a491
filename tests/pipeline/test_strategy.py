import subprocess
import sys

import pytest

from components.errors import ConfigError
from components.options import StrategyOptions
from pipeline.strategy import check_strategy, make_split, make_strategy


def test_a_tpu_that_is_not_there_is_an_error_of_the_configuration():
    with pytest.raises(ConfigError, match=r"strategy\.tpu=local: no TPU was found, .* docs/tpu\.md has the set-up"):
        make_strategy(StrategyOptions(name="tpu", tpu="local"))
    with pytest.raises(ConfigError, match=r"strategy\.tpu=local applies to tpu, got strategy\.name=default"):
        check_strategy(StrategyOptions(tpu="local"), 64)


def test_the_batch_must_divide_by_the_workers():
    check_strategy(StrategyOptions(name="multi_worker", workers=4), 64)
    message = (
        r"train\.batch_size=66 must divide by the 4 replicas of strategy 'multi_worker' \(remainder 2\): use 64 or 68\."
    )
    with pytest.raises(ConfigError, match=message):
        check_strategy(StrategyOptions(name="multi_worker", workers=4), 66)


def test_the_batch_must_divide_by_the_devices():
    check_strategy(StrategyOptions(name="mirrored", devices=8), 96)
    check_strategy(StrategyOptions(name="mirrored"), 7)  # how many devices there are is known later
    message = (
        r"train\.batch_size=100 must divide by the 8 replicas of strategy 'mirrored' \(remainder 4\): use 96 or 104\."
    )
    with pytest.raises(ConfigError, match=message):
        check_strategy(StrategyOptions(name="mirrored", devices=8), 100)


def test_devices_without_mirrored_are_refused():
    with pytest.raises(
        ConfigError, match=r"strategy\.devices=2 applies to mirrored and split, got strategy\.name=default"
    ):
        check_strategy(StrategyOptions(devices=2), 64)
    with pytest.raises(
        ConfigError, match=r"strategy\.devices=2 applies to mirrored and split, got strategy\.name=multi_worker"
    ):
        check_strategy(StrategyOptions(name="multi_worker", workers=2, devices=2), 64)


def test_a_split_model_has_one_replica_and_its_devices_in_order(two_devices):
    check_strategy(StrategyOptions(name="split", devices=2), 7)
    assert make_strategy(StrategyOptions(name="split")).num_replicas_in_sync == 1
    made = make_split(StrategyOptions(name="split", layout={"a.*": 1}))
    assert made is not None
    assert made.devices == tuple(two_devices)
    assert made.layout == {"a.*": 1}
    assert make_split(StrategyOptions(name="mirrored")) is None
    with pytest.raises(ConfigError, match=r"strategy\.devices=3 asks for more than the 2 CPU devices of this machine"):
        make_split(StrategyOptions(name="split", devices=3))


def in_a_fresh_process(code: str) -> str:
    """Devices are fixed once TensorFlow starts, so a test that sets them needs a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_check_does_not_load_tensorflow():
    code = "import sys, pipeline.strategy as s; s.check_strategy(s.StrategyOptions(), 64); print('tensorflow' in sys.modules)"
    assert in_a_fresh_process(code) == "False\n"


MIRRORED = """
import tensorflow as tf
from components.errors import ConfigError
from components.options import StrategyOptions
from pipeline.strategy import make_strategy

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_visible_devices([cpu])
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 3)
for options in ({"name": "default"}, {"name": "mirrored"}, {"name": "mirrored", "devices": 2}):
    strategy = make_strategy(StrategyOptions(**options))
    print(isinstance(strategy, tf.distribute.MirroredStrategy), strategy.num_replicas_in_sync)
try:
    make_strategy(StrategyOptions(name="mirrored", devices=4))
except ConfigError as error:
    print(error)
"""


def test_mirrored_takes_all_devices_or_as_many_as_are_asked_for():
    assert in_a_fresh_process(MIRRORED).splitlines() == [
        "False 1",
        "True 3",
        "True 2",
        "strategy.devices=4 asks for more than the 3 CPU devices of this machine: use 3 or fewer, or drop it to take all.",
    ]
