"Signatures of localnet against openssl and ccxt, and its readers against any text"
import base64
import json
import shutil
import subprocess

import ccxt
import ccxt.pro
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from tradelab.localnet.protocol import (
    RequestDeniedError,
    check_browser,
    check_signature,
    check_time,
    check_ws_signature,
    chosen,
    find_key,
    flag,
    is_signature,
    listed,
    number,
    parameters,
    read_json,
    records,
    signature,
    signed_payload,
    texts,
    whole,
)

SECRET = "2b5eb11e18796d12d88f13dc27dbbd02c2cc51ff7059765ed9821957d82bb4d9"
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PRIVATE_PEM = PRIVATE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
PUBLIC_PEM = PRIVATE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
PAYLOADS = ["timestamp=1", "symbol=BTCUSDT&note=a%20b%C3%BC&timestamp=1591702613943", "x=" + "y" * 5000]

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")


def openssl(*words, text):
    return subprocess.run(["openssl", *words], input=text.encode(), capture_output=True, check=True).stdout


@needs_openssl
@pytest.mark.parametrize("payload", PAYLOADS)
def test_hmac_is_what_openssl_says(payload):
    expected = openssl("dgst", "-sha256", "-hmac", SECRET, text=payload).decode().split()[-1]
    assert signature(SECRET, payload) == expected
    check_signature(SECRET, f"{payload}&signature={expected}")


@needs_openssl
@pytest.mark.parametrize("payload", PAYLOADS)
def test_ed25519_of_openssl_is_accepted(payload, tmp_path):
    private, sent, public = tmp_path / "private.pem", tmp_path / "sent", tmp_path / "public.pem"
    openssl("genpkey", "-algorithm", "ed25519", "-out", private, text="")
    openssl("pkey", "-in", private, "-pubout", "-out", public, text="")
    sent.write_text(payload)
    signed = openssl("pkeyutl", "-sign", "-rawin", "-inkey", private, "-in", sent, text="")
    encoded = base64.b64encode(signed).decode()
    assert is_signature(encoded, public.read_text(), payload)
    assert not is_signature(encoded, PUBLIC_PEM, payload)


def signed_by_ccxt(secret, path, method, asked):
    "Query and body as ccxt sends them"
    sent = ccxt.binanceusdm({"apiKey": "key", "secret": secret}).sign(path, ["fapiPrivate"], method, asked)
    return sent["url"].partition("?")[2], sent["body"] or ""


ORDER = {"symbol": "BTCUSDT", "side": "BUY", "type": "LIMIT", "quantity": "0.1", "price": "20000.1",
         "newClientOrderId": "x/a:b.c_d-1", "reduceOnly": True, "note": "ü & =+%"}


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize("secret, held", [(SECRET, SECRET), (PRIVATE_PEM, PUBLIC_PEM)], ids=["hmac", "ed25519"])
def test_what_ccxt_signs_is_accepted_and_read(method, secret, held):
    query, body = signed_by_ccxt(secret, "order", method, ORDER)
    check_signature(held, query, body)
    sent = parameters(query, body)
    assert {name: sent[name] for name in ORDER} == ORDER | {"reduceOnly": "true"}
    with pytest.raises(RequestDeniedError, match="Signature"):
        check_signature(held, query.replace("BUY", "SELL"), body.replace("BUY", "SELL"))
    with pytest.raises(RequestDeniedError, match="Signature"):
        check_signature(PUBLIC_PEM if held == SECRET else SECRET, query, body)


@pytest.mark.parametrize("secret, held", [(SECRET, SECRET), (PRIVATE_PEM, PUBLIC_PEM)], ids=["hmac", "ed25519"])
def test_lists_of_ccxt_are_read(secret, held):
    query, body = signed_by_ccxt(secret, "batchOrders", "DELETE", {"symbol": "BTCUSDT", "orderidlist": ["1", "2"]})
    check_signature(held, query, body)
    assert listed(parameters(query, body), "orderIdList", "orderidlist") == ["1", "2"]
    query, body = signed_by_ccxt(secret, "batchOrders", "DELETE", {"origclientorderidlist": ["a-1", "b:2"]})
    assert listed(parameters(query, body), "origclientorderidlist") == ["a-1", "b:2"]
    query, body = signed_by_ccxt(secret, "batchOrders", "POST", {
        "batchOrders": [ORDER | {"note": note} for note in ("ü", "[,]")]})
    check_signature(held, query, body)
    assert records(parameters(query, body), "batchOrders") == [
        ORDER | {"reduceOnly": "true", "note": note} for note in ("ü", "[,]")]


