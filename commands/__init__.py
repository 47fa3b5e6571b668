"""The commands of the command line, one module for each kind; cli.py puts them together."""
