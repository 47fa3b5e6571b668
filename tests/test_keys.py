"""Keys: what is made has the modes, names and dates that it should; a directory that is no good is refused by name."""

import json
import os
import re
import stat
import subprocess
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thinpipe.cli import app
from thinpipe.node.security import certificates
from thinpipe.node.security.certificates import (
    CertificateError,
    Flaw,
    all_lanes_name,
    judge,
    parse,
    read,
    run_label,
    spell_numbers,
)
from thinpipe.node.security.key_directory import KeysError, describe, init, issue, load, parse_stages
from thinpipe.node.security.policy import PLAIN, Security, choose
from thinpipe.protocol.grid_place import GridPlace, grid
from typer.testing import CliRunner

NOW = datetime(2030, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    init("my-run", tmp_path / "keys", days=365, now=NOW)
    return tmp_path / "keys"


@pytest.fixture
def node(authority: Path, tmp_path: Path) -> Path:
    issue([0, 1, 2, 3], authority, tmp_path / "node", days=30, now=NOW)
    return tmp_path / "node"


# -- what is made -----------------------------------------------------------------------------------------------------


def test_modes_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        init("r", tmp_path / "keys", days=365, now=NOW)
        issue([0], tmp_path / "keys", tmp_path / "node", days=30, now=NOW)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert (modes["keys"], modes["node"]) == (0o700, 0o700)
    assert (modes["authority.key"], modes["node.key"]) == (0o600, 0o600)
    assert (modes["authority.crt"], modes["node.crt"]) == (0o644, 0o644)


def test_a_certificate_names_run_and_stages(node: Path) -> None:
    certificate = parse((node / "node.crt").read_bytes())
    said = read(certificate)
    assert (said.run, said.stages, said.lanes, said.authority) == ("my-run", (0, 1, 2, 3), (), False)
    assert said.names == {"my-run.thinpipe", *(f"*.stage-{stage}.my-run.thinpipe" for stage in range(4))}
    assert (said.begins, said.ends) == (NOW - timedelta(hours=1), NOW + 30 * DAY)
    assert certificate.subject.rfc4514_string() == "CN=stages 0-3,O=my-run"
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"


def test_a_certificate_for_some_lanes_names_each_place(authority: Path, tmp_path: Path) -> None:
    """And one for all lanes a wildcard, so that whoever dials a place asks for one name, whichever was issued."""
    issue([1, 2], authority, tmp_path / "some", lanes=[0, 3], days=30, now=NOW)
    said = read(parse((tmp_path / "some" / "node.crt").read_bytes()))
    places = [f"lane-{lane}.stage-{stage}.my-run.thinpipe" for stage in (1, 2) for lane in (0, 3)]
    assert said.names == {"my-run.thinpipe", *places}
    assert (said.stages, said.lanes, str(said)) == ((1, 2), (0, 3), "stages 1-2 of lanes 0,3 of run 'my-run'")
    load(tmp_path / "some", now=NOW, run="my-run", places=[GridPlace(1, 3), GridPlace(2, 0)])
    wrong = (
        r"is for stages 1-2 of lanes 0,3 of run 'my-run', not for stage 2 of lane 1; issue one that names it: .* 2 …"
    )
    with pytest.raises(KeysError, match=wrong):
        load(tmp_path / "some", now=NOW, run="my-run", places=[GridPlace(2, 1)])
    assert describe(tmp_path / "some", now=NOW)["lanes"] == "0,3"


def test_no_name_of_a_place_stands_for_another(node: Path) -> None:
    said = read(parse((node / "node.crt").read_bytes()))
    assert said.serves("my-run", GridPlace(3, 63))
    assert not said.serves("my-run", GridPlace(4))
    assert not said.serves("other", GridPlace(0))


def test_another_library_takes_them(node: Path) -> None:
    """OpenSSL, as gRPC's and Python's own: for a client and for a server, at that moment and not after it."""
    verify = ["openssl", "verify", "-x509_strict", "-CAfile", str(node / "authority.crt")]
    for purpose in ("sslserver", "sslclient"):
        for days, ends in ((1, 0), (31, 2)):
            at = str(int((NOW + days * DAY).timestamp()))
            done = subprocess.run(
                [*verify, "-purpose", purpose, "-attime", at, str(node / "node.crt")], capture_output=True, check=False
            )
            assert done.returncode == ends, done.stderr


def test_a_run_whose_name_is_no_dns_label_has_a_digest() -> None:
    assert run_label("my-run2") == "my-run2"
    odd = ["My-Run", "run_1", "a.b", "-a", "a-", "x" * 64, f"sha256-{'0' * 40}"]
    labels = [run_label(run) for run in odd]
    assert len(set(labels)) == len(odd)
    for label in labels:
        assert re.fullmatch(r"sha256-[0-9a-f]{40}", label)
    assert run_label(labels[0]) != labels[0]  # nobody takes another run's name by calling his so


@given(st.sets(st.integers(0, 1023), min_size=1, max_size=256))
def test_stages_are_spelled_and_read_back(stages: set[int]) -> None:
    assert parse_stages(spell_numbers(stages)) == sorted(stages)


@given(st.text(max_size=20))
def test_stages_of_any_text_are_refused_or_read(text: str) -> None:
    with suppress(KeysError):
        assert all(0 <= stage <= 1023 for stage in parse_stages(text))


@given(st.binary(max_size=200))
def test_no_bytes_but_a_certificate_are_one(data: bytes) -> None:
    with pytest.raises(CertificateError):
        parse(data)


def test_a_certificate_of_a_version_that_there_is_not(node: Path) -> None:
    certificate = parse((node / "node.crt").read_bytes()).public_bytes(Encoding.DER)
    version = bytes.fromhex("a003020102")  # [0] INTEGER 2, which is X.509 v3
    assert certificate.count(version) == 1
    with pytest.raises(CertificateError, match="no certificate"):
        parse(certificate.replace(version, version[:-1] + b"\x05"))


@given(st.integers(0, 2**16), st.integers(1, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # what a flipped sign gives is for the verdict to refuse
def test_a_damaged_certificate_is_judged_or_refused(node: Path, at: int, flip: int) -> None:
    """Whatever a peer shows: a verdict, or CertificateError."""
    damaged = bytearray(parse((node / "node.crt").read_bytes()).public_bytes(Encoding.DER))
    damaged[at % len(damaged)] ^= flip
    authority = parse((node / "authority.crt").read_bytes())
    with suppress(CertificateError):
        judge(parse(bytes(damaged)), authority, run="my-run", place=GridPlace(1), now=NOW)


def test_nothing_is_overwritten(authority: Path, node: Path) -> None:
    before = {path: path.read_bytes() for path in (*authority.iterdir(), *node.iterdir())}
    for make in (
        lambda: init("my-run", authority, days=1, now=NOW),
        lambda: issue([0], authority, node, days=1, now=NOW),
        lambda: issue([0], authority, authority, days=1, now=NOW),  # authority.crt is there
    ):
        with pytest.raises(KeysError, match=r"is there already and is not overwritten; choose another --out"):
            make()
    assert {path: path.read_bytes() for path in (*authority.iterdir(), *node.iterdir())} == before


# -- what is refused --------------------------------------------------------------------------------------------------


def foreign(node: Path, what: str) -> None:
    """Put a file of another authority's into the directory."""
    other = node.parent / "other"
    init("my-run", other, days=365, now=NOW)
    issue([0, 1, 2, 3], other, other / "node", days=30, now=NOW)
    (node / what).write_bytes((other / "node" / what).read_bytes())


def encrypted(node: Path) -> None:
    key = certificates.new_key()
    form = (Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (node / "node.key").write_bytes(key.private_bytes(*form))


def of_rsa(node: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (node / "node.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def unnamed(node: Path) -> None:
    """A certificate of the authority's that names no run."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "somebody")])
    issuer = parse((node / "authority.crt").read_bytes()).subject
    signing, own = (
        load_pem_private_key(path.read_bytes(), None)
        for path in (node.parent / "keys" / "authority.key", node / "node.key")
    )
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    assert isinstance(own, ec.EllipticCurvePrivateKey)
    unsigned = certificates._unsigned(name, issuer, own.public_key(), NOW, NOW + DAY)
    (node / "node.crt").write_bytes(certificates.pem(unsigned.sign(signing, certificates.SHA256())))


def swap(node: Path) -> None:
    """The authority's certificate is a node's."""
    (node / "authority.crt").write_bytes((node / "node.crt").read_bytes())


Spoil = Callable[[Path], object]
BAD: dict[str, tuple[Spoil, str]] = {
    "no directory": (lambda d: d.rename(d.parent / "away"), r"node is no directory of keys: there is none; issue one"),
    "no certificate": (
        lambda d: (d / "node.crt").unlink(),
        r"node\.crt is missing; issue one with thinpipe keys issue",
    ),
    "no key": (lambda d: (d / "node.key").unlink(), r"node\.key is missing; issue one"),
    "no authority": (
        lambda d: (d / "authority.crt").unlink(),
        r"authority\.crt is missing; node\.crt and authority\.crt",
    ),
    "the authority's own": (
        lambda d: ((d / "node.crt").unlink(), (d / "authority.key").touch()),
        r"holds the authority's key, which no node needs; issue a node's directory",
    ),
    "writable by the group": (
        lambda d: (d / "node.key").chmod(0o660),
        r"node\.key can be read or written by others \(mode 0660\); say: chmod 600 ",
    ),
    "readable by all": (lambda d: (d / "node.key").chmod(0o604), r"\(mode 0604\)"),
    "a directory": (
        lambda d: ((d / "node.key").unlink(), (d / "node.key").mkdir()),
        r"cannot read .*node\.key: Is a directory",
    ),
    "text for a certificate": (
        lambda d: (d / "node.crt").write_text("hello"),
        r"node\.crt: it is no certificate; issue",
    ),
    "nothing for a certificate": (lambda d: (d / "node.crt").write_text(""), r"node\.crt: it is no certificate; issue"),
    "half a certificate": (
        lambda d: (d / "node.crt").write_bytes((d / "node.crt").read_bytes()[:300]),
        r"node\.crt: it is no certificate; issue",
    ),
    "a huge file": (lambda d: (d / "node.crt").write_bytes(bytes(2**20)), r"node\.crt has more than 262144 bytes"),
    "text for a key": (lambda d: (d / "node.key").write_text("hello"), r"node\.key is no private key in PEM"),
    "a key with a password": (encrypted, r"node\.key is no private key in PEM without a password"),
    "a key of RSA": (of_rsa, r"node\.key is not a key on an elliptic curve"),
    "another's key": (lambda d: foreign(d, "node.key"), r"node\.key is not the key of the certificate beside it"),
    "another's certificate": (
        lambda d: foreign(d, "authority.crt"),
        r"the certificate is from another authority than this run's; node\.crt and authority\.crt have to come",
    ),
    "a certificate of no run": (
        unnamed,
        r"the certificate cannot be used: it does not name a run of thinpipe; issue one",
    ),
    "a node's certificate for the authority's": (swap, r"authority\.crt is not an authority's certificate"),
}


@pytest.mark.parametrize(("spoil", "expected"), BAD.values(), ids=BAD)
def test_a_directory_that_is_no_good(spoil: Spoil, expected: str, node: Path) -> None:
    load(node, now=NOW, run="my-run", places=[GridPlace(0)])
    spoil(node)
    with pytest.raises(KeysError, match=expected) as caught:
        load(node, now=NOW, run="my-run", places=[GridPlace(0)])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("mode", [0o440, 0o640])
def test_a_group_may_read_a_key_of_root_or_of_this_user_and_of_nobody_else(
    mode: int, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As secrets are mounted into a container: root's, readable by the group that the node is in."""
    (node / "node.key").chmod(mode)
    load(node, now=NOW)
    owner = (node / "node.key").stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner:
        with pytest.raises(KeysError, match=rf"its group \(mode 0{mode:o}\) and belongs to another user"):
            load(node, now=NOW)
    else:
        load(node, now=NOW)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_of_another_user_that_a_group_reads_is_refused(node: Path) -> None:
    (node / "node.key").chmod(0o440)
    os.chown(node / "node.key", 12345, 12345)
    with pytest.raises(KeysError, match=r"belongs to another user \(uid 12345\); make root or this user its owner"):
        load(node, now=NOW)


MOMENTS = {
    "as issued": (NOW, None),
    "clocks differ": (NOW - timedelta(minutes=59), None),
    "not yet": (NOW - timedelta(hours=2), r"is not valid before 2029-12-31 23:00 UTC; is this machine's clock right\?"),
    "the last moment": (NOW + 30 * DAY - timedelta(seconds=1), None),
    "over": (NOW + 30 * DAY, r"expired on 2030-01-31 00:00 UTC; issue a new one, into a new directory"),
}


@pytest.mark.parametrize(("moment", "expected"), MOMENTS.values(), ids=MOMENTS)
def test_dates(moment: datetime, expected: str | None, node: Path) -> None:
    if expected is None:
        load(node, now=moment)
    else:
        with pytest.raises(KeysError, match=expected):
            load(node, now=moment)


def test_another_run_and_other_stages(node: Path) -> None:
    load(node, now=NOW, run="my-run", places=grid(4, 1))
    with pytest.raises(
        KeysError, match=r"is for run 'my-run', not for 'another'; issue one with the authority of this"
    ):
        load(node, now=NOW, run="another", places=[GridPlace(0)])
    with pytest.raises(KeysError, match=r"is for stages 0-3 of run 'my-run', not for stage 4; issue one that names it"):
        load(node, now=NOW, run="my-run", places=[GridPlace(3), GridPlace(4)])


def test_an_authority_that_is_over_takes_its_certificates_with_it(tmp_path: Path) -> None:
    made = certificates.new_key()
    short = certificates.make_authority("r", made, now=NOW, days=1)
    own = certificates.new_key()
    long = certificates.make_certificate([0], own.public_key(), short, made, now=NOW, days=30)
    flaw = judge(long, short, run="r", place=GridPlace(0), now=NOW + 2 * DAY)
    assert flaw == (Flaw.EXPIRED, "expired on 2030-01-02 00:00 UTC, as the authority's own")
    init("r", tmp_path / "keys", days=10, now=NOW)
    with pytest.raises(KeysError, match=r"--days 30: the authority in .* itself ends on .*; say --days 10 or fewer"):
        issue([0], tmp_path / "keys", tmp_path / "node", days=30, now=NOW)
    with pytest.raises(KeysError, match=r"the authority in .* ends on .*; make another: keys init"):
        issue([0], tmp_path / "keys", tmp_path / "node", days=1, now=NOW + 9 * DAY + timedelta(hours=1))


# -- the commands -----------------------------------------------------------------------------------------------------


def said_by(arguments: list[str], exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == exit_code, result.output
    if exit_code != 2:
        return result.stdout
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("thinpipe: error: ")
    return line


def test_from_authority_to_show(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[run]\nname = 'My_Run'\n")
    keys, node = str(tmp_path / "keys"), str(tmp_path / "node-a")
    assert "authority of run 'My_Run'" in said_by(["keys", "init", "--config", f"{tmp_path}/run.toml", "--out", keys])
    shown = said_by(["keys", "issue", "--stages", "0-3,7", "--authority", keys, "--out", node, "--days", "3"])
    assert "for stages 0-3,7 of run 'My_Run', until " in shown
    shown = said_by(["keys", "show", node])
    assert "run       My_Run" in shown
    assert "stages    0-3,7" in shown
    assert "(3 days left)" in shown
    found = json.loads(said_by(["keys", "show", node, "--json"]))
    assert (found["kind"], found["run"], found["stages"], found["problem"]) == ("node", "My_Run", "0-3,7", None)
    assert all_lanes_name("My_Run", 7) in found["names"]
    assert json.loads(said_by(["keys", "show", keys, "--json"]))["kind"] == "authority"


def test_show_says_what_is_wrong_and_ends_with_1(node: Path, authority: Path) -> None:
    assert describe(node, now=NOW)["problem"] is None
    assert "expired" in describe(node, now=NOW + 40 * DAY)["problem"]
    assert "the authority ended" in describe(authority, now=NOW + 400 * DAY)["problem"]
    result = CliRunner().invoke(app, ["keys", "show", str(node)])  # not valid yet: it is of 2030
    assert result.exit_code == 1
    assert "is not valid before 2029-12-31 23:00 UTC" in result.stderr
    (node / "node.key").chmod(0o644)
    assert "chmod 600" in describe(node, now=NOW)["problem"]


WRONG = [
    (["keys", "init"], r"say whose authority: --run NAME or --config run\.toml"),
    (["keys", "init", "--run", "a", "--config", "run.toml"], r"say whose authority"),
    (["keys", "init", "--run", "no spaces", "--out", "{dir}/x"], r"run\.name: "),
    (["keys", "init", "--run", "a", "--out", "{dir}/x", "--days", "0"], r"--days 0 is not between 1 and 36500"),
    (["keys", "init", "--run", "a", "--out", "/proc/x"], r"cannot write keys in /proc/x: .*; choose another --out"),
    (["keys", "init", "--run", "a", "--out", "{dir}/file"], r"cannot write keys in .*file: .*; choose another --out"),
    (
        ["keys", "issue", "--stages", "0", "--out", "{dir}/x", "--authority", "{dir}/none"],
        r"none is no directory of keys",
    ),
    (
        ["keys", "issue", "--stages", "0", "--out", "{dir}/x", "--authority", "{dir}"],
        r"authority\.crt is missing; make one",
    ),
    (["keys", "issue", "--stages", "3-1", "--out", "{dir}/x"], r"--stages: '3-1' runs backwards; say 1-3"),
    (["keys", "issue", "--stages", "1-", "--out", "{dir}/x"], r"--stages: '1-' is not stages from 0 to 1023"),
    (["keys", "issue", "--stages", "1024", "--out", "{dir}/x"], r"--stages: '1024' is not stages from 0 to 1023"),
    (
        ["keys", "issue", "--stages", "0", "--lanes", "64", "--out", "{dir}/x"],
        r"'64' is not lanes from 0 to 63, such as",
    ),
    (
        ["keys", "issue", "--stages", "0", "--lanes", "2-1", "--out", "{dir}/x"],
        r"--lanes: '2-1' runs backwards; say 1-2",
    ),
    (
        ["keys", "issue", "--stages", "0-127", "--lanes", "0-3", "--authority", "{dir}", "--out", "{dir}/x"],
        r"128 stages of 4 lanes are 512 places; a certificate names 256 at most: issue several, or omit --lanes",
    ),
    (["keys", "issue", "--stages", "0-300", "--out", "{dir}/x"], r"301 stages; a certificate names 256 at most"),
    (["keys", "show", "{dir}/none"], r"none is no directory of keys"),
    (["keys", "show", "{dir}"], r"node\.crt is missing"),
    (["node", "--config", "{dir}/run.toml", "--stage", "1", "--listen", "0.0.0.0:0"], r"needs --keys DIR"),
    (
        ["node", "--config", "{dir}/run.toml", "--stage", "0", "--next", "10.9.8.7:1"],
        r"--next 10\.9\.8\.7:1 connects to other machines",
    ),
    (
        ["node", "--config", "{dir}/run.toml", "--stage", "0", "--next", "[::1]:1", "--keys", "{dir}/none"],
        r"no directory",
    ),
    (
        ["node", "--config", "{dir}/run.toml", "--stage", "0", "--next", "[::1]:1", "--keys", "{dir}", "--insecure"],
        r"--keys and --insecure contradict each other; omit one",
    ),
    (["probe", "--listen", "0.0.0.0:0"], r"--listen 0\.0\.0\.0:0 connects to other machines, so it needs --keys DIR"),
    (["probe", "--to", "10.9.8.7:1"], r"--to 10\.9\.8\.7:1 connects to other machines, so it needs --keys DIR"),
    (["probe", "--to", "127.0.0.1:1", "--keys", "{dir}/none"], r"none is no directory of keys"),
    (["up", "--one-process", "--keys", "{dir}", "--out", "{dir}/run"], r"--keys: one process has no links to secure"),
    (["up", "--keys", "{dir}/none", "--out", "{dir}/run"], r"none is no directory of keys"),
]


@pytest.mark.parametrize(("arguments", "expected"), WRONG, ids=lambda value: " ".join(value) if value[1:] else "")
def test_wrong_use_is_one_line(arguments: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run.toml").write_text("[pipeline]\nstages = 2\n")
    line = said_by([each.format(dir=tmp_path) for each in arguments], 2)
    assert re.search(expected, line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run.toml"]


def test_what_stays_on_this_machine_needs_no_keys(node: Path) -> None:
    for address in ("127.0.0.1:7001", "127.8.9.10:7001", "[::1]:7001", "localhost:7001"):
        assert choose(None, insecure=False, listen=address, dial=address) == PLAIN
    for address in ("0.0.0.0:7001", "[::]:7001", "10.77.0.1:7001", "localhost.example:7001", "[::ffff:127.0.0.1]:7001"):
        for where in ({"listen": address}, {"dial": address}):
            with pytest.raises(KeysError, match="connects to other machines"):
                choose(None, insecure=False, **where)
            assert choose(None, insecure=True, **where) == Security(insecure=True)
            assert choose(node, insecure=False, run="my-run", places=[GridPlace(1)], now=NOW, **where).keys
