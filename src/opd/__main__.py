"""`python -m opd` is the `opd` command."""

from opd.cli import main

if __name__ == "__main__":
    main()
