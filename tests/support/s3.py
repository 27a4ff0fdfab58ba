"""Real S3 servers on the loopback interface: moto (in memory, instant) and Ceph's radosgw (on disk, strict).

moto never checks secrets or digests; radosgw does, and survives `kill -9` of all its daemons.
By hand: `python -m tests.support.s3 moto run`, `... ceph install`, `... ceph run`.
Knows nothing of crossenc, nor of injected faults.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import boto3
import pytest
import s3fs
from botocore.config import Config

from .processes import wait_for

CEPH_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
CEPH_PACKAGES = ("ceph-mon", "ceph-osd", "radosgw")
ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"

_POLICY = Path("/usr/sbin/policy-rc.d")
_CEPH_CONF = """\
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon_port}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
mon allow pool size one = true
mon max pg per osd = 1000
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
run dir = {folder}
admin socket =
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
keyring = {folder}/keyring
[mon.a]
host = localhost
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
osd memory target = 939524096
bluestore block size = 8589934592
[client.rgw.a]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{rgw_port}
"""


@dataclass
class S3Server:
    """A running S3 endpoint. Keys are written `bucket/key`, as s3fs writes them."""

    endpoint_url: str
    access_key: str
    secret_key: str
    env: dict[str, str] = field(repr=False)
    pid: int

    @cached_property
    def client(self) -> Any:
        """A boto3 client of this endpoint, whatever the environment says."""
        checksums = Config(request_checksum_calculation="when_required", response_checksum_validation="when_required")
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=checksums,
        )

    def make_bucket(self, name: str) -> str:
        self.client.create_bucket(Bucket=name)
        return name

    def list(self, prefix: str) -> list[str]:
        """The keys below `bucket/prefix`, in the server's (byte) order."""
        bucket, _, prefix = prefix.partition("/")
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [f"{bucket}/{entry['Key']}" for page in pages for entry in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        body: bytes = self.client.get_object(**_address(key))["Body"].read()
        return body

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(**_address(key), Body=data)

    def delete(self, key: str) -> None:
        self.client.delete_object(**_address(key))


@contextmanager
def moto_server() -> Iterator[S3Server]:
    """A moto server of its own: empty, in memory, gone at the end."""
    port = free_port()
    program = Path(sys.executable).with_name("moto_server")
    server = subprocess.Popen(
        [sys.executable, str(program), "-H", "127.0.0.1", "-p", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        wait_for(lambda: _answers(port, server), 30, "an answer of moto_server")
        yield S3Server(f"http://127.0.0.1:{port}", ACCESS_KEY, SECRET_KEY, _env(port), server.pid)
    finally:
        server.terminate()
        server.wait(10)


def set_s3_env(monkeypatch: pytest.MonkeyPatch, env: Mapping[str, str]) -> None:
    """Point this process's S3 clients at a server or, with another AWS_ENDPOINT_URL, at a proxy."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # s3fs hands out old instances, with the endpoint of before


def ceph_is_installed() -> bool:
    return all(shutil.which(program) for program in CEPH_PROGRAMS)


def install_ceph() -> None:
    """Install the Debian packages (about 270 MB) without starting the daemons they bring; needs root."""
    quiet = not _POLICY.exists()
    if quiet:  # 101 tells the packages' scripts that nothing may be started
        _POLICY.write_text("#!/bin/sh\nexit 101\n")
        _POLICY.chmod(0o755)
    try:
        apt_env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-q"], check=True, env=apt_env)
        install = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *CEPH_PACKAGES]
        subprocess.run(install, check=True, env=apt_env)
    finally:
        if quiet:
            _POLICY.unlink()


@contextmanager
def ceph_server(folder: Path) -> Iterator["CephServer"]:
    """A one-node Ceph with a radosgw, all its state in `folder`; starts in about 18 s, restarts in 6 s."""
    if not ceph_is_installed():
        raise RuntimeError("Ceph is not installed: run `python -m tests.support.s3 ceph install` as root")
    server = CephServer.create(folder)
    try:
        server.restart()
        server.create_user()
        yield server
    finally:
        server.kill()


@dataclass
class CephServer(S3Server):
    """A monitor, one OSD on a sparse file and a radosgw; `pid` is the radosgw's, 0 while it is down."""

    folder: Path
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, repr=False)

    @classmethod
    def create(cls, folder: Path) -> "CephServer":
        """Lay out `folder` for a new cluster; nothing runs yet."""
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir(parents=True)
        mon_port, rgw_port, fsid = free_port(), free_port(), str(uuid.uuid4())
        conf = _CEPH_CONF.format(fsid=fsid, mon_port=mon_port, rgw_port=rgw_port, folder=folder)
        (folder / "ceph.conf").write_text(conf)
        (folder / "keyring").touch()
        monmap = str(folder / "monmap")
        address = f"[v1:127.0.0.1:{mon_port}]"
        _run(["monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap])
        # radosgw 16 answers 411 to uploads with a trailing checksum, the default of newer clients.
        env = _env(
            rgw_port,
            AWS_REQUEST_CHECKSUM_CALCULATION="when_required",
            AWS_RESPONSE_CHECKSUM_VALIDATION="when_required",
        )
        server = cls(f"http://127.0.0.1:{rgw_port}", ACCESS_KEY, SECRET_KEY, env, pid=0, folder=folder)
        server._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        return server

    def restart(self) -> None:
        """Start what is down, in order, and wait until the radosgw answers."""
        self._start("mon", "ceph-mon", "-i", "a")
        if not (self.folder / "osd" / "whoami").exists():
            osd_uuid = str(uuid.uuid4())
            self._run("ceph", "osd", "new", osd_uuid, "0")
            self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        wait_for(self._osd_is_up, 90, "the start of the OSD")
        gateway = self._start("rgw", "radosgw", "-n", "client.rgw.a")
        port = int(self.endpoint_url.rpartition(":")[2])
        wait_for(lambda: _answers(port, gateway), 90, "an answer of radosgw")
        self.pid = gateway.pid

    def kill(self) -> None:
        """`kill -9` all daemons at once, as a power cut would; what was acknowledged stays on disk."""
        for daemon in self._daemons.values():
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        self.pid = 0

    def create_user(self) -> None:
        user = ["--uid", "test", "--display-name", "test"]
        keys = ["--access-key", self.access_key, "--secret-key", self.secret_key]
        self._run("radosgw-admin", "user", "create", *user, *keys)

    def _osd_is_up(self) -> bool:
        # Without cephx an OSD may ask before it has the monitor's map, and exit ("wrong fsid"): start again.
        daemon = self._daemons.get("osd")
        if daemon is None or daemon.poll() is not None:
            self._start("osd", "ceph-osd", "-i", "0")
        return "1 up" in self._run("ceph", "osd", "stat")

    def _start(self, name: str, program: str, *args: str) -> subprocess.Popen[bytes]:
        running = self._daemons.get(name)
        if running is not None and running.poll() is None:
            return running
        with (self.folder / f"{name}.err").open("ab") as err:
            self._daemons[name] = subprocess.Popen(
                [program, "-c", str(self.folder / "ceph.conf"), *args, "-f"],
                stdin=subprocess.DEVNULL,
                stdout=err,
                stderr=err,
                process_group=0,
            )
        return self._daemons[name]

    def _run(self, program: str, *args: str) -> str:
        deadline = time.monotonic() + 60
        while True:
            try:
                return _run([program, "-c", str(self.folder / "ceph.conf"), *args])
            except RuntimeError as error:
                # So says a monitor that has lost its quorum for a moment, as happens on a busy machine.
                if "problem getting command descriptions" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.5)


def main() -> None:
    """Install or run a server by hand; a running one prints its environment and ends on SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.s3", description=__doc__)
    parser.add_argument("server", choices=["moto", "ceph"])
    parser.add_argument("action", choices=["install", "run"], help="moto comes with the test extra: nothing to install")
    args = parser.parse_args()
    if args.action == "install":
        if args.server == "ceph":
            install_ceph()
        return
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with (
        TemporaryDirectory(prefix="ceph-") as folder,
        moto_server() if args.server == "moto" else ceph_server(Path(folder)) as server,
    ):
        for name, value in server.env.items():
            print(f"export {name}={value}", flush=True)
        ended.wait()


def _env(port: int, **extra: str) -> dict[str, str]:
    """What any S3 client needs in its environment to use the server at `port`."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        **extra,
    }


def _address(key: str) -> dict[str, str]:
    bucket, _, name = key.partition("/")
    return {"Bucket": bucket, "Key": name}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int, server: subprocess.Popen[bytes]) -> bool:
    if server.poll() is not None:
        raise RuntimeError(f"{server.args!r} ended with {server.returncode}")
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command!r} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