@pytest.mark.parametrize("secret, held", [(SECRET, SECRET), (PRIVATE_PEM, PUBLIC_PEM)], ids=["hmac", "ed25519"])
def test_what_ccxt_signs_for_the_websocket_api_is_accepted(secret, held):
    params = ccxt.pro.binanceusdm({"apiKey": "key", "secret": secret}).sign_params(dict(ORDER))
    check_ws_signature(held, params)
    with pytest.raises(RequestDeniedError, match="Signature"): check_ws_signature(held, params | {"side": "SELL"})


NAMES = st.text("abcdefgXYZ", min_size=1, max_size=8).filter(lambda name: name.lower() != "signature")
LINES = st.dictionaries(NAMES, st.text(max_size=20), max_size=6).map(
    ccxt.Exchange.urlencode)


@settings(max_examples=200)
@given(LINES, LINES, st.sampled_from((SECRET, PRIVATE_PEM)))
def test_any_split_into_query_and_body_verifies_and_any_change_does_not(query, body, secret):
    held = SECRET if secret == SECRET else PUBLIC_PEM
    given = (signature(SECRET, query, body) if secret == SECRET
             else ccxt.Exchange.eddsa(signed_payload(query, body).encode(), secret, "ed25519"))
    quoted = ccxt.Exchange.encode_uri_component(given)
    for sent in ((f"{query}&signature={quoted}", body), (query, f"{body}&signature={quoted}"),
                 (f"signature={quoted}&{query}", body)):
        check_signature(held, *sent)
        with pytest.raises(RequestDeniedError): check_signature(held, sent[0] + "&extra=1", sent[1])


@pytest.mark.parametrize("query, body, expected", [
    ("symbol=A&side=BUY", "", {"symbol": "A", "side": "BUY"}),                      # connector: all in the query
    ("", "symbol=A&side=BUY", {"symbol": "A", "side": "BUY"}),                      # ccxt, python-binance
    ("symbol=A", "side=BUY&symbol=B", {"symbol": "A", "side": "BUY"}),              # the query wins
    ("reduceOnly=True", "", {"reduceOnly": "True"}),                                # NautilusTrader
    ("batchOrders=%7B%22a%22%3A1%7D&batchOrders=%7B%22a%22%3A2%7D", "", {"batchOrders": '{"a":1},{"a":2}'}),
    ("&&=&a", "=b&", {"": "", "a": ""}), ("a=%ff%00", "", {"a": "\ufffd\0"})])
def test_parameters_of_all_clients(query, body, expected): assert parameters(query, body) == expected


ANY = st.text(st.characters(exclude_categories=()), max_size=60) | st.text("[]{},:\"'=&%+-.0123456789eNaIfity\\ ",
                                                                            max_size=40)


@settings(max_examples=1000)
@given(ANY, ANY)
def test_any_text_is_read_or_refused(first, second):
    "Nothing but a refusal leaves the readers, and what they return has a plain form"
    held = {"a": first, "symbol": second}
    for read in (lambda: parameters(first, second), lambda: listed(held, "a"), lambda: records(held, "a"),
                 lambda: whole(held, "a"), lambda: number(held, "a"), lambda: flag(held, "a"), lambda: texts(held),
                 lambda: chosen(held, "a", ("BUY", "SELL")), lambda: check_time({"timestamp": first}, 0),
                 lambda: check_signature(SECRET, first, second), lambda: check_signature(PUBLIC_PEM, first, second),
                 lambda: check_ws_signature(SECRET, held | {"signature": first}), lambda: find_key({}, first),
                 lambda: check_browser(first, second), lambda: check_browser("127.0.0.1", "http://" + first)):
        try: json.dumps(read(), allow_nan=False)
        except RequestDeniedError as refused: assert json.dumps(refused.reply) and 400 <= refused.status < 500
    try: json.dumps(read_json(first), allow_nan=False)
    except ValueError: pass
