"""The judge by a vision language model, against a small endpoint of the same protocol in a thread."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reward_servers import openai_client
from reward_servers.errors import SetupError
from reward_servers.loading import load
from reward_servers.scorer import Inputs, Need

KEY = "secret-key-0123"
Reply = tuple[int, dict[str, str], Any]


def words(**probabilities: float) -> Any:
    """A completion whose first token is one of these; a name ending in _ starts with a space."""
    likeliest = [
        {"token": f" {word[:-1]}" if word.endswith("_") else word, "logprob": math.log(probability)}
        for word, probability in probabilities.items()
    ]
    return {"choices": [{"message": {"content": "?"}, "logprobs": {"content": [{"top_logprobs": likeliest}]}}]}


def text(content: str | None) -> Any:
    return {"choices": [{"message": {"content": content}}]}


@dataclass
class Judge:
    """What the endpoint was sent, and how it replies to a question."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    reply: Callable[[str], Reply] = lambda question: (200, {}, words(yes=0.6, no=0.2))
    together: int = 0
    most_together: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forget(self) -> None:
        self.bodies.clear()
        self.headers.clear()
        self.most_together = 0

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"][-1]["text"] for body in self.bodies]


@pytest.fixture
def judge():
    """Replies to a question of the scorer's own start-up check as to any other."""
    judge = Judge()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.bodies.append(body)
                judge.headers.append((self.path, self.headers))
                judge.together += 1
                judge.most_together = max(judge.most_together, judge.together)
            status, headers, answer = judge.reply(body["messages"][0]["content"][-1]["text"])
            with judge.lock:
                judge.together -= 1
            payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield judge
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(openai_client, "FIRST_PAUSE", 0.02)


def scorer(judge, **settings):
    settings = {"base_url": judge.url, "model": "judge-7b", "deadline_s": "5"} | settings
    return load("vlm_judge", settings).scorer


def items(prompts, masks=None):
    levels = torch.randint(0, 256, (len(prompts), 3, 300, 260), generator=torch.Generator().manual_seed(0))
    if masks is None:
        masks = torch.zeros(len(prompts), 1, 300, 260)
        masks[:, :, 40:80, 100:130] = 1
    return Inputs({Need.PASTED_IMAGES: levels / 255, Need.MASKS: masks}, prompts)


def sent_images(body):
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"][:-1]]
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


def test_score_is_the_share_of_yes_among_yes_and_no(judge):
    answers = {
        "cat": words(yes=0.6, no=0.2, maybe=0.2),
        "dog": words(Yes=0.1, yes_=0.2, YES=0.1, No=0.1, no_=0.1, Not=0.4),
        "elk": words(No=0.999, the=0.001),
    }
    judge.reply = lambda question: (200, {}, next((a for p, a in answers.items() if p in question), answers["cat"]))
    scored = scorer(judge).score(items(list(answers)))
    assert scored.scores_N.tolist() == pytest.approx([0.75, 4 / 6, 0])
    assert scored.components["yes_or_no"].tolist() == pytest.approx([0.8, 0.6, 0.999])
    assert not scored.failed
    removal = scorer(judge, question="Is there a {prompt}?", invert="true").score(items(list(answers)))
    assert removal.scores_N.tolist() == pytest.approx([0.25, 2 / 6, 1])


