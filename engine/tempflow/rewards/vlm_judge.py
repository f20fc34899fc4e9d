"""A vision-language model as a judge, through the OpenAI-compatible interface that vLLM, SGLang and
others offer.

Each image is one chat request: the prompt's condition images (with `conditions`), the image, and
the rubric with the prompt filled in. The answer is read strictly: if it is cut off, or is not
exactly one number within the scale, the image counts as failed, because a guessed score would be a
false signal. With `yes_no` the model is asked a question instead, and the score is P(Yes) / (P(Yes)
+ P(No)) at its first token, as in VQAScore (arXiv 2404.01291). This is finer than a written number
and needs one token only.
"""

from __future__ import annotations

import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tempflow.errors import UserError, shown
from tempflow.rewards.base import Reward, Scores
from tempflow.rewards.conditions import KEY, check_conditions
from tempflow.rewards.http.client import (
    LONGEST_S,
    Service,
    ServiceError,
    checked_url,
    token_of,
    wait_for,
)
from tempflow.rewards.http.protocol import encode_condition, encode_png

RATE = """You judge pictures that were generated from a prompt. The prompt is:

{prompt}

How well does the picture show everything that the prompt asks for, and how free of visible defects is it? Rate it from
{lowest} (nothing of the prompt, or ruined) to {highest} (all of it, flawless). Answer with one JSON object and nothing
else: {"score": a number from {lowest} to {highest}}"""
ASK = 'Does this picture show "{prompt}"? Answer with one word, Yes or No.'
EDIT_RATE = """You judge edits of images. The last image was made from the image or images before it by this instruction:

{prompt}

How well does the last image follow the instruction, how much of what the instruction leaves alone has it kept, and how free of visible
defects is it? Rate it from {lowest} (not followed, or ruined) to {highest} (followed, all else kept, flawless). Answer with one JSON
object and nothing else: {"score": a number from {lowest} to {highest}}"""
EDIT_ASK = """The last image was made from the image before it by the instruction "{prompt}". Does it follow the instruction and keep
everything else? Answer with one word, Yes or No."""

TOP_TOKENS = 20  # the most that OpenAI's interface and vLLM by default return
# The least probability of Yes and No together at the first token. Below it the model began another
# answer, and the ratio of the two says nothing.
LEAST_MASS = 0.5
_BACKOFF_S = 0.5  # before the first retry; doubles at each further one
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)  # models like to fence their JSON
_OURS = ("model", "messages", "logprobs", "top_logprobs", "n", "stream")  # not allowed in `extra`


