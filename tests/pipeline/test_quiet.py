"""The screen stays clean: what libraries print, from Python or from C, goes to the log."""

import logging
import os
import subprocess
import warnings

from pipeline.quiet import quiet


def test_everything_but_the_screen_goes_to_the_log_and_comes_back_afterwards(tmp_path, capfd):
    with quiet(tmp_path / "run" / "run.log") as screen:
        print("python noise", flush=True)
        os.write(2, b"C noise\n")
        subprocess.run(["echo", "child noise"], check=True)
        logging.getLogger("some.library").info("logged noise")
        screen.write("for the user\n")
    print("afterwards")
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("for the user\nafterwards\n", "")
    log = (tmp_path / "run" / "run.log").read_text()
    for noise in ("python noise", "C noise", "child noise", "logged noise"):
        assert noise in log


def test_a_warning_is_logged_with_its_text(tmp_path):
    with warnings.catch_warnings(), quiet(tmp_path / "run.log"):
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("this is old", DeprecationWarning, stacklevel=1)
    logging.captureWarnings(False)
    assert "DeprecationWarning: this is old" in (tmp_path / "run.log").read_text()


def test_an_error_inside_leaves_the_descriptors_as_they_were(tmp_path, capfd):
    try:
        with quiet(tmp_path / "run.log"):
            raise ValueError("broken")
    except ValueError:
        print("seen")
    assert capfd.readouterr().out == "seen\n"
