"""A database behind real TLS, as one on another machine is: who proves to be it is asked, nobody else hears of a password."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from inference.settings import read_settings
from inference.store import Store
from infra import postgres
from infra.deployment import Deployment
from schemas.errors import DatabaseError, Unavailable

NAME = "db.example"
_SSL_REQUEST, _GSS_REQUEST = bytes.fromhex("0000000804d2162f"), bytes.fromhex("0000000804d21630")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for `db.example`, signed by itself, and its key."""
    folder, key = tmp_path_factory.mktemp("tls"), ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)]), datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "db.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "db.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "db.crt", folder / "db.key"


@pytest.fixture
def port(database: str, certificate: tuple[Path, Path]) -> Iterator[int]:
    """Where a server listens that speaks TLS by that certificate and hands on to the test's Postgres."""
    target = f"{dict(parse_qsl(urlsplit(database).query))['host']}/.s.PGSQL.5432"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def talk(client: socket.socket) -> None:
        with client, suppress(OSError):
            while (request := client.recv(8)) == _GSS_REQUEST:
                client.sendall(b"N")
            if request != _SSL_REQUEST:
                return
            client.sendall(b"S")
            with context.wrap_socket(client, server_side=True) as secured, socket.socket(socket.AF_UNIX) as server:
                server.connect(target)
                back = threading.Thread(target=pump, args=(server, secured), daemon=True)
                back.start()
                pump(secured, server)
                back.join(10)

    def serve() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


def remote(database: str, port: int, host: str = NAME, more: str = "") -> str:
    return f"postgresql://postgres:Pl4nted@{host}:{port}{urlsplit(database).path}?hostaddr=127.0.0.1{more}"


def test_a_server_that_proves_its_name_is_used(
    database: str, port: int, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = remote(database, port, more=f"&sslrootcert={certificate[0]}")
    monkeypatch.setenv("DATABASE_URL", url)
    told = postgres.database_url(Deployment("shop", None, datetime.now(UTC).date()))
    postgres.check(told)
    postgres.migrate(told)
    settings = read_settings({"DATABASE_URL": url, "LARDER_WRITER_URL": url, "ARTIFACTS_URL": "file:///a"})
    for each in (settings.database_url, settings.writer_url):
        store = Store(each)
        assert store.ping(5_000) is None  # who does not ask for TLS is hung up on
        store.close()
    # The authority may also be one that the machine trusts.
    environ = {
        "DATABASE_URL": remote(database, port),
        "ARTIFACTS_URL": "file:///a",
        "SSL_CERT_FILE": str(certificate[0]),
    }
    store = Store(read_settings(environ).database_url)
    assert store.ping(5_000) is None
    store.close()


@pytest.mark.parametrize("wrong", ["another name", "an authority that nobody trusts"])
def test_a_server_that_does_not_is_refused_by_commands_and_functions(
    database: str, port: int, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    if wrong == "another name":
        url = remote(database, port, "other.example", f"&sslrootcert={certificate[0]}")
    else:
        url = remote(database, port)
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(DatabaseError, match=r"certificate.*name the authority's file with sslrootcert") as refused:
        postgres.check(postgres.database_url(Deployment("shop", None, datetime.now(UTC).date())))
    assert "Pl4nted" not in str(refused.value)
    store = Store(read_settings({"DATABASE_URL": url, "ARTIFACTS_URL": "file:///a"}).database_url)
    with pytest.raises(Unavailable):
        store.ping(5_000)
    if wrong != "another name":  # whoever wants less says so (with an authority named, `require` checks it)
        less = Store(
            read_settings({"DATABASE_URL": f"{url}&sslmode=require", "ARTIFACTS_URL": "file:///a"}).database_url
        )
        assert less.ping(5_000) is None
        less.close()
