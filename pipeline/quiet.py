"""Keeps TensorFlow's and Beam's chatter off the screen: while a run works, file descriptors 1 and 2 lead to its log.

C++ code writes to the descriptors directly, so redirecting `sys.stderr` alone would not do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def quiet(log_file: pathlib.Path) -> Iterator[IO[str]]:
    """Sends everything printed by libraries to `log_file`; yields the real screen to write on.

    Args:
      log_file: Appended to; its folder is made.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # read once, when TensorFlow loads
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log_file.open("a", encoding="utf-8") as log, os.fdopen(os.dup(1), "w", encoding="utf-8") as screen:
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        root = logging.getLogger()
        before = root.level, list(root.handlers)
        root.handlers[:] = [handler]
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield screen
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            logging.captureWarnings(False)
            root.setLevel(before[0])
            root.handlers[:] = before[1]
