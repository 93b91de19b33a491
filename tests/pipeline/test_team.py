import json
import socket

import pytest

from components.artifacts import Share
from components.errors import ConfigError
from components.options import StrategyOptions
from pipeline.team import ALONE, Place, Team, place

TWO = StrategyOptions(name="multi_worker", workers=2)
CLUSTER = {"worker": ["a:1", "b:1"]}


def told(task: object, cluster: object = CLUSTER) -> dict[str, str]:
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})}


def test_a_worker_finds_itself_in_the_variable():
    found = place(TWO, told({"type": "worker", "index": 1}))
    assert (found.index, found.addresses, found.chief) == (1, ("a:1", "b:1"), False)
    assert found.share == Share(1, 2)


def test_a_chief_of_its_own_job_comes_before_the_workers():
    cluster = {"chief": ["c:1"], "worker": ["a:1"]}
    assert place(TWO, told({"type": "chief", "index": 0}, cluster)).chief
    assert place(TWO, told({"type": "worker", "index": 0}, cluster)).index == 1


def test_other_strategies_do_not_look():
    assert place(StrategyOptions(), told({"type": "worker", "index": 1})) == ALONE
    assert ALONE.share == Share()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, r"TF_CONFIG, which is not set; .* trimline launch CONFIG --workers 2\."),
        (
            {"TF_CONFIG": "{"},
            r"TF_CONFIG must be JSON with the worker list of a cluster .*, got '\{' \(JSONDecodeError",
        ),
        ({"TF_CONFIG": "{}"}, r"got '\{\}' \(KeyError: 'cluster'\); for instance"),
        (
            told({"type": "worker", "index": 2}),
            r"must be one of the 2 of chief and worker, got worker 2; correct task\.",
        ),
        (told({"type": "ps", "index": 0}), r"got ps 0"),
        (
            told({"type": "worker", "index": 0}, {"worker": ["a", "b:1"]}),
            r"must be 'host:port', got a, b:1; add the port",
        ),
        (
            told({"type": "worker", "index": 0}, {"worker": ["a:1"]}),
            r"strategy\.workers=2 must be the number of workers in TF_CONFIG, got 1; correct one of them\.",
        ),
    ],
)
def test_a_variable_that_cannot_be_is_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        place(TWO, environment)


def test_a_chief_whose_workers_do_not_come_says_which():
    """It listens for them itself, so that Ctrl-C ends the wait."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        there = f"127.0.0.1:{taken.getsockname()[1]}"
        where = Place(0, ("127.0.0.1:1", there, "127.0.0.1:9"))
        message = (
            r"all 3 workers must come together within 0\.7 s, and 127\.0\.0\.1:9 did not answer; start trimline run"
        )
        with pytest.raises(ConfigError, match=message):
            Team.join(where, StrategyOptions(name="multi_worker", workers=3), seconds=0.7)
