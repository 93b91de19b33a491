"""Everything that trimline raises on purpose, as one tree.

A message is one line that holds: where, rule, value, next step. The command line prints it as it is and leaves with
`exit_code`; library users catch `TrimlineError` or a branch of it.
"""


class TrimlineError(Exception):
    """Root of the tree; never raised itself."""

    exit_code = 1


class ConfigError(TrimlineError):
    """The user's configuration breaks a rule: unknown key, wrong type, impossible value, missing file."""

    exit_code = 2


class DataError(TrimlineError):
    """The user's data breaks a rule: missing column, too many malformed rows, an empty split."""

    exit_code = 3


class ContractError(TrimlineError):
    """An artifact does not hold what its reader was promised: wrong shape, damaged file, failed checksum."""

    exit_code = 4


class ModelError(TrimlineError):
    """A model cannot be built, twinned, trained or converted; the message names the layer and its class."""

    exit_code = 5


class ProofError(TrimlineError):
    """A finished file does not hold what its recipe promised; the message names the tensor."""

    exit_code = 6


class ConstraintError(TrimlineError):
    """No variant meets the user's constraints; the message says by how much the nearest one misses."""

    exit_code = 7


class BudgetError(TrimlineError):
    """The time that a search was given is up; what was done so far is kept."""

    exit_code = 8


class WorkerError(TrimlineError):
    """Another process of a distributed run was lost; all that it takes is to start again, from the last checkpoint."""

    exit_code = 9


class StoppedError(WorkerError):
    """The chief of a distributed run ended it; starting again would change nothing."""
