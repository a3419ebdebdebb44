"""``python -m diffract``, as launchers of several processes need it."""

from diffract.cli.main import main

if __name__ == "__main__":
    main()
