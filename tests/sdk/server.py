"""A live server of the built binary on a free port, with its data in a folder of its own."""

import os
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
START_SECS = 60
STOP_SECS = 30


def binary():
    path = pathlib.Path(os.environ.get("LOQUETIER_BINARY", ROOT / "target/debug/loquetier"))
    if not path.is_file():
        raise SystemExit(f"{path} is not built; run: cargo build --workspace --all-targets")
    return path.resolve()


class Server:
    """Started by `with`; serves the demo base on the CPU; must end cleanly when told to."""

    def __init__(self, data_dir, extra=()):
        self.data_dir = pathlib.Path(data_dir)
        self.log = self.data_dir.with_suffix(".log")
        self.extra = list(extra)

    def __enter__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        command = [binary(), "serve", "--device", "cpu", "--data-dir", self.data_dir]
        command += ["--listen", self.url.removeprefix("http://"), *self.extra]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self.wait_until_ready()
        except BaseException:
            self.process.kill()
            raise
        return self

    def wait_until_ready(self):
        deadline = time.monotonic() + START_SECS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended at once:\n{self.log.read_text()}")
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.05)
        raise AssertionError(f"not ready after {START_SECS} s:\n{self.log.read_text()}")

    def __exit__(self, *fault):
        self.process.terminate()
        try:
            code = self.process.wait(STOP_SECS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"did not stop in {STOP_SECS} s:\n{self.log.read_text()}")
        assert code == 0, f"the server ended with {code}:\n{self.log.read_text()}"

    def keys(self, *arguments):
        """Runs `loquetier keys …` beside the server and returns what it prints."""
        command = [binary(), "keys", *arguments, "--data-dir", self.data_dir]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
