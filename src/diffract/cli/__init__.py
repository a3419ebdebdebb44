"""The command line: one file per group of verbs, the same names and defaults as the Python API."""
