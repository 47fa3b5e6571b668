"""Hostile input for all that reads a network or a disk: `make fuzz`, and a sample of it in tests/test_fuzz.py.

`judge` says what every input is held to, `wire`, `payloads` and `disk` have a target for each kind of input, `mutators`
damage valid input with care. `python -m tests.fuzz` drives them by coverage (atheris, libFuzzer).
"""
