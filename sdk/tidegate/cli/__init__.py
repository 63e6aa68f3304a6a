"""The command line, `tidegate <command>`.

Data goes to stdout (as JSON with `--json`), everything for people to stderr. Exit status 0, 1 for
one of our errors, 2 for wrong usage. One module per command; its imports happen when it runs.
"""
