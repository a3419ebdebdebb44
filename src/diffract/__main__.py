"""The ``diffract`` command, as it is installed and as ``python -m diffract``, which launchers of processes start."""

import sys


def main() -> None:
    """Run the command line, which takes a while to be imported: who interrupts that sees no traceback either."""
    try:
        from diffract.cli.main import main as command

        command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
