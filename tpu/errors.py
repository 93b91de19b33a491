"""What goes wrong in this room; `pipeline` turns it into the errors of the house."""


class TpuError(Exception):
    """One line for the user: where, rule, value, next step."""
