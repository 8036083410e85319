"""One file per command of the command line, each with ``run(arguments)``; ``eqvision/cli.py`` has the table."""
