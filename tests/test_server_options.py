"""What a reward server is told: flags, the configuration file, and how mistakes in either are explained."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from reward_servers.__main__ import compute_in_full_precision, find_device
from reward_servers.errors import SetupError
from reward_servers.limits import Limits
from reward_servers.options import KEYS, Choice, parse

CONFIG = """\
scorers:
  seam:
  close_seam: {scorer: seam, near_px: 1}
limits: {max_batch_items: 8, max_delay_ms: 2.5}
scorers_from: more/scorers
device: cuda:1
host: 10.0.0.5
port: 4444
tls_certificate: server.pem
tls_key: server.key
tls_client_ca: clients.pem
token_file: token
insecure: true
reflection: true
metrics_port: 0
grace_seconds: 3
exit_with_parent: true
log_json: true
"""
FLAGS = (
    "seam close_seam=seam --set close_seam.near_px=1 --scorers-from more/scorers --device cuda:1 --host 10.0.0.5 "
    "--port 4444 --tls-certificate server.pem --tls-key server.key --tls-client-ca clients.pem --token-file token "
    "--insecure --reflection --metrics-port 0 --grace-seconds 3 --exit-with-parent --log-json"
)


@pytest.fixture
def config(tmp_path):
    return tmp_path / "server.yaml"


def test_a_configuration_file_says_the_same_as_flags(config):
    config.write_text(CONFIG)
    from_file, from_flags = parse(["--config", str(config)]), parse(FLAGS.split())
    assert from_file.limits == Limits(max_batch_items=8, max_delay_ms=2.5)
    assert dataclasses.replace(from_file, limits=Limits()) == from_flags
    assert from_flags.scorers == {"seam": Choice("seam", {}), "close_seam": Choice("seam", {"near_px": "1"})}
    unchanged = parse(["seam"])
    assert all(getattr(from_flags, key) != getattr(unchanged, key) for key in KEYS)  # none was forgotten here


def test_flags_win_over_the_file_and_add_to_its_scorers(config):
    config.write_text(CONFIG)
    flags = ["ring=ring_texture", "--set", "close_seam.near_px=4", "--port", "0", "--no-insecure", "--device", "cpu"]
    options = parse(["--config", str(config), *flags])
    assert list(options.scorers) == ["seam", "close_seam", "ring"]
    assert options.scorers["close_seam"].settings == {"near_px": "4"}
    assert options.scorers["ring"] == Choice("ring_texture", {})
    assert (options.port, options.insecure, options.device) == (0, False, "cpu")
    assert (options.host, options.reflection) == ("10.0.0.5", True)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prt: 5", "server.yaml:1: prt is an unknown key. Did you mean 'port'? Allowed here: scorers_from, device,"),
        ("host: a\nport: x", "server.yaml:2: port must be a whole number from 0 to 65535, found 'x'."),
        ("port: 70000", "server.yaml:1: port must be a whole number from 0 to 65535, found '70000'."),
        ("port: [1]", "server.yaml:1: port must be a single value, found a list."),
        ("port:", "server.yaml:1: port has no value."),
        ("port: 1\nport: 2", "server.yaml:2: port is there twice."),
        ("grace_seconds: .nan", "server.yaml:1: grace_seconds must be a number from 0 to 3600, found '.nan'."),
        ("insecure: yes", "server.yaml:1: insecure must be true or false, found 'yes'."),
        ("limits: {max_delay: 3}", "limits.max_delay is an unknown key. Did you mean 'max_delay_ms'?"),
        ("limits: {max_delay_ms: -1}", "limits.max_delay_ms must be a number of at least 0, found '-1'."),
        ("limits: {max_batch_items: 0}", "max_batch_items must be positive"),
        ("limits: 5", "server.yaml:1: limits must be a mapping of KEY: VALUE, found '5'."),
        ("scorers: [seam]", "server.yaml:1: scorers must be a mapping of KEY: VALUE, found a list."),
        ("scorers: {ring: {near_px:}}", "server.yaml:1: scorers.ring.near_px has no value."),
        ("scorers: {a b: {scorer: seam}}", "'a b' is no name to serve a scorer under"),
        ("scorers: {seam: {}}", "The scorer seam is named twice."),
        ("- seam", "must be a mapping of KEY: VALUE, found a list."),
        ("a: [", "server.yaml is not YAML: while parsing a flow node"),
        ("!!python/object/apply:os.abort []", "must be a mapping of KEY: VALUE, found a list."),
    ],
)
def test_mistakes_in_the_file_are_told_in_a_sentence(text, sentence, config):
    config.write_text(text)
    with pytest.raises(SetupError) as caught:
        parse(["seam", "--config", str(config)])
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "There is no scorer to serve."),
        ("seam seam", "The scorer seam is named twice."),
        ("seam=", "seam= must read NAME or SERVED=NAME."),
        ("=seam", "'' is no name to serve a scorer under"),
        ("seam --port x", "--port must be a whole number from 0 to 65535, found 'x'."),
        ("seam --set sean.near_px=4", "--set sean.near_px=4 must read SERVED.KEY=VALUE, with a scorer among seam."),
        ("seam --config nowhere.yaml", "The configuration nowhere.yaml cannot be read: No such file or directory."),
    ],
)
def test_mistakes_on_the_command_line_are_told_in_a_sentence(arguments, sentence):
    with pytest.raises(SetupError) as caught:
        parse(arguments.split())
    assert sentence in str(caught.value)


def test_devices_are_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [find_device(text) for text in ("cpu", "cuda", "cuda:0")] == [
        torch.device(text) for text in ("cpu", "cuda", "cuda:0")
    ]
    for text in ("gpu", "cpu:1", "meta", "cuda:", "cuda:-1", "cudax:0", ""):
        with pytest.raises(SetupError, match="must be cpu, cuda or cuda:N"):
            find_device(text)
    with pytest.raises(SetupError, match="cuda:1 asks for a GPU that is not there: PyTorch sees 1 "):
        find_device("cuda:1")


def test_fp32_is_not_shortened(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    compute_in_full_precision()
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
