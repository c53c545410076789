"""The command line, ``calseg COMMAND``; :mod:`calseg.cli.main` is its entry.

Only this folder imports typer and rich. Each command imports what it runs when it runs.
"""
