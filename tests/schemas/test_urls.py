"""Database URLs: what may be shown of one, TLS to other machines, another user."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.urls import redacted, shown, with_role, with_tls, with_user

SECRET = "Pl4nted"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@db.example:5432/x",
        f"postgresql://me:a@b{SECRET}@db.example/x",
        f"postgresql://me:a/{SECRET}@db.example/x",
        f"postgresql://me:a?{SECRET}@db.example/x",
        f"postgresql://me:a#{SECRET}@db.example/x",
        f"postgresql://me:%5A{SECRET}%zz@db.example/x",
        f"postgresql://db.example/x?user=me&password={SECRET}&sslmode=disable",
        f"postgresql://db.example/x?sslpassword={SECRET}",
        f"mysql://me:{SECRET}@db.example/x",
        f"host=db.example password={SECRET}",
    ],
)
def test_no_form_of_a_url_shows_its_password(url: str) -> None:
    assert SECRET not in shown(url)


def test_what_is_left_of_a_url_still_names_the_place() -> None:
    assert shown("postgresql://me:secret@db.example:5432/x?sslmode=require") == (
        "postgresql://me:***@db.example:5432/x?sslmode=require"
    )
    assert shown("postgresql://postgres:@/postgres?host=/run/pg") == "postgresql://postgres:***@/postgres?host=/run/pg"
    assert shown("postgresql://db.example/x?password=secret&a=b") == "postgresql://db.example/x?password=***&a=b"


def test_a_drivers_words_lose_the_password_and_its_pieces() -> None:
    url = "postgresql://me:ab/Pl4nted%20x@db.example/x?password=Other9"
    said = 'could not translate host "Pl4nted%20x@db.example", tried "ab/Pl4nted x", Other9, ab'
    told = redacted(said, url)
    for piece in ("Pl4nted", "Other9"):
        assert piece not in told
    assert "db.example" in told


@pytest.mark.parametrize(
    ("url", "environ"),
    [
        ("postgresql://me@localhost/x", {}),
        ("postgresql://me@LOCALHOST:5433/x", {}),
        ("postgresql://me@127.0.0.1:5433/x", {}),
        ("postgresql://me@[::1]:5433/x", {}),
        ("postgresql:///x", {}),
        ("postgresql://postgres:@/postgres?host=/run/pg", {}),
        ("postgresql://me@%2Frun%2Fpg/x", {}),
        ("postgresql://me@db.example/x?sslmode=require", {}),
        ("postgresql://me@db.example/x", {"PGSSLMODE": "disable"}),
        ("postgresql:///x?service=shop", {}),
        ("mysql://db.example/x", {}),
        ("", {}),
    ],
)
def test_this_machine_and_what_says_otherwise_stay_as_they_are(url: str, environ: dict[str, str]) -> None:
    assert with_tls(url, environ) == url


@pytest.mark.parametrize(
    ("url", "environ"),
    [
        ("postgresql://me:pa%20s@db.example:5432/x", {}),
        ("postgres://me@10.0.0.7/x?connect_timeout=3", {}),
        ("postgresql://me@localhost,db.example/x", {}),
        ("postgresql://me@[2001:db8::1]:5432/x", {}),
        ("postgresql:///x?host=db.example", {}),
        ("postgresql:///x", {"PGHOST": "db.example"}),
    ],
)
def test_a_server_elsewhere_must_prove_who_it_is(url: str, environ: dict[str, str], tmp_path: Path) -> None:
    roots = tmp_path / "roots.crt"
    roots.write_text("")
    told = with_tls(url, {**environ, "SSL_CERT_FILE": str(roots), "HOME": str(tmp_path)})
    assert told.startswith(url)
    assert told.removeprefix(url)[1:] == f"sslmode=verify-full&sslrootcert={roots}"
    assert with_tls(told, environ) == told
    # An authority that is named, in the URL or where libpq looks by itself, is the one that counts.
    named = f"{url}{'&' if '?' in url else '?'}sslrootcert=/a.crt"
    assert with_tls(named, environ) == f"{named}&sslmode=verify-full"
    (tmp_path / ".postgresql").mkdir()
    (tmp_path / ".postgresql" / "root.crt").write_text("")
    assert "sslrootcert" not in with_tls(url, {**environ, "HOME": str(tmp_path)})


def test_another_user_has_no_password_and_a_role_goes_with_the_options() -> None:
    url = "postgresql://me:secret@db.example/x?host=/run/a b&options=-c%20TimeZone%3DUTC&password=p"
    assert with_user(url, "larder_writer") == (
        "postgresql://larder_writer@db.example/x?host=/run/a%20b&options=-c%20TimeZone%3DUTC"
    )
    assert with_role("postgresql://me@h/x?options=-c%20a%3Db", "r") == (
        "postgresql://me@h/x?options=-c%20a%3Db%20-c%20role%3Dr"
    )
    assert with_user("postgresql:///x", "r") == "postgresql://r@/x"
