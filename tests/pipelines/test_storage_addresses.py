"""Keys, addresses and options: what they may not reach, and what they may not show."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import storage
from pipelines.disk import NO_FAULTS
from pipelines.errors import InputError, StoreError
from pipelines.storage import Store
from tests.conftest import S3Server

CANARY = "canary-3f9a7c"


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store.open(tmp_path / "root")
    server: S3Server = request.getfixturevalue("s3")
    return Store.open(f"s3://{server.bucket()}/some/prefix", options=server.options)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "a/../b",
        "../a",
        "a/./b",
        "a b",
        "a\\b",
        "a\nb",
        "a\n",
        "ä",
        "a/%2e",
        "a/.tmp-1",
        "a" * 513,
        "~",
        "a:b",
    ],
)
def test_a_key_that_could_be_something_else_is_refused(store: Store, key: str) -> None:
    actions: list[Callable[[str], object]] = [
        store.get,
        store.head,
        store.delete,
        lambda k: store.put(k, b""),
        lambda k: store.put_if_absent(k, b""),
    ]
    for action in actions:
        with pytest.raises(InputError, match="key"):
            action(key)


@given(key=st.text(max_size=30))
def test_an_accepted_key_stays_below_the_root(key: str) -> None:
    try:
        checked = storage._checked(key)
    except InputError:
        return
    assert Path("/root", checked).parts[1] == "root"
    assert os.path.normpath(f"/root/{checked}") == f"/root/{checked}"


def test_a_symbolic_link_cannot_lead_out_of_the_root(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/way").symlink_to(tmp_path / "outside")
    (tmp_path / "root/file").symlink_to(tmp_path / "outside/secret")
    store = Store.open(tmp_path / "root")
    for action in (
        lambda: store.get("way/secret"),
        lambda: store.get("file"),
        lambda: store.put("way/new", b""),
        lambda: store.delete("file"),
    ):
        with pytest.raises(InputError, match="symbolic link"):
            action()
    assert sorted(path.name for path in (tmp_path / "outside").iterdir()) == ["secret"]


def test_opening_touches_nothing(tmp_path: Path) -> None:
    store = Store.open(f"file://{tmp_path}/no%20such/root")
    assert store.root == f"{tmp_path}/no such/root"
    assert list(store.list()) == []
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scheme_names_the_four(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown scheme `ftp`. Use a path \(or file://\), s3://, gs:// or az://"):
        Store.open("ftp://host/x")


@pytest.mark.parametrize(
    "url",
    [
        f"s3://key:{CANARY}@bucket/p",
        f"s3://bucket/p?token={CANARY}",
        f"ftp://u:{CANARY}@host/",
        f"gs://bucket/p#{CANARY}",
        "s3://",
        "file://host/x",
    ],
)
def test_an_address_with_a_credential_or_without_a_place_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(InputError) as caught:
        Store.open(url)
    assert CANARY not in str(caught.value)


def test_gs_and_az_open_with_their_options() -> None:
    assert Store.open("gs://bucket/p/").uri("a/b") == "gs://bucket/p/a/b"
    assert Store.open("az://container/p", options={"account_name": "a", "account_key": "AAAA"}).root == "az://container/p"


def test_an_unknown_option_is_named_and_no_value_is_shown() -> None:
    with pytest.raises(InputError, match="secret_acess_key") as caught:
        Store.open("s3://b/p", options={"secret_acess_key": CANARY})
    assert CANARY not in str(caught.value)


def test_no_credential_reaches_a_repr_or_an_error(s3: S3Server) -> None:
    options = {**s3.options, "secret_access_key": CANARY, "access_key_id": f"id-{CANARY}"}
    store = Store.open("s3://no-such-bucket/p", options=options)
    messages = [repr(store), str(store)]
    actions: tuple[Callable[[], object], ...] = (
        lambda: store.put("a", b""), lambda: store.put_if_absent("a", b""), lambda: store.get("a"), lambda: [*store.list()], store.probe,
    )  # fmt: skip
    for action in actions:
        with pytest.raises(StoreError) as caught:
            action()
        assert caught.value.__suppress_context__
        messages.append(str(caught.value))
    assert "Check that the bucket exists" in messages[2]
    assert not [message for message in messages if CANARY in message]


def test_a_secret_that_upstream_repeats_is_masked() -> None:
    # obstore quotes a wrong `conditional_put`; the same value as a token shows that values are masked, not names.
    with pytest.raises(InputError, match=r"cannot open s3://b/p: .*\*\*\*") as caught:
        Store.open("s3://b/p", options={"session_token": CANARY, "conditional_put": CANARY})
    assert CANARY not in str(caught.value)


def test_a_signed_address_loses_its_signature_in_an_error() -> None:
    options = {"account_name": "a", "sas_key": f"sig={CANARY}&se=2027", "endpoint": "http://127.0.0.1:9", "allow_http": "true"}
    store = Store.open("az://container/p", options=options)
    with pytest.raises(StoreError, match="cannot read az://container/p/a: ") as caught:
        store.get("a")
    assert CANARY not in str(caught.value)
    assert caught.value.__suppress_context__
    # Today obstore hides such an address itself; the mask below does not rely on it.
    bucket = storage.Bucket("s3://b", {}, NO_FAULTS)
    message = bucket._scrubbed(OSError(f"GET https://u:{CANARY}@host/x?sig={CANARY} failed\nDebug: {CANARY}"))
    assert message == "GET https://host/x failed."