def test_what_is_sent(judge):
    batch = items(["a {red} fox"])
    scorer(judge, view="both", question="See {prompt}?", top_logprobs="5").score(batch)
    check, body = judge.bodies
    assert judge.questions == ["See {prompt}?", "See a {red} fox?"]
    assert body["model"] == "judge-7b"
    assert body["temperature"] == 0
    assert body["max_tokens"] == 1
    assert body["logprobs"] is True
    assert body["top_logprobs"] == 5
    assert judge.headers[1][0] == "/v1/chat/completions"
    whole, crop = sent_images(body)
    levels = (batch.pasted_NCHW[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(whole, levels)
    assert np.array_equal(crop, levels[0:224, 3:227])  # around row 60, column 115, shifted down to row 0
    assert np.ptp(sent_images(check)[0]) == 0
    scorer(judge, view="mask_crop").score(batch)
    assert len(sent_images(judge.bodies[-1])) == 1


def test_it_needs_only_what_it_uses(judge):
    assert scorer(judge).info.needs == (Need.PASTED_IMAGES, Need.PROMPTS)
    plain = scorer(judge, question="Is it sharp?", view="mask_crop")
    assert plain.info.needs == (Need.PASTED_IMAGES, Need.MASKS)
    promptless = Inputs(items(["x", "y"]).tensors)
    assert not plain.score(promptless).failed
    assert scorer(judge, mode="score").info.components == ()


def test_numbers_are_parsed_and_scaled(judge):
    replies = {
        "cat": text("At first I thought Score: 2, yet\n**Score:** 4.5"),
        "dog": text("score 1"),
        "elk": text("It is lovely."),
        "fox": text("Score: 9"),
        "gnu": text(None),
        "hen": {"choices": []},
        "ibis": b"<html>gateway</html>",
    }
    judge.reply = lambda question: (200, {}, next((r for p, r in replies.items() if p in question), text("Score: 3")))
    scored = scorer(judge, mode="score", max_tokens="99").score(items(list(replies)))
    assert scored.scores_N[:2].tolist() == pytest.approx([3.5 / 4, 0])
    assert scored.scores_N[2:].isnan().all()
    assert set(scored.failed) == {2, 3, 4, 5, 6}
    assert "no number" in scored.failed[2]
    assert "It is lovely." in scored.failed[2]
    assert "9 is not in the range from 1 to 5" in scored.failed[3]
    assert "no number" in scored.failed[4]
    assert "no chat completion" in scored.failed[5]
    assert "gateway" in scored.failed[6]
    assert judge.bodies[-1]["max_tokens"] == 99
    assert "logprobs" not in judge.bodies[-1]


def test_an_answer_that_is_neither_yes_nor_no_fails_that_item_alone(judge):
    judge.reply = lambda question: (200, {}, words(The=0.95, yes=0.05) if "cat" in question else words(yes=0.5, no=0.5))
    scored = scorer(judge).score(items(["cat", "dog"]))
    assert scored.failed == {0: "the answer begins with yes or no with a probability of 0.050 only"}
    assert scored.scores_N[1].item() == 0.5


def test_requests_run_together_up_to_a_bound(judge):
    scorer_ = scorer(judge, at_once="4", question="{prompt}")
    scorer_.score(items(["first"]))
    judge.forget()
    delay = {f"{i}": 0.12 - 0.01 * i for i in range(8)}

    def slow(question):
        time.sleep(delay[question])
        return 200, {}, words(yes=float(question) / 10 + 0.1, no=0.1)

    judge.reply = slow
    scored = scorer_.score(items([str(i) for i in range(8)]))
    assert judge.most_together == 4
    expected = [(i / 10 + 0.1) / (i / 10 + 0.2) for i in range(8)]
    assert scored.scores_N.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(judge, status):
    scorer_ = scorer(judge)
    scorer_.score(items(["cat"]))
    judge.forget()
    replies = [(status, {}, b"busy"), (status, {}, b"busy"), (200, {}, words(yes=0.9, no=0.1))]
    judge.reply = lambda question: replies[min(len(judge.bodies), 3) - 1]
    scored = scorer_.score(items(["cat"]))
    assert scored.scores_N.item() == pytest.approx(0.9)
    assert len(judge.bodies) == 3


@pytest.mark.parametrize("header", ["1", "date"])
def test_retry_after_is_honoured(judge, header):
    scorer_ = scorer(judge)
    scorer_.score(items(["cat"]))
    judge.forget()
    times = []

    def reply(question):
        times.append(time.time())
        # A date has whole seconds; two ahead is more than one away.
        after = header if header == "1" else formatdate(time.time() + 2, usegmt=True)
        return (200, {}, words(yes=0.9, no=0.1)) if len(times) > 1 else (429, {"Retry-After": after}, b"later")

    judge.reply = reply
    assert not scorer_.score(items(["cat"])).failed
    assert 0.99 < times[1] - times[0] < 3


def test_no_time_for_what_it_was_told_to_wait(judge):
    scorer_ = scorer(judge, deadline_s="2")
    scorer_.score(items(["cat"]))
    judge.forget()
    judge.reply = lambda question: (429, {"Retry-After": "60"}, b"quota used up")
    started = time.monotonic()
    reason = scorer_.score(items(["cat"])).failed[0]
    assert time.monotonic() - started < 1
    assert len(judge.bodies) == 1
    assert "HTTP 429" in reason
    assert "quota used up" in reason
    assert "try 1 was the last" in reason


def test_refusals_and_timeouts_fail_items_and_are_not_repeated(judge):
    scorer_ = scorer(judge, deadline_s="1")
    scorer_.score(items(["warm"]))
    judge.forget()

    def reply(question):
        if "slow" in question:
            time.sleep(1.3)
        status = 400 if "bad" in question else 302 if "moved" in question else 200
        return status, {"Location": "/elsewhere"}, words(yes=0.5, no=0.5)

    judge.reply = reply
    scored = scorer_.score(items(["bad", "slow", "good", "moved"]))
    assert set(scored.failed) == {0, 1, 3}
    assert "HTTP 400" in scored.failed[0]
    assert "did not answer within 1.0 s" in scored.failed[1]
    assert "HTTP 302" in scored.failed[3]
    assert scored.scores_N[2].item() == 0.5
    assert len(judge.bodies) == 4


def test_an_endpoint_that_never_worked_is_a_mistake_of_the_set_up(judge):
    judge.reply = lambda question: (401, {}, b"who are you?")
    with pytest.raises(SetupError, match=r"judge-7b at http.*does not work: .*HTTP 401: 'who are you\?'"):
        scorer(judge).score(items(["cat"]))
    judge.reply = lambda question: (200, {}, text("yes"))
    with pytest.raises(SetupError, match="without log probabilities"):
        scorer(judge).score(items(["cat"]))
    with pytest.raises(SetupError, match="cannot be reached"):
        scorer(judge, base_url="http://127.0.0.1:9", deadline_s="1").score(items(["cat"]))
    judge.reply = lambda question: (200, {}, words(yes=0.5, no=0.5))
    assert not scorer(judge).score(items(["cat"])).failed


@pytest.mark.parametrize("place", ["key_env", "key_file"])
def test_the_key_is_sent_and_shown_nowhere(judge, place, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    (tmp_path / "key").write_text(KEY + "\n")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    settings = {"key_env": {"key_env": "JUDGE_KEY"}, "key_file": {"key_file": str(tmp_path / "key")}}[place]
    scorer_ = scorer(judge, **settings)
    scorer_.score(items(["cat"]))
    assert [headers["Authorization"] for _, headers in judge.headers] == [f"Bearer {KEY}"] * 2
    judge.reply = lambda question: (403, {}, f"the key {KEY} is used up".encode())
    reason = scorer_.score(items(["cat"])).failed[0]
    assert "the key *** is used up" in reason
    endpoint = openai_client.Endpoint("http://x", KEY)
    assert KEY not in caplog.text + repr(scorer_) + repr(endpoint) + str(scorer_.info)


def test_the_key_must_be_there(judge, tmp_path):
    (tmp_path / "two").write_text("a\nb")
    for settings, words_ in (
        ({"key_env": "NO_SUCH_KEY"}, "variable NO_SUCH_KEY"),
        ({"key_file": str(tmp_path / "none")}, "does not exist"),
        ({"key_file": str(tmp_path / "two")}, "one line"),
        ({"key_file": "x", "key_env": "Y"}, "one place only"),
    ):
        with pytest.raises(SetupError, match=words_):
            scorer(judge, **settings).score(items(["cat"]))
    assert not judge.bodies


def test_an_empty_mask_has_no_crop_and_costs_no_call(judge):
    batch = items(["cat", "dog"])
    batch.masks_N1HW[0] = 0
    scored = scorer(judge, view="mask_crop", question="{prompt}").score(batch)
    assert set(scored.invalid) == {0}
    assert "empty" in scored.invalid[0]
    assert scored.scores_N[1].item() == pytest.approx(0.75)
    assert judge.questions == ["{prompt}", "dog"]


@pytest.mark.parametrize(
    ("settings", "words_"),
    [
        ({"mode": "yesno"}, "mode must be one of yes_no, score, found 'yesno'"),
        ({"view": "masked"}, "view must be one of"),
        ({"base_url": "file:///etc"}, "must start with http"),
        ({"pattern": "Score"}, "one group"),
        ({"pattern": "("}, "one group"),
        ({"low": "5"}, "low must be less than high"),
        ({"at_once": "0"}, "at_once must be a finite number of at least 1"),
        ({"deadline_s": "NaN"}, "deadline_s must be a finite number of at least 0.1, found nan"),
        ({"low": "NaN"}, "low must be less than high"),
        ({"least_mass": "0"}, "least_mass"),
    ],
)
def test_impossible_settings_are_explained(judge, settings, words_):
    with pytest.raises(SetupError, match=words_):
        scorer(judge, **settings)


def test_the_fingerprint_follows_model_question_and_mode_but_not_how_to_reach_them():
    changes = ({}, {"model": "other"}, {"question": "Nice?"}, {"mode": "score"})
    assert len({load("vlm_judge", change).fingerprint for change in changes}) == 4
    operational = {"key_env": "KEY", "key_file": "key", "at_once": "2", "deadline_s": "9"}
    assert load("vlm_judge", operational).fingerprint == load("vlm_judge").fingerprint


@pytest.mark.parametrize(("header", "seconds"), [("", 0), ("3", 3), ("\u00b2", 0), ("soon", 0)])
def test_a_retry_after_that_says_nothing_is_no_time(header, seconds):
    assert openai_client._retry_after(header) == seconds
