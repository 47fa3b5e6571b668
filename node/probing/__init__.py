"""What a machine and a path have to offer, before a run: `thinpipe probe`, `thinpipe doctor`."""
