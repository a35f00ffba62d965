"""`python -m lipfast` is the command line."""

from __future__ import annotations

from lipfast.cli import main

if __name__ == "__main__":
    main()
