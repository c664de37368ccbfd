"""Run the command line: ``python -m gammaslim``."""

from job.__main__ import main

if __name__ == "__main__":
    main()
