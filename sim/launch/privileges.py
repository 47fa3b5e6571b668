"""Giving up root: switching to the user that a service is to run as."""

from __future__ import annotations

import os
import pwd

from .stage_lock import SupervisorError


def known(user: str) -> pwd.struct_passwd:
    """Raises SupervisorError for a user that is not there."""
    try:
        return pwd.getpwnam(user)
    except KeyError:
        raise SupervisorError(f"there is no user '{user}' here; make one, or omit --user") from None


def may_not_become(user: str) -> SupervisorError:
    return SupervisorError(
        f"user {os.getuid()} may not become '{user}': start it as root (in a container with the capabilities SETUID "
        "and SETGID), or omit --user"
    )


def become(user: str) -> None:
    """Give up root for `user`, for good. Nothing to do for who is that user already. Raises SupervisorError."""
    entry = known(user)
    if os.getuid() != entry.pw_uid:
        try:
            os.initgroups(user, entry.pw_gid)
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
        except PermissionError:
            raise may_not_become(user) from None
    os.environ["HOME"] = entry.pw_dir
