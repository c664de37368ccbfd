"""Run the command line: ``python -m job``, and the script ``gammaslim``."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line, and exit with a documented code."""
    from job.cli.main import gammaslim
    from job.cli.process_exit import run_and_exit
    from job.distributed.cores import set_thread_variables

    with suppress(OSError):  # as `python -m` does, to find --model module:factory
        here = str(Path.cwd())
        if here not in sys.path and not sys.flags.safe_path:
            sys.path.append(here)
    set_thread_variables()
    run_and_exit(partial(gammaslim, prog_name="gammaslim"))


if __name__ == "__main__":
    main()
