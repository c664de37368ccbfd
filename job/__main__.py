"""``python -m job`` and the ``gammaslim`` script."""

from __future__ import annotations


def main() -> None:
    """Run the command line; exits with a documented code."""
    from job.cli import gammaslim

    gammaslim(prog_name="gammaslim")


if __name__ == "__main__":
    main()
