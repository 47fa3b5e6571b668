"""Checking a machine and measuring a path, before a run: `thinpipe doctor` and `thinpipe probe`."""
