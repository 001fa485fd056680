"""What engines say to each other about blocks: msgpack in frames, over a Unix or TCP socket.

asking engine                    engine that has the blocks
Hello                       ->
                            <-   Welcome (with files, where the mover has some) or Refused
Get: keys of a chain        ->
                            <-   Offer: slots with the first so many of them, and their checksums
(copies the slots)
Taken                       ->   the slots may be used again
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import time
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from pelton.cluster.transfer.mover import LinkClosedError, TransferError
from pelton.core.batch import BlockKey

VERSION = 1
MAX_FRAME_BYTES = 1 << 20
MAX_KEYS = 1024
_MAX_FILES = 4
_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    version: int
    connector: str
    identity: bytes  # a hash of all that KV depends on but its tokens
    block_bytes: int


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    hello: Hello
    description: bytes
    num_slots: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    reason: str


class Get(msgspec.Struct, frozen=True, tag="get"):
    keys: tuple[BlockKey, ...]


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    slot_ids: tuple[int, ...]
    checksums: tuple[bytes, ...]


class Taken(msgspec.Struct, frozen=True, tag="taken"):
    pass


Message = Hello | Welcome | Refused | Get | Offer | Taken
_M = TypeVar("_M", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def difference(own: Hello, other: Hello) -> str | None:
    """Why blocks of one engine are of no use to the other; None: they are."""
    if own.version != other.version:
        return f"it speaks version {own.version} of the protocol, not {other.version}"
    if own.connector != other.connector:
        return f"its connector is {own.connector}, not {other.connector}"
    if own.block_bytes != other.block_bytes:
        return f"its KV blocks have {own.block_bytes} bytes, not {other.block_bytes}"
    if own.identity != other.identity:
        return "its model, kernels or KV cache are others, so that its KV blocks are of no use here"
    return None


def connect(address: str, timeout_s: float) -> socket.socket:
    """Raises `OSError`. `timeout_s` is that of every call of the socket, too."""
    kind, _, rest = address.partition(":")
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        link = socket.create_connection((host, int(port)), timeout_s)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return link
    link = socket.socket(socket.AF_UNIX)
    try:
        link.settimeout(timeout_s)
        link.connect(rest)
    except BaseException:
        link.close()
        raise
    return link


def listen(address: str) -> socket.socket:
    """A Unix socket is for this user only, and takes the place of one that nobody listens at: see `unlisten`. Raises
    `OSError`."""
    kind, _, rest = address.partition(":")
    if kind == "tcp":
        host, _, port = rest.rpartition(":")
        return socket.create_server((host, int(port)))
    with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
        connect(address, 1.0).close()
        raise OSError("another engine listens there")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(rest).st_mode):
            raise OSError("there is a file, and no socket")
        os.unlink(rest)
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(rest)
        os.chmod(rest, 0o600)  # before anybody can connect
        server.listen()
    except BaseException:
        server.close()
        raise
    return server


def unlisten(server: socket.socket, address: str) -> None:
    """End what `listen` began. The path goes first: once nobody listens there, it may be another engine's."""
    if server.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            os.unlink(address.partition(":")[2])
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)  # which wakes the thread that accepts
    server.close()


def keep_alive(link: socket.socket) -> None:
    """Have a link over a network end when its other host is gone without a word: within a minute."""
    if link.family == socket.AF_UNIX:
        return
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
        link.setsockopt(socket.IPPROTO_TCP, option, value)


def send(link: socket.socket, message: Message, files: Sequence[int] = ()) -> None:
    """Raises `OSError`."""
    data = _encoder.encode(message)
    data = _LENGTH.pack(len(data)) + data
    if files:
        data = data[socket.send_fds(link, [data], files) :]
    if data:
        link.sendall(data)


def receive(link: socket.socket, kind: type[_M]) -> _M:
    """Raises `OSError`, and `TransferError` for the end of the link and for what is no message of that kind.

    The link's timeout is that of its beginning, and then of all the rest, however many pieces that comes in.
    """
    message, files = receive_with_files(link, kind)
    _close(files)
    return message


def receive_with_files(link: socket.socket, kind: type[_M]) -> tuple[_M, list[int]]:
    """As `receive`; the files that came along are the caller's to close."""
    if link.family == socket.AF_UNIX:
        header, files, _, _ = socket.recv_fds(link, _LENGTH.size, _MAX_FILES)
    else:
        header, files = link.recv(_LENGTH.size), []
    timeout_s = link.gettimeout()
    until_s = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        header += _receive_bytes(link, _LENGTH.size - len(header), until_s)
        (length,) = _LENGTH.unpack(header)
        if length > MAX_FRAME_BYTES:
            raise TransferError(f"a message of {length} bytes is too long")
        message = _decoder.decode(_receive_bytes(link, length, until_s))
        if isinstance(message, Refused):
            raise TransferError(f"refused: {message.reason}")
        if not isinstance(message, kind):
            raise TransferError(f"{kind.__name__} was expected, not {type(message).__name__}")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _close(files)
        raise TransferError(f"what came is no message: {error}") from error
    except BaseException:
        _close(files)
        raise
    finally:
        link.settimeout(timeout_s)
    return message, files


def _receive_bytes(link: socket.socket, num_bytes: int, until_s: float | None) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        if until_s is not None:
            link.settimeout(max(1e-3, until_s - time.monotonic()))
        part = link.recv(num_bytes - len(data))
        if not part:
            raise LinkClosedError("the other engine has closed the connection")
        data += part
    return bytes(data)


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)
