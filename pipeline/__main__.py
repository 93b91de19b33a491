"""`python -m pipeline` and the command `trimline`."""

from pipeline.cli import app


def main() -> None:
    """Runs the command line."""
    app()


if __name__ == "__main__":
    main()
