"""What all tests share: where real data lies, two logical CPU devices and no GPU, quiet libraries."""

import gc
import os
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow loads

import hypothesis
import pytest

# Tests are about one machine's processor, and say so with its devices; test_gpu.py starts processes that see the GPUs.
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

# A shell's background job ignores Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine makes any single example slow; the same examples every time keep a failure where it was.
hypothesis.settings.register_profile("trimline", deadline=None, derandomize=True)
hypothesis.settings.load_profile("trimline")


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> Iterator[None]:
    """What a module leaves behind is not looked through again: a walk collects garbage after each step, seconds of a large heap."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real data sets; the test is skipped where it is absent."""
    usual = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = pathlib.Path(os.environ.get("TRIMLINE_DATA", usual))
    if not folder.is_dir():
        pytest.skip("real data is absent: set TRIMLINE_DATA to its folder")
    return folder


def pytest_collection_finish(session: pytest.Session) -> None:
    """TensorFlow fixes its devices with the first operation, so they are set before the first test that needs two."""
    if any("two_devices" in getattr(item, "fixturenames", ()) for item in session.items):
        _set_two_devices()


def _set_two_devices() -> None:
    import tensorflow as tf

    one = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(one, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(scope="session")
def two_devices() -> list[str]:
    """Names of two logical CPU devices, for strategies."""
    import tensorflow as tf

    names = [device.name for device in tf.config.list_logical_devices("CPU")]
    assert len(names) == 2, f"two logical CPU devices are needed, got {names}"
    return names


@pytest.fixture(scope="session")
def mirrored(two_devices: list[str]) -> Any:
    """The mirrored strategy on two logical CPU devices: one for all tests, since two of a process may clash."""
    from components.options import StrategyOptions
    from pipeline.strategy import make_strategy

    return make_strategy(StrategyOptions(name="mirrored", devices=len(two_devices)))
