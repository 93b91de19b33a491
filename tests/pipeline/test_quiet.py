"""The screen stays clean: what libraries print, from Python or from C, goes to the log."""

import subprocess
import sys
import textwrap


def run(body: str, folder) -> subprocess.CompletedProcess[str]:
    """A process of its own, because pytest owns the descriptors of this one."""
    script = "import logging, os, pathlib, subprocess, warnings\nfrom pipeline.quiet import quiet\n" + textwrap.dedent(
        body
    )
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)


def test_everything_but_the_screen_goes_to_the_log_and_comes_back_afterwards(tmp_path):
    shown = run(
        """
        with quiet(pathlib.Path("run/run.log")) as screen:
            print("python noise")
            os.write(2, b"C noise\\n")
            subprocess.run(["echo", "child noise"], check=True)
            logging.getLogger("some.library").info("logged noise")
            warnings.warn("this is old", UserWarning)
            screen.write("for the user\\n")
        print("afterwards")
        """,
        tmp_path,
    )
    assert (shown.stdout, shown.stderr) == ("for the user\nafterwards\n", "")
    log = (tmp_path / "run" / "run.log").read_text()
    for noise in ("python noise", "C noise", "child noise", "logged noise", "UserWarning: this is old"):
        assert noise in log


def test_an_error_inside_leaves_the_descriptors_as_they_were(tmp_path):
    shown = run(
        """
        try:
            with quiet(pathlib.Path("run.log")):
                raise ValueError("broken")
        except ValueError:
            print("seen")
        """,
        tmp_path,
    )
    assert (shown.stdout, shown.stderr) == ("seen\n", "")
