"""Fixtures of every test: fixed seeds, one thread, no network and no model hub."""

import ipaddress
import os
import random
import socket
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# huggingface_hub reads these once, when it is first imported. The empty home keeps a developer's own cache from
# making a test pass that would fail elsewhere.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(ROOT / ".pytest_cache" / "huggingface")

# Triton's kernels run on the CPU, in numpy. It reads this when it is first imported; on a GPU, `-m gpu` runs the real ones.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402  (after the environment is set)
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")

# The models here are tiny: more threads only cost hand-overs (fifty times the time on a busy machine), and one thread
# keeps sums in one order.
torch.set_num_threads(1)

# No deadline: an example's time says how busy the machine is. Derandomised: a run is the same everywhere.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


class NetworkBlockedError(RuntimeError):
    """A test tried to leave this machine. Not an OSError, so that no retry or fallback swallows it."""


def _is_local(host: object) -> bool:
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(str(host))
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse_remote(address: object) -> None:
    # AF_UNIX addresses are strings; internet addresses are (host, port, ...) tuples.
    if isinstance(address, tuple) and not _is_local(address[0]):
        raise NetworkBlockedError(f"tests must not use the network: connection to {address!r}")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self, address):
        _refuse_remote(address)
        return connect(self, address)

    def guarded_connect_ex(self, address):
        _refuse_remote(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host, port, *args, **kwargs):
        _refuse_remote((host, port))  # a name look-up is traffic too, and hangs where there is no network
        return getaddrinfo(host, port, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emoji_font() -> Path:
    """Path of the font that the emoji recipe draws with; a missing one is a failure in CI and a skip elsewhere."""
    if not EMOJI_FONT.is_file():
        message = f"{EMOJI_FONT} is missing: apt-get install fonts-noto-color-emoji"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return EMOJI_FONT
