"""What a user sees in TensorBoard: a real server on a real run, looked at in a real browser."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.test_journey import CONFIG, trimline, write_slice

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of `trimline tensorboard` on a finished run."""
    folder = tmp_path_factory.mktemp("tensorboard")
    write_slice(folder)
    done = trimline("run", "slice.yaml", "--set", "compress.recipes=[int8, prune@0.5+qat]", folder=folder)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "tensorboard", f"workspace/{CONFIG['name']}", "--port", "0"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://localhost:\d+/", line):
            yield found.group()
            break
    process.kill()
    process.wait()
    process.stdout.close()


def ask(server: str, path: str):
    with urllib.request.urlopen(server + path, timeout=60) as answer:
        return json.load(answer)


def wait_until(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "TensorBoard did not show it in time"
        time.sleep(0.5)
    return found


def test_every_stage_has_a_run_and_its_numbers(server):
    def tags():
        told = ask(server, "data/plugin/scalars/tags")
        return told if len(told) >= 7 else None

    told = wait_until(tags)
    joined = {name: " ".join(tags) for name, tags in told.items()}
    assert "loss" in joined["2-train"]
    assert "sparsity" in joined["3-compress-prune@0.5"]
    assert "bytes" in joined["5-measure-int8"]


def test_pictures_and_histograms_and_hparams_are_there(server):
    images = wait_until(lambda: ask(server, "data/plugin/images/tags"))
    assert "1-preprocess" in images
    assert any(name.startswith("5-measure") for name in images), "the confusion matrix"
    histograms = wait_until(lambda: ask(server, "data/plugin/histograms/tags"))
    assert "1-preprocess" in histograms
    active = ask(server, "data/plugins_listing")
    assert active["hparams"]["enabled"]


@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="no Chromium with its driver on this machine")
def test_a_browser_shows_the_runs_in_the_order_of_the_journey(server, tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path}")
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        browser.set_window_size(1400, 1200)
        browser.get(server + "#timeseries")

        def names():
            script = "return document.body.innerText"
            found = re.findall(
                r"^\d-(?:preprocess|train|compress|export|measure|select)\S*", browser.execute_script(script), re.M
            )
            return found if len(set(found)) >= 7 else None

        shown = list(dict.fromkeys(wait_until(names, 120)))
        picture = pathlib.Path(tmp_path / "tensorboard.png")
        browser.save_screenshot(str(picture))
    assert shown == sorted(shown)
    assert picture.stat().st_size > 10_000