class VlmJudge(Reward):
    """A vision-language model's rating of the image, scaled to [0, 1].

    Args:
        base_url: address of the server, with its /v1.
        model: name of the model on the server.
        rubric: the request's text, in which {prompt}, {lowest} and {highest} are replaced; "": a
            built-in one.
        rubric_file: a text file with the rubric, instead of `rubric`.
        pattern: regular expression with one group, the number, that must match the answer exactly
            once; "": the answer must be a JSON object with a number "score".
        lowest: the scale's lowest rating, which becomes 0.
        highest: the scale's highest rating, which becomes 1.
        yes_no: ask a question, and take the probability of the answer Yes.
        conditions: show the prompt's condition images before the image, scaled down to its longer
            side; the built-in rubric is then about edits.
        max_tokens: longest answer in tokens; 1 with `yes_no`.
        concurrency: requests at the same time for one batch.
        timeout_s: seconds for one request.
        retries: further tries of a failed request.
        wait_s: seconds to wait for a server that is not reachable, at the start and when a whole
            batch has failed.
        key_env: environment variable that holds the API key; "": no key.
        extra: further fields of the request's body.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        rubric: str = "",
        rubric_file: str = "",
        pattern: str = "",
        lowest: float = 0.0,
        highest: float = 10.0,
        yes_no: bool = False,
        conditions: bool = False,
        max_tokens: int = 256,
        concurrency: int = 8,
        timeout_s: float = 60.0,
        retries: int = 2,
        wait_s: float = 30.0,
        key_env: str = "",
        extra: dict | None = None,
    ):
        if not -math.inf < lowest < highest < math.inf:
            raise UserError(
                f"lowest must be below highest, got {shown(lowest)} and {shown(highest)}"
            )
        if (
            max_tokens < 1
            or concurrency < 1
            or retries < 0
            or not 0 < timeout_s <= LONGEST_S
            or not 0 <= wait_s <= LONGEST_S
        ):
            raise UserError(
                "max_tokens, concurrency and timeout_s must be above 0, retries and wait_s at least"
                f" 0, timeout_s and wait_s at most {LONGEST_S:g}; got max_tokens {max_tokens},"
                f" concurrency {concurrency}, timeout_s {timeout_s:g}, retries {retries}, wait_s"
                f" {wait_s:g}"
            )
        if yes_no and pattern:
            raise UserError("pattern: with yes_no no written answer is read; give one of the two")
        if extra is not None and (not isinstance(extra, dict) or set(extra) & set(_OURS)):
            raise UserError(
                f"extra: expected a table without {', '.join(_OURS)}, got {shown(extra)}"
            )
        self._conditions = conditions
        self._rubric = _rubric(rubric, rubric_file) or _question(yes_no, conditions)
        self._pattern = _compiled(pattern) if pattern else None
        self._lowest, self._highest, self._yes_no = lowest, highest, yes_no
        self._concurrency, self._retries, self._wait_s = concurrency, retries, wait_s
        self._service = Service(
            checked_url("base_url", base_url), token_of("key_env", key_env), timeout_s
        )
        self._body = {
            "model": model,
            "temperature": 0,  # the same image should get the same score
            "max_tokens": 1 if yes_no else max_tokens,
            **(extra or {}),
        }
        if yes_no:
            self._body |= {"logprobs": True, "top_logprobs": TOP_TOKENS}

    def check_prompts(self, prompts, metadata):
        if self._conditions:
            check_conditions(prompts, metadata)

    def load(self, threads=1):
        """Refuse a server that does not answer, or whose list of models lacks this one."""
        try:
            listed = wait_for(lambda: self._service.get("/models"), self._wait_s)
            names = [entry["id"] for entry in listed["data"]]
        except ServiceError as error:
            if error.status in (404, 405):  # a gateway that does not list its models
                return
            raise
        except (KeyError, TypeError):  # a list in another form; requests may still work
            return
        if self._body["model"] not in names:
            raise UserError(
                f"model: {self._service.url} serves {', '.join(map(str, names))}, not"
                f" {self._body['model']!r}"
            )

    def score(self, images, prompts, metadata):
        with ThreadPoolExecutor(self._concurrency) as threads:
            judged = list(threads.map(self._judge, images, prompts, metadata))
        if all(math.isnan(value) for value, _ in judged):
            # The pool will try the batch again. This waits until the server is back, so that a
            # server that restarts does not use up all tries.
            self.load()
        return Scores(
            np.array([value for value, _ in judged], dtype=np.float32),
            [detail for _, detail in judged],
        )

    def _judge(self, image: np.ndarray, prompt: str, entry: dict) -> tuple[float, str]:
        """(value, detail) of one image; NaN and the reason if it failed."""
        try:
            return self._read(
                self._ask(prompt, [*self._shown(entry, max(image.shape[:2])), encode_png(image)])
            )
        except (ServiceError, UserError, ValueError) as error:
            return math.nan, f"not scored: {error}"

    def _shown(self, entry: dict, longest: int) -> list[str]:
        """The condition images to show, as PNG files in base64."""
        return (
            [encode_condition(image, longest) for image in entry.get(KEY, ())]
            if self._conditions
            else []
        )

    def _ask(self, prompt: str, images: list[str]) -> dict:
        """The answer's first choice. Raises ServiceError, or ValueError for an answer without
        one."""
        values = {"prompt": prompt, "lowest": f"{self._lowest:g}", "highest": f"{self._highest:g}"}
        # Not str.format: rubrics contain the braces of JSON, and prompts may contain braces too.
        text = re.sub(r"\{(prompt|lowest|highest)\}", lambda match: values[match[1]], self._rubric)
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
            for image in images
        ]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        answer = self._post({**self._body, "messages": messages})
        try:
            return dict(answer["choices"][0])
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"the answer has no choices: {shown(answer)}") from None

    def _post(self, body: dict) -> Any:
        """The answer to a request, which is repeated if it fails for a reason that may pass."""
        for attempt in range(self._retries):
            try:
                return self._service.post("/chat/completions", body)
            except ServiceError as error:
                if not error.transient:
                    raise
            time.sleep(_BACKOFF_S * 2**attempt)
        return self._service.post(
            "/chat/completions", body
        )  # the last attempt, whose failure is the call's

    def _read(self, choice: dict) -> tuple[float, str]:
        """(value in [0, 1], detail) of an answer. Raises ValueError for one that cannot be read."""
        if self._yes_no:
            value = yes_probability(choice)
            return value, f"P(Yes) {value:.3f}"
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else None
        if not isinstance(text, str):
            raise ValueError("the answer has no text")
        # The number itself may be cut off: a pattern would read the beginning of 10 as 1.
        if choice.get("finish_reason") == "length":
            raise ValueError(f"the answer was cut off; raise max_tokens: {_short(text)}")
        rating = rating_of(text, self._pattern)
        if not self._lowest <= rating <= self._highest:
            raise ValueError(
                f"{rating:g} is outside {self._lowest:g} to {self._highest:g}: {_short(text)}"
            )
        return (rating - self._lowest) / (self._highest - self._lowest), _short(text)


def rating_of(text: str, pattern: re.Pattern | None) -> float:
    """The number in an answer.

    Args:
        text: the answer.
        pattern: a pattern with one group, the number; None: the answer must be a JSON object with a
            number "score", which may be fenced as Markdown code.

    Raises:
        ValueError: unless there is exactly one finite number.
    """
    if pattern is not None:
        found = pattern.findall(text)
        if len(found) != 1:
            raise ValueError(f"{len(found)} matches of the pattern, expected one: {_short(text)}")
        rating = found[0]
    else:
        fenced = _FENCED.fullmatch(text.strip())
        try:
            answer = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError):
            answer = None
        rating = answer.get("score") if isinstance(answer, dict) else None
        if isinstance(rating, (bool, str)):  # float() would take true for 1 and "7" for 7
            rating = None
    try:
        number = float(rating)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f'no number as "score" in the answer: {_short(text)}') from None
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a finite number: {_short(text)}")
    return number


def yes_probability(choice: dict) -> float:
    """P(Yes) / (P(Yes) + P(No)) at a choice's first token, summed over spellings such as "yes" and
    " Yes". Raises ValueError if Yes and No are unlikely, or if log-probabilities are missing."""
    try:
        tokens = [
            (str(entry["token"]), float(entry["logprob"]))
            for entry in choice["logprobs"]["content"][0]["top_logprobs"]
        ]
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(
            "the answer has no log-probabilities of its first token, which yes_no needs"
        ) from None
    mass = {"yes": 0.0, "no": 0.0}
    for token, logprob in tokens:
        word = token.strip(" \n\t▁Ġ.,!\"'").lower()  # ▁ and Ġ: how tokenizers write a space
        if word in mass:
            mass[word] += math.exp(min(0.0, logprob))  # at most 1, whatever the server says
    both = mass["yes"] + mass["no"]
    if not both >= LEAST_MASS:  # written so that NaN is refused too
        raise ValueError(
            f"Yes and No have only {both:.2f} of the first token's probability, at least"
            f" {LEAST_MASS} is needed; rephrase the question"
        )
    return mass["yes"] / both


def _question(yes_no: bool, conditions: bool) -> str:
    if conditions:
        return EDIT_ASK if yes_no else EDIT_RATE
    return ASK if yes_no else RATE


def _rubric(rubric: str, file: str) -> str:
    if not file:
        return rubric
    if rubric:
        raise UserError("rubric_file: give rubric or rubric_file, not both")
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"rubric_file: cannot read {file}: {error}") from None
    if not text.strip():
        raise UserError(f"rubric_file: {file} is empty")
    return text


def _compiled(pattern: str) -> re.Pattern:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"pattern: {shown(pattern)} is no regular expression: {error}") from None
    if compiled.groups != 1:
        raise UserError(
            f"pattern: {shown(pattern)} must have exactly one group, around the number; it has"
            f" {compiled.groups}"
        )
    return compiled


def _short(text: str) -> str:
    return " ".join(text.split())[:160]
