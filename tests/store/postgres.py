"""A real PostgreSQL of Debian's package, in a folder of its own, that tests start, stop and restart."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from command_line import free_port

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


class Postgres:
    """One server on a port of this host, for a user without a password."""

    def __init__(self) -> None:
        self._bin = BINARIES[-1].parent
        self._home = Path(tempfile.mkdtemp(prefix="gateway-postgres-"))
        self._data = self._home / "data"
        self._user = None if os.getuid() else _somebody()  # it refuses to run as root
        if self._user is not None:
            os.chown(self._home, pwd.getpwnam(self._user).pw_uid, -1)
        self.port = free_port()  # which nobody takes while it is stopped
        self._run("initdb", "--auth=trust", "--username=gateway", "--no-sync", "-D", str(self._data))
        self.start()

    def _run(self, command: str, *arguments: str) -> None:
        as_whom: list[str] = []
        if self._user is not None:
            # Not by `user=`: then Python forks, and gRPC's handlers of forks crash the child now and then.
            found = pwd.getpwnam(self._user)
            as_whom = ["setpriv", f"--reuid={found.pw_uid}", f"--regid={found.pw_gid}", "--clear-groups"]
        subprocess.run(
            [*as_whom, self._bin / command, *arguments],
            check=True,
            cwd=self._home,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            timeout=200,
        )

    @property
    def url(self) -> str:
        return f"postgresql://gateway@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories='' -c fsync=off"
        log = str(self._home / "log")
        self._run("pg_ctl", "start", "--wait", "-D", str(self._data), "-l", log, "-o", options)

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "--mode=fast", "--wait", "-D", str(self._data))

    def empty(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")

    @contextmanager
    def reader(self) -> Iterator[str]:
        """The URL of a user who may read what is there now, and nothing else."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("CREATE ROLE reader LOGIN")
            connection.execute("GRANT USAGE ON SCHEMA public TO reader")
            connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
            try:
                yield self.url.replace("gateway@", "reader@")
            finally:
                connection.execute("DROP OWNED BY reader")
                connection.execute("DROP ROLE reader")

    @contextmanager
    def standby(self) -> Iterator[str]:
        """The URL of a server that follows this one, and can only be read."""
        copy = str(self._home / "standby")
        port = str(free_port())
        self._run(
            "pg_basebackup", "-h", "127.0.0.1", "-p", str(self.port), "-U", "gateway", "-D", copy, "-R", "-c", "fast"
        )
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories='' -c fsync=off"
        self._run("pg_ctl", "start", "--wait", "-D", copy, "-l", f"{copy}.log", "-o", options)
        try:
            yield f"postgresql://gateway@127.0.0.1:{port}/postgres"
        finally:
            self._run("pg_ctl", "stop", "--mode=immediate", "--wait", "-D", copy)
            shutil.rmtree(copy)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._home)


def _somebody() -> str:
    names = {user.pw_name for user in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"
